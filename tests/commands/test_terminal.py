"""A console that fits where it prints to."""

import io

import pytest
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from onpath.commands.terminal import coloured, console_for, few_colours, legend
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


VGA = {
    "bright_white": (255, 255, 255),
    "bright_yellow": (255, 255, 85),
    "bright_red": (255, 85, 85),
    "red": (170, 0, 0),
}
XTERM = {
    "bright_white": (255, 255, 255),
    "bright_yellow": (255, 255, 0),
    "bright_red": (255, 0, 0),
    "red": (205, 0, 0),
}


def luminance(rgb: tuple[int, int, int]) -> float:
    linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_what_others_wrote_is_shown_and_not_obeyed() -> None:
    """`Text` too, which no `str` passes on its way."""
    stream = io.StringIO()
    console = console_for(stream)
    table = Table()
    table.add_column("what")
    table.add_row(Text("in a table\x1b[31m"))
    for hostile in (Text("a\x1b[8mb", style="bold"), Text("c\u202ed"), "e\x1b]0;title\x07f", table):
        console.print(hostile)
    said = stream.getvalue()
    assert "\x1b" not in said
    assert "\u202e" not in said
    assert "a⟨001B⟩[8mb" in said
    assert "c⟨202E⟩d" in said
    assert "in a table⟨" in said, "cut to its column, as the width was of less"


@pytest.mark.parametrize(
    ("quantity", "values", "marked", "told"),
    [
        ("reverse_kl", [0.5, 2.0], "a⟦b 2.0⟧", "⟦token 2.3⟧: reverse_kl of 1 nat or more"),
        ("teacher_logp", [-0.5, -2.0], "a⟦b -2.0⟧", "⟦token −2.3⟧: teacher_logp of −1 nat or less"),
        ("advantages", [0.5, -2.0], "a⟦b -2.0⟧", "⟦token 2.3⟧: advantages of 1 nat or more"),
        ("weights", [1.0, 2.5], "a⟦b 2.5⟧", "⟦token 2.3⟧: a weight off 1 by 1 or more"),
    ],
)
def test_what_is_marked_without_colour(quantity: str, values: list[float], marked: str, told: str) -> None:
    assert coloured(["a", "b"], values, quantity=quantity, colour=False).plain == marked
    assert legend(console_for(io.StringIO()), quantity).plain == told


@pytest.mark.parametrize(
    ("quantity", "values"),
    [("student_entropy", [0.05, 2.0]), ("student_logp", [-0.05, -2.0]), ("weights", [1.05, 3.0])],
)
def test_what_is_coloured(quantity: str, values: list[float]) -> None:
    text = coloured(["a", "b"], values, quantity=quantity)
    assert [(span.start, span.end) for span in text.spans] == [(1, 2)]
    assert text.spans == coloured(["a", "b"], [0.05, 2.0]).spans


@pytest.mark.parametrize("palette", [VGA, XTERM], ids=["vga", "xterm"])
def test_sixteen_colours_are_an_ordered_scale(palette: dict[str, tuple[int, int, int]]) -> None:
    """The larger a value, the darker: no step back, and more than two steps."""
    values = [0.1 + i * 0.05 for i in range(100)]
    shades = []
    for span in coloured(["x"] * len(values), values, few=True).spans:
        assert isinstance(span.style, Style)
        assert span.style.bgcolor is not None
        assert span.style.bgcolor.type.name == "STANDARD", "nothing that a terminal must bring down to 16"
        shades.append(luminance(palette[span.style.bgcolor.name]))
    assert shades == sorted(shades, reverse=True)
    assert len(set(shades)) == 4


def test_a_terminal_of_sixteen_colours_is_known() -> None:
    consoles = {
        system: Console(color_system=system, force_terminal=True, file=io.StringIO())  # type: ignore[arg-type]
        for system in ("standard", "256", "truecolor")
    }
    assert {name: few_colours(console) for name, console in consoles.items()} == {
        "standard": True,
        "256": False,
        "truecolor": False,
    }
    plain = {name: str(legend(console, "KL").spans) for name, console in consoles.items()}
    assert plain["standard"] != plain["256"] == plain["truecolor"]


def test_brackets_in_names_are_no_markup() -> None:
    stream = io.StringIO()
    console, name = console_for(stream), "runs/a[bold] [/x] data[val].jsonl"
    table = Table(name, title=name)
    table.add_row(name)
    console.print(name, table)
    assert stream.getvalue().count(name) == 4


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
