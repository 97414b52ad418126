"""Full disks, folders that may not be written to or are gone, processes that died: what is there stays there."""

from __future__ import annotations

import errno
import logging
import os
import resource
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kandinsky.common import writing
from kandinsky.common.writing import Kept, WriteError, atomic_path, remove_leftovers, reserved, save_tensors
from kandinsky.outputs import latents_file, media
from kandinsky.outputs.resume import Stopped, load_run, stopped_path
from kandinsky.request import resolve_request
from kandinsky.text.embeddings import TextEmbeddings
from tests.unit.small_pipelines import build

pytestmark = pytest.mark.skipif(os.name != "posix", reason="limits, locks and permissions of POSIX")

FRAMES = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), dtype=np.uint8)
LATENTS = torch.randn(1, 3, 32, 32, 16)
RECORD = {"prompt": "a cat", "seed": 1, "versions": {}, "text": "x" * 20_000}
WRITERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "latents": ("a.latents.safetensors", lambda path: latents_file.save_latents(path, LATENTS, [RECORD])),
    "tensors": ("a.safetensors", lambda path: save_tensors(path, {"a": torch.zeros(5000), "b": torch.zeros(5000)})),
    "embeddings": (
        "a.safetensors",
        lambda path: TextEmbeddings(torch.rand(1, 100, 64), torch.rand(1, 8), None).save(path),
    ),
    "video": ("a.mp4", lambda path: media.write_video(FRAMES, path)),
    "picture": ("a.png", lambda path: media.write_image(FRAMES[0], path)),
    "record": ("a.json", lambda path: media.write_sidecar(path.with_suffix(".png"), RECORD)),
}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """64 KB, of which 56 are used; where nobody may make one, a limit on files takes its place."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True)
    if mounted.returncode == 0:
        (folder / "used").write_bytes(bytes(56 * 1024))
        try:
            yield folder
        finally:
            subprocess.run(["umount", "-l", folder], check=True)
        return
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 * 1024, before[1]))
    try:
        yield folder
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("writer", WRITERS)
def test_no_room(writer: str, small_disk: Path) -> None:
    """One line that names the file; what was there before is there, and nothing else."""
    name, write = WRITERS[writer]
    old = small_disk / name
    old.write_text('{"prompt": 1, "seed": 2, "versions": 3}')
    before = names(small_disk)
    with pytest.raises(WriteError) as told:
        write(old)
    assert str(told.value).startswith(f"can't write {old}: ") and "\n" not in str(told.value)
    assert names(small_disk) == before and old.read_text().startswith('{"prompt": 1')


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("call", ["fsync", "replace", "open"])
def test_every_error_of_the_system_is_one(
    call: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise OSError(code, os.strerror(code), "/some/hidden/name")

    monkeypatch.setattr(writing.os, call, fail)
    with pytest.raises(WriteError, match=f"^can't write {tmp_path}/a.png: {os.strerror(code)}$") as told:
        media.write_image(FRAMES[0], tmp_path / "a.png")
    monkeypatch.undo()
    assert told.value.errno == code and names(tmp_path) == set()


def test_a_folder_that_is_gone_or_none(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    with pytest.raises(WriteError, match="No such file"), atomic_path(folder / "a.bin") as temporary:
        temporary.unlink()
        folder.rmdir()
    media.write_image(FRAMES[0], folder / "a.png")  # it is made anew
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=r"Not a directory|File exists"):
        media.write_image(FRAMES[0], tmp_path / "file" / "a.png")


def test_tensors_come_back(tmp_path: Path) -> None:
    """Of every kind, of any shape, also not contiguous; aligned, readable by others, and with permissions as usual."""
    tensors: dict[str, Tensor] = {
        str(dtype): (torch.rand(3, 5) * 9).to(getattr(torch, dtype)) for dtype in writing.DTYPES
    }
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 3), "turned": torch.rand(4, 6).T}
    path = tmp_path / "a.safetensors"
    before = os.umask(0o022)
    try:
        save_tensors(path, tensors, {"who": "“we”"})
    finally:
        os.umask(before)
    found = load_file(path)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name
    assert (8 + int.from_bytes(path.read_bytes()[:8], "little")) % writing.ALIGNMENT == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


# --------------------------------------------------------------------------------------------------- of the dead


def in_a_fork(work: Callable[[], None]) -> int:
    """The status of a process that does `work`."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitpid(pid, 0)[1]


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    def die() -> None:
        with atomic_path(tmp_path / "dead.mp4") as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_fork(die) == signal.SIGKILL
    (tmp_path / ".mine.tmp").touch()  # of somebody else
    with atomic_path(tmp_path / "living.mp4") as living:
        left = names(tmp_path)
        assert len(left) == 3
        in_a_fork(lambda: remove_leftovers(tmp_path))
        assert names(tmp_path) == {".mine.tmp", living.name}
        living.write_text("whole")
    assert names(tmp_path) == {".mine.tmp", "living.mp4"}
    remove_leftovers(tmp_path / "nowhere")


