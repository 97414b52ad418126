"""The original's three calls for LoRA adapters, and what stands behind them: `pipe.adapters`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kandinsky.checkpoints.lora_file import AdapterConfig
from kandinsky.pipelines.calls import one_at_a_time
from kandinsky.pipelines.parts import Adapters, Parts


class AdapterCalls(Parts):
    """Adapters by name, of which any number is active."""

    @one_at_a_time
    def load_adapter(
        self,
        adapter_config: AdapterConfig,
        adapter_path: str | Path,
        adapter_name: str = "default",
        trigger: str | None = None,
    ) -> None:
        """Load a LoRA adapter and make it the only active one; one of the same name is replaced.

        Args:
            adapter_config: a JSON file, its content as a dict, or peft's LoraConfig; None: what lies beside the file,
                or is in it (see kandinsky/checkpoints/lora_file.py).
            adapter_path: a safetensors file in the layout of the official adapters, of peft, diffusers or ComfyUI, or
                a folder with one.
            adapter_name: what `set_adapter` calls it.
            trigger: put before every prompt while the adapter is active, as it is: end it with a space or a comma.
                None: what the file says, which may be nothing. Prompts that come as `prompt_embeds` get none.

        Raises:
            ValueError: the file does not fit the model in all its parts. Nothing has changed then.
        """
        self._adapters().load(adapter_config, adapter_path, adapter_name, trigger)

    @one_at_a_time
    def set_adapter(self, adapter_name: str | Sequence[str], scale: float | Sequence[float] = 1.0) -> None:
        """Have exactly these of the loaded adapters active, with one scale for all or one each; 1 is as trained.

        Raises ValueError for names that are not loaded, and for scales that are not finite or not as many as names.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        scales = list(scale) if isinstance(scale, Sequence) else [scale] * len(names)
        if len(scales) != len(names) or len(set(names)) != len(names):
            raise ValueError(f"{len(scales)} scales for the adapters {names}: name each once, with one scale each")
        self._adapters().activate(dict(zip(names, scales, strict=True)))

    @one_at_a_time
    def disable_adapters(self) -> None:
        """Have none active: the weights are again those of the checkpoint, bit for bit. `set_adapter` brings back."""
        self._adapters().activate({})

    def _adapters(self) -> Adapters:
        if self.adapters is None:
            raise ValueError(
                "this pipeline takes no adapters: make one with kandinsky.get_T2V_pipeline or its siblings, "
                "and without shard_weights"
            )
        return self.adapters
