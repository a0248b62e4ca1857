"""The gym's language: some fifty tokens that carry their own spaces, so that text is their concatenation.

>>> tokenize("a: 35 + 47; a?")
['a: ', '3', '5', ' + ', '4', '7', '; ', 'a', '?']
"""

import re
from typing import Any

PAD, BOS, EOS, UNK, SOL = "<pad>", "<bos>", "<eos>", "<unk>", "<sol>"
SPECIALS = (PAD, BOS, EOS, UNK, SOL)
NAMES = tuple("abcdefgh")
HEADS = tuple(f"{name}: " for name in NAMES)
"""`c: ` opens the definition or the step of node `c`: one token, by which a step finds its definition."""
DIGITS = tuple("0123456789")
OPS = (" + ", " - ", " * ")
EQUALS = (" = ", " -> ")
SEPARATORS = ("; ", ", so ", ". then ")
ONSET_WORDS = ("wait ",)
"""Openings of a way back; the teacher's probability of them is the epistemic mass."""
ANSWER = "ans "
GIVEN, TRIED, REDO = " given ", " tried ", " redo"

TOKENS = (
    *SPECIALS,
    *DIGITS,
    *NAMES,
    *HEADS,
    *OPS,
    *EQUALS,
    *SEPARATORS,
    *ONSET_WORDS,
    ANSWER,
    "?",
    GIVEN,
    TRIED,
    REDO,
)
IDS = {token: index for index, token in enumerate(TOKENS)}
# Longest first: `a: ` must win over `a`.
PATTERN = "|".join(re.escape(token) for token in sorted(TOKENS, key=len, reverse=True))
_SPLIT = re.compile(PATTERN + r"|[\s\S]")

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '<sol>' + message['content'] + eos_token }}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<sol>' }}{% endif %}"
)


def tokenize(text: str) -> list[str]:
    """Cut any text into token strings; a character outside the language is a piece of its own."""
    return _SPLIT.findall(text)


def encode(text: str) -> list[int]:
    """The ids of a text, equal to the bundled tokenizer's without special tokens added."""
    return [IDS.get(token, IDS[UNK]) for token in tokenize(text)]


def decode(ids: list[int]) -> str:
    """The text of ids, special tokens included."""
    return "".join(TOKENS[i] for i in ids)


def build_tokenizer() -> Any:
    """A fast Hugging Face tokenizer of this language, with its chat template."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [token for token in sorted(TOKENS, key=len, reverse=True) if token not in SPECIALS]
    tokenizer = Tokenizer(models.WordLevel(vocab=IDS, unk_token=UNK))
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
        model_max_length=512,
    )
