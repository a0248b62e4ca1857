"""TOPD, stage by stage: candidates, futures, pairs, decide, guide."""

from onpath.methods.topd.method import TOPD

__all__ = ["TOPD"]
