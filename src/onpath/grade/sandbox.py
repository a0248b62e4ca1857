"""Runs programs of models in processes of their own: `code_worker.py`, confined by `seccomp.py`."""

import contextlib
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import IO, Any

from onpath.grade import code_worker
from onpath.grade.base import ENVIRONMENT
from onpath.system import code as own_code
from onpath.system.errors import UserError, say_once

PYTHON = sys.executable
_BEGIN = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("code_worker", sys.argv[1])
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)
sys.exit(worker.main(json.loads(sys.argv[2])))
"""
"""Python keeps a module compiled, but not a script."""
_LONGEST_VERDICT = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one program may take on one input, or for all of its function tests.

    >>> Limits(cpu_seconds=2).wall_seconds
    20.0
    """

    cpu_seconds: int = 5
    """CPU time, so that a busy machine does not turn right programs wrong; of the tests' process as well."""
    wall_seconds: float = 20.0
    """For what waits."""
    memory_bytes: int = 1 << 30
    """Address space; shared memory there is none."""
    output_bytes: int = 1 << 24
    """What a script may print."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a program.

    >>> Outcome(passed=False, reason="time is up").fault
    False
    """

    passed: bool
    reason: str
    """For people."""
    fault: bool = False
    """The tests cannot be used, whatever the program does."""


_TOO_LONG = Outcome(passed=False, reason="time is up")


@cache
def confinement() -> str:
    """Why programs cannot be confined on this machine; empty: they can be. Tried once, with an empty one."""
    with _source({"program": ""}) as source:
        spec = _spec("script", source, Limits(), confined=True)
        tried = subprocess.run(
            _command(spec),
            pass_fds=[source.fileno()],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            **_apart(),
        )
    if tried.returncode == code_worker.UNCONFINED:
        return str(tried.stderr.strip())
    if tried.returncode:
        words = (tried.stderr.strip().splitlines() or ["it ended without a message"])[-1]
        raise RuntimeError(f"the process that runs programs does not start: {words}")
    return ""


def is_confined() -> bool:
    """Whether programs will be confined.

    Raises:
        UserError: they cannot be, and nobody has said that code may run.
    """
    reason = confinement()
    if reason and not own_code.is_allowed():
        raise UserError(
            f"eval.grader: code cannot confine programs on this machine ({reason}): they could change your "
            "files and use the network; grade on Linux, or add --allow-code to run them with limits of time "
            "alone"
        )
    if reason:
        say_once(f"onpath: programs of the model run unconfined, with limits of time alone: {reason}")
    return not reason


def run_script(program: str, text: str, limits: Limits, *, confined: bool) -> tuple[Outcome, str]:
    """Runs a program as a script on a text as its standard input.

    Returns:
        Whether it ended by itself without an error, and what it printed.
    """
    with (
        _source({"program": program}) as source,
        tempfile.TemporaryFile() as given,
        tempfile.TemporaryFile() as printed,
    ):
        given.write(text.encode("utf-8", "replace"))
        given.seek(0)
        spec = _spec("script", source, limits, confined=confined)
        process = _start(spec, [source.fileno()], stdin=given, stdout=printed)
        with _ended(process):
            code = _wait(process, limits.wall_seconds)
        if code is None:
            return _TOO_LONG, ""
        printed.seek(0)
        output = printed.read(limits.output_bytes + 1).decode("utf-8", "replace")
    return Outcome(passed=code == 0, reason="it ended" if code == 0 else f"it ended with {code}"), output


def run_tests(program: str, tests: Mapping[str, Any], limits: Limits, *, confined: bool) -> Outcome:
    """Runs function tests on a program, in two processes that share two pipes.

    Args:
        tests: see `code_worker.judge`.
    """
    with contextlib.ExitStack() as stack:
        asked, replies, verdict = (_Pipe(stack) for _ in range(3))
        sides: Sequence[tuple[str, Mapping[str, Any], int, int, list[int]]] = (
            ("program", {"program": program}, asked.reading, replies.writing, []),
            ("tests", tests, replies.reading, asked.writing, [verdict.writing]),
        )
        text = program + json.dumps(tests)
        modules = [name for name in code_worker.MODULES if name in text]
        for role, given, reading, writing, more in sides:
            source = stack.enter_context(_source(given))
            spec = _spec(role, source, limits, confined=confined, peer=[reading, writing])
            spec |= {"file_bytes": 0, "verdict": verdict.writing, "modules": modules}
            fds = [source.fileno(), reading, writing, *more]
            stack.enter_context(_ended(_start(spec, fds)))
        for pipe in (asked, replies):
            pipe.close()
        verdict.close(reading=False)
        said = _read(verdict.reading, time.monotonic() + limits.wall_seconds)
    if said is None:
        return _TOO_LONG
    try:
        return Outcome(**json.loads(said))
    except (ValueError, TypeError):
        return Outcome(passed=False, reason="the tests did not end: too much time or memory")


class _Pipe:
    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.reading, self.writing = os.pipe()
        self._open = {self.reading, self.writing}
        stack.callback(self.close)

    def close(self, *, reading: bool = True) -> None:
        for end in self._open - (set() if reading else {self.reading}):
            os.close(end)
            self._open = self._open - {end}


@contextlib.contextmanager
def _source(given: Mapping[str, Any]) -> Iterator[IO[bytes]]:
    """What a worker reads at its start, in a file without a name."""
    with tempfile.TemporaryFile() as file:
        file.write(json.dumps(given).encode())
        file.seek(0)
        yield file


def _spec(
    role: str, source: IO[bytes], limits: Limits, *, confined: bool, peer: Sequence[int] = ()
) -> dict[str, Any]:
    return {
        "role": role,
        "source": source.fileno(),
        "peer": list(peer),
        "modules": [],
        "confined": confined,
        "memory": limits.memory_bytes,
        "cpu": limits.cpu_seconds,
        "file_bytes": limits.output_bytes,
    }


def _command(spec: Mapping[str, Any]) -> list[str]:
    # -S: no site-packages; -P: a file named like a module must not be imported in its place.
    flags = ["-P", "-S", "-s", "-B", "-X", "utf8"]
    return [PYTHON, *flags, "-c", _BEGIN, code_worker.__file__, json.dumps(spec)]


def _apart() -> dict[str, Any]:
    """No secrets in its environment, no terminal, and nothing beside it."""
    kept = {key: os.environ[key] for key in ENVIRONMENT if key in os.environ and key != "PYTHONPATH"}
    return {"env": {**kept, "PYTHONHASHSEED": "0"}, "cwd": "/", "start_new_session": True}


def _start(spec: Mapping[str, Any], fds: Sequence[int], **files: Any) -> subprocess.Popen[bytes]:
    null = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    return subprocess.Popen(_command(spec), pass_fds=fds, **{**null, **files}, **_apart())


@contextlib.contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """At the end of the block there is no such process."""
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _wait(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """Its exit code; None: it is still there."""
    if hasattr(os, "pidfd_open"):  # `wait` would look in ever longer intervals
        descriptor = os.pidfd_open(process.pid)
        try:
            _is_ready(descriptor, seconds)
        finally:
            os.close(descriptor)
        return process.poll()
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def _read(descriptor: int, deadline: float) -> bytes | None:
    """All that is written until its end; None: that takes too long."""
    pieces = b""
    while _is_ready(descriptor, max(0.0, deadline - time.monotonic())):
        piece = os.read(descriptor, _LONGEST_VERDICT)
        if not piece or len(pieces) > _LONGEST_VERDICT:
            return pieces
        pieces += piece
    return None


def _is_ready(descriptor: int, seconds: float) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        return bool(selector.select(seconds))
