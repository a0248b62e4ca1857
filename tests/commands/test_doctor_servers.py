"""`onpath doctor` where servers write and score: everything that it asks of models here, it asks of them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from onpath.commands.doctor.command import diagnose
from onpath.commands.doctor.finding import Finding
from onpath.config.whole import Config
from tests.engines.fake_vllm import FakeVLLM
from tests.engines.test_server import TOPK, fake_of

Tiny = Callable[..., Config]


@pytest.fixture
def servers(model_dirs: dict[str, Path]) -> Iterator[dict[str, FakeVLLM]]:
    found = {side: fake_of(model_dirs[side]) for side in ("student", "teacher")}
    yield found
    for fake in found.values():
        fake.stop()


def findings(tiny: Tiny, servers: dict[str, FakeVLLM], **more: Any) -> dict[str, Finding]:
    where = {"engine": "vllm", "patience": 5.0}
    config = tiny(
        **{f"rollout__{k}": v for k, v in {**where, "url": servers["student"].url}.items()},
        **{f"teacher__{k}": v for k, v in {**where, "url": servers["teacher"].url}.items()},
        **TOPK,
        **more,
    )
    return {f.name: f for f in diagnose(config)}


def failed(found: dict[str, Finding]) -> set[str]:
    return {name for name, f in found.items() if f.status == "fail"}


def test_sound_servers_pass(tiny: Tiny, servers: dict[str, FakeVLLM]) -> None:
    found = findings(tiny, servers)
    assert not failed(found), [f.message for f in found.values() if f.status == "fail"]
    assert found["server_tokens"].status == "ok"
    assert found["server_tokens"].values["servers"] == 2
    for name in ("engine_logprobs", "teacher_itself", "alignment", "engine_follows", "gradient", "restored"):
        assert found[name].status == "ok", found[name]


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_server_with_another_tokenizer(side: str, tiny: Tiny, servers: dict[str, FakeVLLM]) -> None:
    def spoil(answer: Any) -> Any:
        return {"tokens": [t + 1 for t in answer["tokens"]]} if "tokens" in answer else answer

    servers[side].spoil = spoil
    found = findings(tiny, servers)
    assert failed(found) == {"server_tokens"}
    assert {"student": "rollout.url", "teacher": "teacher.url"}[side] in found["server_tokens"].message


def test_a_server_that_does_not_tokenize_is_a_warning(tiny: Tiny, servers: dict[str, FakeVLLM]) -> None:
    servers["teacher"].spoil = lambda answer: 404 if "tokens" in answer else answer
    found = findings(tiny, servers)
    assert not failed(found)
    assert found["server_tokens"].status == "warning"


def test_a_server_that_keeps_its_weights(tiny: Tiny, servers: dict[str, FakeVLLM]) -> None:
    servers["student"].takes_weights = False
    assert "engine_follows" in failed(findings(tiny, servers))


def test_a_teacher_whose_scores_are_shifted(tiny: Tiny, servers: dict[str, FakeVLLM]) -> None:
    def spoil(answer: Any) -> Any:
        """Each position gets the next one's log-probs, under its own token's name."""
        entries = answer["choices"][0].get("prompt_logprobs") if "choices" in answer else None
        if not entries:
            return answer
        own = [next(iter(e)) for e in entries[1:]]
        moved = [*entries[2:], entries[-1]]
        for i, (token, entry) in enumerate(zip(own, moved, strict=True), start=1):
            rest = {t: p for t, p in entry.items() if t != token}
            low = min(p["logprob"] for p in entry.values())
            entries[i] = {token: entry.get(token, {"logprob": low - 1.0}), **rest}
        return answer

    servers["teacher"].spoil = spoil
    assert "alignment" in failed(findings(tiny, servers))
