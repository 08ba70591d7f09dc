"""Backend settings of torch that change speed and last bits: threads, TF32, bf16, memory format."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models import UNet2DModel

_OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|not enough memory"
    r"|STATUS_ALLOC_FAILED|bad allocation|bad_alloc",
    re.IGNORECASE,
)
MAX_NUM_THREADS = 4096  # a larger number is a typing error


@contextmanager
def use_num_threads(num_threads: int) -> Iterator[None]:
    """Context in which an operation on the CPU is split among `num_threads` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def is_channels_last(unet: UNet2DModel) -> bool:
    """Whether the weights are in channels-last format.

    Weights with one input channel or one pixel have both formats and are not counted.
    """
    return any(
        p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous()
        for p in unet.parameters()
        if p.ndim == 4
    )


def tf32_operations() -> list[str]:
    """Float32 operations that a CUDA device computes in TF32, with 10 bits of each factor."""
    backends: Any = {
        "convolutions": torch.backends.cudnn.conv,  # type: ignore[attr-defined]
        "matrix products": torch.backends.cuda.matmul,
    }
    return [name for name, backend in backends.items() if backend.fp32_precision == "tf32"]


def set_tf32(enabled: bool) -> None:
    """Turn TF32 on or off for the whole process."""
    precision = "tf32" if enabled else "ieee"
    torch.backends.cuda.matmul.fp32_precision = precision
    torch.backends.cudnn.conv.fp32_precision = precision  # type: ignore[attr-defined]


def supports_tf32(device: torch.device) -> bool:
    """Whether the hardware computes in TF32."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def supports_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bf16; emulation on a CPU is 40 times as slow as float32."""
    if device.type == "cpu":  # torch has no public function for this
        names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, name, bool)() for name in names)
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, of torch or of a library of CUDA says that memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))
