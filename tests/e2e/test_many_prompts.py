"""A file of prompts through the command line: in turn, over ranks that die, and on Ray with actors that die."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from tests.limits import PATIENCE

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = REPOSITORY / "configs"
T2V = ("--config", str(CONFIGS / "config_tiny_t2v.yaml"), "--video_duration", "0")
I2I = ("--config", str(CONFIGS / "config_tiny_i2i.yaml"), "--sample_steps", "4")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
# A prompt of an image-to-image model that passes every check of its row, and fails when it is tokenized.
REFUSED = "a circle <|image_pad|> and a square"

Run = Callable[..., tuple[int, list[Path], str]]


@pytest.fixture
def run(cli: ModuleType, tiny: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Run:
    """The command line in this process: exit status, the paths it prints, and what it says."""

    def run_words(*words: object) -> tuple[int, list[Path], str]:
        caplog.clear()
        caplog.set_level("INFO")
        try:
            code = cli.main([str(word) for word in words])
        except SystemExit as error:
            code = int(str(error.code))
        output = capsys.readouterr()
        return code, [Path(line) for line in output.out.splitlines()], output.err + caplog.text

    return run_words


def facts_of(path: Path) -> dict:
    return json.loads(path.with_suffix(".json").read_text())


# ----------------------------------------------------------------------------------------------------- standard input


def test_lines_of_standard_input(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is made before the next is read, by one pipeline; what can't be is told, and costs nothing else."""
    from kandinsky.loading import assemble

    loaded, seen = [], []
    load = assemble.load_pipeline
    monkeypatch.setattr(assemble, "load_pipeline", lambda *a, **k: loaded.append(1) or load(*a, **k))

    def lines() -> Iterator[bytes]:
        yield b"a red circle\n"
        seen.append(sorted(path.name for path in tmp_path.glob("*.png")))
        yield b"\n"
        yield b'{"prompt": "a blue square", "seed": 7, "wdth": 9, "output": "square.png"}\n'
        seen.append(sorted(path.name for path in tmp_path.glob("*.png")))
        yield b'{"prompt": "a blue square", "output": "square.png"}\n'
        yield b"{not json\n"
        yield b"\xff\xfe\n"

    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=lines()))
    words = (*T2V, "--sample_steps", 1, "--output_dir", tmp_path, "--prompts_file", "-")
    code, outputs, said = run(*words)
    assert code == 1 and loaded == [1] and len(outputs) == 2 and outputs[1].name == "square.png"
    assert seen == [[outputs[0].name], [outputs[0].name, "square.png"]]
    assert "line 5: not readable as JSON" in said and "line 6: not UTF-8" in said and "3 prompts failed" in said
    assert "of row 2 (line 3) as well" in said
    assert "line 3: columns that mean nothing here are left out: wdth (did you mean width?)" in said
    assert facts_of(outputs[1])["seed"] == 7

    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=iter([b"a red circle\n"])))
    assert run(*words, "--resume")[:2] == (0, [])
    code, _, said = run(*words, "--ray_address", "local")
    assert code == 2 and "standard input" in said
    monkeypatch.setattr("sys.stdin", None)
    code, _, said = run(*words)
    assert code == 2 and "standard input, which is closed" in said


# ------------------------------------------------------------------------------------------------------------- in turn

TABLE = '''prompt,concept,seed,width,negative_prompt,output,expanded_prompt
"a red circle, on white",shape,,,,,"a circle, ""red"""
too large,,,,,,
a blue square,,7.0,144,a green cross,my/square.png,

a blue square,,,,,,
strange,,,,,,
'''


