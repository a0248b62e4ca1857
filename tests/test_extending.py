"""docs/extending.md, run as a stranger would: files outside the package, named in YAML or passed."""

import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict

import onpath
from onpath.commands.cli import main
from onpath.config import METHODS, Config, build, load
from onpath.config.build import named_rows, with_own
from onpath.config.sections import OF_A_STEP, OF_A_TRAJECTORY, Data, Optim
from onpath.engines.base import Engine
from onpath.methods import Method, MethodOptions, Prepared, own_response
from onpath.run.contents import differing
from onpath.system import code
from onpath.system.errors import UserError
from tests.stored import read_trajectories

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
EXAMPLES = dict(re.findall(r"```\w+ file=(\S+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S))
Tiny = Callable[..., Config]


@pytest.fixture(autouse=True)
def _nothing_is_allowed_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test is a process of its own: nothing may run, and nothing was loaded."""
    monkeypatch.setattr(code, "_process_wide", False)
    nothing_was_loaded(monkeypatch)


def nothing_was_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in another process."""
    monkeypatch.setattr(code, "_loaded", {})
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in [name for name in sys.modules if name.startswith("onpath_own_")]:
        monkeypatch.delitem(sys.modules, name)


def with_another_source(text: str) -> str:
    """An example whose functions do the same by other words."""
    return re.sub(r"^( +)return ", r"\1assert True\n\1return ", text, flags=re.M)


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stranger's directory with the page's files."""
    directory = tmp_path / "mine"
    directory.mkdir()
    for name, text in EXAMPLES.items():
        (directory / name).write_text(text)
    monkeypatch.chdir(directory)
    return directory


def config_of(tiny: Tiny, example: str, directory: Path, **more: Any) -> Path:
    """The page's YAML over the tiny models."""
    tree = yaml.safe_load(tiny(run__name=Path(example).stem, **more).to_yaml())
    for section, options in yaml.safe_load(EXAMPLES[example]).items():
        if section == "rewards":
            tree[section] = options
        else:
            tree[section] = options if section == "method" else {**tree[section], **options}
    path = directory / f"full-{example}"
    path.write_text(yaml.safe_dump(tree))
    return path


def rows_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def mine(name: str) -> Any:
    """The page's object, loaded by a stranger's own import."""
    spec = importlib.util.spec_from_file_location(f"onpath_own_{name}", Path(f"{name}.py").resolve())
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_examples_are_short() -> None:
    for name in ("longer.py", "hellinger.py", "lastword.py", "brevity.py"):
        assert len(EXAMPLES[name].splitlines()) <= 30, name


YAMLS = [name for name in EXAMPLES if name.endswith(".yaml")]


@pytest.mark.parametrize("example", YAMLS)
def test_nothing_runs_until_somebody_says_so(
    example: str, tiny: Tiny, outside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, python = config_of(tiny, example, outside), outside / f"{Path(example).stem}.py"
    python.write_text(f"open('ran', 'w').close()\n{python.read_text()}")
    for command in ("train", "doctor"):
        assert main([command, str(path)]) in (1, 2)
        said = capsys.readouterr()
        assert "--allow-code" in said.err + said.out
    assert not (outside / "ran").exists()
    assert main(["train", str(path), "--quiet", "--allow-code"]) == 0
    assert (outside / "ran").exists()


def test_a_method_works_everywhere(
    tiny: Tiny, outside: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    more = {"rollout__max_new_tokens": 40, "rollout__prompts": 12, "run__trajectories_every": 1}
    path = config_of(tiny, "longer.yaml", outside, **more)
    config = load(path, allow_code=True)
    run = Path(config.run.dir) / "longer"
    assert main(["train", str(path), "--quiet", "--allow-code"]) == 0
    stored = pq.read_table(run / "trajectories" / "step_000001.parquet").to_pylist()
    assert sum(row["kept"] for row in stored) == len(stored) // 2
    shortest_kept = min(len(r["response"]) for r in stored if r["kept"])
    assert all(len(r["response"]) <= shortest_kept for r in stored if not r["kept"])
    assert {r["reason"] for r in stored if not r["kept"]} == {"short"}
    assert rows_of(run)[0]["kept_length"] > rows_of(run)[0]["mean_length"]
    written = yaml.safe_load((run / "config.yaml").read_text())
    assert written["method"]["name"] == "longer.py:Longer"
    assert written["method"]["share"] == 0.5
    capsys.readouterr()
    for command in (["report", str(run)], ["inspect", str(run), "--only", "dropped"]):
        assert main(command) == 0
    assert "short" in capsys.readouterr().out
    assert main(["config", str(path), "--allow-code", "--options"]) == 0
    assert "Share of the rollouts that are kept." in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["train", str(path), "--allow-code", "--help"])
    assert "Share of the rollouts that are kept." in capsys.readouterr().out
    assert main(["config", str(path), "--allow-code", "--method.share", "0.25"]) == 0
    assert "share: 0.25" in capsys.readouterr().out
    assert main(["train", str(path), "--quiet", "--allow-code", "--method.share", "0.25"]) == 2
    assert "method.share: 0.5 there, 0.25 here" in capsys.readouterr().err, "the resume check knows it"
    assert main(["train", str(path), "--allow-code", "--method.shar", "0.25"]) == 2
    assert "unknown key method.shar; did you mean share?" in capsys.readouterr().err
    assert main(["doctor", str(path), "--allow-code"]) in (0, 1)
    said = capsys.readouterr().out
    assert "8 of 8" not in said
    assert re.search(r"trajectories +\d+ of \d+ trajectories", said)


def test_a_method_with_two_writers(tiny: Tiny, outside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The teacher's prefix is context, the student's words are trained on, and a restart goes on the same."""
    assert len(EXAMPLES["replay.py"].splitlines()) <= 60
    more = {"rollout__prompts": 12, "run__trajectories_every": 1, "optim__steps": 2, "run__save_every": 1}
    path = config_of(tiny, "replay.yaml", outside, **more)
    run = Path(load(path, allow_code=True).run.dir) / "replay"
    assert main(["train", str(path), "--quiet", "--allow-code"]) == 0
    whole = rows_of(run)
    stored = pq.read_table(run / "trajectories" / "step_000002.parquet").to_pylist()
    assert {who for row in stored for who in row["writers"]} == {"student", "teacher"}
    for row in stored:
        assert row["writers"] == sorted(row["writers"], reverse=True), "first the teacher, then the student"
        assert row["weights"] == [float(who == "student") for who in row["writers"]]
    assert whole[0]["teacher_tokens_generated"] > 0
    assert whole[1]["tokens"] == sum(row["writers"].count("student") for row in stored)
    for last in ("checkpoints/step_2", "model"):
        shutil.rmtree(run / last)
    assert main(["train", str(path), "--quiet", "--allow-code"]) == 0
    again = [{k: v for k, v in row.items() if k != "seconds"} for row in rows_of(run)]
    cost = "teacher_tokens_generated"  # a restart has the teacher write once more
    assert [{**row, cost: 0} for row in again] == [
        {**{k: v for k, v in row.items() if k != "seconds"}, cost: 0} for row in whole
    ]
    capsys.readouterr()
    assert main(["inspect", str(run)]) == 0
    assert "written by teacher 0" in capsys.readouterr().out


def test_a_method_in_a_study(
    tiny: Tiny, outside: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In processes of their own, as `onpath study` starts them."""
    base = yaml.safe_load(tiny(eval__start=False).to_yaml())
    del base["rewards"]
    study = {
        "name": "strangers",
        "dir": str(outside / "studies"),
        "base": base,
        "arms": {"opd": {}, "longer": {"method": {"name": "longer.py:Longer", "share": 0.5}}},
        "seeds": 1,
        "budget": {"updates": 2},
        "parallel": {"processes": 1, "threads": 1},
    }
    Path("study.yaml").write_text(yaml.safe_dump(study))
    assert main(["study", "study.yaml", "--allow-code", "--quiet"]) == 0
    found = json.loads((outside / "studies" / "strangers" / "study.json").read_text())
    assert {arm["arm"] for arm in found["arms"]} == {"opd", "longer"}
    assert main(["report", str(outside / "studies" / "strangers")]) == 0
    capsys.readouterr()
    Path("longer.py").write_text(with_another_source(Path("longer.py").read_text()))
    nothing_was_loaded(monkeypatch)
    assert main(["study", "study.yaml", "--allow-code", "--quiet"]) == 2
    assert "longer.py:Longer has changed since the study in" in capsys.readouterr().err


def test_objects_instead_of_names(tiny: Tiny, outside: Path) -> None:
    """From a notebook: nothing is named, so nothing need be allowed."""
    Longer = mine("longer").Longer
    config = tiny(run__name="objects", run__trajectories_every=1)
    done = onpath.train(
        config,
        method=Longer.Options(share=0.25),
        divergence=mine("hellinger").hellinger,
        grader=mine("lastword").grade,
        rewards={"short": mine("brevity").brevity},
        quiet=True,
    )
    tree = yaml.safe_load((done.directory / "config.yaml").read_text())
    assert tree["method"]["name"].endswith("longer.py:Longer")
    assert tree["method"]["share"] == 0.25
    assert tree["method"]["divergence"].endswith("hellinger.py:hellinger")
    assert tree["eval"]["grader"].endswith("lastword.py:grade")
    assert rows_of(done.directory)[0]["short"] > 0
    stored = pq.read_table(done.directory / "trajectories" / "step_000001.parquet").to_pylist()
    assert sum(row["kept"] for row in stored) == len(stored) // 4
    plain = onpath.train(tiny(run__name="plain"), method=Longer, quiet=True)
    assert yaml.safe_load((plain.directory / "config.yaml").read_text())["method"]["share"] == 0.5


def factory(given: Any) -> Callable[..., Any]:
    """Its functions have one name."""
    return lambda text="", answer="": given


def test_what_one_call_passes_has_names_of_its_own(tiny: Tiny) -> None:
    """A reward does not judge, and a grader of an earlier call still does."""
    one, other, third = factory(False), factory(True), factory(2.0)
    kl = lambda teacher_logp, student_logp: (student_logp - teacher_logp).sum(-1)  # noqa: E731
    asked = {"grader": one, "rewards": {"r": other, "s": third}, "divergence": kl}
    config = with_own(tiny(run__name="lambdas"), **asked)
    names = {"eval.grader": config.eval.grader, "method.divergence": config.method.divergence}
    names |= {label: reward.name for label, reward in config.rewards.items()}
    loaded = {key: code.load(name, key=key) for key, name in names.items()}
    assert loaded == {"eval.grader": one, "method.divergence": kl, "r": other, "s": third}
    assert with_own(tiny(run__name="lambdas"), **asked) == config, "a resumed run has the same names"
    again = with_own(config, rewards={"t": other})
    assert code.load(again.eval.grader, key="eval.grader") is one
    done = onpath.train(tiny(run__name="two"), grader=one, rewards={"r": other}, quiet=True)
    assert {(row["accuracy"], row["r"]) for row in rows_of(done.directory)} == {(0.0, 1.0)}


def test_a_name_that_the_config_has_keeps_its_meaning(tiny: Tiny) -> None:
    """Also where another process gave it: what it meant there is not known here."""
    one = factory(True)
    there = with_own(tiny(), grader=one).model_dump(mode="json")
    code._loaded.clear()
    with pytest.raises(UserError, match="nothing may run it yet"):
        with_own(there, rewards={"r": factory(1.0)})


def test_what_every_method_has_is_kept_where_another_is_passed() -> None:
    """As on the command line; what is the other method's own is not this one's."""
    before = build({"method": {"name": "topd", "divergence": "forward_kl", "support_k": 4, "window": 8}})
    for method, window in (
        (Counting, None),
        (Counting.Options(token_clip=0.5), None),
        ("topd", 8),
        ("opd", None),
    ):
        after = with_own(before, method=method).method
        assert (after.divergence, after.support_k) == ("forward_kl", 4)
        assert getattr(after, "window", None) == window
    assert with_own(before, method=Counting.Options(support_k=5)).method.support_k == 5
    same = with_own(build({}), method=Counting.Options(token_clip=0.5))
    assert with_own(same, method=Counting).method.token_clip == 0.5


@pytest.mark.parametrize(
    "passed", [{"train_dataset": [{"prompt": "a"}]}, {"grader": lambda text, answer: True}]
)
def test_what_nobody_set_stays_so_where_objects_are_passed(passed: dict[str, Any]) -> None:
    """Warnings of defaults that do not fit ask for it (`lora_alpha`, `lr`, the teacher)."""
    set_by_hand = {"student": {"lora_rank": 4}, "method": {"name": "trd"}}
    before = build(set_by_hand)
    after = with_own(before, **passed)
    assert (before.student, before.method) == (after.student, after.method)
    assert after.student.model_fields_set == {"lora_rank"}
    assert "lr" not in after.optim.model_fields_set
    assert "model" not in after.teacher.model_fields_set
    assert with_own(Config(method=METHODS["trd"]()), **passed).method.name == "trd"


def test_rows_of_a_stream_are_told_from_others(tiny: Tiny, data_file: Path) -> None:
    """It has no length, and so no digest in its name: what was read has."""
    rows = [json.loads(line) for line in data_file.read_text().splitlines()]
    config = tiny(data__eval={}, optim__steps=1)
    stream = Dataset.from_list(rows).to_iterable_dataset()
    assert onpath.train(config, train_dataset=stream, quiet=True).trained
    assert not onpath.train(config, train_dataset=stream, quiet=True).trained
    other = Dataset.from_list(rows[::-1]).to_iterable_dataset()
    with pytest.raises(UserError, match=r"begun with another content of data\.train"):
        onpath.train(config, train_dataset=other, quiet=True)


def test_a_tracker_may_be_a_class(data_file: Path, model_dirs: dict[str, Path], tmp_path: Path) -> None:
    """Of a notebook, beside others by name."""
    told = list[tuple[int, float]]()

    class Listening:
        def __init__(self, directory: Path, name: str, config: dict[str, Any]) -> None:
            assert directory.name == name == config["run"]["name"] == "heard"

        def log(self, values: dict[str, float], step: int) -> None:
            told.extend((step, loss) for key, loss in values.items() if key == "loss")

        def close(self) -> None:
            told.append((-1, 0.0))

    sections = {
        "student": {"model": str(model_dirs["student"])},
        "teacher": {"model": str(model_dirs["teacher"])},
        "data": {"train": str(data_file), "eval": {}},
        "optim": {"steps": 2},
        "rollout": {"prompts": 2, "max_new_tokens": 4},
        "run": {"name": "heard", "dir": str(tmp_path), "trackers": [Listening, "tensorboard"]},
    }
    run = onpath.train(sections, quiet=True).directory
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert told == [(1, rows[0]["loss"]), (2, rows[1]["loss"]), (-1, 0.0)]
    assert (run / "tensorboard").is_dir()
    assert load(run / "config.yaml", allow_code=True).run.trackers == [
        f"{__file__}:Listening",
        "tensorboard",
    ]


def test_rows_may_be_a_frame_of_pandas(tiny: Tiny) -> None:
    frame = pd.DataFrame({"prompt": ["1+1=", "1+2="], "answer": [2, 3]})
    config = tiny(data__eval={}, optim__steps=1, rollout__prompts=2, run__trajectories_every=1)
    run = onpath.train(config, train_dataset=frame, quiet=True).directory
    asked = {(r["prompt"], r["answer"]) for r in read_trajectories(run)}
    assert asked == {("1+1=", "2"), ("1+2=", "3")}
    found = onpath.evaluate_model(run, data=frame, n=1, k=1, grader=lambda text, answer: answer == "3")
    assert [result.avg_at_k for result in found.results.values()] == [0.5]


def load_rows(rows: Any) -> list[dict[str, Any]]:
    return list(code.load(named_rows("data.train", rows), key="data.train"))


def test_a_frame_s_missing_cells_and_arrays(tmp_path: Path) -> None:
    """None of a text column is NaN there, a message from parquet an array."""
    told = [{"role": "user", "content": "1+3="}]
    rows: list[dict[str, Any]] = [
        {"prompt": "1+1=", "answer": 2, "solution": "two", "id": "a", "tools": [{"name": "add"}]},
        {"messages": told, "answer": None, "id": None},
    ]
    pd.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    for frame in (pd.DataFrame(rows), pd.read_parquet(tmp_path / "rows.parquet")):
        first, second = load_rows(frame)
        assert first == {**rows[0], "answer": first["answer"]}
        assert int(first["answer"]) == 2
        assert second == {"messages": told}

    class DataFrame:
        """polars names it otherwise."""

        def __iter__(self) -> Iterator[Any]:
            raise AssertionError("gives columns")

        def to_dicts(self) -> list[dict[str, Any]]:
            return rows

    assert load_rows(DataFrame()) == rows


def test_a_function_without_a_name_is_passed_again(tiny: Tiny) -> None:
    run = onpath.train(tiny(optim__steps=1), grader=lambda text, answer: True, quiet=True).directory
    code._loaded.clear()
    with pytest.raises(UserError, match="a function without a name is found in no file: pass it again"):
        onpath.evaluate_model(run, allow_code=True)
    found = onpath.evaluate_model(run, grader=lambda text, answer: True)
    assert [result.avg_at_k for result in found.results.values()] == [1.0]


def test_rows_of_a_later_call_are_not_those_of_an_earlier_run(tiny: Tiny, data_file: Path) -> None:
    rows = [json.loads(line) for line in data_file.read_text().splitlines()]
    runs = {
        count: onpath.train(
            tiny(run__name=f"of-{count}", optim__steps=1), eval_dataset=rows[:count], quiet=True
        ).directory
        for count in (4, 3)
    }
    for count, directory in runs.items():
        (found,) = onpath.evaluate_model(directory).results.values()
        assert found.problems == count


def test_a_name_may_be_passed_as_well(tiny: Tiny, outside: Path) -> None:
    given: dict[str, Any] = {"divergence": "forward_kl", "grader": "math", "allow_code": True}
    config = with_own(tiny(), method="longer.py:Longer", rewards={"short": "brevity.py:brevity"}, **given)
    assert (config.method.name, config.method.divergence) == ("longer.py:Longer", "forward_kl")
    assert (config.eval.grader, config.rewards["short"].name) == ("math", "brevity.py:brevity")
    with pytest.raises(UserError, match="'forward' must be one of reverse_kl"):
        with_own(tiny(), divergence="forward")


def test_rows_in_place_of_files(
    tiny: Tiny, data_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The run is the file's, bit by bit; it goes on with the same rows, and says so where it has others."""
    rows = [json.loads(line) for line in data_file.read_text().splitlines()]
    sets: dict[str, Any] = {"train_dataset": Dataset.from_list(rows), "eval_dataset": {"test": rows}}
    short = {"optim__schedule": "constant", "run__save_every": 1}
    of_file = onpath.train(tiny(**short, run__name="file"), quiet=True).directory
    done = onpath.train(tiny(**short, optim__steps=2, run__name="rows"), **sets, quiet=True).directory
    path = tmp_path / "longer.yaml"
    path.write_text((done / "config.yaml").read_text().replace("steps: 2", "steps: 3"))
    nothing_was_loaded(monkeypatch)
    with pytest.raises(
        UserError, match=r"passed\.data\.train\.\w{8}\.py:rows was passed by a Python call; pass it again"
    ):
        onpath.train(path, quiet=True)
    for key, others in (("train", {"train_dataset": rows[1:]}), ("eval.test", {"eval_dataset": rows[1:]})):
        with pytest.raises(UserError, match=rf"data\.{key}"):
            onpath.train(path, **{**sets, **others}, quiet=True)
    onpath.train(path, **sets, quiet=True)
    assert [r["loss"] for r in rows_of(done)] == [r["loss"] for r in rows_of(of_file)]
    assert (done / "eval.jsonl").read_text().count("\n") >= 1
    nothing_was_loaded(monkeypatch)
    found = onpath.evaluate_model(done, data=iter(rows), limit=5).results[str(done)]
    assert found.avg_at_k == onpath.evaluate_model(of_file).results[str(of_file)].avg_at_k


@pytest.mark.parametrize(
    "config",
    [
        None, Config(), {}, {"data": {"limit": 3}}, {"data": Data(limit=3)},
        Config(data=Data(train="gym:train")), build({"data": {"train": "gym:train"}}),
    ],
)  # fmt: skip
def test_rows_have_no_evaluation_of_the_gyms(config: Any) -> None:
    made = with_own(config, train_dataset=[{"prompt": "1+1="}])
    assert re.fullmatch(r"passed\.data\.train\.\w{8}\.py:rows", made.data.train)
    assert made.data.eval == {}
    kept = with_own(made, eval_dataset="gym:test").data
    assert (kept.train, kept.eval) == (made.data.train, {"test": "gym:test"})


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (DatasetDict(train=Dataset.from_list([])), r"data\.train is DatasetDict; name one of its sets"),
        (5, r"data\.train is int; it must be rows"),
        (
            Dataset.from_list([{"question": "1+1="}]),
            r"passed\.data\.train\.\w+\.py:rows, row 0: no key 'prompt'",
        ),
    ],
)
def test_what_are_no_rows_is_said(rows: Any, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        onpath.train({"data": {}}, train_dataset=rows)


def test_a_run_with_a_grader_of_its_own_is_evaluated(
    tiny: Tiny, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another process: with the run's grader if that may run, and with another one even if it is gone."""
    run = onpath.train(tiny(run__name="graded"), grader=mine("lastword").grade, quiet=True).directory
    monkeypatch.setattr(code, "_loaded", {})
    with pytest.raises(UserError, match="nothing may run it yet"):
        onpath.evaluate_model(run)
    found = onpath.evaluate_model(run, allow_code=True, against=run / "model", limit=2).results
    assert found[str(run)].grader.endswith("lastword.py:grade")
    monkeypatch.setattr(code, "_loaded", {})
    Path("lastword.py").unlink()
    other = max((run / "checkpoints").iterdir())
    assert onpath.evaluate_model(run, grader="exact", against=other).results[str(run)].grader == "exact"


def test_a_divergence_trains(tiny: Tiny, outside: Path) -> None:
    """Its loss is the function's own mean over the same tokens."""
    from onpath.run.assemble import assemble
    from tests.stepping import step_on

    path = config_of(tiny, "hellinger.yaml", outside)
    parts = assemble(load(path, allow_code=True))
    from onpath.training import sample

    made = parts.method.prepare(sample(parts, 0), step=0).trajectories
    meter, gradients = step_on(parts, made)
    import torch

    total = count = 0.0
    for t in made:
        logps = []
        for model in (parts.models.teacher.model, parts.models.student):
            ids = torch.tensor([t.student_context + t.response])
            with torch.no_grad():
                logits = model.eval()(ids).logits[0, len(t.student_context) - 1 : -1]
            logps.append(logits[:, : parts.models.vocabulary].double().log_softmax(-1))
        total += float(mine("hellinger").hellinger(*logps).sum())
        count += len(t.response)
    assert meter.sums["loss"] == pytest.approx(total / count, rel=1e-4)
    assert max(float(g.abs().max()) for g in gradients.values()) > 0


def test_a_reward_is_logged_and_filters_and_weighs(tiny: Tiny, outside: Path) -> None:
    path = config_of(tiny, "brevity.yaml", outside, run__trajectories_every=1, eval__start=False)
    tree = yaml.safe_load(path.read_text())
    directory = Path(tree["run"]["dir"]) / tree["run"]["name"]
    onpath.train(load(path, allow_code=True), quiet=True)
    stored = pq.read_table(directory / "trajectories" / "step_000001.parquet").to_pylist()
    values = [1 / (1 + len(row["origin_text"])) for row in stored]
    assert [row["brevity"] for row in stored] == pytest.approx(values)
    assert rows_of(directory)[0]["brevity"] == pytest.approx(sum(values) / len(values))
    cut = sorted(values)[len(values) // 2]
    reward = {"name": "brevity.py:brevity", "at_least": cut, "weights_tokens": True}
    tree = {**tree, "rewards": [reward], "run": {**tree["run"], "name": "cut"}}
    with code.allowed():
        onpath.train(build(tree), quiet=True)
    again = pq.read_table(directory.parent / "cut" / "trajectories" / "step_000001.parquet").to_pylist()
    assert [row["kept"] for row in again] == [v >= cut for v in values]
    kept = [row for row in again if row["kept"]]
    weights = [w for row in kept for w in row["weights"]]
    assert sum(weights) == pytest.approx(len(weights)), "mean 1 over the step"
    ratios = {round(row["weights"][0] / row["brevity"], 6) for row in kept}
    assert len(ratios) == 1


def test_a_tracker_and_rows_of_ones_own(tiny: Tiny, outside: Path) -> None:
    path = config_of(tiny, "printing.yaml", outside)
    done = onpath.train(load(path, allow_code=True), quiet=True)
    tracked = [line.split() for line in (done.directory / "tracked.txt").read_text().splitlines()]
    losses = {str(row["step"]): row["loss"] for row in rows_of(done.directory)}
    assert {s: float(v) for s, v in tracked if v != "None"} == pytest.approx(losses)
    config = load(config_of(tiny, "sums.yaml", outside), allow_code=True)
    done = onpath.train(config, quiet=True)
    assert done.evaluations[0]["problems"] == config.data.eval_limit


def test_a_task_of_ones_own(tiny: Tiny, outside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from onpath.data import tasks

    monkeypatch.setattr(tasks, "_TASKS", dict(tasks._TASKS))
    tree = yaml.safe_load(tiny(run__name="parity", eval__grader="auto").to_yaml())
    done = mine("parity").main(tree)
    assert done.evaluations[0]["grader"] == "parity"
    assert done.evaluations[0]["problems"] == 20
    again = mine("parity").main({**tree, "run": {**tree["run"], "name": "again"}})
    assert again.evaluations[0]["problems"] == 20, "a cell that runs again"


def test_a_task_does_not_take_another_ones_name(outside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from onpath.data import tasks

    monkeypatch.setattr(tasks, "_TASKS", dict(tasks._TASKS))
    Parity = mine("parity").Parity
    tasks.register(Parity())
    for name, kind, of in (("gym", "Gym", "Gym"), ("parity", "Odd", "Parity"), ("maze", "Odd", "MazeTask")):
        other = type(kind, (Parity,), {"name": name})
        with pytest.raises(UserError, match=f"a task {name} already, {of}; give {kind} another name"):
            tasks.register(other())
    assert tasks.task_of("parity:train").name == "parity"  # type: ignore[union-attr]


def test_a_task_s_models_are_named_where_it_has_them(outside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from onpath.data import tasks

    monkeypatch.setattr(tasks, "_TASKS", dict(tasks._TASKS))
    tasks.register(mine("parity").Parity())
    data = {"train": "parity:train", "eval": {"test": "parity:test"}}
    expected = r"of data.train, parity:train: use one that does \(parity brings no student\)$"
    with pytest.raises(UserError, match=expected):
        build({"data": data, "student": {"model": "gym:student"}})
    with pytest.raises(UserError, match=r"of data.train, maze:train: use maze:student$"):
        build({"data": {**data, "train": "maze:train"}, "student": {"model": "gym:student"}})


def test_an_engine_of_ones_own(tiny: Tiny) -> None:
    from onpath.engines.base import Engine
    from onpath.records import Completion

    class Echo(Engine):
        """Always generates the same two tokens."""

        def __init__(self) -> None:
            self.synced: list[int] = []

        def continue_from(self, prefixes: Any, sampling: Any, *, keys: Any = None) -> list[Completion]:
            return [Completion(ids=(5, 2), logprobs=(-1.0, -1.0), finish_reason="stop") for _ in prefixes]

        def score(self, contexts: Any, responses: Any) -> list[tuple[float, ...]]:
            return [tuple(-1.0 for _ in r) for r in responses]

        def sync_weights(self, version: int) -> None:
            super().sync_weights(version)
            self.synced.append(version)

    engine, config = Echo(), tiny(run__name="echo", eval__start=False)
    done = onpath.train(config, engine=engine, quiet=True)
    assert {row["mean_length"] for row in rows_of(done.directory)} == {2.0}
    assert engine.synced == list(range(config.optim.steps + 1))


def test_the_pages_engine_is_told_how_the_run_renders_and_ends(tiny: Tiny, outside: Path) -> None:
    engine = mine("unigram").Unigram()
    config = tiny(run__name="unigram", run__trajectories_every=1, rollout__stop_ids=[7], rollout__stop=["9"])
    done = onpath.train(config, engine=engine, quiet=True)
    assert 7 in engine.stop_ids
    assert engine.stop_strings == ("9",)
    (nine,) = engine.renderer.text_ids("9")
    stored = pq.read_table(done.directory / "trajectories" / "step_000001.parquet").to_pylist()
    ends = [*engine.stop_ids, nine]
    assert {row["finish_reason"] for row in stored} == {"stop", "length"}
    for row in stored:
        assert not set(row["response"][:-1]) & set(ends)
        assert (row["response"][-1] in ends) == (row["finish_reason"] == "stop")


@pytest.mark.parametrize(
    ("ids", "logprobs", "expected"),
    [
        ((5,) * 600, (-1.0,) * 600, "a completion of 600 tokens does not end where it was told to"),
        ((5, 2, 5, 2), (-1.0,) * 4, "a completion of 4 tokens does not end where it was told to"),
        ((5, 2), (float("nan"), -1.0), "log-probs that are missing, not finite or above 0"),
        ((5, 6, 2), (-1.0,), "log-probs that are missing"),
        ((5, 4000, 2), (-1.0,) * 3, "wrote token id 4000, but the vocabulary has"),
        ((5, -3, 2), (-1.0,) * 3, "wrote token id -3, but the vocabulary has"),
        ((5, None), (-1.0,) * 2, "ids and log-probs must be numbers"),
        (None, (), "gave 1 completions where"),
    ],
)
def test_an_engine_that_answers_nonsense_is_named(ids: Any, logprobs: Any, expected: str, tiny: Tiny) -> None:
    from onpath.engines.base import Engine
    from onpath.records import Completion

    class Nonsense(Engine):
        def continue_from(self, prefixes: Any, sampling: Any, *, keys: Any = None) -> list[Completion]:
            one = Completion(ids=ids or (2,), logprobs=logprobs, finish_reason="stop")
            return [one for _ in prefixes][: None if ids else 1]

    with pytest.raises(UserError, match=f"engine Nonsense: {expected}|engine Nonsense: .*{expected}"):
        onpath.train(tiny(eval__start=False, rollout__stop=["9"]), engine=Nonsense(), quiet=True)


ENGINE = """
from onpath.engines.base import Engine, sampled
from onpath.records import Completion

class Mine(Engine):
    def continue_from(self, prefixes, sampling, *, keys=None):
        return [Completion(ids=(5, 2), logprobs=(-1.0, -1.0), finish_reason="stop") for _ in prefixes]
"""
LACKING = "must take (self, {}), as docs/extending.md says"
ENGINES = [
    ("continue_from(self, prefixes, sampling, *, keys=None): return None",
     "continue_from gave NoneType; it gives a list of Completions", 0),
    ("continue_from(self, prefixes, sampling, *, keys=None): return {}",
     "continue_from gave dict; it gives a list of Completions", 0),
    ("continue_from(self, prefixes, sampling, *, keys=None): return [None for _ in prefixes]",
     "continue_from gave a list with NoneType in it; it gives a list of Completions", 0),
    ("continue_from(self, prefixes, sampling, *, keys=None): return prefixes.nope",
     "continue_from fails: AttributeError: 'list' object has no attribute 'nope'", 1),
    ("continue_from(self, prefixes, sampling): return []",
     f"continue_from {LACKING.format('prefixes, sampling, *, keys')}", 0),
    ("generate(self, prompts, sampling, *, n=1): return []",
     f"generate {LACKING.format('prompts, sampling, *, n, keys')}", 0),
    ("generate(self, prompts, sampling, *, n=1, keys=None): raise OSError('gone')",
     "generate fails: OSError: gone", 1),
    ("generate(self, prompts, sampling, *, n=1, keys=None): return [4] * len(prompts) * n",
     "generate gave a list with int in it; it gives a list of Rollouts", 0),
    ("sync_weights(self): pass", f"sync_weights {LACKING.format('version')}", 0),
    ("sync_weights(self, version): raise RuntimeError('no room')",
     "sync_weights fails: RuntimeError: no room", 1),
]  # fmt: skip


@pytest.mark.parametrize(("hook", "expected", "frames"), ENGINES)
def test_an_engine_that_fails_is_named(
    hook: str, expected: str, frames: int, tiny: Tiny, outside: Path
) -> None:
    (outside / "wrong.py").write_text(f"{ENGINE}\n    def {hook}\n")
    config = tiny(eval__start=False, optim__steps=1)
    with pytest.raises(UserError, match=f"^engine Mine: {re.escape(expected)}$") as caught:
        onpath.train(config, engine=mine("wrong").Mine(), quiet=True)
    assert caught.value.frames.count("wrong.py") == frames


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("None", "a list of log-probs for each response"),
        ("[None for _ in responses]", "a list of log-probs for each response"),
        ("[]", "one log-prob for each token of each response"),
        ("[(-1.0,) for _ in responses]", "one log-prob for each token of each response"),
        ("responses.nope", "fails: AttributeError"),
    ],
)
def test_what_an_engine_scores_is_looked_at(answer: str, expected: str, tiny: Tiny, outside: Path) -> None:
    from onpath.engines.own import OwnEngine
    from onpath.run.assemble import assemble

    scorer = f"{ENGINE}\n    def score(self, contexts, responses): return {answer}\n"
    (outside / "wrong.py").write_text(scorer)
    engine = assemble(tiny(), engine=mine("wrong").Mine()).generators.student
    assert isinstance(engine, OwnEngine)
    with pytest.raises(UserError, match=f"^engine Mine: score .*{expected}"):
        engine.score([(4,), (5,)], [(6, 7), (8,)])


def test_an_engine_may_answer_with_lists_or_whole_rollouts(tiny: Tiny) -> None:
    from onpath.engines.base import Engine, sampled
    from onpath.records import Completion

    class Lists(Engine):
        def continue_from(self, prefixes: Any, sampling: Any, *, keys: Any = None) -> list[Completion]:
            made: Any = {"ids": [5, 2], "logprobs": [-1.0, -0.5]}
            return [Completion(**made, finish_reason="stop") for _ in prefixes]

    class Whole(Lists):
        def generate(self, prompts: Any, sampling: Any, *, n: int = 1, keys: Any = None) -> Any:
            return sampled(self, self.renderer, prompts, sampling, n=n, keys=keys)

    class Early(Lists):
        def continue_from(self, prefixes: Any, sampling: Any, *, keys: Any = None) -> list[Completion]:
            """Ends where it likes."""
            return [Completion(ids=(5, 6), logprobs=(-1.0, -0.5), finish_reason="stop") for _ in prefixes]

    for engine in (Lists(), Whole(), Early()):
        config = tiny(run__name=type(engine).__name__, eval__start=False, run__trajectories_every=1)
        done = onpath.train(config, engine=engine, quiet=True)
        assert {row["mean_length"] for row in rows_of(done.directory)} == {2.0}


def test_a_file_imports_its_neighbours_and_hides_nothing(
    outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `onpath` starts, which has no working directory on its path; from one below."""
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", str(outside))])
    (outside / "neighbour_of_brevity.py").write_text("VALUE = 2.5\n")
    (outside / "yaml.py").write_text("1 / 0\n")
    (outside / "brevity.py").write_text(
        "from neighbour_of_brevity import VALUE\n\ndef brevity(text):\n    import yaml\n    return VALUE\n"
    )
    for name in ("neighbour_of_brevity", "yaml"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with code.allowed():
        assert code.load("brevity.py:brevity", key="rewards")("") == 2.5


WRONG = {
    "no such file": ("gone.py:Mine", "there is no file gone.py"),
    "no such name": ("longer.py:Shorter", r"longer.py has no Shorter; it defines Longer"),
    "no method": ("hellinger.py:hellinger", "is not a method: derive a class from onpath.methods.Method"),
    "a file that fails": ("broken.py:Mine", r"broken.py, line 2 fails: ZeroDivisionError"),
    "a file that ends": ("ends.py:Mine", r"method.name: ends.py, line 2 fails: SystemExit: 3"),
    "a file that is refused": ("refused.py:Mine", r"method.name: refused.py, line 2: there is no such"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_loaded_is_said(
    name: str, tiny: Tiny, outside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (outside / "broken.py").write_text("x = 1\ny = 1 / 0\n")
    (outside / "ends.py").write_text("import sys\nsys.exit(3)\n")
    (outside / "refused.py").write_text("import onpath\nraise onpath.UserError('there is no such')\n")
    own, expected = WRONG[name]
    path = config_of(tiny, "longer.yaml", outside)
    assert main(["train", str(path), "--allow-code", "--method.name", own]) == 2
    said = capsys.readouterr().err.strip()
    assert re.search(expected, said), said
    assert "\n" not in said
    assert "Traceback" not in said


CALLS = [
    "train(CONFIG, grader=grade)",
    "run_study('study.yaml')",
    "evaluate_model('gym:student', data='gym:test')",
    "export_model('run', 'out')",
    "write_report('run')",
    "kept_scores('scores')",
]


@pytest.mark.parametrize("call", CALLS)
def test_a_script_does_no_work_when_a_name_in_it_is_looked_up(
    call: str, tiny: Tiny, outside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sweep at the top level of the file that has the grader, of which the first run is gone."""
    config = tiny(run__name="first").model_dump(mode="json")
    script = f"import onpath\nCONFIG = {config!r}\n\ndef grade(text, answer):\n    return True\n\n"
    (outside / "sweep.py").write_text(f"{script}onpath.{call}\n")
    path = config_of(tiny, "lastword.yaml", outside)
    assert main(["train", str(path), "--allow-code", "--eval.grader", "sweep.py:grade"]) == 2
    name = call.partition("(")[0]
    expected = f"eval.grader: sweep.py, line 7: it calls onpath.{name} when it is loaded; put that below `if"
    assert expected in capsys.readouterr().err
    assert not Path(config["run"]["dir"], "first").exists()
    (outside / "sweep.py").write_text(f"{script}if __name__ == '__main__':\n    onpath.{call}\n")
    assert main(["train", str(path), "--quiet", "--allow-code", "--eval.grader", "sweep.py:grade"]) == 0


@pytest.mark.parametrize(
    ("call", "arguments", "expected"),
    [
        ("train", {"config": 5}, "config is int; it must be a Config, a mapping of sections or the path"),
        ("train", {"config": {"optim": 5}}, "optim is 5"),
        ("train", {"config": {"method": "opd"}}, r"method is 'opd'; it must be a mapping such as {name"),
        ("train", {"config": {"rewards": ["no"]}}, r"rewards is \['no'\]"),
        ("train", {"config": {"rewards": ["no"]}, "rewards": {"a": len}}, r"rewards is \['no'\]"),
        ("train", {"config": {"eval": 5}, "grader": len}, r"eval is 5"),
        ("train", {"rewards": [len]}, r"rewards is list; it must be a mapping, {label: function}"),
        ("train", {"rewards": {"a": 5}}, "rewards.a is int; it must be a function, or its name as in YAML"),
        ("train", {"grader": 5}, "eval.grader is int; it must be a function, or its name as in YAML"),
        ("train", {"divergence": 5}, "method.divergence is int; it must be a function"),
        ("train", {"method": "odp"}, "method.name is 'odp'; it must be one of"),
        ("train", {"engine": 5}, "engine is int; it must be derived from onpath.engines.base.Engine"),
        ("train", {"engine": Engine()}, "engine Engine: it has no continue_from"),
        ("evaluate_model", {"k": "2"}, "k is '2'; it must be a whole number"),
        ("evaluate_model", {"limit": 1.5}, "limit is 1.5; it must be a whole number"),
        ("evaluate_model", {"top_p": "1"}, "top_p is '1'; it must be a number"),
        ("evaluate_model", {"device": 0}, "device is 0; it must be auto, cpu"),
        ("run_study", {"path": {"arms": {}}}, r"{'arms': {}} is no path, but dict"),
        ("write_report", {"directory": None}, "None is no path, but NoneType"),
        ("export_model", {"source": "x", "out": 5}, "5 is no path, but int"),
    ],
)
def test_wrong_types_from_python_are_sentences(call: str, arguments: dict[str, Any], expected: str) -> None:
    given = {"evaluate_model": {"model": "gym:student", "data": "gym:test"}}.get(call, {})
    with pytest.raises(UserError, match=expected):
        getattr(onpath, call)(**given, **arguments)


def test_sections_from_python_may_be_mappings_objects_and_lists(outside: Path) -> None:
    tree = {"optim": Optim(steps=3), "rewards": [{"name": "brevity.py:brevity"}], "data": {"limit": 70}}
    config = with_own(tree, rewards={"other": len}, allow_code=True)
    assert config.optim.steps == 3
    assert config.data.limit == 70
    assert list(config.rewards) == ["brevity", "other"]


def test_a_grader_may_answer_with_numpys_truth() -> None:
    import numpy as np

    from onpath.grade.own import OwnGrader

    judged = OwnGrader(lambda text, answer: np.array([1.0])[0] == np.float64(answer), name="near")  # type: ignore
    assert [v.correct for v in judged.grade_many([("", "1"), ("", "2")])] == [True, False]
    with pytest.raises(UserError, match=r"must be a function of \(text, answer\): too many positional"):
        OwnGrader(lambda text: True, name="short")  # type: ignore[misc, arg-type]


def test_a_reward_may_have_parameters_that_need_nothing(tiny: Tiny) -> None:
    def scaled(text: str, scale: float = 2.0) -> float:
        return scale * len(text)

    def open_ended(*more: Any, text: str, **rest: Any) -> float:
        return float(len(text) + len(more) + len(rest))

    rewards = {"twice": scaled, "thrice": partial(scaled, scale=3.0), "once": open_ended}
    row = rows_of(onpath.train(tiny(run__name="defaults"), rewards=rewards, quiet=True).directory)[0]
    assert row["once"] > 0
    assert (row["twice"], row["thrice"]) == pytest.approx((2 * row["once"], 3 * row["once"]))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("def grade(text, answer):\n    return 1 / 0\n", "fails for the answer"),
        ("def grade(text, answer):\n    return 'yes'\n", "must give True or False, not 'yes'"),
        (
            "import sys\n\ndef grade(text, answer):\n    sys.exit(0)\n",
            "fails for the answer .*: SystemExit: 0",
        ),
    ],
)
def test_a_grader_that_fails_is_named(body: str, expected: str, tiny: Tiny, outside: Path) -> None:
    (outside / "lastword.py").write_text(body)
    path = config_of(tiny, "lastword.yaml", outside)
    with pytest.raises(UserError, match=expected) as caught:
        onpath.train(load(path, allow_code=True), quiet=True)
    assert ("lastword.py" in caught.value.frames) == ("must" not in expected), "the line that failed"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("def brevity(length):\n    return 1.0\n", "its parameter length is none of text, answer, prompt"),
        ("def brevity(text):\n    return float('nan')\n", r"gave nan for prompt .*; it must give a finite"),
        ("def brevity(text):\n    len(text)\n", r"rewards\.brevity gave None for prompt .*; it must give a"),
        ("def brevity(text):\n    return 'much'\n", r"gave 'much' for prompt"),
        ("def brevity(text):\n    return [0.1, 0.2]\n", r"gave \[0\.1, 0\.2\] for prompt"),
        ("def brevity(text):\n    return text.no\n", "AttributeError"),
        ("def brevity(text):\n    raise SystemExit  # text.no\n", "fails for prompt .*: SystemExit$"),
    ],
)
def test_a_reward_that_fails_is_named(body: str, expected: str, tiny: Tiny, outside: Path) -> None:
    (outside / "brevity.py").write_text(body)
    path = config_of(tiny, "brevity.yaml", outside)
    with pytest.raises(UserError, match=expected) as caught:
        onpath.train(load(path, allow_code=True), quiet=True)
    assert ("text.no" in caught.value.frames) == ("text.no" in body), "the line that failed"


class Counting(Method):
    """Says of each step what a test has it say."""

    class Options(MethodOptions):
        """None."""

    said: dict[str, Any]

    def prepare(self, rollouts: Any, *, step: int) -> Prepared:
        return Prepared(trajectories=[own_response(r) for r in rollouts], **self.said)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"metrics": {"step": 99}}, r"Prepared.metrics has step, and a step's line has one already"),
        ({"means": {"accuracy": (1.0, 2)}}, r"Prepared.means has accuracy"),
        ({"totals": {"tokens": 7.0}}, r"Prepared.totals has tokens"),
        ({"metrics": {"brevity": 1.0}}, r"Prepared.metrics has brevity, and the rewards have one"),
        ({"means": {"reward": (1.0, 2)}}, r"Prepared.means has reward, and the rewards have one"),
        ({"metrics": {"a": 1.0}, "totals": {"a": 1.0}}, r"totals has a, and Prepared.metrics has one"),
    ],
)
def test_a_method_cannot_overwrite_what_a_step_says(
    said: dict[str, Any], expected: str, tiny: Tiny, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Counting, "said", said, raising=False)
    with pytest.raises(UserError, match=expected) as caught:
        onpath.train(tiny(), method=Counting, rewards={"brevity": mine("brevity").brevity}, quiet=True)
    assert "Counting" in str(caught.value)


