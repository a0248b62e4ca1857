"""Where somebody should take over from a response: triggers by name. Each looks at responses that both models
have read, and names of each the first token at or behind its start at which it fires."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onpath.config.methods.relay import RelayOptions
from onpath.engines.forward import Pass, Values
from onpath.methods.mixed import Cost, Mixed
from onpath.methods.places import first_forks
from onpath.methods.tools import Tools
from onpath.records import Rollout


@dataclass(frozen=True, kw_only=True)
class Read:
    """A response, and what both models say of its tokens."""

    z: Rollout
    start: int
    """What stands before is settled."""
    values: Values

    def pairs(self, name: str) -> Iterator[tuple[Any, Any]]:
        """The student's and the teacher's statistic of each token."""
        return zip(self.values[f"student_{name}"], self.values[f"teacher_{name}"], strict=True)

    def first(self, fires: Iterable[bool]) -> int | None:
        """Of one answer per token the first that counts."""
        return next((t for t, fired in enumerate(fires) if fired and t >= self.start), None)


def log_ratio(responses: Sequence[Read], options: RelayOptions, tools: Tools, cost: Cost) -> list[int | None]:
    """log p_S − log p_T of the token exceeds `delta`."""
    return [r.first(ours - theirs > options.delta for ours, theirs in r.pairs("logp")) for r in responses]


def reflection(
    responses: Sequence[Read], options: RelayOptions, tools: Tools, cost: Cost
) -> list[int | None]:
    """The teacher's likeliest token opens a correction and is not among the student's likeliest."""
    opens = tools.text.correction_ids
    return [
        r.first(theirs[0] in opens and theirs[0] not in ours for ours, theirs in r.pairs("top_ids"))
        for r in responses
    ]


def fork(responses: Sequence[Read], options: RelayOptions, tools: Tools, cost: Cost) -> list[int | None]:
    """The near futures part (TOPD)."""
    starts = [r.start for r in responses]
    found = first_forks(
        [r.z for r in responses], tools, window=options.window, distance=options.distance, starts=starts
    )
    cost.teacher += sum(f.teacher_tokens for f in found)
    return [f.position for f in found]


def first_error(
    responses: Sequence[Read], options: RelayOptions, tools: Tools, cost: Cost
) -> list[int | None]:
    """The task's checker finds the token wrong."""
    return [tools.text.first_wrong_token(r.z, after=r.start) for r in responses]


Trigger = Callable[[Sequence[Read], RelayOptions, Tools, Cost], list[int | None]]
TRIGGERS: Mapping[str, Trigger] = {f.__name__: f for f in (log_ratio, reflection, fork, first_error)}
_COLUMNS = ("student_logp", "teacher_logp", "student_top_ids", "teacher_top_ids")


def takeovers(
    some: Sequence[Mixed], one: Pass, options: RelayOptions, tools: Tools, cost: Cost
) -> dict[int, int]:
    """Index of a response of the pass → where its trigger fires; without those in which it does not."""
    rows = dict(one.by_place(_COLUMNS))
    read = [Read(z=some[i].z, start=some[i].start, values=values) for i, values in rows.items()]
    found = TRIGGERS[options.trigger](read, options, tools, cost)
    return {i: t for i, t in zip(rows, found, strict=True) if t is not None}
