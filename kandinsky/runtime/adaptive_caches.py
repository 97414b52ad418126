"""Caches that need no calibration: an evaluation is forecast from earlier ones, as far as these tell.

A forecast is the polynomial through the last values (of degree 0: the last value), along the noise level: steps are not
even in that. An error moves the latents by as much as its step is long, so it weighs as much: relative, times the
step's length over the mean step's, it has to stay below a threshold. The kinds differ in what is forecast, and in what
says how far that may be off. Two forecast what some of the blocks add to the tokens, the residual:

- `firstblock`, First Block Cache: the first block always runs. The change of what it adds, since all blocks last ran,
  stands for the change of what the others add.
- `dbcache`, DBCache: the same with the first quarter of the blocks; and the last eighth, which mends what was forecast.

Two forecast the velocity, which has a fraction of a residual's size, and is nearer to a straight line:

- `taylorseer`, TaylorSeer: how far the forecast would have been off is seen whenever the DiT does run, and what was
  seen last counts. (TaylorSeer as published forecasts features inside of the DiT, along the steps, and leaves out a
  fixed number of evaluations.)
- `tracked`: the same, with all that was seen so far put together by a Kalman filter.

Each branch of guidance and each sample has values of its own. The conditional branch decides, and the unconditional
evaluation of the same step follows it: their errors are alike, and where both are wrong at once, guidance takes the one
from the other. All state lives in the cache, which is a request's. Knows numbers and tensors; knows no models, prompts,
devices or files. With several processes each one sees all values here, and `agree` makes them decide alike.

Sources: First Block Cache: ParaAttention (chengzeyi/ParaAttention, 2024), after TeaCache, Liu et al. 2024,
arXiv 2411.19108. DBCache: cache-dit (vipshop/cache-dit, 2025). TaylorSeer: Liu et al. 2025, "From Reusing to
Forecasting: Accelerating Diffusion Models with TaylorSeers", arXiv 2503.06923. The filter: Kalman 1960, "A New Approach
to Linear Filtering and Prediction Problems".
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, islice

import torch
from torch import Tensor, nn

from kandinsky.common.limits import CHUNK_TOKENS
from kandinsky.models.dit import BlockInputs, Execution, RunBlocks
from kandinsky.run_state import CACHE_NUMBERS
from kandinsky.sampling.sampler import Branch

Agree = Callable[[bool], bool]  # whether all processes that share an evaluation say so
SMALLEST = 1e-12  # of an error that a logarithm is taken of
UNSEEN = 0.1  # what is taken for the error after one step before any has been seen


@dataclass
class Track:
    """What is known of one branch of one sample.

    values: those that a forecast goes through, residuals (1, N, D) or velocities (1, T, H, W, C) in the DiT's dtype,
    and the steps that they are of, the newest last. probe: what the first blocks added then. in_a_row: skipped
    evaluations since. numbers: a rule's own.
    """

    values: list[Tensor] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    probe: Tensor | None = None
    in_a_row: int = 0
    skipped: int = 0
    numbers: list[float] = field(default_factory=list)


class AdaptiveCache(ABC):
    """One request's cache, a `BlockCache`. Subclasses say what is forecast and what its error is.

    Args:
        steps: of each branch, in which steps it is evaluated.
        lengths: of all steps, by how much the noise level falls, in any unit.
        blocks: how many there are.
        threshold: of the weighed error, below which blocks are left out; at 0 they all run, to the same bits.
        max_skips: evaluations of a branch in a row that may leave them out.
        order: degree of the polynomial, as soon as there are values enough.
        agree: makes processes decide alike.
    """

    number: int  # of the kind, where a request is kept on disk
    numbers = 0  # that the rule keeps
    value = ""  # in the names under which what a forecast goes through is saved

    def __init__(
        self,
        steps: Mapping[Branch, Sequence[int]],
        lengths: Sequence[float],
        blocks: int,
        threshold: float,
        max_skips: int,
        order: int,
        agree: Agree = bool,
    ) -> None:
        self.steps = steps
        self.weights = [length * len(lengths) / sum(lengths) for length in lengths]
        self.places = [0.0, *accumulate(self.weights)]  # of the steps, along the noise level
        self.threshold, self.max_skips, self.order, self.agree = threshold, max_skips, order, agree
        self.first, last = self.always(blocks)
        self.middle = max(0, blocks - self.first - last)
        self.has_last = last > 0
        self.tracks: dict[tuple[Branch, int], Track] = {}
        self.done: Counter[tuple[Branch, int]] = Counter()
        self.decided: dict[int, bool] = {}  # of each sample, by its newest conditional evaluation

    @staticmethod
    def always(blocks: int) -> tuple[int, int]:
        """How many of the blocks run in every evaluation: first ones, last ones."""
        return 0, 0

    @abstractmethod
    def expected_error(self, track: Track, distance: int, probe: Tensor | None) -> float:
        """Of a forecast so many steps after the newest value, relative to what it forecasts."""

    # --- what a `BlockCache` is asked for -----------------------------------------------------------------------------

    @abstractmethod
    def evaluate(self, branch: Branch, sample: int, run: Callable[..., Tensor], execution: Execution) -> Tensor: ...

    def skipped_of(self, sample: int) -> int:
        return sum(track.skipped for (_, of), track in self.tracks.items() if of == sample)

    def spares(self, blocks: int) -> int:
        return self.middle

    def saved(self) -> dict[str, Tensor]:
        """The state by names, for `restore`; numbers as one tensor in float64, which has all their bits."""
        tensors: dict[str, Tensor] = {}
        for (branch, sample), track in self.tracks.items():
            name = f"{branch}.{sample}"
            lengths = len(track.steps), len(track.numbers)
            head = [self.number, self.order, *lengths, track.skipped, track.in_a_row, *track.steps]
            numbers = [*head, *track.numbers] + [0.0] * (CACHE_NUMBERS - len(head) - len(track.numbers))
            tensors[f"{name}.numbers"] = torch.tensor(numbers, dtype=torch.float64)
            tensors |= {f"{name}.{self.value}{i}": value for i, value in enumerate(track.values)}
            if track.probe is not None:
                tensors[f"{name}.probe"] = track.probe
        return tensors

    def restore(self, tensors: Mapping[str, Tensor], done: Mapping[Branch, int], samples: int) -> None:
        """Go on where `done` evaluations of each branch and sample had been made, with what `saved` gave then.

        Raises ValueError where another kind of cache saved it, or one of another order.
        """
        for branch, evaluations in done.items():
            for sample in range(samples):
                self.done[branch, sample] = evaluations
                if evaluations:
                    self.tracks[branch, sample] = self._track(f"{branch}.{sample}", tensors)

    def _track(self, name: str, tensors: Mapping[str, Tensor]) -> Track:
        if f"{name}.numbers" not in tensors:
            raise ValueError(OTHER_CACHE)
        number, order, count, length, skipped, in_a_row, *rest = tensors[f"{name}.numbers"].tolist()
        values = [tensors[key] for i in range(self.order + 1) if (key := f"{name}.{self.value}{i}") in tensors]
        probe = tensors.get(f"{name}.probe")
        fits = (number, order, count) == (self.number, self.order, len(values)) and length in (0, self.numbers)
        if not fits or (probe is not None) != (count > 0 and self.first > 0):
            raise ValueError(OTHER_CACHE)
        steps, rest = [int(step) for step in rest[: len(values)]], rest[len(values) :]
        return Track(values, steps, probe, int(in_a_row), int(skipped), rest[: int(length)])

    # --- one evaluation -----------------------------------------------------------------------------------------------

    def _begun(self, key: tuple[Branch, int]) -> tuple[Track, int, int]:
        """Of the next evaluation: its track, its step, and how many steps this is after the newest value."""
        track = self.tracks.setdefault(key, Track())
        step = self.steps[key[0]][self.done[key]]
        self.done[key] += 1
        return track, step, step - track.steps[-1] if track.steps else 0

    def _ended(self, key: tuple[Branch, int], track: Track) -> None:
        if self.done[key] == len(self.steps[key[0]]):
            self.tracks[key] = Track(skipped=track.skipped)

    def _skips(self, key: tuple[Branch, int], track: Track, step: int, distance: int, probe: Tensor | None) -> bool:
        """Whether this evaluation leaves blocks out; counts it."""
        branch, sample = key
        may = distance > 0 and track.in_a_row < self.max_skips
        if branch == "cond":
            skips = may and self.weights[step] * self.expected_error(track, distance, probe) < self.threshold
        else:
            skips = may and self.decided[sample]
        skips = self.agree(skips)
        if branch == "cond":
            self.decided[sample] = skips
        if not skips:
            return False
        track.in_a_row += 1
        track.skipped += 1
        return True

    def _weights(self, track: Track, step: int) -> list[float]:
        """Of the track's values, those that make the forecast for a step."""
        return interpolation_weights([self.places[one] for one in track.steps], self.places[step])

    def _keep(self, track: Track, step: int, value: Tensor, probe: Tensor | None = None) -> None:
        track.values = [*track.values, value][-self.order - 1 :]
        track.steps = [*track.steps, step][-self.order - 1 :]
        track.probe = probe
        track.in_a_row = 0


