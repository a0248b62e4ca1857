"""`onpath export`: a Hugging Face model directory of a run or of any of its checkpoints."""

import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError

from onpath import config as configuration
from onpath.config import Config
from onpath.engines import adapters
from onpath.engines.models import load_model, load_tokenizer, quietly
from onpath.engines.student import trainable
from onpath.run import checkpoint
from onpath.system.errors import UserError
from onpath.system.files import written


def export_model(source: str | Path, out: str | Path, *, adapter: bool = False) -> Path:
    """Writes a model that `AutoModelForCausalLM.from_pretrained(out)` loads by itself, with its tokenizer.

    Whole or not at all. A LoRA adapter is merged into the weights of its base.

    Args:
        source: a run directory, of which the final model is taken or, while there is none, the newest sound
            checkpoint; or one of its `checkpoints/step_N`.
        out: a directory that does not exist.
        adapter: of a LoRA run, the adapter alone, not merged.

    Returns:
        `out`.

    Raises:
        UserError: no run or checkpoint there, a damaged one, no adapter, a base model that is gone, or `out`
            exists or cannot be written.
    """
    target = Path(out)
    if target.exists():
        raise UserError(f"{target} is there already; name a directory that is not")
    run, weights = _located(Path(source).expanduser().resolve())
    config = _student_of(run)
    if adapter and not config.student.lora_rank:
        raise UserError(f"{run}: this run trained all weights, so it has no adapter")
    final = weights == run / "model"
    if final and (adapter or not config.student.lora_rank):
        with written(target) as temporary:
            shutil.copytree(weights, temporary)
            adapters.name_base(temporary, home=target)
        return target
    if final:  # an adapter, which loads merged
        own = config.student.model_copy(update={"model": str(weights)})
        model: Any = load_model(own, "source", torch.device("cpu"))
    else:
        model = trainable(config, load_model(config.student, "student.model", torch.device("cpu")))
        checkpoint.load_weights(weights, model)
        model = model.merge_and_unload() if isinstance(model, PeftModel) and not adapter else model
    tokenizer = load_tokenizer(config.student, "student.model")
    with quietly(), written(target, also=(SafetensorError,)) as temporary:
        adapters.save(model, temporary, home=target)
        tokenizer.save_pretrained(temporary)
    return target


def _located(source: Path) -> tuple[Path, Path]:
    """The run, and its directory that holds the weights."""
    if (source / "config.yaml").is_file():
        if (source / "model").is_dir():
            return source, source / "model"
        sound = (p for p in reversed(checkpoint.list_steps(source / "checkpoints")) if checkpoint.is_sound(p))
        newest = next(sound, None)
        if newest is None:
            raise UserError(f"{source}: it has neither a final model nor a sound checkpoint yet")
        return source, newest
    run = source.parent.parent
    if source not in checkpoint.list_steps(source.parent) or not (run / "config.yaml").is_file():
        raise UserError(f"{source}: neither a run directory nor one of its checkpoints/step_N")
    if not checkpoint.is_sound(source):
        raise UserError(f"{source}: this checkpoint is damaged or incomplete; export another one")
    return run, source


def _student_of(run: Path) -> Config:
    """The run's `student`; its other sections, which may ask for what is gone, do not matter here."""
    path = run / "config.yaml"
    tree = configuration.read_yaml(path)
    if not isinstance(tree, dict):
        raise UserError(f"{path}: damaged, so its base model is not known")
    student = {**(tree.get("student") or {}), "gradient_checkpointing": False}
    return configuration.build({"student": student}, source=str(path))
