"""What the code grader takes for a program, for tests, and for right."""

import datetime
import json
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onpath.commands.doctor import inputs as doctor
from onpath.commands.eval import evaluate_model
from onpath.config.whole import Config
from onpath.data.load import load_prompts
from onpath.grade import sandbox
from onpath.grade.code import CodeGrader, CodeTests, program_of, refuses, same_output
from onpath.grade.graders import make_grader
from onpath.grade.sandbox import Limits
from onpath.records import Prompt
from onpath.run.inputs import load_data
from onpath.system import code as own_code
from onpath.system.errors import UserError
from onpath.training import train

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="programs are confined on Linux alone"
)

STUB = (
    "from typing import List\n\ndef half(x):\n    return x // 2\n\n\n"
    'def middle(xs: List[int]) -> int:\n    """The middle one."""\n'
)
CHECK = (
    "def check(candidate):\n    assert candidate([1, 2, 3]) == 2\n    assert candidate([half(8)] * 3) == 4\n"
)
COMPLETION = json.dumps({"prompt": STUB, "test": CHECK, "entry_point": "middle"})
PAIRS = json.dumps({"inputs": ["1 2\n", ["3", "4"]], "outputs": ["3\n", "7"]})
CALLS = json.dumps({"fn_name": "add", "inputs": [[1, 2], [[1], [2]]], "outputs": [3, [[1, 2]]]})
METHOD = json.dumps({"test": "def check(f):\n    assert f(a=1) == 1", "entry_point": "Solution().add"})
LATER = "def middle(xs: Later) -> int:\n    return xs[half(len(xs))]"
SUM = "import sys\nprint(sum(map(int, sys.stdin.read().split())), ' ')"


@pytest.fixture(scope="module")
def grader() -> Iterator[CodeGrader]:
    with CodeGrader(limits=Limits(cpu_seconds=2, memory_bytes=1 << 28)) as made:
        yield made


def fenced(code: str, label: str = "python") -> str:
    return f"Here it is:\n\n```{label}\n{code}\n```\n\nIt works."


@pytest.mark.parametrize(
    ("text", "program"),
    [
        (fenced("a"), "a"),
        (fenced("a") + fenced("b"), "b"),
        (fenced("a") + fenced("b", "text"), "a"),
        (fenced("a") + fenced("b", ""), "a"),
        (fenced("a", ""), "a"),
        (fenced("a", "Python"), "a"),
        (fenced("a", "js"), None),
        (fenced("a") + "```python\nb", "a"),
        ("```python\na\nb", "a\nb"),
        ("~~~py\na\n```\nb\n~~~", "a\n```\nb"),
        ("a = 1", "a = 1"),
        ("<think>" + fenced("a") + "</think>" + fenced("b"), "b"),
        ("<think>" + fenced("a"), None),
        (fenced(" "), None),
        ("", None),
    ],
)
def test_the_program(text: str, program: str | None) -> None:
    assert program_of(text, CodeTests()) == program


def test_a_block_that_defines_the_tested_function_comes_first() -> None:
    text = fenced("def f(x):\n    return x") + fenced("print(f(3))")
    assert program_of(text, CodeTests()) == "print(f(3))"
    assert program_of(text, CodeTests(entry_point="f")) == "def f(x):\n    return x"


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("    return xs[half(len(xs))]\n\n\nprint(middle([]))\n", True),
        ("\n    return xs[half(len(xs))]\n", True),
        ("    return xs[0]\n", False),
        (fenced("    return xs[half(len(xs))]"), True),
        (fenced("def middle(xs: List[int]) -> int:\n    return xs[half(len(xs))]"), True),
        ("def middle(xs):\n    return xs[1]", True),
        (fenced("def other(xs):\n    return xs[1]"), False),
        (
            fenced("def half(x):\n    return 4\n\ndef middle(xs):\n    return xs[1] if xs[1] == 2 else 4"),
            True,
        ),
        (fenced("return xs[1]"), False),
        (fenced(f"from __future__ import annotations\n{LATER}"), True),
        (fenced(f"from __future__ import (  # first\n    annotations,\n)\nimport math\n\n{LATER}"), True),
    ],
)
def test_a_completion_and_a_whole_function_are_both_read(grader: CodeGrader, text: str, right: bool) -> None:
    assert grader.grade(text, COMPLETION).correct == right


