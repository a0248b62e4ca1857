"""TRD: the teacher rewrites the rollout."""

from onpath.methods.trd.method import TRD

__all__ = ["TRD"]
