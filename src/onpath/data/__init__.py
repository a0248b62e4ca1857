"""Prompts in, text to ids, trajectories to tensors."""
