"""TOPD's first stage: the positions of each rollout that the per-token loss ranks highest.

A fork is a position of a rollout at which the near futures of student and teacher are compared. It is a
value: each stage gives it back with one more thing known.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from onpath.config.methods.topd import TOPDOptions
from onpath.system import distributed
from onpath.system.draws import noise

Decision = Literal["fork", "surface", "too_close", "reference"]


NO_DISTANCE = 1e-6
"""Windows closer than this are the same future, whatever the quantiles say."""


NO_LOSS = 1e-6
"""A candidate with no more of the loss that ranks it, nats, is no high-loss token: the two models agree."""


_WHOLE = 1e-9
"""A share that lacks no more than this of a whole number is one: rounding."""


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
    ended: bool = False
    """Whether the teacher's window ends its response."""
    generated: tuple[int, int] = (0, 0)
    """Tokens that student and teacher generated for the windows, what was cut off included."""
    distance: float = float("nan")
    """D, exact transport distance of the two windows."""
    decision: Decision = "surface"
    weight: float = 1.0
    """Of its token in L_OPD; below 1 where it is suppressed."""


def candidate_counts(
    lengths: Sequence[int],
    options: TOPDOptions | None = None,
    *,
    keys: Sequence[str] | None = None,
    seed: int = 0,
) -> list[int]:
    """Candidates of each rollout: known from the lengths alone, so that windows need not wait for all losses.

    Args:
        lengths: of the responses of this process; `max_per_step` counts those of all processes, each of which
            must call.
        options: None: the defaults, the paper's 2.25% without a cap.
        keys: of the rollouts; with `seed` they draw lots for what equal shares leave of the cap. None: their
            places do.

    >>> candidate_counts([40, 400, 9688, 0])
    [1, 9, 218, 0]
    >>> candidate_counts([400, 400], TOPDOptions(max_per_step=9))
    [4, 5]
    """
    options = options or TOPDOptions()
    wanted = uncapped_counts(lengths, options)
    if options.max_per_rollout is not None:
        wanted = [min(options.max_per_rollout, n) for n in wanted]
    if options.max_per_step is None:
        return wanted
    (everyone,) = distributed.total([sum(wanted)])
    if everyone <= options.max_per_step:
        return wanted
    # Whole ones of the same share for all; what is left goes to the largest remainders, of equal ones by lot.
    shares = [n * options.max_per_step / everyone for n in wanted]
    counts = [int(share + _WHOLE) for share in shares]
    (given,) = distributed.total([sum(counts)])
    named = keys or [f"{distributed.rank()}/{i}" for i in range(len(wanted))]
    order = [
        (round(count - share, 9), noise(seed, f"{key}/cap", 1)[0])
        for count, share, key in zip(counts, shares, named, strict=True)
    ]
    more = _first(order, options.max_per_step - round(given))
    return [n + int(one) for n, one in zip(counts, more, strict=True)]


def uncapped_counts(lengths: Sequence[int], options: TOPDOptions) -> list[int]:
    """Candidates of each rollout where no cap cuts them."""
    return [max(1, int(options.top_share * n + 0.5)) if n else 0 for n in lengths]


def reference_counts(
    counts: Sequence[int], keys: Sequence[str], options: TOPDOptions, *, seed: int
) -> list[int]:
    """References of each rollout: of all processes' rollouts `references` have one, drawn by lot. Each
    process must call.

    >>> reference_counts([3, 2], ["a", "b"], TOPDOptions(references=None), seed=0)
    [3, 2]
    """
    if options.references is None or options.decide != "upper_quartile_of_low_loss":
        return list(counts)
    if options.references == "auto":
        (candidates,) = distributed.total([sum(counts)])
        most = min(16, max(4, math.ceil(candidates / 16)))
    else:
        most = options.references
    lots = [noise(seed, f"{key}/reference", 1)[0] for key in keys]
    return [int(one) for one in _first(lots, most)]


def _first(order: Sequence[Any], most: int) -> list[bool]:
    """Which of this process's are among the first `most` of all processes', each of which must call."""
    chosen = sorted(distributed.gather(order))[:most]
    return [bool(chosen) and place <= chosen[-1] for place in order]


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
    references: int | None = None,
    start: int = 0,
) -> list[Fork]:
    """The candidates of one rollout, by position, and with `upper_quartile_of_low_loss` its references.

    Args:
        values: per response token, `reverse_kl`, `student_logp` and `teacher_logp`.
        key: names step and rollout in the draws.
        references: None: as many as candidates.
        start: tokens before it are neither.
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
        order = np.argsort(noise(seed, f"{key}/order", size), kind="stable").tolist()
        return [t for t in order if t >= start]

    by_loss = sorted(range(start, size), key=lambda t: -losses[t])  # stable: the first of equals comes first
    order = at_random() if options.decide == "random_positions" else by_loss
    found = [fork(t, "surface") for t in spaced(order, count=count, min_gap=options.min_gap)]
    if options.decide == "upper_quartile_of_low_loss":
        references = count if references is None else references
        low = set(by_loss[(len(by_loss) + 1) // 2 :]) - {f.position for f in found}
        calm = [t for t in at_random() if t in low]
        found += [fork(t, "reference") for t in spaced(calm, count=references, min_gap=options.min_gap)]
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
