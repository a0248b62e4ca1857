"""`rollout.overlap`: each step trains on what the weights of the step before wrote, and goes on exactly."""

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from onpath.config.whole import Config
from onpath.engines.hf import HFEngine
from onpath.engines.overlap import Overlap
from onpath.run.assemble import assemble
from onpath.run.log import read_lines
from onpath.run.optimizer import make_optimizer
from onpath.system.errors import UserError
from onpath.training import one_step, train
from tests.forks import ended
from tests.run.test_kill import killed_when, rows, start, written
from tests.run.test_resume import PLACES, Stopped, contents, stop_at

Tiny = Callable[..., Config]
OPTIONS: dict[str, Any] = {
    "rollout__overlap": True,
    "optim__steps": 5,
    "optim__lr": 0.01,
    "run__save_every": 2,
    "run__trajectories_every": 1,
    "eval__every": 2,
}


def versions(run: Path) -> list[set[int]]:
    files = sorted((run / "trajectories").glob("*.parquet"))
    return [{row["policy_version"] for row in pq.read_table(f).to_pylist()} for f in files]


@pytest.mark.parametrize("lora", [0, 4])
def test_each_step_trains_on_the_weights_before(lora: int, tiny: Tiny) -> None:
    """Against the same done by hand, without a thread: a copy of the weights before each step's."""
    run = train(tiny(**OPTIONS, student__lora_rank=lora), quiet=True).directory
    assert versions(run) == [{0}, {0}, {1}, {2}, {3}]
    assert [r["staleness"] for r in read_lines(run / "metrics.jsonl")] == [0, 1, 1, 1, 1]

    parts = assemble(tiny(**OPTIONS | {"rollout__overlap": False}, student__lora_rank=lora))
    optimizer, schedule = make_optimizer(parts.config, parts.models.student)
    behind = [copy.deepcopy(parts.models.student)]
    losses = []
    for step in range(5):
        behind.append(copy.deepcopy(parts.models.student))
        writer = HFEngine(
            behind[max(0, step - 1) + 1],
            parts.text.renderer,
            stop_ids=parts.generators.student.stop_ids,
            vocabulary=parts.models.vocabulary,
        )
        writer.sync_weights(max(0, step - 1))
        schedule(step)
        losses.append(one_step(replace(parts, sampler=writer), optimizer, step).sums["loss"])
    assert [r["loss"] for r in read_lines(run / "metrics.jsonl")] == losses
    saved = load_file(run / "checkpoints" / "step_5" / "model.safetensors")
    trained = {n: p for n, p in parts.models.student.named_parameters() if p.requires_grad}
    assert saved.keys() == trained.keys()
    assert all(p.equal(saved[n]) for n, p in trained.items())


def test_what_samples_ahead_of_an_adapter_has_the_base_once(tiny: Tiny) -> None:
    parts = assemble(tiny(**OPTIONS, student__lora_rank=4))
    assert isinstance(parts.sampler, HFEngine)
    theirs = dict(parts.models.student.named_parameters())
    own = {n for n, p in parts.sampler.model.named_parameters() if p is not theirs[n]}
    assert own == {n for n, p in theirs.items() if p.requires_grad}


def test_overlap_changes_the_third_batch_and_not_the_first_two(tiny: Tiny) -> None:
    runs = [
        train(tiny(**OPTIONS | {"rollout__overlap": on}, run__name=str(on)), quiet=True)
        for on in (False, True)
    ]
    lines = [read_lines(r.directory / "metrics.jsonl") for r in runs]
    files = [sorted((r.directory / "trajectories").glob("*.parquet")) for r in runs]
    drawn = [[[row["response"] for row in pq.read_table(f).to_pylist()] for f in group] for group in files]
    assert drawn[0][0] == drawn[1][0]
    assert drawn[0][1] != drawn[1][1], "the second batch is of the first weights, no longer of the second"
    assert lines[0][0]["loss"] == lines[1][0]["loss"]
    assert {line["staleness"] for line in lines[0]} == {0}


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    return {}


OVERLAPPED = [
    "in the first step",
    "before the third step's gradient",
    "after a step, before its line",
    "in a checkpoint, after one file",
    "before the last checkpoint",
]
"""Places at which a batch is under way, or its weights are being written."""