def test_a_method_may_say_what_it_had_generated(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    totals = {"student_tokens_generated": 5.0, "teacher_tokens_generated": 7.0}
    monkeypatch.setattr(Counting, "said", {"totals": totals, "metrics": {"own": 1.5}}, raising=False)
    row = rows_of(onpath.train(tiny(), method=Counting, quiet=True).directory)[0]
    assert row["student_tokens_generated"] == row["tokens"] + 5
    assert (row["teacher_tokens_generated"], row["own"]) == (7, 1.5)


def test_a_method_is_told_what_a_step_measured(tiny: Tiny) -> None:
    """As metrics.jsonl has it, so that it can adapt; what it does to that changes no line."""
    told: list[dict[str, Any]] = []

    class Adapting(Counting):
        said: ClassVar[dict[str, Any]] = {"metrics": {"own": 1.5}}

        def after_step(self, measured: Any) -> None:
            told.append(dict(measured))
            measured.clear()

    rows = rows_of(onpath.train(tiny(), method=Adapting, quiet=True).directory)
    elsewhere = {"step", "seconds", "lr", "policy_version", "staleness"}
    assert told == [{k: v for k, v in row.items() if k not in elsewhere} for row in rows]
    assert all(one["own"] == 1.5 and one["loss"] > 0 and one["grad_norm"] > 0 for one in told)


@pytest.mark.parametrize(
    ("label", "where"), [("loss", "metrics"), ("step", "metrics"), ("correct", "trajectories")]
)
def test_a_reward_cannot_be_called_what_is_written_already(
    label: str, where: str, tiny: Tiny, outside: Path
) -> None:
    tree = yaml.safe_load(tiny().to_yaml())
    with pytest.raises(UserError, match=rf"rewards.{label}: {where}\S* has a {label} of its own"):
        build({**tree, "rewards": {label: {"name": "brevity.py:brevity"}}})


def test_the_names_that_are_taken_are_those_that_are_written(tiny: Tiny, outside: Path) -> None:
    config = tiny(
        run__name="names",
        run__trajectories_every=1,
        method__cosine_every=1,
        teacher__cache=str(outside / "cache"),
    )
    run = onpath.train(config, quiet=True).directory
    written = {name for row in rows_of(run) for name in row}
    elsewhere = {"teachers", "guidance", "guidance_grad_ratio", "teacher_tokens_scored_early"}
    elsewhere |= {"tokens_behind_error"}
    assert OF_A_STEP - written == elsewhere, "of other methods, tasks, several teachers, servers that write"
    assert written <= OF_A_STEP
    columns = set(pq.read_schema(run / "trajectories" / "step_000001.parquet").names)
    assert OF_A_TRAJECTORY - columns == {"teacher"}, "of several teachers"
    assert columns <= OF_A_TRAJECTORY


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return student_logp.no", r'hellinger.py", line 2(.|\n)*onpath: divergence hellinger fails: Attrib'),
        ("raise SystemExit", r'hellinger.py", line 2(.|\n)*onpath: divergence hellinger fails: SystemExit$'),
        (
            "import torch\n    class Broken(torch.autograd.Function):\n"
            "        forward = staticmethod(lambda ctx, x: x.sum(-1))\n"
            "        backward = staticmethod(lambda ctx, g: g.nope)\n"
            "    return Broken.apply(student_logp)",
            r'hellinger.py", line 5(.|\n)*onpath: divergence hellinger: its gradient fails: AttributeError',
        ),
        ("return student_logp.sum()", r"hellinger gave shape \[\] for log-probs of shape"),
        ("return (student_logp * float('nan')).sum(-1)", "hellinger is not finite where all log-probs are"),
        ("return 0 * student_logp.sum(-1).detach()", "hellinger has no gradient to student_logp"),
    ],
)
def test_a_divergence_that_is_wrong_is_one_sentence(
    body: str, expected: str, tiny: Tiny, outside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (outside / "hellinger.py").write_text(f"def hellinger(teacher_logp, student_logp):\n    {body}\n")
    path = config_of(tiny, "hellinger.yaml", outside, eval__start=False)
    assert main(["train", str(path), "--quiet", "--allow-code"]) == 2
    assert re.search(expected, capsys.readouterr().err)


METHOD = """
from onpath.methods import Method, MethodOptions, Prepared, own_response

class Mine(Method):
    class Options(MethodOptions):
        pass
"""
GOOD = "    def prepare(self, rollouts, *, step): return Prepared(trajectories=[own_response(rollouts[0])])\n"
FAULTY: list[tuple[str, str, bool]] = [
    ("    def prepare(self, rollouts, *, step): return self.wrong(rollouts)\n"
     "    def wrong(self, rollouts): return rollouts[0].no_such",
     "prepare fails: AttributeError: 'Rollout' object has no attribute 'no_such'", True),
    ("    def prepare(self, rollouts, *, step): return own_response(4)",
     "prepare fails: AttributeError: 'int'", True),
    (GOOD + "    def after_step(self, measured): measured['no']", "after_step fails: KeyError: 'no'", True),
    (GOOD + "    def state(self): 1 / 0", "state fails: ZeroDivisionError", True),
    ("    def prepare(self, rollouts, *, step): raise SystemExit(0)", "prepare fails: SystemExit: 0$", True),
    (GOOD + "    def check(self, prompts): assert not prompts", "check fails: AssertionError$", True),
    (GOOD + "    def __init__(self, options, tools): options.x", "__init__ fails: AttributeError", True),
    (GOOD + "    def __init__(self): pass", r"its __init__ must take \(self, options, tools\)", False),
    ("", r"it has no prepare\(self, rollouts, \*, step\)", False),
    ("    def prepare(self, rollouts): pass", r"prepare must take \(self, rollouts, \*, step\), as", False),
    (GOOD + "    def state(self): pass", "state gave NoneType; it gives a mapping of tensors$", False),
    (GOOD + "    def before_training(self, prompts, directory): return 5",
     "before_training gave int; it gives a sentence, or nothing$", False),
    (GOOD + "    def after_step(self): pass", r"after_step must take \(self, measured\), as", False),
]  # fmt: skip


MADE_OTHERWISE = {
    "frozen": "@dataclass(frozen=True)\nclass Mine(Method):\n    options: object\n    tools: object\n" + GOOD,
    "on the instance": """class Mine(Method):
    def __init__(self, options, tools):
        super().__init__(options, tools)
        self.prepare = self._made
    def _made(self, rollouts, *, step):
        return Prepared(trajectories=[own_response(r) for r in rollouts])
""",
    "a builtin": "class Mine(Method):\n    state = dict\n" + GOOD,
}


@pytest.mark.parametrize("how", MADE_OTHERWISE)
def test_a_method_may_be_made_otherwise(how: str, tiny: Tiny, tmp_path: Path) -> None:
    """A frozen dataclass, prepare chosen by the instance, a hook whose arguments nobody can look up."""
    path = tmp_path / "mine.py"
    path.write_text(
        "from dataclasses import dataclass\n"
        "from onpath.methods import Method, Prepared, own_response\n" + MADE_OTHERWISE[how]
    )
    tree = tiny(optim__steps=1).model_dump(mode="json") | {"method": {"name": f"{path}:Mine"}}
    with code.allowed(True):
        assert onpath.train(build(tree), quiet=True).steps == 1


@pytest.mark.parametrize(("body", "expected", "frames"), FAULTY)
def test_a_method_that_fails_is_named(
    body: str, expected: str, frames: bool, tiny: Tiny, outside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (outside / "faulty.py").write_text(METHOD + body)
    tree = yaml.safe_load(tiny(eval__start=False).to_yaml()) | {"method": {"name": "faulty.py:Mine"}}
    path = outside / "faulty.yaml"
    path.write_text(yaml.safe_dump(tree))
    assert main(["train", str(path), "--quiet", "--allow-code"]) == 2
    *above, last = [line for line in capsys.readouterr().err.splitlines() if "it/s" not in line]
    assert re.search(f"^onpath: method.name faulty.py:Mine: {expected}", last)
    assert any("faulty.py" in line for line in above) == frames
    assert not any("Traceback" in line or "sampling.py" in line for line in above)


SHARED = """
from onpath.methods import Method, MethodOptions, Prepared, own_response

class Opts(MethodOptions):
    share: float = 0.5

class First(Method):
    Options = Opts
    def prepare(self, rollouts, *, step):
        made = [own_response(r) for r in rollouts]
        return Prepared(trajectories=made, totals={"first": self.options.share})

class Second(Method):
    Options = Opts
    def prepare(self, rollouts, *, step):
        made = [own_response(r) for r in rollouts]
        return Prepared(trajectories=made, totals={"second": self.options.share})
"""


@pytest.mark.parametrize("name", ["First", "Second"])
def test_methods_that_share_their_options_are_told_apart(name: str, tiny: Tiny, outside: Path) -> None:
    (outside / "shared.py").write_text(SHARED)
    tree = yaml.safe_load(tiny(eval__start=False, optim__steps=1, run__name=name).to_yaml())
    tree |= {"method": {"name": f"shared.py:{name}", "share": 0.25}}
    with code.allowed():
        run = onpath.train(build(tree), quiet=True).directory
    assert [row.get(name.lower()) for row in rows_of(run)] == [0.25]


def test_the_doctor_says_what_a_method_gives_in_place_of_what_it_should(tiny: Tiny, outside: Path) -> None:
    from onpath.commands.doctor.command import diagnose

    (outside / "none.py").write_text(METHOD + "    def prepare(self, rollouts, *, step): pass\n")
    tree = yaml.safe_load(tiny().to_yaml()) | {"method": {"name": "none.py:Mine"}}
    with code.allowed():
        found = {f.name: f for f in diagnose(build(tree))}
    assert any("prepare gave NoneType; it gives a Prepared" in f.message for f in found.values())
    assert "passes" in found


def test_answers_of_hooks_that_few_runs_ask_are_looked_at(tiny: Tiny) -> None:
    from onpath.run.assemble import assemble

    class Few(Counting):
        def scored_first(self, rollout: Any) -> Any:
            return rollout

        def rehearse(self, prompts: Any) -> Any:
            return "fine"

        def write_rollouts(self, blank: Any, *, keys: Any, step: int) -> Any:
            return None

    method = assemble(with_own(tiny(), method=Few)).method
    with pytest.raises(UserError, match="Few: scored_first gave int; it gives a Trajectory or None"):
        method.scored_first(5)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="Few: rehearse gave str; it gives a Rehearsal or None"):
        method.rehearse([])
    with pytest.raises(UserError, match="Few: write_rollouts gave NoneType; it gives a list of Rollouts"):
        method.write_rollouts([], keys=[], step=0)


QUESTION = "MethodOptions):\n        @property\n        def "
OPTIONS: list[tuple[str, str, bool]] = [
    (":\n        share = 0.5", "Mine.Options must be derived from onpath.methods.MethodOptions", False),
    ("BaseModel):\n        share: float = 0.5", "Mine.Options must be derived from onpath", False),
    ("MethodOptions):\n        share: float", "method.share is missing: it has no default, so set", False),
    ("MethodOptions):\n        share: float = 'a'",
     "method.name faulty.py:Mine: Options.share is 'a' by default: input should be a valid number", False),
    ("MethodOptions):\n        divergence: str = 'far'",
     "Options.divergence is an option of every method, and is 'far' by default: 'far' must be one of "
     "reverse_kl, .* file.py:name; name yours otherwise$", False),
    ("MethodOptions):\n        reweight: float = 0.5",
     "Options.reweight is an option of every method, and is 0.5 by default: input should be 'none', .*; name "
     "yours otherwise$", False),
    ("MethodOptions):\n        divergence: str", "method.divergence is missing: it has no default", False),
    ("MethodOptions):\n        go: Callable = print",
     "method.go is <built-in function print>, which config.yaml cannot hold", False),
    ("MethodOptions):\n        start: Any = torch.zeros(2)", r"method.start is tensor\(\[0", False),
    (f"{QUESTION}needs(self): return ('foo',)",
     r"Options.needs gives \('foo',\): 'foo' is no column of a prompt: text, answer, solution", False),
    (f"{QUESTION}needs(self): return 'solution'", "Options.needs gives 'solution': input should be", False),
    (f"{QUESTION}warnings(self): return 'no'", "Options.warnings gives 'no': input should be a val", False),
    (f"{QUESTION}teacher_weights(self): return 'mean'", "Options.teacher_weights gives 'mean': input", False),
    (f"{QUESTION}on_policy(self): return self.no", "Options.on_policy fails: AttributeError: ", True),
    (f"{QUESTION}on_policy(self): return int('no')", "Options.on_policy fails: ValueError: inv", True),
    ("MethodOptions):\n        def on_policy(self): return False",
     "Options.on_policy is no property; write @property above it", False),
    ("MethodOptions):\n        def check(self, config): config.no", "Options.check fails: Attr", True),
    ("MethodOptions):\n        def check(self, config): raise ValueError('no optim.lr here')",
     "onpath: config.yaml: no optim.lr here$", False),
    ("MethodOptions):\n        @model_validator(mode='after')\n        def mine(self): self.no",
     "Options fails: AttributeError", True),
]  # fmt: skip


@pytest.mark.parametrize(("body", "expected", "frames"), OPTIONS)
def test_options_that_are_wrong_are_one_sentence(
    body: str, expected: str, frames: bool, tiny: Tiny, outside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = "" if body.startswith(":") else "("
    (outside / "faulty.py").write_text(
        "import torch\nfrom collections.abc import Callable\nfrom typing import Any\n"
        "from pydantic import BaseModel, model_validator\n"
        "from onpath.methods import Method, MethodOptions\n\n"
        f"class Mine(Method):\n    class Options{start}{body}\n"
    )
    tree = yaml.safe_load(tiny(eval__start=False).to_yaml()) | {"method": {"name": "faulty.py:Mine"}}
    Path("config.yaml").write_text(yaml.safe_dump(tree))
    assert main(["train", "config.yaml", "--quiet", "--allow-code"]) == 2
    *above, last = capsys.readouterr().err.splitlines()
    assert re.search(expected, last), last
    assert any("faulty.py" in line for line in above) == frames
    assert not Path(tree["run"]["dir"], tree["run"]["name"]).exists()


def test_options_need_not_fit_each_other_by_default(tiny: Tiny, outside: Path) -> None:
    """What the class asks of all of them together is asked of the config's values alone."""
    (outside / "needy.py").write_text(
        "from pydantic import model_validator\n"
        "from onpath.methods import Method, MethodOptions\n\n"
        "class Needy(Method):\n    class Options(MethodOptions):\n        words: list[str] | None = None\n"
        "        @model_validator(mode='after')\n"
        "        def some(self):\n            self.words[0]\n            return self\n"
    )
    tree = yaml.safe_load(tiny().to_yaml()) | {"method": {"name": "needy.py:Needy", "words": ["so"]}}
    Path("config.yaml").write_text(yaml.safe_dump(tree))
    assert load(Path("config.yaml"), allow_code=True).method.words == ["so"]  # type: ignore[attr-defined]


def test_answers_of_options_may_be_lists(tiny: Tiny) -> None:
    class Listing(Counting):
        said: ClassVar[dict[str, Any]] = {}

        class Options(MethodOptions):
            @property
            def needs(self) -> Any:
                return ["answer"]

            @property
            def runs_models(self) -> Any:
                """Whatever is true or false."""
                return self.needs

    assert with_own(tiny(), method=Listing).method.needs == ["answer"]


def test_only_what_a_method_s_own_code_does_is_its_fault() -> None:
    def fails() -> None:
        raise RuntimeError(said)

    said = "x"
    for modules, kind in (({__name__}, UserError), ({"elsewhere"}, RuntimeError)):
        with pytest.raises(kind), code.blamed("it", modules):
            fails()
    for said in ("[gloo] Connection closed by peer", "DefaultCPUAllocator: can't allocate memory"):
        with pytest.raises(RuntimeError, match=re.escape(said)), code.blamed("it", {__name__}):
            fails()


class Keeping(Method):
    """Keeps a tensor in one of four ways of which none can be restored, and in the one that can."""

    class Options(MethodOptions):
        how: str = "in place"
        """Which."""

    def __init__(self, options: Any, tools: Any) -> None:
        super().__init__(options, tools)
        self.seen, self.count = torch.zeros(1), 0

    def prepare(self, rollouts: Any, *, step: int) -> Prepared:
        self.count += 1
        self.seen += 1
        if self.options.how == "grown":
            self.seen = torch.cat([self.seen, self.seen[-1:]])
        return Prepared(
            trajectories=[own_response(r) for r in rollouts], metrics={"seen": self.seen.tolist()}
        )

    def state(self) -> Any:
        found = {"fresh": torch.tensor([self.count]), "plain": self.count}.get(self.options.how, self.seen)
        return {} if self.options.how == "late" and not self.count else {"seen": found}


@pytest.mark.parametrize(
    ("how", "steps", "expected"),
    [
        ("grown", 1, r"state\(\)\['seen'\] was \(1,\) of torch.float32 and then \(2,\) of torch.float32"),
        ("late", 1, r"state\(\) had nothing at the start, and seen later"),
        ("fresh", 0, r"state\(\)\['seen'\] is another tensor each time"),
        ("plain", 0, r"state\(\)\['seen'\] is int and no tensor"),
    ],
)
def test_what_a_method_keeps_can_be_restored(how: str, steps: int, expected: str, tiny: Tiny) -> None:
    config = tiny(eval__start=False, optim__steps=3, run__save_every=0)
    with pytest.raises(UserError, match=f"Keeping: {expected}.*; make each tensor once, in __init__"):
        onpath.train(config, method=Keeping.Options(how=how), quiet=True)
    lines = Path(config.run.dir) / config.run.name / "metrics.jsonl"
    assert len(lines.read_text().splitlines() if lines.exists() else []) <= steps


def test_what_is_kept_in_place_is_restored(tiny: Tiny) -> None:
    options = {"eval__start": False, "run__save_every": 1, "optim__schedule": "constant"}
    run = onpath.train(tiny(**options, optim__steps=2), method=Keeping, quiet=True).directory
    onpath.train(tiny(**options, optim__steps=3), method=Keeping, quiet=True)
    assert [row["seen"] for row in rows_of(run)] == [[1.0], [2.0], [3.0]]


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_the_sampled_estimator_takes_no_word_of_others(weight: float, tiny: Tiny) -> None:
    """What a method has others write is known when it has."""

    class Foreign(Method):
        class Options(MethodOptions):
            """None."""

        def prepare(self, rollouts: Any, *, step: int) -> Prepared:
            rows = [own_response(r) for r in rollouts]
            return Prepared(
                trajectories=[
                    replace(
                        t,
                        writers=("teacher", *["student"] * (len(t.response) - 1)),
                        weights=(weight, *[1.0] * (len(t.response) - 1)),
                    )
                    for t in rows
                ]
            )

    config, options = tiny(eval__start=False, optim__steps=1), Foreign.Options(divergence="sampled")
    if not weight:
        assert onpath.train(config, method=options, quiet=True).steps == 1
        return
    with pytest.raises(UserError, match="Foreign: trajectory 0 has tokens that others wrote, and method"):
        onpath.train(config, method=options, quiet=True)


def test_paths_are_text(tiny: Tiny, outside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a mapping from Python, and as the default of an option."""
    plain = tiny()
    tree = plain.model_dump(mode="json")
    tree["student"]["model"] = Path(tree["student"]["model"])
    tree["data"]["eval"] = {name: Path(source) for name, source in tree["data"]["eval"].items()}
    assert build(tree) == plain
    text = EXAMPLES["longer.py"].replace(
        "share: float = 0.5", "share: float = 0.5\n        at: Path = Path('a/b')"
    )
    (outside / "longer.py").write_text(f"from pathlib import Path\n{text}")
    path = config_of(tiny, "longer.yaml", outside)
    assert main(["config", str(path), "--allow-code", "--options"]) == 0
    assert '"a/b"' in capsys.readouterr().out


CODE = {
    "longer": "method.name",
    "hellinger": "method.divergence",
    "lastword": "eval.grader",
    "brevity": "rewards.brevity.name",
}


@pytest.mark.parametrize("example", CODE)
def test_a_run_does_not_go_on_with_other_code_unasked(
    example: str,
    tiny: Tiny,
    outside: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = config_of(tiny, f"{example}.yaml", outside, optim__steps=2, run__save_every=1)
    command = ["train", str(path), "--quiet", "--allow-code"]
    python, run = outside / f"{example}.py", Path(load(path, allow_code=True).run.dir) / example

    def as_another_process(text: str) -> int:
        python.write_text(text)
        nothing_was_loaded(monkeypatch)
        shutil.rmtree(run / "model", ignore_errors=True)  # as if it had been killed before its end
        return main(command)

    text = python.read_text()
    assert as_another_process(text) == 0
    assert as_another_process(f"{text}\n\n# A remark.\nUNUSED = 1\n") == 0, "nothing that it uses"
    capsys.readouterr()
    changed = with_another_source(text)
    assert as_another_process(changed) == 2
    key = CODE[example]
    assert f"begun with another content of {key} than" in capsys.readouterr().err
    command.append("--resume-with-changes")
    assert as_another_process(changed) == 0
    (line,) = [json.loads(row) for row in (run / "changes.jsonl").read_text().splitlines()]
    assert (line["key"], line["rule"]) == (key, "asked")


def test_a_checkpoint_of_an_earlier_version_has_no_digest_of_code() -> None:
    now = {"data.train": "1", "eval.grader": "2"}
    assert differing({"data.train": "1"}, now) == []
    assert differing({"data.train": "1", "eval.grader": "3"}, now) == ["eval.grader"]
    assert differing({"eval.grader": "2"}, now) == ["data.train"]
