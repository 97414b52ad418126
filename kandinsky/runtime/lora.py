"""LoRA adapters added to a DiT's weights: what a run computes with costs no time and no memory more than without.

What is merged is always computed from the weights in the checkpoint's file, never from what was merged before. So
every change is exact, and taking all adapters out gives back each bit. The price is that a change reads the layers in
question again, from memory that the system keeps anyway or else from disk: seconds for a 2B model. No second copy of
the weights exists, on the host or on the device. The adapters' own matrices stay in host memory.

A weight gets its adapters where it is: on the device in place, so that nothing a compiler has looked at changes; in
host memory where its block streams; and while it is brought where the DiT is offloaded (`Adapters.merge`). All of them
compute on the device, in float32, and round once, and so to the same bits. To quantised weights nothing can be added
exactly: there the matrices are on the device, in float32, and are added whenever a weight is dequantised.

Several adapters are added in the order they are named in. Those that only add come to a sum, in any order; DoRA scales
what the weight is by then, those before it included, as peft does it. An adapter's scale multiplies what is added; the
lengths of a DoRA stay what they are, again as in peft, and a scale of 0 is no adapter at all.

Knows neither devices nor where files are; the file format is checkpoints/lora_file.py's.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kandinsky.checkpoints.headers import open_tensors
from kandinsky.checkpoints.lora_file import AdapterConfig, LoraFile, read_lora
from kandinsky.checkpoints.lora_tensors import LOHA, LORA
from kandinsky.common.given import as_number, shown
from kandinsky.config.schema import DiTConfig
from kandinsky.models.numerics import is_finite
from kandinsky.runtime.block_swap import BlockSwap
from kandinsky.runtime.quantization import QuantizedLinear
from kandinsky.runtime.weight_changes import Change, Hadamard, Kronecker, LowRank, RowLengths, change_weight

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Matrices:
    """What an adapter changes a layer with: tensors by part (lora_tensors.py), on the host, in the file's dtype."""

    kind: str
    parts: Mapping[str, Tensor]
    scale: float

    def changes(self, scale: float, device: torch.device) -> list[Change]:
        """On the device, in float32, with the adapter's own scale times this one."""
        parts = {name: part.to(device).float() for name, part in self.parts.items()}
        factor = self.scale * scale
        changes: list[Change]
        if self.kind == LORA:
            changes = [LowRank(parts["up"] * factor, parts["down"])]
        elif self.kind == LOHA:
            changes = [Hadamard(parts["w1_a"] * factor, parts["w1_b"], parts["w2_a"], parts["w2_b"])]
        else:
            first, second = (
                parts[name] if name in parts else parts[f"{name}_a"] @ parts[f"{name}_b"] for name in ("kw1", "kw2")
            )
            changes = [Kronecker(first * factor, second)]
        if "magnitude" in parts:
            lengths = parts["magnitude"]
            changes.append(RowLengths(lengths[:, None] if lengths.ndim == 1 else lengths))
        return changes


@dataclass(frozen=True)
class Adapter:
    path: str
    trigger: str
    layers: dict[str, Matrices]


class NotFinite(ValueError):
    """An adapter makes weights that are no numbers any more."""


