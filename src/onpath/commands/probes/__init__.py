"""Experiments on a student and a teacher that need no training."""
