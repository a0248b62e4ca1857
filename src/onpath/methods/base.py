"""What a method is: it turns rollouts into trajectories. Everything else is the same for all of them.

A method of your own is a class like those beside this file, in a file anywhere: docs/extending.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from onpath.config.methods import MethodOptions
from onpath.data.render import Renderer, fill, with_question
from onpath.data.tasks import Task
from onpath.engines.base import Engine, Generators, gone_on
from onpath.engines.decoding.drafts import Drafts
from onpath.engines.forward import Kept, Models, Pass
from onpath.engines.routed import by_teacher
from onpath.engines.stops import string_end
from onpath.grade.base import Grader, Verdict
from onpath.grade.rewards import Reward, totals, values_of
from onpath.records import Completion, Prompt, Rollout, Sampling, Trajectory
from onpath.system import distributed
from onpath.system.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Text:
    """What stands between ids and people: prompts, verdicts, the task's own knowledge."""

    renderer: Renderer
    grader: Grader
    templates: Mapping[str, str]
    """User messages of privileged prompts: `hint`, `hint_answer`, `rewrite`, `rewrite_with_reference`."""
    task: Task | None = None
    """The task that the training prompts belong to."""
    correction_ids: tuple[int, ...] = ()
    """First tokens of the words that open a correction."""
    rewards: tuple[Reward, ...] = ()

    def verdicts(self, pairs: Sequence[tuple[Rollout, Sequence[int]]]) -> list[Verdict | None]:
        """Whether each response (the ids) answers its rollout's prompt; None without an answer to compare
        with."""
        known = [
            (self.renderer.graded(ids), r.prompt.answer) for r, ids in pairs if r.prompt.answer is not None
        ]
        found = iter(self.grader.grade_many(known))
        return [None if r.prompt.answer is None else next(found) for r, _ in pairs]

    def right(self, pairs: Sequence[tuple[Rollout, Sequence[int]]]) -> list[bool | None]:
        """The verdicts' first half."""
        return [None if v is None else v.correct for v in self.verdicts(pairs)]

    def reward_values(self, rollouts: Sequence[Rollout]) -> dict[str, list[float]]:
        """Label → one value per rollout, of each reward of the config, and `reward`, their weighted sum."""
        found = values_of(self.rewards, rollouts, [self.renderer.text(r.ids) for r in rollouts])
        if found and "reward" not in found:
            found["reward"] = totals(self.rewards, found, len(rollouts))
        return found

    def reward(self, rollouts: Sequence[Rollout]) -> list[float]:
        """The weighted sum of the config's rewards for each rollout: what a method may filter or weigh by."""
        return totals(self.rewards, self.reward_values(rollouts), len(rollouts))

    def privileged_context(self, prompt: Prompt, template: str, column: str) -> tuple[int, ...]:
        """Ids of a prompt that also shows `column` (solution or answer)."""
        slots = {"problem": prompt.question, column: needed(prompt, column, "the privileged prompt")}
        return self.renderer.ids(with_question(prompt, fill(template, **slots)))

    def judging_context(self, rollout: Rollout, *, reference: bool, room: int) -> tuple[int, ...]:
        """Where a teacher that has not seen y reads it: after the problem, or after problem and reference.

        Args:
            room: most tokens that leave the teacher space for y (`Teacher.room`): a reference loses its end
                until they do; where not even the words around it fit, the problem stands alone.
        """
        if not reference:
            return rollout.context
        solution = needed(rollout.prompt, "solution", "the privileged prompt")
        _, ids, _ = self.renderer.within(
            rollout.prompt, self.templates["hint"], {"solution": solution}, longest=room
        )
        return ids if len(ids) <= room else rollout.context

    def first_error(self, rollout: Rollout) -> int | None:
        """Tokens before the first wrong step of a response; None: there is none, or the task cannot tell."""
        if self.task is None or not self.task.checks_steps:
            return None
        at = self.task.first_error(rollout.prompt.question, self.renderer.text(rollout.ids))
        return None if at is None else self.renderer.tokens_before(rollout.ids, at)

    def first_wrong_token(self, rollout: Rollout, *, after: int = 0) -> int | None:
        """Its first wrong token where the task labels tokens, else the first one of its first wrong step;
        those before `after` do not count."""
        if self.task is None or not self.task.labels_tokens:
            at = self.first_error(rollout)
            return None if at is None or at < after else at
        labels = self.task.labels(rollout.prompt.question, self.renderer.tokens(rollout.ids))
        return next((t for t, label in enumerate(labels) if t >= after and label == "error"), None)


