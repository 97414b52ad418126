"""Real-ESRGAN's published pickle as a safetensors file: python tools/convert_upscaler.py realesr-animevideov3.pth

    https://github.com/xinntao/Real-ESRGAN/releases/download/v0.2.5.0/realesr-animevideov3.pth

The pickle is opened with `weights_only`, with which torch makes tensors of it and runs nothing that stands in it. Of
what it holds ("params_ema" or "params", or the tensors themselves) the network's tensors are written, checked.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs without the project being installed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("file", type=Path, help="the .pth file")
    parser.add_argument("output", type=Path, nargs="?", help="default: the same name with .safetensors")
    args = parser.parse_args(arguments)
    output = args.output or args.file.with_suffix(".safetensors")
    if output.suffix != ".safetensors":
        parser.error(f"{output} must end in .safetensors")
    import torch
    from safetensors.torch import save_file

    from kandinsky.common.writing import atomic_path
    from kandinsky.models.upscaler import upscaler_of

    try:
        found = torch.load(args.file, map_location="cpu", weights_only=True)
        tensors = found.get("params_ema", found.get("params", found))
        upscaler_of({name: tensor.shape for name, tensor in tensors.items()})
    except Exception as error:  # a pickle that is none raises whatever it stumbles over
        print(f"error: {args.file}: {' '.join(str(error).split())[:300]}", file=sys.stderr)
        return 2
    with atomic_path(output) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
