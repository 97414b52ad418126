"""The command lines of the original repository's READMEs and examples/examples.sh, as they stand there.

Each goes through `main` up to where weights would be read: there the config and the request are looked at.
"""

from __future__ import annotations

import runpy
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kandinsky.config.original_names import our_config
from kandinsky.config.reading import load_config
from kandinsky.config.rules import check_processes
from kandinsky.config.schema import Config
from kandinsky.request import Request

REPOSITORY = Path(__file__).resolve().parents[2]
LAUNCH = "python -m torch.distributed.launch --nnodes 1 --nproc-per-node"
BEAR = '--prompt "The bear plays balalaika." --image "./assets/test_image.jpg"'
DOG = '--prompt "A dog in red hat"'
PRO_I2V, PRO_T2V = "--config ./configs/k5_pro_i2v_5s_sft", "--config ./configs/k5_pro_t2v_10s_sft"
HD = "--width 1280 --height 768"

# Command -> what it has to come to: config, (width, height), frames.
SD, FIVE, TEN = (768, 512), 121, 241
COMMANDS: dict[str, tuple[str, tuple[int, int], int]] = {
    # The READMEs of both releases.
    f"python test.py {DOG}": ("5s_sft", SD, FIVE),
    f"python test.py --config ./configs/config_10s_sft.yaml {DOG} --video_duration 10 ": ("10s_sft", SD, TEN),
    f"python test.py --config ./configs/config_5s_pretrain.yaml {DOG}": ("5s_pretrain", SD, FIVE),
    f"python test.py --config ./configs/config_10s_pretrain.yaml {DOG} --video_duration 10": ("10s_pretrain", SD, TEN),
    f"python test.py --config ./configs/config_5s_nocfg.yaml {DOG} ": ("5s_nocfg", SD, FIVE),
    f"python test.py --config ./configs/config_10s_nocfg.yaml {DOG} --video_duration 10": ("10s_nocfg", SD, TEN),
    f"python test.py --config ./configs/config_5s_distil.yaml {DOG}          ": ("5s_distil", SD, FIVE),
    f"python test.py --config ./configs/config_10s_distil.yaml {DOG} --video_duration 10": ("10s_distil", SD, TEN),
    f"python test.py --config ./configs/k5_lite_t2v_10s_sft_sd.yaml {DOG} --video_duration 10 ": ("10s_sft", SD, TEN),
    f"python test.py --config ./configs/k5_lite_i2v_5s_sft_sd.yaml {BEAR} --video_duration 5": ("5s_i2v", SD, FIVE),
    'python test.py --config ./configs/k5_lite_t2i_sft_hd.yaml --prompt "A dog in a red hat" '
    "--width=1280 --height=768": ("t2i", (1280, 768), 1),
    "python -m torch.distributed.launch --nnodes 1 --nproc-per-node 1 test.py": ("5s_sft", SD, FIVE),
    f"python test.py {DOG} --offload": ("5s_sft", SD, FIVE),
    f"python test.py {DOG} --magcache": ("5s_sft", SD, FIVE),
    f"python test.py {DOG} --qwen_quantization": ("5s_sft", SD, FIVE),
    **{
        f"python test.py {DOG} --attention_engine={engine}": ("5s_sft", SD, FIVE)
        for engine in ("flash_attention_3", "flash_attention_2", "sdpa", "sage")
    },
    # examples/examples.sh
    **{
        f"{LAUNCH} {n} test.py {BEAR} {PRO_I2V}_sd.yaml --output_filename ./test-{n}.mp4": ("5s_i2v_pro", SD, FIVE)
        for n in (1, 2, 4, 8)
    },
    f"{LAUNCH} 1 test.py {BEAR} {PRO_I2V}_sd.yaml --output_filename ./test-1-magcache.mp4 --magcache": (
        "5s_i2v_pro", SD, FIVE,
    ),
    **{
        f"{LAUNCH} {n} test.py {BEAR} {PRO_I2V}_hd.yaml --output_filename ./test-{n}-hd.mp4 {HD}": (
            "5s_i2v_pro_hd", (1280, 768), FIVE,
        )
        for n in (1, 2, 4, 8)
    },
    f"{LAUNCH} 1 test.py {BEAR} {PRO_I2V}_hd.yaml --output_filename ./test-1-hd-magcache.mp4 {HD}"
    " --magcache --offload": ("5s_i2v_pro_hd", (1280, 768), FIVE),
    **{
        f"{LAUNCH} {n} test.py {DOG} {PRO_T2V}_sd.yaml --output_filename ./test-{n}-10sec.mp4 --video_duration 10": (
            "10s_t2v_pro", SD, TEN,
        )
        for n in (2, 4, 8)
    },
    f"{LAUNCH} 1 test.py {DOG} {PRO_T2V}_sd.yaml --output_filename ./test-1-10sec.mp4 --video_duration 10 --offload": (
        "10s_t2v_pro", SD, TEN,
    ),
    f"{LAUNCH} 1 test.py {DOG} {PRO_T2V}_hd.yaml --output_filename ./test-1-10sec-hd.mp4 --video_duration 10 {HD}"
    " --magcache --offload": ("10s_t2v_pro_hd", (1280, 768), TEN),
    f"python test.py --config ./configs/k5_lite_t2v_5s_distil_sd.yaml {DOG}          ": ("5s_distil", SD, FIVE),
    f"python test.py --config ./configs/k5_lite_t2v_10s_distil_sd.yaml {DOG} --video_duration 10": (
        "10s_distil", SD, TEN,
    ),
    'python test.py --config ./configs/k5_lite_i2v_5s_sft_sd.yaml --prompt "The Dragon breaths fire." '
    '--image "./assets/test_image.jpg" --video_duration 5': ("5s_i2v", SD, FIVE),
    "python test.py --config ./configs/k5_lite_i2i_sft_hd.yaml --image ./assets/cat_in_hat.png --prompt "
    '"Replace the cat with a husky, leave the rest unchanged"': ("i2i", (1280, 768), 1),
    # Their flags with the values that they take.
    f"python test.py {DOG} --expand_prompt 0 --seed 1137": ("5s_sft", SD, FIVE),
    f"python test.py {DOG} --expand_prompt 1 --scheduler_scale 5.0 --sample_steps 50": ("5s_sft", SD, FIVE),
}  # fmt: skip


