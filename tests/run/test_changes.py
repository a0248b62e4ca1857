"""A run that goes on with other options: what may change, what is refused, what is recorded."""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from safetensors.torch import load_file, save_file

import onpath.training as training
from onpath.commands.cli import main
from onpath.config import METHODS, Config, build, load
from onpath.config.changes import changes
from onpath.run.log import read_lines
from onpath.run.meter import Meter
from onpath.run.parts import Parts
from onpath.system.errors import UserError, guarded
from onpath.system.signals import stop_requests
from onpath.training import train
from tests.forks import begun, ended

Tiny = Callable[..., Config]
BEGUN: dict[str, Any] = {
    "optim__steps": 4,
    "run__save_every": 2,
    "run__trajectories_every": 2,
    "data__eval": {},
}

NEUTRAL: dict[str, Any] = {
    "run.save_every": 1,
    "run.save_in_background": False,
    "run.keep": 5,
    "run.trajectories_every": 1,
    "run.trackers": ["tensorboard"],
    "eval.every": 1,
    "eval.start": True,
    "data.skip_bad": True,
    "student.gradient_checkpointing": True,
    "student.lora_merge": True,
    "teacher.url": None,
    "teacher.timeout": 5.0,
    "teacher.patience": 1.0,
    "teacher.concurrency": 3,
    "teacher.cache_gb": 5.0,
    "rollout.url": None,
    "rollout.timeout": 5.0,
    "rollout.patience": 1.0,
    "rollout.concurrency": 3,
    "rollout.max_staleness": 4,
    "parallel.timeout": 60.0,
    "method.cosine_every": 1,
}
"""Weights come out bit by bit as they would have. (A url needs a server: its mark is looked at below.)"""
ROUNDING: dict[str, Any] = {
    "optim.micro_batch_tokens": 64,
    "rollout.batch_tokens": 64,
    "run.threads": 1,
    "parallel.shard": "layer",
    "parallel.hosts": 1,
    "parallel.teacher": "copy",
    "parallel.balance": False,
}
"""Sums in another order; those of `parallel` among several processes (tests/system/test_sharded_runs.py)."""


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    return {}


class Stopped(BaseException):
    pass


def stop_before(step: int, monkeypatch: pytest.MonkeyPatch, config: Config, *, flag: bool = False) -> Path:
    """A run that is killed when `step` steps are done; flag: it goes on with what has changed."""
    real = training.one_step

    def until(parts: Any, optimizer: Any, at: int) -> Any:
        if at == step:
            raise Stopped
        return real(parts, optimizer, at)

    with monkeypatch.context() as patch:
        patch.setattr(training, "one_step", until)
        with pytest.raises(Stopped):
            train(config, resume_with_changes=flag, quiet=True)
    return Path(config.run.dir) / config.run.name


