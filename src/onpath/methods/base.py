"""What was done to a rollout, as a record; verdicts and filters."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from onpath.data.render import Renderer, fill, with_question
from onpath.engines.base import Completion, Engine
from onpath.engines.chat import ChatWriter
from onpath.engines.reading import Measure, Readings
from onpath.engines.teacher import SelfTeacher, Teacher
from onpath.grade.base import Grader
from onpath.records import Prompt, Rollout, Sampling, Trajectory
from onpath.system.errors import UserError


def verdicts(
    grader: Grader, renderer: Renderer, pairs: Sequence[tuple[Rollout, tuple[int, ...]]]
) -> list[bool | None]:
    """Whether each response (the ids) answers its rollout's prompt; None without an answer to compare
    with."""
    known = [(renderer.text(ids), r.prompt.answer) for r, ids in pairs if r.prompt.answer is not None]
    found = iter(grader.grade_many(known))
    return [None if r.prompt.answer is None else next(found).correct for r, _ in pairs]


@dataclass(frozen=True, kw_only=True)
class Tools:
    """What methods work with."""

    student: Engine
    writer: Engine | ChatWriter
    """Writes in the teacher's name: rewrites, windows, samples. A black box answers messages only."""
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
    measure: Measure
    """Per-token statistics of student and teacher."""
    room: int
    """Most tokens, prompt and response, that the writer takes."""
    first_error: Callable[[str, str], int | None] | None = None
    """The task's checker of steps: (problem, response) → characters before the first error."""
    onset_ids: tuple[int, ...] = ()
    """First tokens of the words that open a correction."""

    @property
    def speaker(self) -> Engine:
        """The writer, where it goes on from token ids and scores them.

        Raises:
            UserError: it is a black box.
        """
        if isinstance(self.writer, ChatWriter):
            raise UserError(
                "teacher.engine: chat answers messages only, and this needs a teacher that goes on from "
                "token ids and scores them; use hf or vllm"
            )
        return self.writer


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A method's answer to one step's rollouts."""

    trajectories: list[Trajectory]
    """To train on, and with `edit.kept` false those recorded only."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """Added to the step's line of metrics.jsonl."""
    means: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Likewise, as (sum, count) of this process: divided after both are summed over all processes."""
    totals: Mapping[str, float] = field(default_factory=dict)
    """Likewise, summed over all processes."""
    readings: Readings = field(default_factory=Readings)
    """Hidden states that the method has computed already and the loss can use."""
    guidance_weight: float = 1.0
    """λ of the trajectories' guidance."""


class Method(Protocol):
    """One published method."""

    def prepare(self, rollouts: Sequence[Rollout], *, step: int) -> Prepared:
        """Edits or annotates the rollouts of one optimiser step (of this process)."""
        ...

    def after_step(self, measured: Mapping[str, float]) -> None:
        """Called once after each optimiser step, with what it measured (`Meter.measured`)."""
        ...

    def state(self) -> Mapping[str, Tensor]:
        """Tensors that a resumed run needs, restored in place."""
        ...


class Stateless:
    """The two calls that most methods have no use for."""

    def after_step(self, measured: Mapping[str, float]) -> None:
        return

    def state(self) -> Mapping[str, Tensor]:
        return {}


class SelfTaught:
    """The same two calls where the teacher follows the student."""

    teacher: Teacher

    def after_step(self, measured: Mapping[str, float]) -> None:
        if isinstance(self.teacher, SelfTeacher):
            self.teacher.follow()

    def state(self) -> Mapping[str, Tensor]:
        return self.teacher.state() if isinstance(self.teacher, SelfTeacher) else {}


def own_response(
    rollout: Rollout, *, teacher_context: Sequence[int] | None = None, length: int | None = None
) -> Trajectory:
    """The student's rollout, or its first tokens, in the teacher's context (default: the student's)."""
    return Trajectory(
        student_context=rollout.context,
        teacher_context=rollout.context if teacher_context is None else tuple(teacher_context),
        response=rollout.ids[:length],
        origin=rollout,
        behaviour_logprobs=rollout.logprobs[:length],
    )


def privileged_context(prompt: Prompt, template: str, column: str, tools: Tools) -> tuple[int, ...]:
    """Ids of a prompt that also shows `column` (solution or answer)."""
    slots = {"problem": prompt.question, column: needed(prompt, column, "the privileged prompt")}
    return tools.renderer.ids(with_question(prompt, fill(template, **slots)))


def judging_context(rollout: Rollout, *, reference: bool, tools: Tools) -> tuple[int, ...]:
    """Where a teacher that has not seen y reads it: after the problem, or after problem and reference."""
    if not reference:
        return rollout.context
    return privileged_context(rollout.prompt, tools.templates["hint"], "solution", tools)


def written(
    tools: Tools,
    prompts: Sequence[Prompt],
    prefixes: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    keys: Sequence[str],
) -> list[Completion]:
    """What is written in the teacher's name after prefixes, which are renderings of prompts: a black box is
    shown the prompts."""
    if isinstance(tools.writer, ChatWriter):
        return tools.writer.write(prompts, sampling, keys=keys)
    with acting(tools.teacher):
        return tools.writer.continue_from(prefixes, sampling, keys=keys)


def check_written(trajectories: Sequence[Trajectory], *, step: int, who: str, of: str, look: str) -> None:
    """Some of what was written in the teacher's name must be text.

    Raises:
        UserError: none of it is.
    """
    if trajectories and all(t.edit.reason == "empty" for t in trajectories):
        raise UserError(
            f"step {step + 1}: {who} returned no text for any of {len(trajectories)} {of}, so there is "
            f"nothing to train on; look at {look}"
        )


def acting(teacher: Teacher) -> contextlib.AbstractContextManager[object]:
    """While the writer writes in the teacher's name: a `self` teacher has its adapter off, if it must."""
    return teacher.acting() if isinstance(teacher, SelfTeacher) else contextlib.nullcontext()


def needed(prompt: Prompt, column: str, why: str) -> str:
    """A column that a method cannot do without.

    Raises:
        UserError: it is missing or empty for this prompt.
    """
    value: str | None = getattr(prompt, column)
    if value is None or not value.strip():
        raise UserError(
            f"prompt {prompt.id!r} has no {column}, which {why} needs; add the column {column} to the "
            f"training data"
        )
    return value
