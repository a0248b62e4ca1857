"""onpath: on-policy distillation of language models that corrects whole trajectories.

`import onpath` is light: torch and transformers are loaded by the first call that needs them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onpath.config.build import Config as Config
    from onpath.training import RunResult as RunResult
    from onpath.training import train as train

__version__ = "0.1.0"
__all__ = ["Config", "RunResult", "__version__", "train"]

_HOME = {"Config": "onpath.config", "RunResult": "onpath.training", "train": "onpath.training"}
_SUBMODULES = {"config", "divergence", "evaluate", "grade", "gym", "losses", "records", "transport"}


def __dir__() -> list[str]:
    return sorted({*__all__, *_SUBMODULES})


def __getattr__(name: str) -> Any:
    # `onpath.train` is both a module and the promised function: the function wins, as documented.
    if name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    if name in _SUBMODULES:
        return import_module(f"onpath.{name}")
    raise AttributeError(f"module 'onpath' has no attribute {name!r}")
