"""The output layer as data, and its three matrix products, by chunks of rows.

Shape suffixes: N tokens, C tokens of one chunk, H hidden, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from onpath.system import products

# Of one block of a half-precision weight, in float32, where there is no mixed product: small enough for the
# allocator to keep, as fresh pages for every block cost a fifth of the time.
_UPCAST_BYTES = 16 * 2**20
_GRADIENT_BLOCKS = 8  # of a half-precision head's gradient


@dataclass(frozen=True, kw_only=True)
class Head:
    """Hidden states → logits: z = softcap·tanh(s·(h·Wᵀ + b) / softcap) / T, without the tanh where softcap is
    None.

    >>> Head(weight=torch.eye(3)).vocabulary
    3
    """

    weight: Float[Tensor, "V H"]
    """With tied embeddings, the embedding itself: its gradient adds up there like any other."""
    bias: Float[Tensor, " V"] | None = None
    """−inf masks an entry of the vocabulary, exactly, on this side; not with a softcap, whose tanh would make
    it a number."""
    logit_scale: float = 1.0
    """Cohere's `logit_scale`; for Granite 1 / `logits_scaling`."""
    softcap: float | None = None
    """Gemma's `final_logit_softcapping`."""
    temperature: float = 1.0
    """Both sides' should agree. Losses are not multiplied by T²."""
    tokens: int | None = None
    """Number of real token ids: later rows of `weight` are padding, and take no part in the softmax. None:
    all rows."""

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, not {self.temperature}")
        if self.softcap is not None and self.softcap <= 0:
            raise ValueError(f"softcap must be above 0 or None, not {self.softcap}")
        if self.softcap is not None and self.masks():
            raise ValueError("a bias of −inf masks an entry, and softcap would make it −softcap")
        if self.tokens is not None and not 0 < self.tokens <= self.weight.shape[0]:
            raise ValueError(
                f"tokens must lie in 1..{self.weight.shape[0]}, the head's rows, not {self.tokens}"
            )

    @property
    def vocabulary(self) -> int:
        """Number of outcomes of the softmax."""
        return self.weight.shape[0] if self.tokens is None else self.tokens

    @property
    def factor(self) -> float:
        """dz / d(h·Wᵀ + b), up to the 1 − tanh² of soft-capping."""
        return self.logit_scale / self.temperature

    def masks(self) -> bool:
        """Whether any logit can be −inf (reads the bias once)."""
        return self.bias is not None and bool(torch.isneginf(self.bias).any())


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """Of logits, softmax and sums: float32, or float64 if an input is."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Of the operands of matrix products.

    Half precision on a GPU if both operands have it or autocast asks for it; products accumulate into float32
    there. On a CPU half-precision operands are widened by blocks: exact, and PyTorch has no product of both
    kinds there.
    """
    if hidden.device.type != "cuda":
        return working_dtype(hidden, weight)
    if torch.is_autocast_enabled("cuda"):
        return torch.get_autocast_dtype("cuda")
    return torch.promote_types(hidden.dtype, weight.dtype)


def logits_(head: Head, weight_VH: Tensor, hidden_CH: Tensor, out_CV: Tensor) -> Tensor:
    """Writes z into `out_CV` (working dtype). `weight_VH`: the head's weight cut to its tokens, in the
    product's dtype."""
    if weight_VH.dtype == out_CV.dtype:
        products.write_(out_CV, hidden_CH.to(out_CV.dtype), weight_VH)
    elif weight_VH.is_cuda:
        torch.mm(hidden_CH.to(weight_VH.dtype), weight_VH.t(), out_dtype=out_CV.dtype, out=out_CV)
    else:
        hidden_CH = hidden_CH.to(out_CV.dtype)
        for rows in _weight_blocks(weight_VH):
            products.write_(out_CV[:, rows], hidden_CH, weight_VH[rows].to(out_CV.dtype))
    if head.bias is not None:
        out_CV.add_(head.bias[: head.vocabulary].to(out_CV.device))
    if head.softcap is not None:
        out_CV.mul_(head.logit_scale / head.softcap).tanh_().mul_(head.softcap / head.temperature)
    elif head.factor != 1.0:
        out_CV.mul_(head.factor)
    return out_CV


def hidden_gradient(grad_CV: Tensor, weight_VH: Tensor) -> Tensor:
    """grad · W: [C, H] in the working dtype. `grad_CV` in the working or in the product's dtype."""
    if weight_VH.dtype == grad_CV.dtype:
        if weight_VH.dtype in (torch.float32, torch.float64):
            return products.times(grad_CV, weight_VH)
        return torch.mm(grad_CV, weight_VH, out_dtype=torch.float32)
    grad_CH = grad_CV.new_zeros(grad_CV.shape[0], weight_VH.shape[1])
    for rows in _weight_blocks(weight_VH):
        products.add_outer_(grad_CH, grad_CV[:, rows].t(), weight_VH[rows].to(grad_CV.dtype))
    return grad_CH


class WeightGradient:
    """∂/∂W, accumulated in the working dtype: sums rounded to bfloat16 per chunk would be biased.

    A half-precision head on a CPU has it in blocks of rows: as the gradient is handed over in the head's
    dtype each block is freed once it is read, so that there are never two whole copies.
    """

    def __init__(self, weight_VH: Tensor, dtype: torch.dtype) -> None:
        rows, width = weight_VH.shape
        step = rows if weight_VH.dtype == dtype or weight_VH.is_cuda else -(-rows // _GRADIENT_BLOCKS)
        sizes = [min(step, rows - start) for start in range(0, rows, step)]
        self.blocks = [weight_VH.new_zeros(size, width, dtype=dtype) for size in sizes]

    def add_(self, grad_CV: Tensor, hidden_CH: Tensor) -> None:
        """+= gradᵀ · hidden. Rows beyond grad's columns are padding of the vocabulary."""
        start = 0
        for block_VH in self.blocks:
            part_CV = grad_CV[:, start : start + len(block_VH)]
            _add_product_(block_VH[: part_CV.shape[1]], part_CV, hidden_CH)
            start += len(block_VH)

    def mul_(self, factor: Tensor) -> "WeightGradient":
        """In place."""
        for block_VH in self.blocks:
            block_VH.mul_(factor)
        return self

    def to(self, dtype: torch.dtype) -> Tensor:
        """[V, H] in another dtype. The blocks are gone afterwards."""
        if len(self.blocks) == 1:
            return self.blocks.pop().to(dtype)
        whole_VH = self.blocks[0].new_empty(sum(map(len, self.blocks)), self.blocks[0].shape[1], dtype=dtype)
        end = len(whole_VH)
        while self.blocks:
            block_VH = self.blocks.pop()
            whole_VH[end - len(block_VH) : end] = block_VH
            end -= len(block_VH)
        return whole_VH


def _add_product_(grad_VH: Tensor, grad_CV: Tensor, hidden_CH: Tensor) -> None:
    if grad_CV.dtype == grad_VH.dtype:
        products.add_outer_(grad_VH, grad_CV, hidden_CH.to(grad_VH.dtype))
    else:
        torch.addmm(grad_VH, grad_CV.t(), hidden_CH.to(grad_CV.dtype), out_dtype=grad_VH.dtype, out=grad_VH)


def _weight_blocks(weight_VH: Tensor) -> Iterator[slice]:
    step = max(1, _UPCAST_BYTES // (4 * weight_VH.shape[1]))
    for start in range(0, weight_VH.shape[0], step):
        yield slice(start, start + step)
