"""One row of a source as a prompt (`onpath.records.Prompt`), or why it cannot be one."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from numbers import Number
from typing import Any

from onpath.records import Message, Prompt
from onpath.system.reading import parse_json
from onpath.system.text import one_line

_UNREAD = {
    "tools": "put them into the prompt",
    "images": "this trains on text alone: take rows without pictures",
    "image": "this trains on text alone: take rows without pictures",
    "videos": "this trains on text alone: take rows without videos",
    "audio": "this trains on text alone: take rows without sound",
    "chat_template_kwargs": "set data.enable_thinking for all rows",
}
"""Columns that other libraries render, and what to do instead."""
_LACKS = "no key"
COLUMNS = (
    "id",
    "prompt",
    "messages",
    "answer",
    "reward_model",
    "tests",
    "solution",
    "privileged_context",
    *_UNREAD,
)
DEFAULT_TEACHER = "default"
"""Of several teachers the one for rows that name none."""
_ABSENT = object()
_LARGEST = 10**4000
"""Python writes no longer numbers out."""


class BadRow(ValueError):
    """Why one row cannot be used."""


def renamed(value: Any, theirs: Mapping[str, str], seen: set[str]) -> Mapping[str, Any]:
    """A row under our names; those of ours that were found under theirs are added to `seen`."""
    row = _decode(value) if isinstance(value, bytes) else value
    if not isinstance(row, Mapping):
        raise BadRow(f"must be an object with a key 'prompt', not {kind_of(row)}")
    found = {}
    for ours, column in theirs.items():
        held: Any = row
        for part in [column] if column in row else column.split("."):
            held = held.get(part, _ABSENT) if isinstance(held, Mapping) else _ABSENT
        if held is not _ABSENT:
            found[ours] = held
    seen.update(found)
    if "messages" in found and "prompt" not in found:  # whoever names the conversation means it
        row = {name: held for name, held in row.items() if name != "prompt"}
    return {**row, **found}


@contextmanager
def in_words_of(theirs: Mapping[str, str]) -> Iterator[None]:
    """A `BadRow` of this block calls columns as the source does; one that lists what a row has does so."""
    try:
        yield
    except BadRow as error:
        said = str(error)
        if not said.startswith(_LACKS):
            said = re.sub(r"'(\w+)'", lambda found: repr(theirs.get(found[1], found[1])), said)
        raise BadRow(said) from None


def prompt_of(
    row: Mapping[str, Any], *, default_id: str, teachers: Sequence[str], told: str | None = None
) -> Prompt:
    """A row as a record; `BadRow` says what is wrong with it. `told`: what data.columns calls its prompt."""
    if unread := next((column for column in _UNREAD if _says_something(row.get(column))), None):
        raise BadRow(
            f"it has {unread!r}, which onpath does not render; {_UNREAD[unread]}, or drop the column"
        )
    text: str | None = None
    messages: tuple[Message, ...] | None
    if row.get("prompt") is None and row.get("messages") is not None:
        messages = _conversation(row["messages"])
    elif "prompt" in row:
        text, messages = _question(row["prompt"])
    else:
        held = one_line(", ".join(map(repr, row))) or "none"
        if told is not None:
            raise BadRow(f"{_LACKS} {told!r}, which data.columns says is its prompt (it has {held})")
        raise BadRow(
            f"{_LACKS} 'prompt' (it has {held}); data.columns (of onpath eval --columns) says what it is "
            "called"
        )
    hint, has_tests = row.get("solution"), _is_given(row.get("tests"))
    return Prompt(
        id=_id(row.get("id"), default_id),
        text=text,
        messages=messages,
        answer=_tests(row["tests"]) if has_tests else _answer(*_reference(row)),
        tests=has_tests,
        solution=_solution(row.get("privileged_context") if hint is None else hint),
        teacher=_teacher(row.get("teacher"), teachers) if teachers else None,
    )


def _decode(line: bytes) -> Any:
    try:
        return parse_json(line)
    except ValueError as error:
        raise BadRow(str(error)) from None


def _question(value: Any) -> tuple[str | None, tuple[Message, ...] | None]:
    if isinstance(value, str):
        if not value.strip():
            raise BadRow("'prompt' is empty")
        return _encodable(value, "prompt"), None
    if not isinstance(value, list):
        raise BadRow(f"'prompt' must be text or a list of messages, not {kind_of(value)}")
    if not value:
        raise BadRow("'prompt' is an empty list of messages")
    messages = _messages(value, "prompt")
    if messages[-1]["role"] != "user":
        role = one_line(messages[-1]["role"], 40)
        raise BadRow(f"the last message of 'prompt' must be the user's, not the {role}'s")
    if not messages[-1]["content"].strip():
        raise BadRow("the last message of 'prompt' is empty")
    return None, messages


def _conversation(value: Any) -> tuple[Message, ...]:
    """What the last assistant turn answers; the whole if the user has the last word."""
    if not isinstance(value, list):
        raise BadRow(f"'messages' must be a list of messages, not {kind_of(value)}")
    messages = _messages(value, "messages")
    if messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages or messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        raise BadRow("'messages' has no user's message before its last assistant turn")
    return messages


def _says_something(value: Any) -> bool:
    """Whether a cell holds anything: in a table a column is there for every row."""
    if isinstance(value, Mapping):
        return any(_says_something(inner) for inner in value.values())
    return value is not None and value != "" and not (isinstance(value, list) and not value)


def _reference(row: Mapping[str, Any]) -> tuple[Any, str]:
    """The answer, or where verl keeps it, and what the column is called."""
    rule = row.get("reward_model")
    if row.get("answer") is None and isinstance(rule, Mapping):
        return rule.get("ground_truth"), "reward_model.ground_truth"
    return row.get("answer"), "answer"


def _messages(values: Sequence[Any], column: str) -> tuple[Message, ...]:
    return tuple(_message(value, f"message {number} of {column!r}") for number, value in enumerate(values))


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise BadRow(f"{where} must be an object with role and content, not {kind_of(value)}")
    if other := [key for key, held in value.items() if key not in ("role", "content") and held is not None]:
        raise BadRow(f"{where} has {other[0]!r}; only role and content are understood")
    given = {"role": value.get("role"), "content": _joined(value.get("content"), where)}
    for key, text in given.items():
        if key not in value:
            raise BadRow(f"{where} has no {key!r}; it is an object with role and content")
        if not isinstance(text, str):
            raise BadRow(f"{where}: {key!r} must be text, not {kind_of(text)}")
    return {"role": given["role"], "content": _encodable(given["content"], "prompt")}


def _joined(content: Any, where: str) -> Any:
    """A list of text parts as one text, as chat templates join them; anything else as it is."""
    if not isinstance(content, list) or not content:
        return content
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise BadRow(f"{where}: 'content' must be text, not a list with a part of type {kind!r}")
    return "".join(part["text"] for part in content)


def _encodable(text: str, column: str) -> str:
    """Tokenizers die on half a surrogate pair, which JSON can spell."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        where = f"half a surrogate pair at character {error.start}"
        raise BadRow(f"{column!r} holds broken Unicode: {where}") from None
    return text


