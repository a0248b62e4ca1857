"""Runs in shards, from their first step to what they leave: each is that of one process, and nothing that was
finished is lost."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from onpath import export_model, training
from onpath.config.whole import Config
from onpath.engines import sharding, teacher
from onpath.run import checkpoint
from onpath.run.log import read_lines
from onpath.system import distributed
from onpath.system.errors import UserError
from onpath.training import train
from tests.forks import TIMEOUT, done_by_two, forked, free_port, free_ports
from tests.methods.family import ARMS, options_of
from tests.methods.test_trd import SELF_TEMPLATE, TEMPLATE

Tiny = Callable[..., Config]
SHARDED = {"parallel__timeout": TIMEOUT, "teacher__device": "auto", "parallel__shard": "layer"}
TRD = {"method__name": "trd", "method__template": TEMPLATE, "method__gate": False}


RUNS: dict[str, dict[str, Any]] = {
    "opd": {"rollout__prompts": 7, "eval__start": True, "run__trajectories_every": 1},
    "lora": {"student__lora_rank": 4, "method__cosine_every": 1, "optim__micro_batch_tokens": 60},
    "topd": {"method__name": "topd", "method__top_share": 0.5},
    "opsd ema": {"method__name": "opsd", "method__weights": "ema", "method__ema_decay": 0.5},
    "opsd ema, whole": {
        "method__name": "opsd",
        "method__weights": "ema",
        "method__ema_decay": 0.5,
        "parallel__teacher": "copy",
    },
    "opsd base": {"method__name": "opsd", "method__weights": "base", "method__reweight": "teacher_entropy"},
    "opsd base of an adapter": {"method__name": "opsd", "method__weights": "base", "student__lora_rank": 4},
    "opsd live": {"method__name": "opsd", "method__weights": "live", "method__cosine_every": 1},
    "trd": {**TRD, "rollout__prompts": 3},
    "trd offline": {**TRD, "method__offline": True},
    "trd gated": {**TRD, "method__gate": True, "method__gate_prompts": 3, "method__gate_max_harm": 1.0},
    "trd by itself": {
        **TRD,
        "method__teacher": "self",
        "method__template": SELF_TEMPLATE,
        "method__weights": "ema",
        "method__ema_decay": 0.5,
    },
    "teacher writes": {"method__writer": "teacher", "method__divergence": "cross_entropy"},
    "best kept": {"eval__every": 1, "run__keep_best": "test"},
    "sampled": {"method__divergence": "sampled", "method__ppo_clip": 0.2, "method__discount": 0.5},
    "teacher's likeliest": {"method__support": "teacher_topk", "method__support_k": 4},
    "likeliest of both, stale by token": {
        "method__support": "union",
        "method__support_k": 4,
        "method__importance": "token",
        "rollout__overlap": True,
    },
    "student's likeliest, stale by rollout": {
        "method__support": "student_topk",
        "method__support_k": 4,
        "method__tail": "renormalise",
        "method__importance": "sequence",
        "rollout__overlap": True,
        "parallel__shard": "step",
    },
    **{name: options_of(ARMS[name]) for name in ARMS if name != "topd"},
    "topd spliced, in steps": {
        "method__name": "topd",
        "method__plan": "spliced",
        "method__top_share": 0.5,
        "parallel__shard": "step",
    },
    "relay from the start, in steps": {
        **options_of(ARMS["relay from the start"]),
        "parallel__shard": "step",
        "student__lora_rank": 4,
    },
    "overlap": {"rollout__overlap": True, "parallel__shard": "step"},
    "not dealt": {
        "parallel__balance": False,
        "rollout__n": 2,
        "rollout__prompts": 3,
        "method__random_share": 0.6,
    },
}
OPTIM = {"optim__steps": 2, "optim__lr": 1e-2, "optim__eps": 1e-4}  # else AdamW makes whole steps of rounding


@pytest.mark.slow
def test_runs_are_those_of_one_process(tiny: Tiny, tmp_path: Path) -> None:
    """Metrics, evaluations, trajectories and the saved model of every method."""

    def config(name: str, **more: Any) -> Config:
        options = {"teacher__device": "auto", "run__name": name.replace(" ", "-")}
        return tiny(**{**OPTIM, **options, **RUNS[name], **more})

    ports = free_ports(len(RUNS))

    def run(rank: int) -> None:
        for port, name in zip(ports, RUNS, strict=True):
            os.environ["MASTER_PORT"] = port
            options = {**SHARDED, **RUNS[name], "run__dir": str(tmp_path / "two")}
            train(config(name, **options), quiet=True)

    done_by_two(run, tmp_path)
    for name in RUNS:
        one = train(config(name, parallel__shard="none"), quiet=True).directory
        assert_same(one, tmp_path / "two" / one.name)


@pytest.mark.parametrize("shard", ["layer", "step"])
def test_of_one_process_there_is_nothing_to_shard(shard: str, tiny: Tiny, tmp_path: Path) -> None:
    """To the bit: such a run is the one that asks for no shards."""
    runs = []
    for mode in ("none", shard):
        options = {"run__dir": str(tmp_path / mode), "run__name": "run", "parallel__shard": mode}
        runs.append(train(tiny(**OPTIM, **options, run__trajectories_every=1), quiet=True).directory)
    weights = [(run / "model" / "model.safetensors").read_bytes() for run in runs]
    assert weights[0] == weights[1]
    rows = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in read_lines(run / "metrics.jsonl")]
        for run in runs
    ]
    assert "loss" in rows[0][0]
    assert rows[0] == rows[1]
    assert read_lines(runs[0] / "eval.jsonl") == read_lines(runs[1] / "eval.jsonl")


@pytest.mark.slow
def test_kept_scores_are_read_in_no_step(tiny: Tiny, tmp_path: Path) -> None:
    """A method that asks the teacher while it prepares has another number of passes on each process."""
    few = {"rollout__prompts": 3, "optim__micro_batch_tokens": 60, "teacher__cache_dtype": "float32"}
    runs = {name: {**options_of(ARMS[name]), **few, **OPTIM} for name in ("branch", "truncate")}
    ports = free_ports(len(runs))

    def run(rank: int) -> None:
        for port, (name, options) in zip(ports, runs.items(), strict=True):
            os.environ["MASTER_PORT"] = port
            where = {"run__dir": str(tmp_path / "two"), "teacher__cache": str(tmp_path / f"kept-{name}")}
            train(tiny(**{**options, **SHARDED, **where, "run__name": name}), quiet=True)

    done_by_two(run, tmp_path)
    for name, options in runs.items():
        one = train(tiny(**{**options, "teacher__device": "auto", "run__name": name}), quiet=True).directory
        rows = [read_lines(run / "metrics.jsonl") for run in (one, tmp_path / "two" / name)]
        losses = [[r["loss"] for r in some] for some in rows]
        assert losses[0] == pytest.approx(losses[1], rel=5e-5), name


def assert_same(one: Path, two: Path) -> None:
    rows = [read_lines(run / "metrics.jsonl") for run in (one, two)]
    assert len(rows[0]) == len(rows[1]) == 2
    for a, b in zip(*rows, strict=True):
        numbers = {k: v for k, v in a.items() if isinstance(v, int | float)}
        assert numbers == pytest.approx({k: b[k] for k in numbers}, rel=5e-5, abs=1e-6), one.name
    assert read_lines(one / "eval.jsonl") == read_lines(two / "eval.jsonl"), one.name
    told = [[path.read_text() for path in run.glob("refine.json")] for run in (one, two)]
    assert told[0] == told[1], one.name
    tables = [sorted((run / "trajectories").glob("*.parquet")) for run in (one, two)]
    for a, b in zip(*tables, strict=True):
        columns = ["prompt_id", "sample", "response", "correct"]
        assert pq.read_table(a, columns=columns).equals(pq.read_table(b, columns=columns)), one.name
    names = [sorted(p.relative_to(run) for p in run.glob("*/*.safetensors")) for run in (one, two)]
    assert names[0] == names[1] != [], one.name
    for file in names[0]:
        files = [sorted(p.name for p in (run / file).parent.iterdir()) for run in (one, two)]
        assert files[0] == files[1]
        weights = [load_file(run / file) for run in (one, two)]
        assert weights[0].keys() == weights[1].keys(), one.name
        for name, tensor in weights[0].items():
            assert tensor.allclose(weights[1][name], rtol=1e-4, atol=1e-5), (one.name, file, name)


def state_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, whole, whoever wrote it."""
    found = {}
    for part in ("model", "optimizer", "method"):
        stored = checkpoint._Stored(run / "checkpoints" / f"step_{step}", part)
        for name, shape in stored.shapes.items():
            tensor = torch.full(shape, torch.nan)
            stored.into(name, tensor)
            found[f"{part}.{name}"] = tensor
    return found