def test_two_processes_are_given_two_names(tmp_path: Path) -> None:
    """And a third one that comes later, after one has died."""
    with media.reserved_output_path(tmp_path, "a cat", 1) as first:
        found = subprocess.run(
            [
                *(sys.executable, "-c"),
                "import os, signal, sys\nfrom kandinsky.outputs import media\n"
                "with media.reserved_output_path(sys.argv[1], 'a cat', 1) as path:\n"
                "    print(path, flush=True)\n    os.kill(os.getpid(), signal.SIGKILL)",
                str(tmp_path),
            ],
            capture_output=True,
            text=True,
        )
        second = Path(found.stdout.strip())
        assert (first.name, second.name) == ("a-cat_seed1.mp4", "a-cat_seed1_2.mp4"), found.stderr
        with media.reserved_output_path(tmp_path, "a cat", 1) as third:
            assert third == second  # which nobody has any more
    assert names(tmp_path) == set()
    with reserved(first) as is_ours, reserved(first) as again:
        assert is_ours and not again


def test_names_of_runs_that_were_stopped_are_taken(tmp_path: Path) -> None:
    for suffix in media.COMPANIONS:
        (tmp_path / f"a-cat_seed1{suffix}").touch()
        assert media.default_output_path(tmp_path, "a cat", 1).name == "a-cat_seed1_2.mp4"
        (tmp_path / f"a-cat_seed1{suffix}").unlink()
    assert latents_file.latents_path("a.mp4").name == f"a{media.COMPANIONS[1]}"
    assert stopped_path("a.mp4").name == f"a{media.COMPANIONS[2]}"


def test_a_record_replaces_nothing_but_records(tmp_path: Path) -> None:
    other = tmp_path / "package.json"
    for content in ('{"name": "x"}', "[" * 200_000, "", '{"prompt": {"3": "a workflow"}}'):
        other.write_text(content)
        with pytest.raises(ValueError, match=r"its record would replace .*package.json, which is none"):
            media.check_writable(tmp_path / "package.png", ".png")
        with pytest.raises(WriteError, match="not a record"):
            media.write_sidecar(tmp_path / "package.png", RECORD)
        assert other.read_text() == content
    other.unlink()
    for _ in range(2):  # its own it does
        media.check_writable(tmp_path / "package.png", ".png")
        media.write_sidecar(tmp_path / "package.png", RECORD)


# ------------------------------------------------------------------------------------------------------ whole runs


def generate(pipe: Any, path: Path, **options: Any) -> Any:
    request = resolve_request(pipe.config, "a cat", seed=1, num_steps=3)
    return pipe.generate(request, save_path=path, progress=False, keep_stopped=True, **options)


