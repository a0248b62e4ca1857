"""The process that reads maths answers: JSON lines in, JSON lines out. Started by `onpath.grade`.

math-verify parses with regular expressions, ANTLR and sympy, which a model's text can make slow, huge or
fatal. Here that costs one process, and nothing else: it has no secrets in its environment, cannot write
files, start programs or open connections, and the kernel ends it when an answer takes too long, even if its
parent is gone. Run by path, so that only the standard library and math-verify are imported.
"""

import json
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable
from functools import lru_cache
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
MATHS_MARKS = ("$", "\\boxed", "\\(", "\\[")
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
    """math-verify as a function of (text, answer); `read` is False where one side has no maths."""
    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)  # it warns that its own time limits are off; ours are better

    def parsed(text: str) -> list[Any]:
        return list(parse(text, parsing_timeout=None))

    @lru_cache(maxsize=1024)
    def gold(answer: str) -> list[Any]:
        # Bare LaTeX such as \sqrt{2} is maths only inside marks.
        if not any(mark in answer for mark in MATHS_MARKS):
            boxed = parsed(f"\\boxed{{{answer}}}")
            if any(not isinstance(value, str) for value in boxed):
                return boxed
        return parsed(answer)

    def judge(text: str, answer: str) -> dict[str, Any]:
        expected, found = gold(answer), parsed(text)
        if not expected or not found:
            return {"correct": False, "extracted": None, "read": False}
        # The last entry is the text that was matched; printing an expression could evaluate 10**10**10.
        extracted = found[-1][:EXTRACTED_CHARACTERS] if isinstance(found[-1], str) else None
        correct = bool(verify(expected, found, timeout_seconds=None))
        return {"correct": correct, "extracted": extracted, "read": True}

    judge("\\boxed{\\frac{1}{2}}", "0.5")  # imports what is imported late
    return judge


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
