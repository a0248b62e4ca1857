"""The truth about responses: grades, first errors, labels."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onpath import gym
from onpath.gym.vocab import TOKENS

PROMPT = "a: 35 + 47; b: a * 3; c: 62 - a; d: b + c; d?"
SHORT = {"error": "e", "consequence": "q", "right": "r", "habit": "h", "choice": "?", "copied": "."}


def kinds(response: str) -> str:
    return "".join(SHORT[label.kind] for label in gym.label_tokens(PROMPT, gym.tokenize(response)))


RIGHT = "a: 35 + 47 = a82; c: 62 - a82 = c80; b: a82 * 3 = b46; d: b46 + c80 = d26; ans 26<eos>"


def test_a_right_solution() -> None:
    first, second, third, last = "......h.rrh", "?......h.rrh", "......h.rrh", "........h.rrh"
    assert kinds(RIGHT) == first + second + third + last + "...."
    assert gym.first_error(PROMPT, RIGHT) is None


def test_habits_are_no_errors() -> None:
    other = RIGHT.replace(" = ", " -> ").replace("; ", ", so ")
    assert kinds(other) == kinds(RIGHT)


def test_an_invisible_error_and_its_consequences() -> None:
    wrong = "a: 35 + 47 = a72; c: 62 - a72 = c90; b: a72 * 3 = b16; d: b16 + c90 = d06; ans 06<eos>"
    assert kinds(wrong[:18]) == "......h.eqh"
    labels = gym.label_tokens(PROMPT, gym.tokenize(wrong))
    first = gym.first_error_token(PROMPT, gym.tokenize(wrong))
    assert first == 8
    assert labels[first].visible is False
    assert gym.first_error(PROMPT, wrong) == 0
    assert sum(label.kind == "error" for label in labels) == 1
    # The operand's 7 and the result's 9 follow from the error; their second digits are true.
    step = gym.tokenize(wrong)[11:23]
    assert "".join(step) == "c: 62 - a72 = c90; "
    assert "".join(SHORT[label.kind] for label in labels[11:23]) == "?....q.h.qrh"


def test_a_wrong_copy_of_a_digit_is_an_invisible_error() -> None:
    labels = gym.label_tokens(PROMPT, gym.tokenize("a: 35 + 48"))
    assert [label.kind for label in labels][-1] == "error"
    assert labels[-1].visible is False


def test_a_visible_error_noticed_and_mended() -> None:
    text = "a: 35 + 47 = a82; b: a82 * 3 = b246; wait b: a82 * 3 = b46; "
    text += "c: 62 - a82 = c80; d: b46 + c80 = d26; ans 26"
    tokens = gym.tokenize(text)
    labels = gym.label_tokens(PROMPT, tokens)
    errors = [i for i, label in enumerate(labels) if label.kind == "error"]
    assert [tokens[i] for i in errors] == ["2"]
    assert labels[errors[0]].visible is True
    assert gym.first_error(PROMPT, text) == text.index("b: a82")
    redone = [t for t, label in zip(tokens, labels, strict=True) if label.recovery]
    assert "".join(redone) == "wait b: a82 * 3 = b46; "
    assert all(label.kind != "consequence" for label in labels[tokens.index("wait ") :])
    assert gym.grade(text, "26")


def test_an_unreduced_result_is_read_by_its_first_two_digits() -> None:
    text = "a: 35 + 47 = a82; b: a82 * 3 = b246; c: 62 - a82 = c80; d: b24 + c80 = d04; ans 04"
    labels = gym.label_tokens(PROMPT, gym.tokenize(text))
    assert sum(label.kind == "error" for label in labels) == 1
    assert kinds(text).endswith(".qq")


@pytest.mark.parametrize(
    ("response", "token"),
    [
        ("b: a82", "b: "),  # not ready
        ("a: 35 - 47", " - "),
        ("ans 26", "ans "),  # nothing computed yet
        ("g: 35 + 47 = g82; ", "g: "),  # not defined
        ("a: 35 + 47 = c82", "c"),
        ("a: 35 + 47 = a82; a: 35", "a: "),  # done already
        ("a: 35 + 47 = a8; ", "; "),  # one digit
        ("wait ", "wait "),  # nothing to go back to
        ("zebra", "z"),
    ],
)
def test_impossible_moves_are_visible_errors(response: str, token: str) -> None:
    tokens = gym.tokenize(response)
    at = gym.first_error_token(PROMPT, tokens)
    assert at is not None
    assert tokens[at] == token
    assert gym.label_tokens(PROMPT, tokens)[at].visible is True


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("ans 26", True),
        ("ans 26<eos>", True),
        ("ans 6", False),
        ("ans 126", False),
        ("26", False),
        ("", False),
        ("ans 11; ans 26", True),
        ("ans 26; ans 11", False),
    ],
)
def test_grades(text: str, right: bool) -> None:
    assert gym.grade(text, "26") is right


@given(
    st.lists(st.sampled_from(TOKENS), max_size=60), st.sampled_from([PROMPT, "", "a?", PROMPT + " tried a: "])
)
def test_any_tokens_get_one_label_each(tokens: list[str], prompt: str) -> None:
    assert len(gym.label_tokens(prompt, tokens)) == len(tokens)


STEP = st.builds(
    "{}: {}{}{} = {}{}; ".format,
    st.sampled_from("abcdg"), st.sampled_from(["35", "a82", "c", "b46"]), st.sampled_from([" + ", " * "]),
    st.sampled_from(["47", "a8", "3"]), st.sampled_from("abcd"), st.sampled_from(["82", "7", "131", "46"]),
)  # fmt: skip


@given(st.lists(st.one_of(STEP, st.just("wait "), st.just("ans 26")), max_size=8))
def test_steps_in_any_order_get_one_label_each(steps: list[str]) -> None:
    tokens = gym.tokenize("".join(steps))
    assert len(gym.label_tokens(PROMPT, tokens)) == len(tokens)


def test_an_impossible_step_taken_twice() -> None:
    """Its first result is remembered, its operands were never written."""
    twice = "d: b + c = d26; d: b + c = d26; "
    assert gym.first_error(PROMPT, twice) == 0
    assert kinds(twice)[0] == "e"


@given(st.text(max_size=80), st.text(max_size=40))
def test_no_text_raises(text: str, prompt: str) -> None:
    offset = gym.first_error(PROMPT, text)
    assert offset is None or 0 <= offset <= len(text)
    gym.first_error(prompt, text)
    gym.grade(text, "26")


def test_a_prompt_with_an_attempt_is_read_by_its_problem() -> None:
    prompt = gym.TEMPLATES["rewrite"].format(problem=PROMPT, attempt="a: 35 + 47 = a72; ans 11")
    assert gym.first_error(prompt, RIGHT) is None
