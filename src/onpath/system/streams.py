"""A stream for people, who may be gone: the reader of a pipe has left, the terminal is closed."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


class Steady:
    """Writes to a text stream; once that fails, what is said goes nowhere, and the work goes on.

    Args:
        stream: its descriptor is turned to the null device when it fails, so that nobody else fails on it.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        with _surviving(self.stream):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with _surviving(self.stream):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def _surviving(stream: TextIO) -> Iterator[None]:
    try:
        yield
    except OSError:
        silence(stream)


def silence(stream: TextIO) -> None:
    """Turns a broken stream to the null device: Python flushes it once more at its end, which would fail."""
    with suppress(OSError, ValueError, AttributeError):  # a stream without a descriptor has nothing to turn
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say(text: str) -> None:
    """One line on stderr, if anybody listens."""
    steady = Steady(sys.stderr)
    steady.write(f"{text}\n")
    steady.flush()
