"""Scores a tiny checkpoint on what it was never trained on, from the generated pixels alone.

    python tools/eval_tiny.py --config configs/config_tiny_t2v.yaml --num 100 --output report.json --sheet sheet.png
    python tools/eval_tiny.py --config configs/config_tiny_i2i.yaml --split train --guidance_weight 3
    python tools/eval_tiny.py --config configs/config_tiny_t2v.yaml --vae 32
    python tools/eval_tiny.py --config configs/config_tiny_t2v.yaml --against magcache.enabled=true

What is asked depends on the config's `task`; what cannot be recognised counts as wrong.

- t2v: a caption of a held-out combination. Do shape, colour, motion and background agree with it?
- i2v: the same, and the first frame of such a clip. Also how close the first generated frame is to the given one.
- t2i: a caption of a held-out look. Do shape, colour and background agree with it?
- i2i: a picture and an instruction, a pair that is held out. `edit`: what the instruction names has changed to what it
  says. `rest`: all else is as it was, the object's centre within 6 % of the picture's side and its size within 20 %.

With `--split train` the same on what was trained, to choose settings without looking at the held-out cases. The third
command sends unseen clips or pictures through the VAE's encode and decode and reports PSNR, and what the measurement
still reads from them: nothing generated can be expected to score better than that. The last one generates every case
with other values of the YAML too, and also reports how far apart the pixels are and how many model evaluations ran.
Knows the pipelines by their public call and the JSON that they write beside an output only.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs without the project being installed

from tools import tiny_world
from tools.contact_sheet import Block, captioned_sheet, frames_shown
from tools.tiny_world import Attributes, Look, Measured, Scene

# (caption or instruction, seed), and for i2v and i2i the picture as a PIL image ->
# for t2v and i2v a uint8 tensor (3, T, H, W), for t2i and i2i a PIL image
Generate = Callable[..., Any]

TASKS = ("t2v", "i2v", "t2i", "i2i")
MAX_SHIFT = 0.06  # of the picture's side: how far an object may be from where it was and still count as not moved
MAX_RESIZE = 1.2  # how many times larger or smaller than it was it may be
SHEET_COLUMNS = {"t2v": 1, "i2v": 1, "t2i": 6, "i2i": 3}
SHEET_CASES = 24


@dataclass(frozen=True)
class Case:
    """One request and what is wanted of it."""

    task: str
    text: str
    seed: int
    wanted: Scene  # where it stands and how large it is matters where a picture is given, and else is any
    source: Scene | None = None  # i2i: what the given picture shows

    @property
    def asked(self) -> Attributes | Look:
        return self.wanted.attributes if self.task in ("t2v", "i2v") else self.wanted.look

    def picture(self, size: int) -> np.ndarray | None:
        """What the pipeline is given: the first frame of the wanted clip, or the picture to edit; uint8 (H, W, 3)."""
        if self.task == "i2v":
            return tiny_world.render(self.wanted, 2, size)[0]
        return None if self.source is None else tiny_world.render_picture(self.source, size)


@dataclass(frozen=True)
class Result:
    case: Case
    picture: np.ndarray | None  # uint8 (H, W, 3), as given
    frames: np.ndarray  # uint8 (T, H, W, 3), one frame for an image


# --- what is asked ---------------------------------------------------------------------------------------------------


def make_cases(task: str, num: int, seed: int = 0, split: str = "test") -> list[Case]:
    """``num`` cases, the same every time; case i has the seed ``seed + i``, for generating and for place and size.

    Even over all attribute values (the held-out lists are; the training ones are shuffled), or over the kinds of edits.
    Where there are fewer combinations they come round again, with other seeds.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; choose one of {', '.join(TASKS)}")
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}; choose 'train' or 'test'")
    if task == "i2i":
        return [_edit_case(i, seed + i, split) for i in range(num)]
    if task == "t2i":
        looks = tiny_world.test_looks() if split == "test" else _shuffled(tiny_world.train_looks())
        return [_picture_case(looks[i % len(looks)], seed + i) for i in range(num)]
    combinations = tiny_world.test_combinations() if split == "test" else _shuffled(tiny_world.train_combinations())
    return [_clip_case(task, combinations[i % len(combinations)], seed + i) for i in range(num)]


def _shuffled(items: Sequence[Any]) -> list[Any]:
    return [items[i] for i in np.random.default_rng(0).permutation(len(items))]


def _clip_case(task: str, attributes: Attributes, seed: int) -> Case:
    wanted = tiny_world.scene_for(attributes, np.random.default_rng(seed))
    return Case(task, tiny_world.caption(attributes), seed, wanted)


def _picture_case(look: Look, seed: int) -> Case:
    rng = np.random.default_rng(seed)
    # There are few looks: they come in all their wordings.
    return Case("t2i", tiny_world.picture_caption(look, rng), seed, tiny_world.picture_for(look, rng))


