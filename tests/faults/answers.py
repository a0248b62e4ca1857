"""Answers of a vLLM server that cannot be true, and words of the sentence; docs/make_reliability.py counts
them. No torch."""

import math
from collections.abc import Callable
from typing import Any

Spoil = Callable[[Any], Any]
"""A true answer → what is sent in its place."""
_NUMBERS = "not numbers, or above 0"


def every_logprob(value: Any) -> Spoil:
    return every_entry({"logprob": value})


def every_entry(value: Any) -> Spoil:
    def spoil(answer: Any) -> Any:
        for entry in answer["choices"][0]["prompt_logprobs"][1:]:
            entry.update(dict.fromkeys(entry, value))
        return answer

    return spoil


def named(name: str, logprob: float = -50.0) -> Spoil:
    def spoil(answer: Any) -> Any:
        answer["choices"][0]["prompt_logprobs"][-1][name] = {"logprob": logprob}
        return answer

    return spoil


SCORES: dict[str, tuple[Spoil, str]] = {
    "text": (every_logprob("-1"), _NUMBERS),
    "null": (every_logprob(None), _NUMBERS),
    "list": (every_logprob([-1.0]), _NUMBERS),
    "true": (every_logprob(False), _NUMBERS),
    "bare number": (every_entry(-1.0), _NUMBERS),
    "no logprob": (every_entry({}), _NUMBERS),
    "named by text": (named("the"), _NUMBERS),
    "certain of all": (every_logprob(0.0), r"probabilities of one token that sum to [45]"),
    "a little above 1": (every_logprob(math.log(0.3)), r"probabilities of one token that sum to 1\.[25]"),
    "choices are a number": (lambda a: {**a, "choices": 1}, "without exactly one choice"),
    "choice is text": (lambda a: {**a, "choices": ["x"]}, "without exactly one choice"),
    "choice is null": (lambda a: {**a, "choices": [None]}, "without exactly one choice"),
}
"""Of a request for log-probs."""


def written(**changes: Any) -> Spoil:
    return lambda answer: {**answer, "choices": [{**answer["choices"][0], **changes}]}


COMPLETIONS: dict[str, tuple[Spoil, str]] = {
    "log-probs are a list": (written(logprobs=[-1.0]), "without token ids and log-probs"),
    "log-probs are text": (
        written(token_ids=[5, 2], logprobs={"token_logprobs": ["a", "b"]}), "without token ids and log-probs",
    ),
    "ids are true": (
        written(token_ids=[True, 2], logprobs={"token_logprobs": [-1.0, -1.0]}), "without token ids",
    ),
    "cannot be drawn": (
        written(token_ids=[5, 2], logprobs={"token_logprobs": [-9999.0, -1.0]}), "cannot have been drawn",
    ),
    "choice is text": (lambda a: {**a, "choices": ["x"]}, "without exactly one choice"),
}  # fmt: skip
"""Of a request for a completion."""

NO_MASS = (-9999.0, -math.inf, -30.0)
"""Log-probs of all of a top-k."""
NO_MODELS: tuple[Any, ...] = ([1], None, {}, {"data": None}, {"data": ["x"]})
"""At /v1/models."""
NO_ADDRESSES = ("localhost:8000", "127.0.0.1", "http://", "ftp://host", "http://a b:x")
"""teacher.url."""
