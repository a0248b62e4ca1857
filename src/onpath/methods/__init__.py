"""One published method, one file, one signature: rollouts in, trajectories out.

`method.name: foo` is the class in `onpath.methods.foo` whose `Options` are those of
`onpath.config.methods.foo`: nothing else names it.
"""

from importlib import import_module

from onpath.config.methods import MethodOptions
from onpath.engines.forward import forward, per_token
from onpath.methods.base import Method, Prepared, Text, Tools, own_response
from onpath.methods.mixed import Cost, Mixed, student_goes_on, trained_on
from onpath.records import Edit, Guidance, Rollout, Trajectory

__all__ = [
    "Cost", "Edit", "Guidance", "Method", "MethodOptions", "Mixed", "Prepared", "Rollout", "Text", "Tools",
    "Trajectory", "forward", "make_method", "own_response", "per_token", "student_goes_on", "trained_on",
]  # fmt: skip


def make_method(options: MethodOptions, tools: Tools) -> Method:
    """The method that the options belong to."""
    if type(options).method_class is None:
        import_module(f"{__name__}.{options.name}")
    method: Method = type(options).method_class(options, tools)
    return method
