"""Writes a DiT's checkpoint with its linear layers in int8, fp8 or nf4: a file half as large or less, that loads as is.

    python tools/quantize.py --config configs/config_5s_sft.yaml --dit_quantization int8 --output lite_int8.safetensors
    python test.py --config configs/config_5s_sft.yaml --prompt "..." model.checkpoint_path=lite_int8.safetensors

What the file is, loading sees from its header. A pipeline of it makes the same video, bit for bit, as one that
quantises the bfloat16 checkpoint while it loads. Runs on a CPU, in memory for the result and the largest tensor.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs without the project being installed


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", type=Path, required=True, help="the variant's YAML; its checkpoint is read")
    parser.add_argument("--dit_quantization", choices=("int8", "fp8", "nf4"), required=True)
    parser.add_argument("--output", type=Path, required=True, help="a .safetensors file that is not there yet")
    parser.add_argument("--cache_dir", default="./weights/", help="the folder that ./weights/ in the YAML stands for")
    parser.add_argument("--dtype", default="bfloat16", help="of what is not quantised (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the YAML")
    return parser.parse_args(argv)


def quantize(args: argparse.Namespace) -> tuple[int, int]:
    """Write the file; returns the bytes of tensors and headers read and written. Raises ValueError as loading does."""
    from kandinsky.checkpoints.files import find_weights, missing_weights_message, resolve_path
    from kandinsky.config.reading import load_config

    if args.output.suffix != ".safetensors" or args.output.exists():
        raise ValueError(f"{args.output} exists or is not a .safetensors file: name a new one")
    if not args.output.parent.is_dir():
        raise ValueError(f"there is no folder {args.output.parent} to write to: make it")
    config = load_config(args.config, args.overrides)
    path = resolve_path(config.model.checkpoint_path, config, args.cache_dir)
    if not path.exists():
        raise ValueError(missing_weights_message(path, config))

    from kandinsky.loading.devices import resolve_dtype
    from kandinsky.loading.dit import load_dit
    from kandinsky.runtime.quantization import save_checkpoint

    dtype = resolve_dtype(args.dtype, "cpu")
    dit = load_dit(path, config.model.dit_params, "cpu", dtype, args.dit_quantization)
    save_checkpoint(dit, args.output)
    return sum(file.stat().st_size for file in find_weights(path)), args.output.stat().st_size


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        read, written = quantize(args)
    except (ValueError, OSError) as error:
        print("error:", error, file=sys.stderr)
        return 2
    print(f"{args.output}: {written / 1e6:,.0f} MB, {100 * written / read:.0f} % of what was read")
    return 0


if __name__ == "__main__":
    sys.exit(main())
