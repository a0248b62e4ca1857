"""What a run is saved as if a server stays away: its last finished step, however rare checkpoints are."""

from types import TracebackType

import torch

from onpath.engines.head import sharded
from onpath.run.directory import Run
from onpath.system import distributed
from onpath.system.errors import ServerError


class Rescue:
    """Around the steps of a run. The first process saves alone: the others may wait for it, or be gone; a
    sharded model needs all of them. Where a copy samples ahead in this process (`rollout.overlap`), a step
    that failed has moved more than is known here, and the last checkpoint is what there is.

    Args:
        optimizer: it says when the weights move.
        done: steps that are done, and saved.
    """

    def __init__(self, run: Run, optimizer: torch.optim.Optimizer, done: int) -> None:
        self.run, self.optimizer, self.saved = run, optimizer, done
        optimizer.register_step_pre_hook(lambda *_: self._moves())
        self.reached(done)

    def reached(self, step: int) -> None:
        """`step` steps are done: weights, moments and the method's state are theirs."""
        self.step, self.moved = step, False
        self._state = {name: tensor.clone() for name, tensor in self.run.parts.method.state().items()}

    def __enter__(self) -> "Rescue":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        parts = self.run.parts
        alone = distributed.rank() == 0 and not sharded(parts.models.student)
        ahead = parts.overlap is not None and parts.overlap.state()
        if not isinstance(error, ServerError) or not alone or ahead:
            return
        if error.finished is not None:
            self.step, self.moved = self.step + 1, False
            self.run.log(self.step, error.finished, lr=self.optimizer.param_groups[0]["lr"])
        elif not self.moved:
            with torch.no_grad():
                for name, tensor in parts.method.state().items():  # the failed step may have moved it
                    tensor.copy_(self._state[name])
        if self.step > self.saved and not self.moved:
            self.run.checkpoint(self.step, self.optimizer, wait=True, agreed=False)

    def _moves(self) -> None:
        self.moved = True
