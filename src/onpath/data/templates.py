"""Privileged and rewrite prompts in our own words: user messages with slots, replaceable by
`method.template`."""

from collections.abc import Set
from string import Formatter

TEMPLATES = {
    "hint": (
        "{problem}\n\n"
        "For your eyes only, here is a worked solution that is known to be right:\n"
        "<reference>\n{solution}\n</reference>\n\n"
        "Study it until you see why every step holds. Then put it aside and solve the problem yourself, "
        "step by step and in your own words; do not quote it or mention that you have seen it. Give the "
        "final answer in the usual form."
    ),
    "hint_answer": (
        "{problem}\n\n"
        "For your eyes only: the right final answer is {answer}.\n\n"
        "Derive it yourself, step by step, and make sure that each step holds by itself; do not mention "
        "that you knew the answer. Give the final answer in the usual form."
    ),
    "rewrite": (
        "Below are a problem and an attempt at it. Write the attempt anew so that it is right.\n\n"
        "<problem>\n{problem}\n</problem>\n\n"
        "<attempt>\n{attempt}\n</attempt>\n\n"
        "Stay as close to the attempt as you can: the same approach, the same order of steps, the same "
        "tone. Leave every step that is right as it is. Where a calculation or an inference is wrong, "
        "correct it and carry the correction through all that follows. Write the rewritten solution only, "
        "without remarks about the attempt, and end with the final answer in the form that the problem asks "
        "for."
    ),
    "rewrite_with_reference": (
        "Below are a problem, a reference solution that is known to be right, and an attempt. Write the "
        "attempt anew so that it is right.\n\n"
        "<problem>\n{problem}\n</problem>\n\n"
        "<reference>\n{solution}\n</reference>\n\n"
        "<attempt>\n{attempt}\n</attempt>\n\n"
        "Stay as close to the attempt as you can: the same approach, the same order of steps, the same "
        "tone. Leave every step that is right as it is. Where the attempt departs from what the reference "
        "shows to be true, correct it and carry the correction through all that follows; agree with the "
        "reference, but do not mention it. Write the rewritten solution only, and end with the final answer "
        "in the form that the problem asks for."
    ),
}

EPISTEMIC_WORDS = (
    "Wait", "Actually", "However", "Alternatively", "Oops", "Wrong", "Error", "Incorrect", "Correction",
    "Sorry", "Hmm", "Oh", "Hold", "Pause", "Uh", "Um",
)  # fmt: skip
"""Openings of a correction (arXiv 2606.08432's signal of prefix failure)."""


def check_slots(template: str, slots: Set[str]) -> None:
    """That a template has exactly these slots.

    Raises:
        ValueError: it lacks one, has another, or is not a format string.
    """
    try:
        found = {name for _, name, _, _ in Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise ValueError(f"template {template[:60]!r}: {error}; write literal braces doubled") from None
    if found != set(slots):
        need = ", ".join(f"{{{s}}}" for s in sorted(slots))
        have = ", ".join(f"{{{s}}}" for s in sorted(found)) or "none"
        raise ValueError(f"template {template[:60]!r} must have exactly the slots {need}; it has {have}")
