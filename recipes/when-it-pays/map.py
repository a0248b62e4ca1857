"""The map as one picture, from the JSON beside it: what each correction is worth by each strength.

python recipes/when-it-pays/map.py [OUT.png]
"""

import json
import sys
from pathlib import Path
from typing import Any

from onpath.commands.picture import picture
from onpath.commands.report.doses import look, points, price

HERE = Path(__file__).resolve().parent
STRENGTHS = {
    "spoil": "spoil: rollouts with\nan error that stays",
    "lost": "lost: problems whose teacher\nis lost behind an error",
    "late": "late: skills that come\nbehind the first step alone",
    "surface": "surface: the student's\nhabits (plain gym)",
    "again": "again: problems on which\nthe student errs again",
}
ARMS = {
    "trd_reverse_kl": "TRD, reverse KL",
    "teacher_reverse_kl": "teacher's own samples, reverse KL",
    "opd_sharpened": "OPD, sharpened teacher",
    "relay": "relay",
    "bridge": "bridge",
    "branch": "branch",
    "topd_spliced": "TOPD, spliced windows",
    "truncate": "truncate (told the error)",
    "topd": "TOPD by the letter",
    "relay_own_token": "control: relay with the student's token",
}
_EXPLAINED = "`hard`, T = 1, five seeds; bars: 95%, paired\nbelow each level: OPD itself; ×: of OPD's tokens"
_BESIDE = 0.016  # of a panel's width, from one arm to the next: no interval hides another


def draw(out: Path) -> None:
    """A panel for each strength; the levels of one panel share its world, all share the scale."""
    read = {name: json.loads((HERE / f"{name}.json").read_text(encoding="utf-8")) for name in STRENGTHS}
    with picture(out, size=(10.4, 7.4), rows=2, columns=3, one_x=False) as (_, (*panels, key)):
        drawn: dict[str, Any] = {}
        for panel, (name, data) in zip(panels, read.items(), strict=True):
            levels = [level["x"] for level in data["levels"]]
            width = levels[-1] - levels[0]
            panel.axhline(0, color="0.4", linewidth=1)
            for place, arm in enumerate(ARMS):
                found = points(data, "hard", arm, "difference")
                if not found:
                    continue
                colour, marker = look(place)
                x = [level + _BESIDE * width * (place - len(ARMS) / 2) for level, _ in found]
                mean = [100 * value["mean"] for _, value in found]
                ends = [[100 * abs(v[end] - v["mean"]) for _, v in found] for end in ("low", "high")]
                drawn[arm] = panel.errorbar(
                    x, mean, yerr=ends, color=colour, marker=marker, markersize=4, capsize=1.5,
                    linewidth=1.2, elinewidth=0.7,
                )  # fmt: skip
            own = {x: f"{value['mean']:.0%}" for x, value in points(data, "hard", "opd", None)}
            panel.set_xticks(levels, [f"{level:g}\n{own[level]}" for level in levels])
            panel.set(ylim=(-19, 37), title=STRENGTHS[name])
            panel.title.set_fontsize(11)
            panel.grid(axis="y", alpha=0.3)
        for panel in (panels[0], panels[3]):
            panel.set_ylabel("points above OPD")
        labels = [ARMS[arm] + _paid(read, arm) for arm in drawn]
        key.axis("off")
        key.legend(
            list(drawn.values()),
            labels,
            loc="center left",
            frameon=False,
            fontsize=9,
            title=_EXPLAINED,
            title_fontsize=9,
        )


def _paid(read: dict[str, Any], arm: str) -> str:
    """Its generated tokens ÷ OPD's, where they are known, over the strengths."""
    known = [paid for data in read.values() if (paid := price(data, arm))]
    if not known:
        return ""
    low, high = f"{min(known):.1f}", f"{max(known):.1f}"
    return f", {low}×" if low == high else f", {low} to {high}×"


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if sys.argv[1:] else HERE / "map.png")
