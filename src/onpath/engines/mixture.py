"""Several teachers as one: the mixture of what they predict, at each token."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers import DynamicCache

from onpath.data.batch import Batch
from onpath.engines.base import Engine
from onpath.engines.teacher import Teacher
from onpath.losses import TeacherHidden, TeacherMixture
from onpath.records import Completion, Sampling
from onpath.system.errors import UserError


class MixedTeacher(Teacher):
    """p_T = Σ_i w_i·p_i of other teachers, each reading every response; it scores, and writes nothing.

    Args:
        members: teachers that are models in this process.
        weights: of each, above 0, of any sum.
    """

    def __init__(self, members: Sequence[Teacher], weights: Sequence[float]) -> None:
        self.members = tuple(members)
        self.weights = _shares(weights)
        self.context_length = min(t.context_length for t in members)
        self.spare = max(t.spare for t in members)

    @property
    def models(self) -> tuple[nn.Module, ...]:
        """See `Teacher.models`."""
        return tuple(dict.fromkeys(m for t in self.members for m in t.models))

    def scores(self, batch: Batch, cache: DynamicCache | None = None) -> TeacherMixture:
        """See `Teacher.scores`."""
        found = {t: t.scores(batch) for t in dict.fromkeys(self.members)}
        members = tuple(found[t] for t in self.members)
        assert all(isinstance(one, TeacherHidden) for one in members)
        return TeacherMixture(members=members, weights=self.weights)  # type: ignore[arg-type]


class MixedEngine(Engine):
    """Scores tokens as the mixture does.

    Args:
        members: engines of its teachers.
        weights: see `MixedTeacher`.
        name: of the teacher that it is.
    """

    generates = False

    def __init__(self, members: Sequence[Engine], weights: Sequence[float], name: str) -> None:
        self.members, self.weights, self.name = tuple(members), _shares(weights), name
        self.renderer, self.stop_ids = members[0].renderer, members[0].stop_ids

    def continue_from(
        self, prefixes: Sequence[Sequence[int]], sampling: Sampling, *, keys: Sequence[str] | None = None
    ) -> list[Completion]:
        """A mixture writes nothing.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"teachers.{self.name} is a mixture, which scores and writes nothing: take a method in which the "
            "teacher only scores, or have one teacher write"
        )

    def score(
        self, contexts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> list[tuple[float, ...]]:
        """See `Engine.score`."""
        each = [member.score(contexts, responses) for member in self.members]
        shares = torch.tensor([math.log(w) for w in self.weights], dtype=torch.float64)[:, None]
        return [
            tuple(torch.logsumexp(torch.tensor(rows, dtype=torch.float64) + shares, 0).tolist())
            for rows in zip(*each, strict=True)
        ]


def _shares(weights: Sequence[float]) -> tuple[float, ...]:
    return tuple(w / sum(weights) for w in weights)


def mixed_teachers(
    mixtures: Mapping[str, Mapping[str, float]], members: Mapping[str, Teacher]
) -> dict[str, Teacher]:
    """The teachers of a config that are mixtures of others: name → teacher."""
    return {
        name: MixedTeacher([members[one] for one in weights], tuple(weights.values()))
        for name, weights in mixtures.items()
    }


def mixed_engines(
    mixtures: Mapping[str, Mapping[str, float]], members: Mapping[str, Engine]
) -> dict[str, Engine]:
    """Their engines."""
    return {
        name: MixedEngine([members[one] for one in weights], tuple(weights.values()), name)
        for name, weights in mixtures.items()
    }