def test_each_output_is_that_of_a_run_of_its_own(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the text encoder loaded once where it is offloaded, and failures that cost nobody else anything."""
    import torch

    from kandinsky.loading import text as loading
    from kandinsky.pipelines.base import Pipeline

    generate = Pipeline.generate
    faults = {"too large": torch.OutOfMemoryError("70 GiB"), "strange": RuntimeError("a bug\nof ours")}

    def faulty_generate(pipeline: Pipeline, request: Any, *args: Any, **options: Any) -> Any:
        if error := faults.get(request.samples[0].text):
            raise error
        return generate(pipeline, request, *args, **options)

    monkeypatch.setattr(Pipeline, "generate", faulty_generate)
    loads: list[str] = []
    load = loading.load_text_encoders
    monkeypatch.setattr(
        loading,
        "load_text_encoders",
        lambda *args, device, **options: loads.append(str(device)) or load(*args, device=device, **options),
    )
    monkeypatch.chdir(tmp_path)
    Path("table.csv").write_text(TABLE)
    plain = (*T2V, "--sample_steps", 1, "--device", "cpu")
    code, paths, says = run(*plain, "--prompts_file", "table.csv", "--seed", 3, "--offload")
    assert code == 1
    assert loads == ["meta", "cpu"]
    assert [path.relative_to(tmp_path / "outputs" / "table").as_posix() for path in paths] == [
        "0001_a-red-circle-on-white_seed3.png",
        "my/square.png",
        "0004_a-blue-square_seed6.png",
    ]
    assert "columns that mean nothing here are left out: concept, expanded_prompt\n" in says
    assert "error: 2 of 5 prompts failed; --resume tries them again\n" in says
    assert '\n  row 2 (line 3) "too large": out of GPU memory\n' in says
    assert '\n  row 5 (line 7) "strange": RuntimeError: a bug of ours\n' in says
    assert says.count("Traceback") == 1  # of the bug
    assert facts_of(paths[1])["negative_prompt"] == "a green cross"

    rows = [("a red circle, on white", 3, ()), ("a blue square", 7, (144, "a green cross")), ("a blue square", 6, ())]
    for path, (prompt, seed, more) in zip(paths, rows, strict=True):
        flags = ("--width", more[0], "--negative_prompt", more[1]) if more else ()
        words = (*plain, "--prompt", prompt, "--seed", seed, *flags, "--output_filename", "single.png")
        assert run(*words)[0] == 0
        assert path.read_bytes() == Path("single.png").read_bytes()
        single, many = facts_of(Path("single.png")), facts_of(path)
        for facts in (single, many):
            del facts["seconds"], facts["config"]["runtime"]["offload"]
        assert many == single


def test_resume_leaves_out_what_is_there(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "lines.txt"
    file.write_text("one circle\n\n two circles \nthree circles\n")
    words = (*T2V, "--sample_steps", 1, "--prompts_file", file, "--output_dir", tmp_path / "out")
    code, first, _ = run(*words)
    assert code == 0 and len(first) == 3
    first[1].unlink()
    before = {path: path.stat().st_mtime_ns for path in (first[0], first[2])}

    code, paths, says = run(*words)
    assert (code, paths) == (2, [])
    assert "2 of 3 outputs are there already" in says and "--resume" in says
    code, paths, says = run(*words, "--resume")
    assert (code, paths) == (0, [first[1]])  # without --seed, too, a name is the same in every run
    assert "2 of 3 outputs are there already" in says
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert run(*words, "--resume")[:2] == (0, [])


@pytest.mark.parametrize("task", ["i2v", "i2i"])
def test_pictures_are_looked_for_beside_the_file(run: Run, tmp_path: Path, task: str) -> None:
    (tmp_path / "pictures").mkdir()
    for name, colour in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
        Image.new("RGB", (128, 128), colour).save(tmp_path / "pictures" / f"{name}.png")
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": "a circle", "seed": 1, "image": f"pictures/{name}.png"} for name in ("red", "blue")]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    plain = ("--config", CONFIGS / f"config_tiny_{task}.yaml", "--sample_steps", 1, "--negative_prompt", "a square")
    if task == "i2v":
        plain += ("--video_duration", 0.2)
    code, paths, says = run(*plain, "--prompts_file", file, "--output_dir", tmp_path / "out")
    assert code == 0, says
    for path, row in zip(paths, rows, strict=True):
        single = tmp_path / f"single{path.suffix}"
        words = ("--prompt", row["prompt"], "--seed", 1, "--image", tmp_path / row["image"])
        assert run(*plain, *words, "--output_filename", single)[0] == 0
        assert path.read_bytes() == single.read_bytes()
    assert paths[0].read_bytes() != paths[1].read_bytes()


# ------------------------------------------------------------------------------------------------------------ mistakes


def test_all_mistakes_are_told_before_anything_is_loaded(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("prompt,seed,width\na circle,1,128\n,2,128\na circle,3,130\na circle,-4,\n")
    code = (
        "import runpy, sys\n"
        f"sys.path.insert(0, {str(REPOSITORY)!r})\n"
        f"main = runpy.run_path({str(REPOSITORY / 'test.py')!r})['main']\n"
        "code = main(sys.argv[1:])\n"
        "sys.exit(99 if 'torch' in sys.modules else code)"
    )
    command = [sys.executable, "-c", code, *T2V, "--prompts_file", str(file)]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2, done.stderr
    said = done.stderr.splitlines()
    assert len(said) == 3
    assert said[0].startswith(f"error: {file}, row 2 (line 3): the prompt is empty")
    assert said[1].startswith(f"error: {file}, row 3 (line 4): width is 130;")
    assert said[2].startswith(f"error: {file}, row 4 (line 5): the seed is -4;")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--prompt", "x"), "leave --prompt out"),
        (("--output_filename", "a.png"), "in --output_dir: leave --output_filename out"),
        (("--decode_latents", "a.latents.safetensors"), "settles this: leave out --prompts_file"),
        (("--ray_actors", "2"), "give a number from 1, and --ray_address with it"),
        (("--ray_address", "local", "--ray_actors", "0"), "--ray_actors 0: give a number from 1"),
        (("--ray_gpus", "2"), "--ray_gpus 2: give a number from 1, and --ray_address with it"),
        (("--ray_address", "local", "--ray_gpus", "4"), "--ray_gpus 4: a pipeline has three models, so give 1 to 3"),
        (("--sample_steps", "0"), "error: the number of steps is 0; it must be"),  # of no row in particular
        (("--data_parallel",), "--data_parallel needs several processes: torchrun"),
        (("--prompts_file", "nowhere.txt"), "can't read nowhere.txt: No such file"),
    ],
)
def test_mistakes_in_flags(run: Run, tmp_path: Path, words: tuple[str, ...], says: str) -> None:
    file = tmp_path / "lines.txt"
    file.write_text("a circle\na square\n")
    code, paths, said = run(*T2V, "--prompts_file", file, "--output_dir", tmp_path / "out", *words)
    assert (code, paths) == (2, [])
    assert says in said and said.count("error: ") == 1
    assert not (tmp_path / "out").exists()


def test_flags_for_several_processes(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "lines.txt"
    file.write_text("a circle\na square\n")
    for flag in (("--resume",), ("--data_parallel",), ("--ray_address", "local"), ("--ray_actors", "2")):
        code, _, said = run(*T2V, "--prompt", "x", *flag)
        assert code == 2 and f"{flag[0]} is for many prompts: give --prompts_file" in said
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = (*T2V, "--prompts_file", file, "--output_dir", tmp_path / "out")
    code, _, said = run(*words)
    assert code == 2 and "2 processes for one prompts file: --data_parallel gives each a share" in said
    code, _, said = run(*words, "--data_parallel", "--ray_address", "local")
    assert code == 2 and "two ways of sharing the work" in said


# ----------------------------------------------------------------------------------------------------- killed half way


def descendants(pid: int) -> dict[int, str]:
    """The processes that a process has started, and those that they have, by id with their command lines."""
    parents, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status, name = (folder / "stat").read_text(), (folder / "cmdline").read_bytes()
        except OSError:  # gone since
            continue
        parents[int(folder.name)] = int(status.rpartition(")")[2].split()[1])
        names[int(folder.name)] = name.replace(b"\0", b" ").decode(errors="replace")
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found and child not in found}:
        found |= more
    return {child: names[child] for child in found - {pid}}


def start(folder: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
    log = (folder / "log").open("w")
    command, env = [sys.executable, *words], {**ENVIRONMENT, **environment}
    return subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log, text=True, start_new_session=True)


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str], log: Path) -> None:
    for _ in range(6000):
        if condition():
            return
        assert process.poll() is None, log.read_text()
        time.sleep(0.02)
    raise AssertionError(log.read_text())


def outputs(folder: Path) -> dict[str, tuple[int, int]]:
    """The pictures in a folder with what would change if one were made again."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("[!.]*.png")}


def write_rows(folder: Path, prompts: Sequence[str]) -> tuple[str, ...]:
    """A file of rows for the image-to-image model and the words of the command line that name it."""
    Image.new("RGB", (128, 128), (200, 30, 30)).save(folder / "red.png")
    lines = [json.dumps({"prompt": prompt, "image": "red.png"}) for prompt in prompts]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return (*I2I, "--seed", "1", "--prompts_file", "rows.jsonl", "--output_dir", "out")


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_two_ranks_killed_half_way_and_run_again(tmp_path: Path) -> None:
    """20 outputs, none made twice. The rank that has prompts that fail is done first, and doesn't end the other."""
    prompts = [f"circle number {number}" for number in range(1, 29)]
    prompts[1:16:2] = [REFUSED] * 8  # rank 1's
    words = (*write_rows(tmp_path, prompts), "--data_parallel")
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(REPOSITORY / "test.py"))

    log, out = tmp_path / "log", tmp_path / "out"
    first = start(tmp_path, *launch, *words)
    wait_for(lambda: len(outputs(out)) >= 8, first, log)
    ranks = [pid for pid, name in descendants(first.pid).items() if "--data_parallel" in name]
    assert len(ranks) == 2
    os.kill(ranks[0], signal.SIGKILL)
    assert first.wait(60) != 0
    before = outputs(out)
    assert 8 <= len(before) < 20, log.read_text()

    again = start(tmp_path, *launch, *words, "--resume")
    assert again.wait(300) == 1, log.read_text()
    assert len(outputs(out)) == 20
    assert outputs(out).items() >= before.items()
    said = log.read_text()
    assert f'error: 8 of 28 prompts failed; --resume tries them again\n  row 2 (line 2) "{REFUSED}"' in said
    assert said.count("error: 8 of 28") == 1  # once, for all ranks


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_two_actors_on_ray_one_killed_half_way(run: Run, tmp_path: Path) -> None:
    """20 outputs without a second run, each that of a run of its own; a prompt that fails is told."""
    pytest.importorskip("ray")
    prompts = [*(f"circle number {number}" for number in range(1, 21)), REFUSED]
    words = (*write_rows(tmp_path, prompts), "--ray_address", "local", "--ray_actors", "2")
    process = start(tmp_path, str(REPOSITORY / "test.py"), *words)
    log, out = tmp_path / "log", tmp_path / "out"
    wait_for(lambda: len(outputs(out)) >= 6, process, log)
    actors = [pid for pid, name in descendants(process.pid).items() if name.startswith("ray::MapWorker")]
    assert len(actors) == 2, descendants(process.pid)
    os.kill(actors[0], signal.SIGKILL)
    before = outputs(out)
    assert len(before) < 18
    assert process.wait(300) == 1, log.read_text()

    assert len(outputs(out)) == 20
    assert outputs(out).items() >= before.items()
    said = log.read_text()
    assert said.count(".png\n") == 20
    assert f'error: 1 of 21 prompts failed; --resume tries them again\n  row 21 (line 21) "{REFUSED}"' in said
    alone = ("--prompt", prompts[19], "--seed", 20, "--image", tmp_path / "red.png")
    assert run(*I2I, *alone, "--output_filename", tmp_path / "alone.png")[0] == 0
    assert next(out.glob("0020_*.png")).read_bytes() == (tmp_path / "alone.png").read_bytes()


