"""The prefix-failure picture: recoverability by position, and the teacher's two modes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onpath.commands.picture import picture
from onpath.commands.probes.prefix_records import Probed, by_offset, clearest, rates
from onpath.evaluate.stats import bootstrap_interval

_STUDENT, _TEACHER, _ONSET, _OWN = (
    "#0072B2",
    "#D55E00",
    "#CC79A7",
    "#009E73",
)  # told apart by all kinds of eyes
_VISIBLE = 0.01


def draw(found: Sequence[Probed], path: Path) -> None:
    """Two panels over tokens from the first error (where errors are known), else over the response."""
    shown, known = clearest(found)
    with picture(path, size=(7.5, 6), rows=2) as (figure, (upper, lower)):
        for name, colour in (("student", _STUDENT), ("teacher", _TEACHER)):
            _line(upper, by_offset(shown, rates(name)), colour, f"{name} goes on")
        upper.set(ylabel="share of continuations\nthat end right", ylim=(-0.02, 1.02))
        own = by_offset(shown, lambda p: list(enumerate(p.token_probability)))
        _line(lower, own, _OWN, "goes on as the student did (mean)", band=False)
        # A mean would hide that the teacher either opens a correction or does not think of it.
        onsets = by_offset(
            shown, lambda p: [(t, m) for t, m in enumerate(p.onset_mass) if m > _VISIBLE], few=1
        )
        dots = [(offset, mass) for offset, masses in onsets.items() for mass in masses]
        seen = "each rollout" if dots else f"never above {_VISIBLE:.0%}"
        lower.plot(
            *zip(*dots, strict=True) if dots else ([], []),
            color=_ONSET, marker="o", markersize=4, linestyle="", alpha=0.8,
            label=f"opens a correction ({seen})",
        )  # fmt: skip
        where = "tokens from the start of the first wrong step" if known else "tokens of the response"
        lower.set(ylabel="teacher's probability", xlabel=where, ylim=(-0.02, 1.02))
        kind = "rollouts with a known first error" if known else "rollouts"
        figure.suptitle(
            f"{len(shown)} {kind}, {shown[0].trials} continuations at each position; bands: 95%", fontsize=10
        )
        for axis in (upper, lower):
            axis.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderpad=0)
            if known:
                axis.axvline(0, color="0.6", linewidth=0.8, linestyle=":")


def _line(axis: Any, grouped: dict[int, list[float]], colour: str, label: str, *, band: bool = True) -> None:
    offsets = list(grouped)
    means = [sum(v) / len(v) for v in grouped.values()]
    axis.plot(offsets, means, color=colour, linewidth=1.8 if band else 0.9, label=label)
    if not band:
        return
    low, high = zip(*(bootstrap_interval(v, resamples=500) for v in grouped.values()), strict=True)
    axis.fill_between(offsets, low, high, color=colour, alpha=0.2, linewidth=0)
