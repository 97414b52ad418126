"""How fast a run and its parts are beside diffusers, eager and compiled, with the same weights in one process.

    python benchmarks/speed.py [--device cpu|cuda] [--part forward vae text generation] [--json FILE]

    forward      one evaluation of the DiT                  vae    decoding latents with the video VAE
    text         one prompt through Qwen2.5-VL and CLIP     generation   a whole run of every config in --configs

On a CPU sizes are small and `generation` and `text` are the tiny checkpoints'; on a GPU they are the published ones,
with random weights and embeddings (`text` needs the published encoders in --weights), of every config that fits by
the plan. Ours is compiled as `--compile on` does it, diffusers' DiT by its own `compile_repeated_blocks`; "ours
elementwise" is `--compile elementwise`. The VAE and the text encoders are compiled in neither. diffusers has NABLA only
compiled, and on a GPU (see NO_NABLA).

Times are medians of calls in which the implementations take turns, without autograd, after a call that isn't counted;
processor time where there is one thread on a CPU, so that other programs disturb less. The floor is the time that the
published computation's matrix products would take at the rate of one large product, measured in the same process;
NABLA's are those of the blocks that it keeps in a run of a few steps. "Difference" is that of the results, above all of
diffusers' rounding of rotated queries and keys. Peak memory is what a call needs beyond what is there before it, on a
CPU in a process of its own. First calls are wall times in new processes, with nothing compiled on disk ("cold") and
with it ("warm"). diffusers runs as it ships.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL as TheirImageVAE
from diffusers import AutoencoderKLHunyuanVideo as TheirVAE
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Kandinsky5I2IPipeline,
    Kandinsky5I2VPipeline,
    Kandinsky5T2IPipeline,
    Kandinsky5T2VPipeline,
)
from diffusers import Kandinsky5Transformer3DModel as TheirDiT
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from torch import nn
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone, installed or not

from benchmarks._flops import counted_flops, dit_flops
from benchmarks.attention import matmul_flops, median_seconds
from benchmarks.compare import processor_name, randomise, resident, wait_for
from kandinsky.attention.block_sparse import BlockSparseAttention, resolve_block_sparse
from kandinsky.attention.engines import resolve_engine
from kandinsky.checkpoints.dit_layout import KEEP_PRECISION
from kandinsky.config.reading import load_config, with_settings
from kandinsky.config.schema import AttentionConfig, Config, DiTConfig
from kandinsky.loading.assemble import PIPELINES
from kandinsky.loading.devices import machine_memory
from kandinsky.loading.dit import load_dit
from kandinsky.loading.text import load_text_encoders
from kandinsky.loading.text_files import load_image_processor
from kandinsky.loading.vae import load_vae
from kandinsky.models.dit import DiffusionTransformer3D, Execution
from kandinsky.models.vae_flux import AutoencoderKL
from kandinsky.models.vae_hunyuan import AutoencoderKLHunyuanVideo
from kandinsky.planning.machine import Machine
from kandinsky.planning.plan import default_request, make_plan
from kandinsky.runtime.compile import CACHE_VARIABLE, with_compiled_blocks, with_compiled_elementwise
from kandinsky.runtime.placement import FixedPlacement
from kandinsky.text.embeddings import TextEmbeddings
from kandinsky.text.prompts import IMAGE_TOKEN, get_template, render

ROOT = Path(__file__).resolve().parents[1]
EAGER = ("ours", "diffusers")
COMPILED = ("ours compiled", "diffusers compiled")
ELEMENTWISE = "ours elementwise"  # compiled is only what lies between products: --compile elementwise
PARTS = {"forward": (*EAGER, ELEMENTWISE, *COMPILED), "vae": EAGER, "text": EAGER, "generation": EAGER + COMPILED}
REPEATS = {"forward": 7, "vae": 3, "text": 15, "generation": 3}
PROMPT = "a red circle moves left on a white background"
CONFIGS = ROOT / "configs"
TINY, PUBLISHED = CONFIGS / "config_tiny_t2v.yaml", CONFIGS / "config_5s_sft.yaml"
TINY_CONFIGS = [CONFIGS / f"config_tiny_{name}.yaml" for name in ("t2v", "i2v", "t2i", "i2i", "t2v_10s")]
SAME_AS_I2V = CONFIGS / "config_tiny_flf.yaml"  # in all that takes time
THEIR_PIPELINES: dict[str, Any] = {
    "t2v": Kandinsky5T2VPipeline,
    "i2v": Kandinsky5I2VPipeline,
    "t2i": Kandinsky5T2IPipeline,
    "i2i": Kandinsky5I2IPipeline,
}
NO_NABLA = {  # why diffusers has no row for it, by device; tests/parity/test_nabla_diffusers.py shows both
    "cpu": {
        "diffusers": "NABLA is computed only where flex_attention is compiled; not compiled it is dense without a word",
        "diffusers compiled": "the compiler takes no block map such as theirs on a CPU",
    },
    "cuda": {"diffusers": "NABLA is computed only where flex_attention is compiled"},
}
DENSITY_STEPS = 4  # of a run that is there to see how many blocks NABLA keeps
SMALL_DIT = DiTConfig(model_dim=512, ff_dim=2048, num_text_blocks=1, num_visual_blocks=4, in_text_dim=256)


@dataclass(frozen=True)
class Part:
    title: str
    runs: dict[str, Callable[[], object]]
    flops: int  # of the published computation; 0: not counted
    missing: dict[str, str] = field(default_factory=dict)  # implementations that have no run, and why


class OurSchedule(FlowMatchEulerDiscreteScheduler):
    """Their scheduler with the published models' points, so that both take the same steps."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None, **_: Any) -> None:
        super().set_timesteps(sigmas=torch.linspace(1, 0, num_inference_steps + 1)[:-1].tolist(), device=device)