def _is_given(tests: Any) -> bool:
    """An array of somebody's own row has no truth."""
    return bool(tests) if isinstance(tests, str | list | Mapping | None) else True


def _answer(value: Any, column: str) -> str | None:
    value = value.item() if isinstance(value, Number) and hasattr(value, "item") else value  # NumPy's
    # pandas writes a missing value of a numeric column as NaN
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        one = "; take the one to be graded against" if isinstance(value, list) else ""
        raise BadRow(f"'{column}' must be text or a number, not {kind_of(value)}{one}")
    if isinstance(value, float) and math.isinf(value):
        raise BadRow(f"'{column}' is an infinite number; write it as text")
    if isinstance(value, int) and abs(value) >= _LARGEST:
        raise BadRow(f"'{column}' has over 4,000 digits; write it as text")
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)  # an integer column with a missing value comes back as floats: 12.0 is 12
    if not str(value).strip():
        raise BadRow(f"'{column}' is empty; leave it out (or null) where there is nothing to grade")
    return _encodable(str(value), column)


def unlisted(tests: Any) -> Any:
    """Tests that stand in a list, also in one as JSON: asserts one below the other, pairs of input and output
    as one object. Other tests as they are.

    >>> unlisted('["assert f(1) == 2", "assert f(2) == 3"]')
    'assert f(1) == 2\\nassert f(2) == 3'
    """
    listed = tests
    if isinstance(tests, str) and tests.lstrip().startswith("["):
        with suppress(ValueError):  # it may be Python
            listed = parse_json(tests)
    if not isinstance(listed, list) or not listed:
        return tests
    if all(isinstance(v, str) for v in listed):
        return "\n".join(listed)
    if all(isinstance(v, Mapping) and {"input", "output"} <= set(v) for v in listed):
        return {"inputs": [v["input"] for v in listed], "outputs": [v["output"] for v in listed]}
    return tests


def _tests(value: Any) -> str:
    """Tests of a program as text, objects as JSON."""
    value = unlisted(value)
    if isinstance(value, Mapping):
        try:
            value = json.dumps(value)
        except (TypeError, ValueError) as error:
            raise BadRow(f"'tests' holds what is no JSON: {error}") from None
    if not isinstance(value, str):
        raise BadRow(f"'tests' must be text, a list of asserts, or an object, not {kind_of(value)}")
    return _encodable(value, "tests")


def _solution(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, list) and value:  # TRL's privileged_context may be messages; it joins their contents
        value = "\n".join(message["content"] for message in _messages(value, "privileged_context"))
    if not isinstance(value, str):
        raise BadRow(f"'solution' (or 'privileged_context') must be text, not {kind_of(value)}")
    return _encodable(value, "solution")


def _teacher(value: Any, known: Sequence[str]) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        if DEFAULT_TEACHER in known:
            return DEFAULT_TEACHER
        raise BadRow(
            "it names no teacher in the column that data.teacher_column says, and none of teachers is "
            f"called {DEFAULT_TEACHER}"
        )
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise BadRow(f"its teacher must be a name, not {kind_of(value)}")
    if str(value) not in known:
        raise BadRow(f"its teacher is {one_line(repr(value), 60)}, but teachers has {', '.join(known)}")
    return str(value)


def _id(value: Any, default: str) -> str:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise BadRow(f"'id' must be text or an integer, not {kind_of(value)}")
    return _encodable(str(value), "id")


def kind_of(value: Any) -> str:
    """What a value is, for a sentence."""
    if value is None or (isinstance(value, str) and not value):
        return "null" if value is None else "empty text"
    names = {
        str: "text",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), type(value).__name__)
