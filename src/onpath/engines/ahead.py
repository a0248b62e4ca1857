"""A teacher in this process that reads rollouts while a server still writes others: without it the teacher's
device idles until the last one is there. Nothing gets older by it.

Each response is read alone, so that what it gets does not depend on which was finished first.
"""

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from onpath.data.batch import Batch, collate
from onpath.engines.decoding.branches import Past
from onpath.engines.teacher import ModelTeacher, Read, read_by
from onpath.records import Trajectory


class AheadTeacher(ModelTeacher):
    """A frozen model with its own device and dtype, and a thread that reads what it is shown. The model must
    be in one piece: a pass of a sharded one is an exchange.
    """

    def __init__(self, model: nn.Module, *, vocabulary: int | None = None) -> None:
        super().__init__(model, vocabulary=vocabulary)
        self._asking = threading.Lock()
        self._thread: ThreadPoolExecutor | None = None
        self._rows: dict[Read, Future[Tensor]] = {}
        self._pays = True
        self._early = 0

    def begin(self, trajectory: Trajectory) -> None:
        """See `Teacher.begin`."""
        with self._asking:
            key = read_by(trajectory)
            if self._pays and trajectory.response and key not in self._rows:
                self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="onpath-teacher")
                self._rows[key] = self._thread.submit(self._alone, trajectory)

    def begun(self, trajectory: Trajectory) -> Tensor | None:
        """See `Teacher.begun`: [n, H]."""
        coming = self._rows.get(read_by(trajectory))
        return None if coming is None else coming.result()

    def take_over(self, trajectory: Trajectory, read: object) -> None:
        """See `Teacher.take_over`."""
        assert isinstance(read, Tensor)
        done = Future[Tensor]()
        done.set_result(read)
        self._rows[read_by(trajectory)] = done

    def hidden(self, batch: Batch, cache: DynamicCache | None = None) -> Tensor:
        """See `ModelTeacher.hidden`: what the thread was shown is waited for."""
        coming = [self._rows.get(read_by(t)) for t in batch.trajectories]
        found = [one for one in coming if one is not None]
        if cache is not None or len(found) < len(coming):
            return super().hidden(batch, cache)
        self._early += len(batch.token_N)
        return torch.cat([one.result() for one in found]).to(batch.token_N.device)

    def past(self, batches: Sequence[Batch]) -> Past | None:
        """See `Teacher.past`. Who wants keys and values has a pass made for them: the thread read in vain."""
        self._pays = False
        return super().past(batches)

    def measured(self) -> Mapping[str, float]:
        """See `Teacher.measured`."""
        early, self._early = self._early, 0
        return {"teacher_tokens_scored_early": early}

    def follow(self) -> None:
        """See `Teacher.follow`: the step is over, and what it read is not wanted any more."""
        self._rows.clear()

    def close(self) -> None:
        """See `Teacher.close`."""
        with self._asking:
            thread, self._thread = self._thread, None
            self._rows.clear()
        if thread is not None:
            thread.shutdown(cancel_futures=True)

    def _alone(self, trajectory: Trajectory) -> Tensor:
        """[n, H] in host memory: those of a whole step may be more than the device has left."""
        return super().hidden(collate([trajectory], device=self.device)).cpu()
