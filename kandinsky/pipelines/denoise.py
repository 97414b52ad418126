"""The second stage: from noise to latents, a step at a time, as far as nobody interrupts.

What a run is in the middle of is its `RunState`: this stage goes on from wherever that is, and leaves in it how far it
came.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from kandinsky.attention.nabla import NablaConfig
from kandinsky.models.dit import Grid, RequestTables
from kandinsky.models.numerics import require_finite
from kandinsky.models.rope import text_rotary_table
from kandinsky.outputs.preview import Previews
from kandinsky.pipelines.calls import replacements
from kandinsky.pipelines.culprits import blame, require_finite_latents
from kandinsky.pipelines.parts import BlockCache, StepCallback
from kandinsky.pipelines.retries import Retries
from kandinsky.pipelines.stopwatch import Stopwatch
from kandinsky.run_state import RunState
from kandinsky.sampling.coarse import Grids, enlarged, grids_of
from kandinsky.sampling.conditioning import normalize_first_frames
from kandinsky.sampling.sampler import (
    NUM_TRAIN_TIMESTEPS,
    Branch,
    euler_sample,
    flow_timesteps,
    guided_steps,
)

logger = logging.getLogger(__name__)


class DenoiseStage(Retries):
    """Euler's steps over the DiT's velocities."""

    def denoise(
        self,
        run: RunState,
        progress: bool = True,
        callback: StepCallback | None = None,
        watch: Stopwatch | None = None,
        previews: Previews | None = None,
    ) -> Tensor:
        """Latents (samples, T, H, W, C), scaled, float32, from where `run` is.

        Keeps `run` up to date: an end before the last step can be gone on from. Where memory runs out it goes on from
        there itself, with settings that take less. The evaluations that it took are written into `watch`.
        """
        request, record, calls = run.request, watch or Stopwatch(), Counter[str]()
        grids = grids_of(run.conditioning, self._coarse(request))
        latents, block_cache, skipped_before = self.frugally(
            "denoise", request, lambda: self._take_steps(run, grids, progress, callback, record, calls, previews)
        )
        require_finite_latents(latents, self.dtype_name, self.active_adapters(), callback is not None)
        run.residuals = {}
        if block_cache is not None:
            if run.state.step < request.num_steps:
                run.residuals = self.team.from_branches(block_cache.saved())
            skipped = _skipped(block_cache, len(request.samples))
            since = self.team.over_branches([a - b for a, b in zip(skipped, skipped_before, strict=True)])
            record.skipped = [a + b for a, b in zip(skipped_before, since, strict=True)]
            record.spared_blocks = block_cache.spares(len(self.dit.visual_transformer_blocks))
        kinds = ("engine", "exact")
        for kind, count in zip(kinds, self.team.over_branches([calls[kind] for kind in kinds]), strict=True):
            record.attention_calls[kind] += count
        if run.state.step < grids.switch:  # it ends early, and is as large as was asked for all the same
            latents = enlarged(latents, run.conditioning.noise)
        generation = self.config.generation
        # Of several given frames none is moved away from the others: a loop's first is its last.
        if run.conditioning.is_given_the_first_frame_alone and generation.first_frame_normalization:
            return normalize_first_frames(latents, generation.first_frame_statistics)
        return latents

    def _take_steps(
        self,
        run: RunState,
        grids: Grids,
        progress: bool,
        callback: StepCallback | None,
        record: Stopwatch,
        calls: Counter[str],
        previews: Previews | None,
    ) -> tuple[Tensor, BlockCache | None, list[int]]:
        """The steps that are left: latents, the cache of blocks, and how many evaluations it had skipped before.

        Where one fails, all is as it was before that step, in each of several processes.
        """
        request, branches, state = run.request, run.branches, run.state
        if state.step > 0 and self.make_cache is not None:
            run.residuals = self.team.from_branches(run.residuals)
        device = self.placement.device("dit")
        sigmas = flow_timesteps(request.num_steps, request.scheduler_scale, request.schedule)
        attention = self.config.model.attention
        kept = [attention.mass_kept(step, request.num_steps) for step in range(request.num_steps)]
        nabla = NablaConfig(kept[0], attention.wT, attention.wH, attention.wW) if self.uses_nabla else None
        num_blocks = len(self.dit.visual_transformer_blocks)
        exact = [attention.exact_numbers(num_blocks, step, request.num_steps) for step in range(request.num_steps)]
        scale_factor = self.config.metrics.scale_factor

        # Everything that depends on the request's sizes alone, once and not at every step.
        @cache
        def shared(size: Grid) -> RequestTables:
            # Positions on a coarse grid reach as far as on the full one: the published scales of smaller sizes do.
            scale = [s * (own / full) for s, own, full in zip(scale_factor, size, request.latent_size, strict=True)]
            return self.dit.request_tables(size, 1, scale, device, nabla)

        @cache
        def tables(size: Grid, text_length: int, P: float) -> RequestTables:
            of_size = shared(size)
            blocks = of_size.nabla if of_size.nabla is None else of_size.nabla.keeping(P)
            text_rope = text_rotary_table(text_length, self.dit.head_dim, device)
            return replace(of_size, text_rope=text_rope, nabla=blocks)

        interval, every = request.guidance_interval, request.guidance_every
        guidance = guided_steps(request.num_steps, request.guidance_weight, interval, every, request.first_step)
        block_cache = None
        first, plans = request.first_step, self.config.block_cache is None or self.config.uses_magcache
        if self.make_cache is not None and not (first and plans):  # MagCache's plan is of runs that begin with noise
            lengths = (sigmas[first:-1] - sigmas[first + 1 :]).tolist()
            block_cache = self.make_cache([step == "new" for step in guidance[first:]], lengths)
        if block_cache is not None and state.step > first:
            done: dict[Branch, int] = {"cond": state.step - first, "uncond": guidance[: state.step].count("new")}
            residuals = {name: residual.to(device) for name, residual in run.residuals.items()}
            block_cache.restore(residuals, done, len(request.samples))
        skipped_before = _skipped(block_cache, len(request.samples))
        before = record.evaluations, calls.copy(), state.difference  # the step that is under way

        def evaluate(latents: Tensor, timestep: Tensor, branch: Branch) -> Tensor:
            velocities = []
            samples = grids.at(state.step).model_input(latents).split(1)
            _, *size, _ = latents.shape
            for i, (sample, text) in enumerate(zip(samples, branches[branch], strict=True)):
                execution = replace(self.execution, exact_blocks=exact[state.step], calls=calls)
                run_dit = partial(
                    self.dit,
                    sample,
                    text.text_embeds,
                    text.pooled_embeds,
                    timestep.expand(1),
                    text_mask=text.text_mask,
                    tables=tables(tuple(size), text.text_embeds.shape[1], kept[state.step]),
                )
                if block_cache is None:
                    velocities.append(run_dit(execution=execution))
                else:
                    velocities.append(block_cache.evaluate(branch, i, run_dit, execution))
            out = torch.cat(velocities)
            if record.evaluations == 1:  # once, because it waits for the device
                weights = partial(self.dit.named_weights, self.execution.hand_out)
                require_finite("the DiT", out, weights, blame(self.active_adapters()))
            return out

        divided = self.team.split_guidance(evaluate, guidance[state.step :])

        def velocity(latents: Tensor, timestep: Tensor, branch: Branch) -> Tensor:
            record.evaluations += 1
            return divided(latents, timestep, branch)

        def until_interrupted(steps: range) -> Iterable[int]:
            nonlocal before
            bar = tqdm(
                steps,
                desc="denoise",
                unit="step",
                initial=state.step,
                total=request.num_steps,
                disable=not progress,
            )
            for step in bar:
                if self.team.any(self.interrupt):
                    logger.warning("interrupted after %d of %d steps", step, request.num_steps)
                    return
                before = record.evaluations, calls.copy(), state.difference
                run.residuals = {} if block_cache is None else block_cache.saved()
                yield step

        def on_step_end(step: int, latents: Tensor) -> Tensor:
            entered, sigma, next_sigma = step + 1, float(sigmas[step]), float(sigmas[step + 1])
            conditioning = grids.at(step)
            latents = conditioning.hold(latents, next_sigma, entered)
            if previews is not None or entered == grids.switch:
                # As far along the step's straight line as it takes to get to sigma 0.
                clean = torch.lerp(state.latents, latents, sigma / (sigma - next_sigma))
                clean = conditioning.hold(clean, 0.0, entered)
            if previews is not None:
                previews(step, request.num_steps, clean)
            if entered == grids.switch:
                conditioning, latents = grids.full, grids.to_full(clean, next_sigma)
                if state.difference is not None:
                    state.difference = enlarged(state.difference, latents)
            if callback is None:
                return latents
            tensors: dict[str, Any] = {
                "latents": latents,
                "prompt_embeds": branches["cond"],
                "negative_prompt_embeds": branches.get("uncond"),
            }
            returned = callback(self, step, sigmas[step] * NUM_TRAIN_TIMESTEPS, dict(tensors))
            tensors.update(replacements(returned, tensors))
            branches["cond"] = tensors["prompt_embeds"]
            if "uncond" in branches:
                branches["uncond"] = tensors["negative_prompt_embeds"]
            if tensors["latents"] is latents:  # to hold twice would count a feathered edge twice
                return latents
            return conditioning.hold(tensors["latents"], next_sigma, entered)

        try:
            with self.placement.use("dit"):
                latents = euler_sample(
                    velocity,
                    state.latents,
                    sigmas,
                    request.guidance_weight,
                    until_interrupted,
                    lambda step, latents: self.team.together(lambda: on_step_end(step, latents)),
                    guidance_interval=interval,
                    guidance_every=every,
                    first_step=request.first_step,
                    state=state,
                )
        except (RuntimeError, MemoryError):
            record.evaluations = before[0]
            calls.clear()
            calls.update(before[1])
            state.difference = before[2]
            raise
        return latents, block_cache, skipped_before


def _skipped(block_cache: BlockCache | None, samples: int) -> list[int]:
    """Evaluations of each sample that left blocks out so far."""
    return [0 if block_cache is None else block_cache.skipped_of(i) for i in range(samples)]
