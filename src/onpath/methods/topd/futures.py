"""TOPD's second stage: the next K tokens of student and teacher from one prefix."""

from collections.abc import Sequence
from dataclasses import replace

from onpath.config.methods.topd import TOPDOptions
from onpath.engines.base import Completion
from onpath.engines.decoding.branches import branch
from onpath.engines.hf import HFEngine
from onpath.engines.reading import Reading
from onpath.methods.base import Tools
from onpath.methods.topd.candidates import Fork, key_of
from onpath.records import Rollout, Sampling


def horizon(rollout: Rollout, position: int, window: int) -> int:
    """Tokens of a window: K, but no further than a rollout that ran out of room could look."""
    left = len(rollout.ids) - position
    return min(window, left) if rollout.finish_reason == "length" else window


def with_windows(
    found: Sequence[Fork],
    rollouts: Sequence[Rollout],
    tools: Tools,
    options: TOPDOptions,
    step: int,
    reading: Reading | None = None,
) -> list[Fork]:
    """Forks with both futures.

    Args:
        rollouts: of the whole step; `Fork.row` points into them.
        step: seeds the draws of sampled windows.
        reading: the pass in which the teacher scored these rollouts; None reads each prefix anew.
    """
    keys = [f"{key_of(rollouts[f.row])}/{f.position}" for f in found]
    sampling = replace(
        tools.sampling,
        max_new_tokens=options.window,
        seed=tools.sampling.seed + step,
        temperature=options.teacher_temperature,
    )
    theirs = teacher_futures(found, rollouts, tools, sampling, [f"{k}/teacher" for k in keys], reading)
    ours = [rollouts[f.row].ids[f.position :] for f in found]
    if options.student_window == "regenerate":
        drawn = replace(sampling, temperature=tools.sampling.temperature)
        prefixes = [_prefix(f, rollouts) for f in found]
        written = tools.student.continue_from(prefixes, drawn, keys=[f"{k}/student" for k in keys])
        ours = [c.ids for c in written]
    ends = [horizon(rollouts[f.row], f.position, options.window) for f in found]
    return [
        replace(f, student=tuple(mine[:end]), teacher=tuple(c.ids[:end]))
        for f, mine, c, end in zip(found, ours, theirs, ends, strict=True)
    ]


def teacher_futures(
    found: Sequence[Fork],
    rollouts: Sequence[Rollout],
    tools: Tools,
    sampling: Sampling,
    keys: Sequence[str],
    reading: Reading | None,
) -> list[Completion]:
    """What the teacher writes after y_<t: from its scoring pass if that was kept, else reading y_<t anew."""
    if reading is None or reading.past is None or not isinstance(tools.writer, HFEngine):
        return tools.speaker.continue_from([_prefix(f, rollouts) for f in found], sampling, keys=keys)
    rows = {id(t.origin): row for row, t in enumerate(reading.trajectories)}
    places = [(rows[id(rollouts[f.row])], len(rollouts[f.row].context) + f.position) for f in found]
    return branch(tools.writer, reading.past, places, sampling, keys=keys, drafts=reading.drafts())


def _prefix(fork: Fork, rollouts: Sequence[Rollout]) -> tuple[int, ...]:
    rollout = rollouts[fork.row]
    return rollout.context + rollout.ids[: fork.position]
