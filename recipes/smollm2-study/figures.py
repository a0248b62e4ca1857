"""The papers' figures on this pair, as Markdown, from what the probes wrote.

python recipes/smollm2-study/figures.py runs/smollm2-study-topd/probes
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onpath.commands.probes.separation import correlations

LOUD, QUIET = 0.1, 0.5
"""Of each rollout's tokens by reverse KL: the loudest tenth, the lower half."""
EARLY, LATE = "up to it", "behind it"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def ranked(places: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """With the group of each token by its loss among those of its rollout."""
    found = []
    for prompt in dict.fromkeys(p["prompt_id"] for p in places):
        mine = sorted((p for p in places if p["prompt_id"] == prompt), key=lambda p: -p["reverse_kl"])
        loud, quiet = max(1, round(LOUD * len(mine))), round(QUIET * len(mine))
        groups = ["loud"] * loud + ["between"] * (len(mine) - loud - quiet) + ["quiet"] * quiet
        found += [{**p, "group": g} for p, g in zip(mine, groups, strict=True)]
    return found


def row(name: str, places: Sequence[dict[str, Any]]) -> str:
    d = np.array([p["distance"] for p in places])
    kl = np.mean([p["reverse_kl"] for p in places])
    zero, labels = np.mean(d <= 1e-6), Counter(p["label"] for p in places)
    kinds = ", ".join(f"{k} {n / len(places):.0%}" for k, n in labels.most_common())
    return (
        f"| {name} | {len(places)} | {kl:.3f} | {d.mean():.3f} | {np.median(d):.3f} | {zero:.0%} | {kinds} |"
    )


def near_futures(directory: Path) -> Iterator[str]:
    places = ranked(lines(directory / "divergence.jsonl"))
    loud, quiet = ([p for p in places if p["group"] == g] for g in ("loud", "quiet"))
    yield "| tokens | n | reverse KL, nats | D, mean | D, median | D = 0 | what they are |"
    yield "|---|---|---|---|---|---|---|"
    for name, mine in (("loudest tenth", loud), ("all", places), ("quiet half", quiet)):
        yield row(name, mine)
    floor = float(np.quantile([p["distance"] for p in quiet], 0.75))
    low = [p for p in loud if p["distance"] <= floor]
    yield ""
    yield f"Loud tokens with D up to the quiet ones' upper quartile ({floor:.3f}): {len(low)} of {len(loud)}"
    kinds = Counter(p["label"] for p in low)
    yield f"What those are: {', '.join(f'{k} {n}' for k, n in kinds.most_common())}"
    for name, mine in (("all tokens", places), ("loud ones", loud)):
        c = correlations([p["reverse_kl"] for p in mine], [p["distance"] for p in mine])
        told = ("–" if c[kind] is None else f"{c[kind]:.3f}" for kind in ("pearson", "spearman"))
        yield f"Loss against D, {name}: Pearson and Spearman {', '.join(told)}, n {c['n']}"
    summary = json.loads((directory / "divergence.json").read_text())
    yield ""
    yield "| rule | flagged | of them errors | of all errors | habits among the flagged |"
    yield "|---|---|---|---|---|"
    for d in summary["detection_of_errors"]:
        low_ci, high_ci = d["precision_ci95"]
        yield (
            f"| {d['rule']} | {d['flagged']} | {d['precision']:.0%} [{low_ci:.0%}, {high_ci:.0%}] "
            f"| {d['recall']:.0%} | {d['habits']:.0%} |"
        )


def recoverability(directory: Path) -> Iterator[str]:
    """Success of continuations by where their prefix ends, against the first wrong token."""
    counts: dict[str, list[tuple[int, int, int]]] = {"right": [], EARLY: [], LATE: []}
    mass: dict[str, list[float]] = {"right": [], EARLY: [], LATE: []}
    for p in lines(directory / "prefix_failure.jsonl"):
        error = p["first_error"]
        for t, s, who in zip(p["positions"], p["student"], p["teacher"], strict=True):
            where = "right" if p["right"] else EARLY if error is None or t <= error else LATE
            counts[where].append((s, who, p["trials"]))
        for t, m in enumerate(p["onset_mass"]):
            mass["right" if p["right"] else EARLY if error is None or t <= error else LATE].append(m)
    yield "| prefix of a | prefixes | student goes on right | teacher goes on right | epistemic mass |"
    yield "|---|---|---|---|---|"
    names = {
        "right": "right rollout",
        EARLY: "wrong one, up to the first wrong step",
        LATE: "wrong one, behind it",
    }
    for where, name in names.items():
        rows = counts[where]
        trials = sum(n for *_, n in rows)
        student, teacher = (sum(r[i] for r in rows) / max(1, trials) for i in (0, 1))
        share = f"{1000 * np.mean(mass[where]):.2f}‰" if mass[where] else "–"
        yield f"| {name} | {len(rows)} | {student:.0%} | {teacher:.0%} | {share} |"


def main(directory: str) -> None:
    for part in (near_futures, recoverability):
        print("\n".join(part(Path(directory))), end="\n\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
