"""`--plan` and `--device_preset` as a person types them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.limits import PATIENCE

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = REPOSITORY / "configs"
TINY = ["--config", str(CONFIGS / "config_tiny_t2v.yaml")]


def words(name: str, *flags: str) -> list[str]:
    return ["--config", str(CONFIGS / f"config_{name}.yaml"), "--plan", *flags]


def test_plan_is_printed_and_nothing_loaded(tmp_path: Path) -> None:
    """No prompt, no weights and, with the machine's sizes given, no torch."""
    flags = words("5s_t2v_pro", "--memory_gb", "24", "--host_memory_gb", "64")
    command = [sys.executable, "-X", "importtime", str(REPOSITORY / "test.py"), *flags]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
    assert run.returncode == 0
    imported = {line.split("|")[-1].strip() for line in run.stderr.splitlines()}
    assert "kandinsky.planning.plan" in imported and "torch" not in imported
    assert "24.0 GB on the GPU, 64.0 GB of host memory" in run.stdout
    assert re.search(r"^denoise +\d+\.\d +\d+\.\d +\d+\.\d +\d+\.\d$", run.stdout, re.MULTILINE)
    assert re.search(r"settings: runtime\.offload=on runtime\.blocks_on_gpu=\d+$", run.stdout, re.MULTILINE)
    assert not list(tmp_path.iterdir())


