"""Prefix failure: from where on can neither student nor teacher save a rollout, and what does the teacher say
there?

For a sample of rollouts y and positions t: k continuations of y_<t by the student (after x) and k by the
teacher (after x, or x and the reference), graded. The prefix y_<t has failed where both succeed with rate
below ε. Beside it the teacher's two modes at every token: its mass on words that open a correction, and on
the student's own token. arXiv 2606.08432 says that the first mode appears only after a failed prefix; this
looks.
"""

from collections.abc import Sequence
from math import exp
from pathlib import Path
from typing import Any

from onpath.commands.probes.base import checked, sampled, store
from onpath.commands.probes.predictors import judging_contexts, predictors, score
from onpath.commands.probes.prefix_picture import draw
from onpath.commands.probes.prefix_records import Probed
from onpath.engines.base import Engine
from onpath.engines.forward import per_token
from onpath.methods.base import own_response
from onpath.records import Rollout
from onpath.run.parts import Parts

EPSILON = 0.1
"""Success rate below which a prefix has failed."""


def run_probe(parts: Parts, *, rollouts: int, continuations: int, every: int, out: Path) -> Path:
    """Writes `out/prefix_failure.jsonl` (a line per rollout), its summary (.json; with what predicts whether
    correcting trajectories pays, see `predictors`) and the picture (.png).

    Args:
        rollouts: prompts of the training pool, one rollout each.
        continuations: k, of each model at each position.
        every: tokens between positions; in a rollout with a known first error one of them is right before it.

    Returns:
        The path of the JSON lines.

    Raises:
        UserError: a prompt without an answer, or a number below 1.
    """
    checked(rollouts=rollouts, continuations=continuations, every=every)
    made = sampled(parts, rollouts, answered=True)
    # The teacher goes on from inside each rollout, for as long as a whole one may be.
    contexts = judging_contexts(parts, made, new=parts.sampling.max_new_tokens)
    with parts.models.teacher.acting():
        scored = score(parts.models, parts.text, made, contexts)
    found = probe(parts, made, contexts, continuations=continuations, every=every)
    summary = {"student": parts.config.student.model, **summarise(found, epsilon=EPSILON)}
    summary |= predictors(scored)
    rows = ({**vars(p), "failed": p.failed(EPSILON)} for p in found)
    return store(out / "prefix_failure.jsonl", rows, summary, lambda path: draw(found, path))


def probe(
    parts: Parts,
    made: Sequence[Rollout],
    contexts: Sequence[tuple[int, ...]],
    *,
    continuations: int,
    every: int,
) -> list[Probed]:
    """The rollouts, continued and read."""
    right = parts.text.right([(r, r.ids) for r in made])
    errors = [None if ok else parts.text.first_error(r) for r, ok in zip(made, right, strict=True)]
    grids = [positions(len(r.ids), e, every) for r, e in zip(made, errors, strict=True)]
    student = successes(
        parts, parts.generators.student, made, [r.context for r in made], grids, continuations
    )
    with parts.models.teacher.acting():
        teacher = successes(parts, parts.generators.teacher, made, contexts, grids, continuations)
    own = [own_response(r, teacher_context=c) for r, c in zip(made, contexts, strict=True)]
    values = per_token(parts.models, own, mass_ids=parts.text.correction_ids)
    return [
        Probed(
            prompt_id=r.prompt.id,
            right=ok is True,
            tokens=tuple(parts.text.renderer.tokens(r.ids)),
            first_error=e,
            positions=grid,
            trials=continuations,
            student=s,
            teacher=t,
            onset_mass=tuple(v.get("teacher_mass", (0.0,) * len(r.ids))),
            token_probability=tuple(map(exp, v["teacher_logp"])),
        )
        for r, ok, e, grid, s, t, v in zip(made, right, errors, grids, student, teacher, values, strict=True)
    ]


def positions(length: int, first_error: int | None, every: int) -> tuple[int, ...]:
    """Every so many tokens, such that one position is right before the first error."""
    return tuple(range((first_error or 0) % every, length, every))


def successes(
    parts: Parts,
    engine: Engine,
    made: Sequence[Rollout],
    contexts: Sequence[tuple[int, ...]],
    grids: Sequence[tuple[int, ...]],
    trials: int,
) -> list[tuple[int, ...]]:
    """How many of `trials` continuations are right, for each rollout and position."""
    jobs = [
        (row, t, i)
        for row, grid in enumerate(grids)
        for t in grid
        for i in range(trials)
    ]  # fmt: skip
    done = engine.answer(
        [made[row].prompt for row, _, _ in jobs],
        [contexts[row] + made[row].ids[:t] for row, t, _ in jobs],
        parts.sampling,
        keys=[f"probe/{made[row].prompt.id}/{t}/{i}" for row, t, i in jobs],
    )
    whole = [(made[row], made[row].ids[:t] + c.ids) for (row, t, _), c in zip(jobs, done, strict=True)]
    right = iter(parts.text.right(whole))
    return [tuple(sum(next(right) is True for _ in range(trials)) for _ in grid) for grid in grids]


def summarise(found: Sequence[Probed], *, epsilon: float) -> dict[str, Any]:
    """Means over positions that have failed and over those that have not, in wrong rollouts; and in right
    ones."""
    groups: dict[str, list[tuple[float, float, float, float]]] = {
        "right rollouts": [],
        "wrong, not failed": [],
        "wrong, failed": [],
    }
    for p in found:
        for j, (t, failed) in enumerate(zip(p.positions, p.failed(epsilon), strict=True)):
            name = "right rollouts" if p.right else "wrong, failed" if failed else "wrong, not failed"
            rates = p.student[j] / p.trials, p.teacher[j] / p.trials
            end = p.positions[j + 1] if j + 1 < len(p.positions) else len(p.tokens)
            groups[name] += [(*rates, p.onset_mass[u], p.token_probability[u]) for u in range(t, end)]
    keys = ("student_success", "teacher_success", "onset_mass", "student_token_probability")
    return {
        "rollouts": len(found),
        "right": sum(p.right for p in found),
        "epsilon": epsilon,
        **{
            name: {"tokens": len(rows), **{k: _mean([row[i] for row in rows]) for i, k in enumerate(keys)}}
            for name, rows in groups.items()
        },
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