@dataclass(frozen=True, kw_only=True)
class Tools:
    """What methods work with."""

    models: Models
    """Both models, to be read: `onpath.engines.forward.per_token`."""
    generators: Generators
    """Both engines: `tools.generators.teacher.continue_from(…)`."""
    text: Text
    sampling: Sampling
    """Of the student's rollouts."""

    def gather(self, items: Sequence[T]) -> list[T]:
        """What each process gives, of all of them and on each of them, in one order: every process must call,
        as often as the others. With one process the items themselves."""
        return distributed.gather(items)

    def string_end(self, ids: Sequence[int]) -> int | None:
        """Tokens of a response up to the one that completes a stop string, whoever wrote its parts; None: no
        string is complete."""
        strings = self.generators.student.stop_strings
        return string_end(ids, strings, self.text.renderer.text)

    def in_teachers_name(
        self,
        prompts: Sequence[Prompt],
        prefixes: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        keys: Sequence[str],
        drafts: Sequence[Drafts] | None = None,
    ) -> list[Completion]:
        """What is generated in the teacher's name after prefixes, which are renderings of prompts: a black
        box is shown the prompts.

        Args:
            drafts: texts, one per prefix, that it is likely to repeat: saves time, changes nothing.
        """
        with self.models.teacher.acting():
            return self.generators.teacher.answer(prompts, prefixes, sampling, keys=keys, drafts=drafts)

    def teacher_continues(
        self,
        rollouts: Sequence[Rollout],
        places: Sequence[tuple[int, int]],
        sampling: Sampling,
        keys: Sequence[str],
        scored: Pass | None = None,
    ) -> list[Completion]:
        """What the teacher generates after the first tokens of responses.

        Args:
            places: (index of a rollout, length of the response's prefix) each.
            scored: the pass in which the teacher scored these rollouts, which saves reading them again.
        """
        teacher = self.generators.teacher if scored is None else self.generators.teacher.of(scored.teacher)
        if scored is None or scored.past is None or not teacher.can_draw_from(scored.past):
            return by_teacher(
                [rollouts[row].prompt.teacher for row, _ in places],
                lambda name, mine: self.generators.teacher.of(name).continue_from(
                    [rollouts[row].prefix(n) for row, n in (places[i] for i in mine)],
                    sampling,
                    keys=[keys[i] for i in mine],
                ),
            )
        rows = {t.place: row for row, t in enumerate(scored.trajectories)}
        at = [(rows[row], len(rollouts[row].context) + n) for row, n in places]
        return teacher.draw_from(scored.past, at, sampling, keys=keys, drafts=scored.drafts())

    def student_continues(
        self, rollouts: Sequence[Rollout], keys: Sequence[str], *, at_most: int | None = None
    ) -> tuple[list[Completion], int]:
        """What the student generates after responses, `at_most` tokens or as many as
        `sampling.max_new_tokens` leaves; and the tokens that this took."""
        student = self.generators.student, self.models.student_context_length
        return self._continued(*student, rollouts, self.sampling, keys, at_most)

    def teacher_finishes(
        self, rollouts: Sequence[Rollout], sampling: Sampling, keys: Sequence[str]
    ) -> tuple[list[Completion], int]:
        """What the teacher generates after responses, up to `sampling.max_new_tokens` of each; and the tokens
        that this took."""
        longest, spent = self.models.teacher.context_length, 0

        def finish(name: str | None, mine: list[int]) -> list[Completion]:
            nonlocal spent
            some, named = [rollouts[i] for i in mine], [keys[i] for i in mine]
            engine = self.generators.teacher.of(name)
            done, generated = self._continued(engine, longest, some, sampling, named, None)
            spent += generated
            return done

        return by_teacher([r.prompt.teacher for r in rollouts], finish), spent

    def _continued(
        self,
        engine: Engine,
        longest: int,
        rollouts: Sequence[Rollout],
        sampling: Sampling,
        keys: Sequence[str],
        at_most: int | None,
    ) -> tuple[list[Completion], int]:
        left = [sampling.max_new_tokens - len(r.ids) for r in rollouts]
        room = left if at_most is None else [min(at_most, n) for n in left]
        prefixes = [r.prefix(len(r.ids)) for r in rollouts]
        done = gone_on(engine, prefixes, room, sampling, keys=keys, longest=longest)
        # What a row was given beyond its own room depends on the rows beside it, and is not counted.
        return done, sum(len(c.ids) for c in done)


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
    """Likewise, summed over all processes. `student_tokens_generated` and `teacher_tokens_generated` are what
    the method had them generate, beside the rollouts."""
    kept: Kept = field(default_factory=Kept)
    """Hidden states that the method has computed already and the loss can use."""
    guidance_weight: float = 1.0
    """λ of the trajectories' guidance."""


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What a method finds out about itself on a sample of prompts, before it trains."""

    sentence: str
    """For people."""
    refusal: str = ""
    """Why training like this would do harm; empty if it should not."""
    binding: bool = True
    """Whether `before_training` refuses to go on then."""
    values: Mapping[str, Any] = field(default_factory=dict)


class Method:
    """One published method: `prepare` is all that it must define.

    Args:
        options: an instance of `Options`, from the config's section `method`.
        tools: models, engines, text, sampling.
    """

    Options: ClassVar[type[MethodOptions]] = MethodOptions
    compares_samples: ClassVar[bool] = False
    """Whether `prepare` compares the samples of one prompt (rollout.n above 1): then they go to one process
    together, where rollouts are dealt to several."""

    def __init__(self, options: Any, tools: Tools) -> None:
        self.options, self.tools = options, tools

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if not (isinstance(cls.Options, type) and issubclass(cls.Options, MethodOptions)):
            raise UserError(
                f"{cls.__name__}.Options must be derived from onpath.methods.MethodOptions, as in "
                "class Options(MethodOptions)"
            )
        inherited = "Options" not in vars(cls)
        if inherited or (cls.Options.method_class and cls.Options.model_fields["name"].annotation is not str):
            # A method is found by its options' class, which must not be another one's, nor ask for its name.
            own = {
                "__module__": cls.__module__,
                "__doc__": cls.Options.__doc__,
                "__annotations__": {"name": str},
            }
            cls.Options = type("Options", (cls.Options,), {**own, "name": ""})
        cls.Options.method_class = cls

    def prepare(self, rollouts: Sequence[Rollout], *, step: int) -> Prepared:
        """Edits or annotates the rollouts of one optimiser step. Draws depend on `step`.

        Args:
            rollouts: this process's part of them (see `compares_samples` and `Tools.gather`).
        """
        raise NotImplementedError

    def write_rollouts(
        self, blank: Sequence[Rollout], *, keys: Sequence[str], step: int
    ) -> Sequence[Rollout]:
        """Writes the rollouts of one step in place of the student's engine, where the options say so
        (`writes_rollouts`); with `Rollout.writers`, where the student has not written all.

        Args:
            blank: this process's rollouts, without a token.
            keys: of each: name its first draws, as they name the student's own.
        """
        raise NotImplementedError

    def scored_first(self, rollout: Rollout) -> Trajectory | None:
        """What the teacher will be asked to score of a rollout, where that is known as soon as it is written:
        it may begin while others are. None: it depends on more."""
        return None

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Looks at the training prompts before anything is generated.

        Raises:
            UserError: one cannot be used.
        """

    def before_training(self, prompts: Sequence[Prompt], directory: Path) -> str:
        """Called once before the first step, on every process, with the starting weights.

        Args:
            prompts: the training pool.
            directory: of the run; what is written there is found again by a resumed run.

        Returns:
            A sentence for people, or nothing.

        Raises:
            UserError: the run should not start.
        """
        return ""

    def rehearse(self, prompts: Sequence[Prompt]) -> Rehearsal | None:
        """What `before_training` would find, without a trace: for `onpath doctor`. None: it asks nothing."""
        return None

    def after_step(self, measured: Mapping[str, Any]) -> None:
        """Called after each optimiser step with its metrics over all processes, as metrics.jsonl has them,
        without seconds, learning rate and versions."""

    def state(self) -> Mapping[str, Tensor]:
        """Tensors that a resumed run needs, restored in place. All processes hold the same (`Tools.gather`):
        a checkpoint has one, for any number of processes."""
        return {}


def own_response(
    rollout: Rollout, *, teacher_context: Sequence[int] | None = None, length: int | None = None
) -> Trajectory:
    """A rollout, or its first tokens, in the teacher's context (default: the student's)."""
    return Trajectory(
        student_context=rollout.context,
        teacher_context=rollout.context if teacher_context is None else tuple(teacher_context),
        response=rollout.ids[:length],
        origin=rollout,
        behaviour_logprobs=rollout.logprobs[:length],
        writers=rollout.writers[:length] or None,
    )


def check_generated(trajectories: Sequence[Trajectory], *, step: int, who: str, of: str, look: str) -> None:
    """Some of what was generated in the teacher's name must be text, over all processes: each must call.

    Raises:
        UserError: none of it is.
    """
    mine = [len(trajectories), sum(t.edit.reason == "empty" for t in trajectories)]
    asked, empty = distributed.total(mine)
    if asked and empty == asked:
        raise UserError(
            f"step {step + 1}: {who} returned no text for any of {asked:.0f} {of}, so there is nothing to "
            f"train on; look at {look}"
        )


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
