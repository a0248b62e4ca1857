"""Teachers in process: hidden states of the response positions, and the head that makes logits of them.

No [T, V] is kept anywhere: the losses read hidden states and head in chunks. On a server: `served.py`.
"""

import contextlib
from collections.abc import Iterator
from typing import Literal, Protocol

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import DynamicCache

from onpath.data.batch import Batch
from onpath.engines.head import head_of, hidden_states
from onpath.losses import Head, TeacherHidden, TeacherScores


class Teacher(Protocol):
    """Scores the response positions of a batch."""

    def scores(self, batch: Batch) -> TeacherScores | None:
        """What predicts each response token in the teacher's context, [N, …], on the batch's device; None: it
        gives no scores."""
        ...


class SilentTeacher:
    """A black box that writes (`engines/chat.py`) and scores nothing: divergences are not measured."""

    def scores(self, batch: Batch) -> None:
        """See `Teacher.scores`."""


class ModelTeacher:
    """A frozen model with its own device and dtype."""

    def __init__(self, model: nn.Module, *, vocabulary: int | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.head = head_of(model, vocabulary)
        self.device = next(model.parameters()).device

    @torch.no_grad()
    def hidden(self, batch: Batch, cache: DynamicCache | None = None) -> Tensor:
        """Hidden states [N, H] that predict each response token in the teacher's context. An empty `cache`
        receives the keys and values."""
        return _teacher_positions(self.model, batch, self.device, cache)

    def scores(self, batch: Batch) -> TeacherHidden:
        """See `Teacher.scores`."""
        return TeacherHidden(hidden=self.hidden(batch), head=self.head)


class SelfTeacher:
    """The student's own weights as teacher (OPSD, TRD with teacher: self).

    `base`: the starting weights, by switching a LoRA adapter off, else from a frozen copy. `live`: the
    weights as they are. `ema`: a copy that follows with `decay` at each `follow()`.
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        weights: Literal["base", "live", "ema"],
        decay: float = 0.99,
        vocabulary: int | None = None,
    ) -> None:
        import copy

        self.student, self.weights, self.decay = student, weights, decay
        self.adapter = weights == "base" and isinstance(student, PeftModel)
        shares = weights == "live" or self.adapter
        self.model = student if shares else copy.deepcopy(student).eval().requires_grad_(False)
        self._vocabulary = vocabulary

    @property
    def head(self) -> Head:
        """The teacher's head; the losses give no gradient to it, even where it is the student's own."""
        return head_of(self.model, self._vocabulary)

    @contextlib.contextmanager
    def acting(self) -> Iterator[nn.Module]:
        """The model as the teacher has it: adapter off for `base` under LoRA, no dropout."""
        was_training = self.model.training
        self.model.eval()
        adapted = isinstance(self.model, PeftModel) and self.adapter
        with self.model.disable_adapter() if adapted else contextlib.nullcontext():  # type: ignore[operator]
            try:
                yield self.model
            finally:
                self.model.train(was_training)

    def scores(self, batch: Batch) -> TeacherHidden:
        """See `Teacher.scores`."""
        return TeacherHidden(hidden=self.hidden(batch), head=self.head)

    @torch.no_grad()
    def hidden(self, batch: Batch) -> Tensor:
        """Hidden states [N, H] that predict each response token in the teacher's context."""
        with self.acting() as model:
            return _teacher_positions(model, batch, next(model.parameters()).device)

    @torch.no_grad()
    def follow(self) -> None:
        """One step of the moving average; nothing for the other kinds of weights."""
        if self.weights == "ema":
            for mine, theirs in zip(self.model.parameters(), self.student.parameters(), strict=True):
                mine.lerp_(theirs.to(mine.dtype), 1 - self.decay)

    def state(self) -> dict[str, Tensor]:
        """What a resumed run cannot recompute: the average. A base copy is made anew from the starting
        weights."""
        return {f"ema.{k}": p for k, p in self.model.named_parameters()} if self.weights == "ema" else {}


def _teacher_positions(
    model: nn.Module, batch: Batch, device: torch.device, cache: DynamicCache | None = None
) -> Tensor:
    ids_BT, mask_BT = batch.teacher_ids_BT.to(device), batch.teacher_mask_BT.to(device)
    hidden_BTH = hidden_states(model, ids_BT, mask_BT, cache)
    return hidden_BTH.flatten(0, 1)[batch.teacher_at_N.to(device)].to(batch.token_N.device)
