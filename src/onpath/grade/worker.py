"""The process that reads maths answers: JSON lines in, JSON lines out. Started by `onpath.grade`.

math-verify parses with regular expressions, ANTLR and sympy, which a model's text can make slow, huge or
fatal. Here that costs one process, and nothing else: it has no secrets in its environment, cannot write
files, start programs or open connections, and the kernel ends it when an answer takes too long, even if its
parent is gone. Run by path, so that only the standard library, math-verify and `rules.py` beside this file
are loaded.
"""

import importlib.util
import json
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

# fmt: off
FORBIDDEN = (
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.startfile", "os.kill",
    "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate",
    "os.chmod", "os.chown", "subprocess.", "socket.", "shutil.", "pty.", "ftplib.", "smtplib.",
    "urllib.", "webbrowser.",
)
# fmt: on
"""Audit events (prefixes) that reading an answer never needs."""
DECIMAL_SHARE = 2e-6
"""By which a decimal may differ from a value: 0.333333 is a third, 0.33333 is not."""
EXACT_SHARE = 1e-12
EXTRACTED_CHARACTERS = 200


def main(cpu_seconds: float, wall_seconds: float, memory_bytes: int) -> None:
    """Answers requests until the input ends. The first line out says that the process is ready."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    for alarm in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(alarm, signal.SIG_DFL)  # ends the process, also inside C code
    judge = load_judge()
    lock_down(memory_bytes)
    _reply(replies, {"ready": True})
    for line in requests:
        request = json.loads(line.decode("utf-8", "surrogatepass"))
        # CPU time, so that a busy machine does not turn right answers wrong; wall time for what waits.
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        signal.setitimer(signal.ITIMER_REAL, wall_seconds)
        try:
            reply = judge(request["text"], request["answer"])
        except Exception:  # whatever a parser raises on a model's text, the text is no answer
            reply = {"correct": False, "extracted": None, "read": True}
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _reply(replies, reply)


def _reply(file: Any, value: dict[str, Any]) -> None:
    file.write(json.dumps(value).encode() + b"\n")
    file.flush()


def load_judge() -> Callable[[str, str], dict[str, Any]]:
    """The rules around math-verify as a function of (text, answer); `read` is False where one side has no
    maths."""
    from math_verify import parse, verify
    from math_verify.parser import LatexExtractionConfig, NormalizationConfig

    logging.disable(logging.CRITICAL)  # it warns that its own time limits are off; ours are better
    rules = load_rules()
    # Units are ours: math-verify drops what looks like one, and makes 2 of 2t.
    plain = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all"
    )
    # LaTeX alone: the other reader takes the last number of what it cannot read for the answer.
    boxed = (LatexExtractionConfig(normalization_config=plain),)

    def maths(value: str) -> list[Any]:
        if parts := rules.alternatives(value):
            return [united] if (united := union([maths(part) for part in parts])) is not None else []
        return list(parse(f"\\boxed{{{rules.exact(value)}}}", boxed, parsing_timeout=None))

    @lru_cache(maxsize=1024)
    def gold(value: str) -> list[Any]:
        return maths(value)

    def equal(expected: list[Any], found: list[Any]) -> bool:
        # Strings are what could not be parsed, and were compared as text before.
        wanted, given = ([v for v in side if not isinstance(v, str)] for side in (expected, found))
        return any(
            (verify(w, g, timeout_seconds=None, allow_set_relation_comp=True) and close(w, g)) or large(w, g)
            for w in wanted
            for g in given
        )

    def judged(candidate: str, reference: str) -> tuple[bool, bool]:
        """Whether it is right, and whether it could be read."""
        ours, theirs = rules.clean(candidate), rules.clean(reference)
        verdict = rules.compared(ours, theirs)
        if verdict is not None:
            return verdict, True
        given, wanted = rules.written(ours), rules.written(theirs)
        found = maths(given.value)
        readable = any(not isinstance(v, str) for v in found)
        right = readable and equal(gold(wanted.value), found)
        if readable and (given.percent is None) is not (wanted.percent is None):
            right |= equal(gold(wanted.percent or wanted.value), maths(given.percent or given.value))
        return right, readable

    def judge(text: str, answer: str) -> dict[str, Any]:
        reference = rules.meant(answer)
        box = rules.boxed(text)
        candidates = rules.stated(text) if box is None else [box]
        for candidate in candidates:
            right, readable = (
                judged(rules.meant(candidate.text), reference) if candidate.text else (False, True)
            )
            words = rules.is_words(rules.clean(candidate.text))
            if right or (candidate.sure and readable and (box is not None or not words)):
                return _verdict(right, candidate.text)
        if box is not None:
            return _verdict(False, box.text)
        return anywhere(text, reference)

    def anywhere(text: str, reference: str) -> dict[str, Any]:
        """The last thing in a text without a box that math-verify finds."""
        cleaned = rules.clean(reference)
        piece = rules.last_maths(text)
        if piece is not None and judged(piece, reference)[0]:
            return _verdict(True, piece)
        if not rules.is_maths(cleaned):
            return {"correct": False, "extracted": None, "read": False}
        wanted, found = rules.written(cleaned), list(parse(text, parsing_timeout=None))
        expected = gold(wanted.value)
        if not found or not expected:
            return {"correct": False, "extracted": None, "read": False}
        # The last entry is the text that was matched; printing an expression could evaluate 10**10**10.
        extracted = found[-1] if isinstance(found[-1], str) else None
        same_unit = rules.may_have_unit(text, extracted or "", wanted.unit)
        return _verdict(same_unit and equal(expected, found), extracted)

    judge("\\boxed{\\frac{1}{2}}", "0.5")  # imports what is imported late
    judge("\\boxed{x<1\\text{ or }x>2}", "(-\\infty,1)\\cup(2,\\infty)")
    return judge


def percent(value: Any) -> bool:
    """Whether it is n%, which math-verify takes for n/100 and for n."""
    from math_verify.grader import Mul, Rational, UnevaluatedExpr

    return isinstance(value, Mul) and UnevaluatedExpr(Rational(1, 100)) in value.args


def large(a: Any, b: Any) -> bool:
    """Whether large numbers, one of them a decimal, are equal: six places after the point cannot say it."""
    from math_verify.parser import sympy

    if not isinstance(a, sympy.Expr) or not isinstance(b, sympy.Expr) or a.free_symbols or b.free_symbols:
        return False
    try:
        return (
            (a.has(sympy.Float) or b.has(sympy.Float))
            and 1e6 < abs(complex(a.evalf(30))) < 1e300
            and nearly(a, b)
        )
    except (TypeError, ValueError, OverflowError):
        return False


def nearly(a: Any, b: Any) -> bool:
    """Equal but for the last digits of a float."""
    x, y = complex(a.doit().evalf(30)), complex(b.doit().evalf(30))
    return abs(x - y) <= EXACT_SHARE * max(abs(x), abs(y))


def load_rules() -> Any:
    """`rules.py` beside this file, by its path: onpath itself is not imported."""
    spec = importlib.util.spec_from_file_location("rules", Path(__file__).with_name("rules.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["rules"] = module  # where dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _verdict(correct: bool, extracted: str | None) -> dict[str, Any]:
    shown = None if extracted is None else extracted[:EXTRACTED_CHARACTERS]
    return {"correct": correct, "extracted": shown, "read": True}


def union(parts: list[list[Any]]) -> Any:
    """The set that inequalities with `or` between them describe; None if one is no inequality."""
    from math_verify.parser import sympy

    relations = [
        next((v for v in part if isinstance(v, sympy.core.relational.Relational)), None) for part in parts
    ]
    if not all(r is not None and len(r.free_symbols) == 1 for r in relations):
        return None
    return sympy.Union(*(r.as_set() for r in relations if r is not None))


def close(a: Any, b: Any) -> bool:
    """Whether values that math-verify calls equal are. It rounds to six places and chops small numbers, so
    that 10^{-20} and 10^{-30} are one to it; what has no value here stays as it says.
    """
    from math_verify.grader import Basic, Eq, Float, Interval, MatrixBase, Tuple, default_sort_key
    from math_verify.grader import SympyFiniteSet as FiniteSet

    a, b = (x.rhs if isinstance(x, Eq) else x for x in (a, b))
    if a == b or percent(a) or percent(b):
        return True
    if isinstance(a, Interval) and isinstance(b, Interval):
        return close(a.start, b.start) and close(a.end, b.end)
    if isinstance(a, Interval | Tuple | FiniteSet) and isinstance(b, Interval | Tuple | FiniteSet):
        sides = [[x.start, x.end] if isinstance(x, Interval) else list(x.args) for x in (a, b)]
        if isinstance(a, FiniteSet) or isinstance(b, FiniteSet):
            sides = [sorted(s, key=lambda x: default_sort_key(x.evalf())) for s in sides]
        return len(sides[0]) != len(sides[1]) or all(close(x, y) for x, y in zip(*sides, strict=True))
    if isinstance(a, MatrixBase) and isinstance(b, MatrixBase):
        return a.shape == b.shape and all(close(x, y) for x, y in zip(a, b, strict=True))
    if not isinstance(a, Basic) or not isinstance(b, Basic):
        return True
    try:
        # Free symbols get values of no special kind, so that coefficients are compared too.
        names = sorted((a.free_symbols | b.free_symbols), key=str)
        values = {s: 0.7320508 + 0.4142135 * i for i, s in enumerate(names)}
        x, y = (complex(side.doit().evalf(30, subs=values)) for side in (a, b))
    except (TypeError, ValueError, AttributeError, OverflowError, ArithmeticError):
        return True
    if a.has(Float) or b.has(Float):
        return abs(x - y) <= DECIMAL_SHARE * max(abs(x), abs(y))
    return abs(x - y) <= EXACT_SHARE * max(abs(x), abs(y))


def lock_down(memory_bytes: int) -> None:
    """Limits and prohibitions, for good."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)  # a stray print must not enter the replies
    limits = {resource.RLIMIT_AS: memory_bytes, resource.RLIMIT_FSIZE: 0, resource.RLIMIT_CORE: 0}
    if sys.platform == "darwin":
        del limits[resource.RLIMIT_AS]  # macOS refuses it: a process maps hundreds of GB there
    for limit, value in limits.items():
        _, hard = resource.getrlimit(limit)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))
    sys.addaudithook(_refuse)


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    flags = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    writes = event == "open" and isinstance(arguments[2], int) and bool(arguments[2] & flags)
    if writes or event.startswith(FORBIDDEN):
        os._exit(77)


if __name__ == "__main__":
    main(float(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
