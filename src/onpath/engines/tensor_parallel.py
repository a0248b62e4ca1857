"""Processes that share one vLLM, each with a part of every matrix: what one asks, all of its group run.

Methods ask for different numbers of batches on different processes. Inside `in_step` whoever is done goes on
running what the others ask, until all are; and so does whoever comes to an exchange of all processes, which
one that still asks has yet to reach.
"""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from onpath.system import distributed
from onpath.system.errors import UserError

T = TypeVar("T")


class TensorGroup:
    """The processes of this one's vLLM, side by side on a host: an exchange of their own beside the run's.

    Args:
        size: processes that share one.
        timeout: seconds that an exchange waits.
    """

    def __init__(self, size: int, *, timeout: float) -> None:
        self.size = size
        # All processes make all groups; vLLM makes those of the same neighbours.
        with distributed.connecting():
            groups = [
                dist.new_group(range(i, i + size), timeout=timedelta(seconds=timeout), backend="gloo")
                for i in range(0, distributed.world(), size)
            ]
        self._group = groups[distributed.rank() // size]
        self.place = distributed.rank() % size

    def exchange(self, mine: T) -> list[T]:
        """What each of the group has, in their order."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, mine, group=self._group)
        return found


def group_of(options: Mapping[str, Any], *, timeout: float) -> TensorGroup | None:
    """None: each process has a vLLM of its own.

    Args:
        options: rollout.vllm.

    Raises:
        UserError: groups that these processes cannot make.
    """
    for kind in ("pipeline", "data"):
        if options.get(f"{kind}_parallel_size", 1) != 1:
            raise UserError(
                f"rollout.vllm: {kind}_parallel_size is for servers (rollout.url); processes that share a "
                "vLLM share its matrices: tensor_parallel_size"
            )
    size = options.get("tensor_parallel_size", 1)
    if not isinstance(size, int) or size < 1:
        raise UserError(f"rollout.vllm: tensor_parallel_size is {size!r}; give a number of processes")
    # A host that gives another number than the first would wait in vain.
    if size != distributed.first_decides(lambda: size):
        raise UserError("rollout.vllm: the first process has another tensor_parallel_size; give all the same")
    if distributed.local_world() % size:
        raise UserError(
            f"rollout.vllm: tensor_parallel_size {size} has so many processes of a host share a vLLM, and "
            f"there {'is one' if distributed.local_world() == 1 else f'are {distributed.local_world()}'}; "
            f"start them with torchrun --nproc-per-node {size}, or a multiple of it, or start a server with "
            "--tensor-parallel-size and set rollout.url"
        )
    return TensorGroup(size, timeout=timeout) if size > 1 else None
