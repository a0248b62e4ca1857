"""Text that came from elsewhere (prompts, answers, files, other programs' errors), safe to look at."""

import re
from collections.abc import Sequence
from typing import Any

import yaml

_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)
"""What could move the cursor, turn the line around, hide text, or be written nowhere."""


def visible(text: str) -> str:
    """Text that a terminal shows as it is: line ends marked, controls named.

    >>> visible("a\\x1b[2J")
    'a⟨001B⟩[2J'
    """
    return named_controls(text).replace("\n", "⏎\n")


def named_controls(text: str) -> str:
    """The same with line ends as they are."""
    return _CONTROLS.sub(lambda match: f"⟨{ord(match[0]):04X}⟩", text)


def first_line(error: BaseException) -> str:
    """What an exception says, without the lines behind its first; of a silent one its name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def one_line(text: str, most: int = 200) -> str:
    """A short sentence of what somebody else said, controls named, spaces joined.

    >>> one_line("a\\n  b" + "c" * 9, most=6)
    'a bcc…'
    """
    joined = named_controls(" ".join(text[: 10 * most].split()))
    return joined if len(joined) <= most else joined[: most - 1] + "…"


def yaml_text(tree: Any) -> str:
    """YAML in the tree's own order.

    >>> yaml_text({"b": [1], "a": None})
    'b:\\n- 1\\na: null\\n'
    """
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    return str(yaml.dump(tree, Dumper=dumper, sort_keys=False, allow_unicode=True, width=100))


def short(value: Any) -> str:
    """A value as a sentence shows it: sixty characters of its repr."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def shared_start(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Characters, or tokens, that two begin with alike.

    >>> shared_start("12 + 3", "12 - 3")
    3
    """
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
