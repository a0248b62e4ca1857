"""Content-addressed cache of what a black box has answered: a killed run does not ask, and pay, again.

Key: digest of the request. One JSON line per completion, in one file per process; a line that a killed
writer left half-written is passed over and written again.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from onpath.records import Completion
from onpath.system import distributed
from onpath.system.files import append_lines
from onpath.system.reading import json_lines


class Replay:
    """Completions by key, in a directory that all processes share."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._known: dict[str, Completion] = {}
        """The first answer to a request stands."""
        for path in sorted(self.directory.glob("*.jsonl")):
            self._known = {**_read(path), **self._known}

    def get(self, key: str) -> Completion | None:
        return self._known.get(key)

    def put(self, found: Mapping[str, Completion]) -> None:
        """Stores completions, on disk before in memory.

        Raises:
            UserError: the disk is full or not writable.
        """
        lines = [json.dumps({"key": key, **asdict(c)}) for key, c in found.items()]
        append_lines(self.directory / f"process-{distributed.rank()}.jsonl", lines)
        self._known |= found

    def answered(
        self, addresses: Sequence[str], generate: Callable[[list[int]], list[Completion]]
    ) -> list[Completion]:
        """A completion per address; `generate` gives those that are not known, by their places."""
        missing = [i for i, address in enumerate(addresses) if address not in self._known]
        if missing:
            generated = generate(missing)
            self.put({addresses[i]: c for i, c in zip(missing, generated, strict=True)})
        return [self._known[address] for address in addresses]


def _read(path: Path) -> dict[str, Completion]:
    found: dict[str, Completion] = {}
    for _, _, row in json_lines(path):  # without those that are blank, half-written or spoilt
        if _is_sound(row):
            completion = Completion(
                ids=tuple(row["ids"]), logprobs=tuple(row["logprobs"]), finish_reason=row["finish_reason"]
            )
            found.setdefault(row["key"], completion)
    return found


def _is_sound(row: Any) -> bool:
    """Damage that is still JSON must not become a completion."""
    if not isinstance(row, dict) or not isinstance(row.get("key"), str):
        return False
    ids, logprobs = row.get("ids"), row.get("logprobs")
    return (
        isinstance(ids, list)
        and isinstance(logprobs, list)
        and all(type(i) is int and i >= 0 for i in ids)
        and all(type(p) in (int, float) and p <= 1e-3 for p in logprobs)
        and len(logprobs) in (0, len(ids))
        and row.get("finish_reason") in ("stop", "length")
    )


def address(*content: Any) -> str:
    """Key of a request: digest of all that its answer depends on."""
    return hashlib.blake2b(json.dumps(list(content)).encode(), digest_size=16).hexdigest()
