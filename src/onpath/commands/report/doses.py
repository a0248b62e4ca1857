"""Dose against response on the page, and as one picture: what each arm is worth by a strength."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onpath.commands.picture import picture
from onpath.commands.report import charts
from onpath.commands.report.charts import Chart, Series
from onpath.commands.report.run import read_json, section
from onpath.commands.report.study import comparison, estimate, facts
from onpath.commands.study.doses import counted
from onpath.run.trajectories import Row
from onpath.system.errors import UserError

PICTURE = "doses.png"
_MARKERS = "osD^vP*X<>pd"  # chart.js draws the same ones
_ANOTHER_TEMPERATURE = re.compile(r"_(T[0-9.]+|greedy)$")
"""What a set is called that is asked at another temperature too (eval.also_at)."""
_EXPLAINED = (
    "Means over seeds and problems; bands and bars: 95% intervals. Differences are paired: the same "
    "problems, the same seeds, at the same level. An interval that covers 0 is inside the noise."
)


def gather_doses(directory: Path) -> dict[str, Any]:
    """The page's data.

    Raises:
        UserError: doses.json is damaged.
    """
    data = read_json(directory / "doses.json")
    if missing := {"name", "x", "levels"} - data.keys():
        raise UserError(f"{directory / 'doses.json'}: not a study by levels: it lacks {min(missing)}")
    levels = data["levels"]
    about = levels[0]["study"]
    splits = list(dict.fromkeys(split for level in levels for split in level["study"]["splits"]))
    known = facts({**about, "command": data.get("command")}, levels[0]["environment"], levels[0]["arms"])
    of_levels = {
        "problems": ", ".join(f"{split} {counted(data, 'problems', split)}" for split in splits),
        "samples per problem": ", ".join(dict.fromkeys(str(level["study"]["n"]) for level in levels)),
    }
    per_level = [
        section(
            f"{data['x']} {level['x']:g}",
            [c for s in level["study"]["splits"] for c in comparison({**level, "rows": []}, s)],
            f"All arms at this level. Curves and trajectories: onpath report of {level['directory']}.",
        )
        for level in levels
    ]
    return {
        "kind": "study",
        "title": data["name"],
        "facts": [
            [data["x"], ", ".join(f"{level['x']:g}" for level in levels)],
            *([label, of_levels.get(label, value)] for label, value in known),
        ],
        "tiles": [],
        "notes": [f"{data['x']} {level['x']:g}: {note}" for level in levels for note in level["notes"]],
        "sections": [
            section("Dose against response", [c for s in splits for c in responses(data, s)], _EXPLAINED),
            *per_level,
        ],
        "vocabulary": [],
        "trajectories": [],
    }


def responses(data: Row, split: str) -> list[Chart | None]:
    """Accuracy by level, and the paired difference from the base arm by level."""
    base = data["levels"][0]["study"]["base_arm"]
    means = [_series(data, split, name, None) for name in arms_of(data)]
    apart = [_series(data, split, name, "difference") for name in arms_of(data)]  # the base arm has none
    return [
        charts.lines(f"Accuracy, {split}", means, x=data["x"], unit="%", zero=False),
        charts.lines(f"Paired difference from {base}, {split}", apart, x=data["x"], unit="%"),
    ]


def arms_of(data: Row) -> list[str]:
    """Names, in the study's order."""
    return list(dict.fromkeys(arm["arm"] for level in data["levels"] for arm in level["arms"]))


def points(data: Row, split: str, arm: str, key: str | None) -> list[tuple[float, Row]]:
    """Level and estimate (mean, low, high) of an arm; `key` difference: from the base arm."""
    found = []
    for level in data["levels"]:
        evals: Row = next((a["evals"] for a in level["arms"] if a["arm"] == arm), {})
        held = evals[split]["avg_at_k"] if split in evals else None  # a set may have come later
        value = held if held is None or key is None else held[key]
        if value is not None:
            found.append((level["x"], estimate(value)))
    return found


def price(data: Row, arm: str) -> float | None:
    """Tokens that were generated for an arm, by whoever wrote them, ÷ those of the base arm, at the last
    level; None: one of them has none, or they are not known."""
    counts = {
        arm["arm"]: sum(arm.get(f"tokens_generated{by}") or 0 for by in ("_student", "_teacher", ""))
        for arm in data["levels"][-1]["arms"]
    }
    mine, base = counts.get(arm), counts.get(data["levels"][0]["study"]["base_arm"])
    return mine / base if mine and base else None


def _series(data: Row, split: str, arm: str, key: str | None) -> Series | None:
    found = points(data, split, arm, key)
    if not found:
        return None
    columns = {name: [value[name] for _, value in found] for name in ("mean", "low", "high")}
    return charts.series(
        arm, [x for x, _ in found], columns["mean"], low=columns["low"], high=columns["high"], marks=True
    )


def look(place: int) -> tuple[str, str]:
    """Colour and marker of an arm by its place in the study, in every picture of it: no two of 48 share both,
    no two of 16 a colour.

    >>> look(0), look(16)
    (('#0072b2', 'o'), ('#0072b2', 'v'))
    """
    return charts.COLOURS[place % len(charts.COLOURS)][0], _MARKERS[place % len(_MARKERS)]


