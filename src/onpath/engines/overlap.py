"""One-step overlap: the next batch is sampled while this one trains (`rollout.overlap`).

    step              0         1         2         3
    trained on        W0        W0        W1        W2      weights that wrote the batch: its policy_version
    weights           W0 → W1   W1 → W2   W2 → W3   …

The weights that train must not move under a sample. The transformers engine samples from a frozen copy of
them, made when a step begins: draws depend on (seed, step) and on that copy alone, so it is all that a
resumed run needs. A vLLM has weights of its own, which are replaced when it has written: a resumed run draws
its first batch from the weights of its checkpoint, staleness 0.
"""

import copy
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn

from onpath.config.build import Config
from onpath.config.methods.trd import TRDOptions
from onpath.engines.base import Engine
from onpath.engines.hf import HFEngine
from onpath.engines.server import ServerEngine
from onpath.engines.vllm import VLLMEngine
from onpath.records import Rollout
from onpath.system import distributed
from onpath.system.errors import UserError

Draw = Callable[[int], list[Rollout]]
"""Step (from 0) → its rollouts, by this class's engine."""


class Ahead:
    """Hands out each step's rollouts, drawn by the weights of the step before, and draws the next ones.

    Args:
        student: the model that trains; None: the engine has weights of its own.
        engine: otherwise over a copy of it. Its tokenizer is its own too (they are not safe to share).
        steps: of the run; nothing is drawn beyond.
    """

    def __init__(self, student: nn.Module | None, engine: Engine, *, steps: int) -> None:
        self.student, self.engine, self.steps = student, engine, steps
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="onpath-ahead")
        self._next: tuple[int, Future[list[Rollout]]] | None = None

    def __call__(self, step: int, draw: Draw) -> list[Rollout]:
        """Rollouts of `step`. Call it when the step begins, before its weights move."""
        rollouts = self._drawn(step, draw)
        if step + 1 < self.steps:
            self._follow(version=step)
            self._next = step + 1, self._thread.submit(draw, step + 1)
        return rollouts

    def _drawn(self, step: int, draw: Draw) -> list[Rollout]:
        waiting, self._next = self._next, None
        if waiting is not None:
            assert waiting[0] == step, f"step {waiting[0]} was drawn, step {step} is asked for"
            return waiting[1].result()
        if self.student is not None:  # the first step, or the first after a resume: the copy is one step old
            self.engine.sync_weights(max(0, step - 1))
        return draw(step)

    def before_sync(self) -> None:
        """Waits until the next batch is drawn, by all processes, if new weights are to go into the engine
        that draws it.

        Raises:
            UserError: it could not be drawn.
        """
        if self.student is None:
            if self._next is not None:
                self._next[1].result()
            distributed.barrier()

    @torch.no_grad()
    def _follow(self, *, version: int) -> None:
        if self.student is None:
            return
        assert isinstance(self.engine, HFEngine)
        for mine, theirs in zip(self.engine.model.parameters(), self.student.parameters(), strict=True):
            if theirs.requires_grad:
                mine.copy_(theirs)
        self.engine.sync_weights(version)

    def state(self) -> dict[str, Tensor]:
        """The weights that draw the next batch: one step older than those of the checkpoint. Nothing where
        the engine has its own."""
        if self.student is None:
            return {}
        assert isinstance(self.engine, HFEngine)
        copies = dict(self.engine.model.named_parameters())
        return {f"ahead.{n}": copies[n] for n, p in self.student.named_parameters() if p.requires_grad}

    def close(self) -> None:
        """Waits for what is being drawn."""
        self._thread.shutdown(wait=True, cancel_futures=True)


def fresh(config: Config, rollouts: list[Rollout], step: int) -> list[Rollout]:
    """The rollouts, if weights of at most `rollout.max_staleness` steps before `step` (from 0) wrote them.

    Raises:
        UserError: older ones did. Not with method.offline: there the starting weights write everything.
    """
    if isinstance(config.method, TRDOptions) and config.method.offline:
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


def make_ahead(
    config: Config, student: nn.Module, own: Engine, engine_over: Callable[[nn.Module], HFEngine]
) -> Ahead | None:
    """None without `rollout.overlap`.

    Args:
        own: the student's engine.
    """
    if not config.rollout.overlap:
        return None
    if not isinstance(own, HFEngine):
        assert isinstance(own, ServerEngine | VLLMEngine)
        own.renderer = copy.deepcopy(own.renderer)
        return Ahead(None, own, steps=config.optim.steps)
    engine = engine_over(copy.deepcopy(student).requires_grad_(False))
    engine.renderer = copy.deepcopy(engine.renderer)
    return Ahead(student, engine, steps=config.optim.steps)
