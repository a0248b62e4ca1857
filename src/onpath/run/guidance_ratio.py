"""|λ∇L_traj| / |∇L_OPD|: how much of a step's gradient is guidance, at the weights that train.

Not at the hidden states, where gradients of tokens do not yet cancel each other.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from onpath.engines.sharding import local
from onpath.system import distributed


class GuidanceRatio:
    """Keeps the guidance's own gradient apart where a measurement is due: one more forward and backward pass,
    one more copy of the gradient."""

    def __init__(self, model: nn.Module, *, every: int) -> None:
        self.every = every
        # As they are now: of a model that is whole for a while, gradients still come to its rows.
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self.due = False
        """Whether this step is measured."""
        self._own: list[Tensor] = []

    def begin(self, step: int, *, guided: bool) -> None:
        """Of a step (from 0); guided: whether a trajectory of any process carries guidance."""
        self.due = guided and self.every > 0 and step % self.every == 0
        self._own = [torch.zeros_like(p) for p in self._trained] if self.due else []

    def add(self, guidance: Callable[[], Tensor]) -> None:
        """After a micro-batch's gradient was added to the parameters': its guidance's own, where it is due.

        Args:
            guidance: gives the guidance's part of the micro-batch's loss.
        """
        if not self.due:
            return
        before = [p.grad for p in self._trained]
        for p in self._trained:
            p.grad = None
        guidance().backward()
        for p, own, grad in zip(self._trained, self._own, before, strict=True):
            if p.grad is not None:
                own += p.grad
            p.grad = grad

    @torch.no_grad()
    def __call__(self) -> float | None:
        """After the gradients of all processes are summed and before they are clipped; None: not due, or
        there is no other gradient."""
        if not self.due:
            return None
        distributed.sum_tensors(self._own)
        above = sum(float(local(own).double().square().sum()) for own in self._own)
        below = 0.0
        for p, own in zip(self._trained, self._own, strict=True):
            if p.grad is not None:
                below += float((local(p.grad).double() - local(own).double()).square().sum())
        above, below = distributed.total([above, below])  # of rows; whole copies all count alike
        self._own = []
        return (above / below) ** 0.5 if below else None
