"""OPSD: the student is its own teacher, shown privileged information (arXiv 2601.18734).

    y ~ p_S(·|x)
    L = Σ_t Σ_v min(p_T·(log p_T − log p_S)(v), 0.05) / Σ_t 1
        p_T = p_θ0(·|hint(x, y*), y_<t),   p_S = p_θ(·|x, y_<t)

Two contexts, one response. Teacher weights θ0 are the start's (LoRA: adapter off; else a frozen copy); `live`
and `ema` follow the student. Deviations: none in the loss; the teacher's prompt is worded by us (or by the
gym).
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from onpath.config.methods.opsd import OPSDOptions
from onpath.engines.forward import Kept, per_token
from onpath.methods.base import Method, Prepared, own_response
from onpath.methods.diagnose import token_means
from onpath.methods.tools import Tools, needed
from onpath.records import Prompt, Rollout, Trajectory
from onpath.system.errors import UserError


class OPSD(Method):
    """Gives each rollout a second context, in which the teacher has seen the solution."""

    Options = OPSDOptions
    options: OPSDOptions

    def __init__(self, options: OPSDOptions, tools: Tools) -> None:
        super().__init__(options, tools)
        named = tools.text.templates["hint" if options.hint == "solution" else "hint_answer"]
        self.template = options.template or named
        self.foreign: dict[str, Prompt] = {}
        """Each prompt's neighbour in the training pool, with another answer."""
        self.shown = ("own", "wrong") if options.shown == "contrast" else (options.shown,)
        """What the teacher is shown, in one context each; the first is the one that is trained on."""

    def prepare(self, rollouts: Sequence[Rollout], *, step: int) -> Prepared:
        """See `Method.prepare`."""
        trajectories, *wrong = [
            [own_response(r, teacher_context=self.privileged(r.prompt, shown)) for r in rollouts]
            for shown in self.shown
        ]
        if wrong:
            trajectories = self.contrasted(trajectories, *wrong)
        if not self.options.diagnose_every or step % self.options.diagnose_every:
            return Prepared(trajectories=trajectories)
        right = self.tools.text.right([(r, r.ids) for r in rollouts])
        kept = Kept()  # the loss runs no model again
        ids = self.tools.text.correction_ids
        means = token_means(per_token(self.tools.models, trajectories, keep=kept, mass_ids=ids), right)
        return Prepared(trajectories=trajectories, means=means, kept=kept)

    def contrasted(self, own: Sequence[Trajectory], wrong: Sequence[Trajectory]) -> list[Trajectory]:
        """With A_t = log p_T(y_t|own hint) − log p_T(y_t|wrong hint) (arXiv 2606.11709: what the hint changes
        less what a wrong one does; the student's own log-probs cancel)."""
        read = [per_token(self.tools.models, side) for side in (own, wrong)]
        logps = [[row.get("teacher_logp", ()) for row in rows] for rows in read]
        return [
            replace(t, advantages=tuple(a - b for a, b in zip(*pair, strict=True)))
            for t, *pair in zip(own, *logps, strict=True)
        ]

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Every privileged prompt and its response must fit the model.

        Raises:
            UserError: naming the first that does not.
        """
        if others := [shown for shown in self.shown if shown not in ("own", "none")]:
            told_apart = "wrong" in others or len({p.answer for p in prompts}) > 1
            column = "answer" if told_apart else self.options.hint
            if len({getattr(p, column) for p in prompts}) == 1:
                raise UserError(
                    f"method.shown: {self.options.shown} shows another problem's {column}, and all "
                    f"{len(prompts)} have the same or none; use data with several"
                )
            self.foreign = {p.id: other for p, other in neighbours(prompts, column)}
        new, longest = self.tools.sampling.max_new_tokens, self.tools.models.teacher.context_length
        for prompt in prompts:
            length = max(len(self.privileged(prompt, shown)) for shown in self.shown)
            if length + new > longest:
                raise UserError(
                    f"prompt {prompt.named} with its {self.options.hint} has {length} tokens; with {new} new "
                    f"ones it does not fit the model's context of {longest}: drop it, or lower "
                    "rollout.max_new_tokens"
                )

    def privileged(self, prompt: Prompt, shown: str) -> tuple[int, ...]:
        """Ids of a prompt that shows the hint, or what a control shows in its place."""
        if shown == "none":
            return self.tools.text.renderer.ids(prompt)
        if shown in ("foreign", "wrong"):
            prompt = misled(prompt, self.foreign[prompt.id], wrong=shown == "wrong")
        return self.tools.text.privileged_context(prompt, self.template, self.options.hint)


def neighbours(prompts: Sequence[Prompt], column: str) -> Iterator[tuple[Prompt, Prompt]]:
    """Each prompt, from the last to the first, and the next one, around the end, that has another answer (or
    solution, as `column` says); itself, where all have one."""
    differs: Prompt | None = None  # the first behind here whose answer is not that of the next one
    after: Prompt | None = None
    for p in (*reversed(prompts), *reversed(prompts)):
        if after is not None and getattr(after, column) != getattr(p, column):
            differs = after
        yield p, p if differs is None else differs
        after = p


def misled(prompt: Prompt, foreign: Prompt, *, wrong: bool) -> Prompt:
    """A problem with another one's solution and answer; wrong: with its own solution, in which the other's
    answer stands where its own did last."""
    if not wrong:
        return replace(prompt, solution=foreign.solution, answer=foreign.answer)
    solution, own = needed(prompt, "solution", "shown: wrong"), needed(prompt, "answer", "shown: wrong")
    whole = list(re.finditer(rf"(?<![\w.]){re.escape(own)}(?!\.?\w)", solution))  # not the 2 of 12
    if not whole or foreign.answer in (None, own):
        return replace(prompt, solution=f"{solution} {foreign.answer}")
    start, end = whole[-1].span()
    return replace(prompt, solution=f"{solution[:start]}{foreign.answer}{solution[end:]}")