@pytest.mark.parametrize(
    ("program", "tests", "right"),
    [
        ("def f(x):\n    return {x: (1, {2}), 'a': [None, 2.5, 1j, b'b', True]}",
         "assert f(1) == {1: (1, {2}), 'a': [None, 2.5, 1j, b'b', True]}\nassert f(1)['a'][4] is True", True),
        ("def f(x):\n    return [x]", "assert f(1) == (1,)", False),
        ("def f(x):\n    return 2 ** x", "assert f(20000) == 2 ** 20000\nassert f(62) == 1 << 62", True),
        ("def f(x):\n    x.sort()", "xs = [2, 1]\nassert f(xs) is None\nassert xs == [1, 2]", True),
        ("def f(x):\n    x = sorted(x)", "xs = [2, 1]\nf(xs)\nassert xs == [1, 2]", False),
        ("def f(x):\n    if x < 0:\n        raise ValueError('no')\n    return x",
         "try:\n    f(-1)\n    assert False\nexcept ValueError as e:\n    assert str(e) == 'no'", True),
        ("def f(x):\n    yield from range(x)", "assert list(f(3)) == [0, 1, 2]", True),
        ("from collections import Counter\ndef f(x):\n    return Counter(x)",
         "assert f('aab') == {'a': 2, 'b': 1}", True),
        ("class Stack:\n    def __init__(self):\n        self.held = []\n    def push(self, x):\n"
         "        self.held.append(x)\n        return self\n    def __len__(self):\n        return 2",
         "s = Stack()\nassert s.push(1).push(2).held == [1, 2]\nassert len(s) == 2", True),
        ("def f(x, *, y=1):\n    return x * y", "import math\nassert math.isclose(f(2, y=0.5), 1.0)", True),
        ("def f(x):\n    return float('nan')", "assert f(1) != f(1)", True),
        ("def g(x):\n    return 1\nf = g", "for x in range(3):\n    assert f(x) == 1", True),
    ],
)  # fmt: skip
def test_function_tests(grader: CodeGrader, program: str, tests: str, right: bool) -> None:
    assert grader.grade(fenced(program), tests).correct == right


TYPE_ERROR = "try:\n    f('a')\n    assert False\nexcept TypeError:\n    pass"
GUARDED = "def check(g):\n    assert g(1) == 2\n\nif __name__ == '__main__':\n    check(f)"


@pytest.mark.parametrize(
    ("program", "tests", "right"),
    [
        ("f = 5", TYPE_ERROR, False),
        ("f = 5", f"{TYPE_ERROR}\nassert g(1) == 1", False),
        ("g = 5", "try:\n    f('a')\nexcept Exception:\n    pass", False),
        ("class f:\n    pass", "try:\n    f.g(1)\nexcept AttributeError:\n    pass", False),
        ("def f(x):\n    raise TypeError", TYPE_ERROR, True),
        ("def f(x):\n    return 2", "def test_f():\n    assert f(1) == 2", True),
        ("def f(x):\n    return 3", "def test_f():\n    assert f(1) == 2", False),
        ("def f(x):\n    return 2", GUARDED, True),
        ("def f(x):\n    return 3", GUARDED, False),
        ("x = 5", "assert x == 5", True),
        ("x = 6", "assert x == 5", False),
        ("y = 5", "try:\n    assert x == 5\nexcept NameError:\n    pass", False),
        ("def sum(a, b):\n    return 6", "assert sum(10, 15) == 6", True),
        ("def sum(a, b):\n    return 7", "assert sum(10, 15) == 6", False),
        ("def f(a, b):\n    return 6", "assert sum(10, 15) == 6", False),
        ("def all(x):\n    return True\ndef f(x):\n    pass", "assert all(f(x) == 3 for x in [1])", False),
    ],
)  # fmt: skip
def test_what_counts_as_tested(grader: CodeGrader, program: str, tests: str, right: bool) -> None:
    """A program's answer is a verdict, never a fault of the tests."""
    assert grader.grade(fenced(program), tests).correct is right


def test_tests_that_turn_out_to_call_nothing_are_a_fault_only_if_no_program_has_a_part_in_it(
    grader: CodeGrader,
) -> None:
    with pytest.raises(UserError, match="they call nothing of the program's"):
        grader.grade("def f(x):\n    return x", "if False:\n    f(1)")


