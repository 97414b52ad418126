"""What diffusers' pipelines can do before and besides being called, done with ours: loading, devices, offloading, LoRA.

from_pretrained reads a repository's JSON and headers, and so says at once what is wrong. Its weights are read when
they are first needed: `to`, `enable_...` and `set_...` are settings until then, and where one changes later the
pipeline is loaded anew from the same files.

Knows repositories, settings and adapters; the calls are in call.py and pipelines.py.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, TypeVar

import torch

from kandinsky.checkpoints import hub
from kandinsky.checkpoints.diffusers_layout import (
    FILES,
    check_weights,
    config_of,
    is_complete,
    part_paths,
    scheduler_shift,
)
from kandinsky.common.given import as_whole, shown
from kandinsky.common.untrusted import home_path, is_plain_name
from kandinsky.config.reading import with_settings
from kandinsky.config.schema import Config, RuntimeConfig
from kandinsky.diffusers_calls.parts import VAE, Transformer
from kandinsky.loading.assemble import load_pipeline
from kandinsky.loading.device_map import DeviceMap, parse_device_map
from kandinsky.loading.devices import device_of_rank, resolve_dtype
from kandinsky.pipelines.base import Pipeline

logger = logging.getLogger(__name__)

AnyBase = TypeVar("AnyBase", bound="DiffusersBase")


class DiffusersBase:
    """One of the four pipelines, between its settings and the pipeline of ours that they make."""

    task: ClassVar[str]

    def __init__(self, config: Config, parts: dict[str, Path], device: DeviceMap, dtype: torch.dtype | None) -> None:
        self._config, self._parts, self._device, self._dtype = config, parts, device, dtype
        self._engine: str | None = None
        self._loaded: Pipeline | None = None
        self._adapters: dict[str, Path] = {}
        self._scales: dict[str, float] = {}  # of the active ones
        self._transformer, self._vae = Transformer(self), VAE(self)

    @classmethod
    def from_pretrained(
        cls: type[AnyBase],
        pretrained_model_name_or_path: str | Path,
        torch_dtype: str | torch.dtype | None = None,
        *,
        cache_dir: str | Path = "./weights/",
        token: str | None = None,
        local_files_only: bool = False,
        variant: str | None = None,
        device_map: DeviceMap = "cpu",
        use_safetensors: bool | None = None,
        overrides: Sequence[str] = (),
        **runtime: Any,
    ) -> AnyBase:
        """A pipeline from a repository in diffusers' layout: a folder, or a name on the hub.

        torch_dtype: None is float32, "auto" bfloat16 on a GPU. cache_dir: the folder that repositories are downloaded
        into, each under its own name. variant: the infix of the weights' names ("fp16"). overrides: "key.key=value"
        over the config that the repository is. runtime: keys of the YAML's section of that name, like
        dit_quantization="int8".

        Raises ValueError for what is damaged, another task's or can't be honoured, hub.DownloadError for what does not
        arrive; before weights are read.
        """
        if use_safetensors is False:
            raise ValueError("use_safetensors=False asks for pickles, which are not read here: leave it out")
        unknown = sorted(set(runtime) - {field.name for field in dataclasses.fields(RuntimeConfig)})
        if unknown:
            raise ValueError(
                f"from_pretrained can't honour {', '.join(unknown)} here: leave it out (docs/diffusers.md)"
            )
        folder = _folder_of(pretrained_model_name_or_path, cache_dir, token, local_files_only)
        config = config_of(folder, cls.task, Path(str(pretrained_model_name_or_path)).name, overrides)
        config = with_settings(config, runtime=runtime)
        parts = part_paths(folder, variant)
        check_weights(parts, config)
        parse_device_map(device_map)
        return cls(config, parts, device_map, _checked_dtype("float32" if torch_dtype is None else torch_dtype))

    @property
    def pipeline(self) -> Pipeline:
        """Ours, with weights: read when it is first asked for, and again after a setting that needs it has changed."""
        if self._loaded is None:
            self._loaded = load_pipeline(
                self._config,
                self._device,
                dit_path=self._parts["dit"],
                text_encoder_path=self._parts["text_encoder"],
                text_encoder2_path=self._parts["text_encoder2"],
                vae_path=self._parts["vae"],
                attention_engine=self._engine,
                dtype=self._dtype,
            )
            for name, path in self._adapters.items():
                self._loaded.load_adapter(None, path, name)
            if self._adapters:
                self._loaded.set_adapter(list(self._scales), list(self._scales.values()))
        return self._loaded

    @property
    def transformer(self) -> Transformer:
        return self._transformer

    @property
    def vae(self) -> VAE:
        return self._vae

    @property
    def scheduler(self) -> SimpleNamespace:
        """Its config has the shift; another FlowMatchEulerDiscreteScheduler may be set, of which the shift is taken."""
        shift = self._config.metrics.scheduler_scale
        return SimpleNamespace(config=SimpleNamespace(shift=shift, num_train_timesteps=1000))

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        values = {"_class_name": type(scheduler).__name__, **dict(getattr(scheduler, "config", {}))}
        shift = scheduler_shift(values, "the scheduler that is set")
        self._config = with_settings(self._config, metrics={"scheduler_scale": shift})

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and not hasattr(type(self), name):
            raise ValueError(f"{name} can't be set here: docs/diffusers.md says what can")
        super().__setattr__(name, value)

    def _change(self, **settings: Any) -> None:
        for name, value in settings.items():
            if getattr(self, f"_{name}") != value:
                setattr(self, f"_{name}", value)
                self._loaded = None

    def _set_runtime(self, **values: Any) -> None:
        self._change(config=with_settings(self._config, runtime=values))

    # --- where it runs ------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return parse_device_map(self._device)["dit"]

    @property
    def dtype(self) -> torch.dtype:
        return resolve_dtype(self._dtype, self.device)

    def to(self: AnyBase, *where: Any, device: Any = None, dtype: Any = None, **options: Any) -> AnyBase:
        """Run on a device, in a dtype; each as a keyword or by position."""
        if unknown := sorted(set(options) - {"silence_dtype_warnings"}):
            raise ValueError(f"to() can't honour {', '.join(unknown)}: leave it out")
        for one in where:
            is_dtype = isinstance(one, torch.dtype)
            dtype, device = (one, device) if is_dtype else (dtype, device if one is None else one)
        if device is not None:
            parse_device_map(device)
            self._change(device=device)
        if dtype is not None:
            self._change(dtype=_checked_dtype(dtype))
        return self

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: Any = None) -> None:
        """Each model is on its device only while its stage runs."""
        self._offload(gpu_id, device)

    def enable_sequential_cpu_offload(self, gpu_id: int | None = None, device: Any = None) -> None:
        """The same, and the transformer's blocks stream in one after the other."""
        self._offload(gpu_id, device, blocks_on_gpu=1)

    def enable_group_offload(
        self,
        onload_device: Any,
        offload_device: Any = "cpu",
        offload_type: str = "block_level",
        num_blocks_per_group: int | None = None,
        non_blocking: bool = False,
        use_stream: bool = False,
        record_stream: bool = False,
        low_cpu_mem_usage: bool = False,
        offload_to_disk_path: str | None = None,
        exclude_modules: str | Sequence[str] | None = None,
    ) -> None:
        """Models come and go with their stage, and `num_blocks_per_group` of the transformer's blocks stay at a time.

        Weights always stream ahead of the work, and lie in memory-mapped files; so the four flags have nothing to
        choose. Raises ValueError for other places than the host, and for modules that are excluded.
        """
        if str(offload_device) != "cpu" or offload_to_disk_path is not None or exclude_modules is not None:
            raise ValueError(
                "weights that are not in use lie in their files on disk: leave offload_device, offload_to_disk_path "
                "and exclude_modules out"
            )
        if offload_type not in ("block_level", "leaf_level"):
            raise ValueError(f"offload_type is {shown(offload_type)}; it must be block_level or leaf_level")
        blocks = as_whole(num_blocks_per_group) if offload_type == "block_level" else 1
        if blocks is None or blocks < 1:
            raise ValueError("offload_type block_level needs num_blocks_per_group, a whole number from 1")
        self._offload(None, onload_device, blocks_on_gpu=blocks)

    def _offload(self, gpu_id: int | None, device: Any, **runtime: Any) -> None:
        if device is None and gpu_id is None and self.device.type == "cpu" and device_of_rank(0) != "cpu":
            gpu_id = 0
        if device is None or str(device) == "cuda":
            device = device if gpu_id is None else f"cuda:{gpu_id}"
        if device is not None:
            self.to(device)
        self._set_runtime(offload="on", **runtime)

    # --- LoRA ---------------------------------------------------------------------------------------------------------

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path,
        adapter_name: str | None = None,
        *,
        weight_name: str | None = None,
        cache_dir: str | Path = "./weights/",
        token: str | None = None,
        local_files_only: bool = False,
    ) -> None:
        """Load an adapter from a file, a folder or the hub, and make it the only active one.

        Its alpha is the one in its config, metadata or file, and the rank only where none is said; a trigger in its
        metadata is told in the log, and not put before prompts, as in diffusers. Raises ValueError for what does not
        fit.
        """
        source = pretrained_model_name_or_path_or_dict
        if not isinstance(source, str | Path):
            raise ValueError(
                f"load_lora_weights takes a file, a folder or a name on the hub, not a {type(source).__name__}"
            )
        path = home_path(source)
        if not path.exists():
            path = _fetched(str(source), {"": ("*",)}, cache_dir, token, local_files_only)
        path = path if weight_name is None else path / weight_name
        name = adapter_name or f"default_{len(self._adapters)}"
        self.pipeline.load_adapter(None, path, name, trigger="")
        self._adapters[name], self._scales = path, {name: 1.0}

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] | None = None
    ) -> None:
        """Have exactly these active, each times its weight; None: as trained."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        weights = 1.0 if adapter_weights is None else adapter_weights
        if isinstance(weights, Sequence):
            weights = [1.0 if one is None else one for one in weights]
        if any(name not in self._adapters for name in names):
            raise ValueError(f"{shown(names)} are not all loaded; loaded are {', '.join(self._adapters) or 'none'}")
        self.pipeline.set_adapter(names, weights)
        self._scales = {one["name"]: one["scale"] for one in self.pipeline.active_adapters()}

    def get_active_adapters(self) -> list[str]:
        return list(self._scales)

    def disable_lora(self) -> None:
        """Have none active."""
        self.set_adapters([])

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Forget adapters; those of them that are active no longer are."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        left = {name: scale for name, scale in self._scales.items() if name not in names}
        self.set_adapters(list(left), list(left.values()))
        for name in names:
            if self._adapters.pop(name, None) is None:
                raise ValueError(f"there is no adapter {shown(name)}; loaded are {', '.join(self._adapters) or 'none'}")

    def unload_lora_weights(self) -> None:
        """Forget all adapters: the weights are the checkpoint's again, bit for bit."""
        if self._adapters:
            self.delete_adapters(list(self._adapters))


