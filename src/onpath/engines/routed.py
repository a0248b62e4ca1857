"""Several teachers, and engines in their names: each prompt names the one that teaches it.

A batch is read by one of them (`micro_batches`), and a request in a teacher's name says which prompt it is of
(`Engine.answer`), or asks the engine of that teacher (`of`). One that is offloaded waits in host memory, and
comes to its device in place of another when it is asked for.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import nn
from transformers import DynamicCache

from onpath.data.batch import Batch
from onpath.engines.base import Engine
from onpath.engines.decoding.branches import Past
from onpath.engines.decoding.drafts import Drafts
from onpath.engines.teacher import Teacher
from onpath.losses import TeacherScores
from onpath.records import Completion, Prompt, Sampling, Trajectory
from onpath.system.errors import UserError

T = TypeVar("T")
_HOST = torch.device("cpu")


class RoutedTeacher(Teacher):
    """Several teachers. What needs a particular one asks `of`.

    Args:
        members: name → teacher; one of two names is the same object twice.
        homes: the device of each model in this process that is offloaded: it waits in host memory, and at
            most one of them is at home. None: all stay where they are.
    """

    def __init__(
        self, members: Mapping[str, Teacher], *, homes: Mapping[str, torch.device] | None = None
    ) -> None:
        self.members, self.homes = dict(members), homes
        self.names = tuple(members)
        self.context_length = min(t.context_length for t in members.values())
        self.spare = max(t.spare for t in members.values())
        self.moves = 0
        """Models brought to their devices so far."""
        self._at_home: Teacher | None = None

    @property
    def models(self) -> tuple[nn.Module, ...]:
        """See `Teacher.models`."""
        return tuple(dict.fromkeys(m for t in self.members.values() for m in t.models))

    def of(self, name: str | None) -> Teacher:
        """See `Teacher.of`: it is on its device until another is asked for.

        Raises:
            UserError: no teacher has this name.
        """
        if name not in self.members:
            raise UserError(
                "with several teachers a trajectory must say by its origin whose it is: a method of yours "
                f"made one that names {name!r}, and there are {', '.join(self.members)}"
            )
        member = self.members[name]
        if self.homes is not None and name in self.homes and member is not self._at_home:
            if self._at_home is not None:
                _move(self._at_home, _HOST)
            _move(member, self.homes[name])
            self._at_home, self.moves = member, self.moves + 1
        return member

    def scores(self, batch: Batch, cache: DynamicCache | None = None) -> TeacherScores | None:
        """See `Teacher.scores`."""
        return self.of(batch.teacher).scores(batch, cache)

    def expect(self, trajectories: Iterable[Trajectory]) -> None:
        """See `Teacher.expect`; none moves for it."""
        several = list(trajectories)
        for name, member in self.members.items():
            member.expect([t for t in several if t.teacher == name])

    def begun(self, trajectory: Trajectory) -> object:
        """See `Teacher.begun`; none moves for it."""
        return self.members[str(trajectory.teacher)].begun(trajectory)

    def take_over(self, trajectory: Trajectory, read: object) -> None:
        """See `Teacher.take_over`."""
        self.members[str(trajectory.teacher)].take_over(trajectory, read)

    def follow(self) -> None:
        """See `Teacher.follow`: all of them do."""
        for member in dict.fromkeys(self.members.values()):
            member.follow()

    def close(self) -> None:
        """See `Teacher.close`."""
        for member in dict.fromkeys(self.members.values()):
            member.close()

    def measured(self) -> Mapping[str, float]:
        """See `Teacher.measured`: of all."""
        found: Counter[str] = Counter()
        for member in dict.fromkeys(self.members.values()):
            found.update(member.measured())
        return found

    def past(self, batches: Sequence[Batch]) -> Past | None:
        """See `Teacher.past`: of batches of one teacher."""
        (name,) = {batch.teacher for batch in batches}
        return self.of(name).past(batches)


def _move(teacher: Teacher, device: torch.device) -> None:
    for model in teacher.models:
        model.to(device)


class RoutedEngine(Engine):
    """Generates in the name of each prompt's teacher.

    Args:
        teacher: the same several teachers.
        members: name → engine.
    """

    def __init__(self, teacher: RoutedTeacher, members: Mapping[str, Engine]) -> None:
        self.teacher, self.members = teacher, dict(members)
        one = next(iter(members.values()))
        self.renderer, self.stop_ids = one.renderer, one.stop_ids

    def of(self, teacher: str | None) -> Engine:
        """See `Engine.of`."""
        self.teacher.of(teacher)  # comes to its device
        return self.members[str(teacher)]

    def answer(
        self,
        prompts: Sequence[Prompt],
        prefixes: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        keys: Sequence[str],
        drafts: Sequence[Drafts] | None = None,
    ) -> list[Completion]:
        """See `Engine.answer`."""
        return by_teacher(
            [p.teacher for p in prompts],
            lambda name, mine: self.of(name).answer(
                [prompts[i] for i in mine],
                [prefixes[i] for i in mine],
                sampling,
                keys=[keys[i] for i in mine],
                drafts=None if drafts is None else [drafts[i] for i in mine],
            ),
        )

    def continue_from(
        self, prefixes: Sequence[Sequence[int]], sampling: Sampling, *, keys: Sequence[str] | None = None
    ) -> list[Completion]:
        """Token ids do not say whose they are.

        Raises:
            UserError: always.
        """
        raise _nobody()

    def score(
        self, contexts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> list[tuple[float, ...]]:
        """Likewise.

        Raises:
            UserError: always.
        """
        raise _nobody()


def _nobody() -> UserError:
    return UserError(
        "there are several teachers, and token ids do not say whose they are: ask "
        "tools.generators.teacher.of(rollout.prompt.teacher), or tools.teacher_continues"
    )


def by_teacher(names: Sequence[str | None], ask: Callable[[str | None, list[int]], Sequence[T]]) -> list[T]:
    """What each teacher answers to its own requests, in the requests' order.

    Args:
        names: of each request the teacher's.
        ask: of a teacher's name and its requests' indices; answers as many.

    >>> by_teacher(["b", "a", "b"], lambda name, mine: [f"{name}{i}" for i in mine])
    ['b0', 'a1', 'b2']
    """
    found: dict[int, T] = {}
    for name in sorted(set(names), key=lambda name: name or ""):
        mine = [i for i, other in enumerate(names) if other == name]
        found |= zip(mine, ask(name, mine), strict=True)
    return [found[i] for i in range(len(names))]
