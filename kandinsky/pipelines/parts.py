"""What a pipeline is put together from, as its stages see it: models, and what loading puts around them.

Knows what each part can be asked for; which one it is, with which devices, files and processes behind it, is for
loading to say.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor

from kandinsky.checkpoints.lora_file import AdapterConfig
from kandinsky.coarse import CoarseSteps, coarse_steps
from kandinsky.config.schema import Config
from kandinsky.models.dit import DiffusionTransformer3D, Execution
from kandinsky.models.vae_flux import AutoencoderKL
from kandinsky.models.vae_hunyuan import AutoencoderKLHunyuanVideo
from kandinsky.models.vae_tiling import MapTiles
from kandinsky.models.vae_tiny import TinyDecoder
from kandinsky.outputs.preview import LatentRGB
from kandinsky.request import Request
from kandinsky.sampling.sampler import Branch, Guidance, Velocity
from kandinsky.text.embeddings import PromptEncoder
from kandinsky.text.expansion import PromptExpander

Value = TypeVar("Value")

# callback(pipe, step, timestep, tensors) -> tensors to replace, or None
StepCallback = Callable[[Any, int, Tensor, dict[str, Any]], Mapping[str, Any] | None]


class Placement(Protocol):
    """Where components run: `use(name)` makes one ready on its device for the length of a stage."""

    def device(self, component: str) -> torch.device: ...

    def use(self, component: str) -> AbstractContextManager[Any]: ...


class Adapters(Protocol):
    """The DiT's LoRA adapters: any number are loaded, and some of these active."""

    def load(self, adapter_config: AdapterConfig, path: Any, name: str, trigger: str | None) -> None: ...

    def activate(self, scales: Mapping[str, float]) -> None: ...

    @property
    def active(self) -> Sequence[Mapping[str, Any]]:
        """name, path, scale and trigger of each."""
        ...


class BlockCache(Protocol):
    """What spares one request some of its passes through the DiT's blocks."""

    def skipped_of(self, sample: int) -> int:
        """Evaluations so far, of this sample, that left blocks out."""
        ...

    def spares(self, blocks: int) -> int:
        """How many of so many blocks these left out, each."""
        ...

    def evaluate(self, branch: Branch, sample: int, run: Callable[..., Tensor], execution: Execution) -> Tensor:
        """The branch's next velocity (1, T, H, W, C) of this sample: without a cache, `run(execution=execution)`."""
        ...

    def saved(self) -> dict[str, Tensor]:
        """What `restore` needs to go on in another process."""
        ...

    def restore(self, residuals: Mapping[str, Tensor], done: Mapping[Branch, int], samples: int) -> None:
        """Go on after so many evaluations of each branch of each sample."""
        ...


# For each step of a request, whether it has an unconditional evaluation, and how long it is, that is by how much the
# noise level falls in it -> the request's own cache.
MakeCache = Callable[[Sequence[bool], Sequence[float]], BlockCache]


