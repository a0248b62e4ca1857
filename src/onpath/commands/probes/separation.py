"""How well a number tells errors from the rest: areas under curves, correlations, precision, recall."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import mannwhitneyu, rankdata

from onpath.config.methods.topd import TOPDOptions
from onpath.evaluate.stats import wilson_interval
from onpath.methods.topd.candidates import NO_DISTANCE, NO_LOSS, spaced, uncapped_counts

_RESAMPLES = 300
_FEWEST = 5
"""Of a class, from which resampling says how sure an area is."""


@dataclass(frozen=True, kw_only=True)
class Detection:
    """What one rule flags as a fork, against the truth."""

    rule: str
    flagged: int
    precision: float
    """Share of the flagged that are errors; 0, with an interval that says nothing, where none is flagged."""
    precision_ci95: tuple[float, float]
    """Wilson's; tokens taken as independent."""
    recall: float
    """Share of all errors that are flagged."""
    habits: float
    """Share of the flagged that are surface habits."""


def detections(columns: Mapping[str, NDArray[Any]], options: TOPDOptions | None = None) -> list[Detection]:
    """TOPD's rules, with the candidates that it takes of each rollout, and their parts on equal terms: these
    flag as many tokens as its default rule does, of all rollouts together.

    Args:
        columns: per token `owner` (its rollout), in the order of positions, `reverse_kl`, `distance`,
            `sampled_gap`, and the truth `error` and `habit`.
        options: `top_share`, `min_gap` and `drop_share`; None: the defaults. Thresholds are those of these
            tokens alone, of all quiet ones: the method draws some, and follows them over steps.
    """
    options = options or TOPDOptions()
    loss, distance, gap = (columns[k] for k in ("reverse_kl", "distance", "sampled_gap"))
    loudest, quiet = _candidates(columns["owner"], loss, options)
    real = (distance > NO_DISTANCE) & (loss > NO_LOSS)
    above, kept = (
        loudest[(distance[loudest] >= threshold) & real[loudest]]
        for threshold in (
            np.quantile(distance[quiet], 0.75) if len(quiet) else 0.0,
            np.quantile(distance[loudest], options.drop_share),
        )
    )
    rules = {
        "all candidates by loss": loudest,
        "D above the quiet tokens' upper quartile (TOPD)": above,
        f"without the lowest {options.drop_share:.0%} by D (`quantile`)": kept,
        "candidates by sampled log-ratio": loudest[_top(gap[loudest], len(above))],
        "loss alone": _top(loss, len(above)),
        "distance alone": _top(distance, len(above)),
        "sampled log-ratio alone": _top(gap, len(above)),
    }
    return [_detection(name, flagged, columns) for name, flagged in rules.items()]


def _candidates(
    owners: NDArray[Any], loss: NDArray[Any], options: TOPDOptions
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """TOPD's candidates of each rollout, and the quieter half of its other tokens."""
    loudest, quiet = list[int](), list[int]()
    for owner in dict.fromkeys(owners.tolist()):
        mine = np.flatnonzero(owners == owner)
        by_loss = mine[np.argsort(-loss[mine], kind="stable")]
        (count,) = uncapped_counts([len(mine)], options)
        place = {int(i): n for n, i in enumerate(mine)}
        order = [place[int(i)] for i in by_loss]
        chosen = [int(mine[n]) for n in spaced(order, count=count, min_gap=options.min_gap)]
        loudest += chosen
        quiet += [int(i) for i in by_loss[(len(mine) + 1) // 2 :] if int(i) not in chosen]
    return np.array(sorted(loudest), dtype=np.intp), np.array(sorted(quiet), dtype=np.intp)


def _top(values: NDArray[Any], count: int) -> NDArray[np.intp]:
    return np.argsort(-values, kind="stable")[:count]


def _detection(rule: str, flagged: NDArray[np.intp], columns: Mapping[str, NDArray[Any]]) -> Detection:
    right, count = columns["error"][flagged], max(1, len(flagged))
    precision = float(right.sum() / count)
    return Detection(
        rule=rule,
        flagged=len(flagged),
        precision=precision,
        precision_ci95=wilson_interval(precision, trials=count) if len(flagged) else (0.0, 1.0),
        recall=float(right.sum() / max(1, columns["error"].sum())),
        habits=float(columns["habit"][flagged].sum() / count),
    )


def auc(scores: NDArray[np.float64], positive: NDArray[Any], owners: NDArray[Any]) -> dict[str, Any] | None:
    """Chance that a positive outranks a negative, its interval by resampling owners; None: one class only.
    Of fewer than five of a class, or where all resamples agree, the interval is None: resampling would claim
    certainty.

    >>> auc(np.array([1.0, 2.0, 3.0]), np.array([False, True, True]), np.array(["a", "b", "c"]))["auc"]
    1.0
    """
    whole = area(scores, positive)
    if whole is None:
        return None
    rng = np.random.default_rng(0)
    names, index = np.unique(owners, return_inverse=True)
    rows = [np.flatnonzero(index == i) for i in range(len(names))]
    found = []
    for _ in range(_RESAMPLES):
        drawn = np.concatenate([rows[i] for i in rng.integers(0, len(rows), len(rows))])
        one = area(scores[drawn], positive[drawn])
        found += [] if one is None else [one]
    low, high = np.quantile(found, [0.025, 0.975]).tolist() if found else (0.0, 0.0)
    enough = min(np.count_nonzero(positive), np.count_nonzero(~positive)) >= _FEWEST and low < high
    return {"auc": whole, "ci95": [low, high] if enough else None}


def area(scores: NDArray[np.float64], positive: NDArray[Any]) -> float | None:
    """Area under the ROC curve: Mann and Whitney's U as a share of all pairs; None: one class only."""
    above, below = scores[positive], scores[~positive]
    if not len(above) or not len(below):
        return None
    return float(mannwhitneyu(above, below, method="asymptotic").statistic) / (len(above) * len(below))


def correlations(x: Sequence[float], y: Sequence[float]) -> dict[str, Any]:
    """Pearson's and Spearman's; None where one side does not vary.

    >>> correlations([1.0, 2.0, 30.0], [1.0, 2.0, 3.0])["spearman"]
    1.0
    """
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return {"n": len(x), "pearson": None, "spearman": None}
    return {
        "n": len(x),
        "pearson": float(np.corrcoef(x, y)[0, 1]),
        "spearman": float(round(np.corrcoef(rankdata(x), rankdata(y))[0, 1], 12)),
    }
