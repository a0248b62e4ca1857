"""What a run stores of its trajectories."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from onpath.config.whole import Config
from onpath.run.assemble import assemble
from onpath.run.optimizer import make_optimizer
from onpath.run.trajectories import top_tokens, write_parquet
from onpath.training import one_step, train
from tests.stored import read_trajectories

Tiny = Callable[..., Config]


def test_likeliest_tokens_are_those_of_the_full_softmax_and_are_looked_up_where_stored(tiny: Tiny) -> None:
    config = tiny(optim__steps=3, run__trajectories_every=0)
    assert [top_tokens(config, step) for step in (1, 2, 3)] == [0, 0, 0]
    config = tiny(optim__steps=3, run__trajectories_every=100)
    assert [top_tokens(config, step) for step in (1, 2, 3)] == [5, 0, 5]
    parts = assemble(config)
    starting = copy.deepcopy(parts.models.student)
    meter = one_step(parts, make_optimizer(parts.config, parts.models.student)[0], 0)
    assert one_step(parts, make_optimizer(parts.config, parts.models.student)[0], 1).top == {}
    trajectory = max(meter.step.prepared.trajectories, key=lambda t: len(t.response))
    top = meter.top[trajectory.place]
    for who, model in (("student", starting), ("teacher", parts.models.teacher.model)):
        ids = torch.tensor([trajectory.student_context + trajectory.response])
        with torch.no_grad():
            logp = model.eval()(ids.to(model.device)).logits[0].float().log_softmax(-1).cpu()
        start = len(trajectory.student_context) - 1
        for i, (names, values) in enumerate(zip(top[f"{who}_top_ids"], top[f"{who}_top_logp"], strict=True)):
            expected = logp[start + i].topk(5)
            assert names == expected.indices.tolist()
            assert values == pytest.approx(expected.values.tolist(), abs=1e-4)


def test_stored_columns_do_not_depend_on_the_first_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    write_parquet(path, [{"a": 1}, {"a": 2, "b": [0.5]}])
    assert pq.read_table(path).to_pylist() == [{"a": 1, "b": None}, {"a": 2, "b": [0.5]}]


def test_a_run_stores_the_likeliest_tokens_of_both_models(tiny: Tiny) -> None:
    result = train(tiny(optim__steps=2, data__eval={}, run__trajectories_every=1), quiet=True)
    rows = read_trajectories(result.directory)
    assert rows
    for row in rows:
        for who in ("student", "teacher"):
            names, logps = row[f"{who}_top_tokens"], row[f"{who}_top_logp"]
            assert len(names) == len(logps) == len(row["response"])
            for token, logp, likeliest, values in zip(
                row["tokens"], row[f"{who}_logp"], names, logps, strict=True
            ):
                assert len(likeliest) == len(values) == 5
                assert values == sorted(values, reverse=True)
                if token in likeliest:
                    assert logp == pytest.approx(values[likeliest.index(token)], abs=1e-5)
                else:
                    assert logp <= values[-1] + 1e-5


@pytest.mark.parametrize("options", [{"method__first_tokens": 4}, {"method__reweight": "divergence"}])
def test_shaped_trajectories_are_stored_as_they_were_trained_on(options: dict[str, Any], tiny: Tiny) -> None:
    run = train(tiny(**options, optim__steps=1, run__trajectories_every=1), quiet=True).directory
    plain = train(tiny(optim__steps=1, run__trajectories_every=1, run__name="plain"), quiet=True).directory
    (path,), (other,) = ((r / "trajectories").glob("*.parquet") for r in (run, plain))
    rows, whole = pq.read_table(path).to_pylist(), pq.read_table(other).to_pylist()
    assert [r["prompt_id"] for r in rows] == [r["prompt_id"] for r in whole], "in the same order"
    for row, full in zip(rows, whole, strict=True):
        count = len(row["response"])
        assert row["response"] == full["response"][: options.get("method__first_tokens")]
        assert len(row["reverse_kl"]) == count
        assert row["reverse_kl"] == pytest.approx(full["reverse_kl"][:count], abs=1e-5)


def test_a_conversation_is_stored_whole(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    turns = [("user", "1+2=?"), ("assistant", "3"), ("user", "3+4=?")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns], "answer": "7"}
    path.write_text(json.dumps(row) + "\n")
    config = tiny(
        optim__steps=1, data__train=str(path), data__eval={}, rollout__prompts=1, run__trajectories_every=1
    )
    rows = read_trajectories(train(config, quiet=True).directory)
    assert {row["prompt"] for row in rows} == {"user: 1+2=?\nassistant: 3\nuser: 3+4=?"}