class Adapters:
    """The adapters of one DiT, by name; a part of its placement (see `kandinsky.runtime.offload.Part`).

    Args:
        dit: layers may be quantised, on the meta device, or stream. Who wraps parts of it does so after this.
        params: its sizes.
        originals: gives the checkpoint's tensors by name, on the host in any dtype, all but those of quantised layers.
            Called when the first weight is merged, and then for each change.
        device: where the DiT runs.
    """

    def __init__(
        self,
        dit: nn.Module,
        params: DiTConfig,
        originals: Callable[[], Mapping[str, Tensor]],
        device: torch.device,
    ) -> None:
        self.swap: BlockSwap | None = None  # what streams blocks, where there are any
        self._params = params
        self._originals = originals
        self._device = device
        self._modules = {name: m for name, m in dit.named_modules() if isinstance(m, nn.Linear | QuantizedLinear)}
        self._adapters: dict[str, Adapter] = {}
        self._scales: dict[str, float] = {}  # of those that are active
        self._changed: set[str] = set()  # layers that may have other weights than their own
        self._present = False  # whether the DiT is on its device

    # --- which there are ----------------------------------------------------------------------------------------------

    def load(self, adapter_config: AdapterConfig, path: Any, name: str = "default", trigger: str | None = None) -> None:
        """Read a file and make its adapter the only active one. Arguments and errors: `Pipeline.load_adapter`."""
        if not isinstance(name, str) or not name:
            raise ValueError(f"adapter_name is {name!r}; it must be a string")
        adapters, scales = dict(self._adapters), dict(self._scales)
        try:
            self.add(name, read_lora(path, self._params, adapter_config), trigger)
            self.activate({name: 1.0})
        except NotFinite:
            self._adapters = adapters
            self.activate(scales)
            raise

    def add(self, name: str, file: LoraFile, trigger: str | None = None) -> None:
        """Read the matrices of a file into memory, in the place of an adapter of the same name.

        Nothing is merged before `activate`. Raises ValueError for numbers that are not finite.
        """
        layers = _read_matrices(file)
        logger.info("adapter %s: %d layers of %s, alpha from %s", name, len(layers), file.path, file.alpha_from)
        self._adapters[name] = Adapter(str(file.path), file.trigger if trigger is None else trigger, layers)

    def take_over(self, others: Adapters) -> None:
        """Have the adapters that others have, none of them active yet."""
        self._adapters = dict(others._adapters)

    def activate(self, scales: Mapping[str, float]) -> None:
        """Have exactly these adapters in the weights, each times its scale.

        Raises ValueError for unknown names, and where the sum is no number. Nothing has changed then.
        """
        for name, scale in scales.items():
            if name not in self._adapters:
                known = ", ".join(self._adapters) or "none: load_adapter comes first"
                raise ValueError(f"there is no adapter {name!r}; loaded are {known}")
            if not math.isfinite(as_number(scale)):
                raise ValueError(f"the scale of {name} is {shown(scale)}; it must be a finite number")
        before, self._scales = self._scales, {name: as_number(scale) for name, scale in scales.items()}
        wanted = {layer for name, scale in self._scales.items() if scale for layer in self._adapters[name].layers}
        # Should something fail on the way, like memory, then the next change mends what this one left.
        self._changed |= wanted
        try:
            self._rewrite(self._changed)
        except NotFinite:
            self._scales = before
            self._rewrite(self._changed)
            raise
        self._changed = wanted

    @property
    def active(self) -> list[dict[str, Any]]:
        """Name, path, scale and trigger of the active adapters."""
        return [
            {"name": name, "path": self._adapters[name].path, "scale": scale, "trigger": self._adapters[name].trigger}
            for name, scale in self._scales.items()
        ]

    # --- into the weights ---------------------------------------------------------------------------------------------

    def merge(self, name: str, weight: Tensor) -> Tensor:
        """A parameter on the device with what is active added: a new tensor, or the same where nothing is.

        Raises ValueError where that makes numbers that are none of numbers.
        """
        layer = name.removesuffix(".weight")
        changes = self._changes(layer) if layer != name else ()
        if not changes:
            return weight
        merged = change_weight(weight, changes)
        if not is_finite(merged) and is_finite(weight):
            dtype = str(weight.dtype).removeprefix("torch.")
            raise NotFinite(
                f"{self._paths(layer)}: with it, {name} has values that are not finite in {dtype}: "
                "take the adapter out, or lower its scale"
            )
        return merged

    def _paths(self, layer: str) -> str:
        """For people, the files of the active adapters that change a layer."""
        return " and ".join(self._adapters[name].path for name in self._scales if layer in self._adapters[name].layers)

    def begin(self) -> None:
        self._present = True
        self._rewrite(layer for layer in self._changed if isinstance(self._modules[layer], QuantizedLinear))

    def end(self) -> None:
        self._present = False
        self._rewrite(layer for layer in self._changed if isinstance(self._modules[layer], QuantizedLinear))

    def _changes(self, layer: str) -> tuple[Change, ...]:
        """What the active adapters make of a layer, on the device; what they add as low rank all in one product."""
        changes: list[Change] = []
        for name, scale in self._scales.items():
            own = self._adapters[name].layers.get(layer)
            for change in own.changes(scale, self._device) if own is not None and scale else ():
                if changes and isinstance(change, LowRank) and isinstance(last := changes[-1], LowRank):
                    changes[-1] = LowRank(torch.cat((last.up, change.up), 1), torch.cat((last.down, change.down)))
                else:
                    changes.append(change)
        return tuple(changes)

    @torch.no_grad()
    def _rewrite(self, layers: Iterable[str]) -> None:
        """Give layers the weights that they shall have now, wherever these are."""
        for layer in layers:
            module = self._modules[layer]
            if isinstance(module, QuantizedLinear):
                module.changes = self._changes(layer) if self._present else ()
                continue
            name = f"{layer}.weight"
            streams = self.swap is not None and self.swap.streams(name)
            if module.weight.is_meta and not streams:
                continue  # it is merged when it is brought
            own = self._originals()[name].to(device=self._device, dtype=module.weight.dtype)
            merged = self.merge(name, own)
            if streams:
                assert self.swap is not None
                self.swap.overwrite(name, merged)
            else:
                module.weight.copy_(merged)


def _read_matrices(file: LoraFile) -> dict[str, Matrices]:
    layers = {}
    with open_tensors(file.path) as tensors:

        def read(name: str) -> Tensor:
            tensor = tensors.get_tensor(name).clone()  # into memory: the file may be written again while it is in use
            if not tensor.isfinite().all():
                raise ValueError(f"{file.path}: {name} has NaN or infinite values in it")
            return tensor

        for layer, names in file.layers.items():
            scale = names.scale
            if scale is None:
                assert names.alpha is not None and names.rank
                scale = read(names.alpha).item() / names.rank
            parts = {part: read(name) for part, name in names.parts.items() if part != "alpha"}
            layers[layer] = Matrices(names.kind, parts, scale)
    return layers
