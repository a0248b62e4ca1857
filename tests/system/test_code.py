"""What of a file of one's own counts as the object that a config names."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from onpath.system import code

TEXT = """
RATE = 2
NOTES = []

def twice(x):
    return RATE * x

def unused(x):
    return x

class Base:
    def go(self, x):
        return twice(x)

class Mine(Base):
    def more(self, x):
        return self.go(x)

def grade(text, answer):
    return text == answer

def graded(text, answer, *, strict):
    return grade(text, answer) and strict
"""


def digest(directory: Path, text: str, name: str = "Mine", *, wrap: Any = None) -> str | None:
    """As another process that loads the file would have it."""
    path = directory / "mine.py"
    path.write_text(text)
    for label in [label for label in sys.modules if label.startswith("onpath_own_mine")]:
        del sys.modules[label]
    spec = f"{path}:{name}"
    code._loaded.pop(spec, None)
    with code.allowed():
        found = code.load(spec, key="method.name")
    if wrap is not None:
        code.register(spec, wrap(found))
    return code.digest(spec)


@pytest.mark.parametrize(
    ("old", "new", "name", "same"),
    [
        ("return self.go(x)", "return self.go(x + 1)", "Mine", False),
        ("return twice(x)", "return twice(x) + 1", "Mine", False),  # its base
        ("return RATE * x", "return RATE + x", "Mine", False),  # what its base calls
        ("RATE = 2", "RATE = 3", "Mine", False),
        ("    return x\n", "    return -x\n", "Mine", True),  # nothing that it uses
        ("NOTES = []", "NOTES = [1]", "Mine", True),
        ("RATE = 2", "RATE = 3", "grade", True),
        ("text == answer", "text in answer", "grade", False),
    ],
)
def test_it_is_its_source_and_what_that_names(
    old: str, new: str, name: str, same: bool, tmp_path: Path
) -> None:
    assert TEXT.count(old) >= 1
    before, after = digest(tmp_path, TEXT, name), digest(tmp_path, TEXT.replace(old, new), name)
    assert before is not None
    assert (before == after) is same


@pytest.mark.parametrize(
    "wrap", [lambda cls: cls(), lambda cls: cls().more, lambda cls: partial(cls.more, None)]
)
def test_an_instance_a_bound_method_and_a_partial_are_what_they_are_of(wrap: Any, tmp_path: Path) -> None:
    found = [digest(tmp_path, t, wrap=wrap) for t in (TEXT, TEXT.replace("self.go(x)", "self.go(-x)"))]
    assert None not in found
    assert found[0] != found[1]


def test_lambdas_of_other_lines_are_others() -> None:
    one = lambda text: text == "1"  # noqa: E731
    two = lambda text: text == "2"  # noqa: E731
    names = code.register_all({"one": one, "two": two})
    assert len({code.digest(name) for name in names.values()}) == 2


def test_what_has_no_source_has_none() -> None:
    scope: dict[str, Any] = {}
    exec("def grade(text, answer): return True", scope)
    for value in (scope["grade"], len, partial(len)):
        assert code.digest(code.register(code.name_of(value), value)) is None
