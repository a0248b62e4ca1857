"""The persona: it begins as the teacher, and learns from texts of which the checker knows the error."""

import random
from dataclasses import replace

import pytest
import torch

from onpath import gym
from onpath.gym.models import BUNDLED
from onpath.gym.persona import FIRST, Text, divergence, grown, logp, results, scored, written
from onpath.gym.recipe import load
from onpath.gym.vocab import DIGITS, LANGUAGE
from onpath.gym.worlds import first_result


@pytest.fixture(scope="module")
def models():
    return {role: load(BUNDLED / role).eval() for role in ("teacher", "student")}


@pytest.fixture(scope="module")
def texts(models) -> list[Text]:
    torch.manual_seed(0)
    return scored(written(random.Random(0), replace(FIRST, texts=40), models, "test"), models)


def test_it_begins_as_the_teacher(models, texts: list[Text]) -> None:
    model = grown(models["teacher"]).eval()
    with torch.no_grad():
        assert torch.allclose(logp(model, texts), logp(models["teacher"], texts), atol=1e-5)
    kl_N, lost_N = divergence(model, texts)
    assert kl_N[~lost_N].abs().max() < 1e-2, (
        "the oracle is the teacher up to the error, but for half precision"
    )
    assert kl_N[lost_N].mean() > 0.5, "and the student behind it"


def test_the_oracle_is_whoever_the_checker_says(models, texts: list[Text]) -> None:
    wrong = next(t for t in texts if t.error is not None and t.error + 1 < len(t.ids))
    assert wrong.error is not None
    labels = gym.label_tokens(LANGUAGE.decode(wrong.context[1:-1]), [LANGUAGE.tokens[i] for i in wrong.ids])
    assert next(i for i, label in enumerate(labels) if label.kind == "error") == wrong.error
    with torch.no_grad():
        alone = {role: logp(model, [wrong]) for role, model in models.items()}
    until = wrong.error + 1
    torch.testing.assert_close(wrong.logp_NV[:until].float(), alone["teacher"][:until], atol=2e-2, rtol=2e-3)
    torch.testing.assert_close(wrong.logp_NV[until:].float(), alone["student"][until:], atol=2e-2, rtol=2e-3)


def test_half_of_the_texts_are_gone_on_with_from_a_wrong_digit(models, texts: list[Text]) -> None:
    stage = replace(FIRST, texts=40, writers={"teacher": 1.0}, first=0.0, somewhere=0.0)
    torch.manual_seed(0)
    plain = written(random.Random(0), stage, models)
    assert sum(t.error is not None for t in plain) <= 4, "the teacher's own"
    spoiled = written(random.Random(0), replace(stage, first=1.0, behind={"teacher": 1.0}), models)
    assert sum(t.error is not None for t in spoiled) >= 36


def test_digits_of_results() -> None:
    tokens = gym.tokenize("b: a * 3 = b46; d: b46 + c80 = d26; ans 26")
    found = results(tokens)
    assert [tokens[i] for i in found] == ["4", "6", "2", "6"]
    assert all(tokens[i] in DIGITS for i in found)
    assert first_result(tokens) == found[1]
    assert first_result(["d: "]) is None
