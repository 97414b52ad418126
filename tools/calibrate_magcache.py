"""Measures what MagCache goes by, the magnitude ratios of a checkpoint, and writes them into its YAML file.

    python tools/calibrate_magcache.py --config configs/config_5s_pretrain.yaml --prompt "a cat on a sofa" --write
    python tools/calibrate_magcache.py --config configs/config_i2i.yaml --prompt "make it blue" --image cat.png
    python tools/calibrate_magcache.py --config configs/config_tiny_t2v.yaml --tiny_cases 16 --write

The residual is what the visual blocks add to the tokens. Its ratio at a step: the mean over the tokens of its norm over
its norm one step before. They are listed from the second step on, conditional and unconditional evaluation in turn (0
for the latter where the config runs without guidance), as means over the prompts. They depend little on the prompt:
the paper uses one. The third command takes prompts, and pictures where they are needed, from what the tiny checkpoints
were trained on.

Without `--write` they are only printed. With it the value of `magcache.mag_ratios` is replaced or added, and all else
in the file stays as it is, comments too. Knows the pipelines by their public call and their plug for caches.

Paper: Ma et al. 2025, arXiv 2506.09045, equation 4.
"""

from __future__ import annotations

import argparse
import math
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs without the project being installed

from kandinsky.common.writing import atomic_path

LINE_LENGTH = 120
DIGITS = 5
COMMENT = """\
How much the residual of the blocks grows from one step to the next, measured by tools/calibrate_magcache.py: \
conditional and unconditional evaluation in turn; the first step has none."""

Call = dict[str, Any]  # arguments of one pipeline call


class RatioRecorder:
    """Sits where a cache would, lets every evaluation run, and measures: what a request's ratios come from."""

    def __init__(self) -> None:
        self.ratios: dict[str, list[float]] = {"cond": [], "uncond": []}
        self._norms: dict[str, Any] = {}  # branch -> (N,), of the residual of the step before

    def skipped_of(self, sample: int) -> int:
        return 0

    def spares(self, blocks: int) -> int:
        return 0

    def saved(self) -> dict[str, Any]:
        return {}

    def evaluate(self, branch: str, sample: int, run: Any, execution: Any) -> Any:
        return run(execution=execution.within(lambda run_blocks: self.run_blocks(branch, run_blocks)))

    def run_blocks(self, branch: str, run_blocks: Any) -> Any:
        def measured(hidden: Any, inputs: Any) -> Any:
            result = run_blocks(hidden, inputs)
            norms = (result.float() - hidden.float()).norm(dim=-1).flatten()  # one a token
            if branch in self._norms:
                self.ratios[branch].append(float((norms / self._norms[branch]).mean()))
            self._norms[branch] = norms
            return result

        return measured


def measure(pipe: Any, calls: Iterable[Call]) -> list[float]:
    """Ratios of a pipeline's checkpoint, means over calls of one output each: cond, uncond, cond, ..."""
    recorders = []
    for arguments in calls:
        recorders.append(recorder := RatioRecorder())
        pipe.make_cache = lambda *steps, recorder=recorder: recorder
        pipe(**arguments, output_type="latent", progress=False)
    pipe.make_cache = None
    ratios = []
    for cond in zip(*(recorder.ratios["cond"] for recorder in recorders), strict=True):
        ratios += [math.fsum(cond) / len(cond), 0.0]
    for i, uncond in enumerate(zip(*(recorder.ratios["uncond"] for recorder in recorders), strict=True)):
        ratios[2 * i + 1] = math.fsum(uncond) / len(uncond)
    if not all(map(math.isfinite, ratios)):
        raise ValueError("the blocks of this checkpoint change some tokens not at all: there is nothing to measure")
    return [round(ratio, DIGITS) for ratio in ratios]


# --- the YAML file ----------------------------------------------------------------------------------------------------


def format_ratios(ratios: Sequence[float], indent: str) -> str:
    """`mag_ratios: [...]` in lines that fit; all but the first are indented, two further than the key."""
    numbers = ", ".join(f"{ratio:g}" if ratio == 0 else str(ratio) for ratio in ratios)
    lines = textwrap.wrap(f"{indent}mag_ratios: [{numbers}]", LINE_LENGTH, subsequent_indent=indent + "  ")
    return "\n".join(lines).lstrip()