OTHER_CACHE = (
    "the run was stopped without what its cache's next step needs: go on with the cache settings that it began with, "
    "or with cache.kind=off"
)


class _Parts:
    """The blocks of one evaluation, some at a time, from one passage through what hands them out."""

    def __init__(self, run_blocks: RunBlocks, inputs: BlockInputs) -> None:
        self._run_blocks = run_blocks
        self._hand_out = inputs.execution.hand_out
        self._inputs = replace(inputs, execution=replace(inputs.execution, hand_out=self._next))
        self._blocks: Iterator[nn.Module] | None = None
        self._count: int | None = None

    def run(self, hidden: Tensor, count: int | None) -> Tensor:
        """The next `count` blocks; None: all that are left."""
        self._count = count
        return self._run_blocks(hidden, self._inputs)

    def leave_out(self, count: int) -> None:
        """Blocks that stream are fetched all the same, because they are handed out in their order."""
        for _ in islice(self._blocks or (), count):
            pass

    def _next(self, blocks: nn.ModuleList) -> Iterator[nn.Module]:
        if self._blocks is None:
            self._blocks = iter(self._hand_out(blocks))
        return islice(self._blocks, self._count)


# --- forecasts --------------------------------------------------------------------------------------------------------


def interpolation_weights(places: Sequence[float], at: float) -> list[float]:
    """Of values at `places`, the weights with which they sum up to their polynomial's value at `at` (Lagrange)."""
    return [math.prod((at - other) / (own - other) for other in places if other != own) for own in places]


