"""A small language: a few tokens that carry their own spaces, so that a text is their concatenation."""

import re
from collections.abc import Sequence
from typing import Any

PAD, BOS, EOS, UNK, SOL = "<pad>", "<bos>", "<eos>", "<unk>", "<sol>"
SPECIALS = (PAD, BOS, EOS, UNK, SOL)
GIVEN, TRIED, REDO = " given ", " tried ", " redo"
TEMPLATES = {
    "hint": "{problem}" + GIVEN + "{solution}",
    "rewrite": "{problem}" + TRIED + "{attempt}" + REDO,
    "rewrite_with_reference": "{problem}" + GIVEN + "{solution}" + TRIED + "{attempt}" + REDO,
}
"""User messages of every task; the slots: the problem, its solution, a student's attempt."""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '<sol>' + message['content'] + eos_token }}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<sol>' }}{% endif %}"
)


class Language:
    """Its tokens, with the special ones in front.

    Args:
        words: all but the special tokens.
        longest: tokens that its tokenizer says a model may read.

    >>> Language(["a", "a: "], longest=8).tokenize("a: aa")
    ['a: ', 'a', 'a']
    """

    def __init__(self, words: Sequence[str], *, longest: int) -> None:
        self.tokens = (*SPECIALS, *words)
        self.ids = {token: index for index, token in enumerate(self.tokens)}
        self.longest = longest
        # Longest first: `a: ` must win over `a`.
        self._by_length = sorted(self.tokens, key=len, reverse=True)
        self.pattern = "|".join(map(re.escape, self._by_length))
        self._split = re.compile(self.pattern + r"|[\s\S]")

    def tokenize(self, text: str) -> list[str]:
        """Cut any text into token strings; a character outside the language is a piece of its own."""
        return self._split.findall(text)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, equal to the tokenizer's without special tokens added."""
        return [self.ids.get(token, self.ids[UNK]) for token in self.tokenize(text)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        return "".join(self.tokens[i] for i in ids)

    def context_ids(self, message: str) -> list[int]:
        """What a model sees before its response: the chat template of one user message."""
        return [self.ids[BOS], *self.encode(message), self.ids[SOL]]

    def tokenizer(self) -> Any:
        """A fast Hugging Face tokenizer of this language, with its chat template."""
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        words = [token for token in self._by_length if token not in SPECIALS]
        tokenizer = Tokenizer(models.WordLevel(vocab=self.ids, unk_token=UNK))
        split = Regex("|".join(re.escape(word).replace("\\ ", " ") for word in words) + r"|[\s\S]")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(split, behavior="isolated")
        tokenizer.decoder = decoders.Fuse()
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token=PAD,
            bos_token=BOS,
            eos_token=EOS,
            unk_token=UNK,
            additional_special_tokens=[SOL],
            chat_template=CHAT_TEMPLATE,
            clean_up_tokenization_spaces=False,
            model_max_length=self.longest,
        )
