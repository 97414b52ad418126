"""Blocks that stream through two buffers: the same numbers, in the right order, with no more memory than promised."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kandinsky.attention.engines import sdpa
from kandinsky.attention.nabla import NablaConfig
from kandinsky.models.dit import DiffusionTransformer3D, Execution, RunBlocks
from kandinsky.runtime.block_swap import BlockSwap, _pinned, streamed_blocks
from kandinsky.runtime.offload import Offloaded, OffloadPlacement, take_weights

CPU = torch.device("cpu")
BLOCKS = 7
NABLA = NablaConfig(P=0.6, wT=1, wH=1, wW=1)
PREFIX = "visual_transformer_blocks."


@torch.no_grad()
def random_dit(num_blocks: int = BLOCKS, **sizes: Any) -> DiffusionTransformer3D:
    """Modulations too, which start at zero and make every block the identity."""
    small = {"in_text_dim": 24, "in_text_dim2": 12, "time_dim": 16, "model_dim": 32, "ff_dim": 48, "num_text_blocks": 1}
    dit = DiffusionTransformer3D(num_visual_blocks=num_blocks, **{**small, "axes_dims": (4, 6, 6), **sizes})
    generator = torch.Generator().manual_seed(0)
    for parameter in dit.parameters():
        scale = 1 / math.sqrt(parameter.shape[1]) if parameter.dim() > 1 else 0.2
        parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return dit.eval().requires_grad_(False)


def inputs_for(dit: DiffusionTransformer3D, seed: int = 0, device: torch.device = CPU) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    text = dit.text_embeddings.in_layer.in_features, dit.pooled_text_embeddings.in_layer.in_features
    shapes = (1, 2, 16, 16, dit.in_channels), (1, 5, text[0]), (1, text[1])
    drawn = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    return (*drawn, torch.tensor([300.0 + seed], device=device))


class RecordedSwap(BlockSwap):
    """Says what is copied when: a double for the copies that a GPU would do on another stream."""

    log: list[str]

    def _copy(self, turn: int, buffer: Any) -> None:
        self.log.append(f"copy {self.streamed[turn]}")
        super()._copy(turn, buffer)


def swapped(
    dit: DiffusionTransformer3D, resident: int, device: torch.device = CPU
) -> tuple[RecordedSwap, OffloadPlacement]:
    weights = take_weights(dit)
    swap = RecordedSwap(dit.visual_transformer_blocks, weights, PREFIX, resident, device)
    swap.log = []
    return swap, OffloadPlacement({"dit": device}, {"dit": [Offloaded(dit, weights, device), swap]})


def run_logged(swap: RecordedSwap, blocks: nn.ModuleList) -> list[str]:
    """What a forward does, without computing: its copies and runs, in order."""
    swap.log.clear()
    for index, block in enumerate(swap(blocks)):
        assert block is blocks[index]
        swap.log.append(f"run {index}")
    return list(swap.log)


# --- which blocks -----------------------------------------------------------------------------------------------------


def test_blocks_that_stream_are_spread_evenly() -> None:
    assert streamed_blocks(8, 4) == (1, 3, 5, 7)
    assert streamed_blocks(8, 6) == (3, 7)
    assert streamed_blocks(8, 2) == (1, 2, 3, 5, 6, 7)
    for blocks in range(1, 13):
        for resident in range(1, blocks + 3):
            streamed = streamed_blocks(blocks, resident)
            assert len(streamed) == max(0, blocks - resident) and 0 not in streamed
            gaps = {b - a for a, b in zip((-1, *streamed), streamed, strict=False)}
            assert not gaps or max(gaps) - min(gaps) <= 1


# --- the same numbers -------------------------------------------------------------------------------------------------


@pytest.mark.processor
@torch.no_grad()
@pytest.mark.parametrize("nabla", [None, NABLA], ids=["dense", "nabla"])
@pytest.mark.parametrize("resident", [1, 2, 4, 5, 6, 7, 9])
def test_bit_for_bit_the_same_over_several_runs(resident: int, nabla: NablaConfig | None) -> None:
    dit = random_dit()
    questions = [inputs_for(dit, seed) for seed in range(3)]
    expected = [dit(*question, nabla=nabla) for question in questions]
    assert not torch.equal(expected[0], expected[1])
    swap, placement = swapped(dit, resident)
    run = functools.partial(dit, execution=Execution(hand_out=swap))
    for _ in range(2):
        with placement.use("dit"):
            for question, answer in zip(questions, expected, strict=True):
                assert torch.equal(run(*question, nabla=nabla), answer)
        assert {parameter.device.type for parameter in dit.parameters()} == {"meta"}


@torch.no_grad()
@pytest.mark.parametrize("piece", [None, 256, 1000])
def test_tensors_that_are_overwritten(piece: int | None) -> None:
    """Between forwards, before the first stage and between stages; in one piece of memory or, as if pinned, in many."""
    dit = random_dit()
    question = inputs_for(dit)
    other = copy.deepcopy(dit)
    swap, placement = swapped(dit, 2)
    run = functools.partial(dit, execution=Execution(hand_out=swap))
    assert swap.streamed == (1, 2, 4, 5, 6)
    if piece is not None:
        swap._host = [list(packed.split(piece)) for (packed,) in swap._host]
        assert all(len(pieces) > 10 for pieces in swap._host)
    generator = torch.Generator().manual_seed(1)

    def change(*names: str) -> Tensor:
        for name in names:
            parameter = other.get_parameter(f"{PREFIX}{name}")
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
            assert swap.streams(f"{PREFIX}{name}")
            swap.overwrite(f"{PREFIX}{name}", parameter.double())  # in any dtype
        return other(*question)

    before = other(*question)
    expected = change("1.feed_forward.in_layer.weight")
    assert not torch.equal(expected, before)
    with placement.use("dit"):
        assert torch.equal(run(*question), expected)
        expected = change(
            "6.cross_attention.to_key.bias", "5.self_attention.to_query.weight", "1.feed_forward.in_layer.weight"
        )
        assert torch.equal(run(*question), expected)
    expected = change("2.feed_forward.out_layer.weight", "4.visual_modulation.out_layer.weight")
    with placement.use("dit"):
        assert torch.equal(run(*question), expected)
    for name in (
        f"{PREFIX}0.feed_forward.in_layer.weight",
        f"{PREFIX}3.x",
        "text_transformer_blocks.1.x",
        "out_layer.x",
    ):
        assert not swap.streams(name)


class Quantised(nn.Module):
    """What a quantised layer looks like: no floats but the scales, buffers of odd sizes and strides, and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randint(-127, 128, (6, 4), dtype=torch.int8), requires_grad=False)
        self.register_buffer("packed", torch.randint(0, 256, (3, 5), dtype=torch.uint8).T)
        self.register_buffer("small", torch.randn(6, 4).to(torch.float8_e4m3fn))
        self.register_buffer("scale", torch.rand(()), persistent=False)
        self.register_buffer("flags", torch.rand(7) > 0.5)
        self.register_buffer("offsets", torch.randn(3, dtype=torch.float64))
        self.register_buffer("nothing", None)


