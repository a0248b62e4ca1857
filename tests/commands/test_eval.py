"""`onpath eval`, from Python and on the command line."""

import json
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file

import onpath
from onpath.commands.cli import main
from onpath.commands.eval import Evaluated
from onpath.config import Config, build, load
from onpath.run.assemble import assemble
from onpath.run.log import read_lines
from onpath.system.errors import UserError
from onpath.training import train
from tests.engines.fake_llm import fake_vllm

Tiny = Callable[..., Config]

SMALL: dict[str, Any] = {"n": 3, "k": 2, "limit": 6, "grader": "exact", "max_new_tokens": 6, "device": "cpu"}


@pytest.fixture(scope="module")
def found(
    model_dirs: dict[str, Path], data_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Evaluated:
    out = tmp_path_factory.mktemp("eval") / "new"
    student, teacher = model_dirs["student"], model_dirs["teacher"]
    made = onpath.evaluate_model(student, data=data_file, against=teacher, out=out, **SMALL)
    assert sorted(p.name for p in out.iterdir()) == ["eval.json", "samples_0.parquet", "samples_1.parquet"]
    assert json.loads((out / "eval.json").read_text()) == made.to_json()
    assert pq.read_table(out / "samples_1.parquet").num_rows == 18
    return made


def test_two_models_on_the_same_problems(found: Evaluated, model_dirs: dict[str, Path]) -> None:
    assert list(found.results) == [str(model_dirs["student"]), str(model_dirs["teacher"])]
    ours, theirs = found.results.values()
    assert (ours.problems, ours.n, ours.k, ours.split, ours.grader) == (6, 3, 2, "sums", "exact")
    assert [p.digest for p in ours.details] == [p.digest for p in theirs.details]
    assert ours.details != theirs.details
    assert found.difference is not None
    assert found.difference.difference == pytest.approx(ours.avg_at_k - theirs.avg_at_k)


def test_numpy_s_numbers_are_numbers(model_dirs: dict[str, Path], data_file: Path, tmp_path: Path) -> None:
    numbers = {"limit": np.int64(2), "n": np.int64(2), "k": np.int32(1), "seed": np.int64(3)}
    numbers |= {"temperature": np.float32(0.5), "max_new_tokens": np.int64(4), "top_k": np.int8(5)}
    asked = {**SMALL, **numbers, "data": data_file}
    found = onpath.evaluate_model(model_dirs["student"], **asked, out=tmp_path)
    assert json.loads((tmp_path / "eval.json").read_text()) == found.to_json()
    plain = {**asked, **{name: number.item() for name, number in numbers.items()}}
    assert onpath.evaluate_model(model_dirs["student"], **plain) == found


def test_columns_have_the_names_that_are_told(
    model_dirs: dict[str, Path], data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in data_file.read_text().splitlines()]
    path = tmp_path / "others.jsonl"
    path.write_text("".join(json.dumps({"question": r["prompt"], "final": r["answer"]}) + "\n" for r in rows))
    student, columns = model_dirs["student"], {"prompt": "question", "answer": "final"}
    with pytest.raises(UserError, match=r"no key 'prompt' .*--columns"):
        onpath.evaluate_model(student, data=path, **SMALL)
    found = onpath.evaluate_model(student, data=path, columns=columns, **SMALL)
    (ours,), (plain,) = (
        found.results.values(),
        onpath.evaluate_model(student, data=data_file, **SMALL).results.values(),
    )
    assert ours.avg_at_k == plain.avg_at_k
    options = [f"--{k.replace('_', '-')}={v}" for k, v in SMALL.items()]
    arguments = ["eval", str(student), "--data", str(path), "--columns", json.dumps(columns), *options]
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found.to_json()
    assert main(["eval", str(student), "--data", str(path), "--columns", "{question: prompt}"]) == 2
    assert "columns" in capsys.readouterr().err


def test_fewer_samples_than_k_are_all_of_them(model_dirs: dict[str, Path], data_file: Path) -> None:
    options = {key: value for key, value in SMALL.items() if key != "k"}
    (found,) = onpath.evaluate_model(model_dirs["student"], data=data_file, **options).results.values()
    assert (found.n, found.k) == (3, 3)
    with pytest.raises(UserError, match="k is 4, but there are 3 samples"):
        onpath.evaluate_model(model_dirs["student"], data=data_file, **options, k=4)


def test_the_command_line_says_the_same(
    found: Evaluated, model_dirs: dict[str, Path], data_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"--{k.replace('_', '-')}={v}" for k, v in SMALL.items()]
    arguments = ["eval", str(model_dirs["student"]), "--data", str(data_file), *options]
    assert main([*arguments, "--against", str(model_dirs["teacher"]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found.to_json()
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert str(model_dirs["student"]) in said
    assert f"@3 {next(iter(found.results.values())).avg_at_k:.1%}" in said
    assert "first − second" not in said


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"k": 0}, "k is 0; pass@k needs 1"),
        ({"k": 4}, "k is 4, but there are 3 samples"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"batch_tokens": 0}, "batch_tokens is 0"),
        ({"dtype": "float8"}, "dtype is 'float8'"),
        ({"grader": "maths"}, "eval.grader is 'maths'"),
        ({"device": "gpu"}, "device is gpu"),
        ({"against": "./nowhere"}, "against: there is no directory"),
    ],
)
def test_what_makes_no_sense_is_said(
    changes: dict[str, Any], says: str, model_dirs: dict[str, Path], data_file: Path
) -> None:
    with pytest.raises(UserError, match=says):
        onpath.evaluate_model(model_dirs["student"], data=data_file, **{**SMALL, **changes})


