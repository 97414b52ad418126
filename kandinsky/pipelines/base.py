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
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from kandinsky.attention.nabla import NablaConfig
from kandinsky.checkpoints.lora_file import AdapterConfig
from kandinsky.common.writing import remove_leftovers, write_somewhere
from kandinsky.config import Config, config_to_dict
from kandinsky.models.dit import DiffusionTransformer3D, Execution, RequestTables, RunBlocks
from kandinsky.models.numerics import require_finite
from kandinsky.models.rope import text_rotary_table
from kandinsky.models.vae_flux import AutoencoderKL
from kandinsky.models.vae_hunyuan import AutoencoderKLHunyuanVideo
from kandinsky.models.vae_memory import GB, Decoding
from kandinsky.models.vae_tiling import MapTiles, VAETiling
from kandinsky.outputs import media
from kandinsky.outputs.latents_file import SavedLatents
from kandinsky.outputs.latents_file import on_disk as latents_on_disk
from kandinsky.outputs.preview import LatentRGB, Previews
from kandinsky.outputs.records import check_outputs
from kandinsky.outputs.resume import Stopped, StoppedRun, save_run, stopped_path
from kandinsky.pipelines.calls import (
    check_callback,
    check_latents,
    check_save_path,
    one_at_a_time,
    replacements,
)
from kandinsky.pipelines.culprits import blame, require_finite_input, require_finite_latents
from kandinsky.pipelines.stopwatch import Stopwatch
from kandinsky.request import FPS, FRAMES_PER_LATENT, Request, resolve_request, warn_about_size
from kandinsky.sampling.conditioning import (
    Conditioning,
    draw_noise,
    from_first_frame,
    from_source,
    from_text,
    normalize_first_frames,
)
from kandinsky.sampling.sampler import (
    NUM_TRAIN_TIMESTEPS,
    Branch,
    Guidance,
    SamplerState,
    Velocity,
    euler_sample,
    flow_timesteps,
    guidance_plan,
    uses_guidance,
)
from kandinsky.sizes import check_picture, size_for_image
from kandinsky.text.embeddings import PromptEncoder, TextEmbeddings
from kandinsky.text.expansion import PromptExpander
from kandinsky.text.prompts import check_prompts

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)

Value = TypeVar("Value")
ImageSource: TypeAlias = "str | Path | Image.Image | np.ndarray"
FINISHED_AT_ONCE = 8  # decoded frames
OUTPUT_TYPES = ("uint8", "pil", "np", "pt", "latent")

# callback(pipe, step, timestep, tensors) -> tensors to replace, or None
StepCallback = Callable[["Pipeline", int, Tensor, dict[str, Any]], Mapping[str, Any] | None]


class Placement(Protocol):
    """Where components run: `use(name)` makes one ready on its device for the length of a stage."""

    def device(self, component: str) -> torch.device: ...

    def use(self, component: str) -> AbstractContextManager[Any]: ...


class Adapters(Protocol):
    """The DiT's LoRA adapters: any number are loaded, and some of these active."""

    def load(self, adapter_config: AdapterConfig, path: Any, name: str, trigger: str | None) -> None: ...

    def activate(self, scales: Mapping[str, float]) -> None: ...

    @property
    def active(self) -> Sequence[Mapping[str, Any]]:
        """name, path, scale and trigger of each."""
        ...


class BlockCache(Protocol):
    """What spares one request some of its passes through the DiT's blocks; `skipped` counts them, of all samples."""

    skipped: int

    def run_blocks(self, branch: Branch, sample: int, run_blocks: RunBlocks) -> RunBlocks:
        """What to run in place of the DiT's own `run_blocks` in this sample's next evaluation of the branch."""
        ...

    def saved(self) -> dict[str, Tensor]:
        """What `restore` needs to go on in another process."""
        ...

    def restore(self, residuals: Mapping[str, Tensor], done: Mapping[Branch, int], samples: int) -> None:
        """Go on after so many evaluations of each branch of each sample."""
        ...


# For each step of a request, whether it has an unconditional evaluation -> the request's own cache.
MakeCache = Callable[[Sequence[bool]], BlockCache]


