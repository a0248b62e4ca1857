"""`onpath inspect --probe` under a launcher: what several processes measure together is what one measures."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onpath.commands.cli import main
from onpath.commands.probes.command import PROBES, run_named
from onpath.config.whole import Config
from onpath.system.errors import UserError
from tests.forks import TIMEOUT, done_by_two, free_ports

Tiny = Callable[..., Config]
NUMBERS = {"prefix-failure": {"continuations": 2, "every": 8}}
SHARDS = {"prefix-failure": "layer", "divergence": "step", "meter": "layer", "local-correction": "none"}


def written(tiny: Tiny, directory: Path, **options: Any) -> Path:
    """A config of the gym's pair, as a file in a directory of its own."""
    config = tiny(
        method__name="topd",
        method__window=4,
        rollout__max_new_tokens=16,
        parallel__timeout=TIMEOUT,
        **options,
    )
    run = config.run.model_copy(update={"dir": str(directory / "runs")})
    directory.mkdir(parents=True)
    path = directory / "config.yaml"
    path.write_text(config.model_copy(update={"run": run}).to_yaml())
    return path


def found(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A probe's rows and summary."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return rows, json.loads(path.with_suffix(".json").read_text())


def alike(mine: Any, one: Any) -> bool:
    """Whether all that stands in one stands in the other, numbers to four digits."""
    if isinstance(one, dict):
        assert mine.keys() == one.keys()
        return all(alike(mine[key], one[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(mine) == len(one) and all(map(alike, mine, one))
    return bool(mine == (pytest.approx(one, rel=1e-4, abs=1e-5) if isinstance(one, float) else one))


def test_two_processes_measure_what_one_measures(tiny: Tiny, tmp_path: Path) -> None:
    alone, configs, ports = {}, {}, free_ports(len(PROBES))
    for name in PROBES:
        one = written(tiny, tmp_path / "alone" / name)
        alone[name] = found(run_named(name, one, rollouts=4, **NUMBERS.get(name, {})))
        configs[name] = written(tiny, tmp_path / "two" / name, parallel__shard=SHARDS[name])

    def measure(rank: int) -> None:
        for (name, config), port in zip(configs.items(), ports, strict=True):
            os.environ["MASTER_PORT"] = port
            run_named(name, config, rollouts=4, **NUMBERS.get(name, {}))

    done_by_two(measure, tmp_path)
    for name, config in configs.items():
        (path,) = (config.parent / "runs").glob("*/probes/*.jsonl")
        assert alike(found(path), alone[name]), name


def test_copies_of_a_sharded_student_are_not_trained(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = written(tiny, tmp_path / "here", parallel__shard="layer")
    with pytest.raises(
        UserError, match=r"parallel\.shard: local-correction trains copies .*; set it to none"
    ):
        run_named("local-correction", config)


def test_what_only_shows_files_is_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["inspect", str(tmp_path)]) == 2
    assert "onpath inspect is one process" in capsys.readouterr().err
