"""`code`: the answer's program, against tests, in a process of its own that can do no harm (docs/code.md)."""

import os
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import zip_longest
from threading import Lock
from typing import Any

from onpath.data.rows import unlisted
from onpath.data.thinking import answer_part
from onpath.grade import sandbox
from onpath.grade.base import Grader, Verdict
from onpath.grade.code_source import PythonTests
from onpath.grade.sandbox import Limits, Outcome
from onpath.records import Prompt
from onpath.system.errors import UserError
from onpath.system.reading import parse_json
from onpath.system.text import one_line

FORMS = (
    'Python with asserts, {"test": …, "entry_point": …, "prompt": …} as HumanEval has it, or '
    '{"inputs": […], "outputs": […]} for standard input and output, with "fn_name" for calls'
)
"""What tests look like."""
_PYTHON = ("python", "py", "python3")
_FENCE = re.compile(r"[ \t]*+(?:(?:[-*+]|\d{1,9}[.)])[ \t]++)*+(`{3,}|~{3,})[ \t]*(\w*)")
"""Also where it begins an item of a list."""
_LINE = re.compile(r"[^{0}]+(?:\r\n|[{0}])?|\r\n|[{0}]".format(r"\n\r\v\f\x1c-\x1e\x85\u2028\u2029"))
"""As `str.splitlines` has them; not empty."""
_FUTURE = re.compile(r"^from[ \t]+__future__[ \t]+import[ \t]+(?:\([^)]*\)|[^\n]*)\n?", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class CodeTests:
    """The tests of one problem, read from its `answer`.

    >>> CodeTests.of('{"inputs": ["1 2"], "outputs": ["3"]}').pairs
    (('1 2', '3'),)
    """

    pairs: tuple[tuple[str, str], ...] = ()
    """(standard input, standard output) of a script; none: function tests."""
    function: Mapping[str, Any] = field(default_factory=dict)
    """Function tests as `code_worker.judge` takes them."""
    entry_point: str = ""
    """The function that the tests call, where they say so."""
    stub: str = ""
    """What the prompt asks to complete; empty: it asks for a whole program."""

    @classmethod
    def of(cls, answer: str) -> "CodeTests":
        """Reads them.

        Raises:
            UserError: they have none of `FORMS`.
        """
        given = unlisted(answer)
        if isinstance(given, str) and not given.lstrip().startswith("{"):
            return cls(function={"tests": given})
        try:
            given = parse_json(given) if isinstance(given, str) else given
        except ValueError as error:
            raise _unusable(answer, str(error)) from None
        if given.get("inputs") is not None or given.get("outputs") is not None:
            return cls._of_pairs(given, answer)
        tests, entry, stub = (given.get(key) or "" for key in ("test", "entry_point", "prompt"))
        if not all(isinstance(value, str) for value in (tests, entry, stub)) or not tests.strip():
            raise _unusable(answer, "'test', 'entry_point' and 'prompt' must be text")
        return cls(
            function={"tests": tests, "entry_point": entry, "setup": stub}, entry_point=entry, stub=stub
        )

    @classmethod
    def _of_pairs(cls, given: Mapping[str, Any], answer: str) -> "CodeTests":
        inputs, outputs, name = given.get("inputs"), given.get("outputs"), given.get("fn_name")
        if not isinstance(inputs, list) or not isinstance(outputs, list) or not inputs:
            raise _unusable(answer, "'inputs' and 'outputs' must be lists, and not empty")
        if len(inputs) != len(outputs):
            raise _unusable(answer, f"there are {len(inputs)} inputs, but {len(outputs)} outputs")
        if name is None:
            return cls(pairs=tuple(zip(map(_lines, inputs), map(_lines, outputs), strict=True)))
        if not isinstance(name, str) or not all(isinstance(value, list) for value in inputs):
            raise _unusable(answer, "with 'fn_name', a name, each of the inputs must be a list of arguments")
        calls = list(zip(inputs, outputs, strict=True))
        return cls(function={"calls": calls, "entry_point": name}, entry_point=name)


def refuses(grader: str) -> Callable[[Prompt], str | None]:
    """Why a prompt's tests cannot be used, where `eval.grader` will try programs with them: known when the
    row is read, and not when its first program is graded."""

    def of(prompt: Prompt) -> str | None:
        if prompt.answer is None or not (grader == "code" or (grader == "auto" and prompt.tests)):
            return None
        try:
            check_python(CodeTests.of(prompt.answer), prompt.answer)
        except UserError as error:
            return str(error)
        return None

    return of


def check_python(tests: CodeTests, answer: str) -> None:
    """Whether Python tests compile, and ask for something.

    Raises:
        UserError: they do not.
    """
    source = tests.function.get("tests")
    if source is None:
        return
    try:
        read = _read(source, tests.entry_point)
    except _NO_PYTHON as error:
        raise _unusable(answer, f"{type(error).__name__}: {error}") from None
    if read.foreign:
        raise _unusable(answer, f"they import {min(read.foreign)}, which is not of the standard library")
    if read.strangers:
        raise _unusable(answer, f"they use {min(read.strangers)}, which is not of the standard library")
    if not read.needed:
        raise _unusable(answer, "they call nothing of the program's")


@lru_cache(maxsize=1024)
def _read(source: str, entry: str) -> PythonTests:
    with _READING, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an invalid escape, say: it runs all the same
        return PythonTests(source, entry)


_READING = Lock()
"""Filters of warnings are all threads'."""
_NO_PYTHON = (SyntaxError, ValueError, RecursionError, MemoryError)


def _lines(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _unusable(answer: str, why: str) -> UserError:
    return UserError(
        f"eval.grader: code cannot use the tests {one_line(answer, 80)!r}: {why}; the column tests (or "
        f"answer) must hold {FORMS}"
    )


class CodeGrader(Grader):
    """Right if the program passes all tests.

    The program is the last closed ```python block of what follows the thinking (one that defines the tested
    function comes first, where the tests name it), or the whole text where there is no block. Where the
    prompt asks to complete a stub, a block without the function's head is taken for its body.

    Args:
        limits: of one program on one input, or for all of its function tests.
        threads: programs at a time; None: as many as there are CPUs.

    Raises:
        UserError: this machine cannot confine a program.
    """

    name = "code"

    def __init__(self, *, limits: Limits | None = None, threads: int | None = None) -> None:
        self.limits = limits or Limits()
        self.threads = threads or min(32, len(os.sched_getaffinity(0)) if _COUNTS else os.cpu_count() or 1)
        self._confined = sandbox.is_confined()

    def _grade_each(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        with ThreadPoolExecutor(self.threads) as pool:
            return list(pool.map(lambda pair: self.grade(*pair), pairs))

    def stated(self, answer: str) -> str | None:
        """Tests say what a program must do, not what it looks like."""
        return None

    def _judge(self, text: str, answer: str) -> Verdict:
        tests = CodeTests.of(answer)
        check_python(tests, answer)
        program = program_of(text, tests)
        if program is None:
            return Verdict(correct=False, extracted=None)
        outcome = self.run(program, tests)
        if outcome.fault:
            raise _unusable(answer, outcome.reason)
        return Verdict(correct=outcome.passed, extracted=program)

    def run(self, program: str, tests: CodeTests) -> Outcome:
        """What becomes of a program."""
        if tests.function:
            return sandbox.run_tests(program, tests.function, self.limits, confined=self._confined)
        for number, (given, expected) in enumerate(tests.pairs):
            outcome, printed = sandbox.run_script(program, given, self.limits, confined=self._confined)
            if not outcome.passed:
                return outcome
            if not same_output(printed, expected):
                return Outcome(passed=False, reason=f"input {number} gives another output")
        return Outcome(passed=True, reason="passed")


_COUNTS = hasattr(os, "sched_getaffinity")


def same_output(printed: str, expected: str) -> bool:
    """Line by line, without white space at their ends and at the end of the output. One line at a time, up to
    the first that differs: a program may print millions of them.

    >>> same_output("3 \\n4\\n\\n", "3\\n4")
    True
    """
    return all(a == b for a, b in zip_longest(_lines_shown(printed), _lines_shown(expected)))


def _lines_shown(output: str) -> Iterator[str]:
    return (line[0].rstrip() for line in _LINE.finditer(output.rstrip()))


def program_of(text: str, tests: CodeTests) -> str | None:
    """The program that a response gives; None: none.

    >>> program_of("So:\\n```python\\nprint(1)\\n```\\nThat is all.", CodeTests())
    'print(1)'
    """
    said = answer_part(text)
    blocks = [b for b in _blocks(said) if b.label in ("", *_PYTHON)]
    if not blocks and _FENCE.search(said):
        return None
    asked = _asked(tests)
    found = [
        (_defines_one(b.code, asked), b.closed, b.label in _PYTHON, place) for place, b in enumerate(blocks)
    ]
    code = blocks[max(found)[-1]].code if blocks else said.rstrip()
    if not code.strip():
        return None
    if not tests.stub:
        return code
    head = re.search(_definition(tests.entry_point), tests.stub, re.MULTILINE)
    if head is not None and _defines(code, tests.entry_point):
        return _joined(tests.stub[: head.start()], code)  # its imports and helpers
    return tests.stub.rstrip() + "\n" + _body(code)


def _joined(before: str, code: str) -> str:
    """One program of two; Python wants imports of __future__ at its top."""
    future = "".join(line.rstrip() + "\n" for line in _FUTURE.findall(code))
    return future + before + _FUTURE.sub("", code) if future else before + code


def _definition(name: str) -> str:
    first = re.escape(name.partition(".")[0].removesuffix("()"))
    return rf"^(?:(?:async )?def {first}\b|class {first}\b|{first}[ \t]*=)"


def _asked(tests: CodeTests) -> Collection[str]:
    """Names that tests take from a program, as far as they can be read."""
    if tests.entry_point or not tests.function:
        return {tests.entry_point} - {""}
    try:
        return _read(tests.function["tests"], "").needed
    except _NO_PYTHON:
        return ()


def _defines_one(code: str, names: Collection[str]) -> bool:
    """A method of a class Solution counts too."""
    method = any(re.search(rf"^[ \t]+def {re.escape(name)}\b", code, re.MULTILINE) for name in names)
    return any(_defines(code, name) for name in names) or (method and _defines(code, "Solution"))


def _defines(code: str, name: str) -> bool:
    return bool(name) and re.search(_definition(name), code, re.MULTILINE) is not None


def _body(code: str) -> str:
    """The body of a function: up to the first line that is not indented, where a new statement begins."""
    lines = code.lstrip("\n").splitlines()
    end = next((i for i, line in enumerate(lines) if line.strip() and line[0] not in " \t"), len(lines))
    return "\n".join(lines[:end])


@dataclass(frozen=True, kw_only=True)
class _Block:
    label: str
    code: str
    closed: bool


def _blocks(text: str) -> Sequence[_Block]:
    """Fenced blocks, in order; the last one may be open."""
    blocks: list[_Block] = []
    mark, label, held, margin = "", "", list[str](), re.compile("")
    for line in text.replace("\r\n", "\n").split("\n"):  # a form feed in a program ends no line
        fence = _FENCE.match(line)
        if not mark:
            if fence is not None:
                mark, label, held = fence[1], fence[2].lower(), []
                margin = re.compile(rf"[ \t]{{0,{fence.start(1)}}}")  # of a list's item
        elif fence is not None and line.strip().startswith(mark) and not fence[2]:
            blocks.append(_Block(label=label, code="\n".join(held), closed=True))
            mark = ""
        else:
            held.append(margin.sub("", line, count=1))
    if mark:
        blocks.append(_Block(label=label, code="\n".join(held), closed=False))
    return blocks
