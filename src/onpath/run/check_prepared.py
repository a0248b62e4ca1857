"""What a method of one's own answers is looked at before anything is trained on it: a mistake is said in one
sentence, by the method's name, and is no number in a log."""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from onpath.config.sections import OF_A_STEP
from onpath.engines.head import table_of
from onpath.methods.base import Prepared
from onpath.records import WRITERS, Edit, Guidance, Rollout, Trajectory
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
    check_numbers(prepared, of=of)
    check_names(prepared, parts.config.rewards, of=of)
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
    for part in ("metrics", "means", "totals"):
        if not isinstance(given := getattr(prepared, part), Mapping) or any(
            type(k) is not str for k in given
        ):
            raise UserError(f"{where}.{part} is {_kind(given)}; it is a mapping by names")
    if not isinstance(prepared.trajectories, list | tuple):
        raise UserError(f"{where}.trajectories is {_kind(prepared.trajectories)}; it is a list")
    if not _are_numbers([prepared.guidance_weight]):
        raise UserError(f"{where}.guidance_weight is {prepared.guidance_weight!r}, which is no finite number")
    for name, value in prepared.metrics.items():
        if not _is_json(value):
            raise UserError(f"{where}.metrics has {name} as {_said(value)}, which is no JSON")
    for name, pair in prepared.means.items():
        if not isinstance(pair, tuple) or len(pair) != 2 or not _are_numbers(pair):
            raise UserError(f"{where}.means has {name}, which is no (sum, count) of finite numbers")
    for name, number in prepared.totals.items():
        if not _are_numbers([number]):
            raise UserError(f"{where}.totals has {name} as {_said(number)}, which is no finite number")


def check_written(t: Trajectory, where: str) -> None:
    """What is stored of a trajectory.

    Raises:
        UserError: it could not be.
    """
    for part in ("student_context", "teacher_context", "response"):
        _check_ids(getattr(t, part), where, part)
    for name, kind in (("edit", Edit), ("origin", Rollout | None)):
        if not isinstance(getattr(t, name), kind):
            raise UserError(f"{where} its {name} as {_kind(getattr(t, name))}; see Trajectory.{name}")
    if not isinstance(t.edit.kept, bool):
        raise UserError(f"{where} {t.edit.kept!r} for its edit's kept; it is True or False")
    if not isinstance(t.edit.detail, Mapping):
        raise UserError(f"{where} its edit's detail as {_kind(t.edit.detail)}; it is a mapping by names")
    _check_writers(t.writers or (), where)
    if wrong := [key for key, value in t.edit.detail.items() if not _is_json(value)]:
        raise UserError(f"{where} {wrong[0]} in its edit's detail, which is no JSON")


def check_tokens(t: Trajectory, where: str, parts: Parts) -> None:
    """What is trained on: ids that both models know, as many as they take, with numbers that are numbers, and
    no advantages that nothing reads.

    Raises:
        UserError: one is not so.
    """
    models, sampled = parts.models, parts.objective.kind == "sampled"
    for part in ("weights", "advantages", "behaviour_logprobs"):
        _check_numbers(getattr(t, part), where, part)
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
    known = [len(table_of(model)) for model in models.teacher.models]
    if known and not _within(t.teacher_context, count := min(known)):
        raise UserError(f"{where} a teacher_context with ids that are not within the teacher's {count}")
    check_guidance(t.guidance, where, models.vocabulary)
    for side, context, fits in (
        ("student", t.student_context, models.student_context_length),
        ("teacher", t.teacher_context, models.teacher.room(0)),
    ):
        if (tokens := len(context) + len(t.response)) > fits:
            raise UserError(f"{where} {tokens} tokens with its {side}_context, and the {side} takes {fits}")


