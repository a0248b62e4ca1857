"""TOPD's second stage: the next K tokens of student and teacher from one prefix."""

from collections.abc import Sequence
from dataclasses import replace

from onpath.config.methods.topd import TOPDOptions
from onpath.engines.forward import Pass
from onpath.methods.tools import Tools
from onpath.methods.topd.candidates import Fork
from onpath.records import Completion, Rollout, Sampling


def horizon(rollout: Rollout, position: int, window: int) -> int:
    """Tokens of a window: K, but no further than a rollout that was cut at max_new_tokens could look."""
    left = len(rollout.ids) - position
    return min(window, left) if rollout.finish_reason == "length" else window


def with_windows(
    found: Sequence[Fork],
    rollouts: Sequence[Rollout],
    tools: Tools,
    options: TOPDOptions,
    step: int,
    scored: Pass | None = None,
) -> list[Fork]:
    """Forks with both futures.

    Args:
        rollouts: of the whole step; `Fork.row` points into them.
        step: names the draws of sampled windows.
        scored: the pass in which the teacher scored these rollouts; None reads each prefix anew.
    """
    keys = [f"step {step}/{rollouts[f.row].key}/{f.position}" for f in found]
    sampling = replace(
        tools.sampling,
        max_new_tokens=options.window,
        temperature=options.window_temperature,
    )
    theirs = teacher_futures(found, rollouts, tools, sampling, [f"{k}/teacher" for k in keys], scored)
    ours = [rollouts[f.row].ids[f.position :] for f in found]
    spent = [0] * len(found)
    if options.student_window == "regenerate":
        drawn = replace(sampling, temperature=tools.sampling.temperature)
        prefixes = [rollouts[f.row].prefix(f.position) for f in found]
        fresh = tools.generators.student.continue_from(prefixes, drawn, keys=[f"{k}/student" for k in keys])
        ours = [c.ids for c in fresh]
        spent = [len(c.ids) for c in fresh]
    made = []
    for f, mine, c, n in zip(found, ours, theirs, spent, strict=True):
        end = horizon(rollouts[f.row], f.position, options.window)
        window, stops = until_stop(rollouts[f.row].ids[: f.position], c.ids, tools)
        made.append(
            replace(
                f,
                student=tuple(mine[:end]),
                teacher=window[:end],
                ended=(stops or c.finish_reason == "stop") and len(window) <= end,
                generated=(n, len(c.ids)),
            )
        )
    return made


def until_stop(before: Sequence[int], window: Sequence[int], tools: Tools) -> tuple[tuple[int, ...], bool]:
    """A window up to the token that completes a stop string, which may begin before it; and whether one
    does."""
    end = tools.string_end((*before, *window))
    return (tuple(window), False) if end is None else (tuple(window[: end - len(before)]), True)


def teacher_futures(
    found: Sequence[Fork],
    rollouts: Sequence[Rollout],
    tools: Tools,
    sampling: Sampling,
    keys: Sequence[str],
    scored: Pass | None,
) -> list[Completion]:
    """What the teacher generates after y_<t: from its scoring pass if that was kept, else from y_<t anew."""
    return tools.teacher_continues(rollouts, [(f.row, f.position) for f in found], sampling, keys, scored)
