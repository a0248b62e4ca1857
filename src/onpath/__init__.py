"""onpath: on-policy distillation of language models that corrects whole trajectories.

`import onpath` is light: torch and transformers are loaded by the first call that needs them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from onpath.system import __version__ as __version__

if TYPE_CHECKING:
    from onpath.commands.cache import kept_scores as kept_scores
    from onpath.commands.eval import evaluate_model as evaluate_model
    from onpath.commands.export import export_model as export_model
    from onpath.commands.report.command import write_report as write_report
    from onpath.commands.study.run import run_study as run_study
    from onpath.config.whole import Config as Config
    from onpath.run.directory import RunResult as RunResult
    from onpath.system.errors import UserError as UserError
    from onpath.training import train as train

__all__ = [
    "Config",
    "RunResult",
    "UserError",
    "__version__",
    "evaluate_model",
    "export_model",
    "kept_scores",
    "run_study",
    "train",
    "write_report",
]

_HOME = {
    "Config": "onpath.config",
    "RunResult": "onpath.run.directory",
    "UserError": "onpath.system.errors",
    "evaluate_model": "onpath.commands.eval",
    "export_model": "onpath.commands.export",
    "kept_scores": "onpath.commands.cache",
    "run_study": "onpath.commands.study.run",
    "train": "onpath.training",
    "write_report": "onpath.commands.report.command",
}
_SUBMODULES = {
    *("config", "divergence", "evaluate", "grade", "gym", "losses", "methods", "records", "transport")
}


def __dir__() -> list[str]:
    return sorted({*__all__, *_SUBMODULES})


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    if name in _SUBMODULES:
        return import_module(f"onpath.{name}")
    raise AttributeError(f"module 'onpath' has no attribute {name!r}")