def _edit_case(index: int, seed: int, split: str) -> Case:
    kind = tiny_world.EDIT_KINDS[index % len(tiny_world.EDIT_KINDS)]
    source, text, target = tiny_world.sample_edit(np.random.default_rng(seed), split, kind)
    return Case("i2i", text, seed, target, source)


# --- what came of it -------------------------------------------------------------------------------------------------


def score(frames: np.ndarray, case: Case) -> tuple[dict[str, bool], Measured]:
    """What of uint8 frames (T, H, W, 3) is as asked, by name, and what they show."""
    measured = tiny_world.measure(frames)
    right = measured.agrees(case.asked)
    if case.source is None:
        return right, measured
    seen = measured.diagnostics
    right["place"] = right["size"] = False  # without an object
    if "radius" in seen:
        right["place"] = math.hypot(seen["x"] - case.source.x, seen["y"] - case.source.y) <= MAX_SHIFT
        right["size"] = 1 / MAX_RESIZE <= seen["radius"] / case.source.radius <= MAX_RESIZE
    changed = tiny_world.edit_kind(case.source.look, case.wanted.look)
    both = {"edit": all(right[name] for name in changed)}
    both["rest"] = all(ok for name, ok in right.items() if name not in changed)
    return right | both, measured


def run_cases(
    generate: Generate, cases: Sequence[Case], size: int, progress: Callable[[str], None] | None = None
) -> Iterator[Result]:
    """Generates case after case. ``size``: pixels a side of the pictures that are given."""
    from PIL import Image

    started = time.perf_counter()
    for done, case in enumerate(cases, 1):
        picture = case.picture(size)
        given = () if picture is None else (Image.fromarray(picture),)
        output = generate(case.text, case.seed, *given)
        if isinstance(output, Image.Image):
            frames = np.asarray(output)[None]
        else:
            frames = output.permute(1, 2, 3, 0).cpu().numpy()  # (T, H, W, 3)
        if progress is not None:
            progress(f"{done}/{len(cases)}, {(time.perf_counter() - started) / done:.1f} s each")
        yield Result(case, picture, frames)


def evaluate(
    generate: Generate,
    num: int,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
    *,
    task: str = "t2v",
    split: str = "test",
    size: int = 128,
) -> tuple[dict[str, Any], list[Result]]:
    """Generates and scores ``num`` cases; returns the report and what was generated."""
    started = time.perf_counter()
    results = list(run_cases(generate, make_cases(task, num, seed, split), size, progress))
    samples = [_sample(result) for result in results]
    report = {"task": task, "split": split, "seed": seed} | summarise(samples) | {"samples": samples}
    report["seconds"] = time.perf_counter() - started
    return report, results


def _sample(result: Result) -> dict[str, Any]:
    """Everything there is to say of one result, for the JSON."""
    case = result.case
    right, measured = score(result.frames, case)
    asked = case.asked._asdict()
    sample = {
        "text": case.text,
        "seed": case.seed,
        "asked": asked,
        "seen": {name: getattr(measured, name) for name in asked},
        "right": right,
        "diagnostics": measured.diagnostics,
    }
    if (overlap := measured.overlap(case.asked.shape)) is not None:
        sample["overlap"] = overlap
    if case.task == "i2v" and result.picture is not None:
        sample["first_frame_psnr"] = psnr(result.frames[0], result.picture)
    if case.source is not None:
        sample["source"] = case.source.look._asdict()
        sample["kind"] = " and ".join(tiny_world.edit_kind(case.source.look, case.wanted.look))
    return sample


