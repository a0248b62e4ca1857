"""`onpath export`: what transformers loads from it is what the run has trained."""

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import onpath
from onpath.commands.cli import main
from onpath.config.whole import Config
from onpath.engines.models import quietly
from onpath.run import checkpoint, trained
from onpath.run.assemble import assemble
from onpath.run.optimizer import make_optimizer
from onpath.run.trained import find
from onpath.system.errors import UserError
from onpath.training import train
from tests.conftest import make_model

Tiny = Callable[..., Config]
IDS_BT = torch.tensor([[1, 5, 9, 13, 8, 3, 20]])


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS_BT).logits


def run_of(tiny: Tiny, **options: Any) -> tuple[Config, Path]:
    """Trained to step 4, with checkpoints of steps 2 and 4; loud enough for steps to differ."""
    config = tiny(optim__steps=4, optim__lr=2e-2, run__save_every=2, run__keep=9, data__eval={}, **options)
    return config, train(config, quiet=True).directory


def resumed(config: Config, run: Path, step: int) -> torch.Tensor:
    """Logits of the run's own model after a step, as resuming there has it."""
    kept = run.with_name("kept")
    shutil.copytree(run / "checkpoints" / f"step_{step}", kept / f"step_{step}")
    parts = assemble(config)
    optimizer, _ = make_optimizer(config, parts.models.student)
    assert checkpoint.load(kept, model=parts.models.student, optimizer=optimizer, extra=parts.method.state())
    shutil.rmtree(kept)
    return logits(parts.models.student)


FULL: dict[str, Any] = {}
LORA: dict[str, Any] = {"student__lora_rank": 4, "student__gradient_checkpointing": True}


@pytest.mark.parametrize("options", [FULL, LORA], ids=["full", "lora"])
def test_any_checkpoint_has_the_logits_of_the_runs_own_model(
    options: dict[str, Any], tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = run_of(tiny, **options)
    found = {}
    for step, source in ((2, run / "checkpoints" / "step_2"), (4, run / "checkpoints" / "step_4"), (4, run)):
        out = tmp_path / f"out-{source.name}"
        assert main(["export", str(source), str(out)]) == 0
        assert capsys.readouterr().out == f"model: {out}\n"
        assert not (out / "adapter_config.json").exists()
        model = AutoModelForCausalLM.from_pretrained(out)
        assert isinstance(model, PreTrainedModel)
        assert model.generation_config is not None
        assert model.generation_config.eos_token_id == 2
        expected, found[source.name] = resumed(config, run, step), logits(model)
        assert torch.allclose(found[source.name], expected, atol=1e-5 if options else 0), source
        tokenizer = AutoTokenizer.from_pretrained(out)
        assert tokenizer.decode(tokenizer("7+5=?")["input_ids"]).replace(" ", "") == "7+5=?"
        assert tokenizer.chat_template
    card = (out / "README.md").read_text("utf-8")
    assert "library_name: transformers" in card
    assert "Trained from `student` by" in card
    assert "adapter of" not in card
    assert (found["step_2"] - found["step_4"]).abs().max() > 0.05, "the steps must differ"
    assert torch.allclose(found["step_4"], found[run.name], atol=1e-5)


@pytest.mark.parametrize("options", [FULL, LORA], ids=["full", "lora"])
def test_what_is_exported_or_trained_on_ends_and_renders_as_the_run_does(
    options: dict[str, Any], tiny: Tiny, tmp_path: Path
) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}={% endfor %}")
    config = tiny(
        optim__steps=2, run__save_every=1, data__eval={}, rollout__stop_ids=[20],
        data__chat_template=str(template), **options,
    )  # fmt: skip
    run = train(config, quiet=True).directory
    for source in run / "checkpoints" / "step_1", run:
        out = onpath.export_model(source, tmp_path / f"out-{source.name}")
        model = AutoModelForCausalLM.from_pretrained(out)
        assert model.generation_config.eos_token_id == [2, 20]
        assert AutoTokenizer.from_pretrained(out).chat_template == template.read_text()
        renderer = assemble(tiny(student__model=str(source))).text.renderer
        assert renderer.tokenizer.chat_template == template.read_text()