@pytest.fixture
def halfway(
    tiny: Tiny,
    kept: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[Callable[..., Config], dict[str, torch.Tensor]]:
    """A config of a run killed after step 3 of 4, checkpoint at 2; and the weights of one that was not."""
    if not kept:
        root = tmp_path_factory.mktemp("halfway")
        whole = train(tiny(**BEGUN, run__name="whole", run__dir=str(root)), quiet=True)
        kept["whole"] = load_file(whole.model / "model.safetensors")
        kept["killed"] = stop_before(3, monkeypatch, tiny(**BEGUN, run__dir=str(root)))

    def config(**changed: Any) -> Config:
        return tiny(**{**BEGUN, **changed})

    run = config().run
    shutil.copytree(kept["killed"], Path(run.dir) / run.name)
    return config, kept["whole"]


def option(dotted: str) -> str:
    return dotted.replace(".", "__")


def changed_lines(directory: Path) -> list[dict[str, Any]]:
    """Without the directory's own name: each test has its own copy."""
    return [line for line in read_lines(directory / "changes.jsonl") if line["key"] != "run.dir"]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model" / "model.safetensors")


@pytest.mark.parametrize("key", [k for k, v in NEUTRAL.items() if v is not None])
def test_what_claims_to_be_neutral_is(key: str, halfway: Any, data_file: Path) -> None:
    config, whole = halfway
    if key == "run.trackers":
        pytest.importorskip("tensorboard")
    changed = config(**{option(key): NEUTRAL[key]})
    directory = train(changed, quiet=True).directory
    found = weights(directory)
    assert all(torch.equal(found[name], value) for name, value in whole.items())
    (line,) = changed_lines(directory)
    assert (line["step"], line["key"], line["after"], line["rule"]) == (2, key, NEUTRAL[key], "neutral")
    assert load(directory / "config.yaml") == changed


@pytest.mark.parametrize("key", ROUNDING)
def test_other_batches_and_threads_change_no_more_than_rounding(key: str, halfway: Any) -> None:
    config, whole = halfway
    directory = train(config(**{option(key): ROUNDING[key]}), quiet=True).directory
    found = weights(directory)
    assert all(torch.allclose(found[name], value, atol=1e-5) for name, value in whole.items())
    assert [line["rule"] for line in changed_lines(directory)] == ["rounding"]
    assert [row["step"] for row in read_lines(directory / "metrics.jsonl")] == [1, 2, 3, 4]


def test_what_changes_the_masks_of_dropout_is_no_rounding() -> None:
    before = build({"student": {"dropout": True}})
    for key, rule in {
        "optim.micro_batch_tokens": "asked",
        "parallel.balance": "asked",
        "rollout.batch_tokens": "rounding",
    }.items():
        section, _, name = key.partition(".")
        given = {section: {name: ROUNDING[key]}}
        (found,) = changes(before.model_dump(mode="json"), build({"student": {"dropout": True}, **given}))
        assert (found.key, found.rule) == (key, rule)
        (found,) = changes(build({}).model_dump(mode="json"), build(given))
        assert found.rule == "rounding"


def test_what_nothing_reads_may_be_taken_out() -> None:
    """As the warning says that names it; what it goes with is no such thing."""
    teachers = {"a": {"model": "m", "cache_dtype": "float32"}, "default": {"model": "n"}}
    for given, key in (
        ({"method": {"support_k": 9}}, "method.support_k"),
        ({"student": {"lora_alpha": 3.0}}, "student.lora_alpha"),
        (
            {"teachers": teachers, "data": {"train": "rows.jsonl", "teacher_column": "of"}},
            "teachers.a.cache_dtype",
        ),
        ({"method": {"name": "opsd"}, "teacher": {"model": "m"}}, "teacher.model"),
    ):
        without = {section: dict(options) for section, options in given.items()}
        if key == "teachers.a.cache_dtype":
            without["teachers"] = {**teachers, "a": {"model": "m"}}
        else:
            del without[key.split(".")[0]][key.split(".")[1]]
        for before, after in ((given, without), (without, given)):
            (found,) = changes(build(before).model_dump(mode="json"), build(after))
            assert (found.key, found.rule) == (key, "neutral")
    read = {"student": {"lora_alpha": 3.0, "lora_rank": 4}}
    for after in ({}, {"student": {"lora_rank": 4}}, {"student": {"lora_alpha": 3.0}}):
        found = changes(build(read).model_dump(mode="json"), build(after))
        assert not all(change.allowed for change in found)


def options() -> list[str]:
    found = [
        f"{section}.{name}"
        for section, info in Config.model_fields.items()
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)
        for name in info.annotation.model_fields
        if section != "method"
    ]
    return found + sorted({f"method.{name}" for options in METHODS.values() for name in options.model_fields})


ALLOWED = {*NEUTRAL, *ROUNDING, "run.name", "run.dir", "run.keep_best", "run.stop_after"}
"""The last two: tests/run/test_best.py."""
OF_METHODS = {
    "method.gate": "neutral",
    "method.gate_prompts": "neutral",
    "method.gate_max_harm": "neutral",
    "method.record_above": "neutral",
    "method.diagnose_every": "rounding",
    "method.reuse_cache": "rounding",
}


@pytest.mark.parametrize("key", options())
def test_every_option_in_turn(key: str) -> None:
    """Whatever is not in the lists above is refused."""
    section, _, name = key.partition(".")
    owners = (
        {n: m for n, m in METHODS.items() if name in m.model_fields} if section == "method" else {"opd": None}
    )
    for method in owners:
        config = build({"method": {"name": method}})
        before = config.model_dump(mode="json")
        before[section][name] = [before[section][name], None]  # a value of no option
        rules = {c.key: c.rule for c in changes(before, config)}
        expected = (
            "rounding" if key in ROUNDING else "neutral" if key in ALLOWED else OF_METHODS.get(key, "asked")
        )
        assert rules == {key: expected}


def test_more_steps_are_allowed_and_fewer_are_not() -> None:
    config = build({"optim": {"steps": 10}})
    for steps, rule in ((4, "longer"), (20, "asked")):
        before = config.model_dump(mode="json")
        before["optim"]["steps"] = steps
        assert [c.rule for c in changes(before, config)] == [rule]


