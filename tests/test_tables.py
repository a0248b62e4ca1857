"""The tables of a recipe's README say what its study says: each number stands in the JSON beside it."""

import json
from pathlib import Path
from typing import Any

import pytest

RECIPES = Path(__file__).parents[1] / "recipes"
STUDIES = [RECIPES / "when-it-pays" / f"{name}.json" for name in ("persona", "controls", "again", "maze")]


def points(value: float, *, signed: bool = False) -> str:
    return f"{100 * value:{'+' if signed else ''}.1f}".replace("-", "−")


def interval(values: tuple[float, float], *, signed: bool = False) -> str:
    return f"[{', '.join(points(v, signed=signed) for v in values)}]"


def section_of(study: Path) -> str:
    """The part of the README that links to it."""
    sections = (study.parent / "README.md").read_text().split("\n## ")
    (found,) = [s for s in sections if f"]({study.name})" in s]
    return found


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
def test_a_table_has_the_study_s_numbers(path: Path) -> None:
    data: dict[str, Any] = json.loads(path.read_text())
    rows = [line for line in section_of(path).splitlines() if line.startswith("| ")]
    for arm in data["arms"]:
        mine = [row for row in rows if row.split("|")[1].split(",")[0].strip(" *`") == arm["arm"]]
        assert mine, f"{arm['arm']} has no row"
        found = arm["evals"]["hard"]["avg_at_k"]
        assert points(found["mean"]) in mine[0]
        if (gap := found["difference"]) is not None:
            told = f"{points(gap['mean'], signed=True)} {interval(gap['ci95'], signed=True)}"
            told += "" if gap["verdict"] == "inside the noise" else f" {gap['verdict']}"
            assert told in mine[0]
        else:
            assert f"{points(found['mean'])} {interval(found['ci95'])}" in mine[0]
