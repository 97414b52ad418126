"""serve.py on a Ray of its own: jobs at the same time, a replica that is killed, and an end that keeps what runs."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

pytest.importorskip("ray.serve", reason="needs ray[serve]", exc_type=ImportError)
pytest.importorskip("openai")

from tests.e2e.test_many_prompts import descendants
from tests.e2e.test_serve import SQUARE, Served, none_outlives_its_test  # noqa: F401  (a fixture of every test)

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="signals")]


def test_two_replicas_one_killed(tmp_path: Path) -> None:
    served = Served(tmp_path, "--ray_address", "local", "--replicas", "2", models=("tiny_t2i",))
    fields = {"model": "tiny_t2i", "prompt": SQUARE, "seed": 1}
    ids = [served.post("/v1/jobs", **{**fields, "steps": steps})["data"][0]["id"] for steps in (150, 151)]
    for one in ids:  # both at the same time
        served.until(one, lambda job: job.get("step", 0) >= 2)
    replicas = [pid for pid, name in descendants(served.process.pid).items() if name.startswith("ray::ServeReplica")]
    assert len(replicas) == 2
    os.kill(replicas[0], signal.SIGKILL)
    for one in ids:  # Ray starts another, which goes on
        assert served.ended(one)["state"] == "done"
    (last,) = served.post("/v1/jobs", **{**fields, "steps": 1000})["data"]
    served.until(last["id"], lambda job: job.get("step", 0) >= 2)
    served.stop()
    assert (tmp_path / "outputs" / "served" / f"{last['id']}.stopped.safetensors").exists()
