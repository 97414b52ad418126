"""A GPU that is not there: tensors of "cuda:0" without numbers, whose every operation is looked at.

PyTorch's FakeTensorMode knows shapes, dtypes and devices of results, and refuses to mix the host's and the device's
tensors. To that this adds what a CPU build of PyTorch lacks for such tensors; stand-ins for torch.cuda, with streams
and events whose order is checked by vector clocks; an allocator that only counts; and counts of
operations and of the bytes that they move. What is found wrong is in `FakeGPU.faults`, a sentence each.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from tests.rehearsal.traffic import bytes_moved

aten = torch.ops.aten
ALLOCATED_IN = 512  # bytes, of which CUDA's allocator gives out multiples
NABLA_DENSITY = 0.2  # what flex_attention is taken to compute of all blocks
Clock = dict[str, int]  # of each stream, how many of its operations are known to be over


@dataclass
class Stream:
    """Work in its order; `clock` is what is over when its next operation begins."""

    gpu: FakeGPU
    name: str
    clock: Clock = field(default_factory=dict)

    def wait_stream(self, other: Stream) -> None:
        _merge(self.clock, other.clock)

    def wait_event(self, event: Event) -> None:
        _merge(self.clock, event.clock)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event(self.gpu)
        event.clock = dict(self.clock)
        return event

    def synchronize(self) -> None:
        _merge(self.gpu.host.clock, self.clock)


class Event:
    def __init__(self, gpu: FakeGPU, **_: Any) -> None:
        self.gpu = gpu
        self.clock: Clock = {}

    def record(self, stream: Stream | None = None) -> None:
        (stream or self.gpu.current).record_event(self)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self.gpu.current).wait_event(self)

    def synchronize(self) -> None:
        _merge(self.gpu.host.clock, self.clock)

    def query(self) -> bool:
        return True


class Thread:
    """Stands in for the executor of one thread: does what it is given at once, but as if at any time before its result
    is asked for. What it does knows nothing of what the host learns later, and the host nothing of it before that."""

    def __init__(self, gpu: FakeGPU) -> None:
        self.gpu = gpu
        self.stream = gpu.new_stream()

    def submit(self, function: Callable[..., Any], *args: Any) -> Any:
        host, self.gpu.host = self.gpu.host, self.stream
        _merge(self.stream.clock, host.clock)
        try:
            value = function(*args)
        finally:
            self.gpu.host = host
        return mock.Mock(result=functools.partial(self._learn, value, dict(self.stream.clock)))

    def _learn(self, value: Any, clock: Clock) -> Any:
        _merge(self.gpu.host.clock, clock)
        return value

    def shutdown(self, wait: bool, cancel_futures: bool) -> None:
        _merge(self.gpu.host.clock, self.stream.clock)


def _merge(clock: Clock, other: Clock) -> None:
    for name, tick in other.items():
        clock[name] = max(clock.get(name, 0), tick)


@dataclass
class Memory:
    """A storage: who wrote it last and who has read it since, as (stream, tick)."""

    num_bytes: int
    place: str  # "device", "pinned" or "host"
    stream: str  # that it was allocated on
    written: tuple[str, int] | None = None
    read: Clock = field(default_factory=dict)


class FakeGPU:
    """`with FakeGPU(...) as gpu:` and everything inside sees one GPU.

    memory: bytes that it has for tensors. capability: the compute capability it says it has.
    """

    def __init__(self, memory: float = 80 * 2**30, capability: tuple[int, int] = (9, 0)) -> None:
        self.memory, self.capability = int(memory), capability
        self.faults: list[str] = []
        self.flops: Counter[str] = Counter()  # by the dtype of the operands
        self.kernels: Counter[str] = Counter()
        self.moved: Counter[str] = Counter()  # bytes read and written on the device, by operation
        self.calls: Counter[str] = Counter()  # of the same operations
        self.syncs: list[str] = []  # what the host waited for, with the label of that moment
        self.label = ""
        self.live = self.peak = self.out_of_memory = 0
        self._attempt_failed = False
        self.host, self.default = Stream(self, "host"), Stream(self, "default")
        self.current = self.default
        self._streams = 0
        self._memories: dict[int, Memory] = {}
        self._stack = contextlib.ExitStack()

    # --- what the code under rehearsal sees ---------------------------------------------------------------------------

    def __enter__(self) -> FakeGPU:
        cuda = torch.cuda
        properties = mock.Mock(shared_memory_per_block_optin=227 * 1024, multi_processor_count=132)
        for name, stand_in in {
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "set_device": lambda device: None,
            "get_device_capability": lambda device=None: self.capability,
            "get_device_properties": lambda device=None: properties,
            "get_device_name": lambda device=None: "rehearsed GPU",
            "mem_get_info": lambda device=None: (self.memory - self.live, self.memory),
            "memory_allocated": lambda device=None: self.live,
            "memory_reserved": lambda device=None: self.live,
            "max_memory_allocated": lambda device=None: self.peak,
            "reset_peak_memory_stats": lambda device=None: self.reset_peak(),
            "empty_cache": self.empty_cache,
            "synchronize": lambda device=None: self.synchronize("synchronize"),
            "current_stream": lambda device=None: self.current,
            "default_stream": lambda device=None: self.default,
            "stream": self.on_stream,
            "Stream": self.new_stream,
            "Event": lambda **options: Event(self, **options),
        }.items():
            self._stack.enter_context(mock.patch.object(cuda, name, stand_in))
        self._stack.enter_context(mock.patch.object(torch.version, "cuda", "rehearsed"))
        from kandinsky.attention import block_sparse
        from kandinsky.runtime import staging

        self._stack.enter_context(mock.patch.object(staging, "make_thread", lambda: Thread(self)))
        self._stack.enter_context(mock.patch.object(block_sparse, "compiled_flex_attention", lambda: self.flex))
        self._stack.enter_context(mock.patch.object(torch.nn.Module, "_apply", _apply))
        self._stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        self._stack.enter_context(_Operations(self))
        self._stack.enter_context(_Functions())
        self._stack.enter_context(torch.no_grad())
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def new_stream(self, *_: Any, **__: Any) -> Stream:
        self._streams += 1
        return Stream(self, f"stream {self._streams}", dict(self.host.clock))

    @contextlib.contextmanager
    def on_stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def synchronize(self, what: str) -> None:
        self.syncs.append(f"{what} in {self.label}")
        _merge(self.host.clock, self.current.clock)
        _merge(self.host.clock, self.default.clock)

    def flex(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, options: Any) -> Tensor:
        """What flex_attention takes and makes, at a density that is assumed."""
        assert mask.full_kv_indices.device == q.device and options is not None
        self.kernels["flex_attention"] += 1
        self.flops[str(q.dtype)] += int(4 * NABLA_DENSITY * q.numel() * k.shape[-2])
        return torch.empty_like(q)

    def empty_cache(self) -> None:
        """After an attempt that ran out of memory: the peak is that of the one that goes better."""
        if self._attempt_failed:
            self._attempt_failed = False
            self.reset_peak()

    def reset_peak(self) -> None:
        self.peak = self.live

    def fault(self, sentence: str) -> None:
        text = f"{sentence}, in {self.label}" if self.label else sentence
        if text not in self.faults:
            self.faults.append(text)

    # --- what each operation means ------------------------------------------------------------------------------------

    def memory_of(self, tensor: Tensor, pinned: bool = False) -> Memory:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._memories:
            on_device = tensor.device.type == "cuda"
            size = -(-storage.nbytes() // ALLOCATED_IN) * ALLOCATED_IN if on_device else storage.nbytes()
            place = "device" if on_device else "pinned" if pinned else "host"
            self._memories[key] = Memory(size, place, self.current.name)
            if on_device:
                if self.live + size > self.memory:
                    del self._memories[key]
                    self.out_of_memory += 1
                    self._attempt_failed = True
                    raise torch.OutOfMemoryError(f"{size} bytes more than {self.live} of {self.memory}")
                self.live += size
                self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.freed, key)
        return self._memories[key]

    def freed(self, key: int) -> None:
        memory = self._memories.pop(key)
        uses = [*memory.read.items(), *([memory.written] if memory.written else [])]
        if memory.place == "device":
            self.live -= memory.num_bytes
            # The allocator gives it out again to the stream that it was made on, which has to know that it is free.
            clocks = {"default": self.default.clock}.get(memory.stream, self.host.clock)
            if any(clocks.get(name, 0) < tick and self.host.clock.get(name, 0) < tick for name, tick in uses
                   if name not in (memory.stream, "host")):  # fmt: skip
                self.fault("memory on the device is free for reuse while another stream still works with it")
        elif memory.place == "pinned" and any(
            self.host.clock.get(name, 0) < tick for name, tick in uses if name != "host"
        ):
            self.fault("pinned memory is freed while a copy out of it may still be under way")

    def operation(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Book an operation that has run: its memory, its order, its work."""
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.device.type != "meta"]
        results = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.device.type != "meta"]
        on_device = [x for x in (*tensors, *results) if x.device.type == "cuda"]
        pinned = bool(kwargs.get("pin_memory"))
        if func is torch.ops.prim.device.default:  # a question, and no work
            return
        if func.is_view:
            for x in results:
                self.memory_of(x)
            return
        written: list[Tensor] = []
        arguments = func._schema.arguments
        given = [*zip(arguments, args, strict=False), *((a, kwargs[a.name]) for a in arguments if a.name in kwargs)]
        for argument, value in given:
            if argument.alias_info is not None and argument.alias_info.is_write:
                written += [x for x in tree_leaves(value) if isinstance(x, Tensor)]
        ids = {id(x) for x in written}
        read = [x for x in tensors if id(x) not in ids]
        for x in on_device:
            if x.dtype == torch.float64 and any(x is y for y in results):
                self.fault(f"float64 on the device ({func})")
        stream = self.current if on_device else self.host
        if on_device:
            _merge(stream.clock, self.host.clock)  # it was launched after all that the host knows of
        tick = stream.clock.get(stream.name, 0) + 1
        stream.clock[stream.name] = tick
        is_copy = func in (aten.copy_.default, aten._to_copy.default)
        crosses = is_copy and len({x.device.type for x in (*tensors, *results)}) == 2
        known = {key: value for key, value in stream.clock.items()}
        for x in read:
            memory = self.memory_of(x)
            if memory.written and known.get(memory.written[0], 0) < memory.written[1]:
                self.fault(f"{memory.place} memory is read before what writes it is waited for ({func})")
            memory.read[stream.name] = tick
        for x in (*written, *results):
            memory = self.memory_of(x, pinned)
            uses = [*memory.read.items(), *([memory.written] if memory.written else [])]
            if any(known.get(name, 0) < at for name, at in uses if name != stream.name):
                self.fault(f"{memory.place} memory is written before who reads it is done ({func})")
            memory.written, memory.read = (stream.name, tick), {}
        if crosses:
            host = [x for x in (*tensors, *results) if x.device.type == "cpu"]
            asynchronous = bool(kwargs.get("non_blocking") or (len(args) > 2 and args[2] is True))
            if not (asynchronous and all(self.memory_of(x).place == "pinned" for x in host)):
                _merge(self.host.clock, stream.clock)  # such a copy is over when it returns
                if any(x.device.type == "cpu" for x in (*written, *results)):
                    self.syncs.append(f"copy to the host in {self.label}")
        if on_device:
            name = str(func).split(".")[1]
            self.kernels[name] += 1
            if not crosses and (moved := bytes_moved(func, args, kwargs, out)):
                self.moved[name] += moved
                self.calls[name] += 1
            count = flop_registry.get(func._overloadpacket)
            if count is not None:
                dtype = next(x.dtype for x in tensors if x.is_floating_point())
                self.flops[str(dtype)] += count(*args, **kwargs, out_val=out)


