"""Where thinking ends and the answer begins, by the tags of the common families. No torch."""

import re

TAGS = (
    ("<think>", "</think>"),  # DeepSeek-R1, Qwen3, QwQ
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<seed:think>", "</seed:think>"),
    ("◁think▷", "◁/think▷"),  # Kimi
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|channel|>analysis", "<|channel|>final<|message|>"),  # gpt-oss
)
"""(opening, closing) of thinking in a response."""
ANSWER = ("<answer>", "</answer>")
TOKENS = frozenset((*(tag for pair in TAGS for tag in pair), *ANSWER, "<|channel|>", "<|message|>"))
"""Tokens that a grader must see even where a tokenizer calls them special."""


def is_open(text: str) -> bool:
    """Whether the text ends within thinking."""
    return any(text.rfind(opening) > text.rfind(closing) for opening, closing in TAGS)


def without_thinking(text: str) -> str:
    """What follows the thinking that a text begins with, nothing if that never ends. Where its opening tag
    stands in a prompt that is not here, the closing one has a line of its own.

    >>> [without_thinking(text) for text in ("<think>3?</think>It is 4.", "3?\\n</think>\\n4", "4")]
    ['It is 4.', '4', '4']
    """
    begun = text.lstrip()
    for opening, closing in TAGS:
        if begun.startswith(opening):
            return begun.partition(closing)[2].lstrip()
    for opening, closing in TAGS:
        alone = re.search(rf"^{re.escape(closing)}[ \t]*$", begun, re.MULTILINE)  # else it may be spoken of
        if alone and opening not in begun[: alone.start()]:
            return begun[alone.end() :].lstrip()
    return text


def answer_part(text: str) -> str:
    """What a response says after its thinking, nothing if it never stops thinking; the inside of <answer> if
    there is one.

    >>> answer_part("<think>3?</think>It is 4."), answer_part("<think> first 7. Let me")
    ('It is 4.', '')
    """
    if is_open(text):
        return ""
    for _, closing in TAGS:
        text = text.rpartition(closing)[2]
    opening, closing = ANSWER
    if opening in text:
        text = text.rpartition(opening)[2].partition(closing)[0]
    return text
