"""Where is the first error of an attempt? Pluggable: minimal edits keep what stands before it."""

from collections.abc import Sequence
from dataclasses import dataclass

from onpath.config.methods.trd import TRDOptions
from onpath.engines.routed import by_teacher
from onpath.methods.places import first_forks
from onpath.methods.tools import Tools
from onpath.records import Rollout


@dataclass(frozen=True)
class Located:
    """What was found in one attempt."""

    before: int | None
    """Number of tokens that stand before the first error; None: no error found."""
    teacher_tokens: int = 0
    """That the teacher generated to find it."""


def first_errors(attempts: Sequence[Rollout], options: TRDOptions, tools: Tools) -> list[Located]:
    """The first error of each attempt."""
    if options.locate == "fork":
        found = first_forks(attempts, tools, window=options.locate_window, distance=options.locate_distance)
        return [Located(f.position, f.teacher_tokens) for f in found]
    find = by_checker if options.locate == "checker" else by_teacher_drop
    return [Located(before) for before in find(attempts, options, tools)]


def by_checker(attempts: Sequence[Rollout], options: TRDOptions, tools: Tools) -> list[int | None]:
    """Where the task's checker of steps says that the first wrong step starts."""
    return [tools.text.first_error(r) for r in attempts]


def by_teacher_drop(attempts: Sequence[Rollout], options: TRDOptions, tools: Tools) -> list[int | None]:
    """First token that the student finds likelier than the teacher by `locate_drop` nats."""
    responses = [r.ids for r in attempts]
    shown, room = options.shows_reference, tools.models.teacher.room
    contexts = [tools.text.judging_context(r, reference=shown, room=room(len(r.ids))) for r in attempts]
    with tools.models.teacher.acting():
        theirs = by_teacher(
            [r.prompt.teacher for r in attempts],
            lambda name, mine: tools.generators.teacher.of(name).score(
                [contexts[i] for i in mine], [responses[i] for i in mine]
            ),
        )
    ours = tools.generators.student.score([r.context for r in attempts], responses)
    return [
        next((t for t, (s, q) in enumerate(zip(o, h, strict=True)) if s - q > options.locate_drop), None)
        for o, h in zip(ours, theirs, strict=True)
    ]
