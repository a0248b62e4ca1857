"""Losses from hidden states and heads, by chunks. docs/objectives.md maps every equation to its function.

`import onpath.losses` is light: torch is loaded by the first name that needs it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from onpath.losses.objective import Objective

if TYPE_CHECKING:
    from onpath.losses.chunked import chunked_divergence
    from onpath.losses.fused import fused_objective, token_stats
    from onpath.losses.head import Head
    from onpath.losses.interface import (
        LossResult,
        SparseGuidance,
        StatsRequest,
        TeacherHidden,
        TeacherMixture,
        TeacherScores,
        TeacherTopK,
        TokenStats,
    )

__all__ = [
    "Head", "LossResult", "Objective", "SparseGuidance", "StatsRequest", "TeacherHidden", "TeacherMixture",
    "TeacherScores",
    "TeacherTopK", "TokenStats", "chunked_divergence", "fused_objective", "token_stats",
]  # fmt: skip

_HOME = {"Head": "head", "chunked_divergence": "chunked", "fused_objective": "fused", "token_stats": "fused"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'onpath.losses' has no attribute {name!r}")
    return getattr(import_module(f"onpath.losses.{_HOME.get(name, 'interface')}"), name)
