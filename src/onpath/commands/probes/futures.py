"""Near-future divergence: how far apart the next K tokens of student and teacher are, where the loss is high,
where it is low, and anywhere; and, where the task knows the truth of tokens, what tells errors from habits.

arXiv 2606.00305 says that 29% of high-loss tokens have a low divergence (at most the upper quartile of
low-loss positions'), and that loss and divergence hardly correlate. Noise floor: two sampled windows of the
teacher.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onpath.commands.probes.base import checked, sampled, store
from onpath.commands.probes.futures_picture import draw
from onpath.commands.probes.place import GROUPS, Place
from onpath.commands.probes.separation import auc, correlations, detections
from onpath.config.methods.topd import TOPDOptions
from onpath.engines.forward import forward
from onpath.evaluate.stats import bootstrap_interval
from onpath.methods.base import own_response
from onpath.methods.topd.candidates import Fork, ranked_by, spaced
from onpath.methods.topd.futures import with_windows
from onpath.methods.topd.pairs import with_distances
from onpath.records import Rollout
from onpath.run.parts import Parts


def run_probe(parts: Parts, *, rollouts: int, out: Path, window: int | None = None, each: int = 1) -> Path:
    """Writes `out/divergence.jsonl` (a line per position), its summary (.json) and the picture (.png).

    Args:
        rollouts: prompts of the training pool, one rollout each.
        window: K; None: the method's, if it is TOPD, else 24.
        each: positions per rollout and group; where the task knows the truth of tokens, every position is
            looked at beside them.

    Returns:
        The path of the JSON lines.

    Raises:
        UserError: a number below 1, or a disk that cannot be written.
    """
    checked(rollouts=rollouts, each=each, window=window)
    found = probe(parts, rollouts=rollouts, window=window, each=each)
    summary = {"student": parts.config.student.model, **summarise(found, options_of(parts, window))}
    return store(out / "divergence.jsonl", map(vars, found), summary, lambda path: draw(found, summary, path))


def probe(parts: Parts, *, rollouts: int, window: int | None, each: int) -> list[Place]:
    """The positions with their futures, rollout by rollout."""
    options = options_of(parts, window)
    made = sampled(parts, rollouts)
    label_of = labeller(parts)
    groups: dict[tuple[int, int], tuple[str, ...]] = {}
    found: list[Fork] = []
    noises: dict[tuple[int, int], float] = {}
    for one in forward(parts.models, [own_response(r) for r in made], past=True):
        here: list[Fork] = []
        for row, values in one.by_place():
            mine = chosen(values, made[row], options, each, seed=parts.config.run.seed)
            groups |= {(row, position): names for position, names in mine.items()}
            losses, gaps = ranked_by(values, options)
            wanted = range(len(losses)) if label_of is not None else sorted(mine)
            here += [Fork(row=row, position=t, loss=losses[t], gap=gaps[t], draw=0.0) for t in wanted]
        found += with_windows(here, made, parts.tools, options, 0, one)
        grouped = [f for f in here if groups.get((f.row, f.position))]
        noises |= noise_floor(parts, grouped, made, options, one)
    found = sorted(with_distances(found, made, parts.tools, options), key=lambda f: (f.row, f.position))
    return [
        p
        for row, mine in groupby(found, key=lambda f: f.row)
        for p in _places(parts, made[row], list(mine), groups, noises, label_of)
    ]


def _places(
    parts: Parts,
    rollout: Rollout,
    found: Sequence[Fork],
    groups: Mapping[tuple[int, int], tuple[str, ...]],
    noises: Mapping[tuple[int, int], float],
    label_of: Callable[[Rollout], list[str]] | None,
) -> list[Place]:
    tokens = parts.text.renderer.tokens(rollout.ids)
    labels = label_of(rollout) if label_of is not None else [None] * len(tokens)
    return [
        Place(
            prompt_id=rollout.prompt.id,
            position=f.position,
            token=tokens[f.position],
            groups=groups.get((f.row, f.position), ()),
            label=labels[f.position],
            reverse_kl=f.loss,
            sampled_gap=f.gap,
            distance=f.distance,
            noise=noises.get((f.row, f.position)),
            student_text="".join(parts.text.renderer.tokens(f.student)),
            teacher_text="".join(parts.text.renderer.tokens(f.teacher)),
        )
        for f in found
    ]


def options_of(parts: Parts, window: int | None) -> TOPDOptions:
    """The method's own, if it is TOPD, else the defaults with K = 24; ranked by reverse KL in any case."""
    given = parts.config.method.model_dump()
    options = TOPDOptions(**given) if given["name"] == "topd" else TOPDOptions(window=24)
    changes = {"candidates": "reverse_kl", **({} if window is None else {"window": window})}
    return options.model_copy(update=changes)


def labeller(parts: Parts) -> Callable[[Rollout], list[str]] | None:
    """Truth by token, where the task has it."""
    task, renderer = parts.text.task, parts.text.renderer
    if task is None or not task.labels_tokens:
        return None
    return lambda rollout: task.labels(rollout.prompt.question, renderer.tokens(rollout.ids))


