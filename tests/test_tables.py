"""The tables of a recipe's README say what its study says: each number stands in the JSON beside it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

RECIPES = Path(__file__).parents[1] / "recipes"
STUDIES = [RECIPES / "when-it-pays" / f"{name}.json" for name in ("persona", "controls", "signals", "maze")]
DOSES = [RECIPES / "when-it-pays" / f"{name}.json" for name in ("again", "clip")]
STRENGTHS = [RECIPES / "when-it-pays" / f"{name}.json" for name in ("spoil", "lost", "late", "surface")]
SMOLLM2 = [
    RECIPES / "smollm2-study" / f"{name}.json" for name in ("longer", "rates", "hard", "relay", "topd_forks")
]
FORKS = [RECIPES / "topd" / f"{name}.json" for name in ("forks", "forks_late")]


def points(value: float, *, signed: bool = False) -> str:
    return f"{100 * value:{'+' if signed else ''}.1f}".replace("-", "−")


def interval(values: tuple[float, float], *, signed: bool = False) -> str:
    return f"[{', '.join(points(v, signed=signed) for v in values)}]"


def told(found: dict[str, Any]) -> str:
    """A cell: points from the base arm and what holds, of the base arm itself its accuracy."""
    if (gap := found["difference"]) is None:
        return f"{points(found['mean'])} {interval(found['ci95'])}"
    verdict = "" if gap["verdict"] == "inside the noise" else f" {gap['verdict']}"
    return f"{points(gap['mean'], signed=True)} {interval(gap['ci95'], signed=True)}{verdict}"


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
        assert told(found) in mine[0]


@pytest.mark.parametrize("path", DOSES, ids=lambda p: p.stem)
def test_a_table_by_levels_has_the_study_s_numbers(path: Path) -> None:
    data = json.loads(path.read_text())
    levels: list[dict[str, Any]] = data["levels"]
    rows = {
        cells[0]: cells[1:]
        for line in section_of(path).splitlines()
        if line.startswith("| ")
        for cells in [[cell.strip() for cell in line.split("|")[1:-1]]]
    }
    assert rows["arm"][: len(levels)] == [f"{data['x']} {level['x']:g}" for level in levels]
    for place, level in enumerate(levels):
        for arm in level["arms"]:
            assert rows[arm["arm"]][place] == told(arm["evals"]["hard"]["avg_at_k"])
    for arm in levels[-1]["arms"]:
        *_, cooler, greedy, tokens = rows[arm["arm"]]
        assert [cooler, greedy] == [told(arm["evals"][s]["avg_at_k"]) for s in ("hard_T0.6", "hard_greedy")]
        made = arm["tokens_generated_student"] + arm["tokens_generated_teacher"]
        assert tokens == f"{made / 1000:.0f}"


@pytest.mark.parametrize("path", STRENGTHS, ids=lambda p: p.stem)
def test_a_strength_has_the_numbers_beside_it(path: Path) -> None:
    """To a rounding: these files hold means, intervals and differences, of three or four digits."""
    data = json.loads(path.read_text())
    rows = {cells[0]: cells[1:] for cells in cells_of(section_of(path))}
    assert rows["arm"][:3] == [f"{data['x']} {level['x']:g}" for level in data["levels"]]
    for place, level in enumerate(data["levels"]):
        assert len(level["arms"]) in (15, 17)
        for arm in level["arms"]:
            found = arm["evals"]["hard"]["avg_at_k"]
            told = found if found["difference"] is None else found["difference"]
            wanted = [100 * value for value in (told["mean"], *told["ci95"])]
            shown = re.findall(r"[-+]?\d+\.\d", rows[arm["arm"]][place].replace("−", "-"))
            assert [float(number) for number in shown] == pytest.approx(wanted, abs=0.0501)
            if told is not found and "verdict" in told:
                said = rows[arm["arm"]][place].rpartition("]")[2].strip()
                assert said == (told["verdict"] if told["verdict"] in ("higher", "lower") else "")


def cells_of(section: str) -> list[list[str]]:
    """Rows of its tables."""
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


@pytest.mark.parametrize("path", SMOLLM2, ids=lambda p: p.stem)
def test_a_table_at_three_temperatures_has_the_study_s_numbers(path: Path) -> None:
    data = json.loads(path.read_text())
    rows: dict[str, list[str]] = {}
    for first, *others in cells_of(section_of(path)):
        rows.setdefault(first.split(",")[0], others)
    for arm in data["arms"]:
        cells = rows[arm["arm"]]
        split = next(iter(arm["evals"]))
        for at, asked in ((0, ""), (3, "_T0.6"), (5, "_greedy")):
            found = arm["evals"][split + asked]["avg_at_k"]
            assert cells[at] in (points(found["mean"]), f"{points(found['mean'])} {interval(found['ci95'])}")
            if (gap := found["difference"]) is not None:
                short = f"{points(gap['mean'], signed=True)} {gap['verdict']}"
                assert cells[at + 1] in (told(found), short)
        assert cells[2] == points(arm["evals"][split]["pass_at_k"]["mean"])
    tables = [cells_of(part) for part in section_of(path).split("\n\n") if part.startswith("| rate")]
    for row in data.get("tuning", []):
        for tried in row["grid"]:
            ((head, *lines),) = [rows for rows in tables if row["arm"] in map(arm_of, rows[0])]
            (line,) = [cells for cells in lines if same_rate(cells[0], tried["lr"])]
            mark = "**" if tried["lr"] == row["chosen"] else ""
            place = [arm_of(cell) for cell in head].index(row["arm"])
            assert line[place] == f"{mark}{points(tried['avg_at_k'])}{mark}"


def arm_of(cell: str) -> str:
    """Without what is said of it."""
    return cell.split(",")[0]


@pytest.mark.parametrize("path", FORKS, ids=lambda p: p.stem)
def test_a_table_of_forks_has_the_study_s_numbers(path: Path) -> None:
    tables = section_of(path).split(f"]({path.name})")[1].split("\n\n")
    rows = {
        first.split(",")[0]: others for first, *others in cells_of(next(t for t in tables if t[:2] == "| "))
    }
    for arm in json.loads(path.read_text())["arms"]:
        mean, gap, cooler, greedy, tokens = rows[arm["arm"]]
        found = arm["evals"]["hard"]["avg_at_k"]
        assert mean.strip("*") in (
            points(found["mean"]),
            f"{points(found['mean'])} {interval(found['ci95'])}",
        )
        assert tokens == (f"{arm['tokens_generated_teacher']:,.0f}" if gap else "")
        if not gap:
            continue
        assert gap.strip("*") == told(found)
        for cell, asked in ((cooler, "hard_T0.6"), (greedy, "hard_greedy")):
            other = arm["evals"][asked]["avg_at_k"]["difference"]
            verdict = "" if other["verdict"] == "inside the noise" else f" {other['verdict']}"
            assert cell == points(other["mean"], signed=True) + verdict


def same_rate(cell: str, rate: float) -> bool:
    return bool(re.fullmatch(r"\de-\d", cell)) and float(cell) == rate


@pytest.mark.parametrize("name", ["controls", "maze"])
def test_kinds_of_first_errors_are_the_study_s(name: str) -> None:
    """A column per arm; every kind that any arm of the study has is a row, and `any` is their sum."""
    path = RECIPES / "when-it-pays" / f"{name}.json"
    arms = {arm["arm"]: arm["evals"]["hard"] for arm in json.loads(path.read_text())["arms"]}
    table = section_of(path).split("| first error |")
    assert len(table) == 2, "one table"
    head, _, *lines = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in f"| first error |{table[1]}".split("\n\n")[0].splitlines()
    ]
    rows = {line[0]: line[1:] for line in lines}
    kinds = {kind for held in arms.values() for kind in held["first_errors"]}
    assert set(rows) == {*kinds, "any"}
    assert [arm.removeprefix("topd_") for arm in head[1:]] == ["opd", "relay", "branch", "bridge", "spliced"]
    for place, arm in enumerate(head[1:]):
        held = arms[arm]["first_errors"]
        assert {kind: rows[kind][place] for kind in kinds} == {k: points(held.get(k, 0.0)) for k in kinds}
        assert rows["any"][place] == points(sum(held.values()))
        assert sum(held.values()) == pytest.approx(1 - arms[arm]["avg_at_k"]["mean"])
    if name == "maze":
        assert f": {points(arms['untouched']['first_errors']['wrong door'])}% of the untouched" in table[0]


def test_the_own_method_s_table_has_its_study_s_numbers() -> None:
    path = RECIPES / "own-method" / "study.json"
    rows = [cells[1:] for cells in cells_of((path.parent / "README.md").read_text())[1:]]
    arms = {arm["arm"]: arm for arm in json.loads(path.read_text())["arms"]}
    named = ("untouched", "opd", "longer", "random_half", "shorter")
    for row, arm in zip(rows, [arms[name] for name in named], strict=True):
        assert row[0] == f"{arm['updated_tokens']:,.0f}"
        for place, split in ((1, "test"), (3, "hard")):
            found = arm["evals"][split]["avg_at_k"]
            assert row[place] == f"{points(found['mean'])}%"
            if gap := found["difference"]:
                assert row[place + 1] == (
                    f"{points(gap['mean'], signed=True)} {interval(gap['ci95'], signed=True)}"
                )
                assert gap["verdict"] == "lower"
