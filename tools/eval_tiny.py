"""Scores the tiny text-to-video checkpoint on held-out captions, from the generated pixels alone.

    python tools/eval_tiny.py --config configs/config_tiny_t2v.yaml --num 100 --output report.json --sheet sheet.png
    python tools/eval_tiny.py --config configs/config_tiny_t2v.yaml --vae 32

The first generates a clip for each of N captions whose combinations were never trained on and counts how often shape,
colour, motion and background are what the caption says; what cannot be recognised counts as wrong. The second sends
whole unseen clips through the VAE's encode and decode and reports PSNR, and what ``measure`` still reads from them:
no generated clip can be expected to score better than that. Knows the pipeline by its public call only.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs without the project being installed

from tools.tiny_world import Attributes, Measured, caption, measure, render, scene_for, test_combinations

Generate = Callable[[str, int], Any]  # (caption, seed) -> uint8 (3, T, H, W), a torch tensor


def held_out(num: int, seed: int = 0) -> list[tuple[Attributes, int]]:
    """``num`` held-out combinations and a seed for each, the same every time and even over all attribute values.
    Beyond 128 the combinations come round again with other seeds."""
    combinations = test_combinations()
    return [(combinations[i % len(combinations)], seed + i) for i in range(num)]


def score(frames: np.ndarray, attributes: Attributes) -> tuple[dict[str, bool], Measured]:
    """Which of the four attributes uint8 frames (T, H, W, 3) show as asked, and what they show instead."""
    measured = measure(frames)
    return measured.agrees(attributes), measured


def evaluate(
    generate: Generate, num: int, seed: int = 0, progress: Callable[[str], None] | None = None
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Generates and scores ``num`` held-out captions; returns the report and the clips, each uint8 (T, H, W, 3)."""
    samples: list[dict[str, Any]] = []
    clips: list[np.ndarray] = []
    started = time.perf_counter()
    for attributes, clip_seed in held_out(num, seed):
        frames = generate(caption(attributes), clip_seed).permute(1, 2, 3, 0).cpu().numpy()  # (T, H, W, 3)
        right, measured = score(frames, attributes)
        clips.append(frames)
        samples.append(
            {
                "caption": caption(attributes),
                "seed": clip_seed,
                "asked": attributes._asdict(),
                "seen": {name: getattr(measured, name) for name in Attributes._fields},
                "right": right,
                "diagnostics": measured.diagnostics,
            }
        )
        if progress is not None:
            progress(f"{len(samples)}/{num} clips, {(time.perf_counter() - started) / len(samples):.1f} s each")
    report = summarise(samples) | {"num": num, "seed": seed, "samples": samples}
    report["seconds"] = time.perf_counter() - started
    return report, clips


