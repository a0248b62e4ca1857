"""The process: errors, ranks, memory, draws, files, own code. Imports nothing of onpath."""

__version__ = "0.1.0"
