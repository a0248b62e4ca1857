"""Content-addressed cache of what models generated: for data made once, before training, and for restarts.

Key: digest of (weights, prefix ids, sampling with its seed, name of the draw). One JSON line per completion,
in one file per process; a line that a killed writer left half-written is passed over and written again.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from onpath.engines.base import Engine, sampled
from onpath.engines.sharding import full
from onpath.records import Completion, Prompt, Rollout, Sampling
from onpath.system import distributed
from onpath.system.errors import UserError
from onpath.system.reading import json_lines


class Replay:
    """Completions by key, in a directory that all processes share."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.sealed = False
        """True: everything needed is there; a miss is a fault of ours, since the weights have moved on."""
        self._known: dict[str, Completion] = {}
        self._refresh()

    def share(self) -> None:
        """Waits for all processes and reads what they have generated: this one may need it later."""
        if distributed.world() > 1:
            distributed.barrier()
            self._refresh()

    def _refresh(self) -> None:
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
        path = self.directory / f"process-{distributed.rank()}.jsonl"
        lines = [json.dumps({"key": key, **asdict(c)}) + "\n" for key, c in found.items()]
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(("\n" if file.tell() else "") + "".join(lines))  # closes a half-written line
        except OSError as error:
            raise UserError(
                f"{path}: cannot write: {error.strerror}; free some space and start again"
            ) from None
        self._known |= found

    def answered(
        self, addresses: Sequence[str], generate: Callable[[list[int]], list[Completion]]
    ) -> list[Completion]:
        """A completion per address; `generate` gives those that are not known, by their places."""
        missing = [i for i, address in enumerate(addresses) if self.get(address) is None]
        if missing:
            assert not self.sealed, "asked for what the starting weights were not asked for in time"
            generated = generate(missing)
            self.put({addresses[i]: c for i, c in zip(missing, generated, strict=True)})
        found = [self.get(address) for address in addresses]
        return [c for c in found if c is not None]


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


class ReplayingEngine(Engine):
    """An engine whose weights stand still: each request is answered once, and then from the cache.

    `generate` names a request by its prompt alone, so that a prompt has the same samples in every step.
    """

    def __init__(self, engine: Engine, replay: Replay, *, weights: str) -> None:
        self.engine, self.replay, self.weights, self.renderer = engine, replay, weights, engine.renderer

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, n: int = 1, keys: Sequence[str] | None = None
    ) -> list[Rollout]:
        """See `Engine.generate`; `keys` are ignored."""
        return sampled(self, self.renderer, prompts, sampling, n=n, keys=None)

    def continue_from(
        self, prefixes: Sequence[Sequence[int]], sampling: Sampling, *, keys: Sequence[str] | None = None
    ) -> list[Completion]:
        """See `Engine.continue_from`."""
        names = [str(i) for i in range(len(prefixes))] if keys is None else list(keys)
        addresses = [self._address(p, sampling, name) for p, name in zip(prefixes, names, strict=True)]
        return self.replay.answered(
            addresses,
            lambda missing: self.engine.continue_from(
                [prefixes[i] for i in missing], sampling, keys=[names[i] for i in missing]
            ),
        )

    def score(
        self, contexts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> list[tuple[float, ...]]:
        """See `Engine.score`; not kept."""
        return self.engine.score(contexts, responses)

    def sync_weights(self, version: int) -> None:
        """Nothing: what is kept was generated by the starting weights."""

    def _address(self, prefix: Sequence[int], sampling: Sampling, name: str) -> str:
        return address(self.weights, list(prefix), asdict(sampling), name)


def address(*content: Any) -> str:
    """Key of a request: digest of all that its answer depends on."""
    return hashlib.blake2b(json.dumps(list(content)).encode(), digest_size=16).hexdigest()


@torch.no_grad()
def weights_digest(model: nn.Module) -> str:
    """Digest of all parameters by name. Of a sharded model all processes take part."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(
            full(parameter.detach()).cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()