@pytest.mark.parametrize(
    ("program", "tests"),
    [
        ("def f(xs): xs.append(1)", "a = []\nf(xs=a)\nassert a == [1]"),
        ("def f(m): m[0][0] = 9", "m = [[1]]\nrow = m[0]\nf(m)\nassert row == [9]"),
        ("def f(m): m[0] = [9]", "m = [[1]]\nrow = m[0]\nf(m)\nassert row == [1] and m == [[9]]"),
        ("def f(pair): pair[0].append(1)", "a = []\nf((a,))\nassert a == [1]"),
        ("def f(d): d['a'].add(2)", "s = {1}\nf({'a': s})\nassert s == {1, 2}"),
        ("def f(xs, ys):\n    xs.append(1)\n    return ys", "a = []\nassert f(a, a) is a"),
        (
            "def f(xs, n):\n    for _ in range(n):\n        xs[0] = [xs[0]]\n    return xs[0]",
            "a, b = [[]], []\nfor _ in range(600):\n    b = [b]\nassert f(a, 600) == b and a == [b]",
        ),
        ("def f(xs): xs.append(xs)", "a = []\nf(a)\nassert a[0] is a"),
        (
            "def f(xs):\n    xs.append(1)\n    raise ValueError",
            "a = []\ntry:\n    f(a)\nexcept ValueError:\n    assert a == [1]\nassert a",
        ),
        ("def f(b): b += b'x'", "b = bytearray(b'a')\nf(b)\nassert b == bytearray(b'ax')"),
        (
            "def f(q): q.append(q.popleft())",
            "from collections import deque\nq = deque([1, 2])\nf(q)\nassert q == deque([2, 1])",
        ),
    ],
)
def test_what_a_call_changes_is_seen(grader: CodeGrader, program: str, tests: str) -> None:
    assert grader.grade(fenced(program), tests).correct


BALL = "def ball(r):\n    return 4 / 3 * 3.141592653589793 * r**3"
ASKS_MATH = "assert math.isclose(ball(10), 4188.79, rel_tol=0.001)"


@pytest.mark.parametrize(
    ("program", "tests", "right"),
    [
        (BALL, ASKS_MATH, True),
        (f"import math\n{BALL}", ASKS_MATH, True),
        ("class math:\n    isclose = staticmethod(lambda *a, **k: True)\nball = int", ASKS_MATH, False),
        ("def f(x):\n    return x", "def check(candidate):\n    assert re.match('a', candidate('a'))", True),
        # What the program has of its own is its own: modules that nobody judges by, their state, its names.
        (
            "import urllib.parse\nf = urllib.parse.quote",
            "assert f('a b') == urllib.parse.quote('a b')",
            True,
        ),
        (
            "class Q:\n    n = 0\n    def put(self, n):\n        self.n = n\nqueue = Q()\n"
            "size = lambda: queue.n",
            "queue.put(1)\nassert size() == 1",
            True,
        ),
        ("import random\nf = random.random", "random.seed(1)\nassert 0.13 < f() < 0.14", True),
        ("f = abs", "g = lambda pd: pd.real\ndef h(np):\n    return np.real\nassert f(h(-3)) == g(3)", True),
        ("def string(x):\n    return str(x)", "assert string(1) == '1'", True),
        ("class calendar:\n    add = staticmethod(lambda a: a)", "assert calendar.add(1) == 1", True),
    ],
)  # fmt: skip
def test_modules_that_tests_use_and_do_not_import_are_pythons_own(
    grader: CodeGrader, program: str, tests: str, right: bool
) -> None:
    asked = json.dumps({"test": tests, "entry_point": "f"}) if "check" in tests else tests
    assert grader.grade(fenced(program), asked).correct is right


DATES = (
    "[d.date(2020, 1, 2), d.datetime(2020, 1, 2, 3), d.datetime.fromtimestamp(5, d.timezone.utc), d.time(1)]"
)
KINDS = "[deque([1], 3), Counter('ab'), OrderedDict(b=1, a=2), defaultdict(list, a=[1])]"
POINT = "from collections import namedtuple\nP = namedtuple('P', 'x y')\n"


