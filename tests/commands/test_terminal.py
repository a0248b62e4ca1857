"""A console that fits where it prints to."""

import io

import pytest
from rich.console import Console
from rich.table import Table

from onpath.commands.terminal import console_for
from onpath.run.log import Display


def test_a_file_cuts_nothing_off_and_has_no_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    stream = io.StringIO()
    table = Table(box=None, pad_edge=False)
    row = [f"column{i:04}" for i in range(90)]
    for _ in row:
        table.add_column(no_wrap=True)
    table.add_row(*row)
    console_for(stream).print(table, style="bold red")
    assert stream.getvalue().split() == row
    assert stream.getvalue().strip().count("\n") == 0


def test_a_terminal_keeps_its_width_and_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for name, value in {"COLUMNS": "40", "TERM": "xterm-256color"}.items():
        monkeypatch.setenv(name, value)
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    stream = Terminal()
    console_for(stream).print("word " * 30, style="bold red")
    assert "\x1b[1;31m" in stream.getvalue()
    assert stream.getvalue().count("\n") > 2


@pytest.mark.parametrize("markup", [True, False])
def test_no_text_is_obeyed(markup: bool) -> None:
    """In a line, in a cell, in what a display says."""
    hostile, stream = "a\x1b[2Jb\u202ec", io.StringIO()
    console = console_for(stream)
    console.print(hostile, markup=markup)
    table = Table(hostile)
    table.add_row(hostile)
    console.print(table)
    Display(steps=1, done=0, console=Console(file=stream, width=200)).say(hostile)
    assert not set("\x1b\u202e") & set(stream.getvalue())
    assert stream.getvalue().count("a⟨001B⟩[2Jb⟨202E⟩c") == 4
