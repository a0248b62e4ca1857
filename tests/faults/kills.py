"""Where writers are killed, with SIGKILL; docs/make_reliability.py counts it.

A writer is killed before each of its operations on files in turn: at least so many times.
"""

KILLS = {
    "a text file": 5,
    "a directory in another's place": 9,
    "checkpoints, and the old ones removed": 40,
    "lines of metrics, and some of them taken back": 8,
    "stored trajectories": 4,
    "kept completions": 6,
    "details of an evaluation": 5,
    "a server's weights": 7,
    "an exported model": 12,
    "a report": 5,
}
RUNS = 8
"""Kills of a whole run, from its first operation on files to its last."""
CUTS = "every byte"
"""A line of metrics.jsonl is cut off at each of its bytes."""
