"""How many processes there may be, and that they end together: who fails tells the others, who says nothing is missed.

Threads of this process stand in for the processes, a list for their ends.
"""

from __future__ import annotations

import dataclasses
import logging
import signal
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from kandinsky.config.reading import load_config
from kandinsky.config.rules import check_processes
from kandinsky.config.schema import Config
from kandinsky.request import resolve_request
from kandinsky.runtime import processes
from kandinsky.runtime.processes import Processes
from tests.limits import PATIENCE

LITE = Path(__file__).resolve().parents[2] / "configs" / "config_5s_sft.yaml"  # 28 heads


def with_heads(heads: int, **runtime: object) -> Config:
    config = load_config(LITE, [f"runtime.{name}={value}" for name, value in runtime.items()])
    dit = dataclasses.replace(config.model.dit_params, model_dim=64 * heads)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, dit_params=dit))


def test_numbers_of_processes_that_heads_allow() -> None:
    for heads, allowed in ((28, (1, 2, 4, 7, 14, 28)), (1, (1,)), (4, (1, 2, 4))):
        for count in range(1, 30):
            if count in allowed:
                check_processes(with_heads(heads), count)
            else:
                words = f"{count} processes cannot share this model's {heads} attention heads evenly: start 1"
                with pytest.raises(ValueError, match=words):
                    check_processes(with_heads(heads), count)
    with pytest.raises(ValueError, match=r"3 processes .* 4 attention heads evenly: start 1, 2 or 4$"):
        check_processes(with_heads(4), 3)


def test_two_halves_double_what_heads_allow() -> None:
    config = with_heads(28, cfg_parallel=2)
    for count in (2, 4, 8, 14, 28, 56):
        check_processes(config, count)
    with pytest.raises(ValueError, match=r"7 processes .* in two halves evenly: start 2, 4, 8, 14, 28 or 56"):
        check_processes(config, 7)


@pytest.mark.parametrize("key", ["cfg_parallel=2", "shard_weights=true"])
def test_what_takes_several_processes_is_refused_to_one(key: str) -> None:
    words = rf"runtime.{key.replace('=', ' = ')} divides the work among processes, and this is the only one.*torchrun"
    with pytest.raises(ValueError, match=words):
        check_processes(with_heads(28, **dict([key.split("=")])), 1)


def test_several_processes_may_compile() -> None:
    for wanted in ("auto", "on"):
        check_processes(with_heads(4, compile=wanted), 2)


def test_shards_do_not_go_with_adapters() -> None:
    with pytest.raises(ValueError, match=r"shard_weights .* false with model.loras"):
        load_config(LITE, ["runtime.shard_weights=true", "model.loras=[a.safetensors]"])


@pytest.mark.parametrize("other", ["offload=on", "blocks_on_gpu=4", "dit_quantization=int8", "compile=on"])
def test_shards_go_with_nothing_else_that_moves_weights(other: str) -> None:
    with pytest.raises(ValueError, match=rf"shard_weights .* false with runtime.{other.replace('=', ' = ')}"):
        load_config(LITE, ["runtime.shard_weights=true", f"runtime.{other}"])


def test_other_settings_of_guidance_that_are_refused() -> None:
    with pytest.raises(ValueError, match=r"runtime.cfg_parallel = 3 is not allowed: it must be 1 or 2"):
        load_config(LITE, ["runtime.cfg_parallel=3"])
    with pytest.raises(ValueError, match=r"guidance_weight 1 does not evaluate it"):
        resolve_request(load_config(LITE, ["runtime.cfg_parallel=2"]), "a cat", guidance_weight=1.0)


Ends = list[tuple[int, int]]  # (rank, exit status) in their order


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[dist.TCPStore]:
    monkeypatch.setattr(processes, "BEAT", 0.05)
    monkeypatch.setattr(processes, "TELLING", 0.6)
    yield dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=PATIENCE))
    for member in MEMBERS:
        member._left.set()
        member._watcher.join()
    MEMBERS.clear()


MEMBERS: list[Processes] = []


