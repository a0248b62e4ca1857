"""OPSD: the student is its own teacher, shown privileged information (arXiv 2601.18734).

    y ~ p_S(·|x)
    L = Σ_t Σ_v min(p_T·(log p_T − log p_S)(v), 0.05) / Σ_t 1,   p_T = p_θ0(·|hint(x, y*), y_<t),  p_S =
    p_θ(·|x, y_<t)

Two contexts, one response. Deviations: none in the loss; the teacher's prompt is worded by us (or by the
gym).
"""

from collections.abc import Sequence

from onpath.methods.base import Prepared, SelfTaught, Tools, needed, own_response
from onpath.options import OPSDOptions
from onpath.records import Rollout
from onpath.render import fill, with_question


class OPSD(SelfTaught):
    """Gives each rollout a second context, in which the teacher has seen the solution."""

    def __init__(self, options: OPSDOptions, tools: Tools) -> None:
        self.options, self.tools, self.teacher = options, tools, tools.teacher
        self.template = (
            options.template or tools.templates["hint" if options.hint == "solution" else "hint_answer"]
        )

    def prepare(self, rollouts: Sequence[Rollout], *, step: int) -> Prepared:
        """See `Method.prepare`."""
        return Prepared(
            trajectories=[own_response(r, teacher_context=self.teacher_context(r)) for r in rollouts]
        )

    def teacher_context(self, rollout: Rollout) -> tuple[int, ...]:
        """Ids of the privileged prompt."""
        column = self.options.hint
        slots = {
            "problem": rollout.prompt.question,
            column: needed(rollout.prompt, column, "method.name opsd"),
        }
        return self.tools.renderer.ids(with_question(rollout.prompt, fill(self.template, **slots)))
