"""Base of every section of the configuration; what may change on resume; names of a user's own code."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema, core_schema

from onpath.config.elsewhere import meant
from onpath.system import code


class Section(BaseModel):
    """Base of every config section: unknown keys are errors, values frozen, docstrings descriptions."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )

    @model_validator(mode="before")
    @classmethod
    def _usable(cls, value: Any) -> Any:
        """Python and pydantic take true for 1, and halves of characters, which no file takes."""
        for name, given in value.items() if isinstance(value, Mapping) else ():
            field = cls.model_fields.get(name) if isinstance(name, str) else None
            for part in given if isinstance(given, list | tuple) else [given]:
                if isinstance(part, bool) and field is not None and _numbers_only(field.annotation):
                    raise ValueError(f"{name} is {str(part).lower()}, which is no number")
            if _is_broken(given):
                raise ValueError(f"{name} holds half a character (a lone surrogate), which no text has")
        return value

    @model_validator(mode="after")
    def _fits(self) -> Self:
        """Tensors hold no numbers beyond float32's."""
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, int | float) and abs(value) > _LARGEST:
                raise ValueError(f"{name} is beyond {_LARGEST:g}, the largest number that an option may be")
        return self

    @property
    def idle(self) -> dict[str, str]:
        """Options that are set and read by nothing while the others are as they are: name → what they go
        with."""
        found = {}
        for name, info in type(self).model_fields.items():
            if getattr(self, name) == info.get_default(call_default_factory=True):
                continue
            marks = [mark for mark in info.metadata if isinstance(mark, GoesWith)]
            if needs := next(filter(None, (m.unless(getattr(self, m.option)) for m in marks)), None):
                found[name] = needs
        return found


_LARGEST = 1e30


def _is_broken(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_is_broken(part) for pair in value.items() for part in pair)
    if isinstance(value, list | tuple):
        return any(map(_is_broken, value))
    return isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value)


def _numbers_only(annotation: Any) -> bool:
    """Whether an option takes numbers and no truth value."""
    kinds = {annotation, *get_args(annotation)}
    return bool(kinds & {int, float}) and bool not in kinds


@dataclass(frozen=True)
class OnResume:
    """Annotates an option that may have another value when a run is resumed: `Annotated[int, NEUTRAL]`. One
    that is not annotated may not."""

    how: Literal["neutral", "rounding", "longer", "place"]
    """neutral: the weights come out bit by bit as they would have; rounding: but for sums in another order;
    longer: it may grow; place: another spelling of the same path."""


NEUTRAL, ROUNDING, LONGER, PLACE = (
    OnResume("neutral"),
    OnResume("rounding"),
    OnResume("longer"),
    OnResume("place"),
)


class GoesWith:
    """Annotates an option that is read only where another one of its section has one of these values; without
    any, where it is set at all: `Annotated[int, GoesWith("support", "union")]`. Of several marks all must
    hold."""

    def __init__(self, option: str, *values: Any) -> None:
        self.option, self.values = option, values

    def unless(self, value: Any) -> str | None:
        """What the other one would have to be; None: it is."""
        if value in self.values or (value and not self.values):
            return None
        if self.values:
            return f"{self.option}: {' or '.join(map(str, self.values))}"
        return f"{self.option} above 0" if type(value) in (int, float) else self.option


@dataclass(frozen=True)
class OneOf:
    """Annotates text that is a built-in name or names own code: `Annotated[str, OneOf(…, "function")]`."""

    known: tuple[str, ...]
    own: str
    """What a user's own must be: `function`, `class`."""

    def check(self, value: str) -> str:
        """The value.

        Raises:
            ValueError: neither built in nor own code.
        """
        if value not in self.known and not code.is_own(value):
            others = f"{', '.join(self.known)}, or a {self.own} of yours as file.py:name"
            raise ValueError(f"{value!r} must be one of {others}{meant(value, self.known)}")
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        own = {"type": "string", "pattern": r"\.py:[A-Za-z_]\w*$"}
        return {"anyOf": [{"enum": list(self.known)}, own]}
