"""The command line as a person runs it: a video that plays, the facts beside it, and one clear line for a mistake."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import imageio.v2 as imageio
import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from tests.limits import PATIENCE

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = REPOSITORY / "configs" / "config_tiny_t2v.yaml"
PROMPT = "a red circle moves left on a white background"


def run_python(*arguments: str | Path, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=PATIENCE, **options)


def read_video(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    with imageio.get_reader(path, format="FFMPEG") as reader:
        return np.stack(list(reader.iter_data())), reader.get_meta_data()


def read_sidecar(path: Path) -> dict[str, Any]:
    return json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))


# --------------------------------------------------------------------------------------------------------- a video


@pytest.fixture(scope="module")
def video(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video made by a process of its own, in a folder that is not the repository."""
    folder = tmp_path_factory.mktemp("video")
    run = make_video(folder, "a.mp4", seed=1)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "a.mp4"
    return folder / "a.mp4"


def video_words(name: str | Path, seed: int) -> list[str]:
    words = ("--config", CONFIG, "--prompt", PROMPT, "--seed", seed, "--sample_steps", 3, "--output_filename", name)
    return [str(word) for word in words]


def make_video(folder: Path, name: str, seed: int) -> subprocess.CompletedProcess[str]:
    return run_python(REPOSITORY / "test.py", *video_words(name, seed), cwd=folder)


def test_video_is_what_was_asked_for_and_plays(video: Path) -> None:
    frames, meta = read_video(video)
    assert frames.shape == (25, 128, 128, 3)
    assert meta["fps"] == 24
    probe = subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-i", str(video)], capture_output=True, text=True
    )
    assert re.search(r"Video: h264 .*yuv420p.* 128x128.* 24 fps", probe.stderr), probe.stderr
    assert {path.name for path in video.parent.iterdir()} >= {"a.mp4", "a.json"}
    assert not [path for path in video.parent.iterdir() if ".tmp" in path.name]


def test_facts_lie_beside_the_video(video: Path) -> None:
    facts = read_sidecar(video)
    asked = {"prompt": PROMPT, "seed": 1, "num_steps": 3, "width": 128, "height": 128, "num_frames": 25, "fps": 24}
    assert {name: facts[name] for name in asked} == asked
    config = facts["config"]
    assert facts["negative_prompt"] == config["generation"]["negative_caption"]
    assert facts["guidance_weight"] == config["model"]["guidance_weight"]
    assert facts["scheduler_scale"] == config["metrics"]["scheduler_scale"]
    assert config["source"] == str(CONFIG)
    assert config["model"]["dit_params"]["patch_size"] == [1, 2, 2]
    assert set(facts["devices"]) == {"dit", "vae", "text_embedder"}
    assert facts["dtype"] in ("float32", "bfloat16")
    assert facts["versions"]["torch"].startswith("2.")
    assert list(facts["seconds"]) == ["encode", "denoise", "decode", "write"]
    assert all(seconds > 0 for seconds in facts["seconds"].values())


def test_same_seed_same_frames_other_seed_other_frames(video: Path, cli: ModuleType) -> None:
    frames, _ = read_video(video)
    run = make_video(video.parent, "again.mp4", seed=1)
    assert run.returncode == 0, run.stderr
    assert np.array_equal(read_video(video.parent / "again.mp4")[0], frames)
    assert cli.main(video_words(video.parent / "other.mp4", seed=2)) == 0
    assert not np.array_equal(read_video(video.parent / "other.mp4")[0], frames)


# --------------------------------------------------------------------------------------- every flag, on small pictures

Generate = Callable[..., tuple[Path, dict[str, Any]]]


