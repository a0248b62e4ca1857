"""Optimal transport between two short windows."""
