"""test.py under PyTorch's launchers: processes on one machine or two make what a single one makes, or end together."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.limits import PATIENCE

REPOSITORY = Path(__file__).resolve().parents[2]
CLI = REPOSITORY / "test.py"
CONFIG = REPOSITORY / "configs" / "config_tiny_t2v.yaml"
SETTINGS = (
    *("--prompt", "a red circle moves left on a white background", "--seed", "1", "--video_duration", "0.5"),
    *("--sample_steps", "6", "--magcache", "--save_latents", "--output_filename"),
)
PROMPT = 300  # seconds, on the busiest machine: left to itself, a collective waits for half an hour
TORCHRUN = ("torch.distributed.run",)
LAUNCH = ("torch.distributed.launch",)

# test.py, but for a function that does something else in one of the processes.
FAULTY = """
import importlib.util, os, signal, sys, time
sys.path.insert(0, os.path.dirname({cli!r}))
spec = importlib.util.spec_from_file_location("cli", {cli!r})
cli = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cli)
if os.environ["RANK"] == "1":
    {imports}
    def fault(*args, **options):
        {fault}
    {function} = fault
sys.exit(cli.main(sys.argv[1:]))
"""

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.skipif(os.name != "posix", reason="signals"),
]


def start(folder: Path, launcher: tuple[str, ...], script: Path, *words: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", *launcher, str(script), "--config", str(CONFIG), *words]
    return subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def on_two_machines(folder: Path, script: Path, *words: str) -> list[subprocess.Popen[str]]:
    """Two launchers that meet on loopback, with a folder and a process each."""
    port = free_port()
    launchers = []
    for node in (0, 1):
        (folder / str(node)).mkdir()
        nodes = ("--nnodes", "2", "--node_rank", str(node), "--nproc-per-node", "1")
        launcher = (*TORCHRUN, *nodes, "--master_addr", "127.0.0.1", "--master_port", port)
        launchers.append(start(folder / str(node), launcher, script, *words))
    return launchers


def finish(process: subprocess.Popen[str], timeout: float = PATIENCE) -> tuple[int, str, str]:
    """Exit status, stdout and stderr."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, out, err


@pytest.fixture(scope="module")
def alone(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one process."""
    folder = tmp_path_factory.mktemp("alone")
    command = [sys.executable, str(CLI), "--config", str(CONFIG), *SETTINGS, "a.mp4"]
    run = subprocess.run(command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    assert run.returncode == 0, run.stderr
    return folder / "a.mp4"


def check_same(video: Path, alone: Path, processes: int) -> None:
    facts, expected = (json.loads(path.with_suffix(".json").read_text()) for path in (video, alone))
    assert (facts["processes"], expected["processes"]) == (processes, 1)
    assert facts["evaluations"] == expected["evaluations"]
    assert facts["evaluations"]["skipped"] > 0
    found, reference = (load_file(path.with_suffix(".latents.safetensors"))["latents"] for path in (video, alone))
    assert (found - reference).abs().max() <= 1e-5 * reference.abs().max()
    assert abs(video.stat().st_size - alone.stat().st_size) < 0.01 * alone.stat().st_size


def test_two_machines_with_shards_of_the_weights(alone: Path, tmp_path: Path) -> None:
    launchers = on_two_machines(tmp_path, CLI, *SETTINGS, "a.mp4", "--shard_weights")
    results = [finish(launcher) for launcher in launchers]
    for status, _, err in results:
        assert status == 0, err
    assert [out for _, out, _ in results] == ["a.mp4\n", ""]
    assert "wrote a.mp4" in results[0][2] and "denoise" not in results[1][2]
    assert not list((tmp_path / "1").iterdir())  # the second process has written nothing
    check_same(tmp_path / "0" / "a.mp4", alone, 2)


def test_guidance_on_two_halves_by_the_old_launcher(alone: Path, tmp_path: Path) -> None:
    """Which hands the script a --local-rank=N beside the environment variables."""
    launcher = (*LAUNCH, "--nproc-per-node", "2", "--master_port", free_port())
    status, out, err = finish(start(tmp_path, launcher, CLI, *SETTINGS, "a.mp4", "--cfg_parallel", "2"))
    assert (status, out) == (0, "a.mp4\n"), err
    check_same(tmp_path / "a.mp4", alone, 2)


def test_number_of_processes_that_the_heads_do_not_allow(tiny: Path, tmp_path: Path) -> None:
    launcher = (*TORCHRUN, "--standalone", "--nproc-per-node", "2")
    three_heads = "model.dit_params.axes_dims=[16,24,24]"
    status, out, err = finish(start(tmp_path, launcher, CLI, *SETTINGS, "a.mp4", three_heads))
    assert status != 0 and not out
    told = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(told) == 1 and "2 processes cannot share this model's 3 attention heads" in told[0], err
    assert told[0].endswith("start 1 or 3")


FAULTS = {
    "killed": ("os.kill(os.getpid(), signal.SIGKILL)", "the connection to another process is lost"),
    "error": ("raise ValueError('there is no film in the camera')", "process 1: there is no film in the camera"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.exhaustive] * (name == "error")) for name in FAULTS]
)
def test_one_of_two_machines_dies_while_denoising(name: str, tiny: Path, tmp_path: Path) -> None:
    fault, message = FAULTS[name]
    script = tmp_path / "faulty.py"
    parts = {
        "imports": "import kandinsky.sampling.conditioning as module",
        "function": "module.Conditioning.model_input",
    }
    script.write_text(FAULTY.format(cli=str(CLI), fault=f"open('died', 'w').close(); {fault}", **parts))
    launchers = on_two_machines(tmp_path, script, *SETTINGS, "a.mp4")
    while not (tmp_path / "1" / "died").exists() and all(launcher.poll() is None for launcher in launchers):
        time.sleep(0.05)
    assert (tmp_path / "1" / "died").exists(), [finish(launcher)[2] for launcher in launchers]
    begin = time.monotonic()
    status, out, err = finish(launchers[0])
    assert time.monotonic() - begin < PROMPT
    assert status != 0 and not out
    assert err.count("error:") == 1 and f"error: {message}" in err, err  # behind the progress bar
    assert finish(launchers[1])[0] not in (0, signal.SIGKILL)
    assert not (tmp_path / "0" / "a.mp4").exists()
