"""The last stage: files, each with the record of how it was made; and the forms in which a caller gets the pixels."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kandinsky.common.writing import write_somewhere
from kandinsky.config.reading import config_to_dict
from kandinsky.outputs import media
from kandinsky.outputs.post import Frames, Post, processed
from kandinsky.outputs.preview import Decoded, Previews
from kandinsky.outputs.resume import Stopped, save_run, stopped_path
from kandinsky.pipelines.inputs import one_each
from kandinsky.pipelines.parts import Parts
from kandinsky.pipelines.stopwatch import Stopwatch
from kandinsky.request import FPS, Request
from kandinsky.run_state import RunState

logger = logging.getLogger(__name__)


class WriteStage(Parts):
    """Videos and pictures on disk, their records, and runs that are kept for later."""

    def write(self, pixels: Tensor, records: Sequence[dict[str, Any]], path: Path, watch: Stopwatch) -> list[Path]:
        """`write_outputs`."""
        return write_outputs(pixels, records, path, watch, self.placement.device("vae"))

    def describe(self, run: RunState, index: int, watch: Stopwatch) -> dict[str, Any]:
        """What is needed to make an output again, and how long it took. Names are the command line's."""
        engine = self.execution.block_sparse if self.uses_nabla else self.execution.attention
        engine_name, exact_name = (getattr(one, "__name__", str(one)) for one in (engine, self.execution.exact))
        names = {"engine": f"nabla:{engine_name}" if self.uses_nabla else engine_name, "exact": exact_name}
        calls = Counter[str]()
        for kind, count in watch.attention_calls.items():
            calls[names[kind]] += count  # under one name where both are the same
        request = run.request
        settings = dict(vars(request))
        sample = settings.pop("samples")[index]
        image_names = one_each(run.image_names, request.num_prompts)
        skipped = watch.skipped[index] if watch.skipped else 0
        blocks = len(self.dit.visual_transformer_blocks)
        return {
            "task": self.config.task,
            "prompt": sample.text,
            "expanded_prompt": sample.expanded,
            "negative_prompt": sample.negative_caption,
            "image": image_names[sample.prompt] if image_names else None,
            "seed": sample.seed,
            "conditions": [item.facts() for item in run.conditioning.items],
            **settings,
            "coarse_steps": None if (coarse := self._coarse(request)) is None else dataclasses.asdict(coarse),
            "cache": None if (cache := self.config.block_cache) is None else cache._asdict(),
            "fps": FPS,
            "attention_engine": engine_name,
            "devices": {name: str(self.placement.device(name)) for name in ("text_embedder", "dit", "vae")},
            "processes": self.team.size,
            "dtype": self.dtype_name,
            "adapters": self.active_adapters(),
            "config": config_to_dict(self.config),
            "versions": media.versions(),
            "attention_calls": dict(+calls),  # visual blocks that ran, of all outputs of this call
            # Of this output, and how many passes through a visual block these were.
            "evaluations": {"all": watch.evaluations, "skipped": skipped},
            "blocks": {"all": watch.evaluations * blocks, "skipped": skipped * watch.spared_blocks},
            "seconds": dict(watch.seconds),
        }

    def _keep(self, run: RunState, watch: Stopwatch, save_path: str | Path | None) -> None:
        """Keep a run that was interrupted between two steps, and raise Stopped; come back where there is no room."""
        run.evaluations, run.seconds, run.adapters = watch.evaluations, watch.seconds, self.active_adapters()
        run.skipped, run.spared_blocks = list(watch.skipped), watch.spared_blocks
        run.attention_calls = dict(watch.attention_calls)
        kept: tuple[Path, str | Path] | None = None
        if save_path is not None:
            config = config_to_dict(self.config)
            try:
                path = write_somewhere(
                    stopped_path(save_path), lambda path: save_run(path, run, config, self.dtype_name)
                )
                kept = path, save_path
            except OSError as error:
                logger.warning("the run could not be kept (%s) and goes on; make room and stop it again", error)
        kept = self.team.agree(kept)
        if kept is not None:
            raise Stopped(kept[0], run.state.step, run.request.num_steps, kept[1])
        self.interrupt = self._is_stopping = False

    def _keep_for_more_memory(self, run: RunState, watch: Stopwatch, save_path: str | Path | None) -> None:
        """Keep a run whose next step has not enough memory, where there is room, and say how to go on from it."""
        try:
            self._keep(run, watch, save_path)
        except Stopped as stopped:
            if self.team.is_first:
                logger.error("%s; where there is more memory, go on with: python test.py %s", stopped, stopped.flags)

    def _previews(self, request: Request, save_path: str | Path | None) -> Previews | None:
        every = self.config.runtime.preview
        to_pictures = self.latent_rgb if self.tiny_decoder is None else Decoded(self.tiny_decoder)
        if every is None or to_pictures is None or save_path is None:
            return None
        return Previews(every, to_pictures, media.output_paths(save_path, len(request.samples)))


def write_outputs(
    pixels: Tensor, records: Sequence[dict[str, Any]], path: Path, watch: Stopwatch, device: torch.device | str = "cpu"
) -> list[Path]:
    """The videos or pictures, each with its record as JSON beside it; returns their paths.

    Larger and with more frames where the record's settings say so; an upscaling network runs on `device`.

    Where a record can't be written its output is all the same; the WriteError comes after it.
    """
    if pixels.is_floating_point():
        pixels = (pixels * 255).round().to(torch.uint8)
    paths = media.output_paths(path, len(pixels))
    post = Post.of(records[0]["config"]["runtime"])
    for output, record, target in zip(pixels, records, paths, strict=True):
        count, height, width = output.shape[1:]
        frames = Frames(output.permute(1, 2, 3, 0).numpy(), count, width, height, FPS)  # (T, H, W, 3)
        frames = frames if post.does_nothing else processed(frames, post, device)
        made = {} if post.does_nothing else {"post": post.facts(frames.count, frames.width, frames.height)}
        failures: list[OSError] = []

        def write_record(target: Path = target, facts: dict[str, Any] = record, made: dict[str, Any] = made) -> None:
            try:
                media.write_sidecar(target, {**facts, **made, "seconds": watch.so_far()})
            except OSError as error:
                failures.append(error)  # noqa: B023  (it is called below)

        with watch.stage("write"):
            if record["num_frames"] == 1:
                media.write_image(next(iter(frames.frames)), target, write_record)
            else:
                sizes = frames.count, frames.width, frames.height
                media.write_frames(frames.frames, *sizes, target, frames.fps, write_record)
        media.remove_preview(target)
        if failures:
            raise failures[0]
        logger.info("wrote %s", target)
    return paths


def convert(pixels: Tensor, output_type: str, is_image: bool) -> Any:
    """Pixels (B, 3, T, H, W) as a caller asks for them; of pictures without the time axis.

    "uint8": the tensor, 0..255. "pt": float tensor (B, T, 3, H, W) in [0, 1]. "np": float array (B, T, H, W, 3) in
    [0, 1]. "pil": for every output a list of frames, or for pictures the picture.
    """
    if output_type == "uint8":
        return pixels[:, :, 0] if is_image else pixels
    if output_type == "pt":
        frames = pixels.transpose(1, 2)
        return frames[:, 0] if is_image else frames
    if output_type == "np":
        array = pixels.permute(0, 2, 3, 4, 1).numpy()
        return array[:, 0] if is_image else array
    if is_image:
        return [media.to_pil(output[:, 0]) for output in pixels]
    return [[media.to_pil(frame) for frame in output.unbind(1)] for output in pixels]
