"""Verdicts and rewards of what trajectories come from, by the origin's `place`.

Those of a step's own rollouts come first, in their order. A method may also train on rollouts of other steps
(a replay buffer's): they are judged here, and come after them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from onpath.grade.base import Verdict
from onpath.methods.base import Prepared
from onpath.methods.tools import Text
from onpath.records import Rollout


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What is known of rollouts, by place."""

    verdicts: Sequence[Verdict | None]
    rewards: Mapping[str, Sequence[float]]
    """By label."""
    behind: Sequence[int] = ()
    """Tokens of each rollout of the step behind its first wrong one, or behind the first of its first wrong
    step; empty: the task cannot tell."""


def judge(text: Text, rollouts: Sequence[Rollout]) -> Judged:
    """Of rollouts whose places are their indices."""
    verdicts = text.verdicts([(r, r.ids) for r in rollouts])
    looked_at = rollouts if text.tells_errors else ()
    behind = [0 if (at := text.first_wrong_token(r)) is None else len(r.ids) - at - 1 for r in looked_at]
    return Judged(verdicts=verdicts, rewards=text.reward_values(rollouts), behind=behind)


def with_origins(
    text: Text, prepared: Prepared, rollouts: Sequence[Rollout], judged: Judged
) -> tuple[Prepared, Judged]:
    """The trajectories, each origin with the place that it has in what is known of all of them.

    Args:
        judged: the step's rollouts.
    """
    others: dict[int, Rollout] = {}
    for t in prepared.trajectories:
        if t.origin is not None and not _is_one_of(t.origin, rollouts):
            others.setdefault(id(t.origin), replace(t.origin, place=len(rollouts) + len(others)))
    if not others:
        return prepared, judged
    trajectories = [replace(t, origin=others.get(id(t.origin), t.origin)) for t in prepared.trajectories]
    more = judge(text, list(others.values()))
    return replace(prepared, trajectories=trajectories), Judged(
        verdicts=[*judged.verdicts, *more.verdicts],
        rewards={label: [*values, *more.rewards[label]] for label, values in judged.rewards.items()},
    )


def _is_one_of(origin: Rollout, rollouts: Sequence[Rollout]) -> bool:
    """Whether its place is that of the same rollout, or of a copy of it."""
    if not 0 <= origin.place < len(rollouts):
        return False
    there = rollouts[origin.place]
    return there is origin or _told(there) == _told(origin)


def _told(rollout: Rollout) -> tuple[object, ...]:
    return rollout.prompt.id, rollout.sample, rollout.policy_version, rollout.ids
