"""The maze's language.

>>> LANGUAGE.tokenize("a: cf; c: #; a?")
['a: ', 'c', 'f', '; ', 'c: ', '#', '; ', 'a', '?']
"""

from onpath.gym.language import GIVEN, REDO, TRIED, Language

ROOMS = tuple("abcdefghijklmnopqrstuvwxyz")
HEADS = tuple(f"{room}: " for room in ROOMS)
"""`c: ` opens the line that says what is behind the doors of `c`."""
WALL, EXIT = "#", "!"
DEFINED = "; "
SEPARATORS = (". ", ", ", " | ")
GOES = ("go ", "take ")
YES, NO = (" yes", " open"), (" no", " shut")
"""A verdict on a door, each in two forms that mean the same."""
ONSET_WORDS = ("wait ",)
OUT, STUCK = "out", "stuck"

LANGUAGE = Language(
    (
        *ROOMS,
        *HEADS,
        WALL,
        EXIT,
        DEFINED,
        *SEPARATORS,
        *GOES,
        *YES,
        *NO,
        *ONSET_WORDS,
        OUT,
        STUCK,
        "?",
        GIVEN,
        TRIED,
        REDO,
    ),
    longest=1024,
)
