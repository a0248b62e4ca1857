"""Two responses as a diff of tokens, for the page and for the terminal. Plain Python."""

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

Span = tuple[str, int, int, int, int]
"""(`equal` | `replace` | `delete` | `insert`, first and end in y, first and end in z)."""


def known_tokens(rows: Iterable[Mapping[str, Any]]) -> dict[int, str]:
    """Token id → display string, from the responses that were stored with both."""
    known: dict[int, str] = {}
    for row in rows:
        known.update(zip(row["response"], row["tokens"], strict=True))
    return known


def sides(row: Mapping[str, Any], known: Mapping[int, str]) -> tuple[list[str], list[str]]:
    """Attempt y and rewrite z in pieces alike: tokens, or both in words where a token of y is unknown."""
    if row.get("origin_tokens"):
        return row["origin_tokens"], row["tokens"]
    ids = row.get("origin_response") or []
    if all(i in known for i in ids):
        return [known[i] for i in ids], row["tokens"]
    return words(row.get("origin_text") or ""), words(row.get("response_text") or "")


def words(text: str) -> list[str]:
    """Pieces that concatenate to the text.

    >>> words("so it is  12.")
    ['so', ' it', ' is', '  12.']
    """
    return re.findall(r"\s*\S+|\s+$", text)


def diff(y: Sequence[str], z: Sequence[str]) -> list[Span]:
    """What turns y into z.

    >>> diff(["1", "+", "2"], ["1", "-", "2"])
    [('equal', 0, 1, 0, 1), ('replace', 1, 2, 1, 2), ('equal', 2, 3, 2, 3)]
    """
    return [
        (tag, a, b, c, d) for tag, a, b, c, d in SequenceMatcher(None, y, z, autojunk=False).get_opcodes()
    ]


def was_changed(row: Mapping[str, Any]) -> bool:
    """Whether the response is not the student's own."""
    return bool(row.get("origin_response")) and row["origin_response"] != row["response"]


def cell(row: Mapping[str, Any]) -> str:
    """Outcome: `right`, `wrong`, `unknown`, or with a judged rewrite `wrong_to_right` and the like."""
    names = {True: "right", False: "wrong", None: "unknown"}
    after = row["detail"].get("right") if was_changed(row) else None
    before = names[row.get("correct")]
    return before if after is None or before == "unknown" else f"{before}_to_{names[after]}"
