"""Where thinking ends and the answer begins, by the tags of the common families. No torch."""

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
    """What follows the thinking that a text begins with, nothing if that never ends. Its opening tag may
    stand in a prompt that is not here.

    >>> without_thinking("<think>3?</think>It is 4."), without_thinking("3?</think> 4"), without_thinking("4")
    ('It is 4.', '4', '4')
    """
    begun = text.lstrip()
    for opening, closing in TAGS:
        before, closed, after = begun.partition(closing)
        if begun.startswith(opening):
            return after.lstrip() if closed else ""
        if closed and opening not in before:
            return after.lstrip()
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
