"""Relay's legs by both models of this process, side by side: the student writes windows, the teacher checks
them (engines/decoding/side_by_side.py); behind a rollout's first takeover, or from the prompt on."""

from collections.abc import Sequence
from dataclasses import replace

from onpath.config.methods.relay import RelayOptions
from onpath.engines.decoding.side_by_side import Finished, Start
from onpath.engines.forward import Kept
from onpath.methods.mixed import Cost, Mixed, keep_read
from onpath.methods.tools import Tools
from onpath.records import Completion, FinishReason, Prompt, Rollout, all_by
from onpath.system.errors import UserError


class SideBySide:
    """Both models as one writer.

    Args:
        most: takeovers of one response.
    """

    def __init__(self, options: RelayOptions, tools: Tools, most: int) -> None:
        self.options, self.tools, self.most = options, tools, most
        self.kept, self.cost = Kept(), Cost()

    @property
    def wanted(self) -> bool:
        """Whether single tokens decide, and each is the other model's too."""
        return self.options.side_by_side and not self.tools.models.ends

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Whether they can write for these prompts.

        Raises:
            UserError: they cannot.
        """
        able = self.wanted and all(self._asked(name, []) is not None for name in {p.teacher for p in prompts})
        if not able:
            raise UserError(
                "method.from_start has both models write in this process: it needs transformers models that "
                "take a mask of onpath's, no stop strings, and method.ends: apart; set it to false"
            )

    def rollouts(self, blank: Sequence[Rollout], keys: Sequence[str], when: str) -> list[Rollout]:
        """Whole responses; `left` has what was read meanwhile.

        Args:
            keys: see `Method.write_rollouts`.
        """
        done = self.finish([Mixed.of(r) for r in blank], self.cost, self.kept, when, first=keys)
        if done is None:
            raise RuntimeError("`check` was not asked")
        self.cost.student -= sum(m.writers.count("student") for m in done)  # counted as the rollouts'
        return [replace(m.z, writers=m.writers) for m in done]

    def left(self) -> tuple[Kept, Cost]:
        """What `rollouts` has read and cost, once."""
        found = self.kept, self.cost
        self.kept, self.cost = Kept(), Cost()
        return found

    def finish(
        self, some: Sequence[Mixed], cost: Cost, kept: Kept, when: str, *, first: Sequence[str] | None = None
    ) -> list[Mixed] | None:
        """Each response that is open to its end; None: these engines, or these options, do not allow it.

        Args:
            kept: receives the teacher's states, of responses whose beginning it has.
            first: see `Start.first`.
        """
        if not self.wanted:
            return None
        going = [i for i, m in enumerate(some) if m.open]
        starts = [
            Start(
                ids=some[i].z.prefix(len(some[i].z.ids)),
                position=len(some[i].z.ids),
                room=some[i].z.sampling.max_new_tokens - len(some[i].z.ids),
                key=f"{when}/{some[i].y.key}/relay",
                first="" if first is None else first[i],
                takeovers=self.most - len(some[i].places),
            )
            for i in going
        ]
        done: dict[int, Finished] = {}
        names = [some[i].y.prompt.teacher for i in going]
        for name in dict.fromkeys(names):
            mine = [n for n, other in enumerate(names) if other == name]
            ends = self._asked(name, [starts[n] for n in mine])
            if ends is None:
                return None
            done |= zip((going[n] for n in mine), ends, strict=True)
        found = list(some)
        for i, end in done.items():
            found[i] = _ended(some[i], end)
            cost.student, cost.teacher = cost.student + end.student_tokens, cost.teacher + len(end.by_teacher)
            read = None if end.read is None else end.read.to(self.tools.models.device)
            keep_read(some[i], found[i], read, kept, known=some[i].y)
        return found

    def _asked(self, name: str | None, starts: Sequence[Start]) -> list[Finished] | None:
        engines, delta = self.tools.generators, self.options.delta
        return engines.student.relay(engines.teacher.of(name), starts, self.tools.sampling, delta=delta)


def _ended(begun: Mixed, end: Finished) -> Mixed:
    reason: FinishReason = "stop" if end.stopped else "length"
    writers = list(all_by("student", len(end.ids)))
    for at in end.by_teacher:
        writers[at] = "teacher"
    size = len(begun.z.ids)
    return replace(
        begun,
        z=begun.z.continued(Completion(ids=end.ids, logprobs=end.logprobs, finish_reason=reason)),
        writers=(*begun.writers, *writers),
        places=(*begun.places, *(size + at for at in end.by_teacher)),
    )
