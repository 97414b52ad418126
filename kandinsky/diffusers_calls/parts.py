"""The parts of a pipeline that scripts speak to by themselves: `pipe.transformer` and `pipe.vae`.

They are settings of the pipeline that they belong to, and hold no weights.
"""

from __future__ import annotations

import dataclasses
import logging
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch

from kandinsky.common.given import as_whole, shown
from kandinsky.common.untrusted import read_json
from kandinsky.config.schema import Config, VAEConfig
from kandinsky.loading.device_map import parse_device_map

if TYPE_CHECKING:
    from kandinsky.diffusers_calls.base import DiffusersBase

logger = logging.getLogger(__name__)

# diffusers' names of attention backends -> our engines.
BACKENDS = {
    "native": "sdpa", "_native_cudnn": "sdpa_cudnn", "flash": "flash_attention_2", "_flash_3": "flash_attention_3",
    "sage": "sage", "flex": "flex",
}  # fmt: skip
FOR_NABLA = ("native", "flex")


class Transformer:
    """What scripts ask `pipe.transformer` for."""

    def __init__(self, pipe: DiffusersBase) -> None:
        self._pipe = pipe

    def set_attention_backend(self, backend: str) -> None:
        """native, _native_cudnn, flash, _flash_3, sage or flex. With block-sparse attention: native or flex."""
        attention = self._pipe._config.model.attention
        if backend not in BACKENDS:
            raise ValueError(
                f"attention backend {shown(backend)} is not known here: choose one of {', '.join(BACKENDS)}"
            )
        if attention.type == "nabla" and backend not in FOR_NABLA:
            raise ValueError(
                f"attention backend {backend!r} takes no block maps, and this model's attention is block-sparse: "
                f"choose {' or '.join(FOR_NABLA)}"
            )
        engine = BACKENDS[backend]
        if attention.type == "full" and backend == "flex":
            logger.info("flex: this model's attention is dense, and the fastest kernel for that is taken")
            engine = "auto"
        self._pipe._change(engine=engine)

    def reset_attention_backend(self) -> None:
        self._pipe._change(engine=None)

    def compile(
        self,
        fullgraph: bool = False,
        dynamic: bool | None = None,
        backend: str = "inductor",
        mode: str | None = None,
        options: object = None,
        disable: bool = False,
    ) -> None:
        """Compile the transformer's blocks, each as one graph for any length of text.

        Raises ValueError for other backends and modes, options, and dynamic=False.
        """
        if backend != "inductor" or options is not None or dynamic is False:
            raise ValueError(
                "blocks are compiled with inductor, without options, for any length of text: leave the rest out"
            )
        wanted = "off" if disable else "on"
        self._pipe._set_runtime(compile=wanted, compile_mode=mode or "default")

    compile_repeated_blocks = compile

    @property
    def device(self) -> torch.device:
        return self._pipe.device

    @property
    def dtype(self) -> torch.dtype:
        return self._pipe.dtype

    @property
    def config(self) -> SimpleNamespace:
        """Sizes and attention under diffusers' flat names."""
        model = self._pipe._config.model
        values = dataclasses.asdict(model.dit_params)
        values["visual_cond"] = values.pop("instruct_type") == "channel" or values["visual_cond"]
        attention = dataclasses.asdict(model.attention)
        for name in ("engine", "exact_steps", "exact_blocks"):  # what diffusers' config does not have
            del attention[name]
        attention["type"] = "nabla" if model.attention.type == "nabla" else "regular"
        return SimpleNamespace(**values, **{f"attention_{key}": value for key, value in attention.items()})


class VAE:
    """What scripts ask `pipe.vae` for."""

    def __init__(self, pipe: DiffusersBase) -> None:
        self._pipe = pipe
        self._untiled = pipe._config.model.vae

    def enable_tiling(
        self,
        tile_sample_min_height: int = 256,
        tile_sample_min_width: int = 256,
        tile_sample_min_num_frames: int = 16,
        tile_sample_stride_height: float = 192,
        tile_sample_stride_width: float = 192,
        tile_sample_stride_num_frames: float = 12,
        use_tiling: bool = True,
    ) -> None:
        """Decode in square tiles of that size in pixels. In time there are always windows of 17 frames, 8 apart, as the
        original has them: other numbers of frames than diffusers' defaults can't be honoured, and are a ValueError."""
        tile, stride = as_whole(tile_sample_min_height), as_whole(tile_sample_stride_height)
        if (tile_sample_min_width, tile_sample_stride_width) != (tile, stride):
            raise ValueError("tiles are square here: give height and width the same sizes and strides")
        if (tile_sample_min_num_frames, tile_sample_stride_num_frames) != (16, 12):
            raise ValueError(
                "windows in time are 17 frames, 8 apart: leave tile_sample_min_num_frames and its stride out"
            )
        if tile is None or stride is None or tile < 64 or tile % 8 or not tile // 2 <= stride <= tile or stride % 8:
            raise ValueError(
                f"tiles of {shown(tile_sample_min_height)} pixels every {shown(tile_sample_stride_height)}: both must "
                "be multiples of 8, tiles at least 64, and the stride at least half of a tile"
            )
        self._set(dataclasses.replace(self._untiled, spatial_tile=tile, spatial_overlap=tile - stride))

    def disable_tiling(self) -> None:
        """Tiles as this project has them by default."""
        self._set(self._untiled)

    def enable_slicing(self) -> None:
        """Nothing to do: videos are always decoded one after the other."""

    disable_slicing = enable_slicing

    def _set(self, vae: VAEConfig) -> None:
        def changed(config: Config) -> Config:
            return dataclasses.replace(config, model=dataclasses.replace(config.model, vae=vae))

        self._pipe._config = changed(self._pipe._config)
        if self._pipe._loaded is not None:  # tiles are made when something is decoded: nothing has to be loaded anew
            self._pipe._loaded.config = changed(self._pipe._loaded.config)

    @property
    def device(self) -> torch.device:
        return parse_device_map(self._pipe._device)["vae"]

    @property
    def dtype(self) -> torch.dtype:
        return self._pipe.dtype

    @property
    def config(self) -> SimpleNamespace:
        """The repository's own vae/config.json."""
        path = self._pipe._parts["vae"]
        return SimpleNamespace(**read_json((path if path.is_dir() else path.parent) / "config.json"))