@pytest.mark.slow
@pytest.mark.parametrize("lora", [0, 4])
def test_any_number_of_ranks_goes_on_where_any_number_stopped(lora: int, tiny: Tiny, tmp_path: Path) -> None:
    """With a moving average; the schedule is constant, so that a longer run begins as a shorter one."""
    fixed = {**OPTIM, "optim__schedule": "constant", "optim__warmup": 0.0, "student__lora_rank": lora}
    fixed |= {"method__name": "opsd", "method__weights": "ema", "method__ema_decay": 0.5}
    fixed |= {"data__eval": {}, "rollout__prompts": 5, "teacher__device": "auto"}

    def some(world: int, name: str, steps: int) -> Path:
        options = {**fixed, "run__name": name, "optim__steps": steps}
        if world == 1:
            return train(tiny(**options), quiet=True).directory
        config = tiny(**{**options, **SHARDED})
        done_by_two(lambda _: train(config, quiet=True), tmp_path)
        return tmp_path / "runs" / name

    halves = {world: some(world, f"half-{world}", 2) for world in (1, 2)}

    def in_two_parts(begun: int, ended: int) -> Path:
        run = tmp_path / "runs" / f"from-{begun}-to-{ended}"
        shutil.copytree(halves[begun], run)
        (run / "config.yaml").unlink()  # which has the run's name
        shutil.rmtree(run / "model")
        assert len(list((run / "checkpoints" / "step_2").glob("optimizer*.safetensors"))) == begun
        return some(ended, run.name, 4)

    alone, together = (state_of(some(world, f"whole-{world}", 4), 4) for world in (1, 2))
    both = in_two_parts(2, 2)
    found = state_of(both, 4)
    assert all(torch.equal(found[name], together[name]) for name in together), "bit by bit"
    for run in (in_two_parts(2, 1), in_two_parts(1, 2)):
        found = state_of(run, 4)
        assert found.keys() == alone.keys()
        for name, tensor in alone.items():
            assert tensor.allclose(found[name], rtol=1e-3, atol=1e-5), (run.name, name)
    exported = export_model(both / "checkpoints" / "step_4", tmp_path / "out")
    saved = export_model(both, tmp_path / "merged") if lora else both / "model"
    weights = load_file(saved / "model.safetensors")
    assert all(
        t.allclose(weights[n], atol=1e-6) for n, t in load_file(exported / "model.safetensors").items()
    )


