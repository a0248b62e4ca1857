"""TRD: the teacher rewrites the student's rollout, and the student learns along the rewrite (arXiv
2606.08432).

    y ~ p_S(·|x)                                       the attempt
    r = rewrite_prompt(x, y)   or, teacher: self,   r = rewrite_prompt(x, y*, y)
    z ~ p_T(·|r)                                       T = 0.6; every row, right or wrong
    L = Σ_t KL(p_T(·|r, z_<t) ‖ p_S(·|x, z_<t)) / Σ_t 1        over the whole batch, EOS included

The ids of r that z continues are the teacher's context when it scores z. A wrong prefix of y, which the
teacher could only continue, is never trained on: that is what token-level weights cannot do.

Deviations from the published code, each with the option that undoes it: a fresh y and z at every update
(`rollout.refresh: never`); y at T = 1 (`rollout.temperature`); z without top-p (`rewrite_top_p: 0.95`); chat
template and EOS in what is trained on (`paper_compat`: plain text and a line break before z, on the student's
side and on the teacher's; z itself was generated after the template); a rewrite without any text is dropped
and counted; a gate before training; the prompts' wording is ours, or the gym's.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from onpath.config.methods.trd import TRDOptions
from onpath.data.render import Renderer
from onpath.engines.forward import Kept, teacher_key
from onpath.methods.base import Method, Prepared, Rehearsal, check_generated
from onpath.methods.tools import Tools
from onpath.methods.trd.edits import Rewrite, as_edit
from onpath.methods.trd.gate import gate, refinement, refusal
from onpath.methods.trd.metrics import edit_means, measured
from onpath.methods.trd.rewriter import Rewriter
from onpath.records import Prompt, Rollout, Trajectory, all_by


class TRD(Method):
    """Replaces each rollout by the teacher's rewrite of it."""

    Options = TRDOptions
    options: TRDOptions

    def __init__(self, options: TRDOptions, tools: Tools) -> None:
        super().__init__(options, tools)
        self.rewrite = Rewriter(options, tools)
        self.bare = Renderer(tools.text.renderer.tokenizer, template="plain")

    def prepare(self, rollouts: Sequence[Rollout], *, step: int) -> Prepared:
        """See `Method.prepare`."""
        rewrites = self.rewrite(rollouts, when=f"step {step}")
        trajectories = [self.trajectory(w) for w in rewrites]
        look = "method.template and at what the teacher writes"
        check_generated(trajectories, step=step, who="the rewriter", of="attempts", look=look)
        means = edit_means(rewrites, trajectories)
        pairs = zip(trajectories, rewrites, strict=True)
        kept = Kept(teacher={teacher_key(t): w.read for t, w in pairs if w.read is not None})
        if self.options.diagnose_every and step % self.options.diagnose_every == 0:
            reference = self.options.shows_reference
            trajectories, more, kept = measured(rewrites, trajectories, reference=reference, tools=self.tools)
            means |= more
        generated = float(
            sum(w.detail.get(k, 0) for w in rewrites for k in ("teacher_tokens", "locate_tokens"))
        )
        return Prepared(
            trajectories=trajectories,
            means=means,
            kept=kept,
            totals={"teacher_tokens_generated": generated},
        )

    def before_training(self, prompts: Sequence[Prompt], directory: Path) -> str:
        """The refine gate: see `onpath.methods.trd.gate`."""
        return gate(self.rewrite, self.tools, prompts, directory) if self.options.gate else ""

    def rehearse(self, prompts: Sequence[Prompt]) -> Rehearsal:
        """The gate's question."""
        found = refinement(self.rewrite, self.tools, prompts)
        return Rehearsal(
            sentence=found.sentence,
            refusal=refusal(found, max_harm=self.options.gate_max_harm),
            binding=self.options.gate,
            values=vars(found),
        )

    def trajectory(self, w: Rewrite) -> Trajectory:
        """What is trained on: x on the student's side, the rewrite prompt on the teacher's, z on both."""
        x, r, response = w.attempt.context, w.context, w.ids
        if self.options.paper_compat:
            x, r = (self.bare_ids(prompt) for prompt in (w.attempt.prompt, w.asked))
            ends = self.tools.generators.student.stop_ids | self.tools.generators.teacher.stop_ids
            response = w.ids[:-1] if w.ids and w.ids[-1] in ends else w.ids
            response = response[: self.room(x, r)]  # the line break may be one token too many
        own = len(response) if w.kind == "none" else min(w.detail.get("kept_tokens", 0), len(response))
        drawn = (*w.attempt.logprobs[:own], *(0.0,) * (len(response) - own))
        edit = as_edit(w, self.options, self.tools.text.renderer)
        return Trajectory(
            student_context=x,
            teacher_context=r if self.options.scoring == "rewrite" else x,
            response=response,
            writers=all_by("student", own) + all_by("teacher", len(response) - own),
            behaviour_logprobs=None if self.options.paper_compat else drawn,  # of another context
            origin=w.attempt,
            edit=replace(edit, detail={"writer": self.writer, **edit.detail}),
        )

    def room(self, student_context: Sequence[int], teacher_context: Sequence[int]) -> int:
        """Most tokens of a response behind both."""
        models = self.tools.models
        fits = models.student_context_length - len(student_context)
        return max(0, min(fits, models.teacher.room(len(teacher_context))))

    def bare_ids(self, prompt: Prompt) -> tuple[int, ...]:
        """The question as plain text, and the line break that parts it from z."""
        return self.bare.ids(Prompt(id=prompt.id, text=f"{prompt.question}\n"))

    @property
    def writer(self) -> str:
        """Who generated z."""
        return "teacher" if self.options.teacher == "model" else f"self ({self.options.weights})"
