"""A console that fits where it prints to; tokens coloured by a number each, or marked where there is no
colour.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, TextIO, TypeVar

from rich.console import Console
from rich.segment import Segment
from rich.style import Style
from rich.text import Text

from onpath.commands.report.text import diff
from onpath.system.text import named_controls, visible

T = TypeVar("T")
_LOW, _HIGH = 0.1, 4.0
"""Nats: below _LOW a token stays plain, from _HIGH on it has the full colour. A log-prob's size counts."""
_WEIGHTS = "weights"
"""What is no number of nats: the distance from 1 counts."""
_RAMP = ((255, 243, 214), (254, 217, 142), (254, 153, 41), (217, 95, 14), (153, 52, 4))
"""Light to dark orange (ColorBrewer's YlOrBr): one hue, ordered by lightness, safe for colour-blind eyes."""
_FEW = ("bright_white", "bright_yellow", "bright_red", "red")
"""Of a terminal with 16 colours those that are ordered by lightness in every common palette; the nearest ones
to _RAMP are not."""

_MOST_LINKS = 3
_ENDLESS = 10_000
"""Characters of a line in a file or a pipe."""


class Shown(Console):
    """Whatever text it is given, a terminal shows it and does not obey it, nor does it read [it] as markup:
    names, answers, ids and responses of others are in most lines."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """See `rich.console.Console.render_str`: cells of tables are fitted to what is shown."""
        return super().render_str(named_controls(text), **options)

    def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
        """See `rich.console.Console.render`: everything passes here, `Text` too."""
        for part in super().render(renderable, options):
            yield part if part.control else Segment(named_controls(part.text), part.style)


def console_for(stream: TextIO) -> Console:
    """As wide as the terminal; a file or a pipe cuts nothing off, and has no colour."""
    console = Shown(file=stream)
    return console if console.is_terminal else Shown(file=stream, width=_ENDLESS, color_system=None)


def few_colours(console: Console) -> bool:
    """Whether it has 16 colours, which are its user's own."""
    return console.color_system in ("standard", "windows")


def coloured(
    tokens: Sequence[str],
    values: Sequence[float],
    *,
    weights: Sequence[float] | None = None,
    quantity: str = "",
    colour: bool = True,
    few: bool = False,
) -> Text:
    """Tokens with a background by the size of their value (nats; of weights: off 1), of 16 colours if there
    are `few`; without colour ⟦token value⟧ from a size of 1 on. Those of weight 0 are not trained on, and
    have neither."""
    text = Text()
    for token, value, weight in zip(tokens, values, weights or [1.0] * len(tokens), strict=True):
        shown, size = visible(token), abs(value - 1.0 if quantity == _WEIGHTS else value)
        if not weight:
            text.append(shown, style="dim" if colour else "")
        elif not colour:
            text.append(f"⟦{shown.strip()} {value:.1f}⟧" if size >= 1.0 else shown)
        elif size < _LOW:
            text.append(shown)
        else:
            text.append(shown, style=_style(size, few=few))
    return text


def _style(value: float, *, few: bool = False) -> Style:
    share = min(1.0, (value - _LOW) / (_HIGH - _LOW))
    if few:
        step = round(share * (len(_FEW) - 1))
        return Style(color="bright_white" if _FEW[step] == "red" else "black", bgcolor=_FEW[step])
    red, green, blue = _RAMP[round(share * (len(_RAMP) - 1))]
    return Style(color="black" if share < 0.7 else "white", bgcolor=f"rgb({red},{green},{blue})")


def legend(console: Console, quantity: str) -> Text:
    """What the colours mean."""
    sign = "−" if quantity.endswith("_logp") else ""
    if console.color_system is None and quantity == _WEIGHTS:
        return Text("⟦token 2.3⟧: a weight off 1 by 1 or more")
    if console.color_system is None:
        return Text(f"⟦token {sign}2.3⟧: {quantity} of {sign}1 nat or {'less' if sign else 'more'}")
    text = Text("weights, off 1 by: " if quantity == _WEIGHTS else f"{quantity}, nats: ")
    for value in (0.0, 0.2, 1.0, 2.0, 3.0, 4.0):
        style = _style(value, few=few_colours(console)) if value >= _LOW else ""
        text.append(f" {sign if value else ''}{value:g} ", style=style)
    return text


