"""What `onpath gym measure --task maze` counts, with writers whose walks are known."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from onpath.gym import command
from onpath.gym.maze import properties
from onpath.gym.maze.check import HASTY, VERDICT, first_error_token
from onpath.gym.maze.demos import Beliefs, Walker
from onpath.gym.maze.tasks import parse_maze, rows
from onpath.gym.maze.vocab import LANGUAGE

WRITERS = {"teacher": Walker(), "student": Walker(student_style=True, beliefs=Beliefs())}


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Models are names of writers here; what they were told."""
    told: list[str] = []
    rng = random.Random(0)

    def sample(model: str, said: list[str], **how: Any) -> list[list[str]]:
        assert how["max_new"] == properties.LONGEST
        assert how["language"] is LANGUAGE
        told.extend(said)
        mazes = [parse_maze(message) for message in said]
        return [[token for token, _ in WRITERS[model].write(rng, maze)] for maze in mazes if maze]

    monkeypatch.setattr(properties, "sample", sample)
    return told


def test_accuracies_and_kinds_of_first_errors(messages: list[str]) -> None:
    found = properties.accuracy({role: role for role in WRITERS}, 40)
    said = {(x.group, x.name): x for x in found}
    assert len(messages) == 2 * 2 * 2 * 40
    for split, (low, high) in {"test": (160, 245), "hard": (240, 300)}.items():
        assert said[split, "teacher, T = 1"].value == 1.0
        assert low <= said[split, "teacher, tokens a right walk"].value <= high
        student = {kind: said[split, f"student, first error: {kind}"].value for kind in (HASTY, VERDICT)}
        assert all(share > 0 for share in student.values())
        right = said[split, "student, T = 1"].value
        assert 0 < right <= 1 - sum(student.values()) + 1e-9
        assert said[split, f"teacher, first error: {HASTY}"].value == 0.0


def test_rewrites_are_told_the_attempt_and_hints_the_way(messages: list[str]) -> None:
    found = properties.walk("student", rows("test", 30, seed=1))
    wrong, right = ([w for w in found if w.right is is_right] for is_right in (False, True))
    assert wrong
    assert right
    messages.clear()
    said = {x.name: x for x in properties.refining({"teacher": "teacher"}, found, 5)}
    assert said["teacher, rewrite, wrong walks"].n == 5
    assert said["teacher, hint"].value == 1.0
    first = wrong[0]
    assert messages[0] == f"{first.row['prompt']} tried {first.text} redo"
    assert f"{found[0].row['prompt']} given {found[0].row['solution']}" in messages


def test_recovery_starts_before_and_behind_the_first_error(
    messages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = properties.walk("student", rows("test", 60, seed=1))
    contexts: list[list[int]] = []

    def sample_ids(model: str, starts: list[list[int]], **how: Any) -> list[list[int]]:
        contexts.extend(starts)
        return [LANGUAGE.encode("stuck") for _ in starts]

    monkeypatch.setattr(properties, "sample_ids", sample_ids)
    said = {x.name: x for x in properties.recovery({"teacher": "teacher"}, found, 3)}
    assert len(said) == 4
    assert {x.value for x in said.values()} == {0.0}, "who is stuck does not get out"
    first = next(w for w in found if w.kind == HASTY)
    at = first_error_token(first.row["prompt"], first.tokens)
    assert at is not None
    start = LANGUAGE.context_ids(first.row["prompt"])
    assert contexts[0] == start + LANGUAGE.encode("".join(first.tokens[:at]))
    assert contexts[3] == start + LANGUAGE.encode("".join(first.tokens[: at + 1]))


def test_the_command_measures_models_of_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Random weights, walks of 40 tokens at most: nothing is right, and everything is counted."""
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    for role in WRITERS:
        config = Qwen3Config(
            **size, num_key_value_heads=1, head_dim=16, vocab_size=len(LANGUAGE.tokens),
            eos_token_id=LANGUAGE.ids["<eos>"], pad_token_id=0,
        )  # fmt: skip
        Qwen3ForCausalLM(config).save_pretrained(tmp_path / role)
    monkeypatch.setattr(properties, "LONGEST", 40)
    words = ["measure", "--task", "maze", "--models", str(tmp_path), "--scale", "0.01"]
    assert command.run([*words, "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "| test: teacher, greedy | 0.000 | 0.000 to 0.000 | 8 |" in shown
    assert (tmp_path / "out" / "properties.md").read_text() in shown
