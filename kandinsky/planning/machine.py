"""What there is to fit into, as numbers; and what PyTorch and CUDA are taken to want besides."""

from __future__ import annotations

from dataclasses import dataclass

from kandinsky.models.vae_memory import GB

# Assumed, not measured.
CUDA_CONTEXT = int(0.5 * GB)
GPU_SLACK = 0.1  # share of the activations that PyTorch's allocator and the kernels take on a GPU besides them
HOST_OF_GPU_RUN = int(3 * GB)  # of the process besides weights: Python, torch, CUDA's libraries
# Measured: what is resident with everything imported.
HOST_OF_CPU_RUN = int(0.29 * GB)


@dataclass(frozen=True)
class Machine:
    """What there is to fit into, in bytes, and how fast it is taken to be, a second."""

    host_memory: float
    gpu_memory: float | None = None  # None: everything runs on the CPU
    link: float = 22e9  # bytes from pinned memory to the GPU: PCIe 4 with 16 lanes
    files: float = 3e9  # bytes from memory-mapped files
    flops: float = 100e12  # bfloat16, of a fast consumer card
    host_flops: float = 1e12
    memory: float = 400e9  # bytes of the memory that is computed in, read or written
    float32_convolutions: tuple[str, ...] = ()  # dtypes in whose place this CPU's VAE convolves in float32
    processes: int = 1  # that make one output together, each with a GPU of its own where there is one
    on_host: int = 1  # of them, those that share the host's memory

    @property
    def words(self) -> str:
        host = f"{self.host_memory / GB:.1f} GB of host memory"
        words = host if self.gpu_memory is None else f"{self.gpu_memory / GB:.1f} GB on the GPU, {host}"
        if self.processes == 1:
            return words
        shared = "" if self.on_host == 1 else f", which {self.on_host} share"
        return f"each of {self.processes} processes has {words}{shared}"
