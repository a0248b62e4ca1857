"""`onpath eval` under a launcher: what several processes say and write is what one does."""

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from datetime import timedelta
from io import StringIO
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch.distributed.tensor import DTensor

from onpath.commands import eval as module
from onpath.commands.cli import main
from onpath.config import Student, build
from onpath.config.whole import Config
from onpath.engines import sharding
from onpath.engines.hf import HFEngine
from onpath.engines.models import load_model
from onpath.system.errors import UserError
from onpath.training import train
from tests.forks import TIMEOUT, done_by_two, forked, free_ports, ranks

Said = tuple[int, str, str]
ASKED = ["--n=3", "--k=2", "--limit=7", "--grader=exact", "--max-new-tokens=12", "--device=cpu"]
TOGETHER = f"--parallel.timeout={TIMEOUT}"


def said_by(arguments: Sequence[str]) -> Said:
    """Exit code, stdout and stderr of the command in this process."""
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(["eval", *map(str, arguments)])
    return code, out.getvalue(), err.getvalue()


@pytest.fixture
def together(tmp_path: Path) -> Callable[..., list[list[Said]]]:
    """What each of several processes says to each of its command lines, one after the other."""

    def run(
        cases: Callable[[int], Sequence[Sequence[str]]], *, before: Callable[[int, int], None], world: int = 2
    ) -> list[list[Said]]:
        ports = free_ports(len(cases(0)))

        def all_of_them(rank: int) -> None:
            found = []
            for case, (arguments, port) in enumerate(zip(cases(rank), ports, strict=True)):
                os.environ["MASTER_PORT"] = port
                before(rank, case)
                found.append(said_by([*arguments, TOGETHER]))
            (tmp_path / f"said-{rank}.json").write_text(json.dumps(found))

        ended = forked(all_of_them, tmp_path, world=world)
        assert [code for code, _, _ in ended] == [0] * world, "".join(err for _, _, err in ended)
        files = [tmp_path / f"said-{rank}.json" for rank in range(world)]
        return [[tuple(said) for said in json.loads(file.read_text())] for file in files]

    return run


@pytest.fixture
def others(data_file: Path, tmp_path: Path) -> list[str]:
    """Problems whose columns have other names."""
    rows = [json.loads(line) for line in data_file.read_text().splitlines()]
    path = tmp_path / "others.jsonl"
    path.write_text("".join(json.dumps({"question": r["prompt"], "final": r["answer"]}) + "\n" for r in rows))
    return [f"--data={path}", "--columns={prompt: question, answer: final}"]


def files_of(directory: Path) -> dict[str, Any]:
    """What was written: of each file its text, or its rows."""
    return {
        path.name: pq.read_table(path).to_pylist() if path.suffix == ".parquet" else path.read_text()
        for path in directory.iterdir()
    }


def only_the_first_writes(rank: int, case: int) -> None:
    def never(*_: object) -> None:
        raise AssertionError("this process writes nothing")

    if rank:
        module.write_parquet = module.write_text = module.make_directory = never  # type: ignore[assignment]


def alike(
    together: Callable[..., list[list[Said]]], cases: Sequence[Sequence[str]], where: Path, *, world: int
) -> None:
    """One process and several say and write the same; `--parallel.shard` is for those."""
    outs, alone = ([where / f"{name}-{i}" for i in range(len(cases))] for name in ("together", "alone"))
    plain = [[a for a in case if not a.startswith("--parallel")] for case in cases]
    # First: what is imported, and tried, is then in all forks.
    expected = [said_by([*case, f"--out={out}"]) for case, out in zip(plain, alone, strict=True)]
    first, *rest = together(
        lambda _: [[*case, f"--out={out}"] for case, out in zip(cases, outs, strict=True)],
        world=world,
        before=only_the_first_writes,
    )
    for silent in rest:
        assert silent == [(0, "", "")] * len(cases)
    assert [code for code, _, _ in expected] == [0] * len(cases), expected
    assert first == expected
    for case, out, other in zip(cases, outs, alone, strict=True):
        assert files_of(out) == files_of(other), case


@pytest.mark.parametrize("world", [2, 3])
def test_several_processes_say_what_one_says(
    world: int,
    model_dirs: dict[str, Path],
    others: list[str],
    together: Callable[..., list[list[Said]]],
    tmp_path: Path,
) -> None:
    """Seven problems; and two for three processes, of which one has none and goes on in its shards."""
    one = [str(model_dirs["student"]), *ASKED, *others]
    two = [*one, f"--against={model_dirs['teacher']}"]
    if world == 2:
        cases = [two, [*two, "--json", "--parallel.shard=layer"], [*one, "--parallel.shard=step"]]
    else:
        cases = [[*two, "--json"], [*one, "--limit=2", "--parallel.shard=layer"]]
    alike(together, cases, tmp_path, world=world)


def test_a_run_is_asked_as_it_asks(
    tiny: Callable[..., Config], together: Callable[..., list[list[Said]]], tmp_path: Path
) -> None:
    """With an adapter, stops of its own and autocast, which shards are not rounded for."""
    options = {"student__lora_rank": 2, "optim__steps": 2, "optim__lr": 2e-2, "optim__bf16": True}
    options |= {"run__save_every": 1, "rollout__stop": ["3", "8"], "eval__start": False, "eval__n": 3}
    run = train(tiny(**options), quiet=True).directory
    two = [str(run / "checkpoints" / "step_1"), f"--against={run}", "--limit=5", "--device=cpu"]
    alike(together, [two, [*two, "--parallel.shard=layer"]], tmp_path, world=2)


