"""How often is a model right, and how sure are we? Works with any engine. No torch."""

from onpath.evaluate.scores import (
    EvalResult,
    PairedDifference,
    ProblemResult,
    compare,
    evaluate,
    paired_difference,
    read_details,
    write_details,
)
from onpath.evaluate.stats import bootstrap_interval, pass_at_k

__all__ = [
    "EvalResult", "PairedDifference", "ProblemResult", "bootstrap_interval", "compare", "evaluate",
    "paired_difference", "pass_at_k", "read_details", "write_details",
]  # fmt: skip
