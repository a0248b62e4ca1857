"""Tokens on a terminal: coloured by a number each, or marked where there is no colour."""

from collections.abc import Sequence

from rich.console import Console
from rich.style import Style
from rich.text import Text

_LOW, _HIGH = 0.1, 4.0
"""Nats: below _LOW a token stays plain, from _HIGH on it has the full colour."""
_RAMP = ((255, 243, 214), (254, 217, 142), (254, 153, 41), (217, 95, 14), (153, 52, 4))
"""Light to dark orange (ColorBrewer's YlOrBr): one hue, ordered by lightness, safe for colour-blind eyes."""


def coloured(tokens: Sequence[str], values: Sequence[float], *, colour: bool = True) -> Text:
    """Tokens with a background by value (nats); without colour ⟦token value⟧ from 1 nat on."""
    text = Text()
    for token, value in zip(tokens, values, strict=True):
        shown = token.replace("\n", "⏎\n")
        if not colour:
            text.append(f"⟦{shown.strip()} {value:.1f}⟧" if value >= 1.0 else shown)
        elif value < _LOW:
            text.append(shown)
        else:
            text.append(shown, style=_style(value))
    return text


def _style(value: float) -> Style:
    share = min(1.0, (value - _LOW) / (_HIGH - _LOW))
    red, green, blue = _RAMP[round(share * (len(_RAMP) - 1))]
    return Style(color="black" if share < 0.7 else "white", bgcolor=f"rgb({red},{green},{blue})")


def legend(console: Console, quantity: str) -> Text:
    """What the colours mean."""
    if console.color_system is None:
        return Text(f"⟦token 2.3⟧: {quantity} of 1 nat or more")
    text = Text(f"{quantity}, nats: ")
    for value in (0.0, 0.2, 1.0, 2.0, 3.0, 4.0):
        text.append(f" {value:g} ", style=_style(value) if value >= _LOW else "")
    return text
