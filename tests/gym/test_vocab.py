"""The language and its tokenizer."""

import pytest

from onpath import gym
from onpath.gym.language import EOS
from onpath.gym.vocab import IDS, LANGUAGE, decode, encode

GOLDEN = "a: 35 + 47; a?"


@pytest.fixture(scope="module")
def tokenizer():
    return LANGUAGE.tokenizer()


def test_golden_ids() -> None:
    assert encode(GOLDEN) == [23, 8, 10, 31, 9, 12, 36, 15, 41]


@pytest.mark.parametrize("split", ["train", "hard"])
def test_round_trip(tokenizer, split: str) -> None:
    for row in gym.rows(split, 50):
        for text in (row["prompt"], row["solution"]):
            ids = tokenizer(text, add_special_tokens=False).input_ids
            assert ids == encode(text)
            assert tokenizer.decode(ids) == text == decode(ids)
            assert [tokenizer.decode([i]) for i in ids] == gym.tokenize(text)


def test_chat_template(tokenizer) -> None:
    user = {"role": "user", "content": GOLDEN}
    ids = tokenizer.apply_chat_template([user], add_generation_prompt=True, return_dict=False)
    assert ids == [IDS["<bos>"], *encode(GOLDEN), IDS["<sol>"]]
    whole = [user, {"role": "assistant", "content": "a: 35 + 47 = a82; ans 82"}]
    text = tokenizer.apply_chat_template(whole, tokenize=False)
    assert text == "<bos>" + GOLDEN + "<sol>a: 35 + 47 = a82; ans 82" + EOS


def test_bundled_tokenizers_are_this_one() -> None:
    from transformers import AutoTokenizer

    for name in ("student", "teacher"):
        loaded = AutoTokenizer.from_pretrained(gym.model_dir(name))
        assert loaded.get_vocab() == IDS
        assert loaded("a: 35; wait ", add_special_tokens=False).input_ids == encode("a: 35; wait ")


def test_templates_have_their_slots() -> None:
    slots = {"problem": "P", "solution": "S", "attempt": "A"}
    filled = {name: template.format(**slots) for name, template in gym.TEMPLATES.items()}
    assert filled == {
        "hint": "P given S",
        "rewrite": "P tried A redo",
        "rewrite_with_reference": "P given S tried A redo",
    }
