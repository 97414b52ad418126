"""Caches of blocks against the plain run of the same seeds: what they save, and how far they are from it.

    python benchmarks/caches.py magcache taylorseer tracked --cases 100 --output outputs/caches.json --minutes 5
    python benchmarks/caches.py tracked,threshold=0.1 tracked,threshold=0.3,max_skips=4 firstblock,order=1
    python benchmarks/caches.py taylorseer taylorseer,threshold=0.04 --task t2i

A case is a held-out caption (or, with `--split train`, one that was trained on) with its seed (tools/eval_tiny.py),
generated once as the tiny config says and once with every cache; what was asked for is read back from the pixels. PSNR
is between the two clips, over all their pixels. What `--output` has is not made again. One pipeline makes everything: a
cache is a request's, and nothing of it stays.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from benchmarks._resumable import Kept, add_arguments  # noqa: E402
from tools.eval_tiny import Case, load_pipeline, make_cases, pipeline_caller, psnr, score  # noqa: E402

if TYPE_CHECKING:
    from kandinsky.config.schema import Config


def config_with(config: Config, cache: str) -> Config:
    """The config with that cache. Raises ValueError for what is none."""
    from kandinsky.config.reading import with_settings

    kind, *settings = cache.split(",")
    values: dict[str, Any] = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        values[name] = float(value) if name == "threshold" else int(value)
    return with_settings(config, cache={"kind": kind, **values})


def cache_name(word: str) -> str:
    from kandinsky.config.reading import load_config

    try:
        config_with(load_config(REPOSITORY / "configs" / "config_tiny_t2v.yaml"), word)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{word!r} is no cache: {error}") from None
    return word


def generated(pipe: Any, cache: str, case: Case, task: str) -> tuple[np.ndarray, dict[str, Any]]:
    """uint8 frames (T, H, W, 3), of a picture one, and the record beside; cache: "kind" or "kind,setting=value,..."."""
    from kandinsky.runtime.caches import cache_maker

    before = pipe.config
    pipe.config = config_with(before, cache)
    pipe.make_cache = cache_maker(pipe.config)
    records: list[dict[str, Any]] = []
    try:
        output = pipeline_caller(pipe, records)(case.text, case.seed)
    finally:
        pipe.config = before
    frames = output.permute(1, 2, 3, 0).numpy() if task == "t2v" else np.asarray(output)[None]
    return frames, records[0]


def measure(kept: Kept, caches: list[str], cases: list[Case], task: str) -> None:
    """Fill `kept.data`: for each cache and for "off" a row a case, by its seed."""
    rows = {name: kept.data.setdefault(name, {}) for name in ("off", *caches)}
    pipe, *_ = load_pipeline(REPOSITORY / "configs" / f"config_tiny_{task}.yaml")
    for case in kept.each([one for one in cases if any(str(one.seed) not in rows[name] for name in rows)]):
        plain, record = generated(pipe, "off", case, task)
        for name in rows:
            if str(case.seed) in rows[name]:
                continue
            clip, record = (plain, record) if name == "off" else generated(pipe, name, case, task)
            saved = {what: record[what]["skipped"] / record[what]["all"] for what in ("evaluations", "blocks")}
            right = all(score(clip, case)[0].values())
            seconds = record["seconds"]["denoise"]
            rows[name][str(case.seed)] = {"right": right, "psnr": psnr(plain, clip), **saved, "seconds": seconds}


def table(data: dict[str, Any]) -> str:
    """Mean and worst PSNR, shares of evaluations and of passes through blocks that are saved."""
    lines = [
        "| | right | PSNR, mean (worst) | evaluations saved | blocks saved | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for name, rows in data.items():
        if not rows:
            continue
        values = {key: np.array([row[key] for row in rows.values()]) for key in next(iter(rows.values()))}
        distance = "" if name == "off" else f"{values['psnr'].mean():.1f} dB ({values['psnr'].min():.1f})"
        evaluations, blocks = (f"{100 * values[key].mean():.1f} %" for key in ("evaluations", "blocks"))
        seconds = f"{np.median(values['seconds']):.2f}"
        right = f"{values['right'].sum()}/{len(rows)}"
        lines.append(f"| {name} | {right} | {distance} | {evaluations} | {blocks} | {seconds} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "caches",
        nargs="+",
        type=cache_name,
        metavar="kind[,setting=value]",
        help="settings: threshold, max_skips, order",
    )
    add_arguments(parser, cases=10)
    parser.add_argument(
        "--split", choices=("test", "train"), default="test", help="train: captions trained on, to choose settings with"
    )
    parser.add_argument("--task", choices=("t2v", "t2i"), default="t2v", help="(default: %(default)s)")
    args = parser.parse_args()
    kept = Kept(args.output, {}, args.minutes)
    measure(kept, args.caches, make_cases(args.task, args.cases, split=args.split), args.task)
    print(table(kept.data))


if __name__ == "__main__":
    main()
