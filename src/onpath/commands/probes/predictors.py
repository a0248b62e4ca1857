"""The meter: what predicts that correcting a trajectory pays, three numbers from one scoring pass over
rollouts.

    share of tokens behind the first error        what a token-level loss spends where nothing can be won
    the teacher before and behind it              how likely its next token is right; is it lost there?
    share of skills that occur late alone, and    what no early, sound token could teach instead
    of the loss at them

Where the task has a checker the first error and what is right are the truth. Elsewhere (real models) the
first error of a rollout that is not known to be right is its first token with log p_S − log p_T above
`TRIGGER`, as for a relay; the teacher is described by its entropy; and a skill is the token that the teacher
would like best.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onpath.commands.probes.base import checked, sampled, store
from onpath.data.tasks import Task
from onpath.engines.forward import Models, forward
from onpath.methods.base import own_response
from onpath.methods.tools import Text
from onpath.records import Rollout
from onpath.run.parts import Parts

TRIGGER = 8.0
"""Nats."""
_LIKELIEST = 4  # of the teacher's tokens that are looked at: they hold nearly all of its probability
_STANDS_IN = f"its first token with log p_S - log p_T above {TRIGGER:g}, of a rollout not known to be right"
EARLY = 0.2
"""Share of a response that is its beginning."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One rollout as both models see it, a value per token."""

    tokens: Sequence[str]
    right: bool
    first: int | None
    """Index of the first wrong token; None: there is none."""
    reverse_kl: Sequence[float]
    teacher_entropy: Sequence[float]
    log_ratio: Sequence[float]
    wanted: Sequence[str]
    """The teacher's likeliest token."""
    sound: Sequence[float | None]
    """How likely the teacher's next token is no error; None: nobody can tell, or nothing is to be known."""
    skills: Sequence[str]
    """What it takes to get each token right; empty where nothing is to be known."""


def run_probe(parts: Parts, *, rollouts: int, out: Path) -> Path:
    """Writes `out/meter.jsonl` (a line per rollout: its tokens, where it went wrong, reverse KL) and the
    predictors (.json). Nothing is gone on from, and prompts need no answers.

    Args:
        rollouts: prompts of the training pool, one rollout each.

    Returns:
        The path of the JSON lines.

    Raises:
        UserError: a number below 1.
    """
    checked(rollouts=rollouts)
    made = sampled(parts, rollouts)
    with parts.models.teacher.acting():
        found = score(parts.models, parts.text, made, judging_contexts(parts, made, new=0))
    rows = [{k: vars(s)[k] for k in ("tokens", "right", "first", "reverse_kl")} for s in found]
    checked_by = "the task's checker" if parts.text.tells_errors else _STANDS_IN
    told = {"rollouts": len(found), "known_to_be_right": sum(s.right for s in found)}
    summary = {"student": parts.config.student.model, **told, "first_error_by": checked_by}
    summary |= predictors(found)
    return store(out / "meter.jsonl", rows, summary)


def judging_contexts(parts: Parts, made: Sequence[Rollout], *, new: int) -> list[tuple[int, ...]]:
    """Where the teacher reads each rollout, with the reference where the method shows it.

    Args:
        new: tokens that it may go on for.
    """
    room, shown = parts.models.teacher.room, parts.config.method.shows_reference
    return [parts.text.judging_context(r, reference=shown, room=room(len(r.ids) + new)) for r in made]


def score(
    models: Models, text: Text, rollouts: Sequence[Rollout], contexts: Sequence[tuple[int, ...]]
) -> list[Scored]:
    """One pass of both models.

    Args:
        contexts: where the teacher reads each rollout.
    """
    right = text.right([(r, r.ids) for r in rollouts])
    own = [own_response(r, teacher_context=c) for r, c in zip(rollouts, contexts, strict=True)]
    values: dict[int, dict[str, list[float]]] = {}
    top: dict[int, list[dict[int, float]]] = {}
    for one in forward(models, own, top_k=_LIKELIEST):
        values |= dict(one.by_place())
        for batch, stats in zip(one.batches, one.stats, strict=True):
            assert stats.teacher_top_ids is not None
            assert stats.teacher_top_logp is not None
            ids: Any = batch.by_row(stats.teacher_top_ids)  # a list per token
            probs: Any = batch.by_row(stats.teacher_top_logp.exp())
            for place, tokens, shares in zip(batch.places, ids, probs, strict=True):
                top[place] = [dict(zip(t, p, strict=True)) for t, p in zip(tokens, shares, strict=True)]
    return [
        _scored(text, r, ok is True, values.get(i, {}), top.get(i, []))
        for i, (r, ok) in enumerate(zip(rollouts, right, strict=True))
    ]