def test_an_adapter_by_itself(tiny: Tiny, model_dirs: dict[str, Path], tmp_path: Path) -> None:
    config, run = run_of(tiny, **LORA)
    for step, source in ((2, run / "checkpoints" / "step_2"), (4, run)):
        out = onpath.export_model(source, tmp_path / f"adapter-{step}", adapter=True)
        described = json.loads((out / "adapter_config.json").read_text())
        assert described["base_model_name_or_path"] == str(model_dirs["student"])
        assert not (out / "model.safetensors").exists()
        base = AutoModelForCausalLM.from_pretrained(model_dirs["student"])
        with quietly():
            model = peft.PeftModel.from_pretrained(base, out)
        assert torch.allclose(logits(model), resumed(config, run, step), atol=1e-6)


def copied_base(model_dirs: dict[str, Path], path: Path) -> Path:
    return shutil.copytree(model_dirs["student"], path)


def test_an_adapters_base_may_move(tiny: Tiny, model_dirs: dict[str, Path], tmp_path: Path) -> None:
    """Its content counts, in the run's own dtype, wherever it lies and however it is loaded."""
    base = copied_base(model_dirs, tmp_path / "base")
    config, run = run_of(tiny, **LORA, student__model=str(base), student__dtype="bfloat16")
    expected = logits(AutoModelForCausalLM.from_pretrained(onpath.export_model(run, tmp_path / "before")))
    base.rename(tmp_path / "elsewhere")
    for told in (run / "config.yaml", run / "model" / "adapter_config.json"):
        told.write_text(told.read_text().replace(str(base), str(tmp_path / "elsewhere")))
    for step in (run, run / "checkpoints" / "step_4"):
        out = onpath.export_model(step, tmp_path / f"out-{step.name}")
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out)), expected)
        assert onpath.evaluate_model(step, data=config.data.train, limit=2, dtype="float32").results


def test_an_adapter_on_another_base_is_refused(
    tiny: Tiny, model_dirs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = copied_base(model_dirs, tmp_path / "base")
    config, run = run_of(tiny, **LORA, student__model=str(base))
    step = run / "checkpoints" / "step_2"
    onpath.export_model(step, tmp_path / "before")
    make_model(5).save_pretrained(base)
    capsys.readouterr()
    export, evaluate = ["export", str(tmp_path / "out")], ["eval", "--data", config.data.train, "--limit=2"]
    for source in (step, run):
        for command, *more in (export, evaluate):
            assert main([command, str(source), *more]) == 2
            said = capsys.readouterr().err
            assert f"tokenizer or chat template, than {base} has now" in said
            assert said.count("\n") == 1
        with pytest.raises(UserError, match="this adapter was trained on other weights"):
            assemble(tiny(student__model=str(source)))
    assert not (tmp_path / "out").exists()
    for file in base.glob("*.safetensors"):
        file.write_bytes((model_dirs["student"] / file.name).read_bytes())
    onpath.export_model(step, tmp_path / "after")


def test_without_a_final_model_the_newest_sound_checkpoint(tiny: Tiny, tmp_path: Path) -> None:
    config, run = run_of(tiny)
    shutil.rmtree(run / "model")
    (run / "checkpoints" / "step_4" / "state.json").write_text("{")
    out = onpath.export_model(run, tmp_path / "out")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out)), resumed(config, run, 2))
    with pytest.raises(UserError, match="step_4: this checkpoint is damaged"):
        onpath.export_model(run / "checkpoints" / "step_4", tmp_path / "four")
    (run / "checkpoints" / "step_2" / "method.safetensors").unlink()
    with pytest.raises(UserError, match="neither a final model nor a sound checkpoint"):
        onpath.export_model(run, tmp_path / "none")


def test_settings_of_the_run_that_no_longer_hold_do_not_matter(tiny: Tiny, tmp_path: Path) -> None:
    _, run = run_of(tiny, **LORA)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("name: opd", "name: gone"))
    assert (onpath.export_model(run, tmp_path / "out") / "config.json").is_file()


