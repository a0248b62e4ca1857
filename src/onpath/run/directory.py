"""A run's directory: opened or gone on with, its files, its checkpoints, its final model."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from onpath import config as configuration
from onpath.config.build import Config
from onpath.engines.models import quietly
from onpath.run import checkpoint
from onpath.run.environment import environment
from onpath.run.log import Display, JsonLines, Tracker, check_trackers, flatten, open_trackers, read_lines
from onpath.run.meter import Meter
from onpath.run.parts import Parts
from onpath.system import distributed
from onpath.system.errors import UserError
from onpath.system.files import lock, remove_leftovers, write_text, written
from onpath.system.reading import read_yaml


@dataclass(kw_only=True)
class Run:
    """The files of one run. Only the first process writes."""

    directory: Path
    parts: Parts
    metrics: JsonLines
    evals: JsonLines
    trackers: list[Tracker] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    held: int | None = None
    """The lock on the directory."""

    @property
    def finished(self) -> bool:
        """Whether the final model is there: it is written last."""
        return checkpoint.holds_model(self.directory / "model")

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds beside trained weights and optimiser."""
        parts = self.parts
        follows = parts.overlap.state() if parts.overlap else {}
        return {**parts.method.state(), **parts.models.teacher.state(), **follows}

    def close(self) -> None:
        """Lets the trackers write what they hold, and waits for what is being sampled."""
        if self.parts.overlap:
            self.parts.overlap.close()
        for tracker in self.trackers:
            tracker.close()
        if self.held is not None:
            os.close(self.held)

    def note(self, sentence: str) -> None:
        """What people should know before the first step; nothing is no note."""
        if sentence:
            self.notes.append(sentence)

    def resume(self, optimizer: torch.optim.Optimizer) -> int:
        """Steps done by earlier processes; weights, optimiser and files are set back to there."""
        loaded = checkpoint.load(
            self.directory / "checkpoints",
            model=self.parts.models.student,
            optimizer=optimizer,
            extra=self.state(),
        )
        done = loaded.step if loaded else 0
        if loaded:
            self.notes.append(f"going on from {loaded.path} (step {done})")
            self.notes += [
                f"checkpoint {name} is damaged or incomplete and was passed over" for name in loaded.broken
            ]
        if distributed.rank() == 0:
            self.metrics.rewind(step=done)
            self.evals.rewind(step=done if done else -1)
        if loaded:
            self.parts.generators.student.sync_weights(done)
        return done

    def announce(self, display: Display, done: int) -> None:
        """What people should know before the first step."""
        config = self.parts.config
        if self.parts.prompts.skipped:
            self.notes.append(f"{self.parts.prompts.skipped} bad rows of {config.data.train} were skipped")
        for warning in self.parts.warnings:
            display.say(f"warning: {warning}")
        for note in self.notes:
            display.say(note)
        display.say(
            f"{config.run.name}: {config.method.name}, {len(self.parts.prompts.pool):,} prompts, steps "
            f"{done + 1} to {config.optim.steps} → {self.directory}"
        )

    def log(self, step: int, meter: Meter, *, lr: float) -> dict[str, Any]:
        """The step's line of metrics.jsonl."""
        row = {"step": step, **meter.row(self.parts.models.device), "lr": lr, "policy_version": step}
        versions = [r.policy_version for r in meter.rollouts]
        row["staleness"] = step - 1 - min(versions) if versions else None
        if distributed.rank() == 0:
            self.metrics.write(row)
            for tracker in self.trackers:
                tracker.log(flatten({k: v for k, v in row.items() if k != "step"}), step)
        return row

    def checkpoint(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Saves the complete state, then removes old ones."""
        if distributed.rank() == 0:
            root = self.directory / "checkpoints"
            checkpoint.save(
                root,
                step=step,
                model=self.parts.models.student,
                optimizer=optimizer,
                extra=self.state(),
            )
            checkpoint.prune(root, keep=self.parts.config.run.keep)
        distributed.barrier()

    def save_model(self) -> Path:
        """Final weights: complete or not at all.

        Raises:
            UserError: nothing was trained.
        """
        if distributed.rank() == 0:
            self.check_trained()
        target, config = self.directory / "model", self.parts.config
        if distributed.rank() == 0 and not checkpoint.holds_model(target):
            if config.student.lora_merge and config.student.lora_rank:
                self._save(self.directory / "merged", merged=True)
            self._save(target, merged=False)
        distributed.barrier()
        return target

    def check_trained(self) -> None:
        """A run in which no trajectory was ever kept has nothing to show.

        Raises:
            UserError: it is one.
        """
        rows = read_lines(self.metrics.path)
        if rows and not any(row["tokens"] for row in rows):
            raise UserError(
                f"{self.directory}: in none of {len(rows):,} steps was a trajectory kept, so nothing was "
                "trained and no model is written; the column `reason` of trajectories/ says why"
            )

    def _save(self, target: Path, *, merged: bool) -> None:
        model: Any = self.parts.models.student
        with quietly(), written(target, also=(SafetensorError,)) as temporary:
            if merged:
                model.merge_adapter()
                plain = model.get_base_model()
                state = {
                    k.replace(".base_layer", ""): v for k, v in plain.state_dict().items() if "lora_" not in k
                }
                plain.save_pretrained(temporary, state_dict=state)
                model.unmerge_adapter()
            else:
                model.save_pretrained(temporary)
            self.parts.text.renderer.tokenizer.save_pretrained(temporary)


def open_run(config: Config, parts: Parts) -> Run:
    """Makes the run's directory, or checks that the one there belongs to this config.

    Raises:
        UserError: it belongs to another config (the differing keys are named), or cannot be written.
    """
    directory = Path(config.run.dir) / config.run.name
    check_trackers(config.run.trackers)
    held = None
    if distributed.rank() == 0:
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run.dir: cannot write to {directory}: {error.strerror or error}") from None
        held = lock(directory)
        try:
            _prepare(directory, parts)
        except BaseException:
            os.close(held)
            raise
    distributed.barrier()
    run = Run(
        directory=directory,
        parts=parts,
        metrics=JsonLines(directory / "metrics.jsonl"),
        evals=JsonLines(directory / "eval.jsonl"),
        held=held,
    )
    if distributed.rank() == 0 and not run.finished:
        run.trackers = open_trackers(
            config.run.trackers,
            directory=directory,
            name=config.run.name,
            config=config.model_dump(mode="json"),
        )
    return run


def _prepare(directory: Path, parts: Parts) -> None:
    try:
        _claim(directory, parts.config)
    except OSError as error:
        raise UserError(f"run.dir: cannot write to {directory}: {error.strerror or error}") from None
    remove_leftovers(directory)
    write_text(directory / "environment.json", json.dumps(environment(parts), indent=1) + "\n")


def _claim(directory: Path, config: Config) -> None:
    path = directory / "config.yaml"
    if not path.exists() or not _begun(directory):
        write_text(path, config.to_yaml())
        return
    theirs, ours = configuration.resolved(_read(path)), config.model_dump(mode="json")
    differing = [k for k in sorted({*_keys(theirs), *_keys(ours)}) if _at(theirs, k) != _at(ours, k)]
    if differing:
        key = differing[0]
        raise UserError(
            f"{directory} belongs to a run with another config (keys that differ: {len(differing)}, "
            f"first {key}: {_at(theirs, key)!r} there, {_at(ours, key)!r} here); choose another run.name or "
            "remove it"
        )


def _begun(directory: Path) -> bool:
    """Whether a run left more there than its settings: one that failed before its first step has not."""
    return any(
        p.name not in ("config.yaml", "environment.json") and not p.name.startswith(".")
        for p in directory.iterdir()
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = read_yaml(path)
    except UserError:
        tree = None
    if not isinstance(tree, dict) or not all(isinstance(options, dict) for options in tree.values()):
        raise UserError(f"{path}: damaged; choose another run.name or remove the directory")
    return tree


def _keys(tree: dict[str, Any]) -> list[str]:
    return [f"{section}.{key}" for section, options in tree.items() for key in options]


def _at(tree: dict[str, Any], dotted: str) -> Any:
    section, _, key = dotted.partition(".")
    return (tree.get(section) or {}).get(key)
