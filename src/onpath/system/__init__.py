"""The process: errors, ranks, memory, draws, files. Imports nothing of onpath."""
