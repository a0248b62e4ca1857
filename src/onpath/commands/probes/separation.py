"""How well a number tells errors from the rest: areas under curves, correlations, precision, recall."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import mannwhitneyu, rankdata

from onpath.evaluate.stats import wilson_interval

_RESAMPLES = 300
_FEWEST = 5
"""Of a class, from which resampling says how sure an area is."""


@dataclass(frozen=True, kw_only=True)
class Detection:
    """What one rule flags as a fork, against the truth."""

    rule: str
    flagged: int
    precision: float
    """Share of the flagged that are errors."""
    precision_ci95: tuple[float, float]
    """Wilson's; tokens taken as independent."""
    recall: float
    """Share of all errors that are flagged."""
    habits: float
    """Share of the flagged that are surface habits."""


def detections(
    columns: Mapping[str, NDArray[Any]], *, share: float = 0.0225, drop: float = 0.3
) -> list[Detection]:
    """TOPD's rule and its parts on equal terms: each flags as many tokens as TOPD does.

    Args:
        columns: per token `reverse_kl`, `distance`, `sampled_gap`, and the truth `error` and `habit`.
        share: of all tokens, by loss, that are candidates.
        drop: share of the candidates, by distance, that are dropped.
    """
    loss, distance, gap = (columns[k] for k in ("reverse_kl", "distance", "sampled_gap"))
    loudest = _top(loss, max(1, round(share * len(loss))))
    count = max(1, round((1 - drop) * len(loudest)))
    rules = {
        "all candidates by loss": loudest,
        "loss alone": _top(loss, count),
        "distance alone": _top(distance, count),
        "both (TOPD)": loudest[_top(distance[loudest], count)],
        "candidates by sampled log-ratio": loudest[_top(gap[loudest], count)],
        "sampled log-ratio alone": _top(gap, count),
    }
    return [_detection(name, flagged, columns) for name, flagged in rules.items()]


def _top(values: NDArray[Any], count: int) -> NDArray[np.intp]:
    return np.argsort(-values, kind="stable")[:count]


def _detection(rule: str, flagged: NDArray[np.intp], columns: Mapping[str, NDArray[Any]]) -> Detection:
    right = columns["error"][flagged]
    return Detection(
        rule=rule,
        flagged=len(flagged),
        precision=float(right.mean()),
        precision_ci95=wilson_interval(float(right.mean()), trials=len(flagged)),
        recall=float(right.sum() / max(1, columns["error"].sum())),
        habits=float(columns["habit"][flagged].mean()),
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
