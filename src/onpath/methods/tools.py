"""What a method works with: texts and verdicts, and both models that go on with a text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from onpath.data.render import Renderer, fill, with_question
from onpath.data.tasks import Task
from onpath.engines.base import Engine, Generators, gone_on
from onpath.engines.decoding.drafts import Drafts
from onpath.engines.forward import Models, Pass
from onpath.engines.routed import by_teacher
from onpath.engines.stops import string_end
from onpath.grade.base import Grader, Verdict
from onpath.grade.rewards import Reward, totals, values_of
from onpath.records import Completion, Prompt, Rollout, Sampling
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

    @property
    def tells_errors(self) -> bool:
        """Whether the task can tell where a response first goes wrong."""
        return self.task is not None and (self.task.checks_steps or self.task.labels_tokens)

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


def needed(prompt: Prompt, column: str, why: str) -> str:
    """A column that a method cannot do without.

    Raises:
        UserError: it is missing or empty for this prompt.
    """
    value: str | None = getattr(prompt, column)
    if value is None or not value.strip():
        raise UserError(
            f"prompt {prompt.named} has no {column}, which {why} needs; add the column {column} to the "
            f"training data"
        )
    return value
