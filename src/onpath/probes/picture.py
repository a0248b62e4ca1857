"""The prefix-failure picture: recoverability by position, and the teacher's two modes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onpath.stats import bootstrap_interval

if TYPE_CHECKING:
    from onpath.probes.prefix_failure import Probed

_STUDENT, _TEACHER, _ONSET, _OWN = (
    "#0072B2",
    "#D55E00",
    "#CC79A7",
    "#009E73",
)  # told apart by all kinds of eyes
_FEW = 3  # positions that fewer rollouts reach are not drawn


def draw(found: Sequence[Probed], path: Path) -> None:
    """Two panels over tokens from the first error (where errors are known), else over the response."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    known = [p for p in found if p.first_error is not None]
    shown = known or [p for p in found if not p.right] or list(found)
    figure = Figure(figsize=(7.5, 6), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True)
    for name, colour in (("student", _STUDENT), ("teacher", _TEACHER)):
        rates = by_offset(shown, lambda p, n=name: _rates(p, getattr(p, n)))  # type: ignore[misc]
        _line(upper, rates, colour, f"{name} goes on")
    upper.set(ylabel="share of continuations\nthat end right", ylim=(-0.02, 1.02))
    for name, colour, label in (
        ("onset_mass", _ONSET, "opens a correction"),
        ("token_probability", _OWN, "goes on as the student did"),
    ):
        masses = by_offset(shown, lambda p, n=name: list(enumerate(getattr(p, n))))  # type: ignore[misc]
        _line(lower, masses, colour, label)
    where = "tokens from the start of the first wrong step" if known else "tokens of the response"
    lower.set(ylabel="teacher's probability", xlabel=where, ylim=(-0.02, 1.02))
    kind = "rollouts with a known first error" if known else "rollouts"
    upper.set_title(
        f"{len(shown)} {kind}, {shown[0].trials} continuations at each position; bands: 95%", fontsize=10
    )
    for axis in (upper, lower):
        axis.legend(frameon=False, loc="center right")
        axis.spines[["top", "right"]].set_visible(False)
        if known:
            axis.axvline(0, color="0.6", linewidth=0.8, linestyle=":")
    figure.savefig(path, dpi=150)


def by_offset(
    found: Sequence[Probed], values: Callable[[Probed], list[tuple[int, float]]]
) -> dict[int, list[float]]:
    """Offset from the first error (or from the start) → one value per rollout that reaches it."""
    grouped: dict[int, list[float]] = defaultdict(list)
    for p in found:
        for position, value in values(p):
            grouped[position - (p.first_error or 0)].append(value)
    return {offset: v for offset, v in sorted(grouped.items()) if len(v) >= min(_FEW, len(found))}


def _rates(p: Probed, right: Sequence[int]) -> list[tuple[int, float]]:
    return [(t, n / p.trials) for t, n in zip(p.positions, right, strict=True)]


def _line(axis: Any, grouped: dict[int, list[float]], colour: str, label: str) -> None:
    offsets = list(grouped)
    means = [sum(v) / len(v) for v in grouped.values()]
    low, high = zip(*(bootstrap_interval(v, resamples=500) for v in grouped.values()), strict=True)
    axis.plot(offsets, means, color=colour, linewidth=1.8, label=label)
    axis.fill_between(offsets, low, high, color=colour, alpha=0.2, linewidth=0)
