"""TOPD's decisions and targets, without models: candidates, real forks, suppression, guidance.

A fork is a position of a rollout at which the near futures of student and teacher are compared. It is a
value: each stage gives it back with one more thing known (windows.py adds the futures). The method is
methods/topd.py.

Shape suffixes: K student's window, J teacher's window.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from onpath import distributed
from onpath.engines.hf import noise
from onpath.options import TOPDOptions
from onpath.records import Edit, Guidance, Rollout, Trajectory

Tokens = Callable[[Sequence[int]], list[str]]
"""Ids → one display string each."""
Decision = Literal["fork", "surface", "too_close", "reference"]

NO_DISTANCE = 1e-6
"""Windows closer than this are the same future, whatever the quantiles say."""
_NEGLIGIBLE = 1e-5  # share of a target's mass below which an entry is left out and the rest scaled up


@dataclass(frozen=True, kw_only=True)
class Fork:
    """A position at which the near futures part, or seem to.

    >>> Fork(row=0, position=7, loss=2.5, gap=1.2, draw=0.4).decision
    'surface'
    """

    row: int
    """Index of the rollout in its step."""
    position: int
    """Index into the response; both windows start with this token."""
    loss: float
    """The per-token loss that ranked it, nats."""
    gap: float
    """log p_S − log p_T of the sampled token, nats."""
    cap: float = 1.0
    """min(1, median ℓ / ℓ_t) with the reverse KL as ℓ: its weight if it is suppressed."""
    draw: float
    """Uniform in [0, 1), a pure function of (seed, step, rollout, position), where a control needs it."""
    student: tuple[int, ...] = ()
    teacher: tuple[int, ...] = ()
    distance: float = float("nan")
    """D, exact transport distance of the two windows."""
    decision: Decision = "surface"
    weight: float = 1.0
    """Of its token in L_OPD; below 1 where it is suppressed."""


def key_of(rollout: Rollout) -> str:
    """Names a rollout in the draws of its step."""
    return f"{rollout.prompt.id}/{rollout.sample}"


def candidate_counts(lengths: Sequence[int], options: TOPDOptions) -> list[int]:
    """Candidates of each rollout: known from the lengths alone, so that windows need not wait for all losses.

    >>> candidate_counts([40, 400, 0], TOPDOptions())
    [1, 9, 0]
    """
    wanted = [
        min(options.max_per_rollout, max(1, int(options.top_share * n + 0.5))) if n else 0 for n in lengths
    ]
    scale = min(1.0, options.max_per_step / max(1, sum(wanted)))
    return wanted if scale == 1.0 else [int(scale * n) for n in wanted]


def spaced(order: Sequence[int], *, count: int, min_gap: int) -> list[int]:
    """The first `count` of an order that keep a distance of at least `min_gap`.

    >>> spaced([5, 6, 9, 1], count=2, min_gap=2)
    [5, 9]
    """
    chosen: list[int] = []
    for t in order:
        if len(chosen) == count:
            break
        if all(abs(t - c) >= min_gap for c in chosen):
            chosen.append(t)
    return chosen


def select(
    values: Mapping[str, Sequence[float]],
    *,
    row: int,
    count: int,
    key: str,
    options: TOPDOptions,
    seed: int,
) -> list[Fork]:
    """The candidates of one rollout, by position; with `upper_quartile_of_low_loss` as many references.

    Args:
        values: per response token, `reverse_kl`, `student_logp` and `teacher_logp`.
        key: names the rollout in its draws.
    """
    losses, gaps = ranked_by(values, options)
    size, kl = len(losses), values["reverse_kl"]
    median = max(0.0, statistics.median(kl)) if size else 0.0
    lots = noise(seed, f"{key}/lots", size) if draws_lots(options) else np.zeros(size)

    def fork(t: int, decision: Decision) -> Fork:
        return Fork(
            row=row,
            position=t,
            loss=losses[t],
            gap=gaps[t],
            cap=min(1.0, median / max(kl[t], 1e-12)),
            draw=float(lots[t]),
            decision=decision,
        )

    def at_random() -> list[int]:
        order: list[int] = np.argsort(noise(seed, f"{key}/order", size), kind="stable").tolist()
        return order

    by_loss = sorted(range(size), key=lambda t: -losses[t])  # stable: the first of equals comes first
    order = at_random() if options.decide == "random_positions" else by_loss
    found = [fork(t, "surface") for t in spaced(order, count=count, min_gap=options.min_gap)]
    if options.decide == "upper_quartile_of_low_loss":
        low = set(by_loss[(size + 1) // 2 :]) - {f.position for f in found}
        calm = [t for t in at_random() if t in low]
        found += [fork(t, "reference") for t in spaced(calm, count=count, min_gap=options.min_gap)]
    return sorted(found, key=lambda f: f.position)


def draws_lots(options: TOPDOptions) -> bool:
    """Whether a control decides by `Fork.draw`."""
    return options.decide == "random_positions" or options.suppress == "high" or options.plan == "shuffled"


def ranked_by(values: Mapping[str, Sequence[float]], options: TOPDOptions) -> tuple[list[float], list[float]]:
    """Of each token: the loss that ranks it, and the sampled log-ratio."""
    ours, theirs = values["student_logp"], values["teacher_logp"]
    gaps = [s - t for s, t in zip(ours, theirs, strict=True)]
    match options.candidates:
        case "reverse_kl":
            return list(values["reverse_kl"]), gaps
        case "teacher_nll":
            return [-t for t in theirs], gaps
        case "sampled_gap":
            return gaps, gaps


def quantile_of(forks: Sequence[Fork], options: TOPDOptions) -> float | None:
    """This step's own quantile over all processes; None where the rule has none or there is no candidate."""
    match options.decide:
        case "quantile":
            values, level = [f.distance for f in forks], options.drop_share
        case "sampled_gap":
            values, level = [f.gap for f in forks], options.drop_share
        case "upper_quartile_of_low_loss":
            values, level = [f.distance for f in forks if f.decision == "reference"], 0.75
        case _:
            return None
    everyone = distributed.gather(values)
    return float(np.quantile(everyone, level)) if everyone else None