class Team(Protocol):
    """The processes that make an output together, all of which run the same pipeline with the same arguments.

    The first one writes and shows its progress; its seeds and noise are everybody's.
    """

    is_first: bool
    size: int

    @property
    def map_tiles(self) -> MapTiles:
        """Who decodes which of the VAE's tiles."""
        ...

    def agree(self, value: Value) -> Value:
        """The first process's value, in all of them."""
        ...

    def any(self, flag: bool) -> bool:
        """Whether it is set in any of them."""
        ...

    def out_of_memory(self, error: torch.OutOfMemoryError | None) -> torch.OutOfMemoryError | None:
        """What ended an attempt for want of memory, in any of them: called by all when an attempt has ended."""
        ...

    def split_guidance(self, velocity: Velocity, plan: Sequence[Guidance]) -> Velocity:
        """The same velocity, maybe with its branches computed by different processes."""
        ...

    def over_branches(self, count: int) -> int:
        """What all processes counted that computed different branches."""
        ...

    def from_branches(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What all processes hold that computed different branches."""
        ...


class Alone:
    """A team of one."""

    is_first = True
    size = 1
    map_tiles: MapTiles = map

    def agree(self, value: Value) -> Value:
        return value

    def any(self, flag: bool) -> bool:
        return flag

    def out_of_memory(self, error: torch.OutOfMemoryError | None) -> torch.OutOfMemoryError | None:
        return error

    def split_guidance(self, velocity: Velocity, plan: Sequence[Guidance]) -> Velocity:
        return velocity

    def over_branches(self, count: int) -> int:
        return count

    def from_branches(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors


@dataclass(frozen=True)
class Inputs:
    """What a call brings besides words and numbers.

    images: RGB pictures, none, one for all prompts, or one a prompt; image_names are for the record. generators: none
    (seeds are used), one that all samples draw from in turn, or one a sample. latents: (samples, T, H, W, C), in place
    of the noise. conditioning: in place of noise, latents and pictures, all of them on the DiT's device.
    """

    images: Sequence[Image.Image] = ()
    image_names: Sequence[str] = ()
    generators: Sequence[torch.Generator] = ()
    latents: Tensor | None = None
    prompt_embeds: TextEmbeddings | None = None
    negative_prompt_embeds: TextEmbeddings | None = None
    conditioning: Conditioning | None = None


class Pipeline:
    """The stages; subclasses add a task's call signature.

    Threads may share a pipeline: a call, and a change of adapters, waits until those of other threads are done.

    `interrupt` may be set to True while a call runs, from a callback or another thread: the call then ends after the
    current step and returns what it has, or keeps it in a file (see `generate`). `is_denoising` says whether that is
    worth waiting for: whether there are steps that would be lost otherwise.
    """

    def __init__(
        self,
        config: Config,
        dit: DiffusionTransformer3D,
        text_embedder: PromptEncoder,
        vae: AutoencoderKLHunyuanVideo | AutoencoderKL,
        placement: Placement,
        *,
        execution: Execution | None = None,
        make_cache: MakeCache | None = None,
        team: Team | None = None,
        latent_rgb: LatentRGB | None = None,
        expander: PromptExpander | None = None,
        adapters: Adapters | None = None,
    ) -> None:
        """execution: how the DiT is run; None: in plain PyTorch. make_cache: makes each request a cache of its own;
        None: every evaluation runs all blocks. team: the processes that this one works with; None: it works alone.
        latent_rgb: what previews are made with; None: there are none. expander: writes prompts out; None: this model,
        or this process, can't. adapters: the DiT's; None: it can have none."""
        self.config = config
        self.dit = dit
        self.text_embedder = text_embedder
        self.vae = vae
        self.placement = placement
        self.execution = execution or Execution()
        self.make_cache = make_cache
        self.team: Team = team or Alone()
        self.latent_rgb = latent_rgb
        self.expander = expander
        self.adapters = adapters
        self.interrupt = self._is_stopping = False
        self.is_denoising = False
        self.lock = threading.RLock()  # who holds it has models and adapters to itself

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
        pictures = [media.load_image(image) for image in images]
        inputs = Inputs(
            images=pictures,
            image_names=[name_of(image) for image in images],
            generators=() if generator is None else generator if isinstance(generator, list | tuple) else (generator,),
            latents=latents,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
        )
        request = resolve_request(
            self.config,
            text,
            image_sizes=[picture.size for picture in pictures],
            num_prompts=None if prompt_embeds is None else self._checked_embeds("prompt_embeds", prompt_embeds),
            seed=seed,
            seeded=generator is None,
            **wishes,
        )
        return self.generate(request, inputs, save_path, progress, output_type, callback_on_step_end)

    @one_at_a_time
    @torch.no_grad()
    def generate(
        self,
        request: Request,
        inputs: Inputs = Inputs(),
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
        self.interrupt = self._is_stopping = False
        size = request.width, request.height
        images = [media.fit_image(image, *size) for image in inputs.images]
        watch = Stopwatch(devices=self._devices())
        with watch.stage("expand"):
            expanded = self.team.agree(self.expand_prompts(request, images))
        if expanded == request:  # there was nothing to do
            del watch.seconds["expand"]
        request = expanded
        with watch.stage("encode"):
            branches = self.encode_prompts(request, inputs, images)
            conditioning = self.condition(request, inputs, images)
        state = SamplerState(conditioning.hold(conditioning.noise).float())
        run = StoppedRun(request, conditioning, branches, state, image_names=tuple(inputs.image_names))
        return self._complete(run, save_path, progress, output_type, callback, keep_stopped, watch)

    @one_at_a_time
    @torch.no_grad()
    def resume(
        self, run: StoppedRun, save_path: str | Path | None, progress: bool = True, callback: StepCallback | None = None
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
        device = self.placement.device("dit")

        def moved(tensor: Tensor | None) -> Any:
            return None if tensor is None else tensor.to(device)

        run = dataclasses.replace(
            run,
            conditioning=Conditioning(**{name: moved(value) for name, value in vars(run.conditioning).items()}),
            branches={branch: [text.to(device) for text in texts] for branch, texts in run.branches.items()},
            state=SamplerState(moved(run.state.latents), run.state.step, moved(run.state.difference)),
        )
        watch = Stopwatch(dict(run.seconds), run.evaluations, devices=self._devices())
        output_type = "pil" if run.request.is_image else "uint8"
        return self._complete(run, save_path, progress, output_type, callback, True, watch)

    def _complete(
        self,
        run: StoppedRun,
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
            with watch.stage("denoise"):
                latents = self.denoise(run, progress, callback, watch, previews)
            while keep_stopped and run.state.step < request.num_steps:
                self._keep(run, watch, save_path)
                with watch.stage("denoise"):
                    latents = self.denoise(run, progress, callback, watch, previews)
            if output_type == "latent":
                return latents
            if watch.skipped_evaluations:
                logger.info("skipped %d of %d model evaluations", watch.skipped_evaluations, watch.evaluations)
            records = [self.describe(request, run.image_names, i, watch) for i in range(len(request.samples))]
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

    def _keep(self, run: StoppedRun, watch: Stopwatch, save_path: str | Path | None) -> None:
        """Keep a run that was interrupted between two steps, and raise Stopped; come back where there is no room."""
        run.evaluations, run.seconds, run.adapters = watch.evaluations, watch.seconds, self.active_adapters()
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

    def _devices(self) -> list[torch.device]:
        return list(dict.fromkeys(self.placement.device(name) for name in ("text_embedder", "dit", "vae")))

    def _previews(self, request: Request, save_path: str | Path | None) -> Previews | None:
        every = self.config.runtime.preview
        if every is None or self.latent_rgb is None or save_path is None:
            return None
        return Previews(every, self.latent_rgb, media.output_paths(save_path, len(request.samples)))

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

    # --- LoRA adapters ------------------------------------------------------------------------------------------------

    @one_at_a_time
    def load_adapter(
        self,
        adapter_config: AdapterConfig,
        adapter_path: str | Path,
        adapter_name: str = "default",
        trigger: str | None = None,
    ) -> None:
        """Load a LoRA adapter and make it the only active one; one of the same name is replaced.

        Args:
            adapter_config: a JSON file, its content as a dict, or peft's LoraConfig; None: what lies beside the file,
                or is in it (see kandinsky/checkpoints/lora_file.py).
            adapter_path: a safetensors file in the layout of the official adapters, of peft, diffusers or ComfyUI, or
                a folder with one.
            adapter_name: what `set_adapter` calls it.
            trigger: put before every prompt while the adapter is active, as it is: end it with a space or a comma.
                None: what the file says, which may be nothing. Prompts that come as `prompt_embeds` get none.

        Raises:
            ValueError: the file does not fit the model in all its parts. Nothing has changed then.
        """
        self._adapters().load(adapter_config, adapter_path, adapter_name, trigger)

    @one_at_a_time
    def set_adapter(self, adapter_name: str | Sequence[str], scale: float | Sequence[float] = 1.0) -> None:
        """Have exactly these of the loaded adapters active, with one scale for all or one each; 1 is as trained.

        Raises ValueError for names that are not loaded, and for scales that are not finite or not as many as names.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        scales = list(scale) if isinstance(scale, Sequence) else [scale] * len(names)
        if len(scales) != len(names) or len(set(names)) != len(names):
            raise ValueError(f"{len(scales)} scales for the adapters {names}: name each once, with one scale each")
        self._adapters().activate(dict(zip(names, scales, strict=True)))

    @one_at_a_time
    def disable_adapters(self) -> None:
        """Have none active: the weights are again those of the checkpoint, bit for bit. `set_adapter` brings back."""
        self._adapters().activate({})

    def active_adapters(self) -> list[dict[str, Any]]:
        """Name, path, scale and trigger of each."""
        return [] if self.adapters is None else [dict(one) for one in self.adapters.active]

    def _adapters(self) -> Adapters:
        if self.adapters is None:
            raise ValueError(
                "this pipeline takes no adapters: make one with kandinsky.get_T2V_pipeline or its siblings, "
                "and without shard_weights"
            )
        return self.adapters

    def _triggers(self) -> str:
        """What the active adapters want before every prompt."""
        return "".join(one["trigger"] for one in self.active_adapters())

    @property
    def dtype_name(self) -> str:
        """Of the DiT. Not that of any parameter: time embedding and modulations keep what their file has."""
        return str(self.dit.visual_embeddings.in_layer.weight.dtype).removeprefix("torch.")

    @property
    def uses_nabla(self) -> bool:
        """Whether visual self-attention is block-sparse."""
        return self.config.model.attention.type == "nabla"

    # --- checks, before anything is encoded ---------------------------------------------------------------------------

    def check_inputs(
        self, request: Request, inputs: Inputs, save_path: str | Path | None = None, output_type: str = "uint8"
    ) -> None:
        """Raise ValueError for tensors, generators and output settings that don't go with the request."""
        samples = len(request.samples)
        check_save_path(save_path)
        if request.expand_prompts and self.expander is None and self.team.is_first:
            raise ValueError("expand_prompts is on, but this checkpoint's Qwen can read and not write: leave it out")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type is {output_type!r}; choose one of {', '.join(OUTPUT_TYPES)}")
        for generator in inputs.generators:
            if not isinstance(generator, torch.Generator):
                raise ValueError(f"generator is {generator!r}; it must be a torch.Generator or a list of them")
        if len(inputs.generators) not in (0, 1, samples):
            raise ValueError(f"{len(inputs.generators)} generators for {samples} outputs: give one, or one for each")
        if inputs.latents is not None:
            channels = self.config.model.dit_params.in_visual_dim
            check_latents(inputs.latents, (samples, *request.latent_size, channels))
        if inputs.negative_prompt_embeds is not None:
            rows = self._checked_embeds("negative_prompt_embeds", inputs.negative_prompt_embeds)
            if rows not in (1, request.num_prompts):
                raise ValueError(f"negative_prompt_embeds are of {rows} prompts, not of 1 or {request.num_prompts}")
        if save_path is not None:
            if output_type == "latent":
                raise ValueError("output_type='latent' makes no picture that save_path could be written to")
            suffix = media.IMAGE_SUFFIX if request.is_image else media.VIDEO_SUFFIX
            for path in media.output_paths(save_path, samples):
                media.check_writable(path, suffix)

    def _checked_embeds(self, name: str, embeds: object) -> int:
        """How many prompts `embeds` are of. Raises ValueError where they are not this model's."""
        if not isinstance(embeds, TextEmbeddings):
            raise ValueError(f"{name} is a {type(embeds).__name__}; give what pipe.encode_prompt(...) returns")
        dit = self.config.model.dit_params
        widths = embeds.text_embeds.shape[-1], embeds.pooled_embeds.shape[-1]
        if widths != (dit.in_text_dim, dit.in_text_dim2):
            raise ValueError(
                f"{name} are {widths[0]} and {widths[1]} wide; this model takes {dit.in_text_dim} and "
                f"{dit.in_text_dim2}: encode the prompt with this pipeline's encode_prompt"
            )
        require_finite_input(name, embeds.text_embeds, embeds.pooled_embeds)
        return len(embeds.text_embeds)

    # --- encode -------------------------------------------------------------------------------------------------------

    @one_at_a_time
    @torch.no_grad()
    def encode_prompt(
        self,
        text: str | Sequence[str],
        image: ImageSource | Sequence[ImageSource] | None = None,
        *,
        content: str | None = None,
        max_sequence_length: int | None = None,
    ) -> TextEmbeddings:
        """Embeddings of one prompt or several, for `prompt_embeds` or `negative_prompt_embeds`, to be kept and reused.

        Image-to-image models also read the picture that is edited, at the size it will be edited in. `content` is
        "video" or "image"; None means what this model makes.
        """
        texts = [text] if isinstance(text, str) else list(text)
        images: list[Image.Image] | None = None
        if self.config.task == "i2i":
            if image is None:
                raise ValueError("an image-to-image model reads the picture together with the prompt: give image=")
            images = [media.load_image(one) for one in as_images(image)]
            if len(images) not in (1, len(texts)):
                raise ValueError(f"{len(images)} pictures for {len(texts)} prompts: give one for all, or one for each")
            for picture in images:
                check_picture(picture.size)
            images = [media.fit_image(picture, *size_for_image(picture.size, self.config)) for picture in images]
        elif image is not None:
            raise ValueError(f"a model for {self.config.task} reads no picture together with the prompt: leave it out")
        content = content or self._content(self.config.task != "t2v")
        return TextEmbeddings.join(self._embed(texts, images, content, max_sequence_length))

    def _content(self, is_image: bool) -> str:
        """Which prompt template the model was trained with."""
        task = self.config.task
        return "image_edit" if task == "i2i" else "image" if is_image and task != "i2v" else "video"

    def _embed(
        self, texts: Sequence[str], images: Sequence[Image.Image] | None, content: str, max_length: int | None
    ) -> list[TextEmbeddings]:
        """The embeddings of each prompt, encoded by itself."""
        check_prompts(texts)
        pictures = [None] * len(texts) if images is None else [[media.halve_image(image)] for image in images]
        with self.placement.use("text_embedder"):
            return [
                self.text_embedder.encode([text], content=content, images=picture, max_length=max_length)
                for text, picture in zip(texts, one_each(pictures, len(texts)), strict=True)
            ]

    def expand_prompts(self, request: Request, images: Sequence[Image.Image]) -> Request:
        """The request with each prompt written out, with the seed of its first sample; or as it is, where that isn't
        wanted or can't be done, where there are no words, or where it was done before."""
        first = request.samples[0]
        if self.expander is None or request.expand_prompts is False or first.text is None or first.expanded is not None:
            return request
        task = "t2i" if request.is_image and self.config.task == "t2v" else self.config.task
        pictures: list[Image.Image | None] = [None] * request.num_prompts
        if images:
            shown = [media.halve_image(image) for image in images] if task == "i2i" else images
            pictures = [*one_each(shown, request.num_prompts)]
        firsts = [next(s for s in request.samples if s.prompt == i) for i in range(request.num_prompts)]
        with self.placement.use("text_embedder"):
            captions = self.expander.expand(
                [s.text or "" for s in firsts], task, pictures, [s.seed or 0 for s in firsts]
            )
        for caption in captions:
            logger.info("expanded prompt: %s", caption)
        samples = tuple(replace(sample, expanded=captions[sample.prompt]) for sample in request.samples)
        return replace(request, samples=samples)

    def encode_prompts(
        self, request: Request, inputs: Inputs, images: Sequence[Image.Image]
    ) -> dict[Branch, list[TextEmbeddings]]:
        """For each branch of guidance the embeddings of each sample. No prompt is encoded twice."""
        first_samples = [next(s for s in request.samples if s.prompt == i) for i in range(request.num_prompts)]
        triggers = self._triggers()
        if triggers:
            logger.info("prompts begin with %r, for the adapters", triggers)
        given: dict[Branch, TextEmbeddings | None] = {"cond": inputs.prompt_embeds}
        prompts = [sample.expanded or sample.text for sample in first_samples]
        words: dict[Branch, list[str | None]] = {"cond": [prompt and triggers + prompt for prompt in prompts]}
        if uses_guidance(request.guidance_weight):
            given["uncond"] = inputs.negative_prompt_embeds
            words["uncond"] = [sample.negative_caption for sample in first_samples]

        pictures = one_each(images, request.num_prompts)
        is_edit = self.config.task == "i2i"
        # What has to be encoded, each once: one negative prompt is usually shared by all.
        keys = {branch: [(text, i if is_edit else 0) for i, text in enumerate(words[branch])] for branch in words}
        todo = list(dict.fromkeys(key for branch in keys if given[branch] is None for key in keys[branch]))
        encoded: dict[tuple[str | None, int], TextEmbeddings] = {}
        if todo:
            embeddings = self._embed(
                [text for text, _ in todo if text is not None],
                [pictures[i] for _, i in todo] if is_edit else None,
                self._content(request.is_image),
                request.max_sequence_length,
            )
            encoded = dict(zip(todo, embeddings, strict=True))

        device = self.placement.device("dit")
        branches: dict[Branch, list[TextEmbeddings]] = {}
        for branch, embeds in given.items():
            found = [encoded[key] for key in keys[branch]] if embeds is None else embeds.unbind()
            by_prompt = [text.to(device) for text in one_each(found, request.num_prompts)]
            branches[branch] = [by_prompt[sample.prompt] for sample in request.samples]
        return branches

    # --- denoise ------------------------------------------------------------------------------------------------------

    def condition(self, request: Request, inputs: Inputs, images: Sequence[Image.Image]) -> Conditioning:
        """What this task's sampling starts from and is conditioned on, besides text.

        A sample draws its noise first and the picture's latents after it, from the same generator.
        """
        if inputs.conditioning is not None:
            return inputs.conditioning
        generation = self.config.generation
        generators = inputs.generators or [
            torch.Generator(generation.noise_device).manual_seed(sample.seed)
            for sample in request.samples
            if sample.seed is not None
        ]
        shape = (*request.latent_size, self.config.model.dit_params.in_visual_dim)
        posteriors = one_each(self.encode_images(images), request.num_prompts)
        noise, image_latents = [], []
        for i, sample in enumerate(request.samples):
            generator = generators[i % len(generators)]
            if inputs.latents is None:
                noise.append(draw_noise(generator, shape, getattr(torch, generation.noise_dtype)))
            else:
                noise.append(inputs.latents[i].float())
            if posteriors:
                latents = posteriors[sample.prompt].sample(generator).float() * self.vae.scaling_factor
                image_latents.append(latents.view(latents.shape[1], *latents.shape[-2:]).permute(1, 2, 0))  # (H, W, C)
        device = self.placement.device("dit")
        start = self.team.agree(torch.stack([one.to(device) for one in noise]))
        if not image_latents:
            return from_text(start, self.dit.in_channels)
        pictures = self.team.agree(torch.stack([one.to(device) for one in image_latents]))
        if self.config.task == "i2v":
            return from_first_frame(start, pictures, generation.visual_cond)
        return from_source(start, pictures)

    def denoise(
        self,
        run: StoppedRun,
        progress: bool = True,
        callback: StepCallback | None = None,
        watch: Stopwatch | None = None,
        previews: Previews | None = None,
    ) -> Tensor:
        """Latents (samples, T, H, W, C), scaled, float32, from where `run` is.

        Keeps `run` up to date: an end before the last step can be gone on from. The evaluations that it took are
        written into `watch`.
        """
        request, conditioning, branches, state = run.request, run.conditioning, run.branches, run.state
        device = self.placement.device("dit")
        sigmas = flow_timesteps(request.num_steps, request.scheduler_scale, request.schedule)
        attention = self.config.model.attention
        nabla = NablaConfig(attention.P, attention.wT, attention.wH, attention.wW) if self.uses_nabla else None
        scale_factor = self.config.metrics.scale_factor

        # Everything that depends on the request's sizes alone, once and not at every step.
        shared = self.dit.request_tables(request.latent_size, 1, scale_factor, device, nabla)

        @cache
        def tables(text_length: int) -> RequestTables:
            return replace(shared, text_rope=text_rotary_table(text_length, self.dit.head_dim, device))

        interval, every = request.guidance_interval, request.guidance_every
        guidance = guidance_plan(request.num_steps, request.guidance_weight, interval, every)
        block_cache = None if self.make_cache is None else self.make_cache([step == "new" for step in guidance])
        if block_cache is not None and state.step > 0:
            done: dict[Branch, int] = {"cond": state.step, "uncond": guidance[: state.step].count("new")}
            residuals = {name: residual.to(device) for name, residual in run.residuals.items()}
            block_cache.restore(residuals, done, len(request.samples))
        skipped_before = 0 if block_cache is None else block_cache.skipped
        record = watch or Stopwatch()

        def evaluate(latents: Tensor, timestep: Tensor, branch: Branch) -> Tensor:
            velocities = []
            samples = conditioning.model_input(latents).split(1)
            for i, (sample, text) in enumerate(zip(samples, branches[branch], strict=True)):
                execution = self.execution
                if block_cache is not None:
                    execution = execution.within(partial(block_cache.run_blocks, branch, i))
                velocity = self.dit(
                    sample,
                    text.text_embeds,
                    text.pooled_embeds,
                    timestep.expand(1),
                    text_mask=text.text_mask,
                    tables=tables(text.text_embeds.shape[1]),
                    execution=execution,
                )
                velocities.append(velocity)
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
                yield step

        def on_step_end(step: int, latents: Tensor) -> Tensor:
            latents = conditioning.hold(latents)
            if previews is not None:
                sigma, next_sigma = float(sigmas[step]), float(sigmas[step + 1])
                # As far along the step's straight line as it takes to get to sigma 0.
                clean = torch.lerp(state.latents, latents, sigma / (sigma - next_sigma))
                previews(step, request.num_steps, conditioning.hold(clean))
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
            return conditioning.hold(tensors["latents"])

        with self.placement.use("dit"):
            latents = euler_sample(
                velocity,
                state.latents,
                sigmas,
                request.guidance_weight,
                until_interrupted,
                on_step_end,
                guidance_interval=interval,
                guidance_every=every,
                state=state,
            )
        require_finite_latents(latents, self.dtype_name, self.active_adapters(), callback is not None)
        if block_cache is not None:
            if state.step < request.num_steps:
                run.residuals = self.team.from_branches(block_cache.saved())
            skipped = skipped_before + self.team.over_branches(block_cache.skipped - skipped_before)
            record.skipped_evaluations = skipped // len(request.samples)  # the same for all of them
        generation = self.config.generation
        if conditioning.first_frame is not None and generation.first_frame_normalization:
            return normalize_first_frames(latents, generation.first_frame_statistics)
        return latents

    # --- pixels <-> latents -------------------------------------------------------------------------------------------

    def encode_images(self, images: Sequence[Image.Image]) -> list[Any]:
        """The VAE's distribution over the latents of each RGB picture, (1, C, H, W) or (1, C, 1, H, W)."""
        if not images:
            return []
        posteriors = []
        with self.placement.use("vae"):
            weight = next(self.vae.parameters())
            for image in images:
                pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]  # (1, 3, H, W)
                x = (pixels.to(weight.device).float() / 127.5 - 1).to(weight.dtype)
                if isinstance(self.vae, AutoencoderKL):
                    posteriors.append(self.vae.encode(x))
                else:
                    posteriors.append(self.vae.encode(x[:, :, None]))
                require_finite("the VAE's encoder", posteriors[-1].mean, self.vae.named_parameters)
        return posteriors

    def decode(self, latents: Tensor, finish: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """(B, T, H, W, C) scaled latents -> pixels (B, 3, frames, height, width) on the CPU, uint8 or as `finish`es.

        In tiles of the size that the config gives or its memory budget allows, the smaller of the two. Where memory
        runs out all the same, in smaller ones: that changes pixels a little, and the log says so. Raises
        OutOfMemoryError where the smallest are too large as well. Several processes go on with smaller ones together,
        whichever of them ran out of memory.
        """
        config, device = self.config.model.vae, self.placement.device("vae")
        videos: list[Tensor] = []
        with self.placement.use("vae"):
            dtype = next(self.vae.parameters()).dtype
            decoding = self._decoding(latents, dtype)
            tile = config.spatial_tile
            if config.memory_budget_gb is not None:
                tile = decoding.tile_within(config.memory_budget_gb * GB, tile)
            for sample in latents.split(1):
                z = sample.permute(0, 4, 1, 2, 3).to(device=device, dtype=torch.float32)  # (1, C, T, H, W)
                z = (z / self.vae.scaling_factor).to(dtype)
                while True:
                    pixels, failure = self._try_to_decode(z, tile, finish or to_uint8)
                    if pixels is not None:
                        videos.append(pixels)
                        break
                    tile = next_tile(decoding, tile, failure)
                    torch.cuda.empty_cache()
        return torch.cat(videos)

    def _try_to_decode(self, z: Tensor, tile: int, finish: Callable[[Tensor], Tensor]) -> tuple[Tensor | None, str]:
        """Finished pixels, or None and why memory ran out in any process. The error itself, which would hold what the
        attempt had made, is gone then."""
        pixels, failure = None, None
        try:
            pixels = self._decode_tiles(z, tile, finish)
        except torch.OutOfMemoryError as error:
            failure = error.with_traceback(None)
        failure = self.team.out_of_memory(failure)
        return (pixels, "") if failure is None else (None, str(failure))

    def _decoding(self, latents: Tensor, dtype: torch.dtype) -> Decoding:
        """What decoding `latents` comes to, for the choice of tiles."""
        vae, (frames, rows, columns) = self.config.model.vae, latents.shape[1:4]
        ratio = self.vae.spatial_compression_ratio
        size = columns * ratio, rows * ratio, FRAMES_PER_LATENT * (frames - 1) + 1
        of_vae = (self.vae.block_out_channels, dtype.itemsize)
        return Decoding(vae.name, *of_vae, *size, vae.spatial_overlap, self.vae.float32_convolutions)

    def _decode_tiles(self, z: Tensor, tile: int, finish: Callable[[Tensor], Tensor]) -> Tensor:
        """Unscaled latents (1, C, T, H, W) -> finished pixels (1, 3, frames, height, width) on the CPU."""
        tiling = VAETiling(size=tile, overlap=min(self.config.model.vae.spatial_overlap, tile // 2))
        if isinstance(self.vae, AutoencoderKL):
            pixels = self.vae.decode(z[:, :, 0], tiling, self.team.map_tiles)[:, :, None]
        else:
            pixels = self.vae.decode(z, tiling, self.team.map_tiles)
        require_finite("the VAE's decoder", pixels, self.vae.named_parameters)
        # A few frames at a time: all of them in float32 would be as much memory as the video once or twice more.
        return torch.cat([finish(frames).cpu() for frames in pixels.split(FINISHED_AT_ONCE, dim=2)], dim=2)

    def decode_and_write(
        self,
        latents: Tensor,
        finish: Callable[[Tensor], Tensor],
        records: Sequence[dict[str, Any]],
        path: str | Path | None,
        watch: Stopwatch,
    ) -> Tensor:
        """`decode`, and where there is a path `write`."""
        with watch.stage("decode"):
            pixels = self.decode(latents, finish)
        logger.info("seconds: %s", ", ".join(f"{name} {seconds:.1f}" for name, seconds in watch.seconds.items()))
        if path is not None:
            self.write(pixels, records, Path(path), watch)
        return pixels

    # --- write --------------------------------------------------------------------------------------------------------

    def write(self, pixels: Tensor, records: Sequence[dict[str, Any]], path: Path, watch: Stopwatch) -> list[Path]:
        """The videos or pictures, each with its record as JSON beside it; returns their paths.

        Where a record can't be written its output is all the same; the WriteError comes after it.
        """
        if pixels.is_floating_point():
            pixels = (pixels * 255).round().to(torch.uint8)
        paths = media.output_paths(path, len(pixels))
        for output, record, target in zip(pixels, records, paths, strict=True):
            failures: list[OSError] = []

            def write_record(target: Path = target, facts: dict[str, Any] = record) -> None:
                try:
                    media.write_sidecar(target, {**facts, "seconds": watch.so_far()})
                except OSError as error:
                    failures.append(error)  # noqa: B023  (it is called below)

            with watch.stage("write"):
                if record["num_frames"] == 1:
                    media.write_image(output[:, 0], target, write_record)
                else:
                    media.write_video(output, target, FPS, write_record)
            media.remove_preview(target)
            if failures:
                raise failures[0]
            logger.info("wrote %s", target)
        return paths

    def describe(self, request: Request, image_names: Sequence[str], index: int, watch: Stopwatch) -> dict[str, Any]:
        """What is needed to make an output again, and how long it took. Names are the command line's."""
        engine = self.execution.block_sparse if self.uses_nabla else self.execution.attention
        settings = dict(vars(request))
        sample = settings.pop("samples")[index]
        names = one_each(image_names, request.num_prompts)
        return {
            "task": self.config.task,
            "prompt": sample.text,
            "expanded_prompt": sample.expanded,
            "negative_prompt": sample.negative_caption,
            "image": names[sample.prompt] if names else None,
            "seed": sample.seed,
            **settings,
            "fps": FPS,
            "attention_engine": getattr(engine, "__name__", str(engine)),
            "devices": {name: str(self.placement.device(name)) for name in ("text_embedder", "dit", "vae")},
            "processes": self.team.size,
            "dtype": self.dtype_name,
            "adapters": self.active_adapters(),
            "config": config_to_dict(self.config),
            "versions": media.versions(),
            "evaluations": {"all": watch.evaluations, "skipped": watch.skipped_evaluations},  # of this output
            "seconds": dict(watch.seconds),
        }


def next_tile(decoding: Decoding, tile: int, error: str) -> int:
    """The size of tiles to go on with where `tile` took too much memory; says so. Raises where there is none left."""
    smaller = decoding.smaller_tile(tile)
    if smaller is None:
        raise torch.OutOfMemoryError(
            f"decoding runs out of memory even in tiles of {tile} pixels: set runtime.offload=on where it is not, or "
            f"ask for something smaller or shorter ({error})"
        )
    logger.warning(
        "decoding ran out of memory in tiles of %d pixels and starts again with %d; model.vae.spatial_tile=%d does so "
        "at once, with the same result",
        *(tile, smaller, smaller),
    )
    return smaller


def as_images(image: ImageSource | Sequence[ImageSource] | None) -> list[ImageSource]:
    """None, one picture or several, as a list."""
    if image is None:
        return []
    return list(image) if isinstance(image, list | tuple) else [image]  # type: ignore[list-item]


def one_each(values: Sequence[Value], count: int) -> list[Value]:
    """A value for each of `count` prompts, where one may stand for all."""
    return list(values) * count if len(values) == 1 else list(values)


def name_of(image: ImageSource) -> str:
    """What the record says about a picture: its path, or that it came without one."""
    return str(image) if isinstance(image, str | Path) else "given without a file name"


def to_uint8(pixels: Tensor) -> Tensor:
    """[-1, 1] to 0..255, rounded in float32 (truncating would darken by 0.4 levels). May overwrite its input."""
    return pixels.float().clamp_(-1, 1).add_(1).mul_(127.5).round_().to(torch.uint8)


def to_unit(pixels: Tensor) -> Tensor:
    """[-1, 1] to [0, 1], float32."""
    return pixels.float().clamp(-1, 1).add_(1).mul_(0.5)


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
