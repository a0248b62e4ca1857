"""How z is generated: the rewrite prompt, trimmed to its budget, and the teacher's continuation of it.

Every draw depends on (seed, when, prompt, sample) alone, so that a resumed run and any number of processes
rewrite alike. Most of z stands in y: a teacher in this process verifies y's tokens, several at a time, and
generates the others.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

from onpath.config.methods.trd import TRDOptions
from onpath.engines.decoding.drafts import Drafts
from onpath.methods.tools import Tools
from onpath.methods.trd.edits import Rewrite
from onpath.methods.trd.locate import Located, first_errors
from onpath.methods.trd.prompt import RewritePrompt
from onpath.records import Rollout, Sampling


class Rewriter:
    """Attempts in, rewrites out."""

    def __init__(self, options: TRDOptions, tools: Tools) -> None:
        self.options, self.tools = options, tools
        self.new_tokens = options.rewrite_max_new_tokens or tools.sampling.max_new_tokens
        room = tools.models.teacher.room(self.new_tokens)
        self.prompt_tokens = min(options.rewrite_prompt_tokens or room, room)
        self.prompt = RewritePrompt(options, tools)

    def __call__(self, attempts: Sequence[Rollout], *, when: str) -> list[Rewrite]:
        """One rewrite of each attempt, judged; `when` names the draw (the step)."""
        right = self.tools.text.right([(r, r.ids) for r in attempts])
        plans = [
            self.plan(r, ok, at) for r, ok, at in zip(attempts, right, self.errors(attempts), strict=True)
        ]
        todo = [plan for plan in plans if plan.kind != "none"]
        best = iter(self.choose(self.generate(todo, when=when)))
        return [self.left_alone(plan) if plan.kind == "none" else next(best) for plan in plans]

    def errors(self, attempts: Sequence[Rollout]) -> list[Located]:
        """Tokens before each first error, where they will be kept; else 0: nothing is."""
        if self.options.minimal_edit:
            return first_errors(attempts, self.options, self.tools)
        return [Located(0)] * len(attempts)

    def plan(self, attempt: Rollout, right: bool | None, error: Located) -> Rewrite:
        """What to do with an attempt: the kind of edit, the prompt, and the tokens of y to keep."""
        untouched = right is True and self.options.refine == "wrong_only"
        if error.before is None and right is not False:
            untouched = True
        kept = error.before or 0  # wrong, but no error found: rewritten from the start
        longest = self.prompt_tokens - kept
        if untouched:  # z is y, which may be longer than a rewrite
            longest = min(longest, self.tools.models.teacher.room(len(attempt.ids)))
        asked, context, trimmed = self.prompt(attempt, longest=longest)
        kind = "none" if untouched else "minimal_edit" if self.options.minimal_edit else "rewrite"
        detail = dict(trimmed)
        if self.options.minimal_edit:
            detail |= {"kept_tokens": kept, "locate_tokens": error.teacher_tokens}
        return Rewrite(
            attempt=attempt, asked=asked, context=context, ids=attempt.ids[:kept], finished=False,
            attempt_right=right, kind=kind, detail=detail,
        )  # fmt: skip

    def generate(self, plans: Sequence[Rewrite], *, when: str) -> list[list[Rewrite]]:
        """`best_of` rewrites of each plan, judged."""
        options, n = self.options, self.options.best_of
        sampling = Sampling(
            temperature=options.rewrite_temperature, top_p=options.rewrite_top_p,
            max_new_tokens=self.new_tokens, seed=self.tools.sampling.seed,
        )  # fmt: skip
        jobs = [(plan, i) for plan in plans for i in range(n)]
        drafts = [
            Drafts.of_text(p.attempt.ids, start=len(p.context), keeps=self.scores_what_it_writes(p))
            for p, _ in jobs
        ]
        done = self.tools.in_teachers_name(
            [replace(p.asked, teacher=options.rewriter or p.asked.teacher) for p, _ in jobs],
            [p.context + p.ids for p, _ in jobs],
            sampling,
            keys=[f"{when}/{p.attempt.key}/rewrite {i}" for p, i in jobs],
            drafts=drafts,
        )
        written = []
        for (plan, _), draft, rest in zip(jobs, drafts, done, strict=True):
            ids = (plan.ids + rest.ids)[: self.new_tokens]
            whole = rest.finish_reason == "stop" and len(ids) == len(plan.ids) + len(rest.ids)
            if plan.ids and (end := self.tools.string_end(ids)) is not None:  # it may begin in what was kept
                ids, whole = ids[:end], True
            detail = {**plan.detail, "teacher_tokens": len(rest.ids)}
            read = None if draft.read is None else draft.read[: len(ids)]
            written.append(replace(plan, ids=ids, finished=whole, detail=detail, read=read))
        right = self.tools.text.right([(w.attempt, w.ids) for w in written])
        written = [replace(w, right=ok) for w, ok in zip(written, right, strict=True)]
        return [written[i : i + n] for i in range(0, len(written), n)]

    def scores_what_it_writes(self, plan: Rewrite) -> bool:
        """Whether z will be scored by the model that writes it, in the context in which it does, whole."""
        options = self.options
        same = options.rewriter in (None, plan.asked.teacher) and not options.paper_compat
        return same and options.scoring == "rewrite" and not plan.ids

    def choose(self, groups: Sequence[Sequence[Rewrite]]) -> list[Rewrite]:
        """Of each group the verified one (else any) that the student finds likeliest per token."""
        if self.options.best_of == 1:
            return [group[0] for group in groups]
        flat = [d for group in groups for d in group]
        student = self.tools.generators.student
        logps = iter(student.score([d.attempt.context for d in flat], [d.ids for d in flat]))
        chosen = []
        for group in groups:
            likely = [sum(row) / len(row) if row else -math.inf for row in islice(logps, len(group))]
            best, _ = max(zip(group, likely, strict=True), key=lambda one: (one[0].right is True, one[1]))
            spent = {
                "candidates": len(group),
                "verified": sum(d.right is True for d in group),
                "teacher_tokens": sum(d.detail["teacher_tokens"] for d in group),
            }
            chosen.append(replace(best, detail={**best.detail, **spent}))
        return chosen

    def left_alone(self, plan: Rewrite) -> Rewrite:
        """z = y."""
        y = plan.attempt
        return replace(plan, ids=y.ids, finished=y.finish_reason == "stop", right=plan.attempt_right)
