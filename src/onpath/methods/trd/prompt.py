"""The prompt that asks for a rewrite, trimmed to its budget."""

from onpath.config.methods.trd import TRDOptions
from onpath.methods.tools import Tools, needed
from onpath.records import Prompt, Rollout
from onpath.system.errors import UserError

_NAMES = {
    frozenset({"problem", "attempt"}): "rewrite",
    frozenset({"problem", "attempt", "solution"}): "rewrite_with_reference",
    frozenset({"problem", "solution"}): "hint",
}


class RewritePrompt:
    """Attempts in, contexts out."""

    def __init__(self, options: TRDOptions, tools: Tools) -> None:
        named = "{problem}" if options.slots == {"problem"} else tools.text.templates[_NAMES[options.slots]]
        self.template, self.slots, self.renderer = (
            options.template or named,
            options.slots,
            tools.text.renderer,
        )

    def __call__(self, attempt: Rollout, *, longest: int) -> tuple[Prompt, tuple[int, ...], dict[str, int]]:
        """What is asked, its ids, at most `longest` of them, and how many tokens that took: too long, the
        attempt loses its end, then the reference does.

        Raises:
            UserError: it does not fit with both of them gone.
        """
        texts = {"attempt": self.renderer.text(attempt.ids)} if "attempt" in self.slots else {}
        if "solution" in self.slots:
            texts["solution"] = needed(attempt.prompt, "solution", "the rewriter's reference")
        drawn = {"attempt": attempt.ids}
        asked, ids, cut = self.renderer.within(
            attempt.prompt, self.template, texts, longest=longest, tokens=drawn
        )
        if len(ids) > longest:
            raise UserError(
                f"prompt {attempt.prompt.named}: its rewrite prompt has {len(ids)} tokens with attempt "
                f"and reference cut away, but only {longest} fit; shorten the prompt or the template, or "
                "change method.rewrite_prompt_tokens or method.rewrite_max_new_tokens"
            )
        return asked, ids, {f"{slot}_tokens_trimmed": n for slot, n in cut.items()}
