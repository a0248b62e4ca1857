"""The prompt that asks for a rewrite, trimmed to its budget."""

from onpath.config.methods.trd import TRDOptions
from onpath.data.render import fill, with_question
from onpath.methods.base import Tools, needed
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
        whole = {"attempt": self.renderer.text(attempt.ids)} if "attempt" in self.slots else {}
        tokens = {"attempt": list(attempt.ids)} if whole else {}
        if "solution" in self.slots:
            whole["solution"] = needed(attempt.prompt, "solution", "the rewriter's reference")
            tokens["solution"] = self.renderer.tokenizer(whole["solution"], add_special_tokens=False)[
                "input_ids"
            ]
        cut = dict.fromkeys(tokens, 0)
        while True:
            shown = {k: self._shortened(tokens[k], n) if n else whole[k] for k, n in cut.items()}
            question = fill(self.template, problem=attempt.prompt.question, **shown)
            asked = with_question(attempt.prompt, question)
            ids = self.renderer.ids(asked)
            if len(ids) <= longest:
                return asked, ids, {f"{k}_tokens_trimmed": n for k, n in cut.items() if n}
            part = next((k for k, n in cut.items() if n < len(tokens[k])), None)
            if part is None:
                raise UserError(
                    f"prompt {attempt.prompt.id!r}: its rewrite prompt has {len(ids)} tokens with attempt "
                    f"and reference cut away, but only {longest} fit; shorten the prompt or the template, or "
                    "change method.rewrite_prompt_tokens or method.rewrite_max_new_tokens"
                )
            cut[part] = min(len(tokens[part]), cut[part] + len(ids) - longest)

    def _shortened(self, tokens: list[int], n: int) -> str:
        return self.renderer.text(tokens[: len(tokens) - n])
