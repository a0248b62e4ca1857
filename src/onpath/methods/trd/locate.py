"""Where is the first error of an attempt? Pluggable: minimal edits keep what stands before it."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from onpath.config.methods.topd import TOPDOptions
from onpath.config.methods.trd import TRDOptions
from onpath.data.render import Renderer
from onpath.methods.base import Tools, acting, judging_context
from onpath.methods.topd.method import TOPD
from onpath.records import Rollout


@dataclass(frozen=True)
class Located:
    """What was found in one attempt."""

    before: int | None
    """Number of tokens that stand before the first error; None: no error found."""
    teacher_tokens: int = 0
    """That the teacher wrote to find it."""


def first_errors(attempts: Sequence[Rollout], options: TRDOptions, tools: Tools) -> list[Located]:
    """The first error of each attempt."""
    if options.locate == "fork":
        return first_forks(attempts, options, tools)
    find = by_checker if options.locate == "checker" else by_teacher_drop
    return [Located(before) for before in find(attempts, options, tools)]


def by_checker(attempts: Sequence[Rollout], options: TRDOptions, tools: Tools) -> list[int | None]:
    """Where the task's checker of steps says that the first wrong step starts."""
    assert tools.first_error is not None, "the config refuses checker where the task has none"
    offsets = [tools.first_error(r.prompt.question, tools.renderer.text(r.ids)) for r in attempts]
    return [
        None if at is None else tokens_before(tools.renderer, r.ids, at)
        for r, at in zip(attempts, offsets, strict=True)
    ]


def by_teacher_drop(attempts: Sequence[Rollout], options: TRDOptions, tools: Tools) -> list[int | None]:
    """First token that the student finds likelier than the teacher by `locate_drop` nats."""
    responses = [r.ids for r in attempts]
    contexts = [judging_context(r, reference=options.shows_reference, tools=tools) for r in attempts]
    with acting(tools.teacher):
        theirs = tools.speaker.score(contexts, responses)
    ours = tools.student.score([r.context for r in attempts], responses)
    return [
        next((t for t, (s, q) in enumerate(zip(o, h, strict=True)) if s - q > options.locate_drop), None)
        for o, h in zip(ours, theirs, strict=True)
    ]


def first_forks(attempts: Sequence[Rollout], options: TRDOptions, tools: Tools) -> list[Located]:
    """TOPD's first real divergent point: the near futures part by at least `locate_distance`."""
    forks_only = TOPDOptions(
        window=options.locate_window, decide="threshold", threshold=options.locate_distance,
        guide=False, suppress="low",
    )  # fmt: skip
    topd = TOPD(forks_only, tools)
    found = []
    for t in topd.prepare(attempts, step=0).trajectories:
        forks = t.edit.detail.get("forks", ())
        real = [f["position"] for f in forks if f["decision"] == "fork"]
        written = sum(len(f["teacher_window"]) for f in forks)
        found.append(Located(min(real, default=None), written))
    return found


def tokens_before(renderer: Renderer, ids: Sequence[int], offset: int) -> int:
    """How many leading tokens make no more than `offset` characters of text."""
    return bisect_right(range(len(ids) + 1), offset, key=lambda t: len(renderer.text(ids[:t]))) - 1