def with_ratios(text: str, ratios: Sequence[float]) -> str:
    """A YAML file's text with these `magcache.mag_ratios`, everything else unchanged to the letter."""
    import yaml

    root = yaml.compose(text)
    section = next((pair for pair in root.value if pair[0].value == "magcache"), None)
    if section is None:
        comment = textwrap.wrap(COMMENT, LINE_LENGTH - 4)
        lines = ["magcache:", *(f"  # {line}" for line in comment), "  " + format_ratios(ratios, "  ")]
        return text.rstrip("\n") + "\n\n" + "\n".join(lines) + "\n"
    key, values = section
    if not isinstance(values, yaml.MappingNode):  # a section with nothing in it
        end = key.end_mark.index + 1  # after the colon
        return text[:end] + "\n  " + format_ratios(ratios, "  ") + text[end:]
    old = next((pair for pair in values.value if pair[0].value == "mag_ratios"), None)
    if old is not None:
        name, value = old
        # Where a list of "- 1.0" ends is for the parser the next thing in the file, past all comments.
        last = value.value[-1] if isinstance(value, yaml.SequenceNode) and not value.flow_style else value
        new = format_ratios(ratios, " " * name.start_mark.column)
        return text[: name.start_mark.index] + new + text[last.end_mark.index :]
    start = values.start_mark.index
    if values.flow_style:  # magcache: {enabled: true}
        return text[: start + 1] + format_ratios(ratios, "  ") + (", " if values.value else "") + text[start + 1 :]
    indent = " " * values.start_mark.column
    return text[:start] + format_ratios(ratios, indent) + "\n" + indent + text[start:]


def write_ratios(path: Path, ratios: Sequence[float]) -> None:
    """Put the ratios into the file, or leave it as it is: ValueError where that would change anything else in it."""
    import yaml

    with path.open(encoding="utf-8", newline="") as file:
        text = file.read()
    new = with_ratios(text, ratios)
    before, after = yaml.safe_load(text), yaml.safe_load(new)
    before["magcache"] = (before.get("magcache") or {}) | {"mag_ratios": list(ratios)}
    if after != before:
        raise ValueError(f"{path}: can't write magcache.mag_ratios into this file; put the printed lines there by hand")
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        file.write(new)


# --- command line -----------------------------------------------------------------------------------------------------


def tiny_calls(task: str, num: int, seed: int, size: int) -> list[Call]:
    """Calls with what the tiny checkpoints were trained on."""
    from tools.eval_tiny import make_cases

    if num < 1:
        raise ValueError(f"--tiny_cases is {num}; it must be at least 1")
    calls: list[Call] = []
    for case in make_cases(task, num, seed, split="train"):
        picture = case.picture(size)
        given = {} if picture is None else {"image": picture}
        calls.append({"text": case.text, "seed": case.seed, **given})
    return calls


def prompt_calls(prompts: Sequence[str], images: Sequence[str], seed: int) -> list[Call]:
    """A call a prompt, with its own picture or one for all."""
    if len(images) not in (0, 1, len(prompts)):
        raise ValueError(f"{len(images)} pictures for {len(prompts)} prompts: give one for all or one each")
    pictures = list(images) * len(prompts) if len(images) == 1 else images
    return [
        {"text": prompt, "seed": seed + i, **({"image": pictures[i]} if pictures else {})}
        for i, prompt in enumerate(prompts)
    ]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", type=Path, required=True, help="the variant's YAML file")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", action="append", help="may be given several times")
    what.add_argument("--tiny_cases", type=int, metavar="N", help="N prompts that the tiny checkpoints were trained on")
    parser.add_argument("--image", action="append", default=[], help="picture for all prompts, or one each")
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt, one more for each next one")
    parser.add_argument("--device", help="cpu, cuda, cuda:1; default: a GPU where there is one")
    parser.add_argument("--dtype", help="bfloat16, float32, float16; default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--cache_dir", default="./weights/", help="the folder that ./weights/ in the YAML stands for")
    parser.add_argument("--write", action="store_true", help="write the ratios into the YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the YAML for the measurement")
    return parser


def run(args: argparse.Namespace) -> list[float]:
    """Measure, print and, where asked to, write; returns the ratios."""
    import kandinsky
    from kandinsky.runtime.magcache import skip_plan
    from kandinsky.sampling.sampler import uses_guidance

    # What is measured is the plain run: without a cache, and every evaluation with the one before it a step away.
    plain = ["magcache.enabled=false", "model.guidance_interval=[0,1]", "model.guidance_every=1"]
    config = kandinsky.load_config(args.config, [*args.overrides, *plain])
    if config.model.num_steps < 2:
        raise ValueError("a single step has no step before it to be compared with: measure with model.num_steps=50")
    if args.tiny_cases is None:
        calls = prompt_calls(args.prompt, args.image, args.seed)
    else:
        calls = tiny_calls(config.task, args.tiny_cases, args.seed, config.generation.width)
    getter = getattr(kandinsky, f"get_{config.task.upper()}_pipeline")
    pipe = getter(args.device, cache_dir=args.cache_dir, config=config, dtype=args.dtype)

    ratios = measure(pipe, calls)
    print("magcache:\n  " + format_ratios(ratios, "  "))
    cache, use_cfg = config.magcache, uses_guidance(config.model.guidance_weight)
    plan = skip_plan(ratios, config.model.num_steps, use_cfg, cache.threshold, cache.max_skips, cache.retention)
    print(f"# with the config's threshold {cache.threshold:g}, max_skips {cache.max_skips} and retention "
          f"{cache.retention:g}: skips {sum(plan)} of {len(plan)} evaluations")  # fmt: skip
    if args.write:
        write_ratios(args.config, ratios)
        print(f"# written into {args.config}")
    return ratios


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_intermixed_args(argv)
    try:
        run(args)
    except (ValueError, OSError) as error:
        print("error:", error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