# A pipeline that does nothing, but for one prompt that ends the process, as the machine would end one.
DEADLY = """
import functools, os, signal, sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import ray
import torch
from kandinsky.serving import batch
from kandinsky.config import load_config
from kandinsky.text.embeddings import TextEmbeddings

class Pipeline:
    config = SimpleNamespace(task="t2v")
    placement = SimpleNamespace(use=lambda component: nullcontext())

    def expand_prompts(self, request, images):
        return request

    def encode_prompts(self, request, inputs, images):
        return {"cond": [TextEmbeddings(torch.zeros(1, 1, 8), torch.zeros(1, 8), None)]}

    def generate(self, request, inputs, save_path, progress, **options):
        if request.samples[0].text == "deadly":
            with open(save_path.parent.parent / "attempts", "a") as file:
                file.write("x")
            os.kill(os.getpid(), signal.SIGKILL)
        save_path.write_text(str(len(ray.get_gpu_ids())))

path = Path("lines.txt").absolute()
path.write_text("harmless\\ndeadly\\nalso harmless\\n")
batch.ATTEMPTS = 2
jobs = batch.resolve_jobs(load_config(sys.argv[1]), path, batch.read_prompts(path), path.parent / "out")
ray.init = functools.partial(ray.init, num_gpus=4)  # Ray believes what it is told
for outcome in batch.run_on_ray(Pipeline, jobs, "local", gpus_each=2):
    output = outcome.job.output
    print(outcome.job.row.number, outcome.error, output.read_text() if output.exists() else None)
"""


@pytest.mark.slow
def test_a_prompt_that_kills_its_actor(tmp_path: Path) -> None:
    """It is given up after some attempts, and the others are made; each actor has the GPUs that were asked for."""
    pytest.importorskip("ray")
    (tmp_path / "script.py").write_text(DEADLY)
    process = start(tmp_path, "script.py", T2V[1], PYTHONPATH=str(REPOSITORY))
    assert process.wait(300) == 0, (tmp_path / "log").read_text()
    said = (tmp_path / "log").read_text().splitlines()
    assert {line for line in said if line[:2] in ("1 ", "2 ", "3 ")} == {
        "1 None 2",  # GPUs
        "2 its actor died 2 times None",
        "3 None 2",
    }
    assert (tmp_path / "attempts").read_text() == "xx"