def _folder_of(name: str | Path, cache_dir: str | Path, token: str | None, local_files_only: bool) -> Path:
    """A repository's folder on this machine, downloaded where it is not there."""
    path = home_path(name)
    if path.is_dir():
        return path
    return _fetched(str(name), FILES, cache_dir, token, local_files_only)


def _fetched(
    repo: str, files: dict[str, tuple[str, ...]], cache_dir: str | Path, token: str | None, local_files_only: bool
) -> Path:
    owner, _, name = repo.partition("/")
    if not (is_plain_name(owner) and is_plain_name(name)):
        raise ValueError(f"{shown(repo)} is neither a folder here nor a name on the hub (owner/repository)")
    target = home_path(cache_dir) / name
    if local_files_only and not target.is_dir():
        raise ValueError(f"{repo} is not in {target}, and local_files_only is set")
    if not local_files_only and not (files is FILES and is_complete(target)):
        wanted = [hub.Source(repo, folder, names, target / folder) for folder, names in files.items()]
        hub.download(wanted, cache_dir, token)
    return target


def _checked_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    if not isinstance(dtype, str | torch.dtype):
        raise ValueError(f"torch_dtype is {shown(dtype)}; give one for all models, like torch.bfloat16")
    return None if dtype == "auto" else resolve_dtype(dtype, torch.device("cpu"))
