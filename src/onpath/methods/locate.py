"""Where is the first error of an attempt? Pluggable: minimal edits keep what stands before it."""

from bisect import bisect_right
from collections.abc import Sequence

from onpath.methods.base import Tools, acting, judging_context
from onpath.options import TRDOptions
from onpath.records import Rollout
from onpath.render import Renderer


def first_errors(attempts: Sequence[Rollout], options: TRDOptions, tools: Tools) -> list[int | None]:
    """Number of tokens that stand before the first error, for each attempt; None: no error found."""
    if options.locate == "checker":
        assert tools.first_error is not None, "the config refuses checker where the task has none"
        offsets = [tools.first_error(r.prompt.question, tools.renderer.text(r.ids)) for r in attempts]
        return [
            None if at is None else tokens_before(tools.renderer, r.ids, at)
            for r, at in zip(attempts, offsets, strict=True)
        ]
    return teacher_drops(attempts, options, tools)


def teacher_drops(attempts: Sequence[Rollout], options: TRDOptions, tools: Tools) -> list[int | None]:
    """First token that the student finds likelier than the teacher by `locate_drop` nats."""
    responses = [r.ids for r in attempts]
    contexts = [judging_context(r, reference=options.shows_reference, tools=tools) for r in attempts]
    with acting(tools.teacher):
        theirs = tools.writer.score(contexts, responses)
    ours = tools.student.score([r.context for r in attempts], responses)
    return [
        next((t for t, (s, q) in enumerate(zip(o, h, strict=True)) if s - q > options.locate_drop), None)
        for o, h in zip(ours, theirs, strict=True)
    ]


def tokens_before(renderer: Renderer, ids: Sequence[int], offset: int) -> int:
    """How many leading tokens make no more than `offset` characters of text."""
    return bisect_right(range(len(ids) + 1), offset, key=lambda t: len(renderer.text(ids[:t]))) - 1
