"""How want of memory shows itself: PyTorch has an error of its own for it on some devices, and words on others.

Does not import torch, so that front doors may ask.
"""

from __future__ import annotations

OF_THE_HOST = ("DefaultCPUAllocator: can't allocate", "DefaultCPUAllocator: not enough memory")
OF_A_DEVICE = ("MPS backend out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was no memory left, on a device or on the host."""
    if isinstance(error, MemoryError) or "OutOfMemoryError" in [kind.__name__ for kind in type(error).__mro__]:
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OF_THE_HOST + OF_A_DEVICE)


def of_the_host(error: BaseException) -> bool:
    """Of an error that says so, whether it was the host's memory."""
    told: bool | None = getattr(error, "on_host", None)  # of another process
    return isinstance(error, MemoryError) or any(words in str(error) for words in OF_THE_HOST) if told is None else told
