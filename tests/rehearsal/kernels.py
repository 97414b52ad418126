"""The Triton kernels of a run, compiled ahead of time for GPUs that are not there: what cannot build is known so.

    python -m tests.rehearsal.kernels [80 90 100] [--variants 5s_sft 10s_sft]

PyTorch's compiler makes its code of graphs whose tensors are on "cuda:0" and have no numbers: the graph that
`--compile` captures of a visual block at its published size (graphs.py), those of `--compile elementwise`
(elementwise.py), and NABLA's flex_attention. Of that code every Triton kernel is compiled by `triton.compile`, with
each of the tiles that the compiler would try, to machine code by NVIDIA's ptxas, which the package triton brings. That
says that they build and fit into registers and shared memory, not that they compute the right numbers, and not how
fast. Products and dense attention are calls of libraries, not kernels.

The package triton has to be there: `make kernels` installs it into a folder of its own, because no CPU build of PyTorch
asks for it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import logging
import math
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kandinsky.attention.block_sparse import make_block_mask, triton_options
from kandinsky.common.limits import BLOCK_TOKENS
from kandinsky.config.schema import Config
from kandinsky.planning.plan import default_request
from tests.rehearsal.elementwise import stretches
from tests.rehearsal.fake_gpu import _copy_into, _Functions
from tests.rehearsal.graphs import Graph, capture, methods_for_cuda, on_gpu
from tests.rehearsal.whole_requests import published

# Both widths of videos, dense and under NABLA, and the pictures'.
VARIANTS = ["5s_sft", "10s_sft", "5s_t2v_pro", "10s_t2v_pro", "t2i"]
# Of a compute capability: a card that has it, its multiprocessors, and its shared memory for a block in KiB.
CARDS = {(8, 0): ("A100", 108, 163), (8, 9): ("RTX 4090", 128, 99), (9, 0): ("H100", 132, 227),
         (10, 0): ("B200", 148, 227), (12, 0): ("RTX 5090", 170, 99)}  # fmt: skip

HEAD = "card | variant | kernels | with tiles | fail | shared memory, KiB | registers | with a stack | seconds"


@dataclass
class Kernel:
    """A kernel with one set of tiles. error: why it does not build, "" where it does."""

    name: str
    tiles: str
    registers: int = 0  # of a thread
    stack: int = 0  # bytes of a thread's, where what does not fit into registers goes
    shared: int = 0  # bytes of a block
    error: str = ""


@contextlib.contextmanager
def card(capability: tuple[int, int]) -> Iterator[None]:
    """PyTorch's compiler takes this machine to have a GPU of that compute capability."""
    from torch._dynamo import device_interface
    from torch._inductor.runtime import triton_helpers
    from torch._inductor.runtime.hints import DeviceProperties
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    name, processors, shared = CARDS[capability]
    properties = SimpleNamespace(
        name=name, major=capability[0], minor=capability[1], multi_processor_count=processors, warp_size=32,
        total_memory=80 * 2**30, regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048,
        max_threads_per_block=1024, shared_memory_per_block=48 * 1024, shared_memory_per_block_optin=shared * 1024,
        L2_cache_size=50 * 2**20, gcnArchName="",
    )  # fmt: skip
    stand_ins: dict[str, Any] = {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
        "get_device_capability": lambda device=None: capability, "get_device_name": lambda device=None: name,
        "get_device_properties": lambda device=None: properties, "is_bf16_supported": lambda *_, **__: True,
        "synchronize": lambda device=None: None, "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda *_: None, "_lazy_init": lambda: None,
        "_exchange_device": lambda index: 0, "_maybe_exchange_device": lambda index: 0,
    }  # fmt: skip
    create: Any = DeviceProperties.create
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    utils = SimpleNamespace(get_device_properties=lambda device: {"max_shared_mem": shared * 1024})
    driver.set_active(SimpleNamespace(get_current_target=lambda: target, get_current_device=lambda: 0, utils=utils))
    with contextlib.ExitStack() as stack:
        for attribute, stand_in in stand_ins.items():
            stack.enter_context(mock.patch.object(torch.cuda, attribute, stand_in))
        interface = device_interface.CudaInterface
        of_interface = staticmethod(stand_ins["get_device_properties"])
        stack.enter_context(mock.patch.object(interface, "get_device_properties", of_interface))
        stack.enter_context(mock.patch.object(interface.Worker, "get_device_properties", of_interface))
        stack.enter_context(mock.patch.object(torch.version, "cuda", "13.0"))
        stack.enter_context(mock.patch.object(torch._C, "_cuda_getCurrentRawStream", lambda _: 0, create=True))
        stack.enter_context(mock.patch.object(triton_helpers, "set_driver_to_gpu", lambda: None))
        # A CPU build's own refuses tensors of CUDA, and flex_attention calls it where no mode sees it.
        stack.enter_context(mock.patch.object(Tensor, "copy_", _copy_into))
        create.cache_clear()
        try:
            yield
        finally:
            create.cache_clear()