def test_any_dtype_any_stride_buffers_too() -> None:
    torch.manual_seed(0)
    blocks = nn.ModuleList(Quantised() for _ in range(5))
    originals = copy.deepcopy(blocks)
    weights = take_weights(blocks)
    swap = BlockSwap(blocks, weights, "", 1, CPU)
    assert {name.split(".")[0] for name in weights} == {"0"}  # the others are taken out, there is no second copy
    offloaded = Offloaded(blocks, weights, CPU)
    for part in (offloaded, swap):
        part.begin()
    for _ in range(2):
        for block, original in zip(swap(blocks), originals, strict=True):
            state, expected = (dict([*one.named_parameters(), *one.named_buffers()]) for one in (block, original))
            assert state.keys() == expected.keys()
            for name, tensor in state.items():
                assert tensor.dtype == expected[name].dtype and tensor.stride() == expected[name].stride(), name
                assert torch.equal(tensor.double(), expected[name].double()), name
                assert tensor.data_ptr() % 64 == 0, name


def test_weights_are_cast_once_when_they_are_packed() -> None:
    dit = random_dit()
    expected = copy.deepcopy(dit).bfloat16()
    weights = take_weights(dit)
    dit.bfloat16()  # on the meta device: what the tensors shall be
    swap = BlockSwap(dit.visual_transformer_blocks, weights, PREFIX, 3, CPU)
    run = functools.partial(dit, execution=Execution(hand_out=swap))
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    half_a_block = sum(p.numel() for p in expected.visual_transformer_blocks[0].parameters()) * 2
    assert 4 * half_a_block <= swap.host_gb * 1e9 < 4.5 * half_a_block  # but for alignment, which weighs here
    for part in (Offloaded(dit, weights, CPU), swap):
        part.begin()
    question = inputs_for(dit)
    with torch.no_grad():
        assert torch.equal(run(*question), expected(*question))


