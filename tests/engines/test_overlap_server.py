"""`rollout.overlap` with a server: it writes the next batch, by the weights that a step begins with."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from onpath.config.whole import Config
from onpath.engines.base import Engine
from onpath.engines.head import unwrapped
from onpath.engines.remote.server import ServerEngine
from onpath.records import Rollout
from onpath.run.assemble import assemble
from onpath.run.log import read_lines
from onpath.run.optimizer import make_optimizer
from onpath.system.errors import UserError
from onpath.training import one_step, sample, train
from tests.engines.fake_vllm import FakeVLLM
from tests.engines.test_overlap import versions
from tests.engines.test_server import fake_of, restarted, scaled

Tiny = Callable[..., Config]
STEPS = 4
OPTIONS: dict[str, Any] = {
    "optim__steps": STEPS,
    "optim__lr": 0.01,
    "run__trajectories_every": 1,
    "eval__every": 2,
}


@pytest.fixture
def student(model_dirs: dict[str, Path]) -> Iterator[FakeVLLM]:
    fake = fake_of(model_dirs["student"])
    yield fake
    fake.stop()


class Drawn(Engine):
    """A sampler that hands out what is there already."""

    def __init__(self, rollouts: list[Rollout]) -> None:
        self.rollouts = rollouts

    def generate(self, *_: Any, **__: Any) -> list[Rollout]:
        return self.rollouts


def remote(tiny: Tiny, student: FakeVLLM, **more: Any) -> Config:
    return tiny(**OPTIONS, rollout__engine="vllm", rollout__url=student.url, **more)


def overlapped(tiny: Tiny, student: FakeVLLM) -> tuple[list[set[int]], list[Any]]:
    """Versions of the rollouts and losses, step by step. A push that did not wait would fall into a batch."""
    student.waits_for_push = lambda body: "seed" in body
    run = train(remote(tiny, student, rollout__overlap=True), quiet=True).directory
    student.waits_for_push = lambda body: False
    rows = read_lines(run / "metrics.jsonl")
    assert [r["staleness"] for r in rows] == [0, 1, 1, 1]
    return versions(run), [r["loss"] for r in rows]


def by_hand(tiny: Tiny, student: FakeVLLM) -> list[float]:
    """Losses of the same without a thread, one batch after the other."""
    restarted(student)
    parts = assemble(remote(tiny, student, run__name="by hand"))
    optimizer, schedule = make_optimizer(parts.config, parts.models.student)
    parts.generators.student.sync_weights(0)
    batch, losses = sample(parts, 0), []
    for step in range(STEPS):
        following = sample(parts, step + 1)
        schedule(step)
        losses.append(one_step(replace(parts, sampler=Drawn(batch)), optimizer, step).sums["loss"])
        batch = following
    return losses


def test_each_batch_is_of_the_weights_before(tiny: Tiny, student: FakeVLLM) -> None:
    seen, losses = overlapped(tiny, student)
    assert seen == [{0}, {0}, {1}, {2}]
    assert losses == by_hand(tiny, student)


def test_without_waiting_the_weights_would_move_under_a_batch(
    tiny: Tiny, student: FakeVLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above can fail."""
    monkeypatch.setattr("onpath.engines.overlap.Overlap.before_sync", lambda self: None)
    try:
        _, losses = overlapped(tiny, student)
    except (UserError, AssertionError):
        return
    assert losses != by_hand(tiny, student)


def test_a_batch_that_cannot_be_drawn_says_why(tiny: Tiny, student: FakeVLLM) -> None:
    config = remote(tiny, student, rollout__overlap=True, rollout__patience=0.3)
    student.spoil = lambda answer: 503 if len(student.requests) > 24 else answer
    with pytest.raises(UserError, match=r"no answer from .* for 0\.3 s \(status 503: told to\)"):
        train(config, quiet=True)


def test_a_restarted_server_gets_the_weights_of_the_last_push(tiny: Tiny, student: FakeVLLM) -> None:
    """Not those of the student, which are training meanwhile."""
    parts = assemble(remote(tiny, student))
    engine = parts.generators.student
    assert isinstance(engine, ServerEngine)
    scaled(parts.models.student)
    engine.sync_weights(1)
    pushed = {n: p.detach().clone() for n, p in unwrapped(parts.models.student).named_parameters()}
    scaled(parts.models.student)
    restarted(student)
    (rollout,) = engine.generate(parts.prompts.pool[:1], parts.sampling)
    assert engine.resyncs == 1
    assert rollout.policy_version == 1
    held = student.engine.model.state_dict()
    assert all(torch.equal(held[n], p) for n, p in pushed.items())

    assert engine.handover is not None
    kept = load_file(engine.handover.where / "model.safetensors")
    assert all(torch.equal(kept[n], p) for n, p in pushed.items() if n in kept)
    student.takes_weights = False
    restarted(student)
    with pytest.raises(UserError, match="does not answer as before"):
        engine.generate(parts.prompts.pool[:1], parts.sampling)


def test_vllm_cannot_sleep_while_it_samples_ahead(tiny: Tiny) -> None:
    with pytest.raises(UserError, match="cannot sleep"):
        tiny(rollout__engine="vllm", rollout__overlap=True, rollout__vllm={"enable_sleep_mode": True})
