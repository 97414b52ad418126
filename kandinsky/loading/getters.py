"""The four calls that people load a pipeline with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from kandinsky.checkpoints.files import REPOSITORY
from kandinsky.common.given import shown
from kandinsky.config.reading import load_config, preset_file, with_settings
from kandinsky.config.schema import Config
from kandinsky.loading.assemble import load_pipeline
from kandinsky.loading.device_map import DeviceMap
from kandinsky.pipelines.base import Pipeline
from kandinsky.pipelines.image_to_image import ImageToImagePipeline
from kandinsky.pipelines.image_to_video import ImageToVideoPipeline
from kandinsky.pipelines.text_to_image import TextToImagePipeline
from kandinsky.pipelines.text_to_video import TextToVideoPipeline
from kandinsky.runtime.processes import Processes

DEFAULT_CONFIGS = {
    "t2v": REPOSITORY / "configs" / "config_5s_sft.yaml",
    "i2v": REPOSITORY / "configs" / "config_5s_i2v.yaml",
    "t2i": REPOSITORY / "configs" / "config_t2i.yaml",
    "i2i": REPOSITORY / "configs" / "config_i2i.yaml",
}
AnyPipeline = TypeVar("AnyPipeline", bound=Pipeline)


def _getter(task: str, pipeline: type[AnyPipeline]) -> Callable[..., AnyPipeline]:
    """`get_T2V_pipeline` and its three siblings: one signature, one docstring."""

    def get_pipeline(
        device_map: DeviceMap = None,
        cache_dir: str | Path = "./weights/",
        dit_path: str | Path | None = None,
        text_encoder_path: str | Path | None = None,
        text_encoder2_path: str | Path | None = None,
        vae_path: str | Path | None = None,
        conf_path: str | Path | None = None,
        offload: bool = False,
        magcache: bool = False,
        quantized_qwen: bool = False,
        text_token_padding: bool = True,
        attention_engine: str | None = None,
        *,
        dtype: str | torch.dtype | None = None,
        overrides: Sequence[str] = (),
        device_preset: str | None = None,
        config: Config | None = None,
        processes: Processes | None = None,
        resolution: int | None = None,
        **runtime: Any,
    ) -> AnyPipeline:
        """Load a pipeline.

        Args:
            device_map: one device for all, {"dit": ..., "vae": ..., "text_embedder": ...}, or None: a GPU where there
                is one, else the CPU.
            cache_dir: the folder that `./weights/` in a config stands for.
            dit_path, text_encoder_path, text_encoder2_path, vae_path: instead of the config's paths: a file, a folder,
                or a whole repository in diffusers' layout, of which the part is taken.
            conf_path: the YAML; None takes the task's first one (see `DEFAULT_CONFIGS`).
            offload, magcache, quantized_qwen: True switches on what the YAML calls runtime.offload, magcache.enabled
                and runtime.qwen_quantization.
            text_token_padding: padding never reaches the model here, which is exact; accepted for compatibility.
            attention_engine: instead of the config's `model.attention.engine`.
            dtype: "bfloat16", "float32" or "float16"; None takes bfloat16 on a GPU and float32 on a CPU.
            overrides: "key.key=value" over the YAML and the preset.
            device_preset: a file of configs/devices/, over the YAML: "8gb" to "80gb", or "cpu".
            config: an already loaded config instead of `conf_path`, `device_preset` and `overrides`.
            processes: those that make one output together, from `Processes.join`, each of which calls this with the
                same arguments. Without a device_map each takes the GPU of its number on its machine.
            resolution: what the original's examples name; it has to be the config's `metrics.resolution`.
            runtime: any key of the YAML's section `runtime`, such as compile="off" or blocks_on_gpu=8.

        Raises:
            ValueError: a file is missing, damaged or of another variant, an argument is wrong, or what the config makes
                does not fit this machine; before weights are read.
        """
        presets = [] if device_preset is None else [preset_file(device_preset)]
        config = config or load_config(conf_path or DEFAULT_CONFIGS[task], overrides, presets)
        wishes = {**runtime, **({"offload": True} if offload else {})}
        wishes |= {"qwen_quantization": True} if quantized_qwen else {}
        config = with_settings(config, runtime=wishes, magcache={"enabled": True} if magcache else {})
        if config.task != task:
            raise ValueError(
                f"{config.source} is a config for {config.task}: load it with get_{config.task.upper()}_pipeline"
            )
        if resolution is not None and resolution != config.metrics.resolution:
            ours = config.metrics.resolution
            raise ValueError(f"resolution is {shown(resolution)}, and {config.source} is for {ours}: leave it out")
        loaded = load_pipeline(
            config,
            device_map,
            cache_dir,
            dit_path=dit_path,
            text_encoder_path=text_encoder_path,
            text_encoder2_path=text_encoder2_path,
            vae_path=vae_path,
            attention_engine=attention_engine,
            dtype=dtype,
            processes=processes,
        )
        assert isinstance(loaded, pipeline)
        return loaded

    get_pipeline.__name__ = get_pipeline.__qualname__ = f"get_{task.upper()}_pipeline"
    return get_pipeline


get_T2V_pipeline = _getter("t2v", TextToVideoPipeline)
get_I2V_pipeline = _getter("i2v", ImageToVideoPipeline)
get_T2I_pipeline = _getter("t2i", TextToImagePipeline)
get_I2I_pipeline = _getter("i2i", ImageToImagePipeline)
