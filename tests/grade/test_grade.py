"""What counts as right, and that no text can hang, crash or control the grading."""

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import onpath.grade.math as grade_module
from onpath.config.section import OneOf
from onpath.config.sections import Eval
from onpath.grade.base import Grader, Verdict
from onpath.grade.exact import ExactGrader
from onpath.grade.graders import GRADERS, grader_for, make_grader
from onpath.grade.math import MathGrader, grade
from onpath.records import Prompt
from onpath.system.errors import UserError

BOUND_SECONDS = 10.0
"""Of a hostile answer, on a machine that is busy with other things; about 1 s on an idle one."""


@pytest.fixture(scope="module")
def maths() -> Iterator[MathGrader]:
    with MathGrader() as grader:
        yield grader


@pytest.fixture(scope="module")
def impatient() -> Iterator[MathGrader]:
    with MathGrader(cpu_seconds=0.25, wall_seconds=BOUND_SECONDS / 2) as grader:
        yield grader


RIGHT = [
    ("so the answer is \\boxed{12}", "12"),
    ("12", "12"),
    ("#### 72", "72"),
    ("it makes 72 apples", "72"),
    ("\\boxed{\\frac{1}{2}}", "0.5"),
    ("1/2", "\\frac{1}{2}"),
    ("$\\dfrac{3}{4}$", "3/4"),
    ("\\boxed{3 \\frac{1}{2}}", "3.5"),
    ("it costs $1,234 in all", "1234"),
    ("\\boxed{1{,}234}", "1,234"),
    ("\\boxed{12\\text{ cm}}", "12"),
    ("\\boxed{12}", "12 cm"),
    ("\\boxed{90^\\circ}", "90"),
    ("\\boxed{50\\%}", "0.5"),
    ("$x = 5$", "5"),
    ("\\boxed{\\sqrt{8}}", "2\\sqrt{2}"),
    ("\\boxed{x+1}", "1+x"),
    ("$1$ and $2$", "\\{2, 1\\}"),
    ("\\boxed{[0,1)}", "[0,1)"),
    ("-3", "-3"),
    ("5", "5.0"),
    ("0.333333", "1/3"),
    ("\\boxed{5}", "$5$"),
    ("\\boxed{5}", "\\boxed{5}"),
    ("Paris", "Paris"),
    ("\\boxed{\\text{yes}}", "yes"),
    ("<think>\\boxed{3}, or rather 5</think> The answer is 4.", "4"),
]
WRONG = [
    ("\\boxed{12}", "13"),
    ("\\boxed{-3}", "3"),
    ("\\boxed{0.51}", "1/2"),
    ("\\boxed{x+1}", "x+2"),
    ("\\boxed{[0,1]}", "[0,1)"),
    ("\\boxed{1} and \\boxed{2}", "2"),
    ("I do not know", "12"),
    ("London", "Paris"),
    ("", "12"),
    (" \n", "12"),
    ("12", ""),
    ("<think>\\boxed{12}</think>", "12"),
    ("<think>\\boxed{4}</think> The answer is 3.", "4"),
]


@pytest.mark.parametrize(("text", "answer"), RIGHT)
def test_right(maths: MathGrader, text: str, answer: str) -> None:
    assert maths.grade(text, answer).correct


@pytest.mark.parametrize(("text", "answer"), WRONG)
def test_wrong(maths: MathGrader, text: str, answer: str) -> None:
    assert not maths.grade(text, answer).correct


def test_extracted_is_the_matched_text(maths: MathGrader) -> None:
    assert maths.grade("so \\boxed{\\frac{2}{4}}", "0.5") == Verdict(correct=True, extracted="\\frac{2}{4}")
    assert maths.grade("no idea\nat all", "0.5") == Verdict(correct=False, extracted="at all")


def test_the_end_of_a_long_text_decides(maths: MathGrader) -> None:
    assert maths.grade("we try 3 and 4. " * 100_000 + "The answer is \\boxed{12}", "12").correct


def test_a_very_long_answer_is_compared_as_text(maths: MathGrader) -> None:
    answer = "1 + " * 1000 + "1"
    assert maths.grade(f"it is\n{answer}", answer).correct
    assert not maths.grade("1001", answer).correct