def chosen(
    values: Mapping[str, Sequence[float]], rollout: Rollout, options: TOPDOptions, each: int, *, seed: int
) -> dict[int, tuple[str, ...]]:
    """Positions of one rollout → the groups that they are in."""
    losses = ranked_by(values, options)[0]
    by_loss = sorted(range(len(losses)), key=lambda t: (-losses[t], t))
    rng = np.random.default_rng([seed, *rollout.key.encode()])
    low = rng.permutation(by_loss[(len(losses) + 1) // 2 :]).tolist()
    orders = {"high": by_loss, "random": rng.permutation(len(losses)).tolist(), "low": low}
    found: dict[int, tuple[str, ...]] = {}
    for name, order in orders.items():
        for t in spaced(order, count=each, min_gap=options.min_gap):
            found[t] = (*found.get(t, ()), name)
    return found


def noise_floor(
    parts: Parts, found: Sequence[Fork], made: Sequence[Rollout], options: TOPDOptions, reading: Any
) -> dict[tuple[int, int], float]:
    """D of two windows that the teacher samples at temperature 1 from the same prefix."""
    sampled = options.model_copy(update={"window_temperature": 1.0})
    first, second = (with_windows(found, made, parts.tools, sampled, step, reading) for step in (1, 2))
    pairs = [replace(a, student=b.teacher) for a, b in zip(first, second, strict=True)]
    return {(f.row, f.position): f.distance for f in with_distances(pairs, made, parts.tools, options)}


def summarise(found: Sequence[Place], options: TOPDOptions | None = None) -> dict[str, Any]:
    """Distributions by group, low-divergence share of high-loss tokens, correlations, detection of errors by
    a method of these options (None: the defaults)."""
    groups = {name: [p for p in found if name in p.groups] for name in GROUPS}
    floor = float(np.quantile([p.distance for p in groups["low"]], 0.75)) if groups["low"] else 0.0
    summary: dict[str, Any] = {
        "rollouts": len({p.prompt_id for p in found}),
        "distance": {name: _distribution([p.distance for p in rows]) for name, rows in groups.items()},
        "noise_floor": _distribution([p.noise for p in groups["high"] if p.noise is not None]),
        "low_divergence_threshold": floor,
        "low_divergence_share_of_high_loss": _share(groups["high"], floor),
        "correlation_of_loss_and_distance": {
            name: correlations([p.reverse_kl for p in rows], [p.distance for p in rows])
            for name, rows in (("high", groups["high"]), ("random", groups["random"]), ("all", found))
        },
    }
    if any(p.label is not None for p in found):
        summary["labels_of_high_loss"] = _counts(groups["high"])
        summary["median_distance_of_high_loss_by_label"] = {
            str(label): float(np.median([p.distance for p in groups["high"] if p.label == label]))
            for label in sorted({str(p.label) for p in groups["high"]})
        }
        summary["error_against_habit"] = separation(found)
        summary["detection_of_errors"] = [vars(d) for d in detections(_columns(found), options)]
    return summary


def separation(found: Sequence[Place]) -> dict[str, Any]:
    """AUC of telling errors from habits, at all such tokens and among the loudest; intervals by rollout."""
    cut = {"all": -np.inf}
    for share in (0.0225, 0.05):
        cut[f"loudest {share:.2%}"] = float(np.quantile([p.reverse_kl for p in found], 1 - share))
    result: dict[str, Any] = {}
    for name, least in cut.items():
        rows = [p for p in found if p.label in ("error", "habit") and p.reverse_kl >= least]
        errors = np.array([p.label == "error" for p in rows])
        result[name] = {"errors": int(errors.sum()), "habits": int((~errors).sum())}
        owners = np.array([p.prompt_id for p in rows])
        for signal in ("reverse_kl", "distance", "sampled_gap", "both"):
            result[name][signal] = auc(_signal(rows, signal), errors, owners)
    return result


def _columns(found: Sequence[Place]) -> dict[str, NDArray[Any]]:
    names = ("reverse_kl", "distance", "sampled_gap")
    return {
        "owner": np.array([p.prompt_id for p in found]),
        **{name: np.array([p.value(name) for p in found]) for name in names},
        "error": np.array([p.label == "error" for p in found]),
        "habit": np.array([p.label == "habit" for p in found]),
    }


def _signal(rows: Sequence[Place], name: str) -> NDArray[np.float64]:
    """`both`: the sum of the ranks by loss and by distance."""
    from scipy.stats import rankdata

    if name != "both":
        return np.array([p.value(name) for p in rows])
    ranks = [rankdata([p.value(n) for p in rows]) for n in ("reverse_kl", "distance")]
    return np.array(ranks[0] + ranks[1], dtype=np.float64)


def _distribution(values: Sequence[float]) -> dict[str, Any]:
    if not values:
        return {"n": 0}
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return {"n": len(values), "mean": float(np.mean(values)), "quartiles": [low, middle, high],
            "identical": float(np.mean(np.array(values) <= 1e-6))}  # fmt: skip


def _share(high: Sequence[Place], floor: float) -> dict[str, Any]:
    """With its interval by resampling rollouts."""
    by_rollout: dict[str, list[float]] = {}
    for p in high:
        by_rollout.setdefault(p.prompt_id, []).append(float(p.distance <= floor))
    scores = [sum(v) / len(v) for v in by_rollout.values()]
    if not scores:
        return {"n": 0}
    return {"n": len(high), "share": float(np.mean(scores)), "ci95": list(bootstrap_interval(scores))}


def _counts(rows: Sequence[Place]) -> dict[str, int]:
    labels = [str(p.label) for p in rows]
    return {label: labels.count(label) for label in sorted(set(labels))}
