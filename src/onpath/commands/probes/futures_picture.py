"""The picture of near-future divergence: by group, against the loss, and by what the tokens are in truth."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onpath.commands.picture import picture
from onpath.commands.probes.place import Place

_COLOURS = {"high": "#D55E00", "random": "0.45", "low": "#0072B2"}
_LABELS = {"error": "#D55E00", "habit": "#0072B2", "right": "#009E73", "choice": "#CC79A7"}


def draw(found: Sequence[Place], summary: Mapping[str, Any], path: Path) -> None:
    """Distributions on the left, distance against loss on the right."""
    with picture(path, size=(10, 4), columns=2) as (_, (left, right)):
        for name, colour in _COLOURS.items():
            _steps(
                left,
                [p.distance for p in found if name in p.groups],
                colour,
                f"{name} loss" if name != "random" else name,
            )
        noise = [p.noise for p in found if p.noise is not None and "high" in p.groups]
        _steps(left, noise, "black", "teacher against teacher", linestyle=":")
        floor, quartile = summary["low_divergence_threshold"], "upper quartile of low loss"
        left.axvline(floor, color="0.6", linewidth=0.8, label=quartile)
        left.set(
            xlabel="D, distance of the near futures", ylabel="share of positions at most D", ylim=(0, 1.02)
        )
        left.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderpad=0, fontsize=8)
        _scatter(right, found)


def _steps(axis: Any, values: Sequence[float], colour: str, label: str, **style: Any) -> None:
    if values:
        heights = np.arange(1, len(values) + 1) / len(values)
        axis.step(
            sorted(values), heights, where="post", color=colour, label=f"{label} (n = {len(values)})", **style
        )


def _scatter(axis: Any, found: Sequence[Place]) -> None:
    known = [p for p in found if p.label in _LABELS]
    kinds = [(name, [p for p in known if p.label == name], colour) for name, colour in _LABELS.items()]
    if not known:
        kinds = [(f"{n} loss", [p for p in found if n in p.groups], c) for n, c in _COLOURS.items()]
    for name, rows, colour in kinds:
        if rows:
            x, y = [max(p.reverse_kl, 1e-6) for p in rows], [p.distance for p in rows]
            axis.scatter(x, y, s=5, alpha=0.4, color=colour, linewidths=0, label=f"{name} (n = {len(rows)})")
    axis.set(xscale="log", xlabel="reverse KL of the token, nats", ylabel="D")
    axis.legend(frameon=False, loc="upper left", markerscale=3)