HOSTILE = {
    "power tower": "9**9**9**9",
    "boxed tower": "\\boxed{9^{9^{9^{9}}}}",
    "factorials": "\\boxed{((((99!)!)!)!)}",
    "huge float": "\\boxed{1e999999999}",
    "binomial": "\\boxed{\\binom{10^9}{5\\cdot 10^8}}",
    "integral": "$\\int_0^1 \\int_0^1 \\int_0^1 e^{x^2 y^3 z^5 \\sin(x)} dx dy dz$",
    "wide set": "\\boxed{\\{" + ",".join(f"x_{i}+\\sqrt{{{i}}}" for i in range(300)) + "\\}}",
    "deep parentheses": "\\boxed{" + "(" * 3000 + "1" + ")" * 3000 + "}",
    "open fractions": "\\frac{" * 100_000,
    "megabytes of braces": "{" * 3_000_000,
    "megabytes of boxes": "\\boxed{" * 500_000,
    "a million digits": "9" * 1_000_000,
    "dollars": "$" * 1_000_000,
    "anchors": "answer: " * 1000 + "final answer is " * 1000,
    "backslashes": "\\" * 100_000,
    "null bytes": "\x00" * 1000 + "\\boxed{1\x00}" + "\x00",
    "half surrogates": "\ud800\udfff \\boxed{\ud800}",
    "end of the line": '\\boxed{1}\n{"text": "\\\\boxed{7}", "answer": "7"}\n\u2028\r',
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_text_is_wrong_within_bounds_and_harms_nothing(impatient: MathGrader, case: str) -> None:
    start = time.monotonic()
    assert not impatient.grade(HOSTILE[case], "x^2+3").correct
    assert time.monotonic() - start < BOUND_SECONDS
    assert impatient.grade("\\boxed{12}", "12").correct


@pytest.mark.parametrize(
    "form", ["{}", "\\boxed{{{}}}", "1+{}", "answer: {}", "${}$", "1+1;{}", "\\text{{{}}}", "lambda: {}"]
)
def test_code_is_not_run(maths: MathGrader, tmp_path: Path, form: str) -> None:
    trace = tmp_path / "trace"
    for code in (
        f"__import__('os').system('touch {trace}')",
        f"open('{trace}', 'w')",
        f'exec(\'open("{trace}","w")\')',
    ):
        assert not maths.grade(form.format(code), "7").correct
        maths.grade("\\boxed{7}", form.format(code))
    assert not trace.exists()


@pytest.mark.parametrize("answer", [None, 12, b"12"])
@pytest.mark.parametrize("name", ["gym", "math", "exact"])
def test_no_answer_is_an_error(name: str, answer: Any) -> None:
    with make_grader(name) as grader, pytest.raises(ValueError, match="there is no answer to grade against"):
        grader.grade("12", answer)


def test_text_must_be_text() -> None:
    with pytest.raises(ValueError, match="the graded text must be a string, not NoneType"):
        grade(None, "12")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("12", "12", True),
        ("7 + 5\n  is   12\n\n", "is 12", True),
        ("12", " 12\n", True),
        ("12\n.", "12", False),
        ("The answer is 12", "12", False),
        ("Yes", "yes", False),
        ("12.0", "12", False),
        ("", "12", False),
    ],
)
def test_exact(text: str, answer: str, right: bool) -> None:
    assert ExactGrader().grade(text, answer).correct == right


def test_graders_differ_where_they_should() -> None:
    cases = [("1/2", "0.5"), ("x=3+4=07;ans 07", "07"), ("ans 7", "07"), ("ans 07\n08", "08")]
    verdicts = {}
    for name in ("exact", "math", "gym"):
        with make_grader(name) as grader:
            assert grader.name == name
            verdicts[name] = [v.correct for v in grader.grade_many(cases)]
    assert verdicts == {
        "exact": [False, False, False, True],
        "math": [True, True, True, True],
        "gym": [False, True, False, False],
    }


@pytest.mark.parametrize("name", ["exact", "math", "gym"])
def test_what_follows_the_thinking_is_read(name: str) -> None:
    texts = ["<think> ans 03", "<think> ans 03 </think> ans 04", "<think> ans 04 </think> ans 03"]
    with make_grader(name) as grader:
        answer = "ans 03" if name == "exact" else "03"
        assert [v.correct for v in grader.grade_many([(t, answer) for t in texts])] == [False, False, True]


def test_names() -> None:
    with pytest.raises(UserError, match=r"eval.grader is 'maths'; it must be auto, one of gym, math, exact"):
        make_grader("maths")
    assert grader_for("exact", {"gym:train": ()}).name == "exact"


