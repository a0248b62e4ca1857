"""`onpath eval`, from Python and on the command line."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import onpath
from onpath.commands.cli import main
from onpath.commands.eval import Evaluated
from onpath.system.errors import UserError

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


def test_a_place_that_cannot_be_written_is_said_before_anything_loads(
    data_file: Path, model_dirs: dict[str, Path]
) -> None:
    with pytest.raises(UserError, match="cannot write"):
        onpath.evaluate_model("./nowhere", data=data_file, out=data_file / "inside", **SMALL)