@pytest.mark.parametrize(
    ("head", "value", "more"),
    [
        ("from fractions import Fraction", "Fraction(1, 2)", "assert f() == 0.5"),
        ("from decimal import Decimal", "Decimal('1.10')", "assert str(f()) == '1.10'"),
        ("import datetime as d", DATES, ""),
        ("import datetime as d", "d.timedelta(1, 2, 3)", "assert f().days == 1"),
        (
            "from collections import Counter, OrderedDict, defaultdict, deque",
            KINDS,
            "q, c, o, d = f()\nassert q.maxlen == 3 and c.most_common(1) and d['z'] == []\n"
            "assert list(o) == ['b', 'a'] and type(o) is OrderedDict",
        ),
        ("", "range(1, 7, 2)", "assert f()[-1] == 5"),
        ("", "range(2 ** 70)", ""),
        ("", "bytearray(b'a')", "assert type(f()) is bytearray"),
    ],
)
def test_values_of_the_standard_library_go_both_ways(
    grader: CodeGrader, head: str, value: str, more: str
) -> None:
    program = f"{head}\ndef f(x=None):\n    return {value} if x is None else x == {value}"
    tests = f"{head}\nv = {value}\nassert f() == v and f(v) is True\n{more}"
    assert grader.grade(fenced(program), tests).correct


@pytest.mark.parametrize(
    ("program", "tests"),
    [
        (
            f"{POINT}def f(p):\n    return P(p.y, p.x)",
            "q = f(P(1, 2))\nassert q == (2, 1) and q.x == 2 and f(q).x == 1\n"
            "assert q._asdict() == {'x': 2, 'y': 1}",
        ),
        ("def f(p):\n    return p.x", f"{POINT}assert f(P(1, 2)) == 1"),
        ("from fractions import Fraction as F\ndef f():\n    return F(1, 2)", "assert f() == 0.5"),
        (
            "class Node:\n    def __init__(self, v):\n        self.v, self.next = v, None\n"
            "def f(n):\n    return n.next.v",
            "n = Node(1)\nn.next = Node(2)\nassert f(n) == 2\nn.v = 7\nassert n.v == 7",
        ),
        ("import enum\nclass C(enum.Enum):\n    A = 1\ndef f():\n    return C.A", "assert f() == C.A"),
        (
            "class C:\n    def __str__(self):\n        return 'c'\n"
            "    def __repr__(self):\n        return 'r'\n"
            "    def __contains__(self, x):\n        return x == 3\n"
            "    def __setitem__(self, k, v):\n        self.held = k, v",
            "c = C()\nassert f'{c}' == 'c' and repr(c) == 'r' and 3 in c and 4 not in c\n"
            "c[1] = 2\nassert c.held == (1, 2)",
        ),
    ],
)  # fmt: skip
def test_objects_of_a_program(grader: CodeGrader, program: str, tests: str) -> None:
    assert grader.grade(fenced(program), tests).correct


@pytest.mark.parametrize(("right", "of"), [(True, "1, 0"), (False, "lambda v: 1, lambda v: 0")])
def test_names_of_a_tuples_values_do_not_hide_what_a_tuple_does(
    grader: CodeGrader, right: bool, of: str
) -> None:
    program = f"class T(tuple):\n    _fields = 'count', 'index'\ndef f(x):\n    return T(({of}))"
    looks = "assert f(2).count == 1 and f(2).index == 0"
    asks = "assert f(2).count(4) == 1 and f(2).index(4) == 0"
    assert grader.grade(fenced(program), looks if right else asks).correct is right


@pytest.mark.parametrize(
    ("program", "tests", "right"),
    [
        (SUM, PAIRS, True),
        ("print(3)", PAIRS, False),
        (f"{SUM}\nprint('done')", PAIRS, False),
        (f"{SUM}\nraise SystemExit(0)", PAIRS, True),
        ("a, b = map(int, open(0).read().split())\nprint(a + b)", PAIRS, True),
        ("def add(a, b):\n    return a + b", CALLS, True),
        ("class Solution:\n    def add(self, a, b):\n        return a + b", CALLS, True),
        ("def add(a, b):\n    return 3", CALLS, False),
        (
            "class Solution:\n    def add(self, a):\n        return a",
            METHOD,
            True,
        ),
    ],
)
def test_scripts_and_calls(grader: CodeGrader, program: str, tests: str, right: bool) -> None:
    assert grader.grade(fenced(program), tests).correct == right


