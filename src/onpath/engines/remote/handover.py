"""How the trained weights get to a server (`rollout.push`): whole or as the adapter alone, over a directory
that the servers can read; or from GPU to GPU (`transfer.py`).

An adapter's name there and at a server is a digest of what it holds, so that a name never means other weights
than it meant: prefixes cached of older ones do no harm, and a server that was started anew, or missed a push,
is known by not having the name.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from onpath.engines import adapters
from onpath.engines.adapters import merged_weights
from onpath.engines.head import sharded
from onpath.engines.remote.host import Host
from onpath.engines.remote.wire import Server
from onpath.engines.sharding import digest_weights, full
from onpath.engines.weights import save_weights
from onpath.system import distributed
from onpath.system.files import remove_all_but, written


class Handover(Protocol):
    """What goes to the servers of a student, and how."""

    def write(self) -> None:
        """Puts the weights of now where the servers can read them; all processes take part."""

    def give(self, host: Host) -> None:
        """Has one server take what was written last."""

    def lacks(self, host: Host) -> bool:
        """Whether a server says that it does not have it; one that cannot say is asked for log-probs."""

    def tensors(self) -> Iterator[Tensor]:
        """What is pushed, one tensor after the other."""

    @property
    def where(self) -> str | Path:
        """Where the last ones are or went, for people."""


class WholeWeights:
    """One safetensors file, adapters merged, in place of the weights that the server has.

    Args:
        student: the model that trains.
        directory: that the servers can read.
    """

    def __init__(self, student: nn.Module, directory: Path) -> None:
        self.student, self.where = student, directory

    def write(self) -> None:
        """See `Handover.write`."""
        save_weights(self.student, self.where)

    def give(self, host: Host) -> None:
        """See `Handover.give`. Prefixes that it has cached are those of other weights."""
        where = {"weights_path": str(self.where.resolve())}
        host.exchange("POST", "/collective_rpc", {"method": "reload_weights", "kwargs": where})
        host.exchange("POST", "/reset_prefix_cache")

    def lacks(self, host: Host) -> bool:
        """See `Handover.lacks`."""
        return False

    def tensors(self) -> Iterator[Tensor]:
        """See `Handover.tensors`."""
        return (tensor for _, tensor in merged_weights(self.student))


class AdapterAlone:
    """The adapter, beside the base that the server has: it is asked by the adapter's name.

    Args:
        student: the model that trains, with an adapter.
        directory: that the servers can read.
        server: is told the name.
    """

    def __init__(self, student: nn.Module, directory: Path, server: Server) -> None:
        self.student, self.directory, self.server = student, directory, server
        place = hashlib.blake2b(str(directory.resolve()).encode(), digest_size=4).hexdigest()
        self._mine = f"onpath-{place}-"
        """How the names of this run's adapters begin."""

    @property
    def where(self) -> Path:
        """See `Handover.where`."""
        return self.directory / str(self.server.adapter)

    def write(self) -> None:
        """See `Handover.write`. What was written before goes."""
        self.server.adapter = self._mine + self._digest()
        if distributed.rank() > 0:
            if sharded(self.student):
                adapters.save(self.student, None, home=self.where)
            return
        with written(self.where) as temporary:
            adapters.save(self.student, temporary, home=self.where)
        remove_all_but(self.where)

    @torch.no_grad()
    def _digest(self) -> str:
        """Of the adapter's weights; all processes take part."""
        digest = hashlib.blake2b(digest_size=8)
        digest_weights(digest, {n: p for n, p in self.student.named_parameters() if p.requires_grad})
        return digest.hexdigest()

    def give(self, host: Host) -> None:
        """See `Handover.give`. This run's older ones leave the server."""
        name, there = self.where.name, self.server.models_at(host)
        if name not in there:
            asked = {"lora_name": name, "lora_path": str(self.where.resolve())}
            host.exchange("POST", "/v1/load_lora_adapter", asked, wanted=False)
        for other in there:
            if other.startswith(self._mine) and other != name:
                host.exchange("POST", "/v1/unload_lora_adapter", {"lora_name": other}, wanted=False)

    def lacks(self, host: Host) -> bool:
        """See `Handover.lacks`."""
        return self.where.name not in self.server.models_at(host)

    def tensors(self) -> Iterator[Tensor]:
        """See `Handover.tensors`."""
        return (full(p.detach()) for p in self.student.parameters() if p.requires_grad)
