"""Methods that intervene on trajectories, all alike: they train with LoRA and on the gym, resume bit by bit,
give with two processes what one gives, and say who wrote each token."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM

from onpath import config as configuration
from onpath.commands.cli import main
from onpath.config import METHODS
from onpath.records import WRITERS, Trajectory
from onpath.run.log import read_lines
from onpath.system.errors import UserError
from onpath.training import train
from tests.conftest import CHARACTERS, make_tokenizer
from tests.methods.family import ARMS, Tiny, logps_along, options_of, parts_of, prepared
from tests.stored import read_trajectories
from tests.system.test_two_processes import in_ranks

NOT_REPEATED = ("seconds", "topd_seconds")


def test_no_method_is_forgotten() -> None:
    assert {arm["name"] for arm in ARMS.values()} == set(METHODS) - {"opsd", "trd"}


@pytest.mark.parametrize("arm", ARMS)
def test_a_resumed_run_is_the_same_run(arm: str, tiny: Tiny) -> None:
    """With LoRA; every draw of later steps and the method's state are those of the run that went through."""
    options = {**options_of(ARMS[arm]), "student__lora_rank": 4, "optim__schedule": "constant"}
    options |= {"run__save_every": 1, "data__eval": {}, "run__trajectories_every": 1}
    whole = train(tiny(**options, optim__steps=3, run__name="whole"), quiet=True)
    half = train(tiny(**options, optim__steps=2, run__name="half"), quiet=True)
    (half.directory / "config.yaml").unlink()
    shutil.rmtree(half.model)
    rest = train(tiny(**options, optim__steps=3, run__name="half"), quiet=True)
    rows = [
        [{k: v for k, v in row.items() if k not in NOT_REPEATED} for row in read_lines(d / "metrics.jsonl")]
        for d in (whole.directory, rest.directory)
    ]
    assert rows[0] == rows[1]
    weights = [load_file(run.model / "adapter_model.safetensors") for run in (whole, rest)]
    assert all(weights[1][name].equal(tensor) for name, tensor in weights[0].items())
    stored = read_trajectories(whole.directory)
    assert {who for row in stored for who in row["writers"]} <= set(WRITERS)
    for row, at in zip(rows[0], (1, 2, 3), strict=True):
        mine = [r for r in stored if r["step"] == at and r["kept"]]
        counted = [w for r in mine for w, weight in zip(r["writers"], r["weights"], strict=True) if weight]
        assert row["tokens_written_by"] == {who: counted.count(who) for who in WRITERS}


@pytest.mark.parametrize("arm", ARMS)
def test_of_a_teacher_that_is_the_student_nothing_is_learnt(
    arm: str, tiny: Tiny, model_dirs: dict[str, Path]
) -> None:
    """Nor is anything repaired where the two do not differ, however far a greedy window is from a sample."""
    options = {**options_of(ARMS[arm]), "teacher__model": str(model_dirs["student"])}
    options |= {"method__decide": "quantile"} if ARMS[arm]["name"] == "topd" else {}
    run = train(tiny(**options, optim__steps=1, data__eval={}), quiet=True)
    (row,) = read_lines(run.directory / "metrics.jsonl")
    assert abs(row["loss"]) + row["grad_norm"] < 1e-5
    writer = ARMS[arm].get("writer", "student")
    assert {who for who, count in row["tokens_written_by"].items() if count} == {writer}
    assert not row.get("forks")


@pytest.mark.slow
@pytest.mark.parametrize("arm", sorted(ARMS.keys() - {"topd"}))  # TOPD's is among its own tests
def test_two_processes_are_one(arm: str, tiny: Tiny, tmp_path: Path) -> None:
    options = {**options_of(ARMS[arm]), "rollout__prompts": 5, "optim__steps": 2, "data__eval": {}}
    one = train(tiny(**options, run__name="one"), quiet=True).directory
    config = tiny(**options, run__name="two")
    in_ranks(config, tmp_path, processes=2)
    rows = [read_lines(run / "metrics.jsonl") for run in (one, Path(config.run.dir) / "two")]
    for a, b in zip(*rows, strict=True):
        assert set(a) == set(b)
        assert a["tokens_written_by"] == b["tokens_written_by"]
        numbers = [k for k, v in a.items() if isinstance(v, int | float)]
        assert {k: a[k] for k in numbers} == pytest.approx({k: b[k] for k in numbers}, rel=1e-4)