def test_a_file_of_one_rank_that_is_damaged_or_missing_is_found(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(**{**OPTIM, **SHARDED}, run__save_every=1, data__eval={})
    done_by_two(lambda _: train(config, quiet=True), tmp_path)
    root = tmp_path / "runs" / "tiny" / "checkpoints"
    assert [checkpoint.is_sound(root / f"step_{i}") for i in (1, 2)] == [True, True]
    for flaw in (lambda p: p.unlink(), lambda p: p.write_bytes(p.read_bytes()[:-1])):
        path = root / "step_2" / "optimizer-2-of-2.safetensors"
        before = path.read_bytes()
        flaw(path)
        assert not checkpoint.is_sound(root / "step_2")
        path.write_bytes(before)
        assert checkpoint.is_sound(root / "step_2")
    state = json.loads((root / "step_2" / "state.json").read_text())
    del state["blake2b"]["optimizer-2-of-2.safetensors"]
    (root / "step_2" / "state.json").write_text(json.dumps(state))
    assert not checkpoint.is_sound(root / "step_2"), "a rank's file that is not listed is missing"


def cannot_go_on(here: bool, config: Config, where: str) -> None:
    from onpath.methods.opd import OPD

    def refuse(*_: Any, **__: Any) -> Any:
        raise UserError("prompt '7' cannot be used")

    distributed._HEARD = 60.0  # nobody waits for so long
    if here and where == "prepare":
        OPD.prepare = refuse  # type: ignore[method-assign]
    if here and where == "train":
        training.loss_of = refuse  # while the others' backward pass waits for this one's rows
    if here and where in ("save", "save, and tell"):
        checkpoint.save_file = lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    if here and where == "save, and tell":
        checkpoint.Saving._tell = refuse  # type: ignore[method-assign]
    train(config, quiet=True)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("prepare", "prompt '7' cannot"),
        ("train", "prompt '7' cannot"),
        ("save", "No space left on device"),
        ("save, and tell", ""),
    ],
)
def test_what_stops_one_rank_is_said_by_both(
    where: str, says: str, first: int, tiny: Tiny, tmp_path: Path
) -> None:
    """At once: a group that shards still hold is left all the same. Rank 0 holds what they meet in."""
    config = tiny(**{**OPTIM, **SHARDED}, data__eval={})
    begun = time.monotonic()
    for code, _, err in forked(lambda rank: cannot_go_on(rank == first, config, where), tmp_path):
        assert code == 2
        assert says in next(line for line in reversed(err.splitlines()) if line.startswith("onpath:"))
    assert time.monotonic() - begun < 30.0, "half of what one may wait"