class _Operations(TorchDispatchMode):
    """Hands every operation to its GPU."""

    def __init__(self, gpu: FakeGPU) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            (tensor,) = args
            if tensor.device.type == "cuda":
                self.gpu.synchronize("item")
            return True if tensor.dtype == torch.bool else 0 if not tensor.is_floating_point() else 0.0
        if func is aten.batch_norm_update_stats.default:  # which PyTorch knows no shapes for
            x = args[0]
            out = tuple(torch.empty(x.shape[1], dtype=torch.float32, device=x.device) for _ in range(2))
        else:
            out = func(*args, **kwargs)
        self.gpu.operation(func, args, kwargs, out)
        return out


class _Functions(TorchFunctionMode):
    """Does by operations what bindings of a CPU build refuse for tensors of CUDA, and chooses attention's kernel."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        stand_in = _STAND_INS.get(func)
        return func(*args, **kwargs) if stand_in is None else stand_in(*args, **kwargs)


def _apply(module: torch.nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> torch.nn.Module:
    """`Module._apply` by assignment: PyTorch's own swaps tensors, which tensors without numbers refuse."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    changed = function(tensor)
                    is_parameter = isinstance(tensor, torch.nn.Parameter)
                    tensors[name] = torch.nn.Parameter(changed, requires_grad=False) if is_parameter else changed
    return module