def block_graph(graph: Graph) -> tuple[Any, list[Tensor]]:
    """A captured graph of a visual block in PyTorch's basic operations, and its inputs: at the length of the last
    prompt that it was captured with, while a run leaves that open."""
    graph.move_to_gpu()
    inputs = [on_gpu(value) if isinstance(value, Tensor) else value for value in graph.inputs]
    places = [place for place, value in enumerate(inputs) if isinstance(value, Tensor)]

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = list(inputs)
        for place, tensor in zip(places, tensors, strict=True):
            given[place] = tensor
        return tuple(graph.module(*given))

    tensors = [inputs[place] for place in places]
    return _traced(run, tensors), tensors


def elementwise_graphs(config: Config) -> dict[str, tuple[Any, list[Tensor]]]:
    """What `--compile elementwise` makes of a visual block, by name, at the published number of tokens."""
    graphs: dict[str, tuple[Any, list[Tensor]]] = {}
    with mock.patch.object(torch.compiler, "is_compiling", lambda: True):  # as Dynamo would have it
        for name, stretch in stretches(config).items():
            graphs[name] = _traced(lambda *inputs, run=stretch.run: (run(*inputs),), stretch.inputs), stretch.inputs
    return graphs


def flex_graph(config: Config, capability: tuple[int, int]) -> tuple[Any, list[Tensor]]:
    """NABLA's attention as the code calls it, with the tiles that it asks for on that card."""
    from torch._higher_order_ops.flex_attention import flex_attention
    from torch.nn.attention.flex_attention import _apply_kernel_options, _identity

    params = config.model.dit_params
    tokens = math.prod(default_request(config).latent_size) // math.prod(params.patch_size)
    heads, blocks, head_dim = params.model_dim // params.head_dim, tokens // BLOCK_TOKENS, params.head_dim
    inputs = [torch.empty(1, heads, tokens, head_dim, dtype=torch.bfloat16, device="cuda:0") for _ in range(3)]
    inputs += [torch.empty(1, heads, *shape, dtype=torch.int32, device="cuda:0")
               for shape in ((blocks,), (blocks, blocks))]  # fmt: skip
    options = triton_options(head_dim, 2, CARDS[capability][2] * 1024)

    def run(q: Tensor, k: Tensor, v: Tensor, counts: Tensor, indices: Tensor) -> tuple[Tensor]:
        mask = make_block_mask(counts, indices)
        all_options = _apply_kernel_options(q, k, v, False, options)
        out, *_ = flex_attention(q, k, v, _identity, mask.as_tuple(), head_dim**-0.5, all_options)
        return (out,)

    return _traced(run, inputs), inputs


def _traced(run: Callable[..., tuple[Tensor]], inputs: list[Tensor]) -> Any:
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    with torch.no_grad(), _Functions():
        return make_fx(torch.func.functionalize(run), decomposition_table=select_decomp_table())(*inputs)


def kernels_of(graph: Any, inputs: list[Tensor]) -> dict[str, str]:
    """The source of every Triton kernel in the code that PyTorch's compiler makes of a graph, by name."""
    from torch._inductor import compile_fx, config
    from torch._inductor.graph import GraphLowering

    class Enough(BaseException):  # what the compiler wraps errors in, it leaves alone
        pass

    code: list[str] = []

    def keep(lowering: Any) -> None:
        wrapper, _ = lowering.codegen()
        code.append(wrapper.value)
        raise Enough

    with mock.patch.object(GraphLowering, "compile_to_module", keep), \
            config.patch(fx_graph_cache=False, compile_threads=1, max_autotune=False), \
            contextlib.suppress(Enough):  # fmt: skip
        compile_fx.compile_fx_inner(graph, inputs)
    assert code, "PyTorch's compiler made no code"
    found = re.findall(r"^(\w+) = async_compile\.triton\('\w+', '''(.*?)'''", code[0], re.DOTALL | re.MULTILINE)
    return dict(found)


