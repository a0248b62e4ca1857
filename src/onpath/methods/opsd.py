"""OPSD: the student is its own teacher, shown privileged information (arXiv 2601.18734).

    y ~ p_S(·|x)
    L = Σ_t Σ_v min(p_T·(log p_T − log p_S)(v), 0.05) / Σ_t 1
        p_T = p_θ0(·|hint(x, y*), y_<t),   p_S = p_θ(·|x, y_<t)

Two contexts, one response. Teacher weights θ0 are the start's (LoRA: adapter off; else a frozen copy); `live`
and `ema` follow the student. Deviations: none in the loss; the teacher's prompt is worded by us (or by the
gym).
"""

from collections.abc import Sequence

from onpath.config.methods.opsd import OPSDOptions
from onpath.engines.reading import Readings
from onpath.methods.base import Prepared, SelfTaught, Tools, own_response, privileged_context, verdicts
from onpath.methods.diagnose import read_along, token_means
from onpath.records import Prompt, Rollout
from onpath.system.errors import UserError


class OPSD(SelfTaught):
    """Gives each rollout a second context, in which the teacher has seen the solution."""

    def __init__(self, options: OPSDOptions, tools: Tools) -> None:
        self.options, self.tools, self.teacher = options, tools, tools.teacher
        named = tools.templates["hint" if options.hint == "solution" else "hint_answer"]
        self.template = options.template or named

    def prepare(self, rollouts: Sequence[Rollout], *, step: int) -> Prepared:
        """See `Method.prepare`."""
        trajectories = [own_response(r, teacher_context=self.teacher_context(r)) for r in rollouts]
        if not self.options.diagnose_every or step % self.options.diagnose_every:
            return Prepared(trajectories=trajectories)
        right = verdicts(self.tools.grader, self.tools.renderer, [(r, r.ids) for r in rollouts])
        readings = Readings()  # the loss reads no model again
        means = token_means(read_along(trajectories, self.tools, into=readings), right)
        return Prepared(trajectories=trajectories, means=means, readings=readings)

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Every privileged prompt and its response must fit the model.

        Raises:
            UserError: naming the first that does not.
        """
        new = self.tools.sampling.max_new_tokens
        for prompt in prompts:
            length = len(privileged_context(prompt, self.template, self.options.hint, self.tools))
            if length + new > self.tools.room:
                raise UserError(
                    f"prompt {prompt.id!r} with its {self.options.hint} has {length} tokens; with {new} new "
                    f"ones it does not fit the model's context of {self.tools.room}: drop it, or lower "
                    "rollout.max_new_tokens"
                )

    def teacher_context(self, rollout: Rollout) -> tuple[int, ...]:
        """Ids of the privileged prompt."""
        return privileged_context(rollout.prompt, self.template, self.options.hint, self.tools)
