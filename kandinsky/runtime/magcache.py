"""MagCache: leave out the visual blocks of evaluations whose outcome the one before them foretells.

What the blocks add to the tokens, the residual, changes little from one step to the next, and its magnitude does so in
the same way whatever the prompt. How it changes is measured once per checkpoint (`mag_ratios`, by
tools/calibrate_magcache.py); from that follows, before the first step, which evaluations may use the last residual
again instead of running the blocks. `skip_plan` is that decision, a pure function; `MagCache` carries it out for one
request and holds the only state there is.

Knows numbers, tensors, and the two branches of guidance; knows no models, prompts, devices or files.

Paper: Ma et al. 2025, "MagCache: Fast Video Generation with Magnitude-Aware Cache", arXiv 2506.09045.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor

from kandinsky.config.schema import MagCacheConfig
from kandinsky.models.dit import BlockInputs, Execution, RunBlocks
from kandinsky.sampling.sampler import Branch


def skip_plan(
    mag_ratios: Sequence[float],
    num_steps: int,
    use_cfg: bool,
    threshold: float = 0.12,
    max_skips: int = 2,
    retention: float = 0.2,
    guided: Sequence[bool] | None = None,
) -> tuple[bool, ...]:
    """Which model evaluations skip the blocks, in the order in which they happen: cond, uncond, cond, ...

    Each branch adds up by itself how far the kept residual is off: the product of the ratios since it was computed says
    how much the true one has grown, its distance from 1 is that step's error, and the errors of skipped steps add up.
    An evaluation is skipped while their sum stays below `threshold`.

    Args:
        mag_ratios: magnitude of a residual over that of the step before, from the second step on: cond, uncond, cond,
            ... Of another number of steps, each branch's are stretched to `num_steps`, to the nearest.
        use_cfg: whether there are unconditional evaluations.
        threshold: 0 skips nothing.
        max_skips: in a row, of one branch.
        retention: share of the evaluations, the first ones, that are never skipped.
        guided: in place of use_cfg, step by step, where not all steps are alike. The first unconditional evaluation
            after a step without one is never skipped.

    Source: the paper's algorithm 1 as the published Kandinsky 5 code counts: over evaluations, two a step with guidance
    and without.
    """
    guided = (use_cfg,) * num_steps if guided is None else guided
    assert len(guided) == num_steps
    settings = threshold, max_skips, retention
    cond = _branch_plan(mag_ratios, 0, (True,) * num_steps, *settings)
    uncond = _branch_plan(mag_ratios, 1, guided, *settings)
    return tuple(
        skip for step in range(num_steps) for skip in ((cond[step], uncond[step]) if guided[step] else (cond[step],))
    )


def _branch_plan(
    mag_ratios: Sequence[float],
    branch: int,
    evaluated: Sequence[bool],
    threshold: float,
    max_skips: int,
    retention: float,
) -> list[bool]:
    """Whether each step's evaluation of one branch, 0 cond or 1 uncond, is skipped; False in steps without one."""
    num_steps = len(evaluated)
    ratios = stretched([1.0, *mag_ratios[branch::2]], num_steps)  # of a first step there is no ratio
    num_retained = int(2 * num_steps * retention)
    skips = []
    growth, error, in_a_row = 1.0, 0.0, 0
    has_residual = False  # from the step before, computed then or kept on
    for step, ratio in enumerate(ratios):
        skip = False
        if evaluated[step] and has_residual and 2 * step + branch >= num_retained:
            growth *= ratio
            error += abs(1 - growth)
            in_a_row += 1
            skip = error < threshold and in_a_row <= max_skips
        if not skip:
            growth, error, in_a_row = 1.0, 0.0, 0
        has_residual = evaluated[step]
        skips.append(skip)
    return skips


