"""What a run that fails is saved as: its last finished step, however rare checkpoints are."""

from contextlib import suppress
from types import TracebackType

import torch

from onpath.engines.head import sharded
from onpath.engines.sharding import give_back
from onpath.run.directory import Run
from onpath.run.meter import Meter
from onpath.run.sampling import NotHandedOver
from onpath.system import distributed
from onpath.system.errors import sentence_of


class Rescue:
    """Around the steps of a run. A server that stays away, a grader or method that fails, a lack of memory,
    here or in another process: up to the update of a step, weights and moments are those of the one before.

    The first process saves alone: the others may wait for it, or be gone. Of a sharded model each writes its
    rows, if none was killed: without one of them there is no checkpoint.
    Where a copy samples ahead in this process (`rollout.overlap`), a step that failed has moved more than is
    known here, and the last checkpoint is what there is.

    Args:
        optimizer: it says when the weights move.
        done: steps that are done.
    """

    def __init__(self, run: Run, optimizer: torch.optim.Optimizer, done: int) -> None:
        self.run, self.optimizer = run, optimizer
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
        ahead = parts.overlap is not None and parts.overlap.state()
        if not isinstance(error, Exception) or ahead:
            return
        if not (sentence_of(error) or distributed.lost_a_peer(error)):
            return
        if distributed.all_know(error) if sharded(parts.models.student) else distributed.rank() == 0:
            with suppress(Exception):  # the run's own failure is what people are told
                self._save(error.finished if isinstance(error, NotHandedOver) else None)

    @torch.no_grad()
    def _save(self, finished: Meter | None) -> None:
        """The state before the step that failed, or after it.

        Args:
            finished: of a step that was done but for its hand-over.
        """
        if finished is not None:
            self.step, self.moved = self.step + 1, False
            self.run.log(self.step, finished, lr=self.optimizer.param_groups[0]["lr"])
        elif not self.moved:
            for name, tensor in self.run.parts.method.state().items():  # the failed step may have moved it
                tensor.copy_(self._state[name])
        if self.step and not self.moved:
            give_back(self.run.parts.models.student)
            self.run.save_alone(self.step, self.optimizer)

    def _moves(self) -> None:
        self.moved = True
