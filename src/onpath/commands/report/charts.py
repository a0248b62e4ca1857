"""Charts as data, which the page's scripts draw: mappings with `kind`, `title`, `help` and numbers.

lines      series of (x, y) with optional low and high        stack      shares of a whole by x
histogram  counts by bin, one series per group                scatter    points with groups and quadrants
flow       2 × 2 shares, left to right                        intervals  a mean and its interval per row
table      columns and rows
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import stdtrit

Chart = dict[str, Any]
Series = dict[str, Any]

# On a light ground and on a dark one: Okabe and Ito's, darker or lighter where a line would be faint; then
# those farthest from all before them, also to eyes that see no red or no green.
COLOURS = (
    *(("#0072b2", "#5ab4ea"), ("#d55e00", "#f58d45"), ("#009e73", "#3fcf9f"), ("#b4578e", "#e29cc6")),
    *(("#b98900", "#efc04a"), ("#3f8fc0", "#a5d8f7"), ("#6b6b6b", "#b4b4b4"), ("#550055", "#8866ff")),
    *(("#0000bb", "#3388bb"), ("#334400", "#bbffbb"), ("#5522ff", "#ee22cc"), ("#7777ff", "#5599ff")),
    *(("#554477", "#bb6688"), ("#775500", "#aa7700"), ("#882244", "#ff4455"), ("#331188", "#7777dd")),
)
MOST_POINTS = 400
"""Of one series; longer ones are thinned evenly."""


def series(
    name: str,
    x: Sequence[float],
    y: Sequence[float | None],
    *,
    low: Sequence[float | None] | None = None,
    high: Sequence[float | None] | None = None,
    marks: bool = False,
) -> Series:
    """One line; `marks` shows its points, for values that are few."""
    at = np.unique(np.linspace(0, len(x) - 1, min(len(x), MOST_POINTS)).round().astype(int)).tolist()
    made: Series = {"name": name, "x": [x[i] for i in at], "y": [_short(y[i]) for i in at], "marks": marks}
    if low is not None and high is not None:
        made |= {"low": [_short(low[i]) for i in at], "high": [_short(high[i]) for i in at]}
    return made


def lines(
    title: str,
    all_series: Sequence[Series | None],
    *,
    help: str = "",
    x: str = "optimiser step",
    unit: str = "",
    zero: bool = True,
) -> Chart | None:
    """None where there is nothing to draw. Unit `%`: shares as percentages; `zero`: the axis starts at 0."""
    numbered = [(at, s) for at, s in enumerate(all_series) if s and any(v is not None for v in s["y"])]
    if not numbered:
        return None
    # A colour is a place in the list, whichever of them has nothing to draw: an arm has one on all of a page.
    drawn = [s if at == i else {**s, "colour": at} for i, (at, s) in enumerate(numbered)]
    return {
        "kind": "lines",
        "title": title,
        "help": help,
        "x": x,
        "unit": unit,
        "zero": zero,
        "series": drawn,
    }


def stack(title: str, all_series: Sequence[Series], *, help: str = "", unit: str = "") -> Chart | None:
    """Amounts that add up, by step."""
    drawn = [s for s in all_series if any(s["y"])]
    if not drawn:
        return None
    return {
        "kind": "stack",
        "title": title,
        "help": help,
        "x": "optimiser step",
        "unit": unit,
        "series": drawn,
    }


def histogram(
    title: str, groups: Mapping[str, Sequence[float]], *, x: str, help: str = "", bins: int = 24
) -> Chart | None:
    """Counts over common bins, by group; values that are not finite are left out."""
    finite = {name: [v for v in values if np.isfinite(v)] for name, values in groups.items()}
    everything = [v for values in finite.values() for v in values]
    if not everything:
        return None
    edges = np.histogram_bin_edges(everything, bins=bins)
    return {
        "kind": "histogram",
        "title": title,
        "help": help,
        "x": x,
        "edges": [_short(e) for e in edges],
        "series": [
            {"name": name, "counts": np.histogram(values, bins=edges)[0].tolist()}
            for name, values in finite.items()
            if values
        ],
    }


def by_position(
    rows: Sequence[tuple[str, Sequence[float]]], *, bins: int = 40
) -> list[tuple[str, list[float], list[float | None], list[float | None], list[float | None]]]:
    """(group, position, mean, low, high): 95% intervals, normal over the means of trajectories.

    Args:
        rows: (group, one value per response token).
    """
    longest = max((len(values) for _, values in rows), default=0)
    width = max(1, -(-longest // bins))
    starts = list(range(0, longest, width))
    found = []
    for group in dict.fromkeys(name for name, _ in rows):
        mine = [np.asarray(values, dtype=np.float64) for name, values in rows if name == group]
        cells = [[_mean(v[s : s + width]) for v in mine if len(v) > s] for s in starts]
        summary = [_interval([m for m in means if np.isfinite(m)]) for means in cells]
        middle, low, high = (list(part) for part in zip(*summary, strict=True))
        found.append((group, [s + (width - 1) / 2 for s in starts], middle, low, high))
    return found


def _mean(values: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else float("nan")


def _interval(means: Sequence[float]) -> tuple[float | None, float | None, float | None]:
    if len(means) < 2:
        return (means[0], None, None) if means else (None, None, None)
    quantile = float(stdtrit(len(means) - 1, 0.975))  # few trajectories are as long as the last ones
    half = quantile * float(np.std(means, ddof=1)) / len(means) ** 0.5
    middle = float(np.mean(means))
    return middle, middle - half, middle + half


def _short(value: float | None) -> float | None:
    """Five digits: more than a picture shows, fewer bytes."""
    return None if value is None or not np.isfinite(value) else float(f"{value:.5g}")
