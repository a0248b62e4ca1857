"""SIGTERM (a batch system's time is up) and SIGHUP (the terminal is gone): asked to stop, not stopped."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any


class Stopped(SystemExit):
    """A process was asked to end and has saved what it had: exit code 0."""

    def __init__(self, sentence: str) -> None:
        super().__init__(0)
        self.sentence = sentence


class Requests:
    """Whether somebody has asked this process to stop."""

    def __init__(self) -> None:
        self.name = ""
        """Of the first signal; empty: none came."""

    def __bool__(self) -> bool:
        return bool(self.name)


@contextmanager
def stop_requests() -> Iterator[Requests]:
    """Notes the first SIGTERM or SIGHUP instead of dying of it; the second one kills as ever. A signal that
    is ignored (nohup) stays so. Outside the main thread nothing changes: signals arrive there.
    """
    asked, before = Requests(), dict[int, Any]()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        asked.name = signal.Signals(number).name
        restore()

    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            with suppress(AttributeError):  # Windows knows no SIGHUP
                number = getattr(signal, name)
                if signal.getsignal(number) == signal.SIG_DFL:
                    before[number] = signal.signal(number, note)
    try:
        yield asked
    finally:
        restore()