def build_dits(
    params: DiTConfig,
    names: tuple[str, ...],
    device: torch.device,
    dtype: torch.dtype,
    weights: nn.Module | None = None,
    attention: AttentionConfig | None = None,
) -> dict[str, nn.Module]:
    """The DiT in each implementation, with the weights of `weights` or random ones, the same tensors in all of them."""
    is_nabla = attention is not None and attention.type == "nabla"
    arguments = {name: value for name, value in asdict(params).items() if name != "instruct_type"}
    arguments["visual_cond"] |= params.instruct_type == "channel"
    if attention is not None and is_nabla:
        theirs_have = ("type", "P", "wT", "wH", "wW", "add_sta", "method")
        arguments |= {f"attention_{name}": getattr(attention, name) for name in theirs_have}
    with device if weights is None else torch.device("cpu"):
        theirs = TheirDiT(**arguments)
    if weights is None:
        randomise(theirs)
    else:
        theirs.load_state_dict(weights.state_dict())
    for name, parameter in theirs.named_parameters():  # what from_pretrained and our loading keep in float32
        parameter.data = parameter.to(device, torch.float32 if any(key in name for key in KEEP_PRECISION) else dtype)
    theirs.to(device).eval().requires_grad_(False)
    dits: dict[str, nn.Module] = {}
    for name in names:
        if name.startswith("ours"):
            with torch.device("meta"):
                dits[name] = ours = DiffusionTransformer3D(**asdict(params))
            ours.load_state_dict(theirs.state_dict(), assign=True)
            ours.eval().requires_grad_(False)
        elif name == "diffusers compiled":
            dits[name] = compiled = copy.deepcopy(theirs, {id(tensor): tensor for tensor in theirs.parameters()})
            if is_nabla:
                compiled.set_attention_backend("flex")
            compiled.compile_repeated_blocks(fullgraph=True)
        else:
            dits[name] = theirs
    return dits