def test_another_spelling_of_a_path_is_no_change(halfway: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config, whole = halfway
    given = config()
    monkeypatch.chdir(Path(given.run.dir).parent)
    changed = config(
        run__dir="./runs",
        student__model=os.path.relpath(given.student.model),
        data__train=f"{Path(given.data.train).parent}/./{Path(given.data.train).name}",
    )
    directory = train(changed, quiet=True).directory
    assert directory == Path("runs/tiny")
    assert all(torch.equal(weights(directory)[name], value) for name, value in whole.items())
    assert [line["key"] for line in read_lines(directory / "changes.jsonl")] == ["run.dir"]


@pytest.mark.parametrize(("schedule", "warmup"), [("cosine", 0.0), ("constant", 0.0), ("constant", 0.9)])
def test_a_run_is_made_longer(
    schedule: str, warmup: float, tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also one that is finished: with a constant rate it ends as if it had been longer from the start."""
    level = schedule == "constant" and not warmup
    options = {
        "optim__schedule": schedule,
        "optim__warmup": warmup,
        "data__eval": {},
        "run__trajectories_every": 0,
    }
    first = train(tiny(**options, optim__steps=2), quiet=True)
    short = weights(first.directory)
    longer = tiny(**options, optim__steps=4)
    result = train(longer)
    said = capsys.readouterr().err
    assert "optim.steps is 4 from step 3 on, it was 2" in said
    jump = (
        f"optim.{'warmup' if warmup else 'schedule cosine'} is stretched over all of them: the learning rate"
    )
    assert (jump in said) != level
    assert ("learning rate" in said) != level
    assert (result.steps, result.trained) == (4, True)
    whole = train(tiny(**options, optim__steps=4, run__name="whole"), quiet=True)
    same = all(torch.equal(v, weights(result.directory)[k]) for k, v in weights(whole.directory).items())
    assert same == level
    old = load_file(result.directory / "model_step_2" / "model.safetensors")
    assert all(torch.equal(old[k], v) for k, v in short.items()), "the shorter run's model stays"
    (line,) = read_lines(result.directory / "changes.jsonl")
    assert line == {"step": 2, "key": "optim.steps", "before": 2, "after": 4, "rule": "longer"}
    again = train(longer)
    assert not again.trained
    assert "was finished before" in capsys.readouterr().err


@pytest.mark.parametrize("left", [None, "xx"])
def test_a_run_whose_lines_are_lost_is_made_longer_from_its_checkpoint(tiny: Tiny, left: str | None) -> None:
    options = {"optim__schedule": "constant", "data__eval": {}, "run__trajectories_every": 0}
    first = train(tiny(**options, optim__steps=2), quiet=True)
    (first.directory / "metrics.jsonl").unlink()
    if left is not None:
        (first.directory / "metrics.jsonl").write_text(left)
    result = train(tiny(**options, optim__steps=3), quiet=True)
    assert (result.steps, result.trained) == (3, True)
    whole = train(tiny(**options, optim__steps=3, run__name="whole"), quiet=True)
    assert all(torch.equal(v, weights(result.directory)[k]) for k, v in weights(whole.directory).items())


def test_a_run_of_which_nothing_says_where_it_ended_is_not_made_longer(tiny: Tiny) -> None:
    first = train(tiny(optim__steps=2, data__eval={}), quiet=True)
    (first.directory / "metrics.jsonl").unlink()
    shutil.rmtree(first.directory / "checkpoints")
    assert not train(tiny(optim__steps=2, data__eval={}), quiet=True).trained
    with pytest.raises(UserError, match=r"metrics\.jsonl: its lines are lost, and no checkpoint"):
        train(tiny(optim__steps=3, data__eval={}), quiet=True)


def test_a_run_that_is_ended_where_it_stopped_is_evaluated_there(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"optim__schedule": "cosine", "run__save_every": 2}
    real = training.one_step

    def stopped(parts: Parts, optimizer: torch.optim.Optimizer, step: int) -> Meter:
        if step == 3:
            raise KeyboardInterrupt  # as if killed: a failing run would save its third step
        return real(parts, optimizer, step)

    with monkeypatch.context() as patch:
        patch.setattr(training, "one_step", stopped)
        with pytest.raises(KeyboardInterrupt):
            train(tiny(**options, optim__steps=5), quiet=True)
    capsys.readouterr()
    result = train(tiny(**options, optim__steps=2), resume_with_changes=True)
    said = capsys.readouterr().err
    assert "all 2 steps are done" in said
    assert "optim.steps is 2, as many as are done; it was 5" in said
    assert "steps 3 to 2" not in said
    assert [row["step"] for row in result.evaluations] == [2]
    assert sorted(p.name for p in (result.directory / "evals").iterdir()) == [
        "test_step_000002.jsonl",
        "test_step_000002.parquet",
    ]


def test_what_is_asked_for_is_recorded(
    halfway: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, whole = halfway
    changed = config(optim__lr=5e-3, run__save_every=1)
    file = tmp_path / "changed.yaml"
    file.write_text(changed.to_yaml())
    assert main(["train", str(file), "--quiet"]) == 2
    said = capsys.readouterr().err
    assert "(optim.lr: 0.001 there, 0.005 here)" in said
    assert "choose another run.name or remove it" in said
    assert "--resume-with-changes" in said
    directory = Path(changed.run.dir) / changed.run.name
    assert not (directory / "changes.jsonl").exists()
    assert main(["train", str(file), "--quiet", "--resume-with-changes"]) == 0
    assert {(line["key"], line["rule"]) for line in changed_lines(directory)} == {
        ("optim.lr", "asked"),
        ("run.save_every", "neutral"),
    }
    assert not all(torch.equal(weights(directory)[name], value) for name, value in whole.items())
    assert train(changed, quiet=True).trained is False, "it is this config's run now"


def test_done_steps_are_not_undone(halfway: Any) -> None:
    config, _ = halfway
    with pytest.raises(UserError, match=r"has done 2 steps already; set optim.steps to more"):
        train(config(optim__steps=1), resume_with_changes=True, quiet=True)


# Content.


def fewer_rows(root: Path) -> None:
    path = root / "train.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:20]))


def another_answer(root: Path) -> None:
    path = root / "train.jsonl"
    path.write_text(path.read_text().replace('"answer": "8"', '"answer": "9"'))


def other_evaluation(root: Path) -> None:
    path = root / "eval.jsonl"
    path.write_text(path.read_text().replace('"answer": "8"', '"answer": "9"'))


def one_weight(model: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        path = root / model / "model.safetensors"
        tensors = load_file(path)
        tensors["model.norm.weight"][0] += 1e-3
        save_file(tensors, path, metadata={"format": "pt"})

    return change


def another_template(root: Path) -> None:
    path = root / "student" / "chat_template.jinja"
    path.write_text(path.read_text() + " ")


CONTENT: dict[str, tuple[Callable[[Path], None], str]] = {
    "fewer rows": (fewer_rows, "data.train"),
    "another answer": (another_answer, "data.train"),
    "evaluation set": (other_evaluation, "data.eval.test"),
    "student": (one_weight("student"), "student.model"),
    "teacher": (one_weight("teacher"), "teacher.model"),
    "chat template": (another_template, "student.model"),
}


def of_copies(tiny: Tiny, root: Path, **options: Any) -> Config:
    """A config whose models and data lie in a directory of their own, where `CONTENT` changes them."""
    plain = tiny()
    for side in ("student", "teacher"):
        shutil.copytree(getattr(plain, side).model, root / side)
    for file in ("train.jsonl", "eval.jsonl"):
        shutil.copy(plain.data.train, root / file)
    return tiny(
        student__model=str(root / "student"),
        teacher__model=str(root / "teacher"),
        data__train=str(root / "train.jsonl"),
        data__eval={"test": str(root / "eval.jsonl")},
        **options,
    )


@pytest.mark.parametrize(("name", "rank"), [*((name, 0) for name in CONTENT), ("student", 2)])
def test_other_content_under_the_same_path_is_noticed(
    name: str, rank: int, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, key = CONTENT[name]
    config = of_copies(tiny, tmp_path, student__lora_rank=rank, run__save_every=1)
    directory = stop_before(2, monkeypatch, config)
    before = {p: p.read_bytes() for p in directory.rglob("*") if p.is_file() and "environment" not in p.name}
    change(tmp_path)
    with pytest.raises(UserError, match=f"was begun with another content of {key} than .* has now; bring"):
        train(config, quiet=True)
    assert {p: p.read_bytes() for p in before} == before, "nothing is lost"
    result = train(config, resume_with_changes=True, quiet=True)
    (line,) = read_lines(result.directory / "changes.jsonl")
    assert (line["step"], line["key"], line["rule"]) == (2, key, "asked")


# A refused start.


def test_the_gates_advice_can_be_followed(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {
        "method__name": "trd",
        "method__template": "{problem} {attempt}",
        "data__eval": {},
        "optim__steps": 1,
    }
    monkeypatch.setattr("onpath.methods.trd.gate.refusal", lambda *_, **__: "it does harm")
    with pytest.raises(UserError, match=r"set method\.gate: false"):
        train(tiny(**options), quiet=True)
    directory = train(tiny(**options, method__gate=False), quiet=True).directory
    assert not (directory / "changes.jsonl").exists(), "nothing had begun"
    assert not (directory / "refine.json").exists(), "of another config"


# Processes.


def test_each_process_has_its_line_and_none_is_replaced(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(data__eval={}, run__save_every=1)
    directory = stop_before(1, monkeypatch, config)
    first = (directory / "environment.json").read_bytes()
    for count in (2, 3):
        train(config, quiet=True)
        assert (directory / "environment.json").read_bytes() == first
        lines = [json.loads(x) for x in (directory / "environment.jsonl").read_text().splitlines()]
        assert len(lines) == count
        assert lines[0] == {"started": lines[0]["started"], **json.loads(first)}
        assert all(line["packages"]["torch"] and line["started"] for line in lines)


@pytest.mark.parametrize("name", list(CONTENT))
def test_a_finished_run_is_not_given_for_one_of_another_content(
    name: str, tiny: Tiny, tmp_path: Path
) -> None:
    """It would be a model of other data, or from another start, and nobody would know."""
    change, key = CONTENT[name]
    config = of_copies(tiny, tmp_path, optim__steps=1)
    model = train(config, quiet=True).model
    before = weights(model.parent)
    change(tmp_path)
    if key.startswith("data.eval"):  # what it is asked is no part of it
        assert not train(config, quiet=True).trained
        return
    with pytest.raises(UserError, match=f"was begun with another content of {key} than .* has now; bring"):
        train(config, quiet=True)
    assert not train(config, quiet=True, resume_with_changes=True).trained
    assert all(torch.equal(v, before[k]) for k, v in weights(model.parent).items())
    for damaged in (model.parent / "checkpoints").rglob("inputs.json"):
        damaged.write_text("{")
    assert not train(config, quiet=True).trained, "nobody knows what it was made of"


def test_a_finished_run_says_so(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(tiny(data__eval={}).to_yaml())
    assert main(["train", str(file)]) == 0
    assert "was finished before" not in capsys.readouterr().err
    for flags in ([], ["--quiet"]):
        assert main(["train", str(file), *flags]) == 0
        said = capsys.readouterr()
        assert said.err.count("was finished before: nothing is trained") == 1
        assert said.out.startswith("model: ")


@pytest.fixture
def as_in_a_terminal() -> Iterator[None]:
    """A shell's background job, and nohup, ignore some signals, which stay so."""
    usual: dict[int, Any] = {
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
        signal.SIGINT: signal.default_int_handler,
    }
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("name", "code", "sentence"),
    [("SIGTERM", 0, "SIGTERM"), ("SIGHUP", 0, "SIGHUP"), ("SIGINT", 130, "interrupted")],
)
def test_asked_to_stop_it_saves_the_step_that_runs(
    name: str,
    code: int,
    sentence: str,
    tiny: Tiny,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    as_in_a_terminal: None,
) -> None:
    number = getattr(signal, name)
    before = signal.getsignal(number)
    config = tiny(optim__steps=4, data__eval={})
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    real = training.one_step

    def hit(parts: Any, optimizer: Any, step: int) -> Any:
        if step == 1:
            os.kill(os.getpid(), number)
        return real(parts, optimizer, step)

    with monkeypatch.context() as patch:
        patch.setattr(training, "one_step", hit)
        assert main(["train", str(file), "--quiet"]) == code
    said = capfd.readouterr()
    told = [line for line in said.err.splitlines() if line.startswith("onpath: ")]
    assert told[-1] == f"onpath: {sentence}: step 2 of 4 is saved; the same command goes on"
    at_once = "onpath: stopping after this step, which will be saved; Ctrl-C again stops at once"
    assert told[:-1] == ([at_once] if name == "SIGINT" else [])
    assert said.out == ""
    directory = Path(config.run.dir) / config.run.name
    assert [p.name for p in (directory / "checkpoints").iterdir()] == ["step_2"]
    assert not (directory / "model").exists()
    assert signal.getsignal(number) == before
    train(config, quiet=True)
    whole = train(tiny(optim__steps=4, data__eval={}, run__name="whole"), quiet=True)
    assert all(torch.equal(v, weights(directory)[k]) for k, v in weights(whole.directory).items())


def test_a_second_signal_kills_as_ever(as_in_a_terminal: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onpath.system.signals._TOGETHER", 0.0)
    with stop_requests() as asked:
        assert not asked
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked.name == "SIGTERM"
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    with monkeypatch.context() as patch, stop_requests() as asked:
        patch.setenv("TORCHELASTIC_RUN_ID", "none")  # Slurm signals it and its workers, and it hands it on
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert asked.name == "SIGTERM"
    with stop_requests() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)  # torchrun sends it after a Ctrl-C: the step is still finished
        assert asked.name == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_process_and_its_group_are_asked_once(
    name: str, as_in_a_terminal: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`timeout`, a terminal and batch systems signal both; only what comes later is a second time."""
    monkeypatch.setattr("onpath.system.signals._TOGETHER", 3.0)
    number = getattr(signal, name)
    says, hears = os.pipe()
    child = os.fork()
    if child == 0:
        with stop_requests() as asked:
            os.write(hears, b"ready")
            while not asked:  # a signal ends the sleep, and its handler the wait
                time.sleep(60)
        os._exit(7)
    os.read(says, 5)
    for _ in range(3):
        os.kill(child, number)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    os.close(says)
    os.close(hears)


def test_an_interrupt_that_comes_out_as_another_error_is_one(
    as_in_a_terminal: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """As from the middle of transformers' imports."""

    def imports() -> int:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            raise ModuleNotFoundError("Could not import module 'BloomPreTrainedModel'") from None
        return 0

    assert guarded(imports) == 130
    assert capsys.readouterr().err == "onpath: interrupted; start the same command again to go on\n"
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_python_code_is_interrupted_as_ever(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, as_in_a_terminal: None
) -> None:
    """After the step, and with what is saved; somebody's own handler is left alone."""
    config, real, own = tiny(optim__steps=3, data__eval={}), training.one_step, list[int]()

    def hit(*given: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return real(*given)

    monkeypatch.setattr(training, "one_step", hit)
    with pytest.raises(KeyboardInterrupt, match="step 1 of 3 is saved"):
        train(config, quiet=True)
    before = signal.signal(signal.SIGINT, lambda number, frame: own.append(number))
    try:
        train(config, quiet=True)
    finally:
        signal.signal(signal.SIGINT, before)
    assert own == [signal.SIGINT] * 2


def test_nohup_stays_nohup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_requests() as asked:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not asked
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("pipe", ["stderr", "both"])
def test_a_closed_pipe_does_not_end_a_run(pipe: str, tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(data__eval={}, optim__steps=2)
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    read, write = os.pipe()
    os.close(read)

    def run() -> int:
        os.dup2(write, 2)
        if pipe == "both":
            os.dup2(write, 1)
        code = main(["train", str(file)])
        for stream in (sys.stdout, sys.stderr):
            stream.flush()  # as Python does at its end, with exit code 120 if it cannot
        return code

    assert ended(begun(run)) == 0
    os.close(write)
    assert (Path(config.run.dir) / config.run.name / "model").is_dir()


def test_a_merged_model_asked_for_when_all_is_done(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is written then; the sentence says what does it."""
    options = {**BEGUN, "student__lora_rank": 4}
    run = train(tiny(**options), quiet=True).directory
    capsys.readouterr()
    for merge in (False, True):
        train(tiny(**options, student__lora_merge=merge))
        said = capsys.readouterr().err
        assert "was finished before: nothing is trained" in said
        assert (f"onpath export {run} OUT merges it" in said) == merge
    train(tiny(**options, student__lora_merge=True, run__name="merged"), quiet=True)
    train(tiny(**options, student__lora_merge=True, run__name="merged"))
    assert "onpath export" not in capsys.readouterr().err


def test_another_method_is_told_before_what_follows_from_it(tiny: Tiny) -> None:
    """Its own options have other defaults, which nobody has set."""
    options = {"data__eval": {}, "optim__steps": 1}
    train(tiny(**options), quiet=True)
    with pytest.raises(UserError, match=r"another config \(method\.name: 'opd' there, 'topd' here\);"):
        train(tiny(**options, method__name="topd"), quiet=True)
