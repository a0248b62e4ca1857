"""`onpath doctor` under a launcher: what several processes find together is what one finds alone."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onpath.commands.cli import main
from onpath.commands.doctor import command
from onpath.commands.doctor.command import run_doctor
from onpath.config.whole import Config
from onpath.system.errors import UserError
from tests.forks import TIMEOUT, done_by_two, forked, free_ports

Tiny = Callable[..., Config]
OPTIONS: dict[str, Any] = {
    "teacher__device": "auto",
    "rollout__prompts": 16,
    "rollout__max_new_tokens": 24,
    "parallel__timeout": TIMEOUT,
}
CASES: list[dict[str, Any]] = [
    {"parallel__shard": "layer"},
    {"parallel__shard": "step"},
    {"parallel__shard": "none"},
    {"parallel__shard": "layer", "parallel__hosts": 2},
    {"parallel__shard": "layer", "student__lora_rank": 4},
    {"parallel__shard": "step", "method__name": "topd"},
    {"parallel__shard": "layer", "method__name": "topd", "parallel__teacher": "copy"},
    {"parallel__shard": "layer", "method__name": "opsd", "method__weights": "ema"},
    {"parallel__shard": "layer", "method__name": "opsd", "student__lora_rank": 4},
    {"parallel__shard": "layer", "method__name": "trd", "method__template": "{problem} {attempt}"},
    {"parallel__shard": "step", "method__name": "relay"},
]
MEASURED = ("speed", "memory", "fits", "disk")
"""What a machine and its load decide."""
NUMBERS = {
    "trajectories": ("rollouts", "trajectories", "kept"),
    "accuracy": ("graded", "student_right"),
    "on_policy": ("surprise_minus_entropy_nats", "tokens"),
    "eos": ("finished", "trained_with_stop_token"),
    "teacher_differs": ("reverse_kl_nats", "teacher_logp_nats", "tokens"),
    "gradient": ("norm", "other_teacher_differs_by"),
    "engine_follows": ("moved_nats", "policy_version"),
    "rate": ("moved_nats",),
}


def found_by(config: Config) -> dict[str, Any]:
    """Of each check, by name."""
    return {check["name"]: check for check in run_doctor(config).to_json()["checks"]}


@pytest.fixture
def together(tiny: Tiny, tmp_path: Path) -> Callable[[list[dict[str, Any]]], list[list[dict[str, Any]]]]:
    """What each of two processes finds, in every case."""

    def run(cases: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        configs, ports = [tiny(**{**OPTIONS, **case}) for case in cases], free_ports(len(cases))

        def all_of_them(rank: int) -> None:
            found = []
            for config, port in zip(configs, ports, strict=True):
                os.environ["MASTER_PORT"] = port
                found.append(found_by(config))
            (tmp_path / f"found-{rank}.json").write_text(json.dumps(found))

        done_by_two(all_of_them, tmp_path)
        return [json.loads((tmp_path / f"found-{rank}.json").read_text()) for rank in range(2)]

    return run


def test_two_processes_find_what_one_finds(
    tiny: Tiny, together: Callable[[list[dict[str, Any]]], list[list[dict[str, Any]]]]
) -> None:
    ranks = together(CASES)
    by_one: dict[str, dict[str, Any]] = {}
    for i, case in enumerate(CASES):
        plain = {k: v for k, v in case.items() if not k.startswith("parallel__")}
        if repr(plain) not in by_one:
            by_one[repr(plain)] = found_by(tiny(**{**OPTIONS, **plain}))
        alone = by_one[repr(plain)]
        for found in (ranks[0][i], ranks[1][i]):
            assert found.keys() == alone.keys()
            assert found["restored"]["status"] == "ok", case
            for name, check in found.items():
                expected = alone[name]
                if name in MEASURED:
                    assert check["status"] != "fail", (case, name)
                elif name in ("alignment", "accuracy") and "shards" in check["message"]:
                    assert check["status"] == "skipped"
                    assert case["parallel__shard"] != "none"
                else:
                    assert check["status"] == expected["status"], (case, name, check, expected)
                for number in NUMBERS.get(name, ()):
                    if number in expected["values"]:
                        value = check["values"][number]
                        assert value == pytest.approx(expected["values"][number], rel=1e-3, abs=1e-6), (
                            case,
                            name,
                        )


def test_how_models_are_held_is_said_and_calculated(
    together: Callable[[list[dict[str, Any]]], list[list[dict[str, Any]]]],
) -> None:
    (sharded, whole), others = together([{"parallel__shard": "layer"}, {"parallel__shard": "none"}])
    assert "of 2 processes, in shards by layer" in sharded["models"]["message"]
    assert "of 2 processes, whole in each" in whole["models"]["message"]
    assert "a process as it is here, by layer over 2" in sharded["fits"]["message"]
    assert "as it is here" not in whole["fits"]["message"]
    assert "in each process" in sharded["memory"]["message"]
    for found, other in zip((sharded, whole), others, strict=True):  # the largest of both
        assert found["memory"]["values"]["peak_gib"] == other["memory"]["values"]["peak_gib"]
        assert found["speed"]["values"]["scaled_by"] == other["speed"]["values"]["scaled_by"]


def asked_for(config: Config, tmp_path: Path, *more: str) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of the command in each of two processes."""
    path = tmp_path / "doctor.yaml"
    path.write_text(config.to_yaml())

    def run(rank: int) -> None:
        code = main(["doctor", str(path), *more])
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    return forked(run, tmp_path)


def test_a_fault_is_found_by_all_and_said_by_one(
    tiny: Tiny, tmp_path: Path, model_dirs: dict[str, Path]
) -> None:
    same = tiny(**OPTIONS, parallel__shard="layer", teacher__model=str(model_dirs["student"]))
    (first, said, _), (second, silent, _) = asked_for(same, tmp_path, "--json")
    assert (first, second, silent) == (1, 1, "")
    failed = [check["name"] for check in json.loads(said)["checks"] if check["status"] == "fail"]
    assert failed == ["teacher_differs"]


@pytest.mark.parametrize("where", ["start", "check"])
def test_what_one_process_cannot_do_is_said_by_both(
    tiny: Tiny, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And neither waits for the other's time-out."""
    real: Any = command.assemble if where == "start" else command.scores.engine_logprobs

    def fails(*args: Any) -> Any:
        if int(os.environ["RANK"]) == 1:
            raise UserError("data.train: there is no file here")
        return real(*args)

    target: Any = command if where == "start" else command.scores
    monkeypatch.setattr(target, "assemble" if where == "start" else "engine_logprobs", fails)
    for code, _, said in asked_for(tiny(**OPTIONS, parallel__shard="layer"), tmp_path):
        assert code == 2
        assert "onpath: data.train: there is no file here" in said
