"""|λ∇L_traj| / |∇L_OPD|: how much of a step's gradient is guidance, at the weights that train.

Not at the hidden states, where gradients of tokens do not yet cancel each other: that number was several
times too large.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from onpath.system import distributed


class GuidanceRatio:
    """Keeps the guidance's own gradient apart where a measurement is due: one more forward and backward pass,
    one more copy of the gradient."""

    def __init__(self, model: nn.Module, *, every: int) -> None:
        self.model, self.every = model, every
        self._due = False
        self._own: list[Tensor] = []

    def begin(self, step: int, *, guided: bool) -> None:
        """Of a step (from 0); guided: whether a trajectory of any process carries guidance."""
        self._due = guided and self.every > 0 and step % self.every == 0
        self._own = [torch.zeros_like(p) for p in self._trained()] if self._due else []

    def add(self, guidance: Callable[[], Tensor]) -> None:
        """After a micro-batch's gradient was added to the parameters': its guidance's own, where it is due.

        Args:
            guidance: gives the guidance's part of the micro-batch's loss.
        """
        if not self._due:
            return
        before = [p.grad for p in self._trained()]
        for p in self._trained():
            p.grad = None
        guidance().backward()
        for p, own, grad in zip(self._trained(), self._own, before, strict=True):
            if p.grad is not None:
                own += p.grad
            p.grad = grad

    @torch.no_grad()
    def __call__(self) -> float | None:
        """After the gradients of all processes are summed and before they are clipped; None: not due, or
        there is no other gradient."""
        if not self._due:
            return None
        distributed.sum_tensors(self._own)
        above = sum(float(own.double().square().sum()) for own in self._own)
        below = 0.0
        for p, own in zip(self._trained(), self._own, strict=True):
            if p.grad is not None:
                below += float((p.grad.double() - own.double()).square().sum())
        self._own = []
        return (above / below) ** 0.5 if below else None

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]