def our_execution(
    name: str, head_dim: int, device: torch.device, dtype: torch.dtype, is_nabla: bool = False
) -> Execution:
    """How our DiT is run in the implementation of this name."""
    execution = Execution()
    if is_nabla:
        execution = replace(execution, block_sparse=resolve_block_sparse("auto", device, dtype, head_dim))
    else:
        execution = replace(execution, attention=resolve_engine("auto", device, dtype, head_dim))
    if name == ELEMENTWISE:
        return with_compiled_elementwise(execution)
    return with_compiled_blocks(execution) if name == "ours compiled" else execution


def forward_part(names: tuple[str, ...], device: torch.device, dtype: torch.dtype) -> Part:
    small = device.type == "cpu"
    params = replace(SMALL_DIT, visual_cond=True) if small else load_config(PUBLISHED).model.dit_params
    size, text_tokens = ((8, 32, 32), 64) if small else ((31, 64, 96), 128)  # 5 s of 768x512
    dits = build_dits(params, names, device, dtype)
    frames, height, width = size
    latents = torch.randn(1, *size, 33).to(device, dtype)
    text = torch.randn(1, text_tokens, params.in_text_dim).to(device, dtype)
    pooled = torch.randn(1, params.in_text_dim2).to(device, dtype)
    timesteps, scale = torch.tensor([723.4567], device=device), (1.0, 2.0, 2.0)
    positions = [torch.arange(n, device=device) for n in (frames, height // 2, width // 2)]
    text_positions = torch.arange(text_tokens, device=device)

    def run(name: str) -> Callable[[], object]:
        dit = dits[name]
        if name.startswith("ours"):
            tables = dit.request_tables(size, text_tokens, scale, device)
            execution = our_execution(name, params.head_dim, device, dtype)
            return lambda: dit(latents, text, pooled, timesteps, scale, tables=tables, execution=execution)
        return lambda: dit(
            hidden_states=latents,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=timesteps,
            visual_rope_pos=positions,
            text_rope_pos=text_positions,
            scale_factor=scale,
            return_dict=False,
        )

    tokens = frames * height * width // 4
    title = f"DiT forward: dim {params.model_dim}, {params.num_visual_blocks} blocks, {tokens:,} tokens"
    return Part(title, {name: run(name) for name in names}, dit_flops(params, size, text_tokens))


def vae_part(names: tuple[str, ...], device: torch.device, dtype: torch.dtype) -> Part:
    """One window of 17 frames, untiled."""
    small = device.type == "cpu"
    channels, (height, width) = ((64, 128, 256, 256), (12, 12)) if small else ((128, 256, 512, 512), (64, 96))
    theirs = TheirVAE(block_out_channels=channels).eval().requires_grad_(False)
    randomise(theirs)
    ours = AutoencoderKLHunyuanVideo(block_out_channels=channels)
    ours.load_state_dict(theirs.state_dict())
    ours.to(device, dtype).eval().requires_grad_(False)
    theirs.to(device, dtype)
    ours.convolve_by_frame(small)
    ours.to(memory_format=torch.channels_last_3d)  # as it is loaded
    theirs.use_framewise_decoding = False
    latents = torch.randn(1, 16, 5, height, width).to(device, dtype)
    runs: dict[str, Callable[[], object]] = {
        "ours": lambda: ours.decode(latents),
        "diffusers": lambda: theirs.decode(latents, return_dict=False)[0],
    }
    title = f"VAE decode: 17 frames {8 * width}x{8 * height}, channels {'-'.join(map(str, channels))}"
    return Part(title, {name: runs[name] for name in names}, counted_flops(runs["diffusers"]))


def load_their_encoders(config: Config, folders: tuple[Path, Path], device: torch.device, dtype: torch.dtype) -> Any:
    """A diffusers pipeline of which only the text encoders and their tokenizers are there."""
    from transformers import AutoTokenizer, CLIPTextModel, Qwen2_5_VLForConditionalGeneration

    qwen, clip = folders
    tokenizer = AutoTokenizer.from_pretrained(qwen)
    image_processor = load_image_processor(qwen) if config.task == "i2i" else None

    class Processor:  # theirs needs torchvision
        decode = tokenizer.decode

        def __call__(self, text: list[str], images: Any = None, videos: None = None, **arguments: Any) -> Any:
            if not image_processor or not images:
                return tokenizer(text, **arguments)
            pixels = image_processor(images=images, return_tensors="pt")
            count = int(pixels["image_grid_thw"].prod()) // image_processor.merge_size**2
            tokens = tokenizer([prompt.replace(IMAGE_TOKEN, IMAGE_TOKEN * count) for prompt in text], **arguments)
            is_image = tokens["input_ids"] == tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
            tokens.update({**pixels, "mm_token_type_ids": is_image.int()})
            return tokens

    limits = config.model.text_embedder
    clip_tokenizer = AutoTokenizer.from_pretrained(clip)
    theirs: Any = THEIR_PIPELINES[config.task](
        transformer=None,
        vae=None,
        text_encoder=Qwen2_5_VLForConditionalGeneration.from_pretrained(qwen, dtype=dtype).to(device),
        tokenizer=Processor(),
        text_encoder_2=CLIPTextModel.from_pretrained(clip, dtype=torch.float32).to(device),
        tokenizer_2=lambda prompt, **arguments: clip_tokenizer(
            prompt, **{**arguments, "max_length": limits.clip.max_length}
        ),
        scheduler=OurSchedule(shift=config.metrics.scheduler_scale),
    )
    # They spell the published ones differently.
    template = get_template({"t2i": "image", "i2i": "image_edit"}.get(config.task, "video"))
    theirs.prompt_template = render(template, "{}", [1] if image_processor else [])
    theirs.prompt_template_encode_start_idx = limits.qwen.crop or template.crop
    return theirs


def encoder_folders(config: Config, weights: Path) -> tuple[Path, Path]:
    encoders = config.model.text_embedder
    paths = (Path(part.checkpoint_path.replace("./weights", str(weights))) for part in (encoders.qwen, encoders.clip))
    qwen, clip = (ROOT / path for path in paths)
    return qwen, clip


def text_part(names: tuple[str, ...], device: torch.device, dtype: torch.dtype, weights: Path) -> Part:
    config = load_config(TINY if device.type == "cpu" else PUBLISHED)
    folders = encoder_folders(config, weights)
    ours = load_text_encoders(config, *folders, device, dtype)
    theirs = load_their_encoders(config, folders, device, dtype)
    runs: dict[str, Callable[[], object]] = {
        "ours": lambda: ours.encode([PROMPT]).text_embeds,
        "diffusers": lambda: theirs.encode_prompt(PROMPT, device=device)[0],
    }
    title = f"text encoding: one prompt, {'tiny' if device.type == 'cpu' else 'published'} Qwen2.5-VL and CLIP"
    return Part(title, {name: runs[name] for name in names}, 0)


def generation_configs(device: str, machine: Machine | None = None) -> tuple[list[Path], dict[str, str]]:
    """The configs that are measured if none are named, and why others are not.

    On a GPU it is the published ones that fit `machine` at once, text encoders included: these are not there, which
    leaves room for what diffusers takes more than ours.
    """
    if device == "cpu":
        return TINY_CONFIGS, {}
    assert machine is not None
    chosen, skipped = [], {}
    for path in sorted(set(CONFIGS.glob("*.yaml")) - set(CONFIGS.glob("config_tiny_*.yaml"))):
        config = with_settings(load_config(path), runtime={"offload": "off"}, generation={"expand_prompts": False})
        plan = make_plan(config, default_request(config), machine, {}, "bfloat16")
        streams = plan.settings["blocks_on_gpu"] is not None or plan.settings["chunk_tokens"] is not None
        if plan.refusal is None and not streams and not plan.overrides:
            chosen.append(path)
        else:
            tiles = f"it takes {' '.join(plan.overrides)}"
            skipped[path.stem] = plan.reason.split("; ")[0] if streams or plan.refusal else tiles
    return chosen, skipped


def build_vaes(config: Config, device: torch.device, dtype: torch.dtype, is_tiny: bool) -> tuple[Any, Any]:
    """Ours and theirs with the same weights: the tiny ones', or random ones."""
    is_image, their_options = config.model.vae.name == "flux", {}
    if is_tiny:
        folder = ROOT / config.model.vae.checkpoint_path
        ours: Any = load_vae(folder, device, dtype, config.model.vae.name)
        their_options = json.loads((folder / "config.json").read_text())
    else:
        ours = (AutoencoderKL if is_image else AutoencoderKLHunyuanVideo)().to(device, dtype)
        randomise(ours)
        ours.to(memory_format=torch.channels_last if is_image else torch.channels_last_3d)
    if is_image:
        their_options |= (
            {}
            if is_tiny
            else {
                "latent_channels": 16,
                "block_out_channels": (128, 256, 512, 512),
                "layers_per_block": 2,
                "scaling_factor": ours.scaling_factor,
            }
        )
        levels = len(their_options["block_out_channels"])
        their_options |= {
            "down_block_types": ("DownEncoderBlock2D",) * levels,
            "up_block_types": ("UpDecoderBlock2D",) * levels,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        }
    theirs: Any = (TheirImageVAE if is_image else TheirVAE).from_config(their_options)
    theirs.load_state_dict(ours.state_dict())
    theirs.to(device, dtype)
    for vae in (ours, theirs):
        vae.eval().requires_grad_(False)
    return ours, theirs


@torch.no_grad()
def measured_density(kernel: BlockSparseAttention, call: Callable[[BlockSparseAttention], object]) -> float:
    """The share of its blocks that NABLA keeps, over all that a call computes with the kernel that it is given."""
    kept: list[float] = []

    def watching(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block_map: torch.Tensor) -> torch.Tensor:
        kept.append(block_map.float().mean().item())
        return kernel(q, k, v, block_map)

    call(watching)
    return sum(kept) / len(kept)


def generation_part(names: tuple[str, ...], device: torch.device, dtype: torch.dtype, config_path: Path) -> Part:
    """A whole run: text encoding too where the config is a tiny one, else random embeddings and weights."""
    config = load_config(config_path)
    model, generation = config.model, config.generation
    is_tiny, is_video = config_path in TINY_CONFIGS, config.task in ("t2v", "i2v")
    is_nabla = model.attention.type == "nabla"
    missing = {name: why for name, why in NO_NABLA[device.type].items() if is_nabla and name in names}
    names = tuple(name for name in names if name not in missing)
    devices = dict.fromkeys(("dit", "vae", "text_embedder"), device)
    our_vae, their_vae = build_vaes(config, device, dtype, is_tiny)
    weights, encoder = None, SimpleNamespace()
    given: dict[str, dict[str, Any]] = {"ours": {"text": PROMPT}, "diffusers": {"prompt": PROMPT}}
    if is_tiny:
        weights = load_dit(ROOT / model.checkpoint_path, model.dit_params, "cpu", dtype)
        folders = encoder_folders(config, Path())
        encoder = load_text_encoders(config, *folders, device, dtype)
        theirs = load_their_encoders(config, folders, device, dtype)
        given["ours"] |= {"negative_caption": "", "expand_prompts": False}
        given["diffusers"] |= {"negative_prompt": ""}
    else:
        schedule = OurSchedule(shift=config.metrics.scheduler_scale)
        theirs = THEIR_PIPELINES[config.task](
            transformer=None,
            vae=None,
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            scheduler=schedule,
        )
        embeds = torch.randn(1, 128, model.dit_params.in_text_dim).to(device, dtype)
        pooled = torch.randn(1, model.dit_params.in_text_dim2).to(device, dtype)
        text, lengths = TextEmbeddings(embeds, pooled, None), torch.tensor([0, 128], dtype=torch.int32, device=device)
        given["ours"] = {"prompt_embeds": text, "negative_prompt_embeds": text}
        given["diffusers"] = {
            f"{prefix}{name}": value
            for prefix in ("", "negative_")
            for name, value in zip(
                ("prompt_embeds_qwen", "prompt_embeds_clip", "prompt_cu_seqlens"),
                (embeds, pooled, lengths),
                strict=True,
            )
        }
    frames = 24 * round(generation.time_length) + 1
    sizes = {"width": generation.width, "height": generation.height}
    for arguments in given.values():
        if is_video:
            arguments["num_frames"] = frames
        if config.task in ("i2v", "i2i"):
            pixels = np.random.default_rng(0).integers(0, 256, (generation.height, generation.width, 3), dtype=np.uint8)
            arguments["image"] = Image.fromarray(pixels)
    dits = build_dits(model.dit_params, names, device, dtype, weights, model.attention)
    steps, guidance = model.num_steps, model.guidance_weight

    def execution_of(name: str) -> Execution:
        return our_execution(name, model.dit_params.head_dim, device, dtype, is_nabla)

    def run(name: str, num_steps: int = steps, execution: Execution | None = None) -> Callable[[], object]:
        if name.startswith("ours"):
            pipeline, placement = PIPELINES[config.task], FixedPlacement(devices)
            execution = execution or execution_of(name)
            ours: Any = pipeline(config, dits[name], encoder, our_vae, placement, execution=execution)  # type: ignore[arg-type]
            options = {"num_steps": num_steps, "seed": 1, "progress": False, "output_type": "uint8"}
            return lambda: ours(**given["ours"], **sizes, **options)
        pipe = copy.copy(theirs)
        pipe.register_modules(transformer=dits[name], vae=their_vae)
        pipe.set_progress_bar_config(disable=True)
        pipe._get_scale_factor = lambda height, width: config.metrics.scale_factor
        pipe.resolutions = list(generation.resolutions)
        if not generation.first_frame_normalization:
            pipe.normalize_first_frame = lambda latents: latents

        def call() -> object:
            generator = torch.Generator("cpu").manual_seed(1)
            arguments = {**sizes, "num_inference_steps": num_steps, "guidance_scale": guidance, "generator": generator}
            return pipe(**given["diffusers"], **arguments, output_type="np", return_dict=False)[0]

        return call

    density = 0.0 if is_nabla else 1.0
    if is_nabla and "ours" in names:
        plain = execution_of("ours")
        density = measured_density(
            plain.block_sparse, lambda kernel: run("ours", DENSITY_STEPS, replace(plain, block_sparse=kernel))()
        )
    latents = ((frames - 1) // 4 + 1, generation.height // 8, generation.width // 8)
    z = torch.zeros(1, 16, *latents, device=device, dtype=dtype)
    picture = torch.zeros(1, 3, 1, generation.height, generation.width, device=device, dtype=dtype)
    if not is_video:
        z, picture = z[:, :, 0], picture[:, :, 0]
    evaluations = steps * (2 if guidance > 1 else 1)
    flops = evaluations * dit_flops(model.dit_params, latents, 16 if is_tiny else 128, density)
    flops += counted_flops(lambda: their_vae.decode(z))
    if config.task in ("i2v", "i2i"):
        flops += counted_flops(lambda: their_vae.encode(picture))
    output = f"{frames} frames" if is_video else "a picture"
    title = (
        f"generation: {config_path.stem}, {output} {generation.width}x{generation.height}, {evaluations} evaluations"
    )
    if is_nabla:
        title += f", NABLA at density {density:.2f}" if density else ", NABLA"
    return Part(title, {name: run(name) for name in names}, flops if density else 0, missing)


def build(part: str, names: tuple[str, ...], args: argparse.Namespace, config: Path | None) -> Part:
    torch.manual_seed(0)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    if part == "forward":
        return forward_part(names, device, dtype)
    if part == "vae":
        return vae_part(names, device, dtype)
    if part == "text":
        return text_part(names, device, dtype, args.weights)
    assert config is not None
    return generation_part(names, device, dtype, config)


@torch.no_grad()
def measure_peak(run: Callable[[], object], device: torch.device) -> int:
    """Bytes that a call needs beyond what is there. The call before it brings what stays: compiled code, threads."""
    run()
    gc.collect()
    wait_for(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        wait_for(device)
        return torch.cuda.max_memory_allocated() - before
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    run()
    return resident("VmHWM") - before


def as_tensor(result: Any) -> torch.Tensor:
    """What a run returned, in one form: videos as (B, 3, T, H, W) from 0 to 255."""
    if isinstance(result, tuple):
        result = result[0]
    if isinstance(result, np.ndarray):
        return torch.from_numpy(result).movedim(-1, 1).float() * 255
    return result.float()


@torch.no_grad()
def difference(built: Part) -> dict[str, float]:
    """Of each result from the first one's: root mean square over root mean square.

    What there is too little memory for becomes one of the part's missing ones.
    """
    results = {}
    for name, run in list(built.runs.items()):
        try:
            results[name] = as_tensor(run()).cpu()
        except torch.OutOfMemoryError as error:
            built.missing[name] = str(error).split(". ")[0]
            del built.runs[name]
    if not results:
        raise torch.OutOfMemoryError("; ".join(built.missing.values()))
    first = next(iter(results.values()))
    return {name: ((x - first).square().mean() / first.square().mean()).sqrt().item() for name, x in results.items()}


@torch.no_grad()
def measure_first_call(run: Callable[[], object], device: torch.device) -> float:
    begin = time.perf_counter()
    run()
    wait_for(device)
    return time.perf_counter() - begin


def in_a_process(what: str, part: str, name: str, args: argparse.Namespace, config: Path | None, cache: str) -> float:
    """`measure_peak` or `measure_first_call` of one implementation in a process of its own."""
    command = [sys.executable, __file__, "--device", args.device, "--dtype", args.dtype, "--threads", str(args.threads)]
    command += ["--weights", str(args.weights), "--child", what, part, name]
    command += ["--configs", str(config)] if config else []
    # glibc: give freed tensors back to the system at once, so that what is resident is what is in use.
    environment = os.environ | {CACHE_VARIABLE: cache} | ({"MALLOC_MMAP_THRESHOLD_": "65536"} if what == "peak" else {})
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return float(result.stdout.split()[-1])


def measure(
    part: str, names: tuple[str, ...], args: argparse.Namespace, config: Path | None, rate: float, cache: str
) -> dict[str, Any]:
    device = torch.device(args.device)
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    built = build(part, names, args, config)
    differences = difference(built)
    seconds = median_seconds(built.runs, device, args.repeats or REPEATS[part])
    rows = {name: {"seconds": seconds[name], "difference": differences[name]} for name in built.runs}
    for name, row in rows.items():
        if built.flops:
            row["share_of_floor"] = built.flops / rate / row["seconds"]
        if device.type == "cuda":
            row["peak_mib"] = measure_peak(built.runs[name], device) / 2**20
        elif not args.no_peak:
            row["peak_mib"] = in_a_process("peak", part, name, args, config, cache) / 2**20
        if part == "forward" and name in COMPILED:
            with tempfile.TemporaryDirectory() as empty:
                row["first_call_cold"] = in_a_process("first", part, name, args, None, empty)
                row["first_call_warm"] = in_a_process("first", part, name, args, None, empty)
    unit = next((rows[name]["seconds"] for name in ("diffusers", "diffusers compiled") if name in rows), float("nan"))
    print(f"\n{built.title}\n  {'':20}{'s':>9}{'/ diffusers':>13}{'of floor':>10}{'peak MiB':>10}{'difference':>12}")
    for name, row in rows.items():
        ratio = row["seconds"] / unit
        share = f"{row['share_of_floor']:.2f}" if built.flops else ""
        peak = f"{row['peak_mib']:.0f}" if "peak_mib" in row else ""
        first = (
            f"  first call {row['first_call_cold']:.1f} s, warm {row['first_call_warm']:.1f} s"
            if "first_call_cold" in row
            else ""
        )
        print(
            f"  {name:20}{row['seconds']:9.4f}{ratio:13.2f}{share:>10}{peak:>10}{row['difference']:12.1e}{first}",
            flush=True,
        )
    for name, why in built.missing.items():
        print(f"  {name:20} -  {why}", flush=True)
    measured = {"part": part, "title": built.title, "flops": built.flops, "load": load, "implementations": rows}
    return measured | ({"missing": built.missing} if built.missing else {})


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="float32 on a CPU, else bfloat16")
    parser.add_argument("--part", choices=tuple(PARTS), nargs="+", default=list(PARTS))
    parser.add_argument(
        "--only", choices=(*EAGER, ELEMENTWISE, *COMPILED), nargs="+", help="these implementations and no others"
    )
    parser.add_argument("--configs", type=Path, nargs="+", help="of `generation`; those of the module's text if not")
    parser.add_argument("--weights", type=Path, default=ROOT / "weights", help="where `text` finds published encoders")
    parser.add_argument("--repeats", type=int, help="timed calls of each implementation")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads on a CPU")
    parser.add_argument("--no_peak", action="store_true", help="leave out peak memory on a CPU, a process each")
    parser.add_argument("--json", type=Path, help="also write the figures here, for benchmarks/_chart.py")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    return args


def main() -> None:
    args = parse_args()
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    if args.child:
        what, part, name = args.child
        run = build(part, (name,), args, args.configs[0].resolve() if args.configs else None).runs[name]
        print((measure_peak if what == "peak" else measure_first_call)(run, device))
        return

    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"{processor_name()}, {args.threads} threads"
    rate = matmul_flops(2048 if args.device == "cpu" else 8192, device, getattr(torch, args.dtype), 5)
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{machine}; torch {torch.__version__}; {args.dtype}; {rate / 1e12:.3f} TFLOP/s; load {load}")
    measured, skipped = [], {}
    with tempfile.TemporaryDirectory() as cache:
        for part in args.part:
            if part == "text" and args.device == "cuda" and not args.weights.exists():
                print(f"\ntext encoding is left out: no encoders in {args.weights}")
                continue
            names = tuple(name for name in PARTS[part] if not args.only or name in args.only)
            configs: list[Path | None] = [None]
            if part == "generation" and args.configs:
                configs = [path.resolve() for path in args.configs]
            elif part == "generation":
                memory = machine_memory(device) if args.device == "cuda" else None
                configs[:], skipped = generation_configs(args.device, memory)
            for config in configs:
                try:
                    measured.append(measure(part, names, args, config, rate, cache))
                except torch.OutOfMemoryError as error:
                    skipped[config.stem if config else part] = str(error).split(". ")[0]
                gc.collect()
                if args.device == "cuda":
                    torch.cuda.empty_cache()
    for name, why in skipped.items():
        print(f"\n{name} is left out: {why}")
    if args.json:
        facts = {"machine": machine, "torch": torch.__version__, "dtype": args.dtype, "flops_rate": rate, "load": load}
        command = " ".join(["python", *sys.argv])
        args.json.write_text(
            json.dumps({**facts, "command": command, "parts": measured, "skipped": skipped}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
