"""Engines write tokens: one protocol, one file each."""