def test_two_hosts_meet(tiny: Tiny, tmp_path: Path) -> None:
    """A process on each: weights are copies across hosts, whole on either. The result is that of one."""
    one = train(tiny(**OPTIM, **RUNS["opd"], run__name="opd"), quiet=True).directory
    options = {**OPTIM, **RUNS["opd"], **SHARDED, "run__dir": str(tmp_path / "hosts"), "run__name": "opd"}

    def run(_: int) -> None:
        os.environ["LOCAL_WORLD_SIZE"], os.environ["LOCAL_RANK"] = "1", "0"
        train(tiny(**options), quiet=True)

    done_by_two(run, tmp_path)
    assert_same(one, tmp_path / "hosts" / "opd")


def test_a_host_that_looks_elsewhere_says_where(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(**{**OPTIM, **SHARDED, "parallel__timeout": 2.0})
    elsewhere = free_port()

    def run(rank: int) -> None:
        if rank == 1:
            os.environ["MASTER_PORT"] = elsewhere
        train(config, quiet=True)

    for code, _, err in forked(run, tmp_path):
        assert code == 2, err
        (said,) = [line for line in err.splitlines() if line.startswith("onpath: ")]
        assert "MASTER_ADDR, MASTER_PORT" in said
    assert f"process 1 of 2 does not meet the others at 127.0.0.1:{elsewhere}" in said


def test_an_average_that_follows_gathered_weights_is_found(tiny: Tiny, tmp_path: Path) -> None:
    """A planted fault: parameters are not rows again when the moving average reads them."""
    options = {**OPTIM, **RUNS["opsd ema"], "data__eval": {}}
    train(tiny(**options, run__name="one"), quiet=True)
    config = tiny(**options, **SHARDED, run__name="two")

    def run(_: int) -> None:
        sharding.give_back = teacher.give_back = lambda *_: None
        train(config, quiet=True)

    ended = forked(run, tmp_path)
    if [code for code, _, _ in ended] == [0, 0]:
        one, two = (state_of(tmp_path / "runs" / name, 2) for name in ("one", "two"))
        assert not all(tensor.allclose(two[name], rtol=1e-3, atol=1e-5) for name, tensor in one.items())