def _scored(
    text: Text,
    rollout: Rollout,
    right: bool,
    values: dict[str, list[float]],
    top: Sequence[dict[int, float]],
) -> Scored:
    tokens = text.renderer.tokens(rollout.ids)
    likes = [dict(zip(text.renderer.tokens(list(p)), p.values(), strict=True)) for p in top]
    wanted = [next(iter(p)) for p in likes]
    none: list[float] = []
    student, teacher = values.get("student_logp", none), values.get("teacher_logp", none)
    ratio = [s - t for s, t in zip(student, teacher, strict=True)]
    task = text.task if text.task is not None and text.task.labels_tokens else None
    first = _first(task, rollout, right, tokens, ratio)
    problem = rollout.prompt.question
    skills = (task.skills(problem, tokens) if task else None) or wanted
    return Scored(
        tokens=tokens,
        right=right,
        first=first,
        reverse_kl=values.get("reverse_kl", none),
        teacher_entropy=values.get("teacher_entropy", none),
        log_ratio=ratio,
        wanted=wanted,
        sound=[
            _sound(task, problem, tokens[:i], p) if task and skill else None
            for i, (p, skill) in enumerate(zip(likes, skills, strict=True))
        ],
        skills=skills,
    )


def _first(
    task: Task | None, rollout: Rollout, right: bool, tokens: Sequence[str], ratio: Sequence[float]
) -> int | None:
    if right:
        return None
    if task is not None:
        kinds = task.labels(rollout.prompt.question, tokens)
        return next((i for i, kind in enumerate(kinds) if kind == "error"), None)
    return next((i for i, value in enumerate(ratio) if value > TRIGGER), None)


def _sound(task: Task, problem: str, before: Sequence[str], likes: dict[str, float]) -> float:
    """The share of the teacher's probability on tokens that are no error after what stands before."""
    sound = sum(p for t, p in likes.items() if task.labels(problem, [*before, t])[-1] != "error")
    return sound / sum(likes.values())


def predictors(found: Sequence[Scored]) -> dict[str, Any]:
    """The three numbers, for the probe's summary; None where there is nothing to tell."""
    before: list[tuple[Scored, int]] = []
    behind: list[tuple[Scored, int]] = []
    for s in found:
        cut = len(s.tokens) if s.first is None else s.first + 1
        before += [(s, i) for i in range(cut)]
        behind += [(s, i) for i in range(cut, len(s.tokens))]
    everything = before + behind
    return {
        "tokens_behind_first_error": _share(len(behind), len(everything)),
        "loss_behind_first_error": _share(_loss(behind), _loss(everything)),
        "teacher_before": _teacher(before),
        "teacher_behind": _teacher(behind),
        "late_skills": late_skills(found),
    }


def _loss(places: Sequence[tuple[Scored, int]]) -> float:
    return sum(s.reverse_kl[i] for s, i in places)


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _teacher(places: Sequence[tuple[Scored, int]]) -> dict[str, float | None]:
    known = [sound for s, i in places if (sound := s.sound[i]) is not None]
    entropies = [s.teacher_entropy[i] for s, i in places]
    return {
        "tokens": len(places),
        "next_step_sound": _share(sum(known), len(known)),
        "entropy_nats": _share(sum(entropies), len(entropies)),
    }


def late_skills(found: Sequence[Scored]) -> dict[str, float | None]:
    """Share of the skills that no rollout shows in the first fifth of its response, that of the loss at them,
    and the share of it that would be there if skills had no place of their own: a rare one is seldom seen
    early."""
    loss: dict[str, float] = defaultdict(float)
    count: dict[str, int] = defaultdict(int)
    early: set[str] = set()
    for s in found:
        for i, (skill, kl) in enumerate(zip(s.skills, s.reverse_kl, strict=True)):
            if not skill:
                continue
            loss[skill] += kl
            count[skill] += 1
            if i < EARLY * len(s.tokens):
                early.add(skill)
    total = sum(loss.values())
    return {
        "share_of_skills": _share(len(loss.keys() - early), len(loss)),
        "share_of_loss": _share(sum(v for k, v in loss.items() if k not in early), total),
        "by_chance": _share(sum(v * (1 - EARLY) ** count[k] for k, v in loss.items()), total),
    }
