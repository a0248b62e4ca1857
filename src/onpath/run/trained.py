"""The models that a run has left: its final one, its best one, any of its checkpoints."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from onpath import config as configuration
from onpath.config import Config, Student
from onpath.engines import adapters
from onpath.engines.head import unwrapped
from onpath.engines.models import load_model, load_tokenizer, locate, model_directory
from onpath.engines.student import trainable
from onpath.run import checkpoint
from onpath.run.contents import digest_start
from onpath.run.inputs import with_template
from onpath.run.log import read_lines
from onpath.system.errors import UserError
from onpath.system.files import place
from onpath.system.reading import check_keys, json_lines, read_json

BEST = "best"
"""Directory of a run's best model (run.keep_best)."""
BEST_OF = "best.json"
"""In it: split, step and avg@n of the evaluation for which it is kept."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Weights of a run."""

    run: Path
    weights: Path
    """A directory of the run: `model` or `best` in Hugging Face format, or a checkpoint."""
    instead: bool = False
    """Whether the run was named, which has no sound final model, and this is its newest checkpoint."""

    def shown(self, name: str) -> str:
        """What people are told of it who named it so."""
        return f"{name} ({self.weights.relative_to(self.run)})" if self.instead else name

    @property
    def is_checkpoint(self) -> bool:
        """Whether transformers cannot load it by itself."""
        return self.weights.parent.name == "checkpoints"

    def steps(self) -> int:
        """Optimiser steps that the weights have seen.

        Raises:
            UserError: the record is damaged.
        """
        if self.is_checkpoint:
            return checkpoint.step_of(self.weights)
        record = self.weights / BEST_OF
        if record.is_file():
            return int(read_json(record, keys={"step": int})["step"])
        rows = read_lines(self.run / "metrics.jsonl")
        return int(rows[-1]["step"]) if rows else 0

    def stops(self) -> tuple[frozenset[int], tuple[str, ...]]:
        """Tokens and strings at which the run's responses end, as it has recorded them; none of a run that
        has not.

        Raises:
            UserError: the record is damaged.
        """
        path = self.run / "environment.jsonl"  # a line for each start
        rows = [row for _, _, row in json_lines(path)] if path.is_file() else []
        starts = [row["stops"] for row in rows if isinstance(row, dict) and "stops" in row]
        if not starts:
            return frozenset(), ()
        check_keys(starts[-1], {"ids": list, "strings": list}, where=f"{path}: stops")
        return frozenset(starts[-1]["ids"]), tuple(starts[-1]["strings"])

    def config(self, *sections: str, graded: bool = True) -> Config:
        """The run's student, and the sections asked for; the others, which may ask for what is gone, do not
        matter.

        Args:
            graded: False: the run's grader is not asked, so it may be gone too (a notebook's function).

        Raises:
            UserError: the run's config is damaged.
        """
        tree = self._tree()
        asked = {name: tree[name] for name in sections if name in tree}
        if not graded and isinstance(asked.get("eval"), dict):
            asked["eval"] = {k: v for k, v in asked["eval"].items() if k != "grader"}
        return self._built(tree, asked)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The student's, with the run's chat template; what was saved with a model where the start is gone,
        or is no directory here (a hub's, or named from elsewhere).

        Raises:
            UserError: it, or the template, is gone.
        """
        tree = self._tree()
        data = tree.get("data")
        template = data.get("chat_template") if isinstance(data, dict) else None
        config = self._built(tree, {"data": {"chat_template": template}})  # what else is there may be gone
        own = not self.is_checkpoint and (self.weights / "tokenizer_config.json").is_file()
        kept = config.student.model_copy(update={"model": str(self.weights)})
        if own and not Path(locate(config.student.model)).is_dir():  # a hub need not be asked
            return load_tokenizer(kept, "student.model")
        try:
            tokenizer = load_tokenizer(config.student, "student.model")
            with_template(config, tokenizer)
        except UserError:
            if not own:
                raise
            return load_tokenizer(kept, "student.model")
        return tokenizer

    def _tree(self) -> dict[str, Any]:
        path = self.run / "config.yaml"
        tree = configuration.read_yaml(path)
        if not isinstance(tree, dict):
            raise UserError(f"{path}: damaged, so its base model is not known")
        return tree

    def _built(self, tree: Mapping[str, Any], asked: Mapping[str, Any]) -> Config:
        student = {**(tree.get("student") or {}), "gradient_checkpointing": False}
        return configuration.build({**asked, "student": student}, source=str(self.run / "config.yaml"))


def find(source: str | Path) -> Trained | None:
    """What a path names: a run (its final model or else its newest sound checkpoint), its `best`, or one of
    its `checkpoints/step_N`. None: nothing of a run.

    Raises:
        UserError: a run without a model, or a damaged checkpoint.
    """
    path = place(source)
    if not path.is_dir():
        return None
    path = path.resolve()
    if (path / "config.yaml").is_file():
        if checkpoint.holds_model(path / "model"):
            return Trained(run=path, weights=path / "model")
        newest = _newest_sound(path)
        if newest is None:
            raise UserError(f"{path}: it has neither a final model nor a sound checkpoint yet")
        return Trained(run=path, weights=newest, instead=True)
    if path.name == BEST and (path.parent / "config.yaml").is_file():
        return Trained(run=path.parent, weights=path)
    run = path.parent.parent
    if path not in checkpoint.list_steps(path.parent) or not (run / "config.yaml").is_file():
        return None
    if not checkpoint.is_sound(path):
        raise UserError(f"{path}: this checkpoint is damaged or incomplete; take another one")
    return Trained(run=run, weights=path)


def _newest_sound(run: Path) -> Path | None:
    """A run's newest checkpoint of which every byte is what was written."""
    steps = reversed(checkpoint.list_steps(run / "checkpoints"))
    return next((path for path in steps if checkpoint.is_sound(path)), None)


def load_trained(found: Trained, section: Student | None = None, *, adapter: bool = False) -> Any:
    """The model, in evaluation mode, without gradients; a LoRA adapter merged.

    Args:
        section: dtype and device to load it with; None: the run's own dtype, on the CPU.
        adapter: keep the adapter apart (checkpoints only).

    Raises:
        UserError: its base model is gone, or is another one.
    """
    check_base(found)
    config = found.config()
    own = config.student if section is None else config.student.model_copy(update={"dtype": section.dtype})
    own = own.model_copy(update={"quantization": None})  # the adapter is merged into the base as it is
    device = torch.device("cpu")
    if not found.is_checkpoint:
        model: Any = load_model(own.model_copy(update={"model": str(found.weights)}), "source", device)
    else:
        config = config.model_copy(update={"student": own})
        model = trainable(config, load_model(own, "student.model", device))
        checkpoint.load_weights(found.weights, model)
        model = model.merge_and_unload() if isinstance(model, PeftModel) and not adapter else model
    ids, _ = found.stops()
    if len(ids) > 1:  # only a whole final model names them itself
        unwrapped(model).generation_config.eos_token_id = sorted(ids)
    return model


def check_base(found: Trained) -> None:
    """An adapter belongs to the very weights that it was trained on, and a path does not say what it holds.
    Not asked where the base lies beside the adapter, was quantised, or no checkpoint says what it was.

    Raises:
        UserError: the base is gone, or is another one.
    """
    config = found.config()
    section = config.student
    if not section.lora_rank or section.quantization is not None or adapters.own_base(found.weights):
        return
    step = found.weights if found.is_checkpoint else _newest_sound(found.run)
    told = None if step is None else checkpoint.inputs_of(step).get("student.model")
    if told is None:
        return
    where = section.model if found.is_checkpoint else model_directory(str(found.weights), "source")
    base = load_model(section.model_copy(update={"model": where}), "student.model", torch.device("cpu"))
    if digest_start(trainable(config, base), found.tokenizer(), adapted=True) != told:
        raise UserError(
            f"{found.weights}: this adapter was trained on other weights, or with another tokenizer or chat "
            f"template, than {where} has now; bring back what was there"
        )


def load_start(
    section: Student, found: Trained | None, key: str, device: torch.device, *, shards: bool = False
) -> PreTrainedModel:
    """A model as `load_model` gives it, which may also be a checkpoint of a run, or the run itself.

    Args:
        found: what `find` says of `section.model`; it reads whole checkpoints, so it is asked once.
        shards: it is to be sharded.

    Raises:
        UserError: nothing readable there; or a checkpoint is to get an adapter, which would name a base that
            is not what it was trained on.
    """
    if found is None:
        return load_model(section, key, device, shards=shards)
    if section.lora_rank:
        whole = f", or {key}: {found.weights}, which others can load" if found.weights.name == "model" else ""
        raise UserError(
            f"{key}: an adapter (student.lora_rank) needs a base that others can load: onpath export "
            f"{section.model} OUT, then {key}: OUT{whole}"
        )
    model: PreTrainedModel = load_trained(found, section).eval().requires_grad_(False)
    nn.Module.to(model, device)
    return model


def load_its_tokenizer(section: Student, found: Trained | None, key: str) -> PreTrainedTokenizerBase:
    """The tokenizer of what `load_start` loads, with the chat template that its run had."""
    return load_tokenizer(section, key) if found is None else found.tokenizer()
