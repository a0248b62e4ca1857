"""The refine gate: before TRD trains, does the rewriter help on real attempts of this student?

A rewriter that was never shown such attempts may copy their errors or spoil right ones, and training on its
rewrites then destroys the student. So a sample is rewritten first, with two questions asked of it:

    repaired   P(z right | y wrong) must exceed P(another sample of the student right | y wrong): chance;
               where most rewrites are cut off, by more than luck
    harmed     P(z wrong | y right) must not exceed `method.gate_max_harm`
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from onpath.data.load import prompts_of_step
from onpath.methods.tools import Tools
from onpath.methods.trd.edits import as_edit
from onpath.methods.trd.rewriter import Rewriter
from onpath.records import Prompt
from onpath.system import distributed
from onpath.system.errors import UserError
from onpath.system.files import write_text
from onpath.system.reading import read_json

ENOUGH = 8
"""Attempts of a kind below which nothing is refused: too few to tell."""
_LUCK = 0.05
"""Probability of a lead under equal odds from which it is called luck."""


@dataclass(frozen=True)
class Refinement:
    """Counts over a sample of attempts."""

    attempts: int
    wrong: int
    repaired: int
    """Wrong attempts whose rewrite is right."""
    retried: int
    """Wrong attempts whose prompt the student gets right when it tries once more."""
    right: int
    harmed: int
    """Right attempts whose rewrite is wrong."""
    empty: int
    foreign: int
    identical: int
    unfinished: int
    both: int = 0
    """Wrong attempts of which both the rewrite and the second try are right."""

    @property
    def luck(self) -> float:
        """Probability that a rewriter no better than the second try leads it by as much: one-sided sign test
        over the attempts that one of them alone got right."""
        alone, n = self.repaired - self.both, self.repaired + self.retried - 2 * self.both
        return float(sum(math.comb(n, k) for k in range(alone, n + 1)) / 2**n)

    @property
    def sentence(self) -> str:
        if not self.wrong and not self.right:
            return (
                f"whether {self.attempts} rewrites are right cannot be told, since no prompt has an answer; "
                f"{self.empty} were empty, {self.foreign} in a foreign script"
            )
        by_luck = self.repaired > self.retried and self.luck > _LUCK
        lead = f"; such a lead comes by luck in {self.luck:.0%}" if by_luck else ""
        return (
            f"of {self.wrong} wrong attempts {self.repaired} were repaired (the student's own second try: "
            f"{self.retried}{lead}), of {self.right} right ones {self.harmed} were spoilt; {self.empty} "
            f"rewrites were empty, {self.identical} unchanged, {self.foreign} in a foreign script, "
            f"{self.unfinished} unfinished, of {self.attempts}"
        )


def gate(rewriter: Rewriter, tools: Tools, prompts: Sequence[Prompt], directory: Path) -> str:
    """Rewrites a sample with the starting weights; the counts go to `directory/refine.json`. A run that has
    passed is not asked again.

    Returns:
        What was found, in a sentence.

    Raises:
        UserError: the rewriter does harm, or repairs no more than chance.
    """
    path = directory / "refine.json"
    if path.exists() and read_json(path, keys={"passed": bool})["passed"]:
        return ""
    found = refinement(rewriter, tools, prompts)
    reason = refusal(found, max_harm=rewriter.options.gate_max_harm)
    if distributed.rank() == 0:
        write_text(path, json.dumps({"passed": not reason, **vars(found)}, indent=1) + "\n")
    if reason:
        raise UserError(
            f"the refine gate stops this run: {reason} ({found.sentence}); use a teacher that can rewrite "
            "this student's attempts, or another template, or set method.gate: false to train all the same"
        )
    return f"refine gate: {found.sentence}"


def refusal(found: Refinement, *, max_harm: float) -> str:
    """Why training on such rewrites would do harm; empty if it should not."""
    if 2 * (found.empty + found.foreign) > found.attempts:
        return f"{found.empty + found.foreign} of {found.attempts} rewrites are empty or in a foreign script"
    if found.wrong >= ENOUGH and found.repaired <= found.retried:
        return "the rewriter repairs no more wrong attempts than chance would"
    if found.wrong >= ENOUGH and 2 * found.unfinished > found.attempts and found.luck > _LUCK:
        return (
            f"{found.unfinished} of {found.attempts} rewrites are cut off, and they are not told apart from "
            "chance: raise method.rewrite_max_new_tokens"
        )
    if found.right >= ENOUGH and found.harmed > max_harm * found.right:
        return f"the rewriter spoils more than {max_harm:.0%} of the right attempts (method.gate_max_harm)"
    return ""


def refinement(rewriter: Rewriter, tools: Tools, pool: Sequence[Prompt]) -> Refinement:
    """Counts over all processes, on the student's real attempts; the draws are those of no training step."""
    text, size = tools.text, min(rewriter.options.gate_prompts, len(pool))
    prompts = distributed.share(prompts_of_step(pool, size=size, seed=tools.sampling.seed, step=0))
    keys = [f"gate/{p.id}" for p in prompts]
    pairs = tools.generators.student.generate(prompts, tools.sampling, n=2, keys=keys)
    first, second = pairs[::2], pairs[1::2]
    again = text.right([(r, r.ids) for r in second])
    rewrites = rewriter(first, when="gate")
    edits = [as_edit(w, rewriter.options, text.renderer).detail for w in rewrites]
    wrong = [w.attempt_right is False for w in rewrites]
    counts = [
        len(rewrites),
        sum(wrong),
        sum(w.cell == "wrong_to_right" for w in rewrites),
        sum(ok is True and bad for ok, bad in zip(again, wrong, strict=True)),
        sum(w.attempt_right is True for w in rewrites),
        sum(w.cell == "right_to_wrong" for w in rewrites),
        *(sum(e[flaw] for e in edits) for flaw in ("empty", "foreign", "identical")),
        sum(not w.finished for w in rewrites),
        sum(ok is True and w.cell == "wrong_to_right" for ok, w in zip(again, rewrites, strict=True)),
    ]
    return Refinement(*map(int, distributed.total(counts, tools.models.device)))
