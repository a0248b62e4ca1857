"""A teacher behind a wire: its likeliest tokens at each response position, as the losses take them."""

import threading
from collections.abc import Iterable
from concurrent.futures import Future

import torch
from transformers import DynamicCache

from onpath.data.batch import Batch
from onpath.engines.remote.server import ServedScores, ServerEngine
from onpath.engines.remote.wire import Questions
from onpath.engines.teacher import Read, Teacher, read_by
from onpath.losses import TeacherTopK
from onpath.records import Trajectory


class ServedTeacher(Teacher):
    """Scores by `prompt_logprobs` of a server.

    Args:
        engine: over the server.
        k: tokens per position.
        context_length: of the student, where the server does not say its own.
    """

    spare = 1  # a server generates a token after what it scores

    def __init__(self, engine: ServerEngine, *, k: int, context_length: int) -> None:
        self.engine, self.k = engine, k
        self.context_length = engine.server.context_length or context_length
        self._known: dict[Read, ServedScores] = {}
        """Of this step: a method and the loss ask for the same ones."""
        self._coming: dict[Read, Future[ServedScores]] = {}
        self._unread: set[Read] = set()
        """Of what is coming, what was there when the last step ended."""
        self._asking = threading.Lock()
        self._questions: Questions | None = None

    def expect(self, trajectories: Iterable[Trajectory]) -> None:
        """See `Teacher.expect`: the server is asked now."""
        with self._asking:
            wanted = dict.fromkeys(read_by(t) for t in trajectories)
            new = [key for key in wanted if key not in self._known and key not in self._coming]
            if new:
                self._questions = self._questions or Questions(self.engine.server)
                contexts, responses = zip(*new, strict=True)
                asked = self.engine.begin_scores(self._questions, contexts, responses, k=self.k)
                self._coming.update(zip(new, asked, strict=True))

    def begun(self, trajectory: Trajectory) -> ServedScores | None:
        """See `Teacher.begun`: the answer. A question that has not been sent is the other process's own."""
        key = read_by(trajectory)
        with self._asking:
            coming = self._coming.get(key)
            if coming is not None and coming.cancel():
                del self._coming[key]
        return self._answers([key])[0] if key in self._known or key in self._coming else None

    def take_over(self, trajectory: Trajectory, read: object) -> None:
        """See `Teacher.take_over`."""
        assert isinstance(read, ServedScores)
        self._known[read_by(trajectory)] = read

    def follow(self) -> None:
        """See `Teacher.follow`: the step is over. Rollouts of the next one may have been shown already; what
        nobody has read by its end is not wanted any more."""
        with self._asking:
            self._known.clear()
            for key in self._unread & self._coming.keys():
                del self._coming[key]
            self._unread = set(self._coming)

    def close(self) -> None:
        """See `Teacher.close`."""
        with self._asking:
            questions, self._questions = self._questions, None
            self._coming.clear()
        if questions is not None:
            questions.close()

    def scores(self, batch: Batch, cache: DynamicCache | None = None) -> TeacherTopK:
        """See `Teacher.scores`: rows of k entries, −inf where a position has fewer."""
        self.expect(batch.trajectories)
        rows = self._answers([read_by(t) for t in batch.trajectories])
        device = batch.token_N.device
        pads = [
            (ids, logps, self.k - len(ids))
            for s in rows
            for ids, logps in zip(s.ids, s.logprobs, strict=True)
        ]
        unused = [_unused(ids, pad) for ids, _, pad in pads]
        ids_Nk = torch.tensor(
            [[*ids, *rest] for (ids, _, _), rest in zip(pads, unused, strict=True)], device=device
        )
        logp_Nk = torch.tensor([[*logps, *[-torch.inf] * pad] for _, logps, pad in pads], device=device)
        return TeacherTopK(
            ids=ids_Nk.reshape(-1, self.k),
            logp=logp_Nk.reshape(-1, self.k),
            sampled_logp=torch.tensor([p for s in rows for p in s.sampled], device=device),
        )

    def _answers(self, keys: list[Read]) -> list[ServedScores]:
        """To what the server was asked."""
        for key in keys:
            if key not in self._known:
                try:
                    self._known[key] = self._coming[key].result()
                except BaseException:
                    self.close()  # the next one who asks is not given the failure of this one
                    raise
                del self._coming[key]
        return [self._known[key] for key in keys]


def _unused(ids: tuple[int, ...], count: int) -> list[int]:
    """Distinct ids to pad with: each row's ids must differ."""
    taken, spare = set(ids), 0
    found: list[int] = []
    while len(found) < count:
        if spare not in taken:
            found.append(spare)
        spare += 1
    return found
