"""SIGTERM (a batch system's time is up), SIGHUP (the terminal is gone), SIGINT (Ctrl-C): asked to stop, not
stopped."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any


class Stopped(SystemExit):
    """A process was asked to end and has saved what it had: exit code 0."""

    def __init__(self, sentence: str) -> None:
        super().__init__(0)
        self.sentence = sentence


class Interrupted(KeyboardInterrupt):
    """Likewise by Ctrl-C: exit code 130, and to Python code an interrupt like any other."""

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence)
        self.sentence = sentence


class Requests:
    """Whether somebody has asked this process to stop."""

    def __init__(self) -> None:
        self.name = ""
        """Of the first signal; empty: none came."""

    def __bool__(self) -> bool:
        return bool(self.name)


_pressed: list[int] = []
"""Each Ctrl-C that `interrupts_noted` has seen."""


@contextmanager
def interrupts_noted() -> Iterator[list[int]]:
    """Ctrl-C does in this block what it always does, and is noted: in the middle of a library's imports it
    comes out as another error."""
    plain = threading.current_thread() is threading.main_thread()
    plain = plain and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    before = signal.signal(signal.SIGINT, _pressing) if plain else None
    _pressed.clear()
    try:
        yield _pressed
    finally:
        if plain:
            signal.signal(signal.SIGINT, before)


def _pressing(number: int, frame: FrameType | None) -> None:
    _pressed.append(number)
    signal.default_int_handler(number, frame)


_noted: list[Requests] = []
_TOGETHER = 0.3
"""Seconds within which signals of a kind are one: the others are ignored meanwhile."""


def asked_to_stop() -> str:
    """The signal by which this process was asked to stop while something notes it; empty: none came. From any
    thread."""
    return next((asked.name for asked in _noted if asked), "")


@contextmanager
def stop_requests() -> Iterator[Requests]:
    """Notes the first SIGTERM, SIGHUP or SIGINT instead of dying of it; another one of the same kind does
    what it always does, unless it comes with the first: a terminal, `timeout` or a batch system signals a
    process and its group, and that is asking once. Not a SIGTERM or SIGHUP under torchrun: a batch system
    signals a job's processes, of which torchrun is one and hands it on, and it kills by itself what does not
    end. A signal that is ignored (nohup), or that somebody handles, stays so. Outside the main thread nothing
    changes: signals arrive there.
    """
    asked, before = Requests(), dict[int, Any]()

    def note(number: int, frame: FrameType | None) -> None:
        ends = number == signal.SIGINT or "TORCHELASTIC_RUN_ID" not in os.environ
        if ends:
            signal.signal(number, signal.SIG_IGN)
        asked.name = asked.name or signal.Signals(number).name
        if number == signal.SIGINT:
            _say("onpath: stopping after this step, which will be saved; Ctrl-C again stops at once")
        if ends:
            time.sleep(_TOGETHER)
            signal.signal(number, before[number])

    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP", "SIGINT"):
            with suppress(AttributeError):  # Windows knows no SIGHUP
                number = getattr(signal, name)
                if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler, _pressing):
                    before[number] = signal.signal(number, note)
    _noted.append(asked)
    try:
        yield asked
    finally:
        _noted.remove(asked)
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(sentence: str) -> None:
    """On stderr, also where the signal came in the middle of another sentence."""
    with suppress(OSError):
        os.write(2, f"\n{sentence}\n".encode())
