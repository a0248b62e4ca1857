"""The best weights, early stopping, and the card beside them."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import onpath
import onpath.training as training
from onpath.config import Config
from onpath.run.log import read_lines
from onpath.system.errors import UserError
from onpath.training import train
from tests.run.test_changes import stop_before
from tests.stored import read_trajectories

Tiny = Callable[..., Config]
WATCHED: dict[str, Any] = {
    "optim__steps": 6,
    "optim__lr": 2e-2,
    "eval__every": 1,
    "eval__start": True,
    "run__keep_best": "test",
    "run__save_every": 1,
    "run__keep": 9,
}


def scored(monkeypatch: pytest.MonkeyPatch, scores: Sequence[float]) -> None:
    """Evaluations give these numbers, by step."""
    real = training.evaluate_all

    def evaluated(parts: Any, run: Any, display: Any, *, step: int) -> Any:
        results = [replace(r, avg_at_k=scores[step]) for r in real(parts, run, display, step=step)]
        rows = [row for row in read_lines(run.evals.path) if row["step"] != step]
        run.evals.path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for result in results:
            run.evals.write(result.to_json())
        return results

    monkeypatch.setattr(training, "evaluate_all", evaluated)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def same(one: Path, two: Path) -> bool:
    return all(torch.equal(v, weights(two)[k]) for k, v in weights(one).items())


def test_the_best_weights_are_kept_and_a_stalled_run_ends(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scored(monkeypatch, [0.1, 0.3, 0.5, 0.5, 0.2, 0.9, 0.9])
    result = train(tiny(**WATCHED, run__stop_after=2, run__trajectories_every=100))
    assert (
        "2 evaluations were no better on test than 50.0%: the run ends at step 4" in capsys.readouterr().err
    )
    assert (result.steps, [row["step"] for row in result.evaluations]) == (4, [4])
    steps = result.directory / "checkpoints"
    assert same(result.directory / "best", steps / "step_2")
    stored = sorted(p.stem for p in (result.directory / "trajectories").glob("*.parquet"))
    assert stored == ["step_000001", "step_000004"], "its first and its last"
    assert all("student_top_tokens" in row for row in read_trajectories(result.directory))
    assert same(result.model, steps / "step_4")
    assert not same(result.model, result.directory / "best")
    assert onpath.export_model(result.directory / "best", result.directory / "out")
    assert train(tiny(**WATCHED, run__stop_after=2), quiet=True).trained is False


@pytest.mark.parametrize("killed", [1, 3])
def test_a_watched_run_that_is_killed_ends_like_the_one_that_was_not(
    killed: int, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored(monkeypatch, [0.1, 0.3, 0.5, 0.5, 0.2, 0.9, 0.9])
    options = {**WATCHED, "run__stop_after": 2, "run__save_every": 3}
    whole = train(tiny(**options, run__name="whole"), quiet=True)
    config = tiny(**options)
    stop_before(killed, monkeypatch, config)
    again = train(config, quiet=True)
    assert again.steps == whole.steps == 4
    for name in ("best", "model"):
        assert same(again.directory / name, whole.directory / name)


def test_watching_from_the_middle_on_changes_no_weight(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was not kept before is not the best; the weights of the end are those of the unwatched run."""
    scored(monkeypatch, [0.9, 0.8, 0.1, 0.3, 0.2, 0.2, 0.2])
    plain = {**WATCHED, "run__keep_best": None}
    whole = train(tiny(**plain, run__name="whole"), quiet=True)
    stop_before(2, monkeypatch, tiny(**plain))
    watched = train(tiny(**WATCHED, run__stop_after=3), quiet=True)
    assert watched.steps == 6
    assert same(watched.model, whole.model)
    assert same(watched.directory / "best", watched.directory / "checkpoints" / "step_3")
    rules = {line["key"]: line["rule"] for line in read_lines(watched.directory / "changes.jsonl")}
    assert rules == {"run.keep_best": "neutral", "run.stop_after": "neutral"}


