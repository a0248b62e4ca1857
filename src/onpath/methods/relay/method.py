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
correction and is not among the student's K; `hold` long, `paragraphs: 3`, `legs: 2`), TOPD's `fork`,
`first_error` by the task's checker.
Deviations from Relay-OPD: its K, and which words open a correction, are not known to us (20, ours); by
default the log-ratio decides and one token is the teacher's.
Controls: `control: own_token`, `control: random_place`; and `opd`.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from onpath.config.methods.relay import RelayOptions
from onpath.engines.forward import Kept, forward
from onpath.methods.base import Method, Prepared, own_response
from onpath.methods.mixed import Cost, Mixed, goes_on_for, keep_read, student_goes_on, trained_on
from onpath.methods.places import by_lot
from onpath.methods.relay.side_by_side import SideBySide
from onpath.methods.relay.triggers import takeovers
from onpath.methods.tools import Tools
from onpath.records import Completion, Prompt, Rollout, Writer


class Relay(Method):
    """Replaces tokens, and what the student made of them."""

    Options = RelayOptions
    options: RelayOptions

    def __init__(self, options: RelayOptions, tools: Tools) -> None:
        super().__init__(options, tools)
        self.most = options.legs or tools.sampling.max_new_tokens
        self.beside = SideBySide(options, tools, self.most)

    def before_training(self, prompts: Sequence[Prompt], directory: Path) -> str:
        """See `Method.before_training`."""
        if self.options.from_start:
            self.beside.check(prompts)
        return ""

    def write_rollouts(
        self, blank: Sequence[Rollout], *, keys: Sequence[str], step: int
    ) -> Sequence[Rollout]:
        """See `Method.write_rollouts`: both models write from the first token on."""
        return self.beside.rollouts(blank, keys, f"step {step}")

    def prepare(self, rollouts: Sequence[Rollout], *, step: int) -> Prepared:
        """See `Method.prepare`."""
        (kept, cost), when = self.beside.left(), f"step {step}"
        done = [Mixed.of(r) for r in rollouts]
        todo = [i for i, m in enumerate(done) if m.z.ids and not m.y.writers]
        while todo:
            taken = self.taken_over([done[i] for i in todo], kept, cost, when)
            todo = [todo[i] for i in taken]
            legs = self.beside.finish(list(taken.values()), cost, kept, when)
            settled = legs is not None
            if legs is None:
                keys = [f"{when}/{m.y.key}/relay {m.start}" for m in taken.values()]
                legs = student_goes_on(list(taken.values()), self.tools, cost, keys)
            for i, leg in zip(todo, legs, strict=True):
                done[i] = leg
            kept.only(
                own_response(m.z) for m in done
            )  # else the graphs of all legs would live until the loss
            if settled:
                break
            todo = [i for i in todo if done[i].start < len(done[i].z.ids) and len(done[i].places) < self.most]
        return trained_on(done, self.tools, cost, kept, kind="relay")

    def taken_over(self, some: Sequence[Mixed], kept: Kept, cost: Cost, when: str) -> dict[int, Mixed]:
        """Those in which somebody takes over next, up to where the student goes on."""
        found = {}
        own, options = [own_response(m.z) for m in some], self.options
        who: Writer = "student" if options.control == "own_token" else "teacher"
        top_k = options.reflection_k if options.trigger == "reflection" else 0
        sampling = replace(self.tools.sampling, max_new_tokens=1 + options.hold)
        for one in forward(self.tools.models, own, keep=kept, past=True, top_k=top_k):
            at = takeovers(some, one, options, self.tools, cost)
            if options.control == "random_place":
                at = {i: self.elsewhere(some[i], t, f"{when}/{some[i].y.key}/relay") for i, t in at.items()}
            keys = [f"{when}/{some[i].y.key}/relay {t}/draw" for i, t in at.items()]
            zs, places = [m.z for m in some], list(at.items())
            written = goes_on_for(zs, places, who, self.tools, cost, sampling, keys, one)
            for (i, t), completion in zip(places, written, strict=True):
                mixed = some[i].cut(t).then(self.up_to_paragraph(completion), who)
                if not mixed.open and len(mixed.z.ids) == t + 1:  # nobody goes on: all of it has been read
                    keep_read(mixed, mixed, None, kept, known=some[i].z)
                found[i] = replace(mixed, start=len(mixed.z.ids))
        return found

    def elsewhere(self, mixed: Mixed, fired: int, key: str) -> int:
        """Another place of the student's last leg by lot, about as far from its start as the trigger's: what
        stands before is settled, so that later places would leave room for fewer takeovers."""
        last = min(len(mixed.z.ids) - 1, max(2 * fired - mixed.start, mixed.start + 2))
        others = [t for t in range(mixed.start, last + 1) if t != fired] or [fired]
        return others[by_lot(self.tools.sampling.seed, f"{key} {mixed.start}/place", len(others))]

    def up_to_paragraph(self, completion: Completion) -> Completion:
        """Up to the token that ends the last paragraph that the teacher writes."""
        text, wanted = self.tools.text.renderer.text, self.options.paragraphs
        sizes = range(1, len(completion.ids) if wanted else 1)
        at = bisect_left(sizes, wanted, key=lambda n: text(completion.ids[:n]).count("\n\n"))
        return completion.truncated(sizes[at]) if at < len(sizes) else completion
