"""The whole configuration. No torch."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import Field, model_validator

from onpath.config import elsewhere
from onpath.config.methods import METHODS, MethodOptions, SomeMethod
from onpath.config.methods.opd import OPDOptions
from onpath.config.pairs import check_pairs
from onpath.config.section import Section
from onpath.config.sections import (
    NEVER,
    Data,
    Eval,
    Optim,
    Parallel,
    Refresh,
    Reward,
    RolloutSection,
    Run,
    Student,
    Teacher,
    labelled,
)
from onpath.records import Sampling
from onpath.system.text import short, yaml_text

LABELLED: dict[str, type[Section]] = {"rewards": Reward, "teachers": Teacher}
"""Sections that hold several of a kind, by names of the user's."""

ROLLOUTS, EVALUATIONS = "rollout.max_new_tokens", "eval.max_new_tokens"
_SPARE = 60.0
"""Seconds beyond a server's last answer, in which its sentence reaches every process."""


class Evaluation(NamedTuple):
    """One set of problems, sampled in one way."""

    split: str
    """Of data.eval."""
    sampling: Sampling
    n: int
    k: int


class Config(Section):
    """Everything that a run depends on."""

    student: Student = Student()
    teacher: Teacher = Teacher()
    teachers: dict[str, Teacher] = Field({})
    """Several teachers, by name: in place of `teacher`, the same options each. `data.teacher_column` says
    which one teaches a row; the one called default has the rows that name none."""
    data: Data = Data()
    method: SomeMethod = OPDOptions()
    rollout: RolloutSection = RolloutSection()
    optim: Optim = Optim()
    parallel: Parallel = Parallel()
    eval: Eval = Eval()
    rewards: dict[str, Reward] = Field({})
    """Functions of your own that score rollouts: label → reward. One reward, or a list of them, will do: the
    function's name is its label."""
    run: Run = Run()

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        """`method: {divergence: …}` without a name means opd; rewards need no labels."""
        if not isinstance(value, Mapping):
            return value
        value = dict(value)
        method = value.get("method", {})
        if not isinstance(method, Mapping | MethodOptions):
            named = isinstance(method, str) and method in METHODS
            such = f"a mapping such as {{name: {method if named else 'opd'}}}"
            ours = "" if named else elsewhere.meant(method, METHODS)
            raise ValueError(f"method is {short(method)}; it must be {such}{ours}")
        if isinstance(method, Mapping) and "name" not in method:
            value["method"] = {"name": "opd", **method}
        if "rewards" in value:
            value["rewards"] = labelled(value["rewards"])
        rollout, asked = value.get("rollout") or {}, value.get("eval") or {}
        if (
            isinstance(rollout, Mapping)
            and isinstance(asked, Mapping)
            and asked.get("max_new_tokens") is None
        ):
            longest = rollout.get("max_new_tokens", RolloutSection().max_new_tokens)
            value["eval"] = {**asked, "max_new_tokens": longest}
        return value

    @model_validator(mode="after")
    def _possible(self) -> "Config":
        check_pairs(self)
        return self

    @property
    def evaluations(self) -> dict[str, Evaluation]:
        """Everything that an evaluation samples: each set as eval.temperature says, and also_at others."""
        section, found = self.eval, {}
        for split in self.data.eval:
            found[split] = Evaluation(split, section.sampling(), section.n, section.k)
            for t in section.also_at:
                n = section.n if t else 1
                found[section.name_at(split, t)] = Evaluation(split, section.at(t), n, min(section.k, n))
        return found

    @property
    def taught_by(self) -> dict[str | None, Teacher]:
        """Of each teacher that is another model the name that prompts call it by, and its section."""
        models = {name: teacher for name, teacher in self.teachers.items() if teacher.mixture is None}
        return dict(models.items()) if self.teachers else {None: self.teacher}

    @property
    def longest_wait(self) -> float:
        """Seconds that the processes wait for each other: at least as long as one of them may wait for a
        server, and for its last answer."""
        servers = [s for s in (self.rollout, *self.taught_by.values()) if s.url is not None]
        return max([self.parallel.timeout, *(s.patience + s.timeout + _SPARE for s in servers)])

    @property
    def longest_response(self) -> tuple[int, str]:
        """Most tokens behind a prompt, a window that begins before a response's last token included; and the
        options that say so."""
        most, (window, option) = self.rollout.max_new_tokens, self.method.longest_window
        if window < 2:
            return most, ROLLOUTS
        return most + window - 1, f"rollout.max_new_tokens or {option}"

    @property
    def longest_generated(self) -> tuple[int, str]:
        """Most tokens behind a training prompt, what the method asks for beside the rollout included; and the
        options that say so."""
        return max(self.longest_response, self.method.longest_generated, key=lambda limit: limit[0])

    @property
    def generated(self) -> dict[str, int]:
        """Option → most tokens that the student's engine generates behind a prompt."""
        evaluated = {EVALUATIONS: self.eval.sampling().max_new_tokens} if self.evaluations else {}
        return {ROLLOUTS: self.rollout.max_new_tokens, **evaluated}

    def too_long(self, longest: Mapping[str, int], room: int | None) -> tuple[str, int, int] | None:
        """The option, the prompt's tokens and the new ones that together do not fit an engine; None: all do.

        Args:
            longest: option, see `generated` → tokens of the longest prompt that it is for.
            room: tokens that the engine takes, prompt and response; None: nobody knows.
        """
        sizes = ((option, prompt, self.generated[option]) for option, prompt in longest.items())
        return next((size for size in sizes if room is not None and size[1] + size[2] > room), None)

    @property
    def mixtures(self) -> dict[str, dict[str, float]]:
        """Of each teacher that is a mixture of others its name, and their weights."""
        return {
            name: teacher.mixture for name, teacher in self.teachers.items() if teacher.mixture is not None
        }

    @property
    def sharing_ids(self) -> dict[str | None, Teacher]:
        """Those of `taught_by` that read the student's ids: their vocabulary must be the student's."""
        shares = not self.method.self_taught
        return {name: t for name, t in self.taught_by.items() if shares and t.engine != "chat"}

    @property
    def refresh(self) -> Refresh | None:
        """When rollouts are sampled anew; None: at each step."""
        if self.method.generates_ahead or self.rollout.refresh == "never":
            return NEVER
        return None if self.rollout.refresh == "always" else self.rollout.refresh

    def to_yaml(self) -> str:
        return yaml_text(self.model_dump(mode="json"))
