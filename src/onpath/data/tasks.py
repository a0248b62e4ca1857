"""Tasks with a checker of steps and prompts of their own."""

from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from onpath.config.build import Config
from onpath.config.methods.opsd import OPSDOptions
from onpath.config.methods.trd import TRDOptions
from onpath.data.templates import EPISTEMIC_WORDS, TEMPLATES


def templates_for(config: Config) -> dict[str, str]:
    """Privileged prompts: the gym's own language for gym data, else our wording."""
    if not config.data.train.startswith("gym:"):
        return TEMPLATES
    from onpath import gym

    return {**TEMPLATES, **gym.TEMPLATES}


def checker_of(config: Config) -> Callable[[str, str], int | None] | None:
    """The task's checker of steps, where it has one."""
    if not config.data.train.startswith("gym:"):
        return None
    from onpath import gym

    return gym.first_error


def onset_ids(config: Config, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """First tokens of the words that open a correction, with and without a space before them."""
    asked = config.method.epistemic if isinstance(config.method, OPSDOptions | TRDOptions) else None
    words = EPISTEMIC_WORDS if asked is None else asked
    if asked is None and config.data.train.startswith("gym:"):
        from onpath import gym

        words = gym.ONSET_WORDS
    spellings = [spelling for word in words for spelling in (word, f" {word}") if spelling.strip()]
    first = {tokenizer(s, add_special_tokens=False)["input_ids"][0] for s in spellings}
    return tuple(sorted(first - {tokenizer.unk_token_id}))
