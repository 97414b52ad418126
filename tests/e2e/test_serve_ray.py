"""serve.py on a Ray of its own: jobs at the same time, a replica that is killed, and an end that keeps what runs."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

pytest.importorskip("ray.serve", reason="needs ray[serve]", exc_type=ImportError)
pytest.importorskip("openai")

from tests.e2e.test_many_prompts import descendants
from tests.e2e.test_serve import SQUARE, Served

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="signals")]


def test_two_replicas_one_killed(tmp_path: Path) -> None:
    served = Served(tmp_path, "--ray_address", "local", "--replicas", "2", models=("tiny_t2i",))
    fields = {"model": "tiny_t2i", "prompt": SQUARE, "seed": 1}
    long, other = (served.post("/v1/jobs", **{**fields, "steps": 400})["data"][0]["id"] for _ in range(2))
    for one in (long, other):  # both at the same time
        served.until(one, lambda job: job.get("step", 0) >= 2)
    served.post(f"/v1/jobs/{other}/cancel")
    assert served.ended(other)["state"] == "cancelled"
    replicas = [pid for pid, name in descendants(served.process.pid).items() if name.startswith("ray::ServeReplica")]
    assert len(replicas) == 2
    for pid in replicas:
        os.kill(pid, signal.SIGKILL)
    assert served.ended(long)["state"] == "done"  # Ray starts others
    (last,) = served.post("/v1/jobs", **{**fields, "steps": 1000})["data"]
    served.until(last["id"], lambda job: job.get("step", 0) >= 2)
    served.stop()
    assert (tmp_path / "outputs" / "served" / f"{last['id']}.stopped.safetensors").exists()
