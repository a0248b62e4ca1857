"""What two processes share out; methods with a state, token weights and restarts on any number of processes.

`test_two_processes.py` has plain OPD.
"""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from onpath import training
from onpath.commands.cli import main
from onpath.config.whole import Config
from onpath.run.log import read_lines
from onpath.system import distributed, launcher
from onpath.training import train
from tests.forks import TIMEOUT, done_by_all, done_by_two, forked
from tests.run.test_resume import Stopped, stop_at
from tests.system.test_two_processes import in_ranks

Tiny = Callable[..., Config]


def test_gradients_are_summed_in_small_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of all gradients at once would be as much memory again; a large tensor is summed where it is."""
    said: list[torch.Tensor] = []
    monkeypatch.setattr(distributed, "world", lambda: 2)
    monkeypatch.setattr(distributed, "_MESSAGE", 10)
    monkeypatch.setattr(dist, "all_reduce", lambda t: said.append(t.mul_(2)))
    half = torch.arange(3.0, dtype=torch.float16)
    tensors = [torch.arange(float(n)) for n in (4, 6, 1, 25, 10, 3)] + [torch.arange(12.0).view(3, 4).T, half]
    wanted = [2 * t for t in tensors]
    distributed.sum_tensors(tensors)
    assert all(torch.equal(t, w) and t.dtype == w.dtype for t, w in zip(tensors, wanted, strict=True))
    assert [t.numel() for t in said] == [3, 10, 1, 25, 10, 3, 12]
    inside = {t.data_ptr() for t in tensors}
    assert [t.data_ptr() in inside for t in said] == [True, False, True, True, True, True, False]


def test_an_empty_word_of_a_launcher_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the command line reads it."""
    monkeypatch.setenv("WORLD_SIZE", "")
    assert not launcher.several()


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 4, 7])
def test_shares_are_whole_and_come_back_in_order(
    world: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = list(range(count))
    monkeypatch.setattr(distributed, "world", lambda: world)
    shares = []
    for rank in range(world):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(distributed.share(items))
    assert sorted(i for share in shares for i in share) == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1

    def gathered(parts: list[Any], mine: list[Any]) -> None:
        parts[:] = shares

    monkeypatch.setattr(dist, "all_gather_object", gathered)
    assert distributed.gather(shares[0]) == items


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (distributed.rank(), distributed.world()) == (0, 1)
    assert distributed.total([1, 2.5, 10**15 + 1], torch.device("cpu")) == [1.0, 2.5, 10.0**15 + 1]
    assert distributed.gather([3, 1]) == [3, 1]
    distributed.barrier()
    model = torch.nn.Linear(2, 2)
    distributed.sum_gradients(model)
    assert model.weight.grad is None


def test_gradients_are_summed_not_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a rank that had nothing to do, whose gradients are None, and weights of two dtypes."""
    monkeypatch.setattr(distributed, "world", lambda: 3)
    monkeypatch.setattr(dist, "all_reduce", lambda flat: flat.mul_(3).add_(1))
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2).to(torch.bfloat16))
    model[0].bias.requires_grad_(False)
    model[0].weight.grad = torch.full((3, 2), 2.0)
    distributed.sum_gradients(model)
    assert torch.equal(model[0].weight.grad, torch.full((3, 2), 7.0))
    assert torch.equal(model[1].weight.grad, torch.ones(2, 3, dtype=torch.bfloat16))
    assert model[0].bias.grad is None


def test_parcels_travel_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They lie in host memory: a device has room for a part of each."""
    sent, send = list[int](), dist.all_to_all_single

    def noted(into: torch.Tensor, out: torch.Tensor, *splits: list[int]) -> None:
        if splits:
            sent.append(max(len(into), len(out)))
        send(into, out, *splits)

    monkeypatch.setattr(dist, "all_to_all_single", noted)
    monkeypatch.setattr(distributed, "_PART", 200)

    def parcel(giver: int, taker: int) -> dict[str, torch.Tensor]:
        size = 100 * giver * (taker - giver) ** 2
        return {"states": torch.full((size,), giver + 0.5, dtype=torch.bfloat16)} if size else {}

    def exchanged(rank: int) -> None:
        distributed.start(torch.device("cpu"), timeout=TIMEOUT)
        found = distributed.exchanged([parcel(rank, taker) for taker in range(3)])
        assert [list(one) for one in found] == [list(parcel(giver, rank)) for giver in range(3)]
        for giver, one in enumerate(found):
            assert all(torch.equal(t, parcel(giver, rank)[name]) for name, t in one.items())
        assert len(sent) > 5
        assert max(sent) <= 3 * 200

    done_by_all(exchanged, tmp_path, world=3)


def test_a_weight_without_a_gradient_keeps_none(tmp_path: Path) -> None:
    """With one process AdamW passes over it; with several it decayed."""

    def summed(rank: int) -> None:
        distributed.start(torch.device("cpu"), timeout=TIMEOUT)
        used, idle = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False)
        if rank == 0:
            used.weight.grad = torch.full((2, 2), 3.0)
        distributed.sum_gradients(torch.nn.Sequential(used, idle))
        assert torch.equal(used.weight.grad, torch.full((2, 2), 3.0))
        assert idle.weight.grad is None

    done_by_two(summed, tmp_path)


