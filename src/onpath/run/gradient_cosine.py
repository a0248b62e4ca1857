"""Cosine of consecutive optimiser steps' gradients: near 0 or below, updates undo each other (arXiv
2606.08432's signal of fragmented gradients)."""

import torch
from torch import Tensor, nn

from onpath.engines.head import sharded
from onpath.engines.sharding import local
from onpath.system import distributed


class GradientCosine:
    """Keeps the gradient of one step to compare with the next one's, where a measurement is due."""

    def __init__(self, model: nn.Module, *, every: int) -> None:
        self.model, self.every = model, every
        self._last: tuple[int, Tensor] | None = None

    @torch.no_grad()
    def __call__(self, step: int) -> float | None:
        """Of step (from 0) and the one before; None if not due, or if the one before was not seen (a resumed
        run)."""
        due = self.every > 0 and step % self.every == 0
        keep = self.every > 0 and (step + 1) % self.every == 0
        if not (due or keep):
            return None
        gradients = [local(p.grad).flatten().float() for p in self.model.parameters() if p.grad is not None]
        if not gradients:
            return None
        now = torch.cat(gradients)
        cosine = None
        if due and self._last is not None and self._last[0] == step - 1:
            cosine = self._between(now, self._last[1])
        self._last = (step, now) if keep else None
        return cosine

    def _between(self, one: Tensor, two: Tensor) -> float:
        if not sharded(self.model):
            return float(torch.nn.functional.cosine_similarity(one, two, dim=0))
        products = [float(a.double() @ b.double()) for a, b in ((one, two), (one, one), (two, two))]
        dot, above, below = distributed.total(products)  # of copies all count alike
        return float(dot / max((above * below) ** 0.5, 1e-8))
