"""Models that are on their device only while their stage runs.

Between stages an offloaded model has its weights on the host: memory-mapped files in the files' own dtypes, which the
system drops and reads again as it likes, or whatever tensors it was given. Its own parameters are then on the meta
device, in the dtypes and memory formats that they have on the device. So code may ask for those at any time, and
nothing can compute with weights that are not there. A stage begins with casting and copying the weights to the device,
a GPU by way of `Staging`, and ends with dropping the copies; nothing is ever copied back.

The text encoders are not even loaded before there is a prompt to encode, and forgotten after it.

Knows neither files nor which device there is, and of models only that they have parameters and buffers. The device may
be the CPU: the weights in use are then a second copy.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from kandinsky.runtime.staging import Staging
from kandinsky.text.embedder import TextEmbedder
from kandinsky.text.embeddings import TextEmbeddings

if TYPE_CHECKING:
    from PIL import Image


class Part(Protocol):
    """What comes to a device when a stage begins and goes when it ends.

    `end` is called after a `begin` that failed, too, and must then drop whatever that one had brought.
    """

    def begin(self) -> None: ...

    def end(self) -> None: ...


class OffloadPlacement:
    """Each component is on its device only within `use`; those without parts have nothing to bring.

    `use` may be nested, as where a callback of one run starts another, and entered by several threads: the first brings
    and the last drops, and nobody goes on before what he uses is there.
    """

    def __init__(self, devices: Mapping[str, torch.device], parts: Mapping[str, Sequence[Part]]) -> None:
        self.devices = devices
        self.parts = parts
        self._users = dict.fromkeys(devices, 0)
        self._lock = threading.RLock()  # of bringing and dropping

    def device(self, component: str) -> torch.device:
        return self.devices[component]

    @contextmanager
    def use(self, component: str) -> Iterator[None]:
        assert component in self.devices, component
        parts = self.parts.get(component, ())
        try:
            with self._lock:
                self._users[component] += 1
                if self._users[component] == 1:
                    for part in parts:
                        part.begin()
            yield
        finally:
            with self._lock:
                self._users[component] -= 1
                if self._users[component] == 0:
                    for part in parts:
                        part.end()
                    if self.devices[component].type == "cuda":
                        torch.cuda.empty_cache()  # the next stage's tensors have other sizes; once a stage is nothing


class Offloaded:
    """A model whose weights come to its device with `begin` and are dropped by `end`.

    Args:
        model: on the meta device, its tensors in the dtypes and memory formats that they shall have on the device.
        weights: by the names of the model's parameters and buffers, tensors on the host in any dtype. Those that are
            not named are somebody else's (see `BlockSwap`).
        device: where the model runs.
        adapt: each tensor on the device, with its name -> the one to compute with, of the same dtype and shape.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, Tensor],
        device: torch.device,
        adapt: Callable[[str, Tensor], Tensor] | None = None,
    ) -> None:
        self.device = device
        self._adapt = adapt
        # By owner and not by name: names change when somebody wraps a part of the model.
        self._slots = [(name, slot, weights[name]) for name, slot in slots_of(model) if name in weights]
        assert len(self._slots) == len(weights), "weights that the model does not have"

    def begin(self) -> None:
        places = ((self._place(slot.empty), weight) for _, slot, weight in self._slots)
        with Staging(self.device) as staging:
            tensors = staging.bring(places) if self.device.type == "cuda" else (x.copy_(w) for x, w in places)
            for (name, slot, _), tensor in zip(self._slots, tensors, strict=True):
                slot.fill(tensor if self._adapt is None else self._adapt(name, tensor))

    def end(self) -> None:
        for _, slot, _ in self._slots:
            slot.clear()

    def _place(self, empty: Tensor) -> Tensor:
        # What torch.empty_like gives for a dense tensor; of one on the meta device that imports sympy first.
        return torch.empty_strided(empty.shape, empty.stride(), dtype=empty.dtype, device=self.device)


class TextEncodersOnDemand:
    """Text encoders that are loaded for the first prompt, and forgotten when their stage ends."""

    def __init__(self, load: Callable[[], TextEmbedder]) -> None:
        self._load = load
        self._loaded: TextEmbedder | None = None

    def encode(
        self,
        prompts: Sequence[str],
        content: str = "video",
        images: Sequence[Image.Image] | None = None,
        max_length: int | None = None,
    ) -> TextEmbeddings:
        return self.loaded().encode(prompts, content, images, max_length)

    def loaded(self) -> TextEmbedder:
        """The encoders themselves, until the stage ends."""
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    def begin(self) -> None:
        """Nothing yet: all prompts of the stage may be in a cache."""

    def end(self) -> None:
        self._loaded = None


class Slot:
    """The place of one parameter or buffer in a module. `empty` is the tensor on the meta device that is there now."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self._module = module
        self._name = name
        self._is_parameter = name in module._parameters
        empty = module._parameters[name] if self._is_parameter else module._buffers[name]
        assert empty is not None and empty.is_meta, name
        self.empty: Tensor = empty

    def fill(self, tensor: Tensor) -> None:
        self._set(nn.Parameter(tensor, requires_grad=False) if self._is_parameter else tensor)

    def clear(self) -> None:
        self._set(self.empty)

    def _set(self, tensor: Tensor) -> None:
        if self._is_parameter:
            assert isinstance(tensor, nn.Parameter)
            self._module._parameters[self._name] = tensor
        else:
            self._module._buffers[self._name] = tensor


def slots_of(model: nn.Module) -> Iterator[tuple[str, Slot]]:
    """The places of all parameters and buffers of a model on the meta device, by name."""
    for prefix, module in model.named_modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                yield f"{prefix}.{name}" if prefix else name, Slot(module, name)


def take_weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters and buffers by name. It keeps none: what it has from now on is on the meta device."""
    weights: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                weights[f"{prefix}.{name}" if prefix else name] = tensor.detach()
                empty = torch.empty_like(tensor, device="meta")
                is_parameter = isinstance(tensor, nn.Parameter)
                tensors[name] = nn.Parameter(empty, requires_grad=False) if is_parameter else empty
    return weights
