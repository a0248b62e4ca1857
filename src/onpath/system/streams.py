"""A stream for people, who may be gone: the reader of a pipe has left, the terminal is closed."""

import os
import sys
from contextlib import suppress
from typing import Any, TextIO


class Steady:
    """Writes to a text stream; once that fails, what is said goes nowhere, and the work goes on.

    Args:
        stream: its descriptor is turned to the null device when it fails, so that nobody else fails on it.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        with self._surviving():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._surviving():
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def _surviving(self) -> "_Surviving":
        return _Surviving(self.stream)


class _Surviving:
    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> bool:
        if isinstance(error, OSError):
            silence(self.stream)
        return isinstance(error, OSError)


def silence(stream: TextIO) -> None:
    """Turns a broken stream to the null device: Python flushes it once more at its end, which would fail."""
    with suppress(OSError, ValueError, AttributeError):  # a stream without a descriptor has nothing to turn
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say(text: str) -> None:
    """One line on stderr, if anybody listens."""
    steady = Steady(sys.stderr)
    steady.write(f"{text}\n")
    steady.flush()
