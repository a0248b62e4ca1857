"""The maze's bundled pair is what its README says."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from onpath import config as configuration
from onpath.data.tasks import task_of
from onpath.engines.models import locate
from onpath.gym.maze.check import first_error_token, grade
from onpath.gym.maze.tasks import rows
from onpath.gym.maze.vocab import LANGUAGE
from onpath.gym.sample import sample
from onpath.run.log import read_lines
from onpath.training import train

ROLES = ("student", "teacher")


@pytest.fixture(scope="module")
def models():
    return {r: AutoModelForCausalLM.from_pretrained(locate(f"maze:{r}")).eval() for r in ROLES}


def walks(model, n: int, temperature: float) -> list[list[str]]:
    torch.manual_seed(0)
    prompts = [row["prompt"] for row in rows("test", n)]
    return sample(model, prompts, temperature=temperature, max_new=360, language=LANGUAGE)


def test_bundled_files_are_small_and_hold_no_code() -> None:
    files = [path for role in ROLES for path in Path(locate(f"maze:{role}")).iterdir()]
    assert sum(path.stat().st_size for path in files) < 8e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".jinja"}


def test_the_tokenizers_are_the_language() -> None:
    row = rows("hard", 1)[0]
    for role in ROLES:
        tokenizer = AutoTokenizer.from_pretrained(locate(f"maze:{role}"))
        user = [{"role": "user", "content": row["prompt"]}]
        ids = tokenizer.apply_chat_template(user, add_generation_prompt=True, return_dict=False)
        assert ids == LANGUAGE.context_ids(row["prompt"])


def test_the_teacher_gets_out_and_the_student_sometimes(models) -> None:
    for role, n, temperature, low, high in (("teacher", 16, 0.0, 0.9, 1.0), ("student", 40, 1.0, 0.2, 0.7)):
        made = walks(models[role], n, temperature)
        data = rows("test", n)
        right = [grade("".join(t[:-1]), row["answer"]) for t, row in zip(made, data, strict=True)]
        assert low <= sum(right) / n <= high, role
        if role == "teacher":
            wrong = [first_error_token(row["prompt"], t) for row, t in zip(data, made, strict=True)]
            assert sum(at is not None for at in wrong) <= 1


def test_no_model_of_another_name() -> None:
    task = task_of("maze:judge")
    assert task is not None
    with pytest.raises(ValueError, match="maze:student and maze:teacher"):
        task.model("judge")


@pytest.mark.parametrize("method", ["opd", "trd"])
def test_methods_train_on_it(tmp_path: Path, method: str) -> None:
    config = configuration.build(
        {
            "student": {"model": "maze:student", "device": "cpu"},
            "teacher": {"model": "maze:teacher"},
            "data": {"train": "maze:train", "limit": 4, "eval": {}},
            "rollout": {"prompts": 4, "max_new_tokens": 360},
            "optim": {"steps": 1},
            "method": {"name": method, **({"gate": False} if method == "trd" else {})},
            "run": {"name": "maze", "dir": str(tmp_path), "save_every": 0, "trajectories_every": 0},
        }
    )
    (row,) = read_lines(train(config, quiet=True).directory / "metrics.jsonl")
    assert row["tokens"] > 300
    assert row["loss"] > 0.1
