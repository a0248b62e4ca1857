"""`rollout.push: adapter`: a server is given the adapter alone, under a name that says what it is."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from onpath.commands.cli import main
from onpath.config.whole import Config
from onpath.engines.remote.server import ServerEngine
from onpath.run.assemble import assemble
from onpath.run.log import read_lines
from onpath.run.parts import Parts
from onpath.system.errors import UserError
from onpath.training import train
from tests.engines.fake_vllm import FakeVLLM
from tests.engines.test_server import fake_of, restarted

Tiny = Callable[..., Config]
LORA: dict[str, Any] = {"student__lora_rank": 4, "student__lora_alpha": 16.0, "optim__lr": 0.01}


@pytest.fixture
def servers(model_dirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeVLLM]]:
    monkeypatch.setattr("onpath.engines.remote.wire._FIRST_WAIT", 0.001)
    fakes = [fake_of(model_dirs["student"]) for _ in range(2)]
    yield fakes
    for fake in fakes:
        fake.stop()


def pushed(tiny: Tiny, servers: list[FakeVLLM], **more: Any) -> Config:
    where = {"rollout__engine": "vllm", "rollout__url": ",".join(s.url for s in servers)}
    return tiny(**{**LORA, **where, "rollout__push": "adapter", **more})


def moved(parts: Parts, by: float = 0.1) -> None:
    with torch.no_grad():
        for name, p in parts.models.student.named_parameters():
            if "lora_B" in name:
                p.add_(by * torch.randn_like(p))


def check_logprobs(parts: Parts) -> None:
    rollouts = parts.generators.student.generate(parts.prompts.pool, parts.sampling)
    own = parts.generators.over(parts.models.student)
    scores = own.score([r.context for r in rollouts], [r.ids for r in rollouts])
    for r, expected in zip(rollouts, scores, strict=True):
        assert r.logprobs == pytest.approx(expected, abs=1e-5)


def engine_of(parts: Parts) -> ServerEngine:
    engine = parts.generators.student
    assert isinstance(engine, ServerEngine)
    return engine


def test_a_run_is_that_of_whole_weights(tiny: Tiny, servers: list[FakeVLLM]) -> None:
    adapter = train(pushed(tiny, servers, run__name="adapter"), quiet=True)
    assert all(torch.equal(v, s._original[k]) for s in servers for k, v in s._original.items())
    for fake in servers:
        fake.stop()
        fake.start(fresh=True)
    whole = train(pushed(tiny, servers, run__name="whole", rollout__push="weights"), quiet=True)
    rows = [read_lines(r.directory / "metrics.jsonl") for r in (adapter, whole)]
    assert [r["loss"] for r in rows[0]] == pytest.approx([r["loss"] for r in rows[1]], abs=1e-4)
    assert rows[0][-1]["loss"] != rows[0][0]["loss"]


def test_one_adapter_is_kept_here_and_there(tiny: Tiny, servers: list[FakeVLLM]) -> None:
    result = train(pushed(tiny, servers), quiet=True)
    (left,) = (result.directory / "weights").iterdir()
    assert sorted(p.name for p in left.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors"
    ]  # fmt: skip
    for fake in servers:
        assert list(fake.adapters) == [left.name]
        names = {r["model"] for r in fake.requests if "seed" in r}
        assert len(names) >= 3, "each step asks for its own"
        assert fake.name not in names


def test_another_runs_adapters_are_left_alone(tiny: Tiny, servers: list[FakeVLLM]) -> None:
    train(pushed(tiny, servers, run__name="one"), quiet=True)
    train(pushed(tiny, servers, run__name="two"), quiet=True)
    assert all(len(fake.adapters) == 2 for fake in servers)


def test_one_that_was_restarted_is_given_it_again(tiny: Tiny, servers: list[FakeVLLM]) -> None:
    parts = assemble(pushed(tiny, servers))
    engine = engine_of(parts)
    moved(parts)
    engine.sync_weights(1)
    check_logprobs(parts)
    restarted(servers[1])
    assert not servers[1].adapters
    check_logprobs(parts)
    time.sleep(0.03)
    check_logprobs(parts)
    assert engine.resyncs == 1
    assert list(servers[1].adapters) == list(servers[0].adapters)


def test_one_that_missed_a_push_is_given_it(tiny: Tiny, servers: list[FakeVLLM]) -> None:
    parts = assemble(pushed(tiny, servers))
    engine = engine_of(parts)
    engine.sync_weights(0)
    servers[1].stop()
    moved(parts)
    engine.sync_weights(1)
    check_logprobs(parts)
    servers[1].start()
    time.sleep(0.03)
    servers[1].requests.clear()
    check_logprobs(parts)
    check_logprobs(parts)
    assert any("seed" in r for r in servers[1].requests)
    assert list(servers[1].adapters) == list(servers[0].adapters), "and the old one has left"


def test_one_that_does_not_take_it_stops_the_run(tiny: Tiny, servers: list[FakeVLLM]) -> None:
    servers[0].takes_weights = False
    with pytest.raises(UserError, match=r"rollout\.url: .* refuses a request with status 400"):
        train(pushed(tiny, servers[:1]), quiet=True)


def test_one_that_ignores_it_stops_the_run(tiny: Tiny, servers: list[FakeVLLM]) -> None:
    parts = assemble(pushed(tiny, servers[:1]))
    engine = engine_of(parts)
    engine.sync_weights(0)
    moved(parts)
    servers[0]._adapted = lambda path: servers[0]._original  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"after step 1 the server's log-probs differ from the student's"):
        engine.sync_weights(1)


def test_a_resumed_run_goes_on(tiny: Tiny, servers: list[FakeVLLM]) -> None:
    options = {"optim__steps": 4, "run__save_every": 2}
    whole = train(pushed(tiny, servers, **options, run__name="whole"), quiet=True)
    train(pushed(tiny, servers, **{**options, "optim__steps": 2}, run__name="parts"), quiet=True)
    for fake in servers:
        restarted(fake)
    parts = train(pushed(tiny, servers, **options, run__name="parts"), quiet=True, resume_with_changes=True)
    rows = [read_lines(r.directory / "metrics.jsonl") for r in (whole, parts)]
    assert len(rows[1]) == 4
    assert rows[0][0]["loss"] == rows[1][0]["loss"]


@pytest.mark.parametrize(
    "options",
    [["--rollout.url", "http://x:1", "--rollout.engine", "vllm"], ["--student.lora_rank", "4"]],
)
def test_it_needs_a_server_and_an_adapter(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--rollout.push", "adapter", *options]) == 2
    assert "set rollout.url and student.lora_rank" in capsys.readouterr().err


def test_a_student_that_is_an_adapter_is_refused(tiny: Tiny, servers: list[FakeVLLM], tmp_path: Path) -> None:
    first = train(pushed(tiny, servers, optim__steps=1, run__name="first"), quiet=True)
    assert json.loads((first.model / "adapter_config.json").read_text())["r"] == 4
    with pytest.raises(UserError, match=r"rollout\.push: adapter goes beside a base .* is an adapter itself"):
        assemble(pushed(tiny, servers, student__model=str(first.model)))