# --- order, prefetch, eviction ----------------------------------------------------------------------------------------


def test_a_block_is_fetched_before_the_one_in_front_of_it_runs() -> None:
    dit = random_dit(8)
    swap, placement = swapped(dit, 4)
    with placement.use("dit"):
        first = run_logged(swap, dit.visual_transformer_blocks)
        second = run_logged(swap, dit.visual_transformer_blocks)
    assert first == [
        *("copy 1", "copy 3"),  # both buffers
        *("run 0", "run 1", "copy 5"),  # into the buffer that block 1 has left
        *("run 2", "run 3", "copy 7"),
        *("run 4", "run 5", "copy 1"),  # of the next forward
        *("run 6", "run 7", "copy 3"),
    ]
    assert second == first[2:]


@pytest.mark.parametrize("blocks", [3, 4, 5, 8, 9])
@pytest.mark.parametrize("resident", [1, 2, 3, 4])
def test_each_block_is_there_in_time_and_copied_once_and_never_while_it_is_read(blocks: int, resident: int) -> None:
    dit = random_dit(blocks)
    swap, placement = swapped(dit, resident)
    streamed = streamed_blocks(blocks, resident)
    following = dict(itertools.pairwise(streamed))
    shares = [streamed[0::2], streamed[1::2]]  # of the two buffers
    holds: list[int | None] = [None, None]
    has_run = [True, True]
    with placement.use("dit"):
        for _ in range(3):
            copied = []
            for entry in run_logged(swap, dit.visual_transformer_blocks):
                what, block = entry.split()[0], int(entry.split()[1])
                if block not in streamed:
                    assert what == "run"
                    continue
                buffer = 0 if block in shares[0] else 1
                if what == "copy":
                    assert holds[buffer] != block  # not for nothing
                    assert has_run[buffer]  # nor over one that has not had its turn
                    holds[buffer], has_run[buffer] = block, False
                    copied.append(block)
                else:
                    assert holds[buffer] == block
                    has_run[buffer] = True
                    assert following.get(block) in (None, holds[1 - buffer])  # the next one is on its way already
        # A buffer that only one block uses is filled once and for all.
        assert sorted(copied) == sorted(block for share in shares if len(share) > 1 for block in share)


def on_device(dit: DiffusionTransformer3D) -> int:
    """Bytes of the visual blocks that are not on the host: each piece of memory once."""
    storages = {
        parameter.untyped_storage().data_ptr(): parameter.untyped_storage().nbytes()
        for parameter in dit.visual_transformer_blocks.parameters()
        if not parameter.is_meta
    }
    return sum(storages.values())


