"""Encode -> denoise -> decode -> write, once for every task.

A pipeline holds a config, three models and a placement, and keeps nothing between calls: what belongs to one
generation lives in its `Request`, its `Inputs` and in local variables. Knows how the stages follow each other; knows no
files of weights, no kernels, and nothing of what makes a run fast or small.

The samples of a call (several prompts, or several outputs of one) go through every step together but through the
models one by one, their prompts included: a video fills a device by itself, and so no sample can depend on its
neighbours, to the last bit.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kandinsky.coarse import tell_coarse_steps
from kandinsky.common.writing import remove_leftovers
from kandinsky.keyframes import read_keyframes
from kandinsky.outputs import media
from kandinsky.outputs.latents_file import SavedLatents
from kandinsky.outputs.latents_file import on_disk as latents_on_disk
from kandinsky.outputs.records import check_outputs
from kandinsky.outputs.sources import resolve_media
from kandinsky.pipelines.adapting import AdapterCalls
from kandinsky.pipelines.calls import check_callback, one_at_a_time
from kandinsky.pipelines.culprits import require_finite_input
from kandinsky.pipelines.decode import DecodeStage, frames_before, to_uint8, to_unit
from kandinsky.pipelines.denoise import DenoiseStage
from kandinsky.pipelines.encode import EncodeStage
from kandinsky.pipelines.inputs import NO_INPUTS, CheckedInputs, ImageSource, Inputs
from kandinsky.pipelines.parts import StepCallback
from kandinsky.pipelines.retries import NothingLessLeft
from kandinsky.pipelines.stopwatch import Stopwatch
from kandinsky.pipelines.write import WriteStage, convert
from kandinsky.request import Request, warn_about_size
from kandinsky.run_state import RunState
from kandinsky.sampling.coarse import grids_of
from kandinsky.sampling.sampler import SamplerState, flow_timesteps
from kandinsky.text.embeddings import TextEmbeddings

logger = logging.getLogger(__name__)


class Pipeline(CheckedInputs, EncodeStage, DenoiseStage, DecodeStage, WriteStage, AdapterCalls):
    """The stages; subclasses add a task's call signature.

    Threads may share a pipeline: a call, and a change of adapters, waits until those of other threads are done.

    `interrupt` may be set to True while a call runs, from a callback or another thread: the call then ends after the
    current step and returns what it has, or keeps it in a file (see `generate`). `is_denoising` says whether that is
    worth waiting for: whether there are steps that would be lost otherwise.
    """

    def stop(self) -> None:
        """End the call that runs as soon as nothing is lost: after the current step or, after the last one, once the
        latents are on disk. For signal handlers: comes back at once."""
        self._is_stopping = self.interrupt = True

    @one_at_a_time
    def run(
        self,
        text: str | Sequence[str] | None,
        *,
        images: Sequence[ImageSource] = (),
        video: str | Path | None = None,
        mask: str | Path | None = None,
        last_image: ImageSource | None = None,
        loop: bool = False,
        keyframes: Mapping[float, ImageSource] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: TextEmbeddings | None = None,
        negative_prompt_embeds: TextEmbeddings | None = None,
        seed: int | Sequence[int] | None = None,
        save_path: str | Path | None = None,
        progress: bool = True,
        output_type: str | None = None,
        callback_on_step_end: StepCallback | None = None,
        **wishes: Any,
    ) -> Any:
        """What every task's call does with its arguments; `wishes` are those of `resolve_request`."""
        if generator is not None and seed is not None:
            raise ValueError("both seed and generator are given: leave one of them out")
        request, found = resolve_media(
            self.config,
            text,
            images,
            video,
            mask,
            num_prompts=None if prompt_embeds is None else self._checked_embeds("prompt_embeds", prompt_embeds),
            seed=seed,
            seeded=generator is None,
            loop=loop,
            **wishes,
        )
        inputs = Inputs(
            **vars(found),
            keyframes=read_keyframes(self.config, request.num_frames, last_image, loop, keyframes or {}),
            generators=() if generator is None else generator if isinstance(generator, list | tuple) else (generator,),
            latents=latents,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
        )
        return self.generate(request, inputs, save_path, progress, output_type, callback_on_step_end)

    @one_at_a_time
    @torch.no_grad()
    def generate(
        self,
        request: Request,
        inputs: Inputs = NO_INPUTS,
        save_path: str | Path | None = None,
        progress: bool = True,
        output_type: str | None = None,
        callback: StepCallback | None = None,
        keep_stopped: bool = False,
    ) -> Any:
        """Run one request; the outputs as `output_type` says (see `convert`), also written where `save_path` says.

        None means "uint8" for videos and "pil" for pictures.

        Beside every output, a JSON file of the same name holds the prompt, every resolved setting, versions and times.
        Where `keep_stopped` is set and the run is interrupted before its last step, it is kept beside `save_path` for
        `resume`, or where there is no room in a folder for temporary files, and Stopped is raised. Where there is no
        room at all, it goes on. Interrupted later, its latents are kept and Kept is raised.
        """
        check_callback(callback)
        output_type = output_type or ("pil" if request.is_image else "uint8")
        request = self.team.agree(request)  # its seeds may be random
        if not self.team.is_first:
            save_path, progress = None, False
        self.check_inputs(request, inputs, save_path, output_type)
        warn_about_size(self.config, request)
        tell_coarse_steps(self.config, request.num_steps, request.width, request.height)
        self.interrupt = self._is_stopping = False
        watch = Stopwatch(devices=self._devices())
        run = self._encoded(request, inputs, watch)
        return self._complete(run, save_path, progress, output_type, callback, keep_stopped, watch)

    def _encoded(self, request: Request, inputs: Inputs, watch: Stopwatch) -> RunState:
        """Everything before the first step."""
        images = [media.fit_image(image, request.width, request.height) for image in inputs.images]
        with watch.stage("expand"):
            expanded = self.team.agree(self.expand_prompts(request, images))
        if expanded == request:  # there was nothing to do
            del watch.seconds["expand"]
        request = expanded
        with watch.stage("encode"):
            branches = self.encode_prompts(request, inputs, images)
            conditioning = self.condition(request, inputs, images)
        first = request.first_step
        sigmas = flow_timesteps(request.num_steps, request.scheduler_scale, request.schedule)
        grids = grids_of(conditioning, self._coarse(request))
        state = SamplerState(grids.at(first).start(float(sigmas[first]), first).float(), first)
        return RunState(request, conditioning, branches, state, image_names=tuple(inputs.image_names))

    @one_at_a_time
    @torch.no_grad()
    def sample(
        self, request: Request, inputs: Inputs = NO_INPUTS, progress: bool = True, callback: StepCallback | None = None
    ) -> SavedLatents:
        """The first two stages of `generate` alone: scaled latents, and the record of each; `decode` or `finish` goes
        on from them. Nothing is written."""
        check_callback(callback)
        request = self.team.agree(request)
        self.check_inputs(request, inputs)
        warn_about_size(self.config, request)
        tell_coarse_steps(self.config, request.num_steps, request.width, request.height)
        self.interrupt = self._is_stopping = False
        watch = Stopwatch(devices=self._devices())
        run = self._encoded(request, inputs, watch)
        with watch.stage("denoise"):
            latents = self.denoise(run, progress and self.team.is_first, callback, watch)
        samples = range(len(run.request.samples))
        return SavedLatents(latents, [self.describe(run, i, watch) for i in samples])

    @one_at_a_time
    @torch.no_grad()
    def resume(
        self, run: RunState, save_path: str | Path | None, progress: bool = True, callback: StepCallback | None = None
    ) -> Any:
        """Go on with a run that was stopped, as `generate` would have: to the same bits on the same device.

        Raises ValueError where it was stopped with other adapters than are active now.
        """
        before, now = ([(one["name"], one["scale"]) for one in a] for a in (run.adapters, self.active_adapters()))
        if before != now:
            raise ValueError(
                f"the run was stopped with the adapters {before or 'none'} active, and now there are {now or 'none'}: "
                "go on with the same ones (model.loras, or load_adapter and set_adapter)"
            )
        if not self.team.is_first:
            save_path, progress = None, False
        self.interrupt = self._is_stopping = False
        device, difference = self.placement.device("dit"), run.state.difference
        run = dataclasses.replace(
            run,
            conditioning=run.conditioning.to(device),
            branches={branch: [text.to(device) for text in texts] for branch, texts in run.branches.items()},
            state=SamplerState(
                run.state.latents.to(device), run.state.step, None if difference is None else difference.to(device)
            ),
        )
        # A cache counts what was skipped before it went on; without one (`--cache off`) this is what remains of it.
        watch = Stopwatch(dict(run.seconds), run.evaluations, run.skipped, run.spared_blocks, devices=self._devices())
        watch.attention_calls.update(run.attention_calls)
        output_type = "pil" if run.request.is_image else "uint8"
        return self._complete(run, save_path, progress, output_type, callback, True, watch)

    def _complete(
        self,
        run: RunState,
        save_path: str | Path | None,
        progress: bool,
        output_type: str,
        callback: StepCallback | None,
        keep_stopped: bool,
        watch: Stopwatch,
    ) -> Any:
        """Everything from the first step, or the next one, on."""
        request = run.request
        if save_path is not None:
            remove_leftovers(Path(save_path).parent)
        previews = self._previews(request, save_path)
        self.is_denoising = True
        try:
            try:
                with watch.stage("denoise"):
                    latents = self.denoise(run, progress, callback, watch, previews)
                while keep_stopped and run.state.step < request.num_steps:
                    self._keep(run, watch, save_path)
                    with watch.stage("denoise"):
                        latents = self.denoise(run, progress, callback, watch, previews)
            except NothingLessLeft:
                if keep_stopped and run.state.step > request.first_step:
                    self._keep_for_more_memory(run, watch, save_path)
                raise
            if output_type == "latent":
                return latents
            if watch.skipped_evaluations:
                blocks = watch.spared_blocks, len(self.dit.visual_transformer_blocks)
                evaluations = watch.skipped_evaluations, len(request.samples) * watch.evaluations
                logger.info("%d of %d model evaluations left out %d of %d blocks", *evaluations, *blocks)
            records = [self.describe(run, i, watch) for i in range(len(request.samples))]
            finish = to_unit if output_type in ("np", "pt") else to_uint8
            keep = self.config.runtime.save_latents
            with nullcontext() if save_path is None else latents_on_disk(save_path, latents, records, keep):
                self.is_denoising = False
                if self._is_stopping:  # since the last step began
                    raise KeyboardInterrupt
                pixels = self.decode_and_write(latents, finish, records, save_path, watch)
            return convert(pixels, output_type, request.is_image)
        finally:
            self.is_denoising = False

    @one_at_a_time
    @torch.no_grad()
    def finish(self, saved: SavedLatents, save_path: str | Path | None) -> Tensor:
        """Decode and write what a run that died had denoised; uint8 pixels (samples, 3, frames, height, width)."""
        check_outputs(saved.records, {"latents": ("F32", tuple(saved.latents.shape))}, "these latents")
        require_finite_input("latents", saved.latents)
        watch = Stopwatch(dict(saved.records[0]["seconds"]), devices=self._devices())
        save_path = save_path if self.team.is_first else None
        if save_path is not None:
            remove_leftovers(Path(save_path).parent)
        return self.decode_and_write(saved.latents, to_uint8, saved.records, save_path, watch)

    def decode_and_write(
        self,
        latents: Tensor,
        finish: Callable[[Tensor], Tensor],
        records: Sequence[dict[str, Any]],
        path: str | Path | None,
        watch: Stopwatch,
    ) -> Tensor:
        """`decode`, and where there is a path `write`, with what decoded them; frames from before are left out."""
        records = [{**record, "decoder": self.config.model.vae.decoder} for record in records]
        with watch.stage("decode"):
            decode = self.decode_loop if records[0]["loop"] else self.decode
            pixels = decode(latents, finish)[:, :, frames_before(records[0]) :]
        logger.info("seconds: %s", ", ".join(f"{name} {seconds:.1f}" for name, seconds in watch.seconds.items()))
        if path is not None:
            self.write(pixels, records, Path(path), watch)
        return pixels
