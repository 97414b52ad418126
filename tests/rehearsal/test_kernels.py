"""The kernels of Lite under NABLA build for an H100, and one that doesn't is found.

`make kernels` builds those of the other variants and cards.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
TRITON = REPOSITORY / "build" / "triton"  # where make kernels puts it
# In a process of its own, which takes itself to have a GPU; then one of them again, with a mistake in it.
BUILD = """
import dataclasses, json
from tests.rehearsal import kernels
from tests.rehearsal.whole_requests import published

build, sources = kernels.build, {}
kernels.build = lambda name, source: build(name, sources.setdefault(name, source))
built = kernels.build_all((9, 0), published("10s_sft"))
with kernels.card((9, 0)):
    name, source = max(sources.items())
    broken = list(build(name, source.replace("tl.store", "tl.restore")))
print(json.dumps([[dataclasses.asdict(kernel) for kernel in one] for one in (built, broken)]))
"""


@pytest.mark.slow
def test_kernels_build_without_a_gpu(tmp_path: Path) -> None:
    if not TRITON.is_dir() and importlib.util.find_spec("triton") is None:
        pytest.skip("no package triton: make kernels installs it into build/triton")
    paths = [str(TRITON), str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", BUILD]
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    built, broken = json.loads(done.stdout.splitlines()[-1])
    names = {kernel["name"] for kernel in built}
    assert any(name.startswith("triton_tem") for name in names)  # flex_attention's
    assert len(names) > 8 and all(kernel["error"] == "" and 0 < kernel["registers"] <= 255 for kernel in built)
    assert broken and all("CompilationError" in kernel["error"] for kernel in broken)
