"""Writes docs/grading.md from the rules of the maths grader and tests/grade/pairs.jsonl; `--check` fails if
the page is out of date."""

import json
import sys
from pathlib import Path
from typing import Any

from onpath.grade.rules import RULES

PAGE = Path(__file__).with_name("grading.md")
PAIRS = Path(__file__).parents[1] / "tests" / "grade" / "pairs.jsonl"
INTRODUCTION = """# The maths grader

`eval.grader: math` compares the answer of a text with a reference. math-verify reads the maths; what it
cannot be told stands in a few named rules around it, `src/onpath/grade/rules.py`. In doubt an answer is
wrong: a wrong one that passes costs more than a right one that does not.

`onpath doctor` states each reference of your data in a box, and says which are then not right.

The tables are made from `tests/grade/pairs.jsonl` by `docs/make_grading.py`; a test reads every row.
"""


def pairs() -> list[dict[str, Any]]:
    """The rows of the table."""
    return [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()]


def page() -> str:
    """The whole page."""
    rows, parts = pairs(), [INTRODUCTION]
    for name, says in RULES.items():
        parts.append(f"## {name.capitalize()}\n\n{says}\n\n| text | reference | right |\n|---|---|---|")
        parts += [
            f"| {_code(row['text'])} | {_code(row['reference'])} | {'yes' if row['right'] else 'no'} |"
            for row in rows
            if row["rule"] == name
        ]
        parts[-1] += "\n"
    return "\n".join(parts)


def _code(text: str) -> str:
    """As code in a cell: invisible characters spelled, bars and line ends escaped."""
    shown = "".join(c if c.isprintable() or c == "\n" else f"\\u{ord(c):04x}" for c in text)
    shown = shown.replace("\n", "⏎").replace("|", "\\|")
    return f"`{shown}`" if shown else "(nothing)"


if __name__ == "__main__":
    text = page()
    if "--check" in sys.argv[1:]:
        if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
            sys.exit("docs/grading.md is out of date: run make docs")
    else:
        PAGE.write_text(text, encoding="utf-8")