@pytest.fixture
def generate(cli: ModuleType, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Generate:
    """A picture in two steps, in this process, with more flags behind; gives the output's path and its facts."""

    def run(*flags: str | Path) -> tuple[Path, dict[str, Any]]:
        plain = ["--config", CONFIG, "--prompt", PROMPT, "--seed", "1", "--video_duration", "0", "--sample_steps", "2"]
        output = ["--output_filename", tmp_path / f"{len(list(tmp_path.iterdir()))}.png"]
        assert cli.main([str(word) for word in (*plain, *output, *flags)]) == 0, capsys.readouterr().err
        path = Path(capsys.readouterr().out.strip())
        return path, read_sidecar(path)

    return run


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


@dataclass
class Flag:
    """Words of the command line, and the entry of the facts that they change."""

    words: tuple[str, ...]
    entry: str
    value: Any
    other_pixels: bool = True


FLAGS = {
    "prompt": Flag(("--prompt", "a blue cross on a navy background"), "prompt", "a blue cross on a navy background"),
    "negative_prompt": Flag(("--negative_prompt", "a green square"), "negative_prompt", "a green square"),
    "width": Flag(("--width", "144"), "width", 144),
    "height": Flag(("--height", "96"), "height", 96),
    "sample_steps": Flag(("--sample_steps", "3"), "num_steps", 3),
    "guidance_weight": Flag(("--guidance_weight", "1.5"), "guidance_weight", 1.5),
    "scheduler_scale": Flag(("--scheduler_scale", "7"), "scheduler_scale", 7.0),
    "seed": Flag(("--seed", "11"), "seed", 11),
    "dtype": Flag(("--dtype", "bfloat16"), "dtype", "bfloat16"),
    "overrides": Flag(("metrics.scheduler_scale=4.5",), "scheduler_scale", 4.5),
}  # fmt: skip
# Flags that stand for a value of the YAML, which the facts repeat. What they do is tested where it is done.
SETTINGS = {
    "magcache": Flag(("--magcache",), "magcache.enabled", True),
    "cache": Flag(("--cache", "auto"), "cache.kind", "auto"),
    "compile": Flag(("--compile", "off"), "runtime.compile", "off"),
    "cache_prompts": Flag(("--cache_prompts",), "runtime.cache_prompts", True),
    "offload": Flag(("--offload",), "runtime.offload", "on"),
    "blocks_on_gpu": Flag(("--blocks_on_gpu", "1"), "runtime.blocks_on_gpu", 1),
    "dit_quantization": Flag(("--dit_quantization", "int8"), "runtime.dit_quantization", "int8"),
    "qwen_quantization": Flag(("--qwen_quantization",), "runtime.qwen_quantization", True),
    "expand_prompt": Flag(("--expand_prompt", "off"), "generation.expand_prompts", False),
    "preview": Flag(("--preview", "2"), "runtime.preview", 2),
    "upscale": Flag(("--upscale", "2"), "runtime.upscale", 2),
    "save_latents": Flag(("--save_latents",), "runtime.save_latents", True),
}
# These have tests of their own, below or in the file of that name.
OTHER_FLAGS = {
    "config": "",
    "video_duration": "",
    "output_filename": "",
    "cache_dir": "",
    "attention_engine": "",
    "device": "",
    "guidance_interval": "",
    "guidance_every": "",
    "coarse_steps": "",
    "help": "",
    "image": "test_tasks",
    "cfg_parallel": "test_launch",
    "shard_weights": "test_launch",
    "decode_latents": "test_faults",
    "lora": "test_lora_cli",
    "video": "test_directed_cli",
    "strength": "test_directed_cli",
    "mask": "test_directed_cli",
    "last_image": "test_directed_cli",
    "loop": "test_directed_cli",
    "keyframe": "test_directed_cli",
    "fps": "test_directed_cli",
    "upscaler": "test_directed_cli",
    "extend": "test_directed_cli",
    "segments": "test_directed_cli",
    "overlap": "test_directed_cli",
    "no_colour_match": "test_directed_cli",
    "save_last_frame": "test_directed_cli",
    "stream_encoders": "test_directed_cli",
    "vae": "test_tiny_decoder_cli",
    "resume_from": "test_stop",
    "output_dir": "test_many_prompts",
    "prompts_file": "test_many_prompts",
    "resume": "test_many_prompts",
    "data_parallel": "test_many_prompts",
    "ray_address": "test_many_prompts",
    "ray_actors": "test_many_prompts",
    "ray_gpus": "test_many_prompts",
    "download": "test_download_on_demand",
    "hf_token": "test_download_on_demand",
    "plan": "test_plan_cli",
    "memory_gb": "test_plan_cli",
    "host_memory_gb": "test_plan_cli",
    "processes": "test_plan_cli",
    "device_preset": "test_plan_cli",
}


def test_no_flag_without_a_test(cli: ModuleType) -> None:
    flags = {action.dest for action in cli.build_parser()._actions}
    assert flags == {*FLAGS, *SETTINGS, *OTHER_FLAGS}
    for flag, file in OTHER_FLAGS.items():
        assert not file or f"--{flag}" in Path(__file__).with_name(f"{file}.py").read_text(), flag


def test_settings_reach_the_config(generate: Generate) -> None:
    _, plain = generate()
    _, facts = generate(*(word for flag in SETTINGS.values() for word in flag.words))
    for name, flag in SETTINGS.items():
        section, key = flag.entry.split(".")
        assert plain["config"][section][key] != flag.value, name
        assert facts["config"][section][key] == flag.value, name


def test_cheaper_guidance(generate: Generate) -> None:
    everywhere, _ = generate("--sample_steps", "4", "--guidance_weight", "3")
    for words, entry, value in (
        (("--guidance_interval", "0.25", "0.75"), "guidance_interval", [0.25, 0.75]),
        (("--guidance_every", "2"), "guidance_every", 2),
    ):
        path, facts = generate("--sample_steps", "4", "--guidance_weight", "3", *words)
        assert facts[entry] == value
        assert facts["evaluations"] == {"all": 6, "skipped": 0}
        assert not np.array_equal(pixels(path), pixels(everywhere))


def test_coarse_steps(generate: Generate) -> None:
    everywhere, plain = generate("--sample_steps", "4")
    path, facts = generate("--sample_steps", "4", "--coarse_steps", "0.5")
    assert (plain["coarse_steps"], facts["coarse_steps"]) == (None, {"steps": 2, "width": 64, "height": 64})
    assert pixels(path).shape == pixels(everywhere).shape and not np.array_equal(pixels(path), pixels(everywhere))
    _, facts = generate("--sample_steps", "4", "--coarse_steps", "0.3:0.75")
    assert facts["coarse_steps"] == {"steps": 1, "width": 96, "height": 96}


@pytest.mark.parametrize("name", FLAGS)
def test_flag_reaches_its_consumer(generate: Generate, name: str) -> None:
    flag = FLAGS[name]
    plain, plain_facts = generate("--dtype", "float32")
    path, facts = generate("--dtype", "float32", *flag.words)
    assert plain_facts[flag.entry] != flag.value
    assert facts[flag.entry] == flag.value
    assert pixels(path).shape == (facts["height"], facts["width"], 3)
    assert not np.array_equal(pixels(path), pixels(plain))


def test_config(generate: Generate, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(CONFIG.read_text().replace('negative_caption: ""', "negative_caption: blurry"))
    _, facts = generate("--config", mine)
    assert facts["config"]["source"] == str(mine)
    assert facts["negative_prompt"] == "blurry"


def test_video_duration(generate: Generate, tmp_path: Path) -> None:
    path, facts = generate("--video_duration", "0.2", "--output_filename", tmp_path / "short.mp4")
    frames, meta = read_video(path)
    # 4.8 frames: a latent frame is 4 frames, and the first one stands alone
    assert len(frames) == facts["num_frames"] == 5
    assert meta["fps"] == 24


def test_zero_duration_makes_a_picture(generate: Generate) -> None:
    path, facts = generate()
    with Image.open(path) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (128, 128))
    assert facts["num_frames"] == 1


def test_output_filename_makes_its_folder_and_replaces(generate: Generate, tmp_path: Path) -> None:
    wanted = tmp_path / "new" / "folder" / "my picture.png"
    path, _ = generate("--output_filename", wanted)
    assert path == wanted
    before = path.read_bytes()
    assert generate("--output_filename", wanted, "--seed", "2")[0].read_bytes() != before


def test_default_name_replaces_nothing(
    cli: ModuleType, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--config", str(CONFIG), "--prompt", PROMPT, "--seed", "5", "--video_duration", "0", "--sample_steps", "1"]
    contents: dict[str, bytes] = {}
    for _ in range(3):
        assert cli.main(words) == 0
        path = capsys.readouterr().out.strip()
        assert path not in contents
        assert path.startswith("outputs/a-red-circle-moves-left")
        contents[path] = Path(path).read_bytes()
    assert all(Path(path).read_bytes() == content for path, content in contents.items())
    assert len(list(Path("outputs").iterdir())) == 6  # a picture and its facts, three times


def test_output_dir_is_where_new_names_go(cli: ModuleType, tiny: Path, tmp_path: Path) -> None:
    words = ["--config", str(CONFIG), "--prompt", PROMPT, "--seed", "5", "--video_duration", "0", "--sample_steps", "1"]
    assert cli.main([*words, "--output_dir", str(tmp_path / "mine")]) == 0
    assert {path.name for path in (tmp_path / "mine").glob("*.png")} == {f"{PROMPT.replace(' ', '-')}_seed5.png"}


def test_cache_dir_is_what_weights_stands_for(generate: Generate, tiny: Path, tmp_path: Path) -> None:
    override = "model.checkpoint_path=./weights/model/tiny_t2v.safetensors"
    generate("--cache_dir", tiny, override)
    with pytest.raises(AssertionError, match=rf"weights not found: {tmp_path}/nothing/model/tiny_t2v"):
        generate("--cache_dir", tmp_path / "nothing", override)


def test_attention_engine_and_device(generate: Generate, caplog: pytest.LogCaptureFixture) -> None:
    _, facts = generate("--attention_engine", "sdpa", "--device", "cpu", "model.attention.exact_blocks=[0]")
    assert "model.attention.exact_steps and exact_blocks change nothing: attention is exact everywhere" in caplog.text
    assert facts["attention_engine"] == "sdpa"
    assert facts["devices"] == {"dit": "cpu", "vae": "cpu", "text_embedder": "cpu"}
    with pytest.raises(AssertionError, match="attention engine 'abacus' does not exist"):
        generate("--attention_engine", "abacus")
    with pytest.raises(AssertionError, match="this machine has no cuda:99"):
        generate("--device", "cuda:99")


def test_without_a_seed_every_video_is_another(generate: Generate, cli: ModuleType) -> None:
    assert cli.build_parser().parse_args(["--prompt", "x"]).seed is None
    from kandinsky.config.reading import load_config
    from kandinsky.request import resolve_request

    config = load_config(CONFIG)
    assert len({resolve_request(config, "x").samples[0].seed for _ in range(8)}) > 1


def test_help_is_light_and_names_every_flag(cli: ModuleType) -> None:
    code = (
        "import runpy, sys\n"
        "sys.argv = ['test.py', '--help']\n"
        "try:\n    runpy.run_path('test.py', run_name='__main__')\n"
        "finally:\n    heavy = {'torch', 'transformers', 'numpy', 'omegaconf'} & set(sys.modules)\n"
        "    print(sorted(heavy), file=sys.stderr)"
    )
    run = run_python("-c", code, cwd=REPOSITORY)
    assert run.returncode == 0
    assert run.stderr.strip() == "[]"
    for action in cli.build_parser()._actions:
        assert all(option in run.stdout for option in action.option_strings)
        assert action.help


# -------------------------------------------------------------------------------------------------------- mistakes


@dataclass
class Mistake:
    """Words behind a correct command line, and what the one line must say; {tmp} and {tiny} are folders."""

    words: tuple[str, ...]
    says: str
    light: bool = True  # found before torch is imported


TINY_FILES = (
    "model.checkpoint_path={tiny}/model/tiny_t2v.safetensors",
    "model.vae.checkpoint_path={tiny}/vae",
    "model.text_embedder.qwen.checkpoint_path={tiny}/text_encoder",
    "model.text_embedder.clip.checkpoint_path={tiny}/text_encoder2",
)
MISTAKES = {
    # the config
    "unknown key": Mistake(("model.num_step=3",), r"unknown key model.num_step; did you mean model.num_steps\?"),
    "unknown key in file": Mistake(("--config", "{tmp}/typo.yaml"), "typo.yaml: unknown key .*did you mean"),
    "no such config": Mistake(("--config", f"{CONFIG.parent}/config_tiny_t2w.yaml"), "mean config_tiny_t2v.yaml"),
    "config of another program": Mistake(
        ("--config", "{tmp}/nope.yaml"), "config file; the models' configs are in con"
    ),
    "config elsewhere": Mistake(("--config", "{tmp}/config_5s_sft.yaml"), r"mean configs/config_5s_sft.yaml\?$"),
    "config is text": Mistake(("--config", "{tmp}/words.yaml"), "words.yaml: not a config: the file is text"),
    "config is a folder": Mistake(("--config", "{tmp}"), "no such config file"),
    "config is a preset": Mistake(
        ("--config", f"{CONFIG.parent}/devices/8gb.yaml"),
        "settings alone: name a model's file, and --device_preset 8gb",
    ),
    "config is no YAML": Mistake(("--config", "{tmp}/broken.yaml"), "broken.yaml: not readable as YAML"),
    "config is a video": Mistake(("--config", "{tmp}/binary.yaml"), "binary.yaml: not readable as YAML"),
    "override without value": Mistake(("model.num_steps",), "not of the form key.key=value"),
    "override of wrong type": Mistake(("model.num_steps=many",), "model.num_steps = 'many' .* whole number"),
    "size for NABLA": Mistake(
        ("--config", f"{CONFIG.parent}/config_10s_sft.yaml", "--width", "720"),
        "width is 720; .*multiple of 128 .*NABLA.*nearest is 768",
    ),
    # the request
    "empty prompt": Mistake(("--prompt", " \n"), "the prompt is empty: say what"),
    "prompt of another encoding": Mistake(("--prompt", "caf\udce9"), "the prompt is not UTF-8: 'caf"),
    "negative prompt of another encoding": Mistake(("--negative_prompt", "\udce9"), "the negative prompt is not UTF-8"),
    "width": Mistake(("--width", "130"), "width is 130; .* multiple of 16 .* nearest is 128"),
    "height": Mistake(("--height", "0"), "height is 0; .* multiple of 16"),
    "huge": Mistake(("--width", "160000"), "from 16 to 2048"),
    "no number": Mistake(("--width", "wide"), "--width: invalid int value: 'wide'"),
    "negative steps": Mistake(("--sample_steps", "-3"), "number of steps is -3; .* from 1 to 1000"),
    "no steps": Mistake(("--sample_steps", "0"), "number of steps is 0"),
    "negative seed": Mistake(("--seed", "-1"), "the seed is -1; .* from 0"),
    "large seed": Mistake(("--seed", str(2**40)), "the seed is 1099511627776"),
    "seed of words": Mistake(("--seed", "lucky"), "--seed: invalid int value: 'lucky'"),
    "guidance nan": Mistake(("--guidance_weight", "nan"), "guidance_weight is nan; it must be a number from 0"),
    "guidance inf": Mistake(("--guidance_weight", "inf"), "guidance_weight is inf"),
    "guidance negative": Mistake(("--guidance_weight", "-1"), "guidance_weight is -1"),
    "scale zero": Mistake(("--scheduler_scale", "0"), "scheduler_scale is 0"),
    "duration negative": Mistake(("--video_duration", "-1"), r"the duration is -1.0 s; .*0 \(an image\)"),
    "duration nan": Mistake(("--video_duration", "nan"), "the duration is nan s"),
    "duration long": Mistake(("--video_duration", "100"), "the duration is 100.0 s; .* to 21 s"),
    # the output
    "suffix": Mistake(("--output_filename", "{tmp}/out/a.avi"), r"ends in '.avi'; .* call it .*a\.mp4"),
    "no suffix": Mistake(("--output_filename", "{tmp}/out/a"), r"has no ending; .* call it .*a\.mp4"),
    "picture as video": Mistake(("--video_duration", "0"), r"ends in '.mp4'; an image is written as .png"),
    "folder is a file": Mistake(("--output_filename", "{tmp}/typo.yaml/a.mp4"), "can't write .*typo.yaml/a.mp4: "),
    "folder as output": Mistake(("--output_filename", "{tmp}"), "it is a folder; name a file in it, like .*output.mp4"),
    "output is a folder": Mistake(("--output_filename", "{tmp}/folder.mp4"), "it is a folder; name a file in it"),
    "name too long": Mistake(("--output_filename", "{tmp}/out/" + 300 * "x" + ".mp4"), "can't write .*name too long"),
    # the flags
    "unknown flag": Mistake(("--magick",), "unrecognized arguments: --magick .*--help"),
    "flag without value": Mistake(("--seed",), "--seed: expected one argument"),
    # the weights and the machine
    "no weights": Mistake(
        ("--config", f"{CONFIG.parent}/config_5s_distil.yaml", "--cache_dir", "{tmp}/nowhere"),
        r"weights not found: {tmp}/nowhere/model/.*python download_models.py --models 5s_distil\. .*config_tiny_t2v",
        light=False,
    ),
    "truncated model": Mistake(("model.checkpoint_path={tmp}/cut.safetensors",), "cut.safetensors: truncated", False),
    "truncated header": Mistake(("model.checkpoint_path={tmp}/head.safetensors",), "head.safetensors: trunc", False),
    "truncated VAE": Mistake(("model.vae.checkpoint_path={tmp}/vae",), "vae/.*safetensors: truncated", False),
    "truncated text encoder": Mistake(
        ("model.text_embedder.qwen.checkpoint_path={tmp}/text_encoder",),
        r"text_encoder/model.safetensors: truncated, it has [\d,]+ of [\d,]+ bytes .* download it again",
        False,
    ),
    "pickle": Mistake(("model.checkpoint_path={tmp}/model.pt",), "model.pt: safetensors only.*pickle", False),
    "no DiT": Mistake(
        ("model.checkpoint_path={tiny}/vae/diffusion_pytorch_model.safetensors",), "not a Kandinsky 5 DiT", False
    ),
    "other variant": Mistake(
        ("--config", f"{CONFIG.parent}/config_5s_sft.yaml", *TINY_FILES),
        r"tiny_t2v.safetensors: this file is .*the config says Lite \(32 visual blocks, dim 1792\)",
        light=False,
    ),
    "other depth": Mistake(("model.dit_params.num_visual_blocks=99",), "num_visual_blocks .*config: 99", False),
    "other tokenizer": Mistake(("model.text_embedder.qwen.crop=9",), "tokens before the prompt, but 9 are", False),
    "dtype": Mistake(("--dtype", "int8"), "dtype is 'int8'; choose one of float32, bfloat16, float16", False),
    "engine": Mistake(("--attention_engine", "abacus"), "'abacus' does not exist: choose one of auto, sdpa", False),
    "coarse steps": Mistake(("--coarse_steps", "25%"), r"--coarse_steps '25%' is not SHARE\[:SCALE\], numbers"),
    "coarse steps of no scale": Mistake(("--coarse_steps", "0.25:"), "--coarse_steps '0.25:' is not SHARE"),
    "device": Mistake(("--device", "tpu"), "'tpu' is not a device: use cpu, cuda or cuda:0, mps, xpu"),
    "device without a number": Mistake(("--device", "cuda:x"), "'cuda:x' is not a device: use cpu, cuda or cuda:0"),
    "absent device": Mistake(("--device", "cuda:99"), "this machine has no cuda:99", False),
}

# Runs command lines in turn in one process, so that torch is imported once at most; what reaches the file descriptor of
# stderr counts, whoever wrote it.
DRIVER = """
import json, os, runpy, sys, tempfile
main = runpy.run_path(sys.argv[1])["main"]
results = []
for words in json.load(sys.stdin):
    with tempfile.TemporaryFile() as file:
        stderr = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            code = main(words)
        except SystemExit as error:
            code = error.code
        except BaseException as error:
            code = repr(error)
        sys.stderr.flush()
        os.dup2(stderr, 2)
        os.close(stderr)
        file.seek(0)
        results.append((code, file.read().decode(), "torch" in sys.modules))
json.dump(results, sys.stdout)
"""


@dataclass
class Outcome:
    code: int
    stderr: str
    torch: bool


@pytest.fixture(scope="module")
def workshop(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files that are wrong, and an empty folder `out` for what should not come."""
    folder = tmp_path_factory.mktemp("mistakes")
    for name in ("out", "folder.mp4"):
        (folder / name).mkdir()
    (folder / "typo.yaml").write_text(CONFIG.read_text().replace("guidance_weight:", "guidance_wight:"))
    (folder / "words.yaml").write_text("a cat\nin a boat\n")
    (folder / "compose.yaml").write_text("services: {}\n")
    (folder / "broken.yaml").write_text("model: [1, 2")
    (folder / "binary.yaml").write_bytes(bytes(range(256)))
    (folder / "model.pt").write_bytes(b"PK\x03\x04")
    whole = (tiny / "model" / "tiny_t2v.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "head.safetensors").write_bytes(whole[:1000])
    for name in ("vae", "text_encoder"):
        (folder / name).mkdir()
        for path in (tiny / name).iterdir():
            content = path.read_bytes()
            short = content[: len(content) // 2] if path.suffix == ".safetensors" else content
            (folder / name / path.name).write_bytes(short)
    return folder


@pytest.fixture(scope="module")
def outcomes(workshop: Path, tiny: Path) -> dict[str, Outcome]:
    """What every mistake came to, the light ones first."""
    names = sorted(MISTAKES, key=lambda name: not MISTAKES[name].light)
    command_lines = []
    for name in names:
        words = ["--config", str(CONFIG), "--prompt", PROMPT, "--output_filename", f"{workshop}/out/a.mp4"]
        command_lines.append([*words, *(word.format(tmp=workshop, tiny=tiny) for word in MISTAKES[name].words)])
    run = run_python("-c", DRIVER, REPOSITORY / "test.py", cwd=REPOSITORY, input=json.dumps(command_lines))
    assert run.returncode == 0, run.stderr
    return {name: Outcome(*result) for name, result in zip(names, json.loads(run.stdout), strict=True)}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_gets_one_clear_line(outcomes: dict[str, Outcome], workshop: Path, name: str) -> None:
    outcome, mistake = outcomes[name], MISTAKES[name]
    assert outcome.code == 2, outcome
    assert outcome.stderr.endswith("\n") and outcome.stderr.count("\n") == 1, outcome.stderr
    assert outcome.stderr.startswith("error: ")
    assert re.search(mistake.says.replace("{tmp}", str(workshop)), outcome.stderr, re.IGNORECASE), outcome.stderr
    if mistake.light:
        assert not outcome.torch


def test_mistakes_leave_no_files(outcomes: dict[str, Outcome], workshop: Path) -> None:
    assert list((workshop / "out").iterdir()) == []
    assert not list(workshop.glob("*.json"))


def test_mistake_in_a_process_of_its_own(tmp_path: Path) -> None:
    run = run_python(REPOSITORY / "test.py", "--config", CONFIG, "--prompt", "", cwd=tmp_path)
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr == "error: the prompt is empty: say what to show\n"
    assert list(tmp_path.iterdir()) == []


def test_prompt_is_required(cli: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["--config", str(CONFIG)])
    assert exit.value.code == 2
    assert re.fullmatch(r"error: .*required: --prompt.*\n", capsys.readouterr().err)


# ------------------------------------------------------------------------------------------------ things that break


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (KeyboardInterrupt(), 130, "interrupted; nothing was written\n"),
        (OSError("disk\nfull"), 2, "error: disk full\n"),
    ],
)
def test_what_happens_on_the_way(
    cli: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    says: str,
) -> None:
    break_loading(monkeypatch, error)
    words = ["--config", str(CONFIG), "--prompt", PROMPT, "--output_filename", str(tmp_path / "a.mp4")]
    assert cli.main(words) == code
    assert capsys.readouterr().err == says
    assert list(tmp_path.iterdir()) == []


def test_out_of_memory_is_told_and_bugs_are_not_hidden(
    cli: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    words = ["--config", str(CONFIG), "--prompt", PROMPT, "--output_filename", str(tmp_path / "a.mp4")]
    break_loading(monkeypatch, torch.OutOfMemoryError("tried to allocate 70 GiB"))
    assert cli.main(words) == 2
    assert re.fullmatch(r"error: out of GPU memory: .*--width.*\n", capsys.readouterr().err)
    break_loading(monkeypatch, RuntimeError("ours"))
    with pytest.raises(RuntimeError, match="ours"):
        cli.main(words)


def break_loading(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    from kandinsky.loading import assemble as loading

    def broken(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(loading, "load_pipeline", broken)


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_killed_while_writing_leaves_nothing_under_the_name(tmp_path: Path) -> None:
    code = (
        "import os, signal, numpy as np\n"
        "from kandinsky.outputs import media\n"
        "def frames():\n"
        "    return np.random.default_rng(0).integers(0, 255, (64, 128, 128, 3), dtype=np.uint8)\n"
        "import imageio_ffmpeg\n"
        "imageio_ffmpeg.count_frames_and_secs = lambda path: os.kill(os.getpid(), signal.SIGKILL)\n"
        "media.write_video(frames(), os.environ['TARGET'])\n"
    )
    env = {**os.environ, "TARGET": str(tmp_path / "a.mp4")}
    run = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env=env, capture_output=True, text=True)
    assert run.returncode == -signal.SIGKILL, run.stderr
    left = [path.name for path in tmp_path.iterdir()]
    assert len(left) == 1 and left[0].startswith("."), left  # the temporary file, whole, not yet renamed


def test_the_allocator_s_segments_grow_unless_somebody_has_set_it(
    cli: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under either name, the older of which PyTorch still reads."""
    wrong = ["--config", "missing.yaml", "--prompt", "a cat"]
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    assert cli.main(wrong) == 2
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")
    assert cli.main(wrong) == 2 and os.environ["PYTORCH_ALLOC_CONF"] == "max_split_size_mb:64"
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    assert cli.main(wrong) == 2 and "PYTORCH_ALLOC_CONF" not in os.environ