@pytest.mark.parametrize("end", ["", "/"])
def test_a_model_is_not_compared_with_itself(end: str, data_file: Path, model_dirs: dict[str, Path]) -> None:
    model = model_dirs["student"]
    with pytest.raises(UserError, match=r"^against: .* is the same model; name another"):
        onpath.evaluate_model(model, data=data_file, against=f"{model}{end}", **SMALL)


def test_a_place_that_cannot_be_written_is_said_before_anything_loads(
    data_file: Path, model_dirs: dict[str, Path]
) -> None:
    with pytest.raises(UserError, match="cannot write"):
        onpath.evaluate_model("./nowhere", data=data_file, out=data_file / "inside", **SMALL)


def test_samples_of_an_earlier_call_do_not_stay(
    model_dirs: dict[str, Path], data_file: Path, tmp_path: Path
) -> None:
    for name in ("samples_1.parquet", "mine.txt"):
        (tmp_path / name).touch()
    onpath.evaluate_model(model_dirs["student"], data=data_file, out=tmp_path, **{**SMALL, "limit": 1})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["eval.json", "mine.txt", "samples_0.parquet"]
    (tmp_path / "samples_1.parquet").mkdir()
    with pytest.raises(UserError, match=r"samples_1.parquet: cannot write"):
        onpath.evaluate_model(model_dirs["student"], data=data_file, out=tmp_path, **SMALL)


@pytest.mark.parametrize("against", ["./nowhere", "no/such-model", "adapter", "tokenizer"])
def test_a_second_model_that_is_not_there_is_said_before_anything_is_sampled(
    against: str,
    model_dirs: dict[str, Path],
    data_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("onpath.commands.eval.load_start", None)
    shutil.copytree(model_dirs["student"], tmp_path / "adapter")
    shutil.copytree(model_dirs["student"], tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "config.json").unlink()
    lost = {"base_model_name_or_path": str(tmp_path / "base"), "peft_type": "LORA"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(lost))
    other = tmp_path / against if against in ("adapter", "tokenizer") else against
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "eval.json").write_text("of an earlier call")
    options = {**SMALL, "data": data_file, "out": tmp_path / "out"}
    with pytest.raises(UserError, match=r"^against: "):
        onpath.evaluate_model(model_dirs["student"], against=other, **options)
    assert (tmp_path / "out" / "eval.json").is_file()


def test_what_the_first_model_did_outlives_the_second(
    model_dirs: dict[str, Path], data_file: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model_dirs["teacher"], broken)
    (broken / "model.safetensors").write_bytes(b"")
    options = {**SMALL, "data": data_file, "out": tmp_path / "out"}
    with pytest.raises(UserError, match=r"^against: "):
        onpath.evaluate_model(model_dirs["student"], against=broken, **options)
    told = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert list(told["models"]) == [str(model_dirs["student"])]
    assert pq.read_table(tmp_path / "out" / "samples_0.parquet").num_rows == 18
    assert not (tmp_path / "out" / "samples_1.parquet").exists()


