"""FSDP2's two exchanges over gloo, in the memory that they are given.

torch's own gather fills a second buffer of all rows and copies it; its reduce-scatter sums a copy of all
gradients. gloo's threads make both, each on a heap of its own, which never shrinks.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule


def exchange_in_place(unit: FSDPModule) -> None:
    """From now on this unit's weights are gathered, and its gradients summed, in FSDP2's own buffers."""
    taken: Any = unit  # the classes of both arguments are torch's private ones
    taken.set_custom_all_gather(_Gather())
    taken.set_custom_reduce_scatter(_ReduceScatter())


class _Exchange:
    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _Gather(_Exchange):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False
    ) -> None:
        """Each process in turn sends its rows to where they belong; FSDP2 has put its own there."""
        parts = output_tensor.chunk(group.size())
        assert parts[group.rank()].data_ptr() == input_tensor.data_ptr(), "the input is a part of the output"
        for process, part in enumerate(parts):
            dist.broadcast(part, src=dist.get_global_rank(group, process), group=group)


class _ReduceScatter(_Exchange):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        """Each process in turn is sent the sum of its rows. The input, which nobody reads again, is lost."""
        for process, part in enumerate(input_tensor.chunk(group.size())):
            dist.reduce(part, dst=dist.get_global_rank(group, process), op=op, group=group)
            if process == group.rank():
                output_tensor.copy_(part)
