"""Files that onpath wrote and a disk spoilt: 500 of each kind, read or told in a sentence."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onpath.commands.probes.prefix_records import read_probed
from onpath.engines.remote.replay import Replay
from onpath.evaluate.scores import read_details
from onpath.run import checkpoint
from onpath.run.log import read_lines
from onpath.system.errors import UserError
from tests.mutate import mutated

DETAILS = {
    "id": "7", "digest": "ab", "correct": [True, False], "lengths": [3, 4], "finished": [True, True],
    "grader": "exact", "sampling": {"temperature": 1.0, "seed": 1},
}  # fmt: skip
COMPLETION = {"key": "ab", "ids": [4, 2], "logprobs": [-0.5, -0.1], "finish_reason": "stop"}
PROBED = {
    "prompt_id": "7", "right": False, "tokens": ["a", "b"], "first_error": 1, "positions": [0, 1],
    "trials": 4, "student": [2, 0], "teacher": [4, 0], "onset_mass": [0.0, 0.4],
    "token_probability": [0.9, 0.1],
}  # fmt: skip
STATE = {"step": 1, "blake2b": {"inputs.json": "00"}}
METRICS = {"step": 1, "loss": 0.5, "tokens": 12, "seconds": {"train": 1.0}, "reverse_kl_nats": 0.1}


def completions(path: Path) -> Any:
    found = Replay(path.parent)
    for c in found._known.values():
        assert all(type(i) is int and i >= 0 for i in c.ids)
        assert all(isinstance(p, int | float) for p in c.logprobs)
    return found._known


KINDS: dict[str, tuple[Any, str, Callable[[Path], Any]]] = {
    "details": (DETAILS, "details.jsonl", read_details),
    "completions": (COMPLETION, "process-0.jsonl", completions),
    "probe": (PROBED, "prefix_failure.jsonl", read_probed),
    "checkpoint": (STATE, "step_1/state.json", lambda path: checkpoint._verified(path.parent)),
    "metrics": (METRICS, "metrics.jsonl", read_lines),
}


@pytest.mark.parametrize("kind", KINDS)
def test_five_hundred_of_each(kind: str, tmp_path: Path) -> None:
    good, name, read = KINDS[kind]
    path, rng = tmp_path / name, random.Random(kind)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(good) + "\n")
    assert bool(read(path)) == (kind != "checkpoint")
    said, empty = [], 0
    for _ in range(500):
        path.write_bytes(mutated(good, rng) + b"\n")
        try:
            empty += not read(path)
        except UserError as error:
            said.append(str(error))
    assert all(len(s) < 700 and not set("\n\x1b") & set(s) for s in said)
    assert len(said) + empty > 100, "most damage is noticed"