def numbers(run: Path) -> list[dict[str, float]]:
    return [
        {k: v for k, v in row.items() if isinstance(v, int | float)}
        for row in read_lines(run / "metrics.jsonl")
    ]


def same(one: Path, two: Path) -> None:
    rows = numbers(one), numbers(two)
    assert len(rows[0]) == len(rows[1]) > 0
    for a, b in zip(*rows, strict=True):
        assert a == pytest.approx(b, rel=2e-5, abs=1e-6)
    weights = [load_file(next((run / "model").glob("*.safetensors"))) for run in (one, two)]
    for name, tensor in weights[0].items():
        assert tensor.allclose(weights[1][name], rtol=1e-4, atol=5e-6), name


@pytest.mark.slow
def test_two_contexts_an_average_and_weighted_tokens(tiny: Tiny, tmp_path: Path) -> None:
    """OPSD with a moving average under LoRA, tokens weighted by a statistic, three prompts with two samples
    each."""
    options = {
        "method__name": "opsd",
        "method__weights": "ema",
        "method__ema_decay": 0.5,
        "method__reweight": "teacher_entropy",
        "method__cosine_every": 1,
        "student__lora_rank": 4,
        "rollout__prompts": 3,
        "rollout__n": 2,
        "optim__steps": 3,
        "optim__lr": 1e-2,
        "optim__eps": 1e-4,  # smaller, and AdamW makes whole steps of gradients that are rounding
        "run__trajectories_every": 1,
        "data__eval": {},
    }
    one = train(tiny(**options, run__name="one"), quiet=True).directory
    two = in_ranks(tiny(**options, run__name="two"), tmp_path, processes=2)
    same(one, two)
    assert {"gradient_cosine"} <= set(numbers(one)[-1])
    stored = [pq.read_table(run / "trajectories" / "step_000001.parquet").to_pylist() for run in (one, two)]
    key = [
        sorted((r["prompt_id"], r["sample"], r["response"], r["correct"]) for r in rows) for rows in stored
    ]
    assert key[0] == key[1]
    assert len(key[0]) == 6
    averages = [load_file(run / "checkpoints" / "step_3" / "method.safetensors") for run in (one, two)]
    assert averages[0].keys() == averages[1].keys() != set()
    for name, tensor in averages[0].items():
        assert tensor.allclose(averages[1][name], rtol=1e-4, atol=5e-6), name


@pytest.mark.slow
def test_begun_by_one_process_and_ended_by_two(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"rollout__prompts": 5, "optim__steps": 4, "run__save_every": 2, "data__eval": {}}
    whole = train(tiny(**options, run__name="whole"), quiet=True).directory
    config = tiny(**options, run__name="begun")
    with monkeypatch.context() as patch:
        stop_at(patch, "onpath.training", "one_step", call=4, after=False)
        with pytest.raises(Stopped):
            train(config, quiet=True)
    same(whole, in_ranks(config, tmp_path, processes=2))


@pytest.mark.slow
def test_one_rank_that_is_asked_to_stop_stops_all(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(optim__steps=4, data__eval={})
    directory = Path(config.run.dir) / config.run.name
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    real = training.one_step

    def run(rank: int) -> None:
        def hit(parts: Any, optimizer: Any, step: int) -> Any:
            if step == 1 and rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(parts, optimizer, step)

        training.one_step = hit
        # As torchrun does: it is where ranks agree who speaks.
        place = tmp_path / "attempt" / str(rank) / "error.json"
        place.parent.mkdir(parents=True)
        os.environ["TORCHELASTIC_ERROR_FILE"] = str(place)
        assert main(["train", str(file), "--quiet"]) == 0

    found = forked(run, tmp_path)
    assert [code for code, _, _ in found] == [0, 0]
    said = found[0][2] + found[1][2]
    assert said.count("is saved; the same command goes on") == 1
    assert [p.name for p in (directory / "checkpoints").iterdir()] == ["step_2"]
    train(config, quiet=True)
    same(train(tiny(optim__steps=4, data__eval={}, run__name="whole"), quiet=True).directory, directory)
