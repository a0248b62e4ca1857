"""Teachers in process: hidden states of the response positions, and the head that makes logits of them.

No [T, V] is kept anywhere: the losses read hidden states and head in chunks. On a server: `served.py`.
"""

import contextlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import DynamicCache

from onpath.data.batch import Batch
from onpath.engines import late
from onpath.engines.decoding.branches import Past
from onpath.engines.head import evaluating, head_of, hidden_states, unwrapped
from onpath.engines.models import context_length
from onpath.engines.sharding import full, give_back
from onpath.engines.student import copy_of, trained_in
from onpath.losses import Head, TeacherHidden, TeacherScores
from onpath.records import Trajectory

AVERAGE = "ema."
"""What the names of a moving average's tensors begin with."""
_HALF = (torch.bfloat16, torch.float16)
Read = tuple[tuple[int, ...], tuple[int, ...]]
"""Context and response."""


def read_by(trajectory: Trajectory) -> Read:
    """All that one teacher's scores of a trajectory depend on."""
    return trajectory.teacher_context, trajectory.response


class Teacher:
    """Scores the response positions of a batch. A subclass defines `scores`, and what else it can do."""

    model: nn.Module | None = None
    """The model in this process, if it is one."""
    separate: nn.Module | None = None
    """That model, if it is not the student's."""
    gives_scores: bool = True
    """False: a black box that only generates; divergences are not measured."""
    context_length: int = sys.maxsize
    """Most tokens, prompt and response, that it takes. What a black box takes only it knows."""
    bf16: bool = False
    """Whether it reads under bfloat16 autocast."""
    spare: int = 0
    """Tokens beyond what it scores that must fit too."""
    names: tuple[str | None, ...] = (None,)
    """That prompts call it by, of several teachers (`routed.py`); None: it is the only one."""

    def room(self, new: int) -> int:
        """Most tokens of a context behind which it can score or generate so many."""
        return self.context_length - self.spare - new

    def of(self, name: str | None) -> "Teacher":
        """The one of several that a prompt names; otherwise itself."""
        return self

    @property
    def models(self) -> tuple[nn.Module, ...]:
        """All in this process: `model`, or those of several, each once."""
        return () if self.model is None else (self.model,)

    @property
    def head(self) -> Head | None:
        """What makes logits of its hidden states; the losses give no gradient to it."""
        return None

    def scores(self, batch: Batch, cache: DynamicCache | None = None) -> TeacherScores | None:
        """What predicts each response token in the teacher's context, [N, …], on the batch's device; None: it
        gives no scores. An empty `cache` receives the keys and values."""
        raise NotImplementedError

    def expect(self, trajectories: Iterable[Trajectory]) -> None:
        """Says what will be scored soon, in this order: a teacher on a server begins with it. Any thread may
        call it, again too."""

    def begin(self, trajectory: Trajectory) -> None:
        """Says that a rollout is to be scored, while others are still written. Any thread may call it."""
        self.expect([trajectory])

    def begun(self, trajectory: Trajectory) -> object:
        """What it reads of a rollout that `begin` was told of, for another process, which is to score it now;
        waits for it. None: nothing."""
        return None

    def take_over(self, trajectory: Trajectory, read: object) -> None:
        """What the same teacher's `begun` gave in another process. Not None."""

    def close(self) -> None:
        """What was expected and has not been scored is not wanted any more."""

    def past(self, batches: Sequence[Batch]) -> Past | None:
        """Empty KV caches for a scoring pass over some batches, from which can be generated afterwards; None:
        its attention does not allow that, or it is not in this process."""
        return None

    def acting(self) -> contextlib.AbstractContextManager[object]:
        """While something is generated in its name: the student's own weights are the teacher's."""
        return contextlib.nullcontext()

    def measured(self) -> Mapping[str, float]:
        """What this process's teacher did since it was last asked, for the step's line of metrics.jsonl;
        summed over all processes."""
        return {}

    def follow(self) -> None:
        """Called after each optimiser step: one step of a moving average; what was read for it may go."""

    def state(self) -> dict[str, Tensor]:
        """What a resumed run cannot recompute, restored in place."""
        return {}


class SilentTeacher(Teacher):
    """A black box that generates (`engines/remote/chat.py`) and scores nothing."""

    gives_scores = False

    def scores(self, batch: Batch, cache: DynamicCache | None = None) -> None:
        """See `Teacher.scores`."""


