"""Losses from hidden states and heads, by chunks. docs/objectives.md maps every equation to its function."""

from onpath.losses import shaping
from onpath.losses.chunked import chunked_divergence
from onpath.losses.fused import fused_objective, token_stats
from onpath.losses.head import Head
from onpath.losses.records import (
    LossResult,
    SparseGuidance,
    StatsRequest,
    TeacherHidden,
    TeacherScores,
    TeacherTopK,
    TokenStats,
)
from onpath.objective import Objective

__all__ = [
    "Head",
    "LossResult",
    "Objective",
    "SparseGuidance",
    "StatsRequest",
    "TeacherHidden",
    "TeacherScores",
    "TeacherTopK",
    "TokenStats",
    "chunked_divergence",
    "fused_objective",
    "shaping",
    "token_stats",
]
