"""The planner's prediction of every stage's memory is within 15 % of what a run of it takes.

Of small random models, by the resident set, in a process of its own: see benchmarks/plan.py, which has more rows.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from benchmarks.plan import MB, ROWS, Row, compare
from tests.limits import EVERYTHING

LARGEST_ERROR = 0.15
GRID = (
    Row("float32"),
    Row("bfloat16", ("dit_quantization=int8",)),
    Row("bfloat16", task="t2i", width=512, height=512, seconds=0),
    Row("bfloat16", ("offload=on", "blocks_on_gpu=1"), lora=True),
    *([Row("bfloat16", ("offload=on", "blocks_on_gpu=1"))] if EVERYTHING else []),  # the one before has an adapter too
)


@pytest.mark.processor
@pytest.mark.slow
def test_prediction_is_what_is_measured(tmp_path: Path) -> None:
    if not Path("/proc/self/clear_refs").exists() or not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the peak of the resident set is measured on Linux")
    from benchmarks.plan import write_models

    write_models(tmp_path)
    found = list(compare([ROWS.index(row) for row in GRID], tmp_path))
    lines = [
        f"{expected / MB:7.1f} MB predicted, {peak / MB:7.1f} measured, {expected / peak - 1:+.0%}: {name}, {row}"
        for row, name, expected, peak in found
    ]
    sys.stdout.write("\n".join(lines))  # what pytest -rP shows
    assert {(row, name) for row, name, _, _ in found} == {
        (row, name) for row in GRID for name in ("encode text", "denoise", "decode")
    }
    off = [
        line
        for line, (_, _, expected, peak) in zip(lines, found, strict=True)
        if abs(expected / peak - 1) > LARGEST_ERROR
    ]
    assert not off, "\n".join(off)