def build(name: str, source: str) -> Iterator[Kernel]:
    """A kernel with each of the tiles that would be tried, compiled down to machine code."""
    from torch._inductor import config
    from torch._inductor.codecache import PyCodeCache

    logging.getLogger("torch._inductor.runtime.triton_heuristics").disabled = True  # of whole kernels that fail
    tuner = getattr(PyCodeCache.load(source), name)
    for tiles in tuner.configs:
        kernel = Kernel(name, str(tiles.kwargs))
        try:
            with config.patch(use_static_triton_launcher=False):
                binary = tuner._precompile_config(tiles).kernel
            kernel.shared = binary.metadata.shared
            kernel.registers, kernel.stack = resources(binary.asm["cubin"])
        except Exception as error:
            kernel.error = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        yield kernel


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread and bytes of its stack, as NVIDIA's cuobjdump reads them off the machine code."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        words = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", words)
    assert found is not None, words
    return int(found[1]), int(found[2])


def build_all(capability: tuple[int, int], config: Config) -> list[Kernel]:
    """Every kernel of a variant's visual blocks, and of NABLA's attention where it has that, for a card."""
    built: list[Kernel] = []
    with card(capability):
        captured = capture(config)
        with FakeTensorMode(allow_non_fake_inputs=True), methods_for_cuda():
            graphs = [block_graph(graph) for graph in captured]
            graphs += elementwise_graphs(config).values()
            if config.model.attention.type == "nabla":
                graphs.append(flex_graph(config, capability))
            sources = [source for graph, inputs in graphs for source in kernels_of(graph, inputs).items()]
        for name, source in sources:
            built += build(name, source)
    limit = CARDS[capability][2] * 1024
    for kernel in built:
        if kernel.shared > limit:
            kernel.error = f"{kernel.shared} bytes of shared memory, and a block has {limit}"
    return built


def main() -> None:
    """A table of what builds; exit with 1 where anything does not. Each card has a process of its own: PyTorch and
    Triton remember much of the first one that they see."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    names = [f"{major}{minor}" for major, minor in CARDS]
    parser.add_argument("targets", nargs="*", default=["80", "90", "100"], help=f"of {', '.join(names)}")
    parser.add_argument("--variants", nargs="+", default=VARIANTS, help="names of configs, like 5s_sft")
    parser.add_argument("--no-head", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    unknown = [target for target in args.targets if target not in names]
    if unknown:
        parser.error(f"compute capability {unknown[0]} is not one of {', '.join(names)}")
    if importlib.util.find_spec("triton") is None:
        sys.exit("no package triton: make kernels installs it into build/triton")
    if not args.no_head:
        print(f"| {HEAD} |\n|{'---|' * (HEAD.count('|') + 1)}", flush=True)
    if len(args.targets) > 1:
        command = [sys.executable, "-m", "tests.rehearsal.kernels", "--no-head", "--variants", *args.variants, "--"]
        sys.exit(max(subprocess.call([*command, target]) for target in args.targets))
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\._inductor")
    (target,) = args.targets
    capability = (int(target[:-1]), int(target[-1]))
    failed = []
    for variant in args.variants:
        begin = time.perf_counter()
        built = build_all(capability, published(variant))
        wrong = [kernel for kernel in built if kernel.error]
        cells = [f"{CARDS[capability][0]}, sm_{target}", variant,
                 sum(1 for _ in itertools.groupby(built, key=lambda kernel: kernel.name)), len(built), len(wrong),
                 f"{max(kernel.shared for kernel in built) / 1024:.0f} of {CARDS[capability][2]}",
                 max(kernel.registers for kernel in built), sum(kernel.stack > 0 for kernel in built),
                 f"{time.perf_counter() - begin:.0f}"]  # fmt: skip
        print(f"| {' | '.join(map(str, cells))} |", flush=True)
        failed += [f"sm_{target} {variant}: {kernel.name} {kernel.tiles}: {kernel.error}" for kernel in wrong]
    if failed:
        print("\n".join(["", *failed]))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
