"""What a method of one's own answers is looked at before anything is trained on it: a mistake is said in one
sentence, by the method's name, and is no number in a log."""

import json
import math
from collections.abc import Collection
from numbers import Real
from typing import Any

from onpath.config.sections import OF_A_STEP
from onpath.engines.head import table_of
from onpath.methods.base import Prepared
from onpath.records import WRITERS, Trajectory
from onpath.run.parts import Parts
from onpath.system import code
from onpath.system.errors import UserError


def check_prepared(prepared: Prepared, parts: Parts) -> None:
    """All of it; of onpath's own methods only what depends on the config.

    Raises:
        UserError: something that cannot be trained on, or not be written down.
    """
    of = parts.config.method.name
    if not code.is_own(of):
        check_names(prepared, parts.config.rewards, of=of)
        return
    if not isinstance(prepared, Prepared):
        raise UserError(f"method.name {of}: prepare gave {_kind(prepared)}; it gives a Prepared")
    check_names(prepared, parts.config.rewards, of=of)
    check_numbers(prepared, of=of)
    for place, t in enumerate(prepared.trajectories):
        if not isinstance(t, Trajectory):
            raise UserError(f"method.name {of}: trajectory {place} is {_kind(t)}; it is a Trajectory")
        where = f"method.name {of}: trajectory {place} has"
        check_written(t, where)
        if t.edit.kept:
            check_tokens(t, where, parts)


def check_names(prepared: Prepared, rewards: Collection[str], *, of: str) -> None:
    """Of the numbers of a method none may stand in the place of another one in the step's line.

    Raises:
        UserError: one would.
    """
    totals = prepared.totals.keys() - {"student_tokens_generated"}  # which is added to the rollouts' own
    labels = {*rewards, "reward"} if rewards else set()
    taken = dict.fromkeys(OF_A_STEP, "a step's line has") | dict.fromkeys(labels, "the rewards have")
    for part, names in (("metrics", prepared.metrics), ("means", prepared.means), ("totals", totals)):
        for name in names:
            if name in taken:
                raise UserError(
                    f"method.name {of}: Prepared.{part} has {name}, and {taken[name]} one already; give it "
                    "another name"
                )
        taken |= dict.fromkeys(names, f"Prepared.{part} has")


def check_numbers(prepared: Prepared, *, of: str) -> None:
    """What goes into the step's line is plain.

    Raises:
        UserError: it is not.
    """
    where = f"method.name {of}: Prepared"
    for name, value in prepared.metrics.items():
        if not _is_json(value):
            raise UserError(f"{where}.metrics has {name} as {_kind(value)}, which is no JSON")
    for name, pair in prepared.means.items():
        if not isinstance(pair, tuple) or len(pair) != 2 or not _are_numbers(pair):
            raise UserError(f"{where}.means has {name}, which is no (sum, count) of numbers")
    for name, number in prepared.totals.items():
        if not _are_numbers([number]):
            raise UserError(f"{where}.totals has {name} as {_kind(number)}, which is no number")


def check_written(t: Trajectory, where: str) -> None:
    """What is stored of a trajectory.

    Raises:
        UserError: it could not be.
    """
    for part in ("student_context", "teacher_context", "response"):
        if not isinstance(getattr(t, part), tuple):
            raise UserError(f"{where} {part} as {_kind(getattr(t, part))}; it is a tuple of token ids")
    if unknown := next((who for who in t.writers or () if who not in WRITERS), None):
        raise UserError(f"{where} a writer {unknown!r}; there are {', '.join(WRITERS)}")
    if wrong := next((key for key, value in t.edit.detail.items() if not _is_json(value)), None):
        raise UserError(f"{where} {wrong} in its edit's detail, which is no JSON")


def check_tokens(t: Trajectory, where: str, parts: Parts) -> None:
    """What is trained on: ids that both models know, as many as they take, with numbers that are numbers, and
    no advantages that nothing reads.

    Raises:
        UserError: one is not so.
    """
    models, sampled = parts.models, parts.objective.kind == "sampled"
    for part, given in (("weights", t.weights), ("advantages", t.advantages)):
        for x in given or ():
            if not isinstance(x, Real):
                raise UserError(f"{where} {part} that are no plain numbers but {_kind(x)}")
            if not math.isfinite(x):
                raise UserError(f"{where} {part} that are not finite ({x})")
    drawn = zip(t.written_by, t.token_weights, strict=True)
    if sampled and t.advantages is None and any(who != "student" and w for who, w in drawn):
        raise UserError(
            f"{where} tokens that others wrote, and method.divergence: sampled takes every one for the "
            "student's own; give those weight 0, or use reverse_kl"
        )
    if t.advantages is not None and not sampled:
        raise UserError(f"{where} advantages, which method.divergence: sampled alone reads")
    if not _within(t.response, count := models.vocabulary):
        raise UserError(f"{where} a response with ids that are not within the {count} of both models")
    if not _within(t.student_context, count := len(table_of(models.student))):
        raise UserError(f"{where} a student_context with ids that are not within the student's {count}")
    for side, context, fits in (
        ("student", t.student_context, models.student_context_length),
        ("teacher", t.teacher_context, models.teacher.context_length),
    ):
        if (tokens := len(context) + len(t.response)) > fits:
            raise UserError(f"{where} {tokens} tokens with its {side}_context, and the {side} takes {fits}")


def _within(ids: tuple[int, ...], count: int) -> bool:
    return not ids or 0 <= min(ids) <= max(ids) < count


def _are_numbers(values: Collection[Any]) -> bool:
    return all(isinstance(x, Real) for x in values)


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _kind(value: object) -> str:
    return type(value).__name__
