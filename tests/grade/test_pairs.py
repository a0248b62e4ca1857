"""Every row of pairs.jsonl: what is right, by which rule; and the page that shows them."""

import importlib.util
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from onpath.grade.math import MathGrader
from onpath.grade.rules import RULES

ROOT = Path(__file__).parents[2]
PAIRS = [json.loads(line) for line in Path(__file__).with_name("pairs.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def maths() -> Iterator[MathGrader]:
    with MathGrader() as grader:
        yield grader


@pytest.mark.parametrize("rule", RULES)
def test_pairs(maths: MathGrader, rule: str) -> None:
    rows = [row for row in PAIRS if row["rule"] == rule]
    assert rows, f"rule {rule!r} has no case"
    wrong = [row for row in rows if maths.grade(row["text"], row["reference"]).correct != row["right"]]
    assert not wrong, "\n".join(map(str, wrong))


def test_a_reference_is_right_against_its_own_box(maths: MathGrader) -> None:
    references = dict.fromkeys(row["reference"] for row in PAIRS if row["reference"])
    wrong = [r for r in references if not maths.grade(maths.stated(r), r).correct]
    assert not wrong, wrong


@pytest.mark.parametrize("length", [900, 2000, 20_000])
def test_long_references_are_right_against_their_own_box(maths: MathGrader, length: int) -> None:
    reference = ("x + " * length)[:length] + "1"
    assert maths.grade(maths.stated(reference), reference).correct
    assert not maths.grade(maths.stated(reference + "1"), reference).correct


def test_the_table_is_large_and_says_each_thing_once() -> None:
    assert len(PAIRS) >= 150
    assert {row["rule"] for row in PAIRS} == set(RULES)
    twice = [pair for pair, n in Counter((r["text"], r["reference"]) for r in PAIRS).items() if n > 1]
    assert not twice


def test_the_page_shows_the_table() -> None:
    spec = importlib.util.spec_from_file_location("make_grading", ROOT / "docs" / "make_grading.py")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "grading.md").read_text(encoding="utf-8") == module.page()


def test_the_rules_load_without_onpath() -> None:
    """The grading process runs them by path, beside nothing else."""
    source = (ROOT / "src" / "onpath" / "grade" / "rules.py").read_text()
    imported = {line.split()[1] for line in source.splitlines() if line.startswith(("import ", "from "))}
    assert imported <= set(sys.stdlib_module_names)
