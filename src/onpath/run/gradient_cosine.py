"""Cosine of consecutive optimiser steps' gradients: near 0 or below, updates undo each other (arXiv
2606.08432's signal of fragmented gradients)."""

import torch
from torch import Tensor, nn


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
        gradients = [p.grad.flatten().float() for p in self.model.parameters() if p.grad is not None]
        if not gradients:
            return None
        now = torch.cat(gradients)
        cosine = None
        if due and self._last is not None and self._last[0] == step - 1:
            cosine = float(torch.nn.functional.cosine_similarity(now, self._last[1], dim=0))
        self._last = (step, now) if keep else None
        return cosine
