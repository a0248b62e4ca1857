"""The device, its clock and memory, and two ceilings measured on it."""

import gc
import statistics
import time
from collections.abc import Callable

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def seconds(call: Callable[[], object]) -> float:
    """Wall time of a call with all of its kernels."""
    synchronize()
    begun = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - begun


def median_seconds(call: Callable[[], object], rounds: int) -> float:
    """After one untimed call."""
    call()
    return statistics.median(seconds(call) for _ in range(rounds))


def free() -> None:
    """Gives cached memory back."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def reset_peak() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float:
    """GiB allocated at most since `reset_peak`; 0 on a CPU, which does not count."""
    return torch.cuda.max_memory_allocated() / 2**30 if DEVICE.type == "cuda" else 0.0


def matrix_flops(size: int, rounds: int = 10) -> float:
    """FLOP/s of a bfloat16 matrix product of random numbers."""
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / median_seconds(lambda: a @ b, rounds)


def copy_bandwidth(size: int, rounds: int = 10) -> float:
    """Bytes read and written per second by a copy on the device."""
    a = torch.empty(size, device=DEVICE, dtype=torch.uint8).fill_(1)
    b = torch.empty_like(a)
    return 2 * size / median_seconds(lambda: b.copy_(a), rounds)