def decided(forks: Sequence[Fork], options: TOPDOptions, threshold: float) -> list[Fork]:
    """Each candidate is a real fork or a surface mismatch; forks closer than K/2 yield to the larger D."""

    def real(f: Fork) -> bool:
        match options.decide:
            case "quantile" | "upper_quartile_of_low_loss":
                return f.distance >= threshold and f.distance > NO_DISTANCE
            case "threshold":
                return f.distance >= options.threshold and f.distance > NO_DISTANCE
            case "sampled_gap":
                return f.gap >= threshold
            case "random_positions":
                return f.draw >= options.drop_share
            case "all_high_loss":
                return True

    found = [
        f if f.decision == "reference" else replace(f, decision="fork" if real(f) else "surface")
        for f in forks
    ]
    return found if options.overlap == "average" else _thinned(found, options.window / 2)


def _thinned(forks: Sequence[Fork], least: float) -> list[Fork]:
    kept: dict[int, list[int]] = {}
    close: set[tuple[int, int]] = set()
    for f in sorted((f for f in forks if f.decision == "fork"), key=lambda f: (-f.distance, f.position)):
        if all(abs(f.position - p) >= least for p in kept.setdefault(f.row, [])):
            kept[f.row].append(f.position)
        else:
            close.add((f.row, f.position))
    return [replace(f, decision="too_close") if (f.row, f.position) in close else f for f in forks]


def suppressed(forks: Sequence[Fork], options: TOPDOptions) -> list[Fork]:
    """Capped weights for the surface mismatches (`low`), or for as many others drawn by lot (`high`)."""
    if options.suppress == "none":
        return list(forks)
    surface = [f for f in forks if f.decision == "surface"]
    chosen = {(f.row, f.position) for f in surface}
    if options.suppress == "high":
        rest = [f for f in forks if f.decision in ("fork", "too_close")]
        everyone = sorted(distributed.gather([f.draw for f in rest]))
        count = min(len(distributed.gather(surface)), len(everyone))
        limit = everyone[count - 1] if count else -1.0
        chosen = {(f.row, f.position) for f in rest if f.draw <= limit}
    return [replace(f, weight=f.cap) if (f.row, f.position) in chosen else f for f in forks]


def controlled(
    plan_KJ: NDArray[np.float64], fork: Fork, options: TOPDOptions, seed: int
) -> NDArray[np.float64]:
    """The plan itself, or what a control puts in its place."""
    match options.plan:
        case "positional":
            return np.eye(*plan_KJ.shape) / len(plan_KJ)
        case "shuffled":
            key = f"shuffle/{fork.row}/{fork.position}/{fork.draw!r}"
            lots = noise(seed, key, plan_KJ.shape[1])
            return plan_KJ[:, np.argsort(lots, kind="stable")]
        case _:
            return plan_KJ


def guidance_of(
    forks: Sequence[Fork], plans: Sequence[NDArray[np.float64]], lengths: Sequence[int], options: TOPDOptions
) -> dict[int, tuple[Guidance, ...]]:
    """ỹ by row: each fork's plan as targets, rows normalised or literal, averaged where windows overlap.

    Args:
        lengths: of the trained responses; a window is cut there.
    """
    found: dict[tuple[int, int], list[dict[int, float]]] = {}
    for fork, plan in zip(forks, plans, strict=True):
        end = max(0, min(len(fork.student), lengths[fork.row] - fork.position))
        for i, target in _targets(plan[:end], fork.teacher, literal=options.mass == "literal").items():
            found.setdefault((fork.row, fork.position + i), []).append(target)
    merged = {place: _average(targets) for place, targets in sorted(found.items())}
    return _runs(merged)