@pytest.fixture(scope="module")
def program() -> dict[str, Any]:
    return runpy.run_path(str(REPOSITORY / "test.py"))


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command: str, program: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def load_pipeline(config: Config, *paths: Any, request: Request, **options: Any) -> Any:
        seen.update(config=config, request=request, options=options)
        return SimpleNamespace(generate=lambda *a, **k: None, is_denoising=False, team=SimpleNamespace(is_first=True))

    monkeypatch.setattr("kandinsky.loading.assemble.load_pipeline", load_pipeline)
    for name in ("configs", "assets"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    monkeypatch.chdir(tmp_path)
    before, words = command.split(" test.py", 1)
    arguments = shlex.split(words)
    if before != "python":
        for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
            monkeypatch.setenv(name, value)
        arguments = ["--local-rank=0", *arguments]  # as the launcher adds it

    assert program["main"](arguments) == 0
    config, request = seen["config"], seen["request"]
    name, size, frames = COMMANDS[command]
    assert config.source is not None and config.source.stem == f"config_{name}"
    assert ((request.width, request.height), request.num_frames) == (size, frames)
    if before != "python":
        check_processes(config, int(before.split()[-1]))
    assert config.magcache.enabled == ("--magcache" in command)
    assert (config.runtime.offload == "on") == ("--offload" in command)
    assert config.runtime.qwen_quantization == ("--qwen_quantization" in command)
    wanted = {"--expand_prompt 0": False, "--expand_prompt 1": True}
    assert request.expand_prompts is next((value for flag, value in wanted.items() if flag in command), None)
    if "engine=" in command:
        assert seen["options"]["attention_engine"] == command.split("=")[-1]


def test_without_a_prompt_it_is_an_error_where_nobody_launches(
    program: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        program["main"]([])
    assert "required: --prompt" in capsys.readouterr().err


def test_every_name_of_the_original_is_one_of_our_configs() -> None:
    names = [f"k5_lite_t2v_{s}_{kind}_sd" for s in ("5s", "10s") for kind in ("sft", "pretrain", "nocfg", "distil")]
    names += [f"k5_pro_t2v_{s}_sft_{size}" for s in ("5s", "10s") for size in ("sd", "hd")]
    names += ["k5_pro_i2v_5s_sft_sd", "k5_pro_i2v_5s_sft_hd"]
    names += ["k5_lite_i2v_5s_sft_sd", "k5_lite_t2i_sft_hd", "k5_lite_i2i_sft_hd"]
    found = [our_config(REPOSITORY / "configs" / f"{name}.yaml") for name in names]
    assert len(set(found)) == len(names) == 17 and all(path.is_file() for path in found)
    with pytest.raises(ValueError, match=r"k5_lite_t2v_7s_sft_sd\.yaml"):
        load_config(REPOSITORY / "configs" / "k5_lite_t2v_7s_sft_sd.yaml")


def test_a_file_of_that_name_is_itself(tmp_path: Path) -> None:
    path = tmp_path / "k5_lite_t2i_sft_hd.yaml"
    (tmp_path / "config_t2i.yaml").write_text("task: t2v")
    assert our_config(path) == tmp_path / "config_t2i.yaml"
    path.write_text("task: t2i")
    assert our_config(path) == path


def test_the_python_of_the_readme(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its calls name configs as above, and for an edit the resolution."""
    from kandinsky.loading import getters as loading

    loaded: list[Config] = []

    def load_pipeline(config: Config, *devices: Any, **options: Any) -> Any:
        loaded.append(config)
        raise InterruptedError

    monkeypatch.setattr(loading, "load_pipeline", load_pipeline)
    monkeypatch.chdir(REPOSITORY)
    devices = {"dit": "cpu", "vae": "cpu", "text_embedder": "cpu"}
    for get, options in (
        (loading.get_T2V_pipeline, {"conf_path": "configs/k5_lite_t2v_5s_sft_sd.yaml"}),
        (loading.get_I2V_pipeline, {"conf_path": "configs/k5_lite_i2v_5s_sft_sd.yaml"}),
        (loading.get_T2I_pipeline, {"conf_path": "configs/k5_lite_t2i_sft_hd.yaml"}),
        (loading.get_I2I_pipeline, {"resolution": 1024, "offload": True}),
    ):
        with pytest.raises(InterruptedError):
            get(device_map=devices, **options)
    assert [config.task for config in loaded] == ["t2v", "i2v", "t2i", "i2i"] and loaded[-1].runtime.offload == "on"
    with pytest.raises(ValueError, match=r"resolution is 512, and .* is for 1024"):
        loading.get_I2I_pipeline(device_map=devices, resolution=512)
