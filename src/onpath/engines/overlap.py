"""One-step overlap: the next batch is sampled while this one trains (`rollout.overlap`).

    step              0         1         2         3
    trained on        W0        W0        W1        W2      of the generator: policy_version
    weights           W0 → W1   W1 → W2   W2 → W3   …

The weights that train must not move under a sample. The transformers engine samples from a frozen copy of
them, made when a step begins: draws depend on (seed, step) and on that copy alone, so it is all that a
resumed run needs. A vLLM has weights of its own, which are replaced when it is done: a resumed run draws
its first batch from the weights of its checkpoint, staleness 0.
"""

import copy
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn

from onpath.config.whole import Config
from onpath.engines.base import Engine
from onpath.engines.hf import HFEngine
from onpath.engines.sharding import asked, full
from onpath.engines.student import copy_of, trained_in
from onpath.records import Rollout
from onpath.system import distributed
from onpath.system.errors import UserError

Draw = Callable[[int], list[Rollout]]
"""Step (from 0) → its rollouts, by this class's engine."""


class Overlap:
    """Hands out each step's rollouts, drawn by the weights of the step before, and draws the next ones.

    Args:
        engine: draws, with a renderer of its own.
        steps: of the run; nothing is drawn beyond.
        student: the model that trains, and frozen: the copy of it that the engine reads. None: the engine has
            weights of its own.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        steps: int,
        student: nn.Module | None = None,
        frozen: nn.Module | None = None,
    ) -> None:
        self.engine, self.steps = engine, steps
        self._student, self._frozen = student, frozen
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="onpath-overlap")
        self._next: tuple[int, Future[list[Rollout]]] | None = None

    def __call__(self, step: int, draw: Draw) -> list[Rollout]:
        """Rollouts of `step`. Call it when the step begins, before its weights move."""
        rollouts = self._drawn(step, draw)
        self._follow(version=step)  # also in the last step: the run may be made longer
        if step + 1 < self.steps:
            self._next = step + 1, self._thread.submit(draw, step + 1)
        return rollouts

    def _drawn(self, step: int, draw: Draw) -> list[Rollout]:
        waiting, self._next = self._next, None
        if waiting is not None:
            assert waiting[0] == step, f"step {waiting[0]} was drawn, step {step} is asked for"
            return waiting[1].result()
        if self._frozen is not None:  # the first step, or the first after a resume: the copy is one step old
            self.engine.sync_weights(max(0, step - 1))
        return draw(step)

    def before_sync(self) -> None:
        """Waits until the next batch is drawn, by all processes, if new weights are to go into the engine
        that draws it.

        Raises:
            UserError: it could not be drawn.
        """
        if self._frozen is None:
            if self._next is not None:
                self._next[1].result()
            distributed.barrier()

    @torch.no_grad()
    def _follow(self, *, version: int) -> None:
        for frozen, trained in self._pairs().values():
            frozen.copy_(full(trained))
        if self._frozen is not None:
            self.engine.sync_weights(version)

    def _pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        if self._frozen is None or self._student is None:
            return {}
        return trained_in(self._frozen, self._student)

    def state(self) -> dict[str, Tensor]:
        """The weights that draw the next batch: one step older than those of the checkpoint. Nothing where
        the engine has its own."""
        return {f"ahead.{n}": frozen for n, (frozen, _) in self._pairs().items()}

    def close(self) -> None:
        """Waits for what is being drawn."""
        self._thread.shutdown(wait=True, cancel_futures=True)


def fresh(config: Config, rollouts: list[Rollout], step: int) -> list[Rollout]:
    """The rollouts, if the weights that generated them are at most `rollout.max_staleness` steps old.

    Raises:
        UserError: older ones did. Not where rollout.refresh has a rule of its own.
    """
    if config.refresh is not None:
        return rollouts
    limit = config.rollout.max_staleness
    oldest = min((r.policy_version for r in rollouts), default=step)
    if step - oldest > limit:
        raise UserError(
            f"step {step + 1}: rollouts were written by weights {step - oldest} steps old, and "
            f"rollout.max_staleness is {limit}: the engine does not take new weights; start it anew, then "
            "the same command"
        )
    return rollouts


def frozen_copy(config: Config, student: nn.Module, engine: Engine | None) -> nn.Module | None:
    """What samples while the student trains, made before that is sharded; None: nothing of the kind is asked.

    Args:
        engine: a user's own, in place of the one that the config names.
    """
    shares = config.rollout.engine == "hf" if engine is None else engine.shares_weights
    return copy_of(student, alone=asked(config)) if config.rollout.overlap and shares else None


def make_overlap(
    config: Config, student: nn.Module, frozen: nn.Module | None, engine: Engine, own: HFEngine
) -> Overlap | None:
    """None without `rollout.overlap`.

    Args:
        frozen: a whole copy of the student, for an engine that would read the student itself.
        engine: the student's engine.
        own: over the student itself.
    """
    if not config.rollout.overlap:
        return None
    if not engine.shares_weights:
        return Overlap(engine, steps=config.optim.steps)
    assert frozen is not None
    drawing = own.over(frozen, renderer=copy.deepcopy(own.renderer))
    return Overlap(drawing, steps=config.optim.steps, student=student, frozen=frozen)