def draw_doses(directory: Path, split: str | None = None) -> Path:
    """`doses.png`: the paired difference from the base arm by level, a line per arm; where there is none, the
    accuracies themselves.

    Args:
        split: the evaluation set; None: the last of those that were asked for by name.
    """
    data = read_json(directory / "doses.json")
    about = data["levels"][0]["study"]
    named = [s for s in about["splits"] if not _ANOTHER_TEMPERATURE.search(s)] or about["splits"]
    split = split or named[-1]
    base, levels = about["base_arm"], [level["x"] for level in data["levels"]]
    key = "difference" if any(points(data, split, name, "difference") for name in arms_of(data)) else None
    shown = [name for name in arms_of(data) if points(data, split, name, key)]
    looks = {name: look(i) for i, name in enumerate(arms_of(data))}
    prices = {name: paid for name in shown if (paid := price(data, name))}
    path = directory / PICTURE
    height = max(4.2, 1.2 + 0.28 * len(shown))
    with picture(path, size=(7.2, height)) as (_, (axis,)):
        if key:
            axis.axhline(0, color="0.4", linewidth=1)
        # Arms stand a little beside each other, so that no interval hides another.
        width = levels[-1] - levels[0] or 1.0
        step = min(0.012, 0.1 / max(1, len(shown))) * width
        ends: dict[str, tuple[float, float]] = {}
        for place, name in enumerate(shown):
            found = points(data, split, name, key)
            colour, marker = looks[name]
            x = [level + step * (place - (len(shown) - 1) / 2) for level, _ in found]
            y = [100 * value["mean"] for _, value in found]
            bars = [[100 * abs(value[end] - value["mean"]) for _, value in found] for end in ("low", "high")]
            axis.errorbar(
                x, y, yerr=bars, color=colour, marker=marker, markersize=5, capsize=2, linewidth=1.4,
                elinewidth=0.8, label=name,
            )  # fmt: skip
            ends[name] = (x[-1], y[-1])
        axis.set_xticks(levels, [_level(data, level, base, split) for level in levels])
        axis.set(
            xlabel=f"{data['x']} (below: {base} itself)",
            ylabel=f"points above {base}" if key else "accuracy, %",
        )
        seeds = sorted({len(level["study"]["seeds"]) for level in data["levels"]})
        many = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"{seeds[0]}"
        axis.set_title(
            f"{split}, avg@{counted(data, 'samples', split)}: {many} seed{'s' * (seeds[-1] != 1)}, "
            f"{counted(data, 'problems', split)} problems; bars: 95%{', paired' if key else ''}"
            + (f"; ×: of {base}'s tokens" if prices else ""),
            fontsize=10,
            loc="left",
        )
        axis.margins(y=0.08)
        axis.set_xlim(levels[0] - 0.08 * width, levels[-1] + 0.08 * width)
        costs = {name: f" {paid:.1f}×" for name, paid in prices.items() if name != base}
        _name_ends(axis, ends, looks, costs, height)
        axis.grid(axis="y", alpha=0.3)
    return path


def _name_ends(
    axis: Any,
    ends: Mapping[str, tuple[float, float]],
    looks: Mapping[str, tuple[str, str]],
    costs: Mapping[str, str],
    height: float,
) -> None:
    """Each line is named where it ends, with its marker: with a dozen arms a legend is a riddle."""
    low, high = axis.get_ylim()
    beside, gap = axis.get_yaxis_transform(), (high - low) / (5.3 * height)
    for name, at in zip(ends, _apart([y for _, y in ends.values()], gap), strict=True):
        colour, marker = looks[name]
        axis.annotate(
            "", ends[name], xytext=(1.012, at), textcoords=beside, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.6},
        )  # fmt: skip
        axis.plot(1.02, at, marker, color=colour, markersize=5, transform=beside, clip_on=False)
        axis.annotate(
            name + costs.get(name, ""), (1.02, at), xycoords=beside, xytext=(7, 0),
            textcoords="offset points", color=colour, fontsize=9, va="center", annotation_clip=False,
        )  # fmt: skip


def _level(data: Row, level: float, base: str, split: str) -> str:
    own = [value["mean"] for x, value in points(data, split, base, None) if x == level]
    return "\n".join([f"{level:g}", *(f"{mean:.1%}" for mean in own)])


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """The heights, moved as little as keeps them in order and at least `gap` apart.

    >>> _apart([1.0, 1.5, 9.0], 1.0)
    [0.75, 1.75, 9.0]
    """
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    groups: list[list[float]] = []
    for i in order:
        groups.append([heights[i]])
        # Neighbours that touch share one centre.
        while len(groups) > 1 and _reach(groups[-2], gap)[1] + gap > _reach(groups[-1], gap)[0]:
            last = groups.pop()
            groups[-1] += last
    placed = [_reach(group, gap)[0] + gap * k for group in groups for k in range(len(group))]
    return [y for _, y in sorted(zip(order, placed, strict=True))]


def _reach(group: Sequence[float], gap: float) -> tuple[float, float]:
    """Lowest and highest place of heights around their mean."""
    middle, half = sum(group) / len(group), gap * (len(group) - 1) / 2
    return middle - half, middle + half