def test_request_and_settings_are_those_of_the_flags(cli: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--memory_gb", "12", "--host_memory_gb", "32", "--video_duration", "2", "--width", "512")
    assert cli.main(words("5s_sft", *flags, "--qwen_quantization", "--sample_steps", "9")) == 0
    out = capsys.readouterr().out
    assert "49 frames of 512x512" in out and "9 steps" in out
    assert "runtime.qwen_quantization=true" in out


def test_coarse_steps_that_come_to_none(cli: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words("5s_distil", "--memory_gb", "24", "--host_memory_gb", "64", "--coarse_steps", "0.01")) == 0
    assert "coarse steps: what is asked for is 0.01 of 16 steps, which rounds to none" in capsys.readouterr().out


def test_what_cannot_fit_is_refused_with_what_can(cli: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    machine = ("--memory_gb", "6", "--host_memory_gb", "8")
    assert cli.main(words("10s_t2v_pro_hd", *machine)) == 2
    out, err = capsys.readouterr()
    assert "encode text" in out  # the table all the same
    assert re.fullmatch(r"error: denoise takes .* What fits: --video_duration 7\n", err)
    assert cli.main(words("10s_t2v_pro_hd", *machine, "--video_duration", "7")) == 0


def test_what_cannot_fit_is_not_said_to_fit(cli: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """Where flags leave nothing to be chosen, too."""
    machine = ("--memory_gb", "6", "--host_memory_gb", "64", "--offload", "--stream_encoders", "off")
    assert cli.main(words("t2i", *machine, "--blocks_on_gpu", "4")) == 2
    out, err = capsys.readouterr()
    assert "everything fits" not in out and "because of all that may be chosen it takes the least" in out
    assert err.startswith("error: expand prompt takes ")


def test_plan_of_all_segments(
    cli: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is the largest segment's, seconds are those of all; files' headers are read once."""
    import kandinsky.planning.plan as planning

    reads, models_of_files = [], planning.models_of_files
    monkeypatch.setattr(planning, "models_of_files", lambda *given: reads.append(given) or models_of_files(*given))
    machine = ("--memory_gb", "24", "--host_memory_gb", "64")

    def planned(*flags: str) -> tuple[int, int, int]:
        assert cli.main(words("5s_sft", *machine, *flags)) == 0
        out = capsys.readouterr().out
        assert "121 frames of 768x512" in out
        found = re.search(r"(\d+) segments, .* All of them: (\d+) steps, (\d+) min of denoising at", out)
        assert found is not None, out
        return int(found[1]), int(found[2]), int(found[3])

    segments, steps, minutes = planned("--extend", "13.5")
    assert (segments, steps, len(reads)) == (4, 4 * 50, 1)
    rows = "".join(f"- {{prompt: a cat, seconds: {seconds}}}\n" for seconds in (5, 1, 1))
    (tmp_path / "segments.yaml").write_text(rows)
    fewer = planned("--segments", str(tmp_path / "segments.yaml"))
    assert fewer[:2] == (3, 3 * 50) and fewer[2] < minutes
    (tmp_path / "segments.yaml").write_text(rows + "- {prompt: a dog, seconds: 40}\n")
    assert cli.main(words("5s_sft", *machine, "--segments", str(tmp_path / "segments.yaml"))) == 2
    assert "a segment of 40.00 s is asked for" in capsys.readouterr().err


def test_plan_for_this_machine(tiny: Path, cli: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--plan", "--device", "cpu", *TINY]) == 0
    out = capsys.readouterr().out
    assert "runtime.offload=off" in out and "because everything fits" in out and "on the GPU" not in out


def test_plan_for_decoding_what_a_run_left(
    tiny: Path, cli: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "a.png"
    flags = ["--prompt", "a red circle", "--video_duration", "0", "--sample_steps", "1", "--device", "cpu"]
    assert cli.main([*TINY, *flags, "--save_latents", "--output_filename", str(output)]) == 0
    capsys.readouterr()
    latents = str(output.with_suffix(".latents.safetensors"))
    assert cli.main(["--plan", "--decode_latents", latents, "--memory_gb", "8", "--host_memory_gb", "16"]) == 0
    out = capsys.readouterr().out
    assert "1 picture of 128x128" in out and "only the VAE is loaded" in out
    assert re.search(r"^decode ", out, re.MULTILINE) and "denoise" not in out and "encode" not in out


def test_several_processes(cli: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    machine = ("--memory_gb", "24", "--host_memory_gb", "128")
    assert cli.main(words("5s_t2v_pro", *machine, "--processes", "4", "--shard_weights")) == 0
    out = capsys.readouterr().out
    assert "each of 4 processes has 24.0 GB on the GPU, 128.0 GB of host memory, which 4 share" in out
    assert "of the first process, which alone has the text encoders" in out and "runtime.offload=off" in out
    assert cli.main(words("5s_t2v_pro", *machine, "--processes", "3")) == 2
    assert "3 processes cannot share" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["5s_i2v", "i2i"])
def test_plan_for_a_picture_needs_none(name: str, cli: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words(name, "--memory_gb", "24", "--host_memory_gb", "32")) == 0
    assert "encode image" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--memory_gb", "0"), "error: --memory_gb is 0; it must be from 0.1 to 100,000 (GB of 2^30 bytes)"),
        (("--memory_gb", "8", "--host_memory_gb", "-1"), "error: --host_memory_gb is -1; it must be from 0.1"),
        (
            ("--memory_gb", "8", "--device_preset", "9gb"),
            "error: there is no device preset '9gb': choose one of 8gb, 12gb",
        ),
        (("--memory_gb", "8", "--dtype", "int3"), "error: dtype is 'int3'"),
        (("--memory_gb", "inf"), "error: --memory_gb is inf; it must be from 0.1 to 100,000 (GB of 2^30 bytes)"),
        (("--memory_gb", "1e-5"), "error: --memory_gb is 1e-05; it must be from 0.1"),
        (("--memory_gb", "nan"), "error: --memory_gb is nan; it must be from 0.1"),
        (("--memory_gb", "8", "--host_memory_gb", "inf"), "error: --host_memory_gb is inf; it must be from 0.1"),
    ],
)
def test_mistakes(flags: tuple[str, ...], message: str, cli: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words("5s_sft", *flags)) == 2
    assert capsys.readouterr().err.startswith(message)


def test_a_prompt_is_needed_for_all_but_a_plan(cli: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(TINY)
    assert stopped.value.code == 2
    assert "the following arguments are required: --prompt" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--memory_gb", "--host_memory_gb"])
def test_sizes_of_machines_are_for_plans(flag: str, cli: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([*TINY, "--prompt", "a red circle", flag, "8"])
    assert f"{flag} says for which machine --plan is made: give --plan, or leave it out" in capsys.readouterr().err


def test_processes_are_started_by_a_launcher(cli: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([*TINY, "--prompt", "a red circle", "--processes", "2"])
    assert "--processes is for --plan: several processes are started by torchrun" in capsys.readouterr().err


def test_what_nf4_needs_is_said(cli: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("--memory_gb", "24", "--host_memory_gb", "64")
    for flags, is_said in (((), False), (("--qwen_quantization",), True), (("--dit_quantization", "nf4"), True)):
        assert cli.main(words("5s_sft", *sizes, *flags)) == 0
        assert ("pip install bitsandbytes" in capsys.readouterr().out) == is_said


def test_a_run_with_a_preset(tiny: Path, cli: ModuleType, tmp_path: Path) -> None:
    """A preset's settings and those that were decided are in the facts beside the picture."""
    output = tmp_path / "a.png"
    flags = ["--prompt", "a red circle", "--video_duration", "0", "--sample_steps", "1", "--device", "cpu"]
    assert cli.main([*TINY, *flags, "--device_preset", "cpu", "--output_filename", str(output)]) == 0
    config = json.loads(output.with_suffix(".json").read_text())["config"]
    assert config["model"]["vae"]["memory_budget_gb"] == 6
    assert config["runtime"]["offload"] == "off"


def test_a_run_that_cannot_fit_ends_before_anything_is_read(
    tiny: Path, cli: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kandinsky.loading import assemble as loading
    from kandinsky.planning.machine import Machine

    monkeypatch.setattr(loading, "machine_memory", lambda device: Machine(2**28))
    monkeypatch.setattr(loading, "load_dit", lambda *_: pytest.fail("weights are read"))
    output = tmp_path / "a.png"
    flags = ["--prompt", "a red circle", "--video_duration", "0", "--device", "cpu", "--output_filename", str(output)]
    assert cli.main([*TINY, *flags]) == 2
    assert re.search(r"error: .*GB of host memory.*: runtime\.offload=on", capsys.readouterr().err)
    assert not output.exists()
