"""Where approximate attention costs most: its error by step and by block, and what exact steps and blocks bring back.

    python benchmarks/exact.py                                                     # int8, as SageAttention has it
    python benchmarks/exact.py --config configs/config_tiny_t2v_10s.yaml --engine sdpa --P 0.3     # NABLA

Along a run whose attention is dense and exact, each evaluation is repeated with one block's attention approximate, and
with that of all blocks; the error is that of the velocity, ||approximate - exact|| / ||exact||, over all prompts and
both branches of guidance. Then whole runs of the same seeds, their pixels beside the exact run's.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone, installed or not

import torch
from torch import Tensor

import kandinsky
from benchmarks.attention import processor_name

PROMPTS = (
    "a red circle moves left on a white background",
    "a blue cross grows on a black background",
    "a green square rotates on a yellow background",
)
NOWHERE: dict[str, Any] = {"exact_steps": (0.0, 0.0), "exact_blocks": ()}
EVERYWHERE: dict[str, Any] = {"exact_steps": (0.0, 1.0)}
RUNS: dict[str, dict[str, Any]] = {
    "nowhere": {},
    "first quarter of the steps": {"exact_steps": (0.0, 0.25)},
    "last quarter of the steps": {"exact_steps": (0.75, 1.0)},
    "first block": {"exact_blocks": (0,)},
    "last block": {"exact_blocks": (-1,)},
    "first and last block": {"exact_blocks": (0, -1)},
}


def run(pipe: Any, prompts: list[str], steps: int | None, settings: dict[str, Any]) -> Tensor:
    """Pixels (prompts, 3, frames, height, width) in [0, 1], attention exact where the settings say so."""
    attention = dataclasses.replace(pipe.config.model.attention, **{**NOWHERE, **settings})
    pipe.config = dataclasses.replace(pipe.config, model=dataclasses.replace(pipe.config.model, attention=attention))
    pixels = pipe(prompts, seed=0, num_steps=steps, expand_prompts=False, progress=False)
    return pixels.float() / 255


def errors_by_step(pipe: Any, prompts: list[str], steps: int | None) -> Tensor:
    """Relative errors of the velocity (steps, blocks + 1): with each block approximate, and last with all of them."""
    forward, count = pipe.dit.forward, len(pipe.dit.visual_transformer_blocks)
    everywhere = frozenset(range(count))
    squares: dict[float, list[Tensor]] = defaultdict(list)  # by timestep: of the errors, and of the velocity

    def measured(latents: Tensor, text: Tensor, pooled: Tensor, timestep: Tensor, **options: Any) -> Tensor:
        def velocity(exact: frozenset[int]) -> Tensor:
            execution = dataclasses.replace(options["execution"], exact_blocks=exact, calls=None)
            out: Tensor = forward(latents, text, pooled, timestep, **{**options, "execution": execution})
            return out

        plain = velocity(everywhere)
        approximate = [velocity(everywhere - {block}) for block in range(count)] + [velocity(frozenset())]
        parts = [(other - plain).square().sum() for other in approximate] + [plain.square().sum()]
        squares[float(timestep)].append(torch.stack(parts))
        return plain

    pipe.dit.forward = measured
    try:
        run(pipe, prompts, steps, EVERYWHERE)
    finally:
        del pipe.dit.forward
    sums = torch.stack([torch.stack(squares[timestep]).sum(0) for timestep in sorted(squares, reverse=True)])
    return (sums[:, :-1] / sums[:, -1:]).sqrt()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    default = Path(__file__).resolve().parents[1] / "configs" / "config_tiny_t2v.yaml"
    parser.add_argument("--config", type=Path, default=default, help="of a video model (default: the tiny one)")
    parser.add_argument("--engine", default="sage_emulated", help="whose error is measured (default: %(default)s)")
    parser.add_argument("--P", type=float, help="what NABLA keeps; the config's unless given")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), choices=range(1, len(PROMPTS) + 1))
    parser.add_argument("--steps", type=int, help="the config's unless given")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    overrides = ["model.attention.exact_steps=[0,1]"]  # so that there is an exact engine
    overrides += [] if args.P is None else [f"model.attention.P={args.P}"]
    options = {"conf_path": args.config, "attention_engine": args.engine, "overrides": overrides}
    pipe, prompts = kandinsky.get_T2V_pipeline(args.device, **options), list(PROMPTS[: args.prompts])

    print(f"python {' '.join(sys.argv)}")
    print(f"{processor_name()}; torch {torch.__version__}; {len(prompts)} prompts")
    table = 100 * errors_by_step(pipe, prompts, args.steps)
    print("\nerror of the velocity in %, by step and by the block whose attention is approximate")
    print("  step " + "".join(f"{block:>8}" for block in [*range(table.shape[1] - 1), "all"]))
    for step, row in enumerate(table.tolist()):
        print(f"  {step:>4} " + "".join(f"{error:8.3f}" for error in row))
    print("  mean " + "".join(f"{error:8.3f}" for error in table.mean(0).tolist()))

    expected = run(pipe, prompts, args.steps, EVERYWHERE)
    print(
        "\nwhole runs beside the exact one: where attention is exact, PSNR of all pixels and of the worst video in dB"
    )
    for name, settings in RUNS.items():
        squares = (run(pipe, prompts, args.steps, settings) - expected).square().flatten(1).mean(1)
        whole, worst = (-10 * math.log10(max(value, 1e-12)) for value in (squares.mean().item(), squares.max().item()))
        print(f"  {name:28}{whole:8.1f}{worst:8.1f}")


if __name__ == "__main__":
    main()