def summarise(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Right answers by name and, of the wrong ones, what was asked and seen how often (most frequent first)."""
    num = len(samples)
    right = {name: sum(s["right"][name] for s in samples) for name in samples[0]["right"]}
    wrong: dict[str, dict[str, int]] = {}
    for name in samples[0]["asked"]:
        pairs = Counter(f"{s['asked'][name]} -> {s['seen'][name]}" for s in samples if not s["right"][name])
        wrong[name] = dict(pairs.most_common())
    summary: dict[str, Any] = {
        "num": num,
        "right": right,
        "percent": {name: 100 * count / num for name, count in right.items()},
        "all_right": sum(all(s["right"].values()) for s in samples),
        "wrong": wrong,
    }
    kinds = dict.fromkeys(s["kind"] for s in samples if "kind" in s)
    if kinds:  # of each kind of edit: how many there are, and how many are all right
        of_kind = {kind: [all(s["right"].values()) for s in samples if s["kind"] == kind] for kind in kinds}
        summary["kinds"] = {kind: [sum(rights), len(rights)] for kind, rights in of_kind.items()}
    for name in ("first_frame_psnr", "psnr", "overlap"):
        values = [s[name] for s in samples if name in s]
        if values:
            summary[name] = {"mean": float(np.mean(values)), "worst": float(np.min(values))}
    return summary


def compare(
    results: Sequence[Result],
    others: Sequence[Result],
    records: Sequence[dict[str, Any]],
    other_records: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """How far a run is from another over the same cases, and what each took; records are the pipelines' JSON.

    `psnr` in dB; `evaluations` and `seconds` (of denoising) are means of one output, first of the one run, then of the
    other.
    """
    distances = [psnr(a.frames, b.frames) for a, b in zip(results, others, strict=True)]
    runs = records, other_records
    evaluations = [np.mean([one["evaluations"]["all"] - one["evaluations"]["skipped"] for one in run]) for run in runs]
    return {
        "psnr": {"mean": float(np.mean(distances)), "worst": float(np.min(distances))},
        "evaluations": [float(mean) for mean in evaluations],
        "seconds": [float(np.mean([one["seconds"]["denoise"] for one in run])) for run in runs],
    }


def format_comparison(comparison: dict[str, Any]) -> str:
    (all_of_them, fewer), (slow, fast) = comparison["evaluations"], comparison["seconds"]
    distance = comparison["psnr"]
    return (
        f"PSNR between the two: mean {distance['mean']:.2f} dB, worst {distance['worst']:.2f} dB\n"
        f"model evaluations: {fewer:g} instead of {all_of_them:g}, {100 * (1 - fewer / all_of_them):.1f} % saved\n"
        f"seconds of denoising: {fast:.2f} instead of {slow:.2f}"
    )


def format_table(report: dict[str, Any]) -> str:
    num = report["num"]
    counts = report["right"] | {"all of these": report["all_right"]}
    counts = {name: (count, num) for name, count in counts.items()}
    counts |= {f"edit of {kind}": count for kind, count in report.get("kinds", {}).items()}
    width = max(len(name) for name in counts) + 2
    lines = [f"{name:<{width}}{count:>5}/{of:<5}{100 * count / of:6.1f} %" for name, (count, of) in counts.items()]
    for name, of_what, form in (
        ("first_frame_psnr", "first frame against the given picture", "{:.2f} dB"),
        ("psnr", "PSNR", "{:.2f} dB"),
        ("overlap", "silhouette's overlap with the asked shape", "{:.3f}"),
    ):
        if name in report:
            mean, worst = (form.format(report[name][which]) for which in ("mean", "worst"))
            lines.append(f"{of_what}: mean {mean}, worst {worst}")
    for name, pairs in report["wrong"].items():
        if pairs:
            lines.append(f"{name}: " + ", ".join(f"{pair} ({count})" for pair, count in pairs.items()))
    return "\n".join(lines)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Of two uint8 clips, in dB, over all their pixels together; infinite where they are equal."""
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def sheet_block(result: Result, frames: int = 7, with_wanted: bool = False) -> Block:
    """Caption and pictures: what was given, what came out and, ``with_wanted``, what an edit should have made of it."""
    tiles = [] if result.picture is None else [result.picture]
    tiles += frames_shown(result.frames, frames)
    if with_wanted and result.case.task == "i2i":
        tiles.append(tiny_world.render_picture(result.case.wanted, len(result.frames[0])))
    return result.case.text, tiles


# --- the VAE alone ---------------------------------------------------------------------------------------------------


def evaluate_vae(
    vae: Any, num: int, seed: int = 0, num_frames: int = 25, size: int = 128, *, video: bool = True
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """PSNR over ``num`` whole unseen clips through a video VAE, in the time windows that the pipeline decodes with, or
    over as many unseen pictures through an image VAE.

    Returns the report, and for each clip (T, H, 2 W, 3), the original beside what came back.
    """
    import torch

    from kandinsky.models.vae_tiling import VAETiling

    parameter = next(vae.parameters())
    tiling = VAETiling() if video else None
    samples: list[dict[str, Any]] = []
    pairs: list[np.ndarray] = []
    for case in make_cases("t2v" if video else "t2i", num, seed):
        frames = tiny_world.render(case.wanted, num_frames if video else 1, size)
        x = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].to(parameter.device, parameter.dtype) / 127.5 - 1
        with torch.inference_mode():
            if video:
                y = vae.decode(vae.encode(x, tiling).mode(), tiling)  # (1, 3, T, H, W)
            else:
                y = vae.decode(vae.encode(x[:, :, 0]).mode())[:, :, None]
        back = ((y[0].float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()
        sample = _sample(Result(case, None, back))
        samples.append(sample | {"psnr": psnr(frames, back)})
        pairs.append(np.concatenate([frames, back], axis=2))
    return {"seed": seed} | summarise(samples) | {"samples": samples}, pairs


# --- command line ----------------------------------------------------------------------------------------------------


def load_pipeline(config: str | Path, device: str = "cpu", overrides: Sequence[str] = ()) -> tuple[Any, str, int]:
    """The pipeline of the config's task, the task, and pixels a side of what it makes."""
    import kandinsky

    loaded = kandinsky.load_config(config, overrides)
    getter = getattr(kandinsky, f"get_{loaded.task.upper()}_pipeline")
    return getter(device_map=device, config=loaded), loaded.task, loaded.generation.width


def pipeline_caller(pipe: Any, records: list[dict[str, Any]] | None = None, **options: Any) -> Generate:
    """Calls the pipeline; what it writes beside its outputs goes into ``records``."""

    def generate(text: str, seed: int, *picture: Any, **more: Any) -> Any:
        given = {"image": picture[0]} if picture else {}
        arguments = {"text": text, "seed": seed, "progress": False, **given, **options, **more}
        if records is None:
            return pipe(**arguments)[0]
        with tempfile.TemporaryDirectory() as folder:
            suffix = ".mp4" if pipe.config.task in ("t2v", "i2v") else ".png"
            output = pipe(save_path=Path(folder, "output" + suffix), **arguments)[0]
            records.append(json.loads(Path(folder, "output.json").read_text()))
        return output

    return generate


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", default="configs/config_tiny_t2v.yaml", help="its task says what is asked")
    parser.add_argument("--device", default="cpu", help="where to run, for example cuda:0 (default: %(default)s)")
    parser.add_argument("--num", type=int, default=100, help="how many cases (default: %(default)s)")
    parser.add_argument("--split", choices=("test", "train"), default="test", help="test: what was never trained on")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first case, one more for each next one")
    parser.add_argument("--num_steps", type=int, help="sampling steps (default: as the YAML says)")
    parser.add_argument("--guidance_weight", type=float, help="classifier-free guidance (default: as the YAML says)")
    parser.add_argument("--scheduler_scale", type=float, help="shift of the schedule (default: as the YAML says)")
    parser.add_argument(
        "--against",
        nargs="+",
        action="append",
        default=[],
        metavar="key=value",
        help="generate every case with these values of the YAML too, and compare; may be given several times",
    )
    parser.add_argument("--vae", type=int, metavar="N", help="measure the VAE alone, on N unseen clips or pictures")
    parser.add_argument("--vae_frames", type=int, default=25, help="frames of these clips (default: %(default)s)")
    parser.add_argument("--vae_size", type=int, default=128, help="pixels a side of them (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="write the whole report there as JSON")
    parser.add_argument("--sheet", type=Path, help=f"write a picture of the first {SHEET_CASES} cases there")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the YAML")
    args = parser.parse_intermixed_args(argv)
    for name in ("num", "vae", "vae_frames"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    return args


def evaluate_settings(
    args: argparse.Namespace, overrides: Sequence[str]
) -> tuple[dict[str, Any], list[Result], list[dict[str, Any]]]:
    """The command line's cases with these overrides of the YAML: report, results and, for ``compare``, records."""
    pipe, task, size = load_pipeline(args.config, args.device, overrides)
    options = {name: getattr(args, name) for name in ("num_steps", "guidance_weight", "scheduler_scale")}
    given = {name: value for name, value in options.items() if value is not None}
    records: list[dict[str, Any]] = []
    generate = pipeline_caller(pipe, records if args.against else None, **given)

    def progress(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    report, results = evaluate(generate, args.num, args.seed, progress, task=task, split=args.split, size=size)
    return report | {"options": given, "overrides": list(overrides)}, results, records


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if args.vae is not None:
        pipe, task, _ = load_pipeline(args.config, args.device, args.overrides)
        video = task in ("t2v", "i2v")
        report, pairs = evaluate_vae(pipe.vae, args.vae, args.seed, args.vae_frames, args.vae_size, video=video)
        blocks: list[Block] = [
            (sample["text"], frames_shown(pair)) for sample, pair in zip(report["samples"], pairs, strict=True)
        ]
        print(format_table(report))
    else:
        report, results, records = evaluate_settings(args, args.overrides)
        task = report["task"]
        blocks = [sheet_block(result, with_wanted=True) for result in results]
        print(format_table(report), flush=True)
        report["against"] = []
        for more in args.against:
            other, others, other_records = evaluate_settings(args, [*args.overrides, *more])
            other["comparison"] = compare(results, others, records, other_records)
            report["against"].append(other)
            print(f"\nwith {' '.join(more)}:", format_table(other), format_comparison(other["comparison"]), sep="\n")
    if args.output is not None:
        args.output.write_text(json.dumps({"config": args.config, **report}, indent=1) + "\n")
    if args.sheet is not None:
        from PIL import Image

        Image.fromarray(captioned_sheet(blocks[:SHEET_CASES], SHEET_COLUMNS[task])).save(args.sheet)


if __name__ == "__main__":
    main()
