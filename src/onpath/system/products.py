"""Products of float32 matrices on CPUs, by oneDNN where PyTorch's own leave half of the processor idle.

PyTorch asks MKL, which uses 512-bit registers on Intel's processors alone. On an AMD EPYC that has them MKL
reaches 100 GFLOP/s a core, and oneDNN, which PyTorch brings along, 230. Small products stay with MKL.

Shape suffixes: N rows, K summed over, M columns.
"""

import os
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

# Multiplications from which oneDNN is ahead: a call costs some µs more, and the first one of a shape 0.2 to
# 0.5 ms, as its kernel is made then.
_LEAST = 2**22
_BLOCK_BYTES = 16 * 2**20
"""Of what oneDNN has computed, which it writes into memory of its own, before it is copied or added."""
_KERNELS = "64"
_CACHES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
"""How many kernels are kept; without these 1,024, between which the blocks of a step come to lie."""


def suits(a: Tensor, b_MK: Tensor) -> bool:
    """Whether oneDNN takes a [..., K] · bᵀ, and is the faster one here."""
    return (
        a.numel() * b_MK.shape[0] >= _LEAST  # first: a decoding step is made of small ones
        and ahead()
        and a.dtype is torch.float32
        and b_MK.dtype is torch.float32
        and a.device.type == "cpu"
        and a.dim() > 1
        and type(a) in (Tensor, nn.Parameter)  # no shards, no quantised weights
        and type(b_MK) in (Tensor, nn.Parameter)
        and not torch.is_autocast_enabled("cpu")
    )


def product(a: Tensor, b_MK: Tensor, bias_M: Tensor | None = None) -> Tensor:
    """a [..., K] · bᵀ (+ bias): [..., M], where it `suits`. It has no gradient."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(a, b_MK, bias_M, "none", [], "")
    return found


def linear(a: Tensor, b_MK: Tensor, bias_M: Tensor | None = None) -> Tensor:
    """a [..., K] · bᵀ (+ bias): [..., M], by the faster one."""
    if _constant(a, b_MK):
        return product(a, b_MK, bias_M)
    return nn.functional.linear(a, b_MK, bias_M)


def times(a_NK: Tensor, b_KM: Tensor) -> Tensor:
    """a · b: [N, M], by the faster one."""
    return product(a_NK, b_KM.t()) if _constant(a_NK, b_KM.t()) else a_NK @ b_KM


def outer(a_NK: Tensor, b_NM: Tensor) -> Tensor:
    """aᵀ · b: [K, M], by the faster one."""
    if not _constant(a_NK.t(), b_NM.t()):
        return a_NK.t() @ b_NM
    if a_NK.shape[1] <= b_NM.shape[1]:
        return product(a_NK.t(), b_NM.t())
    return product(b_NM.t(), a_NK.t()).t()  # oneDNN copies what is first: it is the smaller one


def write_(out_NM: Tensor, a_NK: Tensor, b_MK: Tensor) -> None:
    """out = a · bᵀ, of constants of out's dtype."""
    if not _constant(a_NK, b_MK):
        torch.mm(a_NK, b_MK.t(), out=out_NM)
        return
    for columns in _blocks(b_MK.shape[0], width=a_NK.shape[0]):
        out_NM[:, columns] = product(a_NK, b_MK[columns])


def add_outer_(out_KM: Tensor, a_NK: Tensor, b_NM: Tensor) -> None:
    """out += aᵀ · b, of constants of out's dtype."""
    if not _constant(a_NK.t(), b_NM.t()):
        out_KM.addmm_(a_NK.t(), b_NM)
        return
    for rows in _blocks(out_KM.shape[0], width=out_KM.shape[1]):
        out_KM[rows] += product(a_NK[:, rows].t(), b_NM.t())


@cache
def ahead() -> bool:
    """Whether this processor is one on which oneDNN computes float32 faster than MKL."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not _amd(Path("/proc/cpuinfo")):
        return False
    for name in _CACHES:  # read at the first product
        os.environ.setdefault(name, _KERNELS)
    return _answers()


def _amd(told: Path) -> bool:
    """Whether the system says that its processor is one of AMD's."""
    try:
        return "AuthenticAMD" in told.read_text()
    except OSError:
        return False


def _answers() -> bool:
    """`product` is what compiled graphs call, and PyTorch's own affair: is it here, and does it multiply?"""
    a_NK, b_MK = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(4, 3)
    try:
        return torch.equal(product(a_NK, b_MK, torch.ones(4)), a_NK @ b_MK.t() + 1)
    except (AttributeError, RuntimeError, TypeError):
        return False


def _constant(a_NK: Tensor, b_MK: Tensor) -> bool:
    asked = torch.is_grad_enabled() and (a_NK.requires_grad or b_MK.requires_grad)
    return not asked and suits(a_NK, b_MK)


def _blocks(count: int, *, width: int) -> list[slice]:
    step = max(1, _BLOCK_BYTES // (4 * width))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]