def stretched(values: Sequence[float], length: int) -> list[float]:
    """`values` at `length` evenly spaced places from the first to the last, each from the nearest (half to even)."""
    if length == 1:
        return [values[-1]]
    scale = (len(values) - 1) / (length - 1)
    return [values[round(i * scale)] for i in range(length)]


class MagCache:
    """Carries a plan out for one request: keeps a residual where the next evaluation of its branch will use it.

    Residuals are (1, N, D) in the DiT's dtype, one a branch and sample, and are let go with their last use.
    """

    def __init__(self, skips: Mapping[Branch, Sequence[bool]]) -> None:
        """skips: for each branch, which of its evaluations in their order skip the blocks."""
        self.skips = skips
        self._skipped: Counter[int] = Counter()  # evaluations so far, of each sample
        self.residuals: dict[tuple[Branch, int], Tensor] = {}
        self.done: Counter[tuple[Branch, int]] = Counter()

    @property
    def skipped(self) -> int:
        """Evaluations so far, of all samples."""
        return self._skipped.total()

    def skipped_of(self, sample: int) -> int:
        return self._skipped[sample]

    def spares(self, blocks: int) -> int:
        return blocks

    def saved(self) -> dict[str, Tensor]:
        """The residuals by names, for `restore`."""
        return {f"{branch}.{sample}": residual for (branch, sample), residual in self.residuals.items()}

    def restore(self, residuals: Mapping[str, Tensor], done: Mapping[Branch, int], samples: int) -> None:
        """Go on where `done` evaluations of each branch and sample had been made, with what `saved` gave then."""
        for branch, evaluations in done.items():
            for sample in range(samples):
                self.done[branch, sample] = evaluations
                self._skipped[sample] += sum(self.skips[branch][:evaluations])
                if (residual := residuals.get(f"{branch}.{sample}")) is not None:
                    self.residuals[branch, sample] = residual
                elif any(self.skips[branch][evaluations : evaluations + 1]):
                    raise ValueError(
                        "the run was stopped without what MagCache's next step needs: go on with the magcache settings "
                        "that it began with, or with magcache.enabled=false"
                    )

    def evaluate(self, branch: Branch, sample: int, run: Callable[..., Tensor], execution: Execution) -> Tensor:
        return run(execution=execution.within(partial(self.run_blocks, branch, sample)))

    def run_blocks(self, branch: Branch, sample: int, run_blocks: RunBlocks) -> RunBlocks:
        """What takes the place of the DiT's own `run_blocks` in this sample's next evaluation of the branch."""
        key = (branch, sample)

        def cached(hidden: Tensor, inputs: BlockInputs) -> Tensor:
            evaluation, skips = self.done[key], self.skips[branch]
            self.done[key] += 1
            is_used_next = evaluation + 1 < len(skips) and skips[evaluation + 1]
            if skips[evaluation]:
                self._skipped[sample] += 1
                return hidden + (self.residuals[key] if is_used_next else self.residuals.pop(key))
            before = hidden.clone() if is_used_next and inputs.execution.writes_over else hidden
            result = run_blocks(hidden, inputs)
            if is_used_next:
                self.residuals[key] = result - before
            return result

        return cached


def cache_for_request(config: MagCacheConfig, guided: Sequence[bool], lengths: Sequence[float] = ()) -> MagCache:
    """The cache of a request whose steps run an unconditional evaluation where `guided` says so.

    lengths: of the steps, which the plan does not go by.
    """
    assert config.mag_ratios is not None  # the config is checked for it
    plan = skip_plan(
        config.mag_ratios,
        len(guided),
        any(guided),
        threshold=config.threshold,
        max_skips=config.max_skips,
        retention=config.retention,
        guided=guided,
    )
    branches: dict[Branch, list[bool]] = {"cond": [], "uncond": []}
    evaluations = iter(plan)
    for is_guided in guided:
        branches["cond"].append(next(evaluations))
        if is_guided:
            branches["uncond"].append(next(evaluations))
    return MagCache(branches)