@pytest.mark.parametrize("resident", [1, 3, 6])
def test_never_more_blocks_on_the_device_than_those_that_stay_and_two(resident: int) -> None:
    dit = random_dit(model_dim=64, ff_dim=256)  # large enough for alignment not to matter
    block = sum(p.nbytes for p in dit.visual_transformer_blocks[0].parameters())
    swap, placement = swapped(dit, resident)
    host = {storage.data_ptr() for pieces in swap._host for storage in pieces}
    assert on_device(dit) == 0
    with placement.use("dit"):
        for _ in swap(dit.visual_transformer_blocks):
            assert resident * block < on_device(dit) <= 1.05 * min(resident + 2, BLOCKS) * block
            pointers = {p.untyped_storage().data_ptr() for p in dit.visual_transformer_blocks.parameters()}
            assert not pointers & host
    assert on_device(dit) == 0


# --- accidents --------------------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


@torch.no_grad()
@pytest.mark.parametrize("at", range(BLOCKS))
def test_an_error_in_a_block_leaves_a_usable_model(at: int) -> None:
    dit = random_dit()
    question = inputs_for(dit)
    expected = dit(*question)
    swap, placement = swapped(dit, 2)
    run = functools.partial(dit, execution=Execution(hand_out=swap))
    calls = 0

    def failing(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == at + 1:
            raise Stop
        return sdpa(*args, **kwargs)

    with placement.use("dit"):
        with pytest.raises(Stop) as kept:  # with its frames, and in them the iterator that was left in the middle
            run(*question, execution=Execution(attention=failing, hand_out=swap))
        assert torch.equal(run(*question), expected)
        assert torch.equal(run(*question), expected)
    assert kept.value.__traceback__ is not None


@torch.no_grad()
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("at", range(8))
def test_an_error_in_a_copy_leaves_a_usable_model(at: int, error: type[BaseException]) -> None:
    dit = random_dit()
    question = inputs_for(dit)
    expected = dit(*question)
    swap, placement = swapped(dit, 2)
    run = functools.partial(dit, execution=Execution(hand_out=swap))
    calls = 0

    class Torn:
        """Half of the block's bytes, then an error."""

        def __init__(self, pieces: list[Tensor]) -> None:
            self.pieces = pieces

        def __iter__(self) -> Iterator[Tensor]:
            nonlocal calls
            calls += 1
            if calls == at + 1:
                yield self.pieces[0][: len(self.pieces[0]) // 2]
                raise error
            yield from self.pieces

    whole = swap._host
    swap._host = [Torn(pieces) for pieces in whole]  # type: ignore[misc]
    with placement.use("dit"):
        with pytest.raises(error):
            for _ in range(2):
                run(*question)
        assert torch.equal(run(*question), expected)
    with placement.use("dit"):
        assert torch.equal(run(*question), expected)


@torch.no_grad()
def test_a_forward_that_is_left_early_does_not_disturb_the_next() -> None:
    dit = random_dit()
    question = inputs_for(dit)
    expected = dit(*question)
    swap, placement = swapped(dit, 2)
    run = functools.partial(dit, execution=Execution(hand_out=swap))
    with placement.use("dit"):
        for stop in range(BLOCKS):
            for index, _ in enumerate(swap(dit.visual_transformer_blocks)):
                if index == stop:
                    break
            assert torch.equal(run(*question), expected)


# --- with what else there is ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_an_evaluation_that_a_cache_skips_copies_nothing() -> None:
    dit = random_dit()
    question = inputs_for(dit)
    swap, placement = swapped(dit, 2)
    run = functools.partial(dit, execution=Execution(hand_out=swap))

    def skip(run_blocks: RunBlocks) -> RunBlocks:
        return lambda hidden, inputs: hidden + 1

    def pass_on(run_blocks: RunBlocks) -> RunBlocks:
        return lambda hidden, inputs: run_blocks(hidden, inputs) + 1

    cached, skipping = (Execution(hand_out=swap).within(around) for around in (pass_on, skip))

    with placement.use("dit"):
        expected, shifted = run(*question), run(*question, execution=cached)
        swap.log.clear()
        run(*question, execution=skipping)
        assert swap.log == []
        assert torch.equal(run(*question), expected)
        assert torch.equal(run(*question, execution=cached), shifted) and not torch.equal(shifted, expected)


@torch.no_grad()
@pytest.mark.parametrize("wrapped", [False, True], ids=["in place", "wrapped"])
def test_compiled_blocks_share_one_graph_over_all_stages(wrapped: bool) -> None:
    """Weights that move are no reason to compile again; here without code generation, which sees the same guards."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    dit = random_dit()
    question = inputs_for(dit)
    expected = dit(*question)
    swap, placement = swapped(dit, 3)
    run = functools.partial(dit, execution=Execution(hand_out=swap))
    counter = CompileCounter()
    for index, block in enumerate(dit.visual_transformer_blocks):
        if wrapped:
            dit.visual_transformer_blocks[index] = torch.compile(block, backend=counter, fullgraph=True)  # type: ignore[assignment]
        else:
            block.compile(backend=counter, fullgraph=True)
    for _ in range(2):
        with placement.use("dit"):
            for _ in range(2):
                assert torch.equal(run(*question), expected)
    assert counter.frame_count == 1
    torch._dynamo.reset()


# --- on a GPU ---------------------------------------------------------------------------------------------------------

GPU_SIZES: dict[str, Any] = {"model_dim": 1024, "ff_dim": 4096, "time_dim": 256, "axes_dims": (16, 24, 24)}


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("resident", [1, 3, 4])
def test_on_a_gpu_bit_for_bit_the_same_within_its_memory(resident: int) -> None:
    """Blocks of 20 million weights, small inputs: copies are far slower than the blocks that they must not overtake."""
    device = torch.device("cuda:0")
    dit = random_dit(num_blocks=10, **GPU_SIZES)
    questions = [inputs_for(dit, seed, device) for seed in range(4)]
    on_gpu = copy.deepcopy(dit).to(device)
    expected = [on_gpu(*question) for question in questions]
    block = sum(p.nbytes for p in dit.visual_transformer_blocks[0].parameters())
    others = sum(p.nbytes for p in dit.parameters()) - 10 * block
    del on_gpu
    swap, placement = swapped(dit, resident, device)
    run = functools.partial(dit, execution=Execution(hand_out=swap))
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    for _ in range(2):
        with placement.use("dit"):
            answers = [run(*question) for question in questions]  # queued without waiting
            for answer, right in zip(answers, expected, strict=True):
                assert torch.equal(answer, right)
    peak = torch.cuda.max_memory_allocated(device) - before
    assert (resident + 2) * block < peak < (resident + 2) * block + others + 0.5 * block  # the half: activations
    del answers, answer
    assert torch.cuda.memory_allocated(device) - before < 2**20


@pytest.mark.gpu
@torch.no_grad()
def test_on_a_gpu_an_error_leaves_a_usable_model() -> None:
    device = torch.device("cuda:0")
    dit = random_dit(num_blocks=6, **GPU_SIZES)
    question = inputs_for(dit, 0, device)
    swap, placement = swapped(dit, 2, device)
    run = functools.partial(dit, execution=Execution(hand_out=swap))
    calls = 0

    def failing(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise Stop
        return sdpa(*args, **kwargs)

    with placement.use("dit"):
        expected = run(*question)
        with pytest.raises(Stop):
            run(*question, execution=Execution(attention=failing, hand_out=swap))
        assert torch.equal(run(*question), expected)


@pytest.mark.gpu
def test_pinned_pieces_hold_the_bytes_and_little_more() -> None:
    packed = torch.randint(0, 256, (5 * 2**20 + 12345,), dtype=torch.uint8)
    pieces = _pinned(packed)
    assert all(piece.is_pinned() for piece in pieces) and torch.equal(torch.cat(pieces), packed)
    assert [len(piece) for piece in pieces] == [4 * 2**20, 2**20, 12345]
