"""Relay: the student generates, and where its token is bad the teacher generates instead, then the student
goes on (ours; nearest: speculative knowledge distillation, DAgger; Relay-OPD, arXiv 2607.26057).

    for t = 1 …:   a ~ p_S(·|x, z_<t)
        z_t = a                    if log p_S(a) − log p_T(a) ≤ δ         (`trigger: log_ratio`)
              b ~ p_T(·|x, z_<t)   else, and `hold` more from the teacher; then the student goes on
    L = Σ_t KL(p_S ‖ p_T) / Σ_t 1 along z        the rejected token is still in the loss of its position

What comes after an error is then learnt in contexts without it. The rollout y up to its first bad token is z;
from there on both models decode side by side, in windows that the teacher checks; or, on engines that cannot,
in rounds: the teacher takes over, the student goes on to the end, and the next round looks at what is new (a
server by prefix continuation). With `from_start` they decode side by side from the first token on, and y is
never written. All are the loop above token by token: a leg's draws are named by where it starts.
Triggers (triggers.py) beside ours: `reflection`, Relay-OPD's (the teacher's likeliest token opens a
correction and is not among the student's K; `hold` long, `paragraphs: 3`, `legs: 2`; its K is not known to
us: 20), TOPD's `fork`, `first_error` by the task's checker.
Controls: `control: own_token`, `control: random_place`; and `opd`.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from onpath.config.methods.relay import RelayOptions
from onpath.engines.forward import Kept, Pass, forward
from onpath.methods.base import Method, Prepared, Tools, own_response
from onpath.methods.mixed import Cost, Mixed, keep_read, relayed_on, student_goes_on, trained_on
from onpath.methods.places import by_lot
from onpath.methods.triggers import takeovers
from onpath.records import Completion, Prompt, Rollout, Writer
from onpath.system.errors import UserError

_UNABLE = (
    "method.from_start has both models write in this process: it needs transformers models that take a mask "
    "of onpath's, no stop strings, and method.ends: apart; set it to false"
)


class Relay(Method):
    """Replaces tokens, and what the student made of them."""

    Options = RelayOptions
    options: RelayOptions

    def __init__(self, options: RelayOptions, tools: Tools) -> None:
        super().__init__(options, tools)
        self.most = options.legs or tools.sampling.max_new_tokens
        self.read, self.cost = Kept(), Cost()  # of `write_rollouts`, for `prepare`

    def before_training(self, prompts: Sequence[Prompt], directory: Path) -> str:
        """See `Method.before_training`."""
        if self.options.from_start:
            engines, sampling, delta = self.tools.generators, self.tools.sampling, self.options.delta
            for name in {p.teacher for p in prompts}:
                if engines.student.relay(engines.teacher.of(name), [], sampling, delta=delta) is None:
                    raise UserError(_UNABLE)
            if self.tools.models.ends:
                raise UserError(_UNABLE)
        return ""

    def prepare(self, rollouts: Sequence[Rollout], *, step: int) -> Prepared:
        """See `Method.prepare`."""
        kept, cost, when = self.read, self.cost, f"step {step}"
        self.read, self.cost = Kept(), Cost()
        done = [Mixed.of(r) for r in rollouts]
        todo = [i for i, m in enumerate(done) if m.z.ids and not m.y.writers]
        while todo:
            taken = self.taken_over([done[i] for i in todo], kept, cost, when)
            todo = [todo[i] for i in taken]
            legs = self.side_by_side(list(taken.values()), cost, kept, when)
            settled = legs is not None
            if legs is None:
                keys = [f"{when}/{m.y.key}/relay {m.start}" for m in taken.values()]
                legs = student_goes_on(list(taken.values()), self.tools, cost, keys)
            for i, leg in zip(todo, legs, strict=True):
                done[i] = leg
            if settled:
                break
            todo = [i for i in todo if done[i].start < len(done[i].z.ids) and len(done[i].places) < self.most]
        return trained_on(done, self.tools, cost, kept, kind="relay")

    def write_rollouts(
        self, blank: Sequence[Rollout], *, keys: Sequence[str], step: int
    ) -> Sequence[Rollout]:
        """See `Method.write_rollouts`: both models write from the first token on."""
        begun = [Mixed.of(r) for r in blank]
        done = self.side_by_side(begun, self.cost, self.read, f"step {step}", first=keys)
        if done is None:
            raise UserError(_UNABLE)
        self.cost.student -= sum(len(m.z.ids) for m in done)  # counted as the rollouts'
        return [replace(m.z, writers=m.writers) for m in done]

    def side_by_side(
        self, some: Sequence[Mixed], cost: Cost, kept: Kept, when: str, first: Sequence[str] | None = None
    ) -> list[Mixed] | None:
        """All further legs at once, where a single token decides and both models are in this process."""
        options = self.options
        if options.trigger != "log_ratio" or options.hold or options.control != "none":
            return None
        if self.tools.models.ends:  # the windows compare tokens
            return None
        keys = [f"{when}/{m.y.key}/relay" for m in some]
        given = some, self.tools, cost, kept, keys
        return relayed_on(*given, delta=options.delta, most=self.most, first=first)

    def taken_over(self, some: Sequence[Mixed], kept: Kept, cost: Cost, when: str) -> dict[int, Mixed]:
        """Those in which somebody takes over next, up to where the student goes on."""
        found = {}
        own, options = [own_response(m.z) for m in some], self.options
        who: Writer = "student" if options.control == "own_token" else "teacher"
        top_k = options.reflection_k if options.trigger == "reflection" else 0
        for one in forward(self.tools.models, own, keep=kept, past=True, top_k=top_k):
            at = takeovers(some, one, options, self.tools, cost)
            if options.control == "random_place":
                at = {i: self.elsewhere(some[i], f"{when}/{some[i].y.key}/relay") for i in at}
            written = self.written([m.z for m in some], list(at.items()), cost, one, when)
            for (i, t), completion in zip(at.items(), written, strict=True):
                mixed = some[i].cut(t).then(completion, who)
                if not mixed.open and len(mixed.z.ids) == t + 1:  # nobody goes on: all of it has been read
                    keep_read(mixed, mixed, None, kept, known=some[i].z)
                found[i] = replace(mixed, start=len(mixed.z.ids))
        return found

    def elsewhere(self, mixed: Mixed, key: str) -> int:
        """A place of the student's last leg by lot."""
        size = len(mixed.z.ids) - mixed.start
        return mixed.start + by_lot(self.tools.sampling.seed, f"{key} {mixed.start}/place", size)

    def written(
        self, zs: Sequence[Rollout], places: Sequence[tuple[int, int]], cost: Cost, one: Pass, when: str
    ) -> list[Completion]:
        """1 + `hold` tokens after each place, or up to so many paragraphs."""
        keys = [f"{when}/{zs[i].key}/relay {t}/draw" for i, t in places]
        sampling = replace(self.tools.sampling, max_new_tokens=1 + self.options.hold)
        if self.options.control == "own_token":
            cut = [Mixed.of(zs[i]).cut(t).z for i, t in places]
            done, generated = self.tools.student_continues(cut, keys, at_most=1 + self.options.hold)
            cost.student += generated
        else:
            done = self.tools.teacher_continues(zs, places, sampling, keys, one)
            cost.teacher += sum(len(c.ids) for c in done)
        return [self.up_to_paragraph(c) for c in done] if self.options.paragraphs else done

    def up_to_paragraph(self, completion: Completion) -> Completion:
        """Up to the token that ends the last paragraph that the teacher writes."""
        text = self.tools.text.renderer.text
        for n in range(1, len(completion.ids)):
            if text(completion.ids[:n]).count("\n\n") >= self.options.paragraphs:
                return completion.truncated(n)
        return completion
