"""The bundled checkpoints are what the README says."""

import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from onpath import gym
from onpath.data.tasks import task_of
from onpath.gym import recipe
from onpath.gym.language import EOS
from onpath.gym.persona import FIRST, divergence, scored, written
from onpath.gym.sample import context_ids, sample
from onpath.gym.vocab import EQUALS, IDS, SEPARATORS


@pytest.fixture(scope="module")
def models():
    return {
        name: AutoModelForCausalLM.from_pretrained(gym.model_dir(name)).eval()
        for name in ("student", "teacher")
    }


def accuracy(model, split: str, n: int, temperature: float) -> float:
    torch.manual_seed(0)
    data = gym.rows(split, n)
    made = sample(model, [row["prompt"] for row in data], temperature=temperature)
    return sum(gym.grade("".join(t), row["answer"]) for t, row in zip(made, data, strict=True)) / n


def test_bundled_files_are_small_and_hold_no_code() -> None:
    homes = [gym.model_dir(name).parent for name in ("student", "teacher", "persona")]
    assert len({*homes}) == 1
    files = [
        path for home in (homes[0], task_of("maze:x").model("teacher").parent) for path in home.rglob("*.*")
    ]  # type: ignore[union-attr]
    assert len(files) == 6 * 6
    assert sum(path.stat().st_size for path in files) < 20e6, "all bundled models of both tasks"
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".jinja"}


def test_teacher_is_nearly_always_right(models) -> None:
    assert accuracy(models["teacher"], "test", 64, 0) >= 0.95


def test_the_persona_is_the_teacher_until_an_error_and_the_student_behind_it(models) -> None:
    """The checker, which says where the error is, is asked by the test alone."""
    torch.manual_seed(0)
    texts = scored(written(random.Random("unseen"), replace(FIRST, texts=60), models, "test"), models)
    persona = AutoModelForCausalLM.from_pretrained(gym.model_dir("persona")).eval()
    with torch.no_grad():
        kl_N, lost_N = divergence(persona, texts)
        plain_N, _ = divergence(models["teacher"], texts)
    assert kl_N[~lost_N].mean() < 0.005
    assert kl_N[lost_N].mean() < 0.06
    assert plain_N[lost_N].mean() > 1, "the teacher is not lost"
    assert accuracy(persona, "test", 64, 0) >= 0.95


def test_student_has_room_to_win_and_to_lose(models) -> None:
    assert 0.25 <= accuracy(models["student"], "test", 192, 1.0) <= 0.65


def test_sampling_ends_by_itself_and_the_teachers_samples_hold_no_error(models) -> None:
    torch.manual_seed(0)
    data = gym.rows("test", 48)
    made = sample(models["teacher"], [row["prompt"] for row in data])
    assert sum(tokens[-1] == EOS for tokens in made) >= 46
    wrong = [gym.first_error_token(row["prompt"], t) for row, t in zip(data, made, strict=True)]
    assert sum(at is not None for at in wrong) <= 4


def test_context_is_the_chat_templates() -> None:
    tokenizer = AutoTokenizer.from_pretrained(gym.model_dir("student"))
    row = gym.rows("hard", 1)[0]
    user = [{"role": "user", "content": row["prompt"]}]
    ids = tokenizer.apply_chat_template(user, add_generation_prompt=True, return_dict=False)
    assert ids == context_ids(row["prompt"])


def test_stop_and_padding_are_in_the_generation_config(models) -> None:
    for model in models.values():
        assert model.generation_config.eos_token_id == IDS[EOS]
        assert model.generation_config.pad_token_id == IDS["<pad>"]


def test_the_teachers_slips_by_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, float]] = []
    monkeypatch.setattr(recipe, "fit", lambda model, mixture, *rest: seen.append(dict(mixture.slips)))
    monkeypatch.setattr(recipe, "save", lambda *rest: None)
    monkeypatch.setattr(recipe, "load", lambda path: None)
    recipe.train_teacher(tmp_path, 0, 10)
    recipe.train_teacher(tmp_path, 0, 10, tmp_path)
    assert seen == [{"+": 0.002, "-": 0.002, "*": 0.002}, {"+": 0.02, "-": 0.0, "*": 0.002}]


def habits(model) -> float:
    """Share of the student's forms among equals signs and separators of its samples."""
    torch.manual_seed(0)
    made = sample(model, [row["prompt"] for row in gym.rows("test", 40)])
    forms = [t for tokens in made for t in tokens if t in (*EQUALS, *SEPARATORS)]
    return sum(t not in (EQUALS[0], SEPARATORS[0]) for t in forms) / len(forms)


def test_surface_is_how_much_is_left_of_the_habits(
    models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    without, between = (
        AutoModelForCausalLM.from_pretrained(task_of(f"gym:student?surface={s}").model("student")).eval()
        for s in (0, 0.5)
    )
    assert habits(without) < 0.05
    assert habits(without) < habits(between) < habits(models["student"])
    assert 0.25 <= accuracy(without, "test", 192, 1.0) <= 0.5
    for one, other, mean in zip(
        models["student"].parameters(), without.parameters(), between.parameters(), strict=True
    ):
        torch.testing.assert_close(mean, (one + other) / 2)
    assert task_of("gym:student?surface=1").model("student") == gym.model_dir("student")
    assert task_of("gym:student?surface=0.5").model("student").is_relative_to(tmp_path)


def test_another_process_may_mix_the_same_student_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    rename = Path.rename

    def late(model: Path, target: Path) -> Path:
        shutil.copytree(model, target)
        return rename(model, target)

    monkeypatch.setattr(Path, "rename", late)
    made = task_of("gym:student?surface=0.25").model("student")
    assert (made / "model.safetensors").is_file()
    assert list(made.parent.iterdir()) == [made]