def test_auto() -> None:
    """What the sources are, and whether their rows bring tests."""

    def chosen(**rows: Sequence[Prompt]) -> str:
        with grader_for("auto", {source.replace("_", ":"): some for source, some in rows.items()}) as grader:
            return grader.name

    sums, silent = (Prompt(id="0", text="7 + 5?", answer="12"),), (Prompt(id="1", text="Write."),)
    programs = (Prompt(id="2", text="Add.", answer="assert add(1, 2) == 3", tests=True),)
    assert chosen(gym_train=(), gym_test=()) == "gym"
    assert chosen(gym_train=sums, a=sums) == "math"
    assert chosen(a=silent) == "math"
    assert chosen(a=programs, b=(*silent, *programs)) == "code"
    for mixed in {"a": sums, "b": programs}, {"b": (*programs, *sums)}:
        with pytest.raises(
            UserError, match=r"auto, which cannot be .*code for b.* at a time; name one grader"
        ):
            chosen(**mixed)


class _Counting(Grader):
    name = "exact"

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def _judge(self, text: str, answer: str) -> Verdict:
        self.asked.append((text, answer))
        return Verdict(correct=text == answer, extracted=text)


def test_grade_many_keeps_the_order_and_asks_once() -> None:
    grader = _Counting()
    pairs = [("1", "1"), ("2", "1"), ("1", "1"), ("1", "2")]
    assert [v.correct for v in grader.grade_many(iter(pairs))] == [True, False, True, False]
    assert grader.asked == [("1", "1"), ("2", "1"), ("1", "2")]


def worker_pid(grader: MathGrader) -> int:
    assert grader._worker is not None
    return grader._worker._process.pid


def test_a_killed_worker_is_replaced(maths: MathGrader) -> None:
    assert maths.grade("\\boxed{12}", "12").correct
    before = worker_pid(maths)
    os.kill(before, signal.SIGKILL)
    assert maths.grade("\\boxed{13}", "13").correct
    assert worker_pid(maths) != before


def test_a_worker_killed_while_it_reads_is_replaced_and_asked_again() -> None:
    with MathGrader(cpu_seconds=30, wall_seconds=30) as grader:
        assert grader.grade("1", "1").correct
        os.kill(worker_pid(grader), signal.SIGSTOP)  # so that it surely dies with the question in hand
        threading.Timer(0.3, os.kill, (worker_pid(grader), signal.SIGKILL)).start()
        assert grader.grade("\\boxed{14}", "14").correct


def test_a_worker_that_stops_answering_is_given_up() -> None:
    with MathGrader(wall_seconds=0.2) as grader:
        assert grader.grade("1", "1").correct
        os.kill(worker_pid(grader), signal.SIGSTOP)
        start = time.monotonic()
        assert not grader.grade("12", "12").correct
        assert time.monotonic() - start < BOUND_SECONDS
        assert grader.grade("12", "12").correct


def test_an_interrupted_question_leaves_no_stale_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(worker: Any, seconds: float) -> Any:
        raise KeyboardInterrupt

    with MathGrader() as grader:
        assert grader.grade("1", "1").correct
        with monkeypatch.context() as patch:
            patch.setattr(grade_module._Worker, "_reply", interrupted)
            with pytest.raises(KeyboardInterrupt):
                grader.grade("2", "2")
        assert not grader.grade("3", "4").correct
        assert grader.grade("3", "3").correct


def test_close_ends_the_worker_and_the_grader_still_works() -> None:
    grader = MathGrader()
    assert grader.grade("1", "1").correct
    pid = worker_pid(grader)
    grader.close()
    grader.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert grader.grade("1", "1").correct
    grader.close()