def stop_at(*steps: int) -> Callable[..., None]:
    def callback(pipe: Any, step: int, *_: Any) -> None:
        if step in steps:
            pipe.stop()

    return callback


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_a_run_that_cannot_be_kept_beside_its_output(
    tmp_path: Path, elsewhere: Path, small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Goes among temporary files, and the command that is printed names the output."""
    if resource.getrlimit(resource.RLIMIT_FSIZE)[0] == 8 * 1024:
        pytest.skip("the limit is one for all folders")
    (small_disk / "rest").write_bytes(bytes(8 * 1024))
    pipe = build("t2i")
    with pytest.raises(Stopped) as stopped:
        generate(pipe, small_disk / "a.png", callback=stop_at(1))
    (file,) = elsewhere.rglob("*.stopped.safetensors")
    assert stopped.value.path == file and stopped.value.flags.startswith(f"--resume_from {file} ")
    assert stopped.value.flags.endswith(f" --output_filename {small_disk / 'a.png'}")
    assert "No space left on device" in caplog.text and names(small_disk) == {"used", "rest"}
    build("t2i").resume(load_run(file), tmp_path / "a.png", progress=False)
    generate(build("t2i"), tmp_path / "whole.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "whole.png").read_bytes()


def test_a_run_that_cannot_be_kept_at_all_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path, *_: object) -> None:
        raise WriteError(path, OSError(errno.ENOSPC, "No space left on device"))

    generate(build("t2i"), tmp_path / "whole" / "a.png")
    with monkeypatch.context() as patch:
        patch.setattr("kandinsky.pipelines.write.save_run", full)
        generate(build("t2i"), tmp_path / "a.png", callback=stop_at(0, 1))
    assert caplog.text.count("could not be kept (can't write") == 2
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "whole" / "a.png").read_bytes()


def test_latents_that_cannot_be_kept_beside_the_output(
    tmp_path: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They lie elsewhere while they are decoded; where they can lie nowhere, decoding goes on without."""
    save_latents, refused = latents_file.save_latents, [tmp_path]

    def save(path: Path, *args: Any) -> None:
        if path.parent in refused or len(refused) > 1:
            raise WriteError(path, OSError(errno.EDQUOT, "Disk quota exceeded"))
        save_latents(path, *args)

    monkeypatch.setattr(latents_file, "save_latents", save)
    with pytest.raises(Kept) as kept, latents_file.on_disk(tmp_path / "a.png", LATENTS, [RECORD]):
        raise KeyboardInterrupt
    assert torch.equal(load_file(kept.value.path)["latents"], LATENTS)
    assert kept.value.path.is_relative_to(elsewhere) and str(tmp_path / "a.png") in kept.value.flags
    with latents_file.on_disk(tmp_path / "b.png", LATENTS, [RECORD]):
        assert list(elsewhere.rglob("b.latents.safetensors"))
    assert list(elsewhere.iterdir()) == [kept.value.path.parent]  # and nothing of b
    refused.append(elsewhere)
    done = []
    with latents_file.on_disk(tmp_path / "c.png", LATENTS, [RECORD]):
        done.append(1)
    assert done and "going on without" in caplog.text


def test_latents_whose_folder_is_removed_are_kept_again(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    with pytest.raises(RuntimeError), latents_file.on_disk(folder / "a.png", LATENTS, [RECORD]):
        (folder / "a.latents.safetensors").unlink()
        folder.rmdir()
        raise RuntimeError("decoding died")
    assert names(folder) == {"a.latents.safetensors"}


def test_a_signal_while_latents_are_written_waits_for_them(tmp_path: Path) -> None:
    with pytest.raises(Kept) as kept:
        generate(build("t2i"), tmp_path / "a.png", callback=stop_at(2))  # in the last step: none is left to stop after
    assert kept.value.path == tmp_path / "a.latents.safetensors" and names(tmp_path) == {kept.value.path.name}


def test_what_goes_with_an_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its preview goes when it is there, however that came about; what is an output itself stays."""
    pipe = build("t2i")
    for name in ("a.preview.png", "b.preview.png", "b.preview.json"):
        (tmp_path / name).touch()
    generate(pipe, tmp_path / "a.png")
    generate(pipe, tmp_path / "b.png")
    assert {name for name in names(tmp_path) if "preview" in name} == {"b.preview.png", "b.preview.json"}

    (tmp_path / "c.preview.png").touch()
    with pytest.raises(Stopped) as stopped:
        generate(pipe, tmp_path / "c.png", callback=stop_at(0))
    assert (tmp_path / "c.preview.png").exists()
    pipe.resume(load_run(stopped.value.path), tmp_path / "c.png", progress=False)
    assert not (tmp_path / "c.preview.png").exists()

    def die(*_: object) -> None:
        raise RuntimeError("no memory")

    (tmp_path / "d.preview.png").touch()
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(type(pipe), "decode", die)
        generate(pipe, tmp_path / "d.png")
    assert (tmp_path / "d.preview.png").exists()
    pipe.finish(latents_file.load_latents(tmp_path / "d.latents.safetensors"), tmp_path / "d.png")
    assert not (tmp_path / "d.preview.png").exists()


def test_an_output_whose_record_cannot_be_written_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = build("t2i")

    def full(path: Path, facts: object) -> None:
        assert not path.exists()  # no output is ever there before its record
        raise WriteError(path.with_suffix(".json"), OSError(errno.ENOSPC, "No space left on device"))

    monkeypatch.setattr(media, "write_sidecar", full)
    with pytest.raises(WriteError, match=r"a\.json: No space left"):
        generate(pipe, tmp_path / "a.png")
    assert names(tmp_path) == {"a.png", "a.latents.safetensors"}


def test_previews_that_cannot_be_written_cost_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from kandinsky.outputs.preview import LatentRGB, Previews

    (tmp_path / "file").touch()
    previews = Previews(1, LatentRGB(torch.zeros(4, 3), torch.zeros(3)), [tmp_path / "file" / "a.png"])
    with caplog.at_level(logging.WARNING):
        for step in range(2):
            previews(step, 6, torch.zeros(1, 1, 2, 2, 4))
    assert len(caplog.records) == 1 and "going on without previews" in caplog.text