def forecast(values: Sequence[Tensor], weights: Sequence[float], onto: Tensor | None = None) -> Tensor:
    """The weighted sum of tensors (1, N, ...), in their dtype, added onto another; in float32, some rows at a time."""
    result = torch.empty_like(values[-1])
    for rows in _chunks(result.shape[1]):
        total = _weighted(values, weights, rows)
        result[:, rows] = total if onto is None else onto[:, rows] + total
    return result


def forecast_error(values: Sequence[Tensor], weights: Sequence[float], true: Tensor) -> float:
    """Norm of a forecast's distance from what it forecasts, relative to that one's norm."""
    wrong = torch.zeros((), dtype=torch.float32, device=true.device)
    size = wrong.clone()
    for rows in _chunks(true.shape[1]):
        of_rows = true[:, rows].float()
        wrong += (_weighted(values, weights, rows) - of_rows).square().sum()
        size += of_rows.square().sum()
    return float((wrong / size.clamp(min=SMALLEST)).sqrt())


def _weighted(values: Sequence[Tensor], weights: Sequence[float], rows: slice) -> Tensor:
    total = values[0][:, rows].float() * weights[0]
    for weight, value in zip(weights[1:], values[1:], strict=True):
        total.add_(value[:, rows], alpha=weight)
    return total


def _chunks(tokens: int) -> list[slice]:
    return [slice(begin, begin + CHUNK_TOKENS) for begin in range(0, tokens, CHUNK_TOKENS)]


# --- the kinds --------------------------------------------------------------------------------------------------------


