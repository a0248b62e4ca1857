"""The options as text and as a JSON schema."""

import json
from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from onpath.config.methods import METHODS, MethodOptions
from onpath.config.section import OneOf, OnResume
from onpath.config.sections import Reward, Teacher
from onpath.config.sentences import section_type
from onpath.config.whole import Config

Option = tuple[str, str, str, str]
"""Key, type, default, documentation."""


def describe(own: type[MethodOptions] | None = None) -> Iterator[Option]:
    """Every option once, for `--help` and the docs; `own`: options of a method that is not built in.

    `method.key` is one that all methods have; `method[name].key` one that this method has alone, or with
    another default.
    """
    for section in Config.model_fields:
        if section == "method":
            yield from _describe_methods({**METHODS, **({own.__qualname__: own} if own else {})})
        elif section == "rewards":
            yield from _describe_fields("rewards.LABEL", Reward)
        elif section == "teachers":
            options = ", ".join(Teacher.model_fields)
            text = f"{Config.model_fields[section].description} Options of each: {options}."
            yield "teachers.NAME", "section", "{}", text
        else:
            yield from _describe_fields(section, section_type(section))


def _describe_methods(methods: Mapping[str, type[MethodOptions]]) -> Iterator[Option]:
    default = json.dumps(Config.model_fields["method"].default.name)
    yield (
        "method.name",
        " | ".join((*METHODS, "file.py:Class")),
        default,
        "What is done with rollouts before they train.",
    )
    shared = list(_describe_fields("method", MethodOptions))
    yield from shared
    for name, options in methods.items():
        own = (option for option in _describe_fields("method", options) if option not in shared)
        yield from ((key.replace("method", f"method[{name}]", 1), *rest) for key, *rest in own)  # type: ignore[misc]


def _describe_fields(prefix: str, model: type[BaseModel]) -> Iterator[Option]:
    for key, info in model.model_fields.items():
        if key == "name" and prefix.startswith("method"):
            continue
        kind = next((_names(m) for m in info.metadata if isinstance(m, OneOf)), _type_name(info.annotation))
        default = "none" if info.is_required() else _shown(info)
        may_change = any(isinstance(m, OnResume) and m.how != "place" for m in info.metadata)
        on_resume = " A resumed run may change it." if may_change else ""
        yield f"{prefix}.{key}", kind, default, (info.description or "") + on_resume


def _shown(info: FieldInfo) -> str:
    """The default as JSON has it; what JSON has no word for (a path) as text."""
    return json.dumps(info.get_default(call_default_factory=True), default=str)


def _names(one: OneOf) -> str:
    return " | ".join((*one.known, "file.py:name"))


def _type_name(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return next((_names(m) for m in args[1:] if isinstance(m, OneOf)), _type_name(args[0]))
    if origin is Literal:
        return " | ".join(map(str, args))
    if origin in (Union, UnionType):
        return " | ".join(_type_name(a) for a in args)
    if origin is not None:
        return f"{origin.__name__}[{', '.join(_type_name(a) for a in args if a is not Ellipsis)}]"
    return "null" if annotation is type(None) else str(getattr(annotation, "__name__", annotation))


def json_schema() -> dict[str, Any]:
    """JSON schema of the config, for editors and for checks."""
    return Config.model_json_schema()