def meet(store: dist.TCPStore, size: int, ends: Ends, silence: float = PATIENCE) -> list[Processes]:
    def joined(rank: int) -> Processes:
        own = dist.TCPStore("127.0.0.1", store.port, is_master=False, timeout=timedelta(seconds=PATIENCE))
        return Processes(rank, size, rank, own, lambda status: ends.append((rank, status)), silence)

    MEMBERS[:] = [joined(rank) for rank in range(size)]
    return list(MEMBERS)


def wait_for(ends: Ends, count: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while len(ends) < count and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(ends) == count, ends


def test_an_error_ends_all_and_the_first_process_tells_it(
    store: dist.TCPStore, caplog: pytest.LogCaptureFixture
) -> None:
    ends: Ends = []
    members = meet(store, 3, ends)
    with pytest.raises(SystemExit):
        members[2].fail(ValueError("the picture is\n gone"), 2)
    wait_for(ends, 3)
    assert sorted(ends) == [(0, 1), (1, 1), (2, 2)]
    assert [record.getMessage() for record in caplog.records] == ["error: process 2: the picture is gone"]


def test_of_several_errors_the_first_is_told(store: dist.TCPStore, caplog: pytest.LogCaptureFixture) -> None:
    ends: Ends = []
    cause, victim = meet(store, 2, ends)
    for member, error in ((cause, "no space on the disk"), (victim, "gloo: connection closed by peer")):
        with pytest.raises(SystemExit):
            member.fail(RuntimeError(error))
    wait_for(ends, 2)
    assert [record.getMessage() for record in caplog.records] == ["error: no space on the disk"]


@pytest.mark.parametrize("dead", [0, 2])
def test_who_gives_no_sign_of_life_ends_the_others(
    dead: int, store: dist.TCPStore, caplog: pytest.LogCaptureFixture
) -> None:
    ends: Ends = []
    members = meet(store, 3, ends, silence=2.0)
    time.sleep(0.4)  # all have been heard of
    assert not ends
    members[dead]._left.set()  # its thread stops, and nothing is said: as a kill would have it
    begin = time.monotonic()
    wait_for(ends, 2)
    assert time.monotonic() - begin > 1.0  # and not because anybody was told
    assert {rank for rank, _ in ends} == {0, 1, 2} - {dead}
    said = {record.getMessage() for record in caplog.records}
    assert len(said) == 1 and f"process {dead} has given no sign of life for 2 s: it was killed" in said.pop()


def test_who_leaves_in_peace_is_not_missed(store: dist.TCPStore, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    ends: Ends = []
    first, second, third = meet(store, 3, ends, silence=1.5)
    second.leave()
    time.sleep(2.0)  # the first one still has something to write
    third.leave()
    first.leave()
    assert not ends and not caplog.records


def test_an_unexpected_error_is_told_with_its_traceback_and_its_process(
    store: dist.TCPStore, caplog: pytest.LogCaptureFixture
) -> None:
    ends: Ends = []
    members = meet(store, 2, ends)
    try:
        raise RuntimeError("a bug of ours")
    except RuntimeError as error:
        with pytest.raises(SystemExit):
            members[1].fail(error)
    wait_for(ends, 2)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("error: process 1: a bug of ours\nTraceback ") and said.count("Traceback") == 1
    assert said.endswith("RuntimeError: a bug of ours") and "test_processes.py" in said


def test_who_is_interrupted_ends_the_others_through_the_first(
    store: dist.TCPStore, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first process gets the signal too, and what it then does ends the rest, without a word of any."""
    ends: Ends = []
    signals: list[int] = []
    members = meet(store, 3, ends)

    def first_is_interrupted(number: int) -> None:
        signals.append(number)
        threading.Thread(target=end_first).start()

    def end_first() -> None:
        with pytest.raises(SystemExit):
            members[0].interrupted(130)

    members[0]._interrupt = first_is_interrupted
    with pytest.raises(SystemExit):
        members[2].interrupted(143)
    wait_for(ends, 3)
    assert signals == [signal.SIGTERM]
    assert sorted(ends) == [(0, 130), (1, 1), (2, 143)]
    assert not caplog.records