def test_what_cannot_be_exported_is_one_sentence(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, run = run_of(tiny)
    (tmp_path / "taken").mkdir()
    new = str(tmp_path / "new")
    for arguments, says in (
        ([str(run), str(tmp_path / "taken")], "taken is there already"),
        ([str(run), new, "--adapter"], "trained all weights"),
        ([str(tmp_path), new], "neither a run directory nor"),
        ([str(run / "checkpoints"), new], "neither a run directory nor"),
        ([str(run / "checkpoints" / "step_3"), new], "neither a run directory nor"),
        ([str(run / "model"), new], "neither a run directory nor"),
        ([str(run), str(run / "config.yaml" / "out")], "cannot write"),
    ):
        assert main(["export", *arguments]) == 2, arguments
        said = capsys.readouterr().err
        assert says in said
        assert said.count("\n") == 1
    for damage, says in (
        (
            lambda: (run / "config.yaml").write_text("student: {model: ./gone}\n"),
            "no directory ./gone",
        ),
        (lambda: (run / "config.yaml").write_text("a: ["), "not valid YAML"),
        (lambda: (run / "config.yaml").write_text("3"), "config.yaml: damaged"),
    ):
        damage()
        assert main(["export", str(run / "checkpoints" / "step_4"), new]) == 2
        assert says in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["runs", "taken"]


@pytest.mark.parametrize("options", [FULL, LORA], ids=["full", "lora"])
def test_a_full_disk_leaves_nothing(
    options: dict[str, Any], tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, run = run_of(tiny, **options)

    def full(self: Any, target: Path, **_: Any) -> None:
        Path(target).mkdir(parents=True)
        (Path(target) / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    with pytest.raises(UserError, match="out: cannot write: No space left on device"):
        onpath.export_model(run / "checkpoints" / "step_2", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["runs"]


def test_a_full_disk_is_one_reason_for_all_files(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the final model is copied: shutil lists each file that it could not."""
    _, run = run_of(tiny, **FULL)

    def full(source: str, target: str, **_: Any) -> None:
        raise OSError(28, "No space left on device", source, None, target)

    monkeypatch.setattr(shutil, "copytree", partial(shutil.copytree, copy_function=full))
    with pytest.raises(UserError, match="out: cannot write: No space left on device; free some space"):
        onpath.export_model(run, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["runs"]


@pytest.mark.parametrize("options", [FULL, LORA], ids=["full", "lora"])
def test_a_run_looked_at_from_elsewhere_has_the_tokenizer_of_its_model(
    options: dict[str, Any], tiny: Tiny, tmp_path: Path, data_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where `student.model: student` is no directory; a checkpoint has no tokenizer of its own."""
    config, run = run_of(tiny, **options)
    stored = run / "config.yaml"
    stored.write_text(stored.read_text().replace(config.student.model, "no-such-student"))
    known = AutoTokenizer.from_pretrained(config.student.model)
    found = find(run)
    assert found is not None
    asked = list[str]()
    with monkeypatch.context() as watched:
        watched.setattr(trained, "load_tokenizer", lambda s, key: asked.append(s.model) or known)
        found.tokenizer()
    assert asked == [str(run / "model")], "no hub is asked for what lies here"
    assert found.tokenizer().get_vocab() == known.get_vocab()
    done = onpath.evaluate_model(run, data=str(data_file), n=1, max_new_tokens=2, grader="exact", limit=2)
    assert done.results
    with pytest.raises(UserError, match="no-such-student"):
        onpath.export_model(run / "checkpoints" / "step_2", tmp_path / "out")


def test_an_adapter_upon_a_run_is_told_where_its_model_is(tiny: Tiny) -> None:
    """A checkpoint's base would be one that nobody else can load; the final model can be."""
    _, run = run_of(tiny, **LORA)
    with pytest.raises(UserError, match=re.escape(f"then student.model: OUT, or student.model: {run}/model")):
        onpath.train(tiny(student__model=str(run), student__lora_rank=2, run__name="upon"), quiet=True)
    at = str(run / "checkpoints" / "step_2")
    with pytest.raises(UserError, match=r"then student\.model: OUT$"):
        onpath.train(tiny(student__model=at, student__lora_rank=2, run__name="upon"), quiet=True)
    found = onpath.train(
        tiny(student__model=str(run / "model"), student__lora_rank=2, run__name="upon"), quiet=True
    )
    assert found.trained