class Team(Protocol):
    """The processes that make an output together, all of which run the same pipeline with the same arguments.

    The first one writes and shows its progress; its seeds and noise are everybody's.
    """

    is_first: bool
    size: int

    @property
    def map_tiles(self) -> MapTiles:
        """Who decodes which of the VAE's tiles."""
        ...

    def agree(self, value: Value) -> Value:
        """The first process's value, in all of them."""
        ...

    def any(self, flag: bool) -> bool:
        """Whether it is set in any of them."""
        ...

    def all_in_sequence(self, flag: bool) -> bool:
        """Whether it is set in all of them that share this one's evaluations, each of which asks at once."""
        ...

    def together(self, attempt: Callable[[], Value]) -> Value:
        """What it returns; or an error, in all of them, that says that memory ran out in any."""
        ...

    def split_guidance(self, velocity: Velocity, plan: Sequence[Guidance]) -> Velocity:
        """The same velocity, maybe with its branches computed by different processes."""
        ...

    def over_branches(self, counts: Sequence[int]) -> list[int]:
        """What all processes counted that computed different branches."""
        ...

    def from_branches(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What all processes hold that computed different branches."""
        ...


class Frugality(Protocol):
    """What a stage that runs out of memory can go on with (see retries.py)."""

    def settings(self, config: Config, request: Request | None, stage: str, on_host: bool) -> Mapping[str, Any]:
        """Settings of `runtime` with which a stage takes less than with those of `config`; none: nothing takes less.

        on_host: whether it was the host's memory that ran out.
        """
        ...

    def load(self, config: Config, before: Parts) -> Parts:
        """The same models under a config with such settings, and the adapters of the pipeline `before`. Nothing of it
        is on a device before its stage."""
        ...


class Alone:
    """A team of one."""

    is_first = True
    size = 1
    map_tiles: MapTiles = map

    def agree(self, value: Value) -> Value:
        return value

    def any(self, flag: bool) -> bool:
        return flag

    def all_in_sequence(self, flag: bool) -> bool:
        return flag

    def together(self, attempt: Callable[[], Value]) -> Value:
        return attempt()

    def split_guidance(self, velocity: Velocity, plan: Sequence[Guidance]) -> Velocity:
        return velocity

    def over_branches(self, counts: Sequence[int]) -> list[int]:
        return list(counts)

    def from_branches(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors


class Parts:
    """The models and all around them: what every stage works with."""

    def __init__(
        self,
        config: Config,
        dit: DiffusionTransformer3D,
        text_embedder: PromptEncoder,
        vae: AutoencoderKLHunyuanVideo | AutoencoderKL,
        placement: Placement,
        *,
        execution: Execution | None = None,
        make_cache: MakeCache | None = None,
        team: Team | None = None,
        latent_rgb: LatentRGB | None = None,
        tiny_decoder: TinyDecoder | None = None,
        expander: PromptExpander | None = None,
        adapters: Adapters | None = None,
        frugality: Frugality | None = None,
    ) -> None:
        """execution: how the DiT is run; None: in plain PyTorch. make_cache: makes each request a cache of its own;
        None: every evaluation runs all blocks. team: the processes that this one works with; None: it works alone.
        latent_rgb: what small previews are made with; None: there are none. tiny_decoder: what makes those beside an
        output where there is one, and the output where the config says so. expander: writes prompts out; None: this
        model, or this process, can't. adapters: the DiT's; None: it can have none. frugality: how to go on where memory
        runs out; None: not at all."""
        self.config = config
        self.dit = dit
        self.text_embedder = text_embedder
        self.vae = vae
        self.placement = placement
        self.execution = execution or Execution()
        self.make_cache = make_cache
        self.team: Team = team or Alone()
        self.latent_rgb = latent_rgb
        self.tiny_decoder = tiny_decoder
        self.expander = expander
        self.adapters = adapters
        self.frugality = frugality
        self.taken: list[str] = []  # settings that want of memory has brought this pipeline to
        self.relatives = weakref.WeakSet([self])  # pipelines with the same models
        # Whether prompts are written out unasked: not where Qwen is read anew for every word.
        self.expands_unasked = config.runtime.stream_encoders != "on"
        self.interrupt = self._is_stopping = False
        self.is_denoising = False
        self.lock = threading.RLock()  # who holds it has models and adapters to itself

    def under(self, config: Config) -> Self:
        """The same models under another config, which differs in nothing that they were loaded by.

        Want of memory that one of them meets changes both (retries.py).
        """
        if config == self.config:
            return self
        other = copy.copy(self)
        other.config = config
        other.relatives.add(other)
        return other

    def active_adapters(self) -> list[dict[str, Any]]:
        """Name, path, scale and trigger of each."""
        return [] if self.adapters is None else [dict(one) for one in self.adapters.active]

    @property
    def dtype_name(self) -> str:
        """Of the DiT. Not that of any parameter: time embedding and modulations keep what their file has."""
        return str(self.dit.visual_embeddings.in_layer.weight.dtype).removeprefix("torch.")

    def _coarse(self, request: Request) -> CoarseSteps | None:
        """The first steps of a request that are on a smaller grid; None: none."""
        return coarse_steps(self.config, request.num_steps, request.width, request.height)

    @property
    def uses_nabla(self) -> bool:
        """Whether visual self-attention is block-sparse."""
        return self.config.model.attention.type == "nabla"

    def _devices(self) -> list[torch.device]:
        return list(dict.fromkeys(self.placement.device(name) for name in ("text_embedder", "dit", "vae")))