def test_a_stalled_run_says_so_and_can_go_on(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """More steps alone are no remedy, and leave its model where it is."""
    scored(monkeypatch, [0.1, 0.5, 0.2, 0.2, 0.2, 0.9, 0.9, 0.9])
    stopped = {**WATCHED, "run__stop_after": 1}
    directory = train(tiny(**stopped), quiet=True).directory
    for steps in (6, 7):
        assert not train(tiny(**{**stopped, "optim__steps": steps})).trained
        said = capsys.readouterr().err
        assert f"was finished before, at step 2 of {steps}, where run.stop_after ended it: nothing" in said
        assert "with run.stop_after: 0 it goes on" in said
        assert not [*directory.glob("model_step_*")]
    result = train(tiny(**{**stopped, "run__stop_after": 0}), quiet=True)
    assert (result.steps, result.trained) == (6, True)
    assert same(directory / "model_step_2", directory / "checkpoints" / "step_2")
    whole = train(tiny(**{**stopped, "run__stop_after": 0}, run__name="whole"), quiet=True)
    assert same(result.model, whole.model)


def test_what_was_best_on_another_set_is_not_the_best(
    tiny: Tiny, data_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor are weights of a step that comes again with other options."""
    scored(monkeypatch, [0.1, 0.9, 0.4, 0.3, 0.2, 0.2, 0.2])
    options = {**WATCHED, "data__eval": {"test": str(data_file), "other": str(data_file)}}

    def told(directory: Path) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((directory / "best" / "best.json").read_text())
        return found

    run = stop_before(2, monkeypatch, tiny(**options))
    assert told(run) == {"split": "test", "step": 1, "avg_at_k": 0.9}
    other = {**options, "run__keep_best": "other"}
    stop_before(4, monkeypatch, tiny(**other))
    assert told(run) == {"split": "other", "step": 3, "avg_at_k": 0.3}
    assert same(run / "best", run / "checkpoints" / "step_3")
    for step in (3, 4):
        shutil.rmtree(run / "checkpoints" / f"step_{step}")
    scored(monkeypatch, [0.1, 0.9, 0.1, 0.2, 0.1, 0.1, 0.1])
    result = train(tiny(**{**other, "optim__lr": 1e-2}), resume_with_changes=True, quiet=True)
    assert told(result.directory) == {"split": "other", "step": 3, "avg_at_k": 0.2}
    assert same(run / "best", run / "checkpoints" / "step_3")


def test_best_weights_of_before_a_change_are_disowned(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the process that takes the change, for those that come after it: it may end before it evaluates."""
    scored(monkeypatch, [0.1, 0.3, 0.9, 0.4, 0.0, 0.0, 0.0])
    options = {**WATCHED, "run__keep": 9}
    run = stop_before(3, monkeypatch, tiny(**options))
    for step in (2, 3):
        shutil.rmtree(run / "checkpoints" / f"step_{step}", ignore_errors=True)
    changed = tiny(**{**options, "optim__lr": 1e-2})
    stop_before(1, monkeypatch, changed, flag=True)
    scored(monkeypatch, [0.1, 0.3, 0.2, 0.25, 0.28, 0.2, 0.2])
    train(changed, quiet=True)
    told = json.loads((run / "best" / "best.json").read_text())
    assert told == {"split": "test", "step": 4, "avg_at_k": 0.28}
    assert same(run / "best", run / "checkpoints" / f"step_{told['step']}")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"run__keep_best": "valid"}, "run.keep_best is 'valid'; it must be a set of data.eval: test"),
        ({"run__stop_after": 2}, "run.stop_after compares evaluations: set run.keep_best"),
        ({"run__stop_after": 2, "run__keep_best": "test"}, "and eval.every"),
    ],
)
def test_what_cannot_be_compared_is_said(options: dict[str, Any], says: str, tiny: Tiny) -> None:
    with pytest.raises(UserError) as error:
        tiny(**options)
    assert says in str(error.value)


def test_a_card_says_that_rows_were_given_in_python(tiny: Tiny) -> None:
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(4)]
    config = tiny(optim__steps=1, rollout__prompts=2)
    result = train(config, train_dataset=rows, eval_dataset={"mine": rows}, quiet=True)
    text = (result.model / "README.md").read_text()
    assert "| data | `rows given in Python`, 4 problems |" in text
    assert "mine: rows given in Python" in text
    assert "passed." not in text


@pytest.mark.parametrize("rank", [0, 2], ids=["full", "lora"])
def test_a_card_says_what_was_done_and_names_no_local_path(rank: int, tiny: Tiny, tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    config = tiny(
        student__lora_rank=rank,
        student__lora_merge=bool(rank),
        eval__start=True,
        teacher__cache=str(tmp_path / "scores"),
        data__chat_template=str(template),
    )
    result = train(config, quiet=True)
    for directory in (result.model, *([result.directory / "merged"] if rank else [])):
        text = (directory / "README.md").read_text()
        _, head, body = text.split("---\n", 2)
        assert "on-policy-distillation" in yaml.safe_load(head)["tags"]
        assert yaml.safe_load(head)["library_name"] == (
            "peft" if rank and directory == result.model else "transformers"
        )
        for expected in ("`opd`, `reverse_kl`", "`teacher`", "`sums.jsonl`, 40 problems", "onpath train"):
            assert expected in body
        final = result.evaluations[0]
        assert f"| 3 | @2 {final['avg_at_k']:.1%} |" in body
        assert f"lr: {config.optim.lr}" in body
        for private in (str(tmp_path), "/tmp", config.student.model, config.data.train, str(Path.cwd())):
            assert private not in text
        assert "chat_template: mine.jinja" in body
