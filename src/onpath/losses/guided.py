"""TOPD's sparse targets inside the pass: λ·Σ_m ỹ_m·(log ỹ_m − log p_S(id_m)), and its gradient λ·(mass·p_S −
ỹ).

Shape suffixes: C rows of a chunk, R rows of a block, V vocabulary, g guided rows, M entries of a target.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from onpath import divergence
from onpath.losses.interface import SparseGuidance
from onpath.losses.rows import Block


@dataclass(kw_only=True)
class Guided:
    """The guidance that falls into one chunk; rows count from the chunk's start."""

    rows: Tensor  # [g]
    rows_here: Tensor  # [g] the same on the CPU: to look up a block's rows there does not wait for a GPU
    ids: Tensor  # [g, M]
    probs: Tensor  # [g, M]
    weights: Tensor  # [g]
    strength: float
    values: list[Tensor] = field(default_factory=list)
    fresh: Tensor | None = None  # [·, V] of the block in flight
    kept: Tensor | None = None  # [≥ g, V], filled up to `count`
    count: int = 0

    def add(self, block: Block, at: slice, slope_RV: Tensor | None, *, gradient: bool) -> None:
        """Value and gradient of a block's guided rows, while the block still holds p_S."""
        self.fresh = None
        first, last = torch.searchsorted(self.rows_here, torch.tensor([at.start, at.stop])).tolist()
        if first == last:
            return
        local, ids, probs = self.rows[first:last] - at.start, self.ids[first:last], self.probs[first:last]
        logp = block.student_logp[local].gather(-1, ids)
        self.values.append(self.strength * divergence.sparse_forward_kl(target_p=probs, student_logp=logp))
        if gradient:
            self.fresh = (
                block.student_p[local].mul_(probs.sum(-1, keepdim=True)).scatter_add_(-1, ids, -probs)
            )
            self.fresh.mul_(self.strength if slope_RV is None else self.strength * slope_RV[local])

    def store(self, teacher_CV: Tensor | None) -> None:
        """Keeps the block's gradient in the rows of the teacher's logits that are done with, if there are
        any.

        The j-th guided row of a chunk is never before its j-th row, so no row is taken that is still to be
        read.
        """
        if self.fresh is None:
            return
        if self.kept is None:
            self.kept = (
                self.fresh.new_empty(len(self.rows), self.fresh.shape[1])
                if teacher_CV is None
                else teacher_CV
            )
        end = self.count + len(self.fresh)
        self.kept[self.count : end] = self.fresh
        self.count, self.fresh = end, None

    def gradient(self) -> Tensor:
        """[g, V], without the rows' weights; may be overwritten."""
        assert self.kept is not None
        return self.kept[: self.count]


def guided_rows(
    guidance: SparseGuidance | None, positions: Tensor | None, here: slice, weights_N: Tensor
) -> Guided | None:
    """The guidance for the tokens of one chunk; None if there is none. `positions` are its own, on the
    CPU."""
    if guidance is None or positions is None:
        return None
    first, last = torch.searchsorted(positions, torch.tensor([here.start, here.stop])).tolist()
    if first == last:
        return None
    at = guidance.positions[first:last]
    return Guided(
        rows=at - here.start,
        rows_here=positions[first:last] - here.start,
        ids=guidance.ids[first:last],
        probs=guidance.probs[first:last].to(weights_N.dtype),
        weights=weights_N[at]
        if guidance.weights is None
        else guidance.weights[first:last].to(weights_N.dtype),
        strength=guidance.strength,
    )
