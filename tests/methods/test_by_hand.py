"""Each method's worked example, pinned token by token: two models that know one next token for each token.

    student   <sol> → a → b → c → d → <eos>        x → d
    teacher   <sol> → a → b → x → d → <eos>        c → d

They part once, behind b; what either writes elsewhere is the same.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3ForCausalLM

from onpath.run.assemble import assemble
from onpath.run.sampling import prepare, sample
from tests.conftest import CHARACTERS, make_model, make_tokenizer
from tests.methods.family import Tiny, options_of

SURE = 20.0
"""Logit of the one next token; of all others 0."""
STUDENT = {"<sol>": "a", "a": "b", "b": "c", "c": "d", "d": "<eos>", "x": "d"}
TEACHER = {**STUDENT, "b": "x"}
Y = "a b c d <eos>"
S, T, F = "student", "teacher", "forced"


def knowing(following: Mapping[str, str], home: Path) -> str:
    """A model whose hidden state is the last token alone, and whose head knows what follows it."""
    size = len(CHARACTERS)
    model: Qwen3ForCausalLM = make_model(0, hidden=size, tied=False)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight.zero_()
        for before, after in following.items():
            # The last norm makes a one of √V.
            model.lm_head.weight[CHARACTERS.index(after), CHARACTERS.index(before)] = SURE / size**0.5
    model.save_pretrained(home)
    make_tokenizer().save_pretrained(home)
    return str(home)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    home = tmp_path_factory.mktemp("knowing")
    return {
        "student__model": knowing(STUDENT, home / "student"),
        "teacher__model": knowing(TEACHER, home / "teacher"),
    }


EXAMPLES: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "opd": ({"name": "opd"}, Y, [S] * 5),
    "opd, the teacher's samples": ({"name": "opd", "writer": "teacher"}, "a b x d <eos>", [T] * 5),
    "trd": (
        {"name": "trd", "template": "{problem} {attempt}", "gate": False},
        "a b x d <eos>",
        [T] * 5,
    ),
    # c is 20 nats less likely for the teacher; the student goes on from its x.
    "relay": ({"name": "relay", "delta": 8}, "a b x d <eos>", [S, S, T, S, S]),
    "relay, from the start": (
        {"name": "relay", "delta": 8, "from_start": True},
        "a b x d <eos>",
        [S, S, T, S, S],
    ),
    "relay, two more": ({"name": "relay", "delta": 8, "hold": 1}, "a b x d <eos>", [S, S, T, T, S]),
    "relay, a gap that is none": ({"name": "relay", "delta": 30}, Y, [S] * 5),
    "relay, control": ({"name": "relay", "delta": 8, "control": "own_token"}, Y, [S] * 5),
    "branch": ({"name": "branch", "failed_only": False}, "a b x d <eos>", [S, S, F, S, S]),
    # Near futures of two: c d against x d, at distance ½; behind x both go on with d.
    "bridge": (
        {"name": "bridge", "window": 2, "meet_window": 1, "every": 1, "failed_only": False},
        "a b x d <eos>",
        [S, S, T, S, S],
    ),
    "bridge that meets nowhere": (
        {"name": "bridge", "window": 2, "meet_window": 2, "every": 1, "failed_only": False},
        "a b x d <eos>",
        [S, S, T, T, S],
    ),
    # The fork's own position is trained on: what stands before it is sound.
    "truncate": ({"name": "truncate", "stop_when": "fork", "window": 2}, "a b c", [S] * 3),
    "truncate, a share": ({"name": "truncate", "stop_when": "share", "share": 0.6}, "a b c", [S] * 3),
    "topd": ({"name": "topd", "window": 2, "decide": "threshold", "threshold": 0.3}, Y, [S] * 5),
}
"""What is said, and by whom."""


@pytest.mark.parametrize("name", EXAMPLES)
def test_it_is_what_the_rule_says(name: str, pair: dict[str, str], tiny: Tiny) -> None:
    method, said, writers = EXAMPLES[name]
    parts = assemble(tiny(**pair, **options_of(method), rollout__prompts=3, data__eval={}))
    rollouts = sample(parts, 0)
    made = prepare(parts, rollouts, 0).trajectories
    assert len(made) == len(rollouts) == 3
    for t in made:
        kept = [i for i, weight in zip(t.response, t.token_weights, strict=True) if weight]
        assert [CHARACTERS[i] for i in kept] == said.split()
        assert list(t.written_by[: len(kept)]) == writers
        assert t.origin is not None
        own = Y if method.get("writer") != "teacher" and not method.get("from_start") else said
        assert [CHARACTERS[i] for i in t.origin.ids] == own.split()


def test_guidance_carries_the_mass_of_one_token_to_its_counterpart(pair: dict[str, str], tiny: Tiny) -> None:
    """TOPD: each of the window's two positions has the mass ½ of the formula, c's on x, d's on d."""
    method, _, _ = EXAMPLES["topd"]
    parts = assemble(tiny(**pair, **options_of(method), rollout__prompts=3, data__eval={}))
    for t in prepare(parts, sample(parts, 0), 0).trajectories:
        (fork,) = (f for f in t.edit.detail["forks"] if f["decision"] == "fork")
        assert (fork["position"], fork["distance"]) == (2, pytest.approx(0.5, abs=1e-3))
        (guidance,) = t.guidance
        x, d = CHARACTERS.index("x"), CHARACTERS.index("d")
        assert guidance.start == 2
        assert [target[token] for target, token in zip(guidance.targets, (x, d), strict=True)] == [
            pytest.approx(0.5, abs=1e-3),
            pytest.approx(0.5, abs=1e-3),
        ]


def test_a_spliced_window_is_a_trajectory_of_its_own(pair: dict[str, str], tiny: Tiny) -> None:
    method = {**EXAMPLES["topd"][0], "plan": "spliced"}
    parts = assemble(tiny(**pair, **options_of(method), rollout__prompts=1, data__eval={}))
    own, spliced = prepare(parts, sample(parts, 0), 0).trajectories
    assert [CHARACTERS[i] for i in own.response] == Y.split()
    assert [CHARACTERS[i] for i in spliced.student_context[-2:]] == ["a", "b"]
    assert [CHARACTERS[i] for i in spliced.response] == ["x", "d"]
    assert list(spliced.written_by) == [T, T]