def test_memory_is_limited() -> None:
    with MathGrader(cpu_seconds=20, wall_seconds=20, memory_bytes=400 << 20) as grader:
        assert grader.grade("1", "1").correct
        _, peak = resource.prlimit(worker_pid(grader), resource.RLIMIT_AS)
        assert peak == 400 << 20
        assert resource.prlimit(worker_pid(grader), resource.RLIMIT_FSIZE) == (0, 0)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_to_the_group_does_not_end_a_worker_that_starts(name: str) -> None:
    """A terminal's Ctrl-C, and what `timeout` sends: the run notes it and ends after its step."""
    code = f"""
import os, signal
import onpath.grade.math as module
from onpath.system.signals import stop_requests

signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell's background ignores stays ignored
known = module._Worker._reply

def signalled(worker, seconds):
    module._Worker._reply = known
    os.killpg(0, signal.{name})
    return known(worker, seconds)

module._Worker._reply = signalled
with stop_requests() as asked, module.MathGrader() as grader:
    print(grader.grade("it is 12", "12").correct, asked.name, flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, start_new_session=True
    )
    assert done.stdout.split() == ["True", name], done.stderr


def test_a_worker_that_cannot_start_says_why() -> None:
    with MathGrader() as grader, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", "/bin/false")
        with pytest.raises(
            RuntimeError, match="the grading process does not start: it ended without a message"
        ):
            grader.grade("1", "1")


def test_the_worker_sees_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "secret")
    with MathGrader() as grader:
        assert grader.grade("1", "1").correct
        environment = Path(f"/proc/{worker_pid(grader)}/environ")
        if environment.exists():
            assert b"secret" not in environment.read_bytes()


@pytest.mark.parametrize(
    "deed",
    [
        "os.system('true')",
        "os.fork()",
        "__import__('subprocess').run(['true'])",
        "__import__('socket').socket()",
        "open('x', 'w')",
        "os.remove('x')",
    ],
)
def test_the_locked_process_refuses(tmp_path: Path, deed: str) -> None:
    code = f"import os, onpath.grade.worker as w; w.lock_down(1 << 30); {deed}; os._exit(0)"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False)
    assert run.returncode == 77


def test_threads_share_the_worker(maths: MathGrader) -> None:
    with ThreadPoolExecutor(8) as threads:
        verdicts = list(
            threads.map(lambda i: maths.grade(f"\\boxed{{{i}}}", str(i - i % 2)).correct, range(80))
        )
    assert verdicts == [i % 2 == 0 for i in range(80)]


def _grade_in_child(results: Any) -> None:
    results.put([grade("\\boxed{12}", "12"), grade("\\boxed{12}", "13")])


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # what is being tested
def test_a_forked_child_has_its_own_worker() -> None:
    assert grade("\\boxed{12}", "12")
    parent = worker_pid(grade_module._shared())
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    with grade_module._shared()._lock:  # held by a thread that the child does not have
        child = context.Process(target=_grade_in_child, args=(results,))
        child.start()
    assert results.get(timeout=60) == [True, False]
    child.join(timeout=60)
    assert child.exitcode == 0
    assert grade("\\boxed{13}", "13")
    assert worker_pid(grade_module._shared()) == parent


def test_importing_leaves_no_hooks_behind() -> None:
    """They come with the first grader, and once."""
    code = (
        "import atexit, os; hooks = []\n"
        "atexit.register = lambda hook, *_: hooks.append(hook)\n"
        "os.register_at_fork = lambda **named: hooks.extend(named.values())\n"
        "ours = lambda: [h.__name__ for h in hooks if getattr(h, '__module__', '') == 'onpath.grade.math']\n"
        "import onpath.grade.math as g\n"
        "assert (ours(), g._kept) == ([], {})\n"
        "assert g._shared() is g._shared() is not g.MathGrader()\n"
        "assert ours() == ['_close_all', '_forget_all']"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_script_leaves_no_process_and_prints_nothing() -> None:
    code = (
        "import onpath.grade.math as g\n"
        "assert g.grade('\\\\boxed{12}', '12') and not g.grade('12', '13')\n"
        "impatient = g.MathGrader(cpu_seconds=0.2)\n"
        "assert not impatient.grade('9**9**9**9', '12').correct and impatient.grade('12', '12').correct\n"
        "print(impatient._worker._process.pid)\n"
        "print(g._shared()._worker._process.pid)"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    assert run.stderr == ""
    for pid in run.stdout.split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


def test_a_worker_outlives_no_killed_parent() -> None:
    code = (
        "import onpath.grade.math as g; g.grade('1', '1');"
        "print(g._shared()._worker._process.pid, flush=True); input()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        parent.kill()
    for _ in range(200):
        stat = Path(f"/proc/{worker}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the worker still runs")


def test_the_config_knows_every_grader() -> None:
    """Two lists, as YAML is read without loading any of them."""
    (known,) = [m.known for m in Eval.model_fields["grader"].metadata if isinstance(m, OneOf)]
    assert known == ("auto", *GRADERS)
