"""One published method, one file, one signature: rollouts in, trajectories out.

`method.name: foo` is the class in `onpath.methods.foo` whose `Options` are those of
`onpath.config.methods.foo`: nothing else names it.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from importlib import import_module
from types import NoneType
from typing import Any

from onpath.config.methods import MethodOptions
from onpath.engines.forward import forward, per_token
from onpath.methods.base import Method, Prepared, Rehearsal, own_response
from onpath.methods.mixed import Cost, Mixed, student_goes_on, trained_on
from onpath.methods.tools import Text, Tools
from onpath.records import Edit, Guidance, Rollout, Trajectory
from onpath.system import code
from onpath.system.errors import UserError

__all__ = [
    "Cost", "Edit", "Guidance", "Method", "MethodOptions", "Mixed", "Prepared", "Rollout", "Text", "Tools",
    "Trajectory", "forward", "make_method", "own_response", "per_token", "student_goes_on", "trained_on",
]  # fmt: skip


_HOOKS: dict[str, tuple[tuple[type, ...], str]] = {
    "prepare": ((object,), ""),
    "write_rollouts": ((Sequence,), "a list of Rollouts"),
    "scored_first": ((Trajectory, NoneType), "a Trajectory or None"),
    "check": ((object,), ""),
    "before_training": ((str, NoneType), "a sentence, or nothing"),
    "rehearse": ((Rehearsal, NoneType), "a Rehearsal or None"),
    "after_step": ((object,), ""),
    "state": ((Mapping,), "a mapping of tensors"),
}
"""What onpath calls of a method, and what an answer is that is looked at here, once for all who ask."""


def make_method(options: MethodOptions, tools: Tools) -> Method:
    """The method that the options belong to. What one of the user's own raises names it.

    Raises:
        UserError: one of the user's own lacks `prepare`, takes other arguments than it is given, or fails.
    """
    if not code.is_own(options.name):
        if type(options).method_class is None:
            import_module(f"{__name__}.{options.name}")
        found: Method = type(options).method_class(options, tools)
        return found
    name, owner = f"method.name {options.name}", type(options).method_class
    if not (isinstance(owner, type) and issubclass(owner, Method)):
        raise UserError(f"{name}: it is not derived from onpath.methods.Method")
    code.check_takes(f"{name}: its __init__", owner, Method.__init__)
    modules = code.modules_of(owner)
    with code.blamed(f"{name}: __init__", modules):
        method = owner(options, tools)
    if getattr(method.prepare, "__func__", None) is Method.prepare:
        raise UserError(f"{name}: it has no prepare(self, rollouts, *, step)")
    for hook in _HOOKS:
        own = getattr(method, hook)
        code.check_takes(f"{name}: {hook}", own, getattr(Method, hook))
        asked = _checked(f"{name}: {hook}", code.blamed(f"{name}: {hook}", modules)(own), *_HOOKS[hook])
        object.__setattr__(method, hook, asked)  # past a __setattr__ of its own, such as a frozen dataclass's
    return method


def _checked(what: str, hook: Callable[..., Any], kinds: tuple[type, ...], told: str) -> Callable[..., Any]:
    """The hook, whose answer is of one of these kinds, or a sentence says so."""

    @wraps(hook)
    def asked(*given: Any, **named: Any) -> Any:
        answer = hook(*given, **named)
        if not isinstance(answer, kinds):
            raise UserError(f"{what} gave {type(answer).__name__}; it gives {told}")
        return answer

    return asked