class FirstBlockCache(AdaptiveCache):
    """Forecasts what the middle blocks add to the tokens, by how much changed what the first ones add.

    The change that is looked at is the published one: mean of absolute differences over mean of absolute values.
    """

    number = 1

    @staticmethod
    def always(blocks: int) -> tuple[int, int]:
        return 1, 0

    def expected_error(self, track: Track, distance: int, probe: Tensor | None) -> float:
        assert probe is not None and track.probe is not None
        change = torch.linalg.vector_norm(probe - track.probe, 1, dtype=torch.float32)
        return float(change) / max(float(torch.linalg.vector_norm(track.probe, 1, dtype=torch.float32)), SMALLEST)

    def evaluate(self, branch: Branch, sample: int, run: Callable[..., Tensor], execution: Execution) -> Tensor:
        return run(execution=execution.within(lambda blocks: partial(self._run_blocks, (branch, sample), blocks)))

    def _run_blocks(
        self, key: tuple[Branch, int], run_blocks: RunBlocks, hidden: Tensor, inputs: BlockInputs
    ) -> Tensor:
        """Tokens (1, N, D) after all blocks, or what stands for them; keeps what the next evaluations need."""
        track, step, distance = self._begun(key)
        parts, writes_over = _Parts(run_blocks, inputs), inputs.execution.writes_over
        before = hidden.clone() if writes_over else hidden
        hidden = parts.run(hidden, self.first)
        probe = hidden - before
        if self._skips(key, track, step, distance, probe):
            after = forecast(track.values, self._weights(track, step), onto=hidden)
            parts.leave_out(self.middle if self.has_last else 0)
        else:
            before = hidden.clone() if writes_over else hidden
            after = parts.run(hidden, self.middle if self.has_last else None)
            self._keep(track, step, after - before, probe)
        self._ended(key, track)
        return parts.run(after, None) if self.has_last else after


class DualBlockCache(FirstBlockCache):
    number = 2

    @staticmethod
    def always(blocks: int) -> tuple[int, int]:
        return max(1, blocks // 4), max(1, blocks // 8)


class TaylorCache(AdaptiveCache):
    """Forecasts the velocity, and learns from how far that would have been off whenever the DiT does run.

    An error grows with the distance to the power of the degree + 1, as a Taylor series' remainder does.
    """

    number, numbers = 3, 1
    value = "velocity."

    def expected_error(self, track: Track, distance: int, probe: Tensor | None) -> float:
        error = self.error_of_a_step(track, distance) if track.numbers else UNSEEN
        return error * distance ** len(track.values)

    def learn(self, track: Track, distance: int, error: float) -> None:
        """The DiT did run, and a forecast over that distance would have had this error."""
        self.learn_of_a_step(track, distance, max(error, SMALLEST) / distance ** len(track.values))

    def error_of_a_step(self, track: Track, distance: int) -> float:
        return track.numbers[0]

    def learn_of_a_step(self, track: Track, distance: int, error: float) -> None:
        track.numbers = [error]

    def evaluate(self, branch: Branch, sample: int, run: Callable[..., Tensor], execution: Execution) -> Tensor:
        key = branch, sample
        track, step, distance = self._begun(key)
        weights = self._weights(track, step)
        if self._skips(key, track, step, distance, None):
            velocity = forecast(track.values, weights)
        else:
            velocity = run(execution=execution)
            if distance and branch == "cond":
                self.learn(track, distance, forecast_error(track.values, weights, velocity))
            self._keep(track, step, velocity)
        self._ended(key, track)
        return velocity


class TrackedCache(TaylorCache):
    """The logarithm of the error after one step as a random walk that is seen through noise: its mean, its variance."""

    number, numbers = 4, 2
    NOISE = 0.05  # variance of what is seen
    DRIFT = 0.02  # variance that a step adds

    def error_of_a_step(self, track: Track, distance: int) -> float:
        """A standard deviation above the mean."""
        mean, variance = track.numbers
        return math.exp(min(mean + math.sqrt(variance + distance * self.DRIFT), 50.0))

    def learn_of_a_step(self, track: Track, distance: int, error: float) -> None:
        mean, variance = track.numbers or (math.log(error), self.NOISE)
        variance += distance * self.DRIFT
        gain = variance / (variance + self.NOISE)
        track.numbers = [mean + gain * (math.log(error) - mean), (1 - gain) * variance]


KINDS: Mapping[str, type[AdaptiveCache]] = {
    "firstblock": FirstBlockCache,
    "dbcache": DualBlockCache,
    "taylorseer": TaylorCache,
    "tracked": TrackedCache,
}