@given(*(st.text("ab \t\n\r\v\f\x1c\x1e\x1f\x85\u2028\0", max_size=9) for _ in range(2)))
def test_outputs_are_compared_by_lines(printed: str, expected: str) -> None:
    ours, theirs = ([line.rstrip() for line in s.rstrip().splitlines()] for s in (printed, expected))
    assert same_output(printed, expected) is (ours == theirs)
    assert same_output(printed, "\n".join(ours) + " \n")


@pytest.mark.parametrize("line", ["ab\n", "ab\f"])
def test_a_long_output_is_not_held_line_by_line(line: str) -> None:
    """16 MiB of short lines as a list took 450 MiB and two seconds of the process that grades."""
    printed = line * 500_000
    tracemalloc.start()
    try:
        assert not same_output(printed, "2")
        assert same_output(printed, printed)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 3 * len(printed)


NOTHING = [
    "12",
    CHECK,
    "def test_f(x):\n    assert f(1) == 2",
    "class TestF:\n    def test_f(self):\n        assert f(1) == 2",
    "import unittest\nclass T(unittest.TestCase):\n    def test(self):\n        f(1)\nunittest.main()",
    "assert sorted(sum(10, 15)) == [6]",
    "x = sum(10, 15)",
    '{"test": "x = 1", "entry_point": "f"}',
]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        *((tests, "they call nothing of the program's") for tests in NOTHING),
        ("import pytest\ndef test_f():\n    f(1)", "import pytest, which is not of the standard library"),
        ("assert np.allclose(f(1), 2)", "use np, which is not of the standard library"),
        ("from solution import f\nassert f(1) == 2", "they import solution, which"),
        ("def f(x) return", "SyntaxError"),
        ('{"inputs": []}', "must be lists, and not empty"),
        ('{"inputs": ["1"], "outputs": []}', "there are 1 inputs, but 0 outputs"),
        ('{"inputs": ["1"], "outputs": ["1"], "fn_name": "f"}', "must be a list of arguments"),
        ('{"entry_point": "f"}', "'test', 'entry_point' and 'prompt' must be text"),
        ('{"test": [1]}', "'test', 'entry_point' and 'prompt' must be text"),
        ("{", "not valid JSON"),
    ],
)
def test_tests_that_cannot_be_used_are_a_sentence(grader: CodeGrader, answer: str, said: str) -> None:
    with pytest.raises(UserError, match="cannot use the tests") as caught:
        grader.grade("f = 1", answer)
    assert said in str(caught.value)