def _to(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    options: dict[str, Any] = {name: kwargs[name] for name in ("device", "dtype", "memory_format") if kwargs.get(name)}
    non_blocking, copy = kwargs.get("non_blocking", False), kwargs.get("copy", False)
    flags = []
    for value in args:
        if isinstance(value, Tensor):
            options |= {"device": value.device, "dtype": value.dtype}
        elif isinstance(value, torch.dtype):
            options["dtype"] = value
        elif isinstance(value, bool):
            flags.append(value)
        elif value is not None:
            options["device"] = value
    non_blocking = flags[0] if flags else non_blocking
    if "device" in options:
        options["device"] = _indexed(options["device"])
    same = options.get("device", x.device) == x.device and options.get("dtype", x.dtype) == x.dtype
    layout = options.get("memory_format", torch.preserve_format)
    if same and not copy and (layout is torch.preserve_format or x.is_contiguous(memory_format=layout)):
        return x
    return aten._to_copy.default(x, **options, non_blocking=non_blocking)


def _indexed(device: Any) -> torch.device:
    device = torch.device(device)
    return torch.device("cuda", 0) if device.type == "cuda" and device.index is None else device


def _select(x: Tensor, index: Any) -> Tensor:
    index = index if isinstance(index, tuple) else (index,)
    used = sum(1 for i in index if i is not None and i is not Ellipsis)
    fill = (slice(None),) * (x.dim() - used)
    at = next((n for n, i in enumerate(index) if i is Ellipsis), len(index))
    index = (*index[:at], *fill, *index[at + 1 :])
    dim, lists = 0, []
    for one in index:
        if one is None:
            x = aten.unsqueeze.default(x, dim)
        elif isinstance(one, Tensor):
            lists += [None] * (dim - len(lists)) + [one]
        elif isinstance(one, slice):
            if one != slice(None):
                x = aten.slice.Tensor(x, dim, one.start, one.stop, 1 if one.step is None else one.step)
        else:
            x = aten.select.int(x, dim, int(one))
            continue
        dim += 1
    return aten.index.Tensor(x, lists) if lists else x


def _assign(x: Tensor, index: Any, value: Any) -> None:
    target = _select(x, index)
    if isinstance(value, Tensor):
        aten.copy_.default(target, value)
    else:
        aten.fill_.Scalar(target, value)


def _copy_into(x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    return aten.copy_.default(x, source, non_blocking)


def _contiguous(x: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    same = x.is_contiguous(memory_format=memory_format)
    return x if same else aten.clone.default(x, memory_format=memory_format)


def _view(x: Tensor, *shape: Any, **kwargs: Any) -> Tensor:
    if len(shape) == 1 and isinstance(shape[0], torch.dtype):
        return aten.view.dtype(x, shape[0])
    sizes = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
    return aten.view.default(x, list(sizes))


def _attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
    if q.device.type != "cuda":
        return F_SDPA(q, k, v, attn_mask, **options)
    if attn_mask is None and q.dtype != torch.float32:
        return aten._scaled_dot_product_flash_attention.default(q, k, v, 0.0, bool(options.get("is_causal")))[0]
    if attn_mask is not None:
        if attn_mask.device != q.device:
            raise RuntimeError(f"attention's mask is on {attn_mask.device}, its queries on {q.device}")
        attn_mask = attn_mask.expand(*q.shape[:-1], k.shape[-2])
    return aten._scaled_dot_product_efficient_attention.default(q, k, v, attn_mask, False)[0]


F_SDPA = F.scaled_dot_product_attention
_STAND_INS: dict[Any, Callable[..., Any]] = {
    Tensor.to: _to,
    Tensor.cuda: lambda x, *_, **__: _to(x, "cuda"),
    Tensor.__getitem__: _select,
    Tensor.__setitem__: _assign,
    Tensor.copy_: _copy_into,
    Tensor.view: _view,
    Tensor.contiguous: _contiguous,
    Tensor.data_ptr: lambda x: 0,  # all begin where PyTorch's own do
    F.scaled_dot_product_attention: _attention,
}
