"""What a method is: it turns rollouts into trajectories. Everything else is the same for all of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from onpath.engines.base import Engine
from onpath.grade import Grader
from onpath.records import Prompt, Rollout, Sampling, Trajectory
from onpath.render import Renderer
from onpath.teacher import SelfTeacher, Teacher


@dataclass(frozen=True, kw_only=True)
class Tools:
    """What methods work with."""

    student: Engine
    writer: Engine
    """Writes in the teacher's name: rewrites, windows, samples."""
    teacher: Teacher
    """Scores the response positions."""
    renderer: Renderer
    grader: Grader
    sampling: Sampling
    """Of the student's rollouts."""
    templates: Mapping[str, str]
    """User messages of privileged prompts: `hint`, `hint_answer`, `rewrite`, `rewrite_with_reference`."""
    vocabulary: int
    """Number of token ids that student and teacher share."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A method's answer to one step's rollouts."""

    trajectories: list[Trajectory]
    """To train on, and with `edit.kept` false those recorded only."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """Added to the step's line of metrics.jsonl."""


class Method(Protocol):
    """One published method."""

    def prepare(self, rollouts: Sequence[Rollout], *, step: int) -> Prepared:
        """Edits or annotates the rollouts of one optimiser step (of this process)."""
        ...

    def after_step(self) -> None:
        """Called once after each optimiser step."""
        ...

    def state(self) -> Mapping[str, Tensor]:
        """Tensors that a resumed run needs, restored in place."""
        ...


class Stateless:
    """The two calls that most methods have no use for."""

    def after_step(self) -> None:
        return

    def state(self) -> Mapping[str, Tensor]:
        return {}


class SelfTaught:
    """The same two calls where the teacher follows the student."""

    teacher: Teacher

    def after_step(self) -> None:
        if isinstance(self.teacher, SelfTeacher):
            self.teacher.follow()

    def state(self) -> Mapping[str, Tensor]:
        return self.teacher.state() if isinstance(self.teacher, SelfTeacher) else {}


def own_response(rollout: Rollout, *, teacher_context: Sequence[int] | None = None) -> Trajectory:
    """The student's rollout as it is, scored in the teacher's context (default: the student's)."""
    return Trajectory(
        student_context=rollout.context,
        teacher_context=rollout.context if teacher_context is None else tuple(teacher_context),
        response=rollout.ids,
        origin=rollout,
        behaviour_logprobs=rollout.logprobs,
    )


def needed(prompt: Prompt, column: str, why: str) -> str:
    """A column that a method cannot do without.

    Raises:
        UserError: it is missing or empty for this prompt.
    """
    from onpath.errors import UserError

    value: str | None = getattr(prompt, column)
    if value is None or not value.strip():
        raise UserError(
            f"prompt {prompt.id!r} has no {column}, which {why} needs; add the column {column} to the "
            f"training data"
        )
    return value
