"""Options of each method, one file each: `method.name` chooses. Data only, no torch.

A file that is put here is found by itself: the options' `name` names the method, and the file of that name in
`onpath.methods` holds what it does.
"""

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import BeforeValidator, Discriminator, SerializeAsAny, Tag

from onpath.config.methods.base import MethodOptions, check_defaults
from onpath.system import code

__all__ = ["METHODS", "MethodOptions", "SomeMethod", "options_class"]


def _found() -> dict[str, type[MethodOptions]]:
    found: dict[str, type[MethodOptions]] = {}
    for info in iter_modules(__path__):
        module = import_module(f"{__name__}.{info.name}")
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, MethodOptions) and value is not MethodOptions:
                found[value.model_fields["name"].default] = value
    return found


METHODS = _found()


def options_class(name: str) -> type[MethodOptions]:
    """The options that `method.name` chooses.

    Raises:
        UserError: own code that may not run, or is not a method.
        KeyError: no such method.
    """
    return _own_class(name) if code.is_own(name) else METHODS[name]


def _own_class(name: str) -> type[MethodOptions]:
    owner = code.load(name, key="method.name")
    options = getattr(owner, "Options", None)
    if not (isinstance(options, type) and issubclass(options, MethodOptions)):
        raise ValueError(
            f"{name} is not a method: derive a class from onpath.methods.Method, with its options as a "
            "nested class Options(onpath.methods.MethodOptions)"
        )
    return options


def _own(value: Any) -> MethodOptions:
    if isinstance(value, MethodOptions):
        return value
    found = _own_class(value["name"])
    with code.blamed(f"method.name {value['name']}: Options", code.modules_of(found)):
        check_defaults(found, value["name"])
        return found.model_validate(value)


def _kind(value: Any) -> str:
    name = value.get("name", "opd") if isinstance(value, dict) else getattr(value, "name", "")
    name = name if isinstance(name, str) else repr(name)
    return name if name in METHODS else "own" if code.is_own(name) else f"no method {name!r}"


if TYPE_CHECKING:
    SomeMethod = MethodOptions
else:
    _OWN = Annotated[SerializeAsAny[MethodOptions], BeforeValidator(_own), Tag("own")]
    _BUILT_IN = tuple(Annotated[options, Tag(name)] for name, options in METHODS.items())
    SomeMethod = Annotated[Union[(*_BUILT_IN, _OWN)], Discriminator(_kind)]
