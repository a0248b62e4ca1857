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
_VISIBLE = 0.01


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
    own = by_offset(shown, lambda p: list(enumerate(p.token_probability)))
    _line(lower, own, _OWN, "goes on as the student did (mean)", band=False)
    # A mean would hide that the teacher either opens a correction or does not think of it.
    onsets = by_offset(shown, lambda p: [(t, m) for t, m in enumerate(p.onset_mass) if m > _VISIBLE], few=1)
    dots = [(offset, mass) for offset, masses in onsets.items() for mass in masses]
    lower.plot(
        *zip(*dots, strict=True) if dots else ([], []),
        color=_ONSET, marker="o", markersize=4, linestyle="", alpha=0.8,
        label="opens a correction (each rollout)",
    )  # fmt: skip
    where = "tokens from the start of the first wrong step" if known else "tokens of the response"
    lower.set(ylabel="teacher's probability", xlabel=where, ylim=(-0.02, 1.02))
    kind = "rollouts with a known first error" if known else "rollouts"
    figure.suptitle(
        f"{len(shown)} {kind}, {shown[0].trials} continuations at each position; bands: 95%", fontsize=10
    )
    for axis in (upper, lower):
        axis.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderpad=0)
        axis.spines[["top", "right"]].set_visible(False)
        if known:
            axis.axvline(0, color="0.6", linewidth=0.8, linestyle=":")
    figure.savefig(path, dpi=150)


def by_offset(
    found: Sequence[Probed], values: Callable[[Probed], list[tuple[int, float]]], *, few: int = _FEW
) -> dict[int, list[float]]:
    """Offset from the first error (or from the start) → one value per rollout that reaches it; offsets that
    fewer than `few` rollouts reach are left out."""
    grouped: dict[int, list[float]] = defaultdict(list)
    for p in found:
        for position, value in values(p):
            grouped[position - (p.first_error or 0)].append(value)
    return {offset: v for offset, v in sorted(grouped.items()) if len(v) >= min(few, len(found))}


def _rates(p: Probed, right: Sequence[int]) -> list[tuple[int, float]]:
    return [(t, n / p.trials) for t, n in zip(p.positions, right, strict=True)]


def _line(axis: Any, grouped: dict[int, list[float]], colour: str, label: str, *, band: bool = True) -> None:
    offsets = list(grouped)
    means = [sum(v) / len(v) for v in grouped.values()]
    axis.plot(offsets, means, color=colour, linewidth=1.8 if band else 0.9, label=label)
    if not band:
        return
    low, high = zip(*(bootstrap_interval(v, resamples=500) for v in grouped.values()), strict=True)
    axis.fill_between(offsets, low, high, color=colour, alpha=0.2, linewidth=0)
