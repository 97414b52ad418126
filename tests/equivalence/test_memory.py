"""Host memory that loading, offloading and streaming take, measured in a process of its own."""

import dataclasses
import math
from pathlib import Path

import pytest

from benchmarks.memory import MODELS, measure_in_a_process, write_checkpoint
from kandinsky.checkpoints.dit_layout import expected_dit_shapes

LITE_WITH_FEW_BLOCKS = dataclasses.replace(MODELS["lite"], num_visual_blocks=3)  # 0.5 GB


@pytest.mark.processor
@pytest.mark.slow
def test_no_second_copy_of_the_weights(tmp_path: Path) -> None:
    """All figures beyond what the interpreter had before, as shares of the weights in bfloat16.

    `rss` counts mapped pages of the file too, `anon` only what the system can't take back.
    """
    params, files = LITE_WITH_FEW_BLOCKS, (tmp_path / "bfloat16.safetensors", tmp_path / "float32.safetensors")
    weights = write_checkpoint(files[0], params)
    write_checkpoint(files[1], params, "F32")
    assert 0.5e9 < weights < files[0].stat().st_size < 1.001 * weights
    cases = [("whole", files[0]), ("whole", files[1]), ("offload", files[0]), ("1", files[0])]
    results = measure_in_a_process(cases, params)
    whole, cast, offloaded, streamed = [{name: value / weights for name, value in one.items()} for one in results]

    assert 0.9 < whole["rss"] < 1.1 and whole["anon"] < 0.1  # the parameters are the file
    assert 0.9 < cast["anon"] < 1.25  # once, and what keeps its file's precision is twice as large
    assert 0.9 < offloaded["anon"] < 1.1 and offloaded["anon_after"] < 0.05  # a second copy, and it is gone after use
    shapes = expected_dit_shapes(params)
    block = 2 * sum(math.prod(shape) for name, shape in shapes.items() if "visual_transformer_blocks.0." in name)
    buffers = 2 * block / weights
    assert 0.9 < streamed["anon"] - buffers < 1.1  # every weight once, on the host or on the device, and two buffers
    assert streamed["anon_after"] < 0.9  # the blocks that stream stay on the host