@pytest.mark.parametrize("arm", ARMS)
def test_an_empty_share_is_prepared(arm: str, tiny: Tiny) -> None:
    """A rank that has nothing to do."""
    assert parts_of(tiny, **ARMS[arm]).method.prepare([], step=0).trajectories == []


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Families unlike Qwen's: positions that are learnt; a state in place of keys and values."""
    few = {"vocab_size": len(CHARACTERS), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    few |= {"initializer_range": 0.2}
    gpt2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256, **few}
    mamba = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, **few}
    root, found = tmp_path_factory.mktemp("foreign"), dict[str, dict[str, str]]()
    for name, model, config in (
        ("gpt2", GPT2LMHeadModel, GPT2Config(**gpt2)),
        ("mamba", MambaForCausalLM, MambaConfig(**mamba)),
    ):
        for side, seed in (("student", 0), ("teacher", 1)):
            torch.manual_seed(seed)
            path = root / f"{name}-{side}"
            model(config).save_pretrained(path)
            make_tokenizer().save_pretrained(path)
            found.setdefault(name, {})[f"{side}__model"] = str(path)
    return found


@pytest.mark.parametrize("family", ["gpt2", "mamba"])
@pytest.mark.parametrize("arm", ARMS)
def test_it_runs_on_a_foreign_family(
    arm: str, family: str, foreign: dict[str, dict[str, str]], tiny: Tiny
) -> None:
    """Also where there is no cache to branch from or to relay in; what is stored is what plain passes say."""
    options = {**options_of(ARMS[arm]), **foreign[family], "optim__steps": 1, "data__eval": {}}
    options |= {"rollout__prompts": 5, "rollout__max_new_tokens": 10}
    options |= {"method__keep": "all"} if arm == "bridge" else {}  # few of so few would be better
    if family == "mamba" and ARMS[arm].get("from_start"):
        with pytest.raises(UserError, match="set it to false"):
            train(tiny(**options), quiet=True)
        return
    run = train(tiny(**options, run__trajectories_every=1), quiet=True)
    lines = read_lines(run.directory / "metrics.jsonl")
    assert all(row["grad_norm"] > 0 and row["tokens"] > 0 for row in lines)
    rows = [row for row in read_trajectories(run.directory) if row["step"] == 1 and row["kept"]]
    assert any(row["edit"] != "none" for row in rows), "it did nothing"
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(foreign[family][f"{side}__model"]).eval()
        for side in ("student", "teacher")
    )
    for row in rows[:4]:
        context, response = (tuple(row[name]) for name in ("student_context", "response"))
        t = Trajectory(student_context=context, teacher_context=context, response=response)
        ours, theirs = logps_along(student, t), logps_along(teacher, t)
        kl = (ours.exp() * (ours - theirs)).sum(-1)
        assert row["reverse_kl"] == pytest.approx(kl.tolist(), abs=1e-4)


@pytest.mark.parametrize("arm", ARMS)
def test_it_runs_on_the_gym(arm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = configuration.build(
        {
            "student": {"device": "cpu"},
            "teacher": {"device": "cpu"},
            "data": {"train": "gym:train", "limit": 16, "eval": {}},
            "method": ARMS[arm],
            "rollout": {"prompts": 8},
            "optim": {"steps": 2, "lr": 1e-3},
            "run": {"name": "gym", "dir": str(tmp_path), "trajectories_every": 1, "save_every": 0},
        }
    )
    run = train(config, quiet=True)
    rows = read_lines(run.directory / "metrics.jsonl")
    assert all(row["grad_norm"] > 0 and row["tokens"] > 0 for row in rows)
    stored = read_trajectories(run.directory)
    assert {row["edit"] for row in stored} - {"none"}, "it did nothing"
    assert all(isinstance(json.loads(row["detail"]), dict) for row in stored)
    assert main(["inspect", str(run.directory), "--only", "edited", "--limit", "99"]) == 0
    shown = capsys.readouterr().out
    assert "edit" in shown
    others = any(who != "student" for row in stored for who in row["writers"])
    assert ("written by" in shown) is others
    assert main(["report", str(run.directory)]) == 0


def test_who_wrote_what_of_older_methods(tiny: Tiny) -> None:
    by_teacher = prepared(parts_of(tiny, name="opd", writer="teacher", divergence="reverse_kl"))
    assert all(set(t.written_by) == {"teacher"} for t in by_teacher.trajectories)
    rewrite = {"name": "trd", "template": "{problem} {attempt}", "gate": False}
    assert all(set(t.written_by) == {"teacher"} for t in prepared(parts_of(tiny, **rewrite)).trajectories)
    assert all(set(t.written_by) == {"student"} for t in prepared(parts_of(tiny)).trajectories)
