"""Optimal transport between two short windows of tokens (TOPD, arXiv 2606.00305)."""

from onpath.transport.plans import optimal_transport, token_cost, window_divergence

__all__ = ["optimal_transport", "token_cost", "window_divergence"]