@pytest.mark.slow
@pytest.mark.parametrize("place", OVERLAPPED)
def test_stopped_anywhere_and_started_again(
    place: str, tiny: Tiny, kept: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = OPTIONS | {"eval__start": True, "optim__steps": 4}
    if not kept:
        kept |= contents(train(tiny(run__name="whole", **options), quiet=True).directory)
    where, name, call, after = PLACES[place]
    config = tiny(run__name="stopped", **options)
    with monkeypatch.context() as patch:
        stop_at(patch, where, name, call=call, after=after)
        with pytest.raises(Stopped):
            train(config, quiet=True)
    found = contents(train(config, quiet=True).directory)
    assert sorted(found) == sorted(kept)
    for file, content in kept.items():
        assert found[file] == content, file


@pytest.mark.slow
def test_killed_with_sigkill(tiny: Tiny, tmp_path: Path) -> None:
    """In the middle of steps, while the next batch is being drawn."""
    options = OPTIONS | {"optim__steps": 6, "run__threads": 1}
    whole_file, whole = written(tiny(**options, run__name="whole"), tmp_path)
    killed_file, killed = written(tiny(**options, run__name="killed"), tmp_path)
    assert ended(start(whole_file)) == 0
    for lines in (3, 5):
        killed_when(lambda lines=lines: len(rows(killed)) >= lines, killed_file)
    assert ended(start(killed_file)) == 0
    assert rows(killed) == rows(whole)
    for name in ("model", "optimizer", "method"):
        one, two = (load_file(r / "checkpoints" / "step_6" / f"{name}.safetensors") for r in (whole, killed))
        assert one.keys() == two.keys()
        assert all(one[k].equal(two[k]) for k in one)


def test_a_checkpoint_holds_the_weights_that_draw_next(tiny: Tiny) -> None:
    run = train(tiny(**OPTIONS), quiet=True).directory
    older = load_file(run / "checkpoints" / "step_4" / "method.safetensors")
    newer = load_file(run / "checkpoints" / "step_4" / "model.safetensors")
    assert {f"ahead.{k}" for k in newer} == set(older)
    assert any(not older[f"ahead.{k}"].equal(v) for k, v in newer.items())


def test_an_error_in_the_background_reaches_the_user(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    real = HFEngine.generate

    def failing(self: HFEngine, prompts: Any, sampling: Any, **options: Any) -> Any:
        if (options.get("keys") or [""])[0].startswith("step 2/"):
            raise UserError("the engine is gone")
        return real(self, prompts, sampling, **options)

    monkeypatch.setattr(HFEngine, "generate", failing)
    config = tiny(**OPTIONS)
    with pytest.raises(UserError, match="the engine is gone"):
        train(config, quiet=True)
    run = Path(config.run.dir) / "tiny"
    assert [r["step"] for r in read_lines(run / "metrics.jsonl")] == [1, 2]
    assert (run / "checkpoints" / "step_2").is_dir(), "nothing finished is lost"


def test_the_copy_stands_still_while_the_weights_move(tiny: Tiny) -> None:
    parts = assemble(tiny(**OPTIONS))
    assert isinstance(parts.overlap, Overlap)
    seen = []

    def draw(step: int) -> list[Any]:
        before = [p.clone() for p in parts.overlap.engine.model.parameters()]
        time.sleep(0.05)
        seen.append(
            all(a.equal(b) for a, b in zip(before, parts.overlap.engine.model.parameters(), strict=True))
        )
        return []

    parts.overlap(0, draw)
    with torch.no_grad():
        for p in parts.models.student.parameters():
            p.add_(1.0)
    parts.overlap(1, draw)
    parts.overlap(2, draw)
    parts.overlap.close()
    assert len(seen) >= 3
    assert all(seen)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method__divergence": "sampled"}, r"set method\.ppo_clip"),
        ({"method__name": "trd", "method__offline": True}, r"method\.offline"),
    ],
)
def test_impossible_pairs(options: dict[str, Any], says: str, tiny: Tiny) -> None:
    with pytest.raises(UserError, match=f"rollout.overlap.*{says}"):
        tiny(rollout__overlap=True, **options)
    tiny(rollout__overlap=True, method__divergence="sampled", method__ppo_clip=0.2)


def test_a_run_made_longer_draws_with_the_weights_of_one_that_was_long(tiny: Tiny) -> None:
    options = OPTIONS | {"optim__schedule": "constant", "optim__warmup": 0.0, "optim__lr": 1e-2}
    whole = train(tiny(**options | {"optim__steps": 5}, run__name="whole"), quiet=True).directory
    for steps in (3, 5):
        longer = train(tiny(**options | {"optim__steps": steps}, run__name="longer"), quiet=True).directory
    assert rows(longer)[-2:] == rows(whole)[-2:]