def test_many_are_graded_at_a_time_in_order_and_once(
    grader: CodeGrader, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: list[str] = []

    def counted(program: str, *arguments: Any, **options: Any) -> sandbox.Outcome:
        run.append(program)
        return sandbox.Outcome(passed=program == "b", reason="")

    monkeypatch.setattr(sandbox, "run_tests", counted)
    verdicts = grader.grade_many([("a", "assert f()"), ("b", "assert f()"), ("a", "assert f()"), ("", "x")])
    assert [v.correct for v in verdicts] == [False, True, False, False]
    assert sorted(run) == ["a", "b"]


def test_rows_bring_tests_in_the_forms_of_common_data_sets(tmp_path: Path, grader: CodeGrader) -> None:
    asserts = ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]
    given = [
        {"prompt": "x", "tests": asserts},
        {"prompt": "x", "tests": asserts[0], "answer": "a program"},
        {"prompt": "x", "tests": json.loads(CALLS)},
        {"prompt": "x", "tests": [{"input": "1", "output": "1"}]},
        {"prompt": "x", "answer": "assert add(1, 2) == 3"},
        {"prompt": "x", "tests": json.dumps(asserts)},
        {"prompt": "x", "answer": json.dumps(asserts)},
        {"prompt": "x", "tests": json.dumps([{"input": "1", "output": ""}])},
        {"prompt": "x", "answer": json.dumps([{"input": "1", "output": ""}])},
        {"prompt": "x", "tests": "[add(i, 1) for i in (1, 2)]"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    answers = [p.answer or "" for p in load_prompts(str(path)).prompts]
    assert answers[0] == "\n".join(asserts)
    assert [grader.grade("def add(a, b):\n    return a + b", a).correct for a in answers] == [
        *(True, True, True, False, True, True, True, True, True, True)
    ]
    path.write_text('{"prompt": "x", "tests": [1]}')
    with pytest.raises(UserError, match="line 1: 'tests' must be text, a list of asserts, or an object"):
        load_prompts(str(path))
    path.write_text('{"prompt": "x", "test_list": ["assert f(1)"]}')
    assert load_prompts(str(path), columns={"tests": "test_list"}).prompts[0].answer == "assert f(1)"


UNUSABLE = "assert add(1, 2 == 3"


def rows_of_programs(path: Path, *, bad: int, good: int = 4) -> str:
    tests = ["assert f(1) == 1"] * good + [UNUSABLE] * bad
    rows = [{"prompt": f"f of {i}", "tests": test} for i, test in enumerate(tests)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_row_whose_tests_cannot_be_used_is_a_bad_row(tiny: Callable[..., Config], tmp_path: Path) -> None:
    """Said with file and line before the first step, or left out and counted, of every set."""
    train_file = rows_of_programs(tmp_path / "train.jsonl", bad=1)
    test_file = rows_of_programs(tmp_path / "test.jsonl", bad=2, good=3)
    options: dict[str, Any] = {
        "data__train": train_file,
        "data__eval": {"test": test_file},
        "rollout__prompts": 2,
        "eval__grader": "auto",
    }
    with pytest.raises(UserError, match=r"train.jsonl, line 5: eval.grader: code cannot use .*SyntaxError"):
        load_data(tiny(**options))
    clean = rows_of_programs(tmp_path / "clean.jsonl", bad=0)
    with pytest.raises(UserError, match=r"test.jsonl, line 4: eval.grader: code cannot use the tests"):
        load_data(tiny(**options | {"data__train": clean}))
    left = load_data(tiny(**options, data__skip_bad=True))
    assert (len(left.pool), left.skipped, left.skipped_evals) == (4, 1, {"test": 2})
    assert len(load_data(tiny(**options | {"eval__grader": "exact"})).pool) == 5


@pytest.mark.parametrize("tests", ['{"inputs": []}', '{"test": 5}', "f(", "x = '\0'", *NOTHING])
def test_what_is_no_test_is_known_without_a_program(tests: str) -> None:
    assert refuses("code")(Prompt(id="0", text="?", answer=tests))
    assert not refuses("exact")(Prompt(id="0", text="?", answer=tests))


@pytest.mark.parametrize(
    "tests",
    [
        *(PAIRS, CALLS, METHOD, COMPLETION, "assert f('\\d') == 1", f"{CHECK}check(f)", "assert x == 5"),
        *("def test_f():\n    assert f(1) == 2", "assert sum(10, 15) == 6", "def g(f):\n    f(1)\ng(f)"),
    ],
)
def test_what_is_a_test_is_let_through(tests: str) -> None:
    assert refuses("auto")(Prompt(id="0", text="?", answer=tests, tests=True)) is None


def test_problems_that_are_left_out_of_an_evaluation_are_told(
    tiny: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = rows_of_programs(tmp_path / "test.jsonl", bad=2, good=3)
    clean = rows_of_programs(tmp_path / "clean.jsonl", bad=0)
    config = tiny(
        data__train=clean,
        data__eval={"test": file},
        data__skip_bad=True,
        eval__grader="auto",
        rollout__prompts=2,
        optim__steps=1,
    )
    run = train(config)
    assert "2 bad rows of data.eval.test are left out" in capsys.readouterr().err
    kept = json.loads((run.directory / "environment.json").read_text())
    assert kept["skipped_eval_rows"] == {"test": 2}
    found = evaluate_model(run.directory, n=1, k=1, max_new_tokens=2)
    assert found.skipped == found.to_json()["skipped_rows"] == 2
    assert doctor.read_evals(config, ())[1].status == "warning"


def test_the_doctor_tries_solutions_in_place_of_answers(grader: CodeGrader) -> None:
    right, wrong = (
        Prompt(
            id=str(i), text="?", answer="assert f(1) == 2", solution=fenced(f"def f(x):\n    return x + {i}")
        )
        for i in (1, 2)
    )
    assert doctor.answers(grader, [right]).status == "skipped"
    assert doctor.solutions(grader, [right]).status == "ok"
    assert "do not pass the code grader" in doctor.solutions(grader, [right, wrong]).message


@pytest.mark.parametrize(
    "method",
    [{"name": "trd", "template": "{problem}; {attempt};", "gate": False}, {"name": "topd", "window": 2}],
)
def test_methods_train_with_it(tiny: Callable[..., Config], tmp_path: Path, method: dict[str, Any]) -> None:
    """What a filter of training and an evaluation say is this grader's."""
    path = tmp_path / "code.jsonl"
    rows = [{"prompt": f"f of {i}", "tests": f"assert f({i}) == 1"} for i in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = train(
        tiny(
            data__train=str(path),
            data__eval={"test": str(path)},
            data__eval_limit=2,
            eval__grader="code",
            eval__n=2,
            eval__k=2,
            rollout__prompts=2,
            rollout__max_new_tokens=8,
            optim__steps=1,
            **{f"method__{key}": value for key, value in method.items()},
        )
    )
    rows = [json.loads(line) for line in (run.directory / "eval.jsonl").read_text().splitlines()]
    metrics = json.loads((run.directory / "metrics.jsonl").read_text().splitlines()[0])
    assert metrics["accuracy"] == 0
    assert {row["grader"] for row in rows} == {"code"}
    assert all(row["avg_at_k"] == row["pass_at_k"] == 0 for row in rows)
    assert all(row["pass_at_k_ci95"][1] > 0 for row in rows)


def test_it_has_a_name() -> None:
    with make_grader("code") as grader:
        assert grader.name == "code"
        assert grader.stated("assert f(1)") is None


LATE = [
    "from math import gcd\nimport heapq\nheapq.heapify([])",
    "from math import (  # comment\n    gcd,  # another, longer\n    lcm,\n)\nfrom bisect import bisect",
    "from collections import Counter\nCounter('aab').most_common(1)",
    "from functools import singledispatch\n@singledispatch\ndef f(x): return 1\n"
    "@f.register\ndef _(x: int): return 2\nassert f(1) == 2",
    "import argparse\np = argparse.ArgumentParser()\np.add_argument('--x', help='y')\np.format_help()",
    "import unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(1, 1)\n"
    "assert unittest.main(argv=['x'], exit=False).result.testsRun == 1",
    "import codecs\nassert codecs.encode('s', 'rot13') == 'f' and codecs.encode(b'a', \"hex\") == b'61'",
    "assert 'é'.encode('cp1252') and 'a\\n'.encode('unicode_escape') and 'é'.encode('idna')",
    "assert __import__('bisect').bisect([1], 2) == 1",
    "import importlib\nimportlib.import_module('heapq').heapify([])",
    "exec('import heapq')",
    "import concurrent.futures\nconcurrent.futures.ThreadPoolExecutor()",
    "assert '\\N{BULLET}'",
    "é = 1",
    "from xml.dom import minidom\nminidom.parseString('<a/>')",
    "import xml.sax\nxml.sax.parseString(b'<a/>', xml.sax.ContentHandler())",
    "import xml.etree.ElementTree as e\nassert e.tostring(e.fromstring('<a/>'))",
    "import email\nemail.message_from_string('A: b')",
    "import statistics\nstatistics.mode([1])",
    "import ast\nast.get_docstring(ast.parse('1'))",
    "import sys\nassert sys.argv == ['program']",
]
"""Programs for which Python loads modules late."""
SUM_OF_LINE = "a, b = map(int, input().split())\nprint(a + b)"


@pytest.mark.parametrize(
    "program",
    [
        f"{SUM_OF_LINE}\nexit()",
        f"{SUM_OF_LINE}\nquit()",
        f"import sys; import heapq, bisect; import fractions\n{SUM_OF_LINE}",
        f"import sys; from decimal import Decimal\n{SUM_OF_LINE}",
        f"try: import statistics\nexcept ValueError: pass\n{SUM_OF_LINE}",
        f"import sys, \\\n  statistics\n{SUM_OF_LINE}",
        f"from xml.etree import (\n    ElementTree,\n)\n{SUM_OF_LINE}",
        f"from concurrent.futures import ThreadPoolExecutor\n{SUM_OF_LINE}",
        f"from unittest import mock\n{SUM_OF_LINE}",
        f"s = 'a\x0cb\x85c\u2028d'\n{SUM_OF_LINE}",
        *(f"{program}\n{SUM_OF_LINE}" for program in LATE),
    ],
)
def test_what_programs_use_is_there(grader: CodeGrader, program: str) -> None:
    assert grader.grade(fenced(program), json.dumps({"inputs": ["1 2"], "outputs": ["3"]})).correct


@pytest.mark.parametrize(
    ("program", "tests", "right"),
    [
        ("import re\ndef f(x):\n    return re.match('a', x)", "assert f('a')\nassert not f('b')", True),
        ("import re\ndef f(x):\n    return re.match('a', x)", "assert f('b')", False),
        (
            "class E:\n    def __bool__(self):\n        return False\ndef f():\n    return E()",
            "assert f()",
            False,
        ),
        (
            "def f(x):\n    return x",
            "import math; import statistics\nassert f(1) == statistics.mean([1])",
            True,
        ),
    ],
)
def test_objects_have_their_truth(grader: CodeGrader, program: str, tests: str, right: bool) -> None:
    assert grader.grade(fenced(program), tests).correct is right


@pytest.mark.parametrize(
    ("code", "usage", "tests"),
    [
        ("def add(a, b):\n    return a + b", "print(add(1, 2))", "assert add(1, 2) == 3"),
        (
            "class Solution:\n    def add(self, a, b):\n        return a + b",
            "print(Solution().add(1, 2))",
            json.dumps({"fn_name": "add", "inputs": [[1, 2]], "outputs": [3]}),
        ),
    ],
)
def test_a_block_of_usage_is_not_the_program(code: str, usage: str, tests: str, grader: CodeGrader) -> None:
    assert program_of(fenced(code) + fenced(usage), CodeTests.of(tests)) == code
    assert grader.grade(fenced(code) + fenced(usage), tests).correct


@pytest.mark.parametrize(
    "text",
    [
        "1. So:\n   ```python\n   def f(x):\n       return x\n   ```\n2. Done.",
        "- ```python\n  def f(x):\n      return x\n  ```\n- Done.",
        "* 2) ```python\n     def f(x):\n         return x\n     ```\nDone.",
        "-  ```\n   def f(x):\n       return x\n```\nDone.",
    ],
)
def test_a_block_in_a_list_is_its_program(text: str) -> None:
    assert program_of(text, CodeTests()) == "def f(x):\n    return x"


def test_an_item_in_a_block_does_not_end_it() -> None:
    text = "```python\ns = '''\n- ```\n'''\n```"
    assert program_of(text, CodeTests()) == "s = '''\n- ```\n'''"


def test_tests_of_several_forms_stand_in_one_parquet(tmp_path: Path) -> None:
    """Which gives each row the keys of all, null where it has none."""
    rows = [{"inputs": ["1"], "outputs": ["2"]}, {"test": "assert f(1) == 1", "entry_point": "f"}]
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"prompt": ["a", "b"], "tests": rows}), path)
    first, second = load_prompts(str(path), refuses=refuses("code")).prompts
    assert CodeTests.of(str(first.answer)).pairs == (("1", "2"),)
    assert CodeTests.of(str(second.answer)).entry_point == "f"


@pytest.mark.parametrize(
    ("column", "said"),
    [
        (
            {"tests": [{"inputs": [datetime.date(2020, 1, 1)], "outputs": ["2"]}]},
            "'tests' holds what is no JSON",
        ),
        ({"tests": [b"assert f(1)"]}, "'tests' must be text, a list of asserts, or an object, not bytes"),
    ],
)
def test_what_cannot_be_a_test_is_a_bad_row(column: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"prompt": ["a"], **column}), path)
    with pytest.raises(UserError, match=said):
        load_prompts(str(path))


def test_rows_of_ones_own_that_fail_are_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "import numpy\n\ndef rows():\n    return 1 / 0\n\n"
        "def arrays():\n    return [{'prompt': 'a', 'tests': numpy.ones(2)}]\n\n"
        "def long():\n    return [{'prompt': 'a', 'answer': 10**5000}]\n"
    )
    for name, said in (
        ("rows", "mine.py:rows fails: ZeroDivisionError"),
        ("arrays", "'tests' must be text, a list of asserts, or an object, not ndarray"),
        ("long", "'answer' has over 4,000 digits; write it as text"),
    ):
        with own_code.allowed(), pytest.raises(UserError, match=said):
            load_prompts(f"{path}:{name}")