def summarise(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Right answers per attribute and, of the wrong ones, what was asked and seen how often (most frequent first)."""
    right = {name: sum(s["right"][name] for s in samples) for name in Attributes._fields}
    wrong: dict[str, dict[str, int]] = {}
    for name in Attributes._fields:
        pairs = Counter(f"{s['asked'][name]} -> {s['seen'][name]}" for s in samples if not s["right"][name])
        wrong[name] = dict(pairs.most_common())
    return {
        "right": right,
        "percent": {name: 100 * count / len(samples) for name, count in right.items()},
        "all_four_right": sum(all(s["right"].values()) for s in samples),
        "wrong": wrong,
    }


def format_table(report: dict[str, Any]) -> str:
    num = report["num"]
    lines = [
        f"{name:<12}{report['right'][name]:>5}/{num:<5}{report['percent'][name]:6.1f} %" for name in report["right"]
    ]
    lines.append(f"{'all four':<12}{report['all_four_right']:>5}/{num:<5}{100 * report['all_four_right'] / num:6.1f} %")
    for name, pairs in report["wrong"].items():
        if pairs:
            lines.append(f"{name}: " + ", ".join(f"{pair} ({count})" for pair, count in pairs.items()))
    return "\n".join(lines)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Of two uint8 clips, in dB, over all their pixels together; infinite where they are equal."""
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def evaluate_vae(
    vae: Any, num: int, seed: int = 0, num_frames: int = 25, size: int = 128
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """PSNR over ``num`` whole unseen clips through the VAE, in the time windows that the pipeline decodes with.

    Returns the report, and for each clip the original beside what came back.
    """
    import torch

    from kandinsky.models.vae_hunyuan import VAETiling

    parameter = next(vae.parameters())
    values: list[float] = []
    samples: list[dict[str, Any]] = []
    pairs: list[np.ndarray] = []
    for attributes, clip_seed in held_out(num, seed):
        frames = render(scene_for(attributes, np.random.default_rng(clip_seed)), num_frames, size)
        x = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].to(parameter.device, parameter.dtype) / 127.5 - 1
        with torch.inference_mode():
            y = vae.decode(vae.encode(x, VAETiling()).mode(), VAETiling())  # (1, 3, T, H, W)
        back = ((y[0].float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()
        right, measured = score(back, attributes)
        values.append(psnr(frames, back))
        seen = {name: getattr(measured, name) for name in Attributes._fields}
        samples.append({"asked": attributes._asdict(), "seen": seen, "right": right, "psnr": values[-1]})
        pairs.append(np.concatenate([frames, back], axis=2))
    report = summarise(samples) | {"num": num, "seed": seed, "samples": samples}
    report |= {"psnr_mean": float(np.mean(values)), "psnr_worst": float(np.min(values))}
    return report, pairs


def contact_sheet(clips: Sequence[np.ndarray], frames_per_clip: int = 7, max_clips: int = 24) -> np.ndarray:
    """One row a clip, its frames from first to last evenly spaced: uint8 (rows * H, columns * W, 3)."""
    rows = []
    for clip in clips[:max_clips]:
        shown = np.linspace(0, len(clip) - 1, frames_per_clip).round().astype(int)
        rows.append(np.concatenate(list(clip[shown]), axis=1))
    return np.concatenate(rows, axis=0)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", default="configs/config_tiny_t2v.yaml")
    parser.add_argument("--device", default="cpu", help="where to run, for example cuda:0 (default: %(default)s)")
    parser.add_argument("--num", type=int, default=100, help="how many held-out captions (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first clip, one more for each next one")
    parser.add_argument("--num_steps", type=int, help="sampling steps (default: as the YAML says)")
    parser.add_argument("--guidance_weight", type=float, help="classifier-free guidance (default: as the YAML says)")
    parser.add_argument("--vae", type=int, metavar="CLIPS", help="measure the VAE alone, on this many unseen clips")
    parser.add_argument("--vae_frames", type=int, default=25, help="frames of these clips (default: %(default)s)")
    parser.add_argument("--vae_size", type=int, default=128, help="pixels a side of these clips (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="write the whole report there as JSON")
    parser.add_argument("--sheet", type=Path, help="write a picture of the first 24 clips there")
    args = parser.parse_args(argv)
    for name in ("num", "vae", "vae_frames"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    from kandinsky import get_T2V_pipeline

    pipe = get_T2V_pipeline(args.device, conf_path=args.config)
    if args.vae is not None:
        report, clips = evaluate_vae(pipe.vae, args.vae, args.seed, args.vae_frames, args.vae_size)
        print(f"PSNR over {args.vae} whole unseen clips of {args.vae_frames} frames: ", end="")
        print(f"mean {report['psnr_mean']:.2f} dB, worst {report['psnr_worst']:.2f} dB")
    else:
        options = {"num_steps": args.num_steps, "guidance_weight": args.guidance_weight}
        given = {name: value for name, value in options.items() if value is not None}

        def generate(text: str, seed: int) -> Any:
            return pipe(text, seed=seed, progress=False, **given)[0]

        def progress(line: str) -> None:
            print(line, file=sys.stderr, flush=True)

        report, clips = evaluate(generate, args.num, args.seed, progress)
        report["options"] = given
    print(format_table(report))
    if args.output is not None:
        args.output.write_text(json.dumps({"config": args.config, **report}, indent=1) + "\n")
    if args.sheet is not None:
        from PIL import Image

        Image.fromarray(contact_sheet(clips)).save(args.sheet)


if __name__ == "__main__":
    main()
