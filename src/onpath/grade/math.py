"""`math`: math-verify in a process of its own with limits of time and memory, so that no text can hang, crash
or control a run.
"""

import atexit
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from functools import cache
from pathlib import Path
from typing import Any

from onpath.data.thinking import answer_part
from onpath.grade.base import ENVIRONMENT, Grader, Verdict
from onpath.grade.exact import ExactGrader

CPU_SECONDS = 2.0
"""CPU time that one answer may take."""
WALL_SECONDS = 8.0
"""Wall time that one answer may take."""
MEMORY_BYTES = 1 << 30
"""Address space of the grading process."""
START_SECONDS = 120.0
TEXT_CHARACTERS = 8000
"""math reads only the end of longer texts, where the answer stands. A request then fits a pipe's buffer."""
ANSWER_CHARACTERS = 1000
"""math compares longer reference answers as text."""


class MathGrader(Grader):
    """Right if the boxed or stated value equals the answer as maths (1/2 = 0.5 = \\frac{1}{2}): math-verify,
    and around it the rules of `rules.py` (docs/grading.md shows them).

    Only what follows the thinking is read (`data/thinking.py`). Where there is no maths in the text or in the
    answer (`Paris`), the rule of `exact` decides. A text that exceeds a limit of time or memory, or that
    crashes the process twice, is wrong, and so is a blank one. Safe to call from threads (one answer at a
    time) and after a fork.

    Args:
        cpu_seconds, wall_seconds: limits per answer.
        memory_bytes: address space of the process.
    """

    name = "math"

    def __init__(
        self,
        *,
        cpu_seconds: float = CPU_SECONDS,
        wall_seconds: float = WALL_SECONDS,
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        _watch_forks_and_exit()
        self._limits = (cpu_seconds, wall_seconds, memory_bytes)
        self._lock = threading.Lock()
        self._worker: _Worker | None = None

    def _judge(self, text: str, answer: str) -> Verdict:
        text = answer_part(text)
        if not text.strip() or not answer.strip():
            return Verdict(correct=False, extracted=None)
        if len(answer) > ANSWER_CHARACTERS:
            same = " ".join(answer.split()) in (" ".join(text.split()), _last_box(text))
            return Verdict(correct=True, extracted=answer) if same else ExactGrader()._judge(text, answer)
        reply = self._ask({"text": text[-TEXT_CHARACTERS:], "answer": answer})
        if not reply["read"]:
            return ExactGrader()._judge(text, answer)
        return Verdict(correct=reply["correct"], extracted=reply["extracted"])

    def stated(self, answer: str) -> str:
        """See `Grader.stated`."""
        return f"So the answer is \\boxed{{{answer}}}."

    def _ask(self, request: dict[str, str]) -> dict[str, Any]:
        with self._lock:
            for _ in range(2):  # the first loss may be another's doing: a worker killed from outside
                if self._worker is None:
                    self._worker = _Worker(*self._limits)
                    _open_graders.add(self)
                try:
                    return self._worker.ask(request)
                except _LostError as lost:
                    self._drop_worker()
                    if lost.timed_out:
                        break
                except BaseException:  # Ctrl-C between request and reply: the next reply would be this one's
                    self._drop_worker()
                    raise
            return {"correct": False, "extracted": None, "read": True}

    def _drop_worker(self) -> None:
        if self._worker is not None:
            self._worker.kill()
        self._worker = None
        _open_graders.discard(self)

    def close(self) -> None:
        with self._lock:
            self._drop_worker()

    def _forget_worker(self) -> None:
        """In a forked child: the worker is the parent's, and whoever held the lock may be gone."""
        self._lock = threading.Lock()
        if self._worker is not None:
            self._worker.abandon()
        self._worker = None


def _last_box(text: str) -> str:
    """From the last `\\boxed{` to the last brace, white space made single."""
    return " ".join(text.rpartition("\\boxed{")[2].rpartition("}")[0].split())


class _LostError(Exception):
    """The worker is gone, or must go."""

    def __init__(self, *, timed_out: bool) -> None:
        super().__init__()
        self.timed_out = timed_out


class _Worker:
    """A running `worker.py` and its pipes."""

    def __init__(self, cpu_seconds: float, wall_seconds: float, memory_bytes: int) -> None:
        self._patience = wall_seconds + 1.0  # the worker's own alarm comes first
        script = Path(__file__).with_name("worker.py")
        limits = [str(cpu_seconds), str(wall_seconds), str(memory_bytes)]
        environment = {key: os.environ[key] for key in ENVIRONMENT if key in os.environ}
        # -P: a file named like a module, here or beside the script, must not be imported in its place.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-B", str(script), *limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**environment, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            bufsize=0,
            start_new_session=True,  # Ctrl-C is for us: it ends with its input
        )
        self._buffer = b""
        try:
            self._reply(START_SECONDS)
        except _LostError:
            raise RuntimeError(f"the grading process does not start: {self._last_words()}") from None

    def ask(self, request: dict[str, str]) -> dict[str, Any]:
        assert self._process.stdin is not None
        line = json.dumps(request, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
        try:
            self._process.stdin.write(line)
        except BrokenPipeError:
            raise _LostError(timed_out=False) from None
        return self._reply(self._patience)

    def _reply(self, seconds: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise _LostError(timed_out=True)
                piece = os.read(self._process.stdout.fileno(), 1 << 16)
                if not piece:
                    raise _LostError(timed_out=self._process.wait() in (-signal.SIGPROF, -signal.SIGALRM))
                self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _last_words(self) -> str:
        self._process.kill()
        _, errors = self._process.communicate()
        self._close_pipes()
        return (errors.decode(errors="replace").strip().splitlines() or ["it ended without a message"])[-1]

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._close_pipes()

    def abandon(self) -> None:
        self._process.returncode = 0  # not our child: neither wait for it nor warn about it
        self._close_pipes()

    def _close_pipes(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()


_open_graders: set[MathGrader] = set()
_kept: dict[str, MathGrader] = {}


def _shared() -> MathGrader:
    """The grader of `grade`, made at first use; of threads that come at once, one's stays."""
    return _kept.get("shared") or _kept.setdefault("shared", MathGrader())


@cache
def _watch_forks_and_exit() -> None:
    """At the first grader, before it has a lock that a forked child could find held."""
    atexit.register(_close_all)
    os.register_at_fork(after_in_child=_forget_all)


def _close_all() -> None:
    for grader in list(_open_graders):
        grader.close()


def _forget_all() -> None:
    for grader in {*_open_graders, *_kept.values()}:  # the lock of the shared one even where it has no worker
        grader._forget_worker()
    _open_graders.clear()


def grade(text: str, answer: str) -> bool:
    """Whether the text's final answer equals `answer` as maths (the `math` grader, one shared process).

    >>> grade("so it is \\\\boxed{\\\\frac{1}{2}}", "0.5")
    True

    Raises:
        ValueError: the text or the answer is not a string.
    """
    return _shared().grade(text, answer).correct