def check_guidance(guidance: Sequence[Guidance], where: str, vocabulary: int) -> None:
    """Targets for places of the response, each place once.

    Raises:
        UserError: one is none.
    """
    end = 0
    for g in guidance:
        if not isinstance(g, Guidance):
            raise UserError(f"{where} guidance that is {_kind(g)}; it is a tuple of Guidance")
        if g.start < end:
            raise UserError(
                f"{where} guidance at {g.start} behind that of {end - 1}; each place has one, in order"
            )
        end = g.start + len(g.targets)
        for token, mass in ((token, mass) for row in g.targets for token, mass in row.items()):
            if not isinstance(token, Integral) or not _within((int(token),), vocabulary):
                raise UserError(
                    f"{where} guidance to {token!r}, which is none of the {vocabulary} ids of both models"
                )
            if not _are_numbers([mass]) or mass <= 0:
                raise UserError(f"{where} guidance of mass {mass!r}; it is a finite number above 0")


def check_rollouts(rollouts: object, blank: Sequence[Rollout], parts: Parts) -> list[Rollout]:
    """What a method's `write_rollouts` gave.

    Args:
        blank: what it was asked to write.

    Raises:
        UserError: it is not that, written.
    """
    of, vocabulary = parts.config.method.name, parts.models.vocabulary
    if not isinstance(rollouts, list | tuple) or not all(isinstance(r, Rollout) for r in rollouts):
        raise UserError(
            f"method.name {of}: write_rollouts gave {_kind(rollouts)}; it gives a list of Rollout"
        )
    if not code.is_own(of):
        return list(rollouts)
    if [r.key for r in rollouts] != [r.key for r in blank]:
        raise UserError(
            f"method.name {of}: write_rollouts gave {len(rollouts)} rollouts that are not the "
            f"{len(blank)} that it was given, in their order"
        )
    for place, r in enumerate(rollouts):
        where = f"method.name {of}: rollout {place} has"
        _check_ids(r.ids, where, "ids")
        _check_writers(r.writers, where)
        # A black box has none of what it wrote.
        own = [p for p, who in zip(r.logprobs, r.written_by, strict=True) if who == "student"]
        _check_numbers(own, where, "logprobs")
        if not _within(r.ids, vocabulary):
            raise UserError(f"{where} ids that are not within the {vocabulary} of both models")
        if len(r.ids) > (room := r.sampling.max_new_tokens):
            raise UserError(f"{where} {len(r.ids)} tokens, and rollout.max_new_tokens is {room}")
    return list(rollouts)


def _check_ids(ids: object, where: str, part: str) -> None:
    if not isinstance(ids, tuple):
        raise UserError(f"{where} {part} as {_kind(ids)}; it is a tuple of token ids")
    if wrong := [x for x in ids if not isinstance(x, Integral)]:  # None and 0.0 among them
        raise UserError(
            f"{where} {_said(wrong[0])} in its {part}; it is a tuple of token ids, plain whole numbers"
        )


def _check_numbers(given: object, where: str, part: str) -> None:
    if given is None:
        return
    if not isinstance(given, list | tuple):
        raise UserError(f"{where} {part} as {_kind(given)}; it is a tuple of numbers")
    for x in given:
        if not isinstance(x, Real):
            raise UserError(f"{where} {part} that are no plain numbers but {_kind(x)}")
        if not math.isfinite(x):
            raise UserError(f"{where} {part} that are not finite ({x})")


def _check_writers(writers: Sequence[str], where: str) -> None:
    if unknown := [who for who in writers if who not in WRITERS]:
        raise UserError(f"{where} a writer {unknown[0]!r}; there are {', '.join(WRITERS)}")


def _within(ids: tuple[int, ...], count: int) -> bool:
    return not ids or 0 <= min(ids) <= max(ids) < count


def _are_numbers(values: Collection[Any]) -> bool:
    return all(isinstance(x, Real) and math.isfinite(x) for x in values)


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def _kind(value: object) -> str:
    return type(value).__name__


def _said(value: object) -> str:
    """A number that is none by its value, anything else by its type."""
    return repr(value) if isinstance(value, float) else _kind(value)