class ModelTeacher(Teacher):
    """A frozen model with its own device and dtype."""

    model: nn.Module

    def __init__(self, model: nn.Module, *, vocabulary: int | None = None) -> None:
        self.model = self.separate = model.eval().requires_grad_(False)
        self._vocabulary = vocabulary
        self.context_length = context_length(unwrapped(model).config)

    @property
    def head(self) -> Head:
        """See `Teacher.head`."""
        return head_of(self.model, self._vocabulary)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @torch.no_grad()
    def hidden(self, batch: Batch, cache: DynamicCache | None = None) -> Tensor:
        """Hidden states [N, H] that predict each response token in the teacher's context."""
        return _teacher_positions(self.model, batch, self.device, cache)

    def scores(self, batch: Batch, cache: DynamicCache | None = None) -> TeacherHidden:
        """See `Teacher.scores`."""
        return TeacherHidden(hidden=self.hidden(batch, cache), head=self.head)

    def past(self, batches: Sequence[Batch]) -> Past | None:
        """See `Teacher.past`."""
        return Past(self.model, batches) if Past.possible(self.model) else None


class SelfTeacher(Teacher):
    """The student's own weights as teacher (OPSD, TRD with teacher: self).

    `base`: the starting weights, by switching a LoRA adapter off, else from a frozen copy. `live`: the
    weights as they are. `ema`: what trains follows with `decay` at each `follow()`, in float32 whatever the
    student's dtype: in bfloat16 a hundredth of a small step rounds to nothing, and the average never moves.
    What does not train is the student's.

    Args:
        bf16: it reads under bfloat16 autocast, as the student does (optim.bf16).
        alone: the student is to be sharded, so that a copy shares nothing with it.
    """

    model: nn.Module

    def __init__(
        self,
        student: nn.Module,
        *,
        weights: Literal["base", "live", "ema"],
        decay: float = 0.99,
        vocabulary: int | None = None,
        bf16: bool = False,
        alone: bool = False,
    ) -> None:
        self.student, self.weights, self.decay, self.bf16 = student, weights, decay, bf16
        self.adapter = weights == "base" and isinstance(student, PeftModel)
        shares = weights == "live" or self.adapter
        self.model = student if shares else copy_of(student, alone=alone).eval()
        # A whole student in half precision: adapters are in float32, and only with them something is shared.
        if weights == "ema" and any(mine.dtype in _HALF for mine, _ in self._averaged().values()):
            late.wait(self.model, torch.float32)
            if not alone:
                late.whole(self.model)
        self._vocabulary = vocabulary
        self.context_length = context_length(unwrapped(student).config)

    @property
    def head(self) -> Head:
        """The teacher's head; the losses give no gradient to it, even where it is the student's own."""
        with self.acting() as model:  # the adapter may be on the head
            return head_of(model, self._vocabulary)

    @contextlib.contextmanager
    def acting(self) -> Iterator[nn.Module]:
        """The model as the teacher has it: adapter off for `base` under LoRA, no dropout."""
        adapted = isinstance(self.model, PeftModel) and self.adapter
        off = self.model.disable_adapter() if adapted else contextlib.nullcontext()  # type: ignore[operator]
        with evaluating(self.model), off:
            yield self.model

    def scores(self, batch: Batch, cache: DynamicCache | None = None) -> TeacherHidden:
        """See `Teacher.scores`."""
        return TeacherHidden(hidden=self.hidden(batch), head=self.head)

    @torch.no_grad()
    def hidden(self, batch: Batch) -> Tensor:
        """Hidden states [N, H] that predict each response token in the teacher's context."""
        with self.acting() as model:
            device = next(model.parameters()).device
            with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
                return _teacher_positions(model, batch, device)

    @torch.no_grad()
    def follow(self) -> None:
        """One step of the moving average; nothing for the other kinds of weights."""
        if self.weights == "ema":
            give_back(self.model, self.student)
            for mine, theirs in self._averaged().values():
                whole = theirs if isinstance(mine, DTensor) else full(theirs)  # parallel.teacher: copy
                mine.lerp_(whole.to(mine.dtype), 1 - self.decay)

    def state(self) -> dict[str, Tensor]:
        """What a resumed run cannot recompute: the average. A base copy is made anew from the starting
        weights."""
        return {f"{AVERAGE}{name}": mine for name, (mine, _) in self._averaged().items()}

    def _averaged(self) -> dict[str, tuple[Tensor, Tensor]]:
        return trained_in(self.model, self.student) if self.weights == "ema" else {}


def _teacher_positions(
    model: nn.Module, batch: Batch, device: torch.device, cache: DynamicCache | None = None
) -> Tensor:
    hidden_BTH = hidden_states(model, batch.teacher_ids_BT.to(device), cache)
    return batch.at_teacher(hidden_BTH).to(batch.token_N.device)