GRADER = """
import os

def moody(text, answer):
    return 1 // (1 - int(os.environ.get("RANK", 0))) == 1
"""


def fails(*_: object, **__: object) -> Any:
    raise UserError("planted: it cannot be done")


def test_what_ends_one_process_ends_all_with_its_sentence(
    model_dirs: dict[str, Path],
    data_file: Path,
    together: Callable[..., list[list[Said]]],
    tmp_path: Path,
) -> None:
    """And nothing is left half-written."""
    (tmp_path / "mine.py").write_text(GRADER)
    real, written = HFEngine._generate_batch, module.write_parquet
    moody, sampling, options, against, disk, data = (tmp_path / f"out-{i}" for i in range(6))
    (tmp_path / "other.jsonl").write_bytes(data_file.read_bytes())

    def cases(rank: int) -> list[list[str]]:
        asked = [str(model_dirs["student"]), f"--data={data_file}", *ASKED]
        second = [f"--against={model_dirs['teacher']}"] if rank else []
        return [
            [*asked, f"--out={moody}", f"--grader={tmp_path / 'mine.py'}:moody", "--allow-code"],
            [*asked, f"--out={sampling}", "--parallel.shard=layer"],
            [*asked, f"--out={options}", f"--n={3 + rank}"],
            [*asked, f"--out={against}", *second],
            [*asked, f"--out={disk}"],
            [*asked, f"--out={data}", *([f"--data={tmp_path / 'other.jsonl'}"] if rank else [])],
        ]

    def planted(rank: int, case: int) -> None:
        only_the_first_writes(rank, case)
        HFEngine._generate_batch = fails if (rank, case) == (1, 1) else real  # type: ignore[method-assign]
        if rank == 0:
            module.write_parquet = fails if case == 4 else written

    first, second = together(cases, before=planted)
    assert second == [(code, "", err) for code, _, err in first]
    assert all((code, out) == (2, "") and err.count("onpath: ") == 1 for code, out, err in first)
    says = (
        "mine.py:moody fails for the answer",
        "planted: it cannot be done",
        "process 2 of 2 has eval.n: 4, the first 3",
        "some processes alone have --against, or --out",
        "planted: it cannot be done",
        "process 2 of 2 has data.eval: ['other'], the first ['sums']; start all with one config",
    )
    for (_, _, err), expected in zip(first, says, strict=True):
        assert expected in err
    assert f"the 21 samples are kept, ungraded, in {moody / 'ungraded_0.parquet'}" in first[0][2]
    assert "in moody" in first[0][2], "the line that failed"
    assert len(files_of(moody).pop("ungraded_0.parquet")) == 21
    assert not files_of(sampling) | files_of(disk)
    assert not any(where.exists() for where in (options, against, data))


def test_a_group_of_the_caller_s_own_stays(
    model_dirs: dict[str, Path], data_file: Path, tmp_path: Path
) -> None:
    """A script that torchrun has started, and that has met by itself, asks twice and goes on."""

    def run(rank: int) -> None:
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT))
        asked: dict[str, Any] = {"data": data_file, "limit": 3, "grader": "exact", "max_new_tokens": 4}
        for shard in ("none", "layer"):
            found = module.evaluate_model(model_dirs["student"], **asked, device="cpu", shard=shard)
            (result,) = found.results.values()
            assert result.problems == 3
        here = torch.tensor(float(rank))
        torch.distributed.all_reduce(here)
        assert float(here) == 1.0
        torch.distributed.destroy_process_group()

    done_by_two(run, tmp_path)


@pytest.mark.parametrize("shard", ["none", "layer"])
def test_one_that_dies_ends_the_others(
    shard: str, model_dirs: dict[str, Path], data_file: Path, tmp_path: Path
) -> None:
    """Long before the time-out, and nothing is written."""
    arguments = [str(model_dirs["student"]), f"--data={data_file}", *ASKED, f"--out={tmp_path / 'out'}"]

    def run(rank: int) -> None:
        if rank == 1:
            HFEngine._generate_batch = lambda *_: os._exit(7)  # type: ignore[method-assign]
        os._exit(main(["eval", *arguments, f"--parallel.shard={shard}", TOGETHER]))

    begun = time.monotonic()
    (code, out, err), (died, _, _) = forked(run, tmp_path)
    assert (code, out, died) == (2, "", 7)
    assert "onpath: another process of this run has ended before its time" in err
    assert "Traceback" not in err
    assert time.monotonic() - begun < TIMEOUT / 2
    assert not files_of(tmp_path / "out")


def test_processes_make_as_many_passes_as_one_needs_and_keep_their_shards(
    model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    """Three on one, one on the other, which goes on with two; then all layers are given back."""

    def run(rank: int) -> None:
        config = build({"parallel": {"shard": "layer"}})
        model = load_model(Student(model=str(model_dirs["student"])), "model", torch.device("cpu"))
        sharding.shard(model, sharding.make_mesh(config, torch.device("cpu")), device=torch.device("cpu"))
        passes: list[int] = []
        model.register_forward_hook(lambda *_: passes.append(len(passes)))
        with sharding.in_step(model), torch.inference_mode():
            for _ in range(1 if rank else 3):
                model(input_ids=torch.tensor([[1, 5]]))
            assert sharding.can_sample(model)
            assert not sharding.is_whole(model)
        assert len(passes) == 3
        assert not sharding.can_sample(model)
        layers = [p for layer in model.model.layers for p in layer.parameters()]
        assert all(isinstance(p, DTensor) for p in layers)

    for code, _, err in ranks(run, tmp_path):
        assert code == 0, err
