"""TOPD's last stage: plans become targets, or windows trajectories.

Shape suffixes: K student's window, J teacher's window.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onpath.config.methods.topd import TOPDOptions
from onpath.methods.tools import Tools
from onpath.methods.topd.candidates import NO_DISTANCE, Fork
from onpath.methods.topd.futures import until_stop
from onpath.methods.topd.pairs import AT_ONCE, pairs_of
from onpath.records import Completion, Edit, Guidance, Rollout, Trajectory, all_by
from onpath.system.draws import noise

Tokens = Callable[[Sequence[int]], list[str]]
"""Ids → one display string each."""


_NEGLIGIBLE = 1e-5  # share of a target's mass below which an entry is left out and the rest scaled up


def controlled(
    plan_KJ: NDArray[np.float64], fork: Fork, options: TOPDOptions, seed: int, step: int = 0
) -> NDArray[np.float64]:
    """The plan itself, or what a control puts in its place."""
    match options.plan:
        case "positional":
            return np.eye(*plan_KJ.shape) / len(plan_KJ)
        case "shuffled":
            key = f"step {step}/shuffle/{fork.position}/{fork.draw!r}"
            lots = noise(seed, key, plan_KJ.shape[1])
            return plan_KJ[:, np.argsort(lots, kind="stable")]
        case _:
            return plan_KJ


def guidance_of(
    forks: Sequence[Fork], plans: Sequence[NDArray[np.float64]], lengths: Sequence[int], options: TOPDOptions
) -> dict[int, tuple[Guidance, ...]]:
    """ỹ by row: each fork's plan as targets, rows literal or normalised, summed or averaged where windows
    overlap.

    Args:
        lengths: of the trained responses; a window is cut there.
    """
    found: dict[tuple[int, int], list[dict[int, float]]] = {}
    for fork, plan in zip(forks, plans, strict=True):
        end = max(0, min(len(plan), lengths[fork.row] - fork.position))  # not those of a fresh sample
        for i, target in _targets(plan[:end], fork.teacher, literal=options.mass == "literal").items():
            found.setdefault((fork.row, fork.position + i), []).append(target)
    average = options.overlap == "average"
    merged = {place: _met(targets, average=average) for place, targets in sorted(found.items())}
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


def _met(targets: Sequence[Mapping[int, float]], *, average: bool) -> dict[int, float]:
    """One target of several at a position. Of the sum the gradient is that of the formula's Σ KL; the value
    differs by a constant, the entropies of the parts."""
    if len(targets) == 1:
        return dict(targets[0])
    ids, parts = sorted({token for target in targets for token in target}), len(targets) if average else 1
    return {token: sum(t.get(token, 0.0) for t in targets) / parts for token in ids}


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
        details = [
            described(f, plan_at.get((row, f.position)), t.origin, tokens, options.record_above) for f in mine
        ]
        factors = [1.0] * len(t.response)
        for f in mine:
            factors[f.position] *= f.weight
        marked.append(
            replace(
                t if all(factor == 1.0 for factor in factors) else t.reweighted(factors),
                guidance=guidance.get(row, ()),
                edit=Edit(kind="forks" if mine else "none", detail={"forks": details} if mine else {}),
            )
        )
    return marked


def described(
    fork: Fork,
    plan_KJ: NDArray[np.float64] | None,
    rollout: Rollout | None,
    tokens: Tokens,
    record_above: float,
) -> dict[str, Any]:
    """A fork as JSON-ready values; `plan` has [i, j, share of row i's mass] above a threshold.

    Where there is a plan, its rows are the rollout's own tokens: these are the student's window then, and
    what it generated anew (`regenerate`), which the distance is of, stands beside them.
    """
    own = fork.student
    if plan_KJ is not None and rollout is not None:
        own = rollout.ids[fork.position :][: len(plan_KJ)]
    entries: list[list[float]] = []
    if plan_KJ is not None:
        mass_K1 = plan_KJ.sum(axis=1, keepdims=True)
        share_KJ = np.divide(plan_KJ, mass_K1, out=np.zeros_like(plan_KJ), where=mass_K1 > 0)
        above = np.argwhere((share_KJ >= record_above) & (share_KJ > 0)).tolist()
        entries = [[i, j, round(float(share_KJ[i, j]), 4)] for i, j in above]
    mine, theirs = tokens(own), tokens(fork.teacher)
    anew = {} if own == fork.student else {"regenerated_text": "".join(tokens(fork.student))}
    return {
        "position": fork.position,
        "decision": fork.decision,
        "loss": fork.loss,
        "sampled_gap": fork.gap,
        "distance": fork.distance,
        "weight": fork.weight,
        "student_window": list(own),
        "teacher_window": list(fork.teacher),
        "student_tokens": mine,
        "teacher_tokens": theirs,
        "student_text": "".join(mine),
        "teacher_text": "".join(theirs),
        "plan": entries,
        **anew,
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
            "student_tokens_generated": sum(f.generated[0] for f in found),
            "teacher_tokens_generated": sum(f.generated[1] for f in found),
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


def guidance_plans(
    guided: Sequence[Fork], rollouts: Sequence[Rollout], tools: Tools, options: TOPDOptions, step: int
) -> list[NDArray[np.float64]]:
    """γ [K, J] of each fork: Sinkhorn's, between the rollout's own tokens and the teacher's, or a control."""
    if not guided or options.plan in ("spliced", "teacher_window_ce"):
        return [np.zeros((len(f.student), len(f.teacher))) for f in guided]
    own = [
        replace(f, student=rollouts[f.row].ids[f.position :][: options.window]) for f in guided
    ]  # with `regenerate`, f.student is a fresh sample, which nobody trains on
    plans: list[NDArray[np.float64]] = []
    for start in range(0, len(own), AT_ONCE):
        some = pairs_of(own[start : start + AT_ONCE], rollouts, tools, options)
        plans += list(some.transport(epsilon=options.epsilon)[1].double().cpu().numpy())
    seed = tools.sampling.seed
    return [
        controlled(plan_KJ[: len(f.student), : len(f.teacher)], f, options, seed, step)
        for f, plan_KJ in zip(own, plans, strict=True)
    ]


def what_targets_say(
    marked: Sequence[Trajectory], likeliest: Mapping[int, Sequence[int]]
) -> dict[str, tuple[float, float]]:
    """What predicts harm, over all guided tokens: the share of ỹ's mass on the teacher's likeliest token *in
    the student's context* and on the student's own, and its entropy.

    Args:
        likeliest: row → that token at each position.
    """
    on_teacher = on_own = entropy = 0.0
    count = 0
    for row, t in enumerate(marked):
        for g in t.guidance:
            for at, target in enumerate(g.targets, start=g.start):
                mass = sum(target.values())
                on_teacher += target.get(likeliest[row][at], 0.0) / mass
                on_own += target.get(t.response[at], 0.0) / mass
                entropy -= sum(p / mass * math.log(p / mass) for p in target.values() if p > 0)
                count += 1
    return {
        "target_teacher_share": (on_teacher, float(count)),
        "target_own_share": (on_own, float(count)),
        "target_entropy_nats": (entropy, float(count)),
    }


def whole_windows(
    guided: Sequence[Fork], rollouts: Sequence[Rollout], tools: Tools, options: TOPDOptions, step: int
) -> tuple[list[tuple[int, ...]], int]:
    """The teacher's windows, with `splice: end` to their ends; and the tokens that this took."""
    windows = [f.teacher for f in guided]
    if options.splice == "window":
        return windows, 0
    whole = [
        rollouts[f.row].continued(
            Completion(ids=f.teacher, logprobs=(0.0,) * len(f.teacher), finish_reason="length"), at=f.position
        )
        for f in guided
    ]
    going = [i for i, f in enumerate(guided) if not f.ended]
    sampling = replace(tools.sampling, temperature=options.window_temperature)
    keys = [f"step {step}/{whole[i].key}/{guided[i].position}/rest" for i in going]
    rests, generated = tools.teacher_finishes([whole[i] for i in going], sampling, keys)
    for i, rest in zip(going, rests, strict=True):
        before = rollouts[guided[i].row].ids[: guided[i].position]
        windows[i], _ = until_stop(before, windows[i] + rest.ids, tools)
    return windows, generated


def spliced(
    guided: Sequence[Fork],
    windows: Sequence[tuple[int, ...]],
    rollouts: Sequence[Rollout],
    options: TOPDOptions,
) -> list[Trajectory]:
    """y_<t with the teacher's window after it, one trajectory for each fork.

    `plan: spliced`: the objective along the window, its tokens in the count. Control teacher_window_ce:
    cross-entropy only; its tokens have weight 0, so that they are neither in L_OPD nor in the count.
    """
    if options.plan not in ("spliced", "teacher_window_ce"):
        return []
    made = []
    for f, whole in zip(guided, windows, strict=True):
        end = None if options.first_tokens is None else max(0, options.first_tokens - f.position)
        prefix, window = rollouts[f.row].prefix(f.position), whole[:end]
        one = Trajectory(
            student_context=prefix,
            teacher_context=prefix,
            response=window,
            writers=all_by("teacher", len(window)),
            behaviour_logprobs=(0.0,) * len(window),
            origin=rollouts[f.row],
            begins=f.position,
            edit=Edit(kind="teacher_window", detail={"position": f.position}),
        )
        if options.plan == "teacher_window_ce":
            onehots = Guidance(start=0, targets=tuple({i: 1.0} for i in window))
            one = replace(one, weights=(0.0,) * len(window), guidance=(onehots,))
        made.append(one)
    return made