GRADERS = """
import sys

def moody(text, answer):
    sys.modules["moody_calls"] = calls = sys.modules.get("moody_calls", 0) + 1
    return 1 // (2 - calls) == 1
"""


def test_samples_outlive_a_grader_that_fails(
    model_dirs: dict[str, Path], data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(GRADERS)
    monkeypatch.setitem(sys.modules, "moody_calls", 0)  # type: ignore[arg-type]
    out, model = tmp_path / "out", model_dirs["student"]
    changes = {"grader": f"{tmp_path / 'mine.py'}:moody", "allow_code": True}
    with pytest.raises(
        UserError, match=r"moody fails.*ZeroDivisionError.*; the 18 samples are kept"
    ) as caught:
        onpath.evaluate_model(model, data=data_file, out=out, **{**SMALL, **changes})
    assert str(caught.value).endswith(f"ungraded, in {out / 'ungraded_0.parquet'}")
    assert "in moody" in caught.value.frames, "the line that failed"
    assert [p.name for p in out.iterdir()] == ["ungraded_0.parquet"]
    kept = pq.read_table(out / "ungraded_0.parquet").to_pylist()
    assert list(kept[0]) == ["id", "sample", "prompt", "answer", "length", "finish_reason", "text", "ids"]
    onpath.evaluate_model(model, data=data_file, out=out, **SMALL)
    assert sorted(p.name for p in out.iterdir()) == ["eval.json", "samples_0.parquet"]
    graded = pq.read_table(out / "samples_0.parquet").to_pylist()
    assert [row["text"] for row in kept] == [row["text"] for row in graded]


# Runs and checkpoints.


@pytest.fixture(scope="module", params=[0, 4], ids=["full", "lora"])
def run(
    request: pytest.FixtureRequest,
    model_dirs: dict[str, Path],
    data_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Trained to step 4 with a system prompt and stops of its own; checkpoints of steps 2 and 4."""
    config = build(
        {
            "student": {"model": str(model_dirs["student"]), "device": "cpu", "lora_rank": request.param},
            "teacher": {"model": str(model_dirs["teacher"]), "device": "cpu"},
            "data": {
                "train": str(data_file),
                "eval": {"sums": str(data_file)},
                "eval_limit": 9,
                "system": "3+5=8; ",
            },
            "rollout": {"prompts": 8, "max_new_tokens": 12, "stop": ["3", "8"], "stop_ids": [2, 9]},
            "optim": {"steps": 4, "lr": 2e-2},
            "eval": {"grader": "exact", "n": 3, "k": 2, "every": 2, "start": False, "seed": 7},
            "run": {"name": "r", "dir": str(tmp_path_factory.mktemp("runs")), "save_every": 2},
        }
    )
    return train(config, quiet=True).directory


def numbers(result: Any) -> tuple[Any, ...]:
    row = result if isinstance(result, dict) else result.to_json()
    return tuple(row[key] for key in ("split", "problems", "n", "k", "avg_at_k", "mean_length", "finished"))


def test_a_run_and_its_checkpoints_are_asked_as_the_run_asks(run: Path) -> None:
    """What `onpath eval` says is what the run said at that step."""
    said = {row["step"]: row for row in read_lines(run / "eval.jsonl")}
    places = {2: run / "checkpoints" / "step_2", 4: run}
    found = {step: onpath.evaluate_model(place).results[str(place)] for step, place in places.items()}
    for step, result in found.items():
        assert numbers(result) == numbers(said[step]), step
        assert result.step == step
    assert found[2].details != found[4].details
    last = onpath.evaluate_model(run / "checkpoints" / "step_4").results[str(run / "checkpoints" / "step_4")]
    assert last.details == found[4].details
    bare = onpath.evaluate_model(
        run / "model", data=run_data(run), limit=9, n=3, k=2, max_new_tokens=12, seed=7
    )
    assert bare.results[str(run / "model")].details != found[4].details, "without the run's system prompt"


def test_a_model_is_compared_with_a_run_as_the_run_asks(run: Path, model_dirs: dict[str, Path]) -> None:
    """A base that is asked without the run's system message and stops tells nothing of the training."""
    bare = run / "model"  # the same weights, and no run
    found = onpath.evaluate_model(run, against=bare)
    ours, theirs = found.results.values()
    assert theirs.details == ours.details
    asked: dict[str, Any] = {"limit": 9, "n": 3, "k": 2, "max_new_tokens": 12, "seed": 7, "grader": "exact"}
    turned = onpath.evaluate_model(bare, against=run)
    assert list(turned.results) == [str(bare), str(run)]
    for one in turned.results.values():
        assert one.details == ours.details, "its sampling, sets and grader too, whichever is named first"
    base = onpath.evaluate_model(model_dirs["student"], data=run_data(run), **asked)
    compared = onpath.evaluate_model(run, against=model_dirs["student"])
    name = str(model_dirs["student"])
    assert compared.results[name].details != base.results[name].details


def test_two_runs_that_are_asked_apart_are_told_so(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(run, tmp_path / "other")
    tree = yaml.safe_load((other / "config.yaml").read_text())
    tree["data"]["system"] = "Be brief."
    (other / "config.yaml").write_text(yaml.safe_dump(tree))
    assert onpath.evaluate_model(run, against=shutil.copytree(run, tmp_path / "same")).asked_apart == ()
    out = tmp_path / "out"
    assert main(["eval", str(run), "--against", str(other), "--out", str(out)]) == 0
    assert "they differ in data.system" in " ".join(capsys.readouterr().out.split())
    assert json.loads((out / "eval.json").read_text())["asked_apart"] == ["data.system"]


def test_a_run_without_a_final_model_says_which_checkpoint_it_is(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its final model is damaged, and so is its last checkpoint."""
    cut = shutil.copytree(run, tmp_path / "cut")
    next((cut / "model").glob("*.safetensors")).write_bytes(b"no weights")
    (cut / "checkpoints" / "step_4" / "state.json").write_text("{")
    found = onpath.evaluate_model(cut, against=run)
    assert list(found.results) == [f"{cut} (checkpoints/step_2)", str(run)]
    assert found.difference is not None
    assert list(found.to_json()["models"]) == list(found.results)
    capsys.readouterr()
    assert main(["export", str(cut), str(tmp_path / "out")]) == 0
    expected = f"onpath: {cut} (checkpoints/step_2) is exported: the run has no sound final model\n"
    assert capsys.readouterr() == (f"model: {tmp_path / 'out'}\n", expected)


def run_data(run: Path) -> str:
    return next(iter(load(run / "config.yaml").data.eval.values()))


def test_what_is_said_is_stronger_than_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "eval",
        str(run),
        "--data",
        "sums",
        "--limit",
        "3",
        "--k",
        "1",
        "--max-new-tokens",
        "2",
        "--json",
    ]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)["models"][str(run)]
    assert (found["problems"], found["n"], found["k"], found["split"]) == (3, 1, 1, "sums")
    assert found["mean_length"] <= 2
    assert main(["eval", str(run), "--data", "sums", "--n", "1", "--k", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["models"][str(run)]["problems"] == 9  # its data.eval_limit
    assert main(["eval", str(run), "--against", str(run / "checkpoints" / "step_2")]) == 0
    assert "first − second" in capsys.readouterr().out


def test_a_checkpoint_is_trained_from(run: Path, model_dirs: dict[str, Path], tmp_path: Path) -> None:
    exported = onpath.export_model(run / "checkpoints" / "step_2", tmp_path / "exported")

    def config(model: Path, name: str, rank: int = 0) -> Any:
        return load(
            run / "config.yaml",
            {
                "student.model": str(model),
                "student.lora_rank": rank,
                "optim.steps": 1,
                "run.name": name,
                "run.dir": str(tmp_path),
            },
        )

    one, two = (
        train(config(model, name), quiet=True)
        for model, name in ((run / "checkpoints" / "step_2", "one"), (exported, "two"))
    )
    weights = [load_file(r.model / "model.safetensors") for r in (one, two)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    with pytest.raises(UserError, match=r"student\.model: an adapter .* needs a base .* onpath export"):
        train(config(run / "checkpoints" / "step_2", "three", rank=2), quiet=True)


def test_a_run_begins_at_a_checkpoint_of_another_and_says_so(run: Path, tmp_path: Path) -> None:
    cut = shutil.copytree(run, tmp_path / "cut")
    shutil.rmtree(cut / "model")
    tree = load(run / "config.yaml").model_dump(mode="json")
    said = {}
    for start in (cut, run):
        tree["student"] = {"model": str(start), "device": "cpu"}
        said[start] = [w for w in assemble(build(tree)).warnings if "final model" in w]
    sentence = f"student.model is {cut} (checkpoints/step_4): that run has no sound final model"
    assert said == {cut: [sentence], run: []}


def test_without_data_there_must_be_one_evaluation_set(run: Path, model_dirs: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="is no run with evaluation sets of its own; name one with --data"):
        onpath.evaluate_model(model_dirs["student"])
    copy = run.with_name("copy")
    shutil.copytree(run, copy)
    tree = load(copy / "config.yaml").model_dump(mode="json")
    for evals, says in (
        ({}, "has 0 evaluation sets; name a file"),
        ({"a": "x", "b": "y"}, "name one of a, b"),
    ):
        tree["data"]["eval"] = evals
        (copy / "config.yaml").write_text(json.dumps(tree))
        with pytest.raises(UserError, match=says):
            onpath.evaluate_model(copy)
    shutil.rmtree(copy)


@pytest.mark.parametrize(
    "arguments",
    [
        "study study.yaml", "inspect run",
        "report run", "export run out", "cache store", "config",
    ],
)  # fmt: skip
def test_several_processes_do_not_each_do_all_of_it(
    arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(arguments.split()) == 2
    name = arguments.split()[0]
    assert (
        f"onpath: onpath {name} is one process, and WORLD_SIZE says several: start it without torchrun"
        in capsys.readouterr().err
    )


def test_a_vllm_samples(
    model_dirs: dict[str, Path], data_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What transformers would, greedily; one after the other, each given what it was asked for."""
    llm = fake_vllm(lambda name, module: monkeypatch.setitem(sys.modules, name, module))
    asked = {**SMALL, "n": 1, "k": 1, "temperature": 0, "data": data_file, "against": model_dirs["teacher"]}
    by_vllm = onpath.evaluate_model(model_dirs["student"], **asked, engine="vllm", vllm={"max_model_len": 77})
    assert [(m.directory, m.settings["max_model_len"], m.pushes) for m in llm.made] == [
        (model_dirs["student"], 77, 1),
        (model_dirs["teacher"], 77, 1),
    ]
    assert all(m.ended for m in llm.made)
    assert by_vllm == onpath.evaluate_model(model_dirs["student"], **asked)


@pytest.mark.parametrize("lora", [0, 2])
def test_a_vllm_samples_what_a_run_has_learnt(
    lora: int, tiny: Tiny, data_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its final model, adapter or not, and a checkpoint, which no other program reads."""
    config = tiny(student__lora_rank=lora, optim__steps=2, optim__lr=0.05, run__save_every=1, run__keep=2)
    run = train(config, quiet=True).directory
    llm = fake_vllm(lambda name, module: monkeypatch.setitem(sys.modules, name, module))
    asked = {**SMALL, "n": 1, "k": 1, "temperature": 0, "data": data_file}
    for which in (run, run / "checkpoints" / "step_1"):
        by_vllm = onpath.evaluate_model(which, **asked, engine="vllm")
        plain = onpath.evaluate_model(which, **asked)
        assert by_vllm.results[str(which)].mean_length == plain.results[str(which)].mean_length
        assert by_vllm == plain
    assert [m.directory == run / "model" for m in llm.made] == [not lora, False]
    assert not any(m.directory.exists() for m in llm.made if m.directory != run / "model")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"engine": "sglang"}, "rollout.engine"),
        ({"vllm": {"max_model_len": 9}}, "rollout.engine is hf; set it to vllm"),
        ({"engine": "vllm", "shard": "layer"}, r"rollout.vllm: \{tensor_parallel_size: 2\}"),
        ({"engine": "vllm", "vllm": [1]}, "rollout.vllm"),
    ],
)
def test_who_samples_is_said_rightly(options: dict[str, Any], words: str, data_file: Path) -> None:
    with pytest.raises(UserError, match=words):
        onpath.evaluate_model("gym:student", data=data_file, **options)


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is here")
def test_without_a_vllm_it_is_said(data_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["eval", "gym:student", "--data", "gym:test", "--limit", "2", "--rollout.engine", "vllm"])
    assert code == 2
    assert "rollout.engine vllm: cannot import vLLM" in capsys.readouterr().err