def _targets(
    plan_KJ: NDArray[np.float64], ids: Sequence[int], *, literal: bool
) -> dict[int, dict[int, float]]:
    """Mass by token id for each row that has any, of 1 in all or literally the plan's; the same token at two
    places of the window adds up."""
    mass_K1 = plan_KJ.sum(axis=1, keepdims=True)
    kept_KJ = np.where(plan_KJ > _NEGLIGIBLE * mass_K1, plan_KJ, 0.0)
    wanted_K1 = mass_K1 if literal else np.ones_like(mass_K1)
    i, j = kept_KJ.nonzero()
    shares = (kept_KJ * (wanted_K1 / np.maximum(kept_KJ.sum(axis=1, keepdims=True), 1e-300)))[i, j]
    found: dict[int, dict[int, float]] = {}
    for row, column, p in zip(i.tolist(), j.tolist(), shares.tolist(), strict=True):
        target = found.setdefault(row, {})
        target[ids[column]] = target.get(ids[column], 0.0) + p
    return found


def _average(targets: Sequence[Mapping[int, float]]) -> dict[int, float]:
    if len(targets) == 1:
        return dict(targets[0])
    ids = sorted({token for target in targets for token in target})
    return {token: sum(t.get(token, 0.0) for t in targets) / len(targets) for token in ids}


def _runs(merged: Mapping[tuple[int, int], Mapping[int, float]]) -> dict[int, tuple[Guidance, ...]]:
    """Targets at consecutive positions as one record. `merged` is ordered by row, then position."""
    runs: dict[int, list[tuple[int, list[Mapping[int, float]]]]] = {}
    for (row, position), target in merged.items():
        mine = runs.setdefault(row, [])
        if mine and mine[-1][0] + len(mine[-1][1]) == position:
            mine[-1][1].append(target)
        else:
            mine.append((position, [target]))
    return {
        row: tuple(Guidance(start=start, targets=tuple(targets)) for start, targets in mine)
        for row, mine in runs.items()
    }


def annotated(
    trained: Sequence[Trajectory],
    found: Sequence[Fork],
    guided: Sequence[Fork],
    plans: Sequence[NDArray[np.float64]],
    options: TOPDOptions,
    tokens: Tokens,
) -> list[Trajectory]:
    """The trajectories with their guidance, the weights of suppressed tokens, and all that was found."""
    guidance = guidance_of(guided, plans, [len(t.response) for t in trained], options)
    plan_at = {(f.row, f.position): plan for f, plan in zip(guided, plans, strict=True)}
    by_row: dict[int, list[Fork]] = {}
    for f in found:
        by_row.setdefault(f.row, []).append(f)
    marked = []
    for row, t in enumerate(trained):
        mine = by_row.get(row, [])
        details = [described(f, plan_at.get((row, f.position)), tokens, options.record_above) for f in mine]
        weights = list(t.token_weights)
        for f in mine:
            weights[f.position] *= f.weight
        marked.append(
            replace(
                t,
                guidance=guidance.get(row, ()),
                weights=tuple(weights) if any(f.weight != 1.0 for f in mine) else t.weights,
                edit=Edit(kind="forks" if mine else "none", detail={"forks": details} if mine else {}),
            )
        )
    return marked


def described(
    fork: Fork, plan_KJ: NDArray[np.float64] | None, tokens: Tokens, record_above: float
) -> dict[str, Any]:
    """A fork as JSON-ready values; `plan` has [i, j, share of row i's mass] above a threshold."""
    entries: list[list[float]] = []
    if plan_KJ is not None:
        mass_K1 = plan_KJ.sum(axis=1, keepdims=True)
        share_KJ = np.divide(plan_KJ, mass_K1, out=np.zeros_like(plan_KJ), where=mass_K1 > 0)
        above = np.argwhere((share_KJ >= record_above) & (share_KJ > 0)).tolist()
        entries = [[i, j, round(float(share_KJ[i, j]), 4)] for i, j in above]
    mine, theirs = tokens(fork.student), tokens(fork.teacher)
    return {
        "position": fork.position,
        "decision": fork.decision,
        "loss": fork.loss,
        "sampled_gap": fork.gap,
        "distance": fork.distance,
        "weight": fork.weight,
        "student_window": list(fork.student),
        "teacher_window": list(fork.teacher),
        "student_tokens": mine,
        "teacher_tokens": theirs,
        "student_text": "".join(mine),
        "teacher_text": "".join(theirs),
        "plan": entries,
    }


def counted(found: Sequence[Fork], marked: Sequence[Trajectory]) -> dict[str, Mapping[str, Any]]:
    """Of this process: `totals` and `means` of `Prepared`."""
    candidates = [f for f in found if f.decision != "reference"]
    real = [f for f in candidates if f.decision == "fork"]

    def mean(forks: Sequence[Fork]) -> tuple[float, float]:
        return sum(f.distance for f in forks), float(len(forks))

    return {
        "totals": {
            "fork_candidates": len(candidates),
            "forks": len(real),
            "suppressed_tokens": sum(f.weight < 1 for f in found),
            "guided_tokens": sum(len(g.targets) for t in marked for g in t.guidance),
            "teacher_tokens_generated": sum(len(f.teacher) for f in found),
        },
        "means": {
            "fork_share": (float(len(real)), float(len(candidates))),
            "candidate_distance": mean(candidates),
            "fork_distance": mean(real),
            "identical_share": (
                float(sum(f.distance <= NO_DISTANCE for f in candidates)),
                float(len(candidates)),
            ),
        },
    }
