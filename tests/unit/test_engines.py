"""Attention engines: which one is chosen, why one is refused, and that what runs is attention."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kandinsky.attention import engines
from kandinsky.attention.engines import APPROXIMATE, AUTO_ORDER, ENGINES, NEEDS, resolve_engine, sdpa

CPU = torch.device("cpu")
BFLOAT16 = torch.bfloat16
FlashFunction = Callable[[Tensor, Tensor, Tensor], "Tensor | tuple[Tensor, ...]"]


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What the flash packages compute, in their layout: (B, N, heads, d)."""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def sageattn(q: Tensor, k: Tensor, v: Tensor, tensor_layout: str, is_causal: bool) -> Tensor:
    assert tensor_layout == "HND" and not is_causal
    return F.scaled_dot_product_attention(q, k, v)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """install("flash_attn", flash_attn_func=...): a package that is importable for the length of a test."""

    def install_package(name: str, **functions: object) -> None:
        module = ModuleType(name)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)

    return install_package


@pytest.fixture
def capability(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """capability(9, 0): the CPU passes for a GPU of that compute capability, with none of the packages installed."""

    def pretend(major: int, minor: int) -> None:
        monkeypatch.setattr(engines, "compute_capability", lambda device: (major, minor))
        # cuDNN can't run here: the engine's place in the order is what is tested.
        monkeypatch.setitem(ENGINES, "sdpa_cudnn", named("sdpa_cudnn", sdpa))
        for needs in NEEDS.values():
            if needs.module is not None:
                monkeypatch.setitem(sys.modules, needs.module, None)  # importing it raises ModuleNotFoundError

    return pretend


def named(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def engine(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return function(q, k, v)

    engine.__name__ = name
    return engine


def test_every_engine_says_what_it_needs() -> None:
    assert set(ENGINES) == {"sdpa", "sage_emulated", *NEEDS}
    assert set(AUTO_ORDER) == set(ENGINES) - set(APPROXIMATE) and AUTO_ORDER[-1] == "sdpa"
    for name, engine in ENGINES.items():
        assert engine.__name__ == name  # what the sidecar file calls it


def test_sdpa_is_attention() -> None:
    q, k, v = (torch.randn(2, 3, n, 8, generator=torch.Generator().manual_seed(n)) for n in (5, 7, 7))
    mask = (torch.arange(7) < torch.tensor([7, 4])[:, None])[:, None, None]
    scores = (q.double() @ k.double().mT / 8**0.5).masked_fill(~mask, -torch.inf)
    assert torch.allclose(sdpa(q, k, v, mask).double(), scores.softmax(-1) @ v.double(), atol=1e-6)


# --- the choice -------------------------------------------------------------------------------------------------------


def test_a_cpu_gets_sdpa(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    assert resolve_engine("auto", CPU) is sdpa
    assert resolve_engine("sdpa", CPU) is sdpa
    assert caplog.messages == ["attention engine: sdpa, chosen for cpu", "attention engine: sdpa, as asked for"]


@pytest.mark.parametrize(
    ("capability_of_gpu", "installed", "chosen"),
    [
        ((9, 0), ("flash_attn_interface", "flash_attn", "sageattention"), "flash_attention_3"),
        ((9, 0), ("flash_attn", "sageattention"), "sdpa_cudnn"),
        ((9, 0), ("sageattention",), "sdpa_cudnn"),
        ((10, 0), ("flash_attn_interface", "flash_attn"), "sdpa_cudnn"),
        ((8, 9), ("flash_attn_interface", "flash_attn", "sageattention"), "flash_attention_2"),
        ((8, 6), ("sageattention",), "sdpa"),
        ((7, 5), ("flash_attn", "sageattention"), "sdpa"),
    ],
)
def test_auto(
    install: Callable[..., None],
    capability: Callable[[int, int], None],
    caplog: pytest.LogCaptureFixture,
    capability_of_gpu: tuple[int, int],
    installed: tuple[str, ...],
    chosen: str,
) -> None:
    """The first of AUTO_ORDER that can run, never sage; the log says what was passed over and why."""
    caplog.set_level(logging.INFO)
    capability(*capability_of_gpu)
    for name in installed:
        install(name, flash_attn_func=flash_attn_func, sageattn=sageattn)
    assert resolve_engine("auto", CPU, BFLOAT16, 64).__name__ == chosen
    (message,) = caplog.messages
    assert message.startswith(f"attention engine: {chosen}, chosen for cpu")
    for passed_over in AUTO_ORDER[: AUTO_ORDER.index(chosen)]:
        assert f"{passed_over} (it " in message


def test_auto_in_float32_and_with_large_heads(install: Callable[..., None], capability: Callable[..., None]) -> None:
    capability(9, 0)
    install("flash_attn_interface", flash_attn_func=flash_attn_func)
    assert resolve_engine("auto", CPU, torch.float32, 64) is sdpa
    assert resolve_engine("auto", CPU, BFLOAT16, 512) is sdpa
    assert resolve_engine("auto", CPU, BFLOAT16, 128).__name__ == "flash_attention_3"


def test_auto_passes_over_what_computes_garbage(
    install: Callable[..., None], capability: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    capability(9, 0)
    install("flash_attn_interface", flash_attn_func=lambda q, k, v: torch.randn_like(q))
    assert resolve_engine("auto", CPU, BFLOAT16, 64).__name__ == "sdpa_cudnn"
    assert "flash_attention_3 (it computes something else than attention" in caplog.text


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"'abacus' does not exist: choose one of auto, sdpa, sdpa_cudnn, flash_atten"):
        resolve_engine("abacus", CPU)


@pytest.mark.parametrize("name", NEEDS)
def test_a_cpu_has_no_other_engine(name: str) -> None:
    with pytest.raises(
        ValueError, match=rf"'{name}' cannot be used here: .*NVIDIA GPU.*cpu; choose one of auto, sdpa$"
    ):
        resolve_engine(name, CPU)


@pytest.mark.parametrize(
    ("name", "capability_of_gpu", "dtype", "head_dim", "reason"),
    [
        ("flash_attention_3", (8, 9), BFLOAT16, 64, "made for|compute capability 9.0 or higher, cpu has 8.9"),
        ("flash_attention_3", (10, 0), BFLOAT16, 64, "made for compute capability 9.0, cpu has 10.0"),
        ("flash_attention_2", (7, 5), BFLOAT16, 64, "compute capability 8.0 or higher, cpu has 7.5"),
        ("sdpa_cudnn", (8, 0), BFLOAT16, 64, "compute capability 9.0 or higher, cpu has 8.0"),
        ("sage", (7, 0), BFLOAT16, 64, "compute capability 8.0 or higher, cpu has 7.0"),
        ("flash_attention_2", (9, 0), torch.float32, 64, "bfloat16 or float16, the model is in float32"),
        ("sdpa_cudnn", (9, 0), torch.float32, 64, "bfloat16 or float16, the model is in float32"),
        ("sage", (9, 0), BFLOAT16, 256, "up to 128, the model has 256"),
        ("flash_attention_2", (9, 0), BFLOAT16, 100, "multiples of 8 up to 256, the model has 100"),
        ("flash_attention_2", (9, 0), BFLOAT16, 64, "not installed .pip install flash-attn."),
        ("flash_attention_3", (9, 0), BFLOAT16, 64, "not installed .build hopper/"),
        ("sage", (9, 0), BFLOAT16, 64, "not installed .pip install sageattention."),
    ],
)
def test_an_explicit_choice_that_cannot_run(
    capability: Callable[[int, int], None],
    name: str,
    capability_of_gpu: tuple[int, int],
    dtype: torch.dtype,
    head_dim: int,
    reason: str,
) -> None:
    capability(*capability_of_gpu)
    with pytest.raises(ValueError, match=reason) as raised:
        resolve_engine(name, CPU, dtype, head_dim)
    message = str(raised.value)
    assert "\n" not in message and message.startswith(f"attention engine {name!r} cannot be used here: it ")
    usable = message.split("choose one of ")[1].split(", ")
    assert usable[:2] == ["auto", "sdpa"] and name not in usable
    for other in usable[1:]:
        assert resolve_engine(other, CPU, dtype, head_dim).__name__ == other


def test_an_installed_package_that_cannot_be_imported(
    monkeypatch: pytest.MonkeyPatch, capability: Callable[..., None]
) -> None:
    capability(9, 0)

    def broken(name: str) -> ModuleType:
        raise OSError(f"{name}.so: undefined symbol: _ZN3c105Error\nand more")

    monkeypatch.setattr(engines.importlib, "import_module", broken)
    with pytest.raises(
        ValueError, match=r"flash_attn is installed but can't be imported \(flash_attn.so: undefined sy"
    ):
        resolve_engine("flash_attention_2", CPU, BFLOAT16, 64)


GARBAGE: dict[str, tuple[Callable[..., Tensor], str]] = {
    "noise": (lambda q, k, v: torch.randn_like(q), "something else than attention"),
    "NaN": (lambda q, k, v: torch.full_like(q, torch.nan), "something else than attention .relative error nan"),
    "another scale": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=1.0), "something else"),
    "causal": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), "something else"),
    "heads and tokens swapped": (lambda q, k, v: sdpa(*(x.mT.contiguous().view_as(x) for x in (q, k, v))), "something"),
    "another shape": (lambda q, k, v: q[:, :, :-1], r"shape \(1, 3, 332, 64\) instead of \(1, 3, 333, 64\)"),
    "failure": (lambda q, k, v: q @ k, "fails on a small input"),
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_an_engine_that_returns_garbage_is_refused(
    monkeypatch: pytest.MonkeyPatch, capability: Callable[..., None], install: Callable[..., None], kind: str
) -> None:
    capability(9, 0)
    install("sageattention")
    function, reason = GARBAGE[kind]
    monkeypatch.setitem(ENGINES, "sage", named("sage", function))
    with pytest.raises(ValueError, match=rf"'sage' cannot be used here: .*{reason}"):
        resolve_engine("sage", CPU, BFLOAT16, 64)


def test_sage_by_name(install: Callable[..., None], capability: Callable[..., None]) -> None:
    """An approximation as rough as int8 products is let through, when asked for."""
    capability(9, 0)

    def rough(q: Tensor, k: Tensor, v: Tensor, tensor_layout: str, is_causal: bool) -> Tensor:
        out = sageattn(q, k, v, tensor_layout, is_causal)
        return out + 0.03 * out.float().std() * torch.randn_like(out)

    install("sageattention", sageattn=rough)
    engine = resolve_engine("sage", CPU, BFLOAT16, 64)
    q, k, v = torch.randn(3, 1, 2, 9, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.allclose(engine(q, k, v), sdpa(q, k, v), atol=0.2)


# --- calling conventions ----------------------------------------------------------------------------------------------


RETURNS: dict[str, FlashFunction] = {
    "a tensor": flash_attn_func,
    "a pair": lambda q, k, v: (flash_attn_func(q, k, v), torch.zeros(1)),
    "four": lambda q, k, v: (flash_attn_func(q, k, v), torch.zeros(1), None, None),
}


@pytest.mark.parametrize("returns", RETURNS)
def test_flash_attention_3_in_all_versions(
    install: Callable[..., None], capability: Callable[..., None], returns: str
) -> None:
    capability(9, 0)
    install("flash_attn_interface", flash_attn_func=RETURNS[returns])
    engine = resolve_engine("flash_attention_3", CPU, BFLOAT16, 64)
    q, k, v = (torch.randn(2, 3, n, 64, generator=torch.Generator().manual_seed(n)).bfloat16() for n in (5, 7, 7))
    assert torch.equal(engine(q, k, v), sdpa(q, k, v))


def test_flash_attention_2(install: Callable[..., None], capability: Callable[..., None]) -> None:
    capability(8, 0)
    install("flash_attn", flash_attn_func=flash_attn_func)
    engine = resolve_engine("flash_attention_2", CPU, torch.float16, 128)
    q, k, v = (torch.randn(2, 3, n, 128, generator=torch.Generator().manual_seed(n)).half() for n in (5, 7, 7))
    assert torch.equal(engine(q, k, v), sdpa(q, k, v))


@pytest.mark.parametrize("name", NEEDS)
def test_only_sdpa_takes_masks(install: Callable[..., None], name: str) -> None:
    for module in ("flash_attn", "flash_attn_interface", "sageattention"):
        install(module, flash_attn_func=flash_attn_func, sageattn=sageattn)
    x, mask = torch.randn(1, 2, 5, 8), torch.ones(1, 1, 1, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match=f"'{name}' takes no mask; .* sdpa"):
        ENGINES[name](x, x, x, mask)
    assert torch.allclose(sdpa(x, x, x, mask), sdpa(x, x, x), atol=1e-6)


# --- with a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", ENGINES)
def test_every_installed_engine_on_a_gpu(name: str, head_dim: int) -> None:
    device = torch.device("cuda")
    reason = engines.obstacle(name, device, BFLOAT16, head_dim)
    if reason is not None:
        pytest.skip(reason)
    engine = resolve_engine(name, device, BFLOAT16, head_dim)
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 4, 1000, head_dim, generator=generator).to(device, BFLOAT16) for _ in range(3))
    exact = sdpa(q.double(), k.double(), v.double())
    error = (engine(q, k, v).double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error < (0.06 if name == "sage" else 0.01)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_auto_on_a_gpu() -> None:
    assert resolve_engine("auto", torch.device("cuda"), BFLOAT16, 64).__name__ in AUTO_ORDER
