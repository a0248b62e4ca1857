"""`onpath gym`: its subcommands at test size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from onpath import gym
from onpath.gym import pretrain, properties, recipe
from onpath.system.errors import UserError


def test_importing_the_gym_is_light() -> None:
    use = "import sys, onpath.gym; onpath.gym.rows('test', 2); "
    code = use + "assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tasks_writes_the_rows(tmp_path: Path) -> None:
    out = tmp_path / "new" / "hard.jsonl"
    assert gym.main(["tasks", "--split", "hard", "--n", "5", "--seed", "3", "--out", str(out)]) == 0
    assert [json.loads(line) for line in out.read_text().splitlines()] == gym.rows("hard", 5, 3)


def test_tasks_prints_without_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    gym.main(["tasks", "--n", "2"])
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_bad_arguments_are_the_users_to_mend(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--n must be"):
        gym.main(["tasks", "--n", "0"])
    with pytest.raises(UserError, match="no teacher in"):
        gym.main(["measure", "--models", str(tmp_path)])


@pytest.mark.parametrize("scale", ["nan", "inf", "-1", "0"])
def test_a_scale_is_above_0(scale: str) -> None:
    with pytest.raises(UserError, match=f"--scale must be above 0, not {scale}"):
        gym.main(["measure", f"--scale={scale}"])


@pytest.mark.parametrize("words", [["train", "--quick"], ["measure"]])
def test_where_results_go_is_made_before_hours_of_work(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def works(*_: object, **__: object) -> None:
        raise AssertionError("nothing may begin")

    monkeypatch.setattr(recipe, "make_models", works)
    monkeypatch.setattr(properties, "measure", works)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: cannot write: File exists; choose another place"):
        gym.main([*words, "--out", str(tmp_path / "file")])


def test_quick_training_makes_two_models_that_load(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert gym.main(["train", "--out", str(tmp_path), "--quick"]) == 0
    for name in ("student", "teacher"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert len(AutoTokenizer.from_pretrained(tmp_path / name)) == model.config.vocab_size


@pytest.mark.parametrize(
    ("models", "made", "stages"),
    [
        ("maze", ["student", "teacher"], ["student", "teacher", "refiner"]),
        ("surface", ["student-without-habits"], ["student"]),
    ],
)
def test_the_other_models_are_made_by_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, models: str, made: list[str], stages: list[str]
) -> None:
    from onpath.gym.maze import recipe

    trained = []
    for module in (recipe, pretrain):
        monkeypatch.setattr(module, "fit", lambda model, mixture, *rest: trained.append(mixture.role))
    assert gym.main(["train", "--models", models, "--out", str(tmp_path), "--quick"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == made
    assert trained == stages


def test_the_persona_is_made_by_the_same_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM

    assert gym.main(["train", "--models", "persona", "--out", str(tmp_path), "--quick"]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "persona").config.num_hidden_layers == 8
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(" kl_nats")[0] for line in said] == [
        "persona first round 1", "persona then round 1", "persona then round 2",
    ]  # fmt: skip


def test_tasks_of_the_maze(capsys: pytest.CaptureFixture[str]) -> None:
    gym.main(["tasks", "--task", "maze", "--split", "test", "--n", "1"])
    assert json.loads(capsys.readouterr().out)["id"] == "test-0-0"


def test_an_unknown_model_is_named() -> None:
    with pytest.raises(ValueError, match="not 'judge'"):
        gym.model_dir("judge")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "words", [["train"], ["train", "--out", "x", "--models", "y"], ["tasks", "--n", "a"], []]
)
def test_a_wrong_command_line_is_a_sentence(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        gym.main(words)
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.startswith("onpath: ")
    assert said.count("\n") == 1
