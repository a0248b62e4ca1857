"""The gym's language: some fifty tokens that carry their own spaces, so that text is their concatenation.

>>> tokenize("a: 35 + 47; a?")
['a: ', '3', '5', ' + ', '4', '7', '; ', 'a', '?']
"""

from onpath.gym.language import GIVEN, REDO, TRIED, Language

NAMES = tuple("abcdefgh")
HEADS = tuple(f"{name}: " for name in NAMES)
"""`c: ` opens the definition or the step of node `c`: one token, by which a step finds its definition."""
DIGITS = tuple("0123456789")
OPS = (" + ", " - ", " * ")
EQUALS = (" = ", " -> ")
SEPARATORS = ("; ", ", so ", ". then ")
ONSET_WORDS = ("wait ",)
"""Openings of a way back; the teacher's probability of them is the epistemic mass."""
ANSWER = "ans "

LANGUAGE = Language(
    (
        *DIGITS,
        *NAMES,
        *HEADS,
        *OPS,
        *EQUALS,
        *SEPARATORS,
        *ONSET_WORDS,
        ANSWER,
        "?",
        GIVEN,
        TRIED,
        REDO,
    ),
    longest=512,
)
TOKENS, IDS = LANGUAGE.tokens, LANGUAGE.ids
tokenize, encode, decode = LANGUAGE.tokenize, LANGUAGE.encode, LANGUAGE.decode
