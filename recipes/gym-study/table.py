"""Prints the Markdown table of a study for the READMEs: `python table.py STUDY.json [ARM …]`."""

import json
import sys
from statistics import mean
from typing import Any

HEADER = (
    "| arm | lr | test avg@8 | test pass@8 | hard avg@8 | hard avg@8 − OPD | hard pass@8 | steps "
    "| tokens written by student / teacher, k | s |"
)


def percent(estimate: dict[str, Any], sign: str = "") -> str:
    low, high = (f"{100 * x:{sign}.1f}" for x in estimate["ci95"])
    return f"{100 * estimate['mean']:{sign}.1f} [{low}, {high}]"


def row(arm: dict[str, Any], runs: list[dict[str, Any]]) -> str:
    test, hard = (arm["evals"][split] for split in ("test", "hard"))
    difference, shown = hard["avg_at_k"].get("difference"), ""
    if difference:
        shown = percent(difference, "+")
        if difference["verdict"] != "inside the noise":
            shown += f" **{difference['verdict']}**"
    used = [mean(run.get(k) or 0 for run in runs) for k in (
        "tokens_generated_student", "tokens_generated_teacher", "wall_seconds",
    )]  # fmt: skip
    cells = (
        f"`{arm['arm']}`", "" if arm["lr"] is None else f"{arm['lr']:g}",
        percent(test["avg_at_k"]), f"{100 * test['pass_at_k']['mean']:.1f}",
        percent(hard["avg_at_k"]), shown, percent(hard["pass_at_k"]), str(arm["steps"] or ""),
        f"{used[0] / 1e3:.0f} / {used[1] / 1e3:.0f}", f"{used[2]:.0f}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main(path: str, *arms: str) -> None:
    with open(path, encoding="utf-8") as file:
        study = json.load(file)
    found = {arm["arm"]: arm for arm in study["arms"]}
    print(HEADER)
    print("|" + "---|" * HEADER.count(" | ") + "---|")
    for name in arms or found:
        print(row(found[name], [run for run in study["rows"] if run["arm"] == name]))


if __name__ == "__main__":
    main(*sys.argv[1:])
