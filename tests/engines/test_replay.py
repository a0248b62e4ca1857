"""Offline runs: written once, by the starting weights, whatever happens to the process."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from onpath.config.build import Config
from onpath.engines.hf import HFEngine
from onpath.engines.replay import Replay, weights_digest
from onpath.engines.self_check import check_model
from onpath.records import Completion
from onpath.run.assemble import assemble
from onpath.run.parts import Parts
from onpath.training import generate_ahead, sample, train
from tests.conftest import make_model
from tests.methods.test_trd import TEMPLATE, fingerprint

DONE = Completion(ids=(4, 2), logprobs=(-0.5, -0.25), finish_reason="stop")


@pytest.fixture
def offline(tiny: Callable[..., Config]) -> Callable[..., Config]:
    def build(**changes: Any) -> Config:
        options = {"method__name": "trd", "method__template": TEMPLATE, "method__gate": False}
        return tiny(**options, method__offline=True, **changes)

    return build


def test_half_written_lines_are_passed_over(tmp_path: Path) -> None:
    Replay(tmp_path).put({"a": DONE})
    path = tmp_path / "process-0.jsonl"
    with path.open("a") as file:
        file.write('{"key": "b", "ids": [4')
    again = Replay(tmp_path)
    assert again.get("a") == DONE
    assert again.get("b") is None
    again.put({"c": DONE})
    assert Replay(tmp_path).get("c") == DONE


def test_digest_sees_every_weight() -> None:
    model = make_model(0)
    before = weights_digest(model)
    assert weights_digest(make_model(0)) == before
    with torch.no_grad():
        model.model.norm.weight[-1] += 1e-6
    assert weights_digest(model) != before


def unsettled(parts: Parts) -> None:
    with torch.no_grad():
        for p in parts.models.student.parameters():
            p.mul_(1.5)


def test_trained_on_what_the_start_wrote(offline: Callable[..., Config]) -> None:
    parts = assemble(offline())
    generate_ahead(parts)
    at_start = fingerprint(parts.method, sample(parts, 2), step=2)
    unsettled(parts)
    assert fingerprint(parts.method, sample(parts, 2), step=2) == at_start
    with pytest.raises(AssertionError, match="starting weights"):
        sample(parts, 3)  # beyond the run's steps: nobody asked the starting weights


def test_a_prompt_is_written_once(offline: Callable[..., Config]) -> None:
    parts = assemble(offline(data__limit=8))  # a pool of one step, read in three passes
    generate_ahead(parts)
    passes = [{r.prompt.id: r.ids for r in sample(parts, step)} for step in range(3)]
    assert passes[0] == passes[1] == passes[2]
    assert len(list((Path(parts.config.run.dir) / "tiny" / "cache").glob("*.jsonl"))) == 1


def test_restarts_write_nothing_anew(offline: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(offline(run__save_every=1, run__name="whole"), quiet=True).directory
    config = offline(run__save_every=1, run__name="cut")
    cut = train(config, quiet=True).directory
    for name in ("model", "checkpoints/step_3"):
        for file in (cut / name).iterdir():
            file.unlink()
        (cut / name).rmdir()
    plain, calls = HFEngine.continue_from, []

    def counting(self: HFEngine, prefixes: Any, *rest: Any, **named: Any) -> Any:
        calls.append(len(prefixes))
        return plain(self, prefixes, *rest, **named)

    def checked(*args: Any, **named: Any) -> Any:
        found = check_model(*args, **named)
        calls.clear()  # the start-up check generates too
        return found

    monkeypatch.setattr("onpath.run.assemble.check_model", checked)
    monkeypatch.setattr(HFEngine, "continue_from", counting)
    train(config, quiet=True)
    assert calls == [5 * 2], "only the evaluation at the end: 5 problems, 2 samples"
    rows = [[json.loads(x) for x in (d / "metrics.jsonl").read_text().splitlines()] for d in (whole, cut)]
    assert [{**r, "seconds": 0} for r in rows[0]] == [{**r, "seconds": 0} for r in rows[1]]
    assert all(r["teacher_tokens_generated"] for r in rows[0])


def test_other_weights_other_entries(offline: Callable[..., Config]) -> None:
    parts = assemble(offline())
    first = sample(parts, 0)
    other = assemble(offline(student__model=str(Path(parts.config.teacher.model))))
    assert [r.ids for r in sample(other, 0)] != [r.ids for r in first]
    assert [r.ids for r in sample(assemble(offline(run__seed=1)), 0)] != [r.ids for r in first]
