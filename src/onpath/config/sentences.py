"""What is wrong with a config, in one sentence that names the key, the value and what would be right."""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from onpath.config import elsewhere
from onpath.config.methods import METHODS, options_class
from onpath.config.sections import Refresh
from onpath.config.whole import LABELLED, Config
from onpath.system.errors import UserError
from onpath.system.text import short

_TAKES = {
    "student": "a mapping of options, such as {model: Qwen/Qwen3-1.7B}",
    "teacher": "a mapping of options, such as {model: Qwen/Qwen3-8B}",
    "data": "a mapping of options, such as {train: prompts.jsonl}",
    "data.eval": "a file, or {name: file} for one or several ({} for none)",
    "rewards": "{name: file.py:function}, a list of those, or {label: {name: file.py:function}}",
    "teachers": "{name: {model: …}} for each of several; one alone is the section teacher",
}
"""What sections of the user's own names are written like."""


def sentence(error: ValidationError, data: Mapping[str, Any]) -> str:
    """The first problem of a pydantic error as one sentence with the dotted key."""
    first, key = first_problem(error, data)
    loc = key.split(".")
    match first["type"]:
        case "extra_forbidden":
            beside = _keys_beside(loc, data)
            ours = options_called(loc[-1])
            if key in ours:  # {"optim.steps": 3} at the top of a file
                section, _, option = key.partition(".")
                return f"unknown key {key}: in a file it is written {section}: {{{option}: …}}"
            found = called_here(key)
            if isinstance(first["input"], Mapping):  # a section of theirs
                found = found or elsewhere.answer_within(key, first["input"])
            return f"unknown key {key}; {found or nearest(loc[-1], beside)}"
        case "union_tag_invalid":
            known = f"{', '.join(METHODS)}, or a class of yours as file.py:Class"
            name = first["input"].get("name")
            return f"method.name is {short(name)}; it must be one of {known}{elsewhere.meant(name, METHODS)}"
        case "value_error":
            reason = str(first["ctx"]["error"])
            return reason if not key or reason.startswith(key) else f"{key}: {reason}"
        case "missing":
            return f"{key} is missing: it has no default, so set it"
        case "dict_type" | "model_type" if not key:
            return f"it is {short(first['input'])}; it must be a mapping of sections"
        case "dict_type" | "model_type":
            takes = _TAKES.get(key, "a mapping" if first["type"] == "dict_type" else "a mapping of options")
            without = ", or be left out" if first["input"] is None else ""
            return f"{key} is {short(first['input'])}; it must be {takes}{without}"
        case "int_parsing" if (whole := _whole(first["input"])) is not None:
            return f"{key} is {short(first['input'])}, which YAML reads as text; write {whole}"
        case "list_type" if isinstance(first["input"], str):
            return f"{key} is {short(first['input'])}; it must be a list, such as [{short(first['input'])}]"
        case "literal_error" if loc[-1] == "[key]":
            words, at = re.findall("'([^']*)'", first["msg"]), data
            for part in loc[:-2]:
                at = at[part]
            theirs, ours = next((str(k), v) for k, v in at.items() if str(k) == loc[-2])
            told = f"write {ours}: {theirs}" if ours in words else f"ours are {', '.join(words)}"
            return f"{'.'.join(loc[:-1])}: our name comes first, then yours; {told}"
        case _:
            words = re.findall("'([^']*)'", first["msg"]) if first["type"] == "literal_error" else []
            said = f"{first['msg'][0].lower()}{first['msg'][1:]}{elsewhere.meant(first['input'], words)}"
            return f"{key} is {short(first['input'])}: {said}"


def _whole(text: object) -> int | None:
    """The whole number that a text such as 1e3 is."""
    try:
        number = float(str(text))
    except ValueError:
        return None
    return int(number) if number.is_integer() and abs(number) < 1e15 else None


def frames_of(error: ValidationError) -> str:
    """Those of a user's own code that failed, if that is what is wrong."""
    causes = [one.get("ctx", {}).get("error") for one in error.errors(include_url=False)]
    return next((cause.frames for cause in causes if isinstance(cause, UserError)), "")


_BRANCH = re.compile(r"literal\[.*|list\[.*|dict\[.*|constrained-.*|function-.*|int|float|str")
"""What pydantic calls the alternatives of an option that takes several types."""


def first_problem(error: ValidationError, data: Mapping[str, Any]) -> tuple[Any, str]:
    """The first problem and its dotted key; where one option's alternatives all refuse the value, that of the
    one which came furthest, or has a sentence of ours, with what the others that came as far would take."""
    errors = [(one, _dotted(one["loc"], data)) for one in error.errors(include_url=False)]
    _, of = errors[0]
    tried = [(one, key) for one, key in errors if key == of or key.startswith(f"{of}.")] if of else errors[:1]
    first, furthest = max(tried, key=lambda pair: (len(pair[1]), pair[0]["type"] == "value_error"))
    says = dict.fromkeys([first["msg"], *(one["msg"] for one, key in tried if key == furthest)])
    return {**first, "msg": ", or ".join(says).replace(", or Input should be ", ", or ")}, furthest


def _dotted(loc: Sequence[str | int], data: Any) -> str:
    """Without the branches of unions, which stand beside the keys."""
    found: list[str] = []
    for part in loc:
        known = isinstance(data, Mapping) and part in data
        if known or not (_BRANCH.fullmatch(str(part)) or (found == ["method"] and part in (*METHODS, "own"))):
            found.append(str(part))
        data = data[part] if known else data
    return ".".join(found)


def _keys_beside(loc: Sequence[str], data: Mapping[str, Any]) -> Sequence[str]:
    match loc:
        case [_]:
            return list(Config.model_fields)
        case ["method", *_]:
            return list(options_class(data["method"].get("name", "opd")).model_fields)
        case [section, *_] if section in LABELLED:
            return list(LABELLED[section].model_fields)
        case ["rollout", "refresh", _]:
            return list(Refresh.model_fields)
        case _:
            return list(section_type(loc[0]).model_fields)


def options_called(key: str) -> list[str]:
    """The dotted names of the options with this last part; not a method's, nor those under labels."""
    sections = [n for n in Config.model_fields if n not in ("method", *LABELLED)]
    return [f"{name}.{key}" for name in sections if key in section_type(name).model_fields]


def called_here(key: str) -> str | None:
    """Where an option of this name is found, ours in another section or another trainer's."""
    ours = options_called("_".join(key.split(".")[-2:])) or options_called(key.rpartition(".")[2])
    return f"here it is {' or '.join(ours)}" if ours else elsewhere.answer(key)


def section_type(section: str) -> type[BaseModel]:
    annotation = Config.model_fields[section].annotation
    assert isinstance(annotation, type)
    assert issubclass(annotation, BaseModel)
    return annotation


def nearest(word: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """What a mistyped word may have meant, or all that is known."""
    return closest(word, known, cutoff=0.6) or f"known here: {', '.join(known)}"


def closest(word: str, known: Sequence[str] | Mapping[str, Any], *, cutoff: float) -> str:
    """What a mistyped word may have meant; empty: nothing is as like it as that."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f"did you mean {close[0]}?" if close else ""