def written(tokens: Sequence[str], writers: Sequence[str], *, colour: bool = True) -> Iterator[Text]:
    """What the student did not write, and where: `teacher 4-5 ‘so 7’`."""
    runs = [f"{who} {where}" for who, where in _runs(tokens, writers) if who != "student"]
    if runs:
        yield Text(f"  written by {', '.join(runs)}", style="dim" if colour else "")


def left_out(tokens: Sequence[str], weights: Sequence[float], *, colour: bool = True) -> Iterator[Text]:
    """Where the weight is 0: `not trained on: 0-2 ‘so 7’`."""
    runs = [where for counts, where in _runs(tokens, [bool(w) for w in weights]) if not counts]
    if runs:
        yield Text(f"  not trained on: {', '.join(runs)}", style="dim" if colour else "")


def _runs(tokens: Sequence[str], marks: Sequence[T]) -> Iterator[tuple[T, str]]:
    """Tokens of one mark that stand together: the mark, and `4-5 ‘so 7’`."""
    at = 0
    for mark, run in groupby(marks):
        start, at = at, at + len(list(run))
        places = f"{start}" if at == start + 1 else f"{start}-{at - 1}"
        yield mark, f"{places} ‘{visible(''.join(tokens[start:at]))}’"


def rewritten(y: Sequence[str], z: Sequence[str], *, colour: bool = True) -> Iterator[Text]:
    """y → z in one line: what z dropped struck out, what it wrote underlined; without colour [-y-]{+z+}."""
    text = Text("y → z: ", style="dim" if colour else "")
    for tag, a, b, c, d in diff(y, z):
        dropped, written = (visible("".join(part)) for part in (y[a:b], z[c:d]))
        if tag == "equal":
            text.append(written, style=Style(dim=False))
            continue
        if dropped:
            text.append(dropped if colour else f"[-{dropped}-]", style="blue strike" if colour else "")
        if written:
            text.append(
                written if colour else f"{{+{written}+}}", style="bold yellow underline" if colour else ""
            )
    yield text


def forks(found: Sequence[Mapping[str, Any]], *, colour: bool = True) -> Iterator[Text]:
    """Each candidate with its numbers, both futures one above the other, and what the transport matches."""
    for fork in found:
        if fork["decision"] == "reference":
            continue
        mark = "◆" if fork["decision"] == "fork" else "□"
        head = f"  {mark} token {fork['position']}: {fork['decision'].replace('_', ' ')}  "
        numbers = f"loss {fork['loss']:.2f}  D {fork['distance']:.3f}  gap {fork['sampled_gap']:+.2f}"
        yield Text(head + numbers, style="bold" if colour and mark == "◆" else "")
        ours, theirs = fork["student_tokens"], fork["teacher_tokens"]
        for who, tokens, others in (("student", ours, theirs), ("teacher", theirs, ours)):
            line = Text(f"      {who} … ", style="dim" if colour else "")
            for i, token in enumerate(tokens):
                apart = i >= len(others) or others[i] != token
                line.append(visible(token), style="bold yellow" if colour and apart else Style(dim=False))
            yield line
        moved = [entry for entry in fork["plan"] if ours[int(entry[0])] != theirs[int(entry[1])]]
        links = [
            f"‘{visible(ours[int(i)])}’ → ‘{visible(theirs[int(j)])}’ {share:.0%}"
            for i, j, share in sorted(moved, key=lambda entry: -entry[2])[:_MOST_LINKS]
        ]
        if links:
            yield Text(f"      transport {', '.join(links)}", style="dim" if colour else "")
