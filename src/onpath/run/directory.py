"""A run's directory: its files, its checkpoints, its final model. `open_run` (opening.py) makes one."""

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from onpath.config.changes import Change
from onpath.config.idle import idle_alone
from onpath.config.whole import Config
from onpath.engines import adapters
from onpath.engines.head import sharded
from onpath.engines.models import quietly
from onpath.engines.sharding import give_back
from onpath.evaluate.scores import EvalResult
from onpath.run import checkpoint
from onpath.run.best import Best
from onpath.run.card import model_card
from onpath.run.checkpoint import Saving
from onpath.run.contents import differing
from onpath.run.log import (
    Display,
    JsonLines,
    Tracker,
    close_trackers,
    flatten,
    read_lines,
    tell,
)
from onpath.run.meter import Meter
from onpath.run.method_state import MethodState
from onpath.run.optimizer import rate
from onpath.run.parts import Parts
from onpath.run.refresh import Refreshed, forget_phases
from onpath.run.trained import BEST_OF
from onpath.system import distributed
from onpath.system.errors import UserError
from onpath.system.files import unwritable, write_text, written
from onpath.system.signals import Interrupted, Requests, Stopped
from onpath.system.streams import say
from onpath.system.text import one_line

_PARTS_WRITTEN = 10.0
"""Seconds that a run which ends before its time waits for the other processes' parts of a checkpoint."""
_ALONE = 60.0
"""Likewise where all have heard that it ends, each when it comes to its next exchange."""
_STORED = re.compile(r"(?:.*_)?step_(\d+)\.(?:jsonl|parquet)")
"""Files of one step, in trajectories/ and evals/."""
_OF_AN_END = {"optim.steps", "run.stop_after", "run.keep_best"}
"""Options that say where a run ends."""
_ASKED = "data.eval."
"""Options whose content a model is asked, not made of, begin so (by the grader some methods choose)."""


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a finished run leaves."""

    directory: Path
    """The run's directory; its files are listed in docs/running.md."""
    model: Path
    """Final weights in Hugging Face format (a LoRA run: the adapter)."""
    steps: int
    evaluations: tuple[dict[str, Any], ...]
    """The final step's lines of eval.jsonl, one per evaluation set."""
    trained: bool = field(default=True, compare=False)
    """False: an earlier process had finished the run, and this one did nothing."""


@dataclass(kw_only=True)
class Run:
    """The files of one run. Only the first process writes."""

    directory: Path
    parts: Parts
    metrics: JsonLines
    evals: JsonLines
    trackers: list[Tracker] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Digests of data and starting weights, by option."""
    changes: tuple[Change, ...] = ()
    """Options that an earlier process of this run had with other values."""
    with_changes: bool = False
    """Whether the run goes on whatever has changed."""
    reopened: bool = False
    """Whether it was finished, and is to go on."""
    held: int | None = None
    """The lock on the directory."""
    saving: checkpoint.Saving | None = None
    """The checkpoint that is being written."""

    def __post_init__(self) -> None:
        self.method_state = MethodState(self.parts.method, of=self.parts.config.method.name)
        self.best = Best.of_run(self.directory, self.evals, self.parts.config.run)

    @property
    def finished(self) -> bool:
        """Whether the final model is there: it is written last."""
        return checkpoint.holds_model(self.directory / "model") and not self.reopened

    @property
    def last_step(self) -> int:
        """The last step that has its line; where the lines are lost, the last one that has a checkpoint."""
        if rows := read_lines(self.metrics.path):
            return int(rows[-1]["step"])
        kept = checkpoint.list_steps(self.directory / "checkpoints")
        return checkpoint.step_of(kept[-1]) if kept else self.parts.config.optim.steps

    def reopens(self) -> bool:
        """Whether a run that was finished is to go on: it has more steps, or no longer stalls.

        Raises:
            UserError: no checkpoint is left, or nothing says where it ended.
        """
        keys, last = {change.key for change in self.changes}, self.last_step
        if not keys & _OF_AN_END or not self.finished:
            return False
        if not read_lines(self.metrics.path) and not checkpoint.list_steps(self.directory / "checkpoints"):
            raise UserError(
                f"{self.metrics.path}: its lines are lost, and no checkpoint is left that says where the run "
                "ended; choose another run.name, with its model as student.model"
            )
        if last == self.parts.config.optim.steps:
            return False
        self.best.value, self.best.since = self.best.read()
        if self.best.stalled:
            return False
        if not checkpoint.list_steps(self.directory / "checkpoints"):
            raise UserError(
                f"{self.directory}: finished after {last} steps, and no checkpoint is left to go on from; "
                "choose another run.name, with its model as student.model"
            )
        return True

    def check_made_of(self) -> None:
        """Whether a finished run was made of what its options name now; what it is only asked may be other.

        Raises:
            UserError: its training data or models are others.
        """
        kept = checkpoint.list_steps(self.directory / "checkpoints")
        before: Mapping[str, str] = {}
        with suppress(UserError):  # what a finished run holds of checkpoints may be damaged: nobody needs it
            before = checkpoint.inputs_of(kept[-1]) if kept else {}
        self._refuse_others([key for key in differing(before, self.inputs) if not key.startswith(_ASKED)])

    def _refuse_others(self, others: Sequence[str]) -> None:
        """A run whose options name another content than they did, unless it was allowed."""
        if others and not self.with_changes:
            raise UserError(
                f"{self.directory} was begun with another content of {' and '.join(others)} than "
                f"{_named(self.parts.config, others[0])} has now; bring it back or choose another run.name "
                "(or go on all the same with --resume-with-changes)"
            )

    def say_finished(self, *, quiet: bool) -> None:
        """What an earlier process has finished is not trained again."""
        if quiet or distributed.rank() > 0:
            return
        steps, last = self.parts.config.optim.steps, self.last_step
        where, advice = "", ""
        if last < steps:
            where = f", at step {last} of {steps}, where run.stop_after ended it"
            advice = "; with run.stop_after: 0 it goes on"
        student = self.parts.config.student
        if student.lora_merge and student.lora_rank and not (self.directory / "merged").is_dir():
            advice += f"; student.lora_merge comes too late: onpath export {self.directory} OUT merges it"
        say(f"{self.directory} was finished before{where}: nothing is trained{advice}")

    def result(self, *, trained: bool) -> RunResult:
        """What there is now."""
        steps = self.last_step
        lines = [row for row in read_lines(self.evals.path) if row["step"] == steps]
        return RunResult(
            directory=self.directory,
            model=self.directory / "model",
            steps=steps,
            evaluations=tuple(lines),
            trained=trained,
        )

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds beside trained weights and optimiser."""
        parts = self.parts
        follows = parts.overlap.state() if parts.overlap else {}
        return {**parts.method.state(), **parts.models.teacher.state(), **follows}

    def close(self) -> None:
        """Lets the trackers write what they hold, and waits for what is being sampled and saved."""
        with ExitStack() as ending:  # each, whatever becomes of those before it; the lock last
            if self.held is not None:
                ending.callback(os.close, self.held)
            ending.callback(close_trackers, self.trackers)
            ending.callback(self.parts.close)
            ending.callback(self._end_saving)

    def _end_saving(self) -> None:
        """The run ends before its time: what is finished is to be saved all the same."""
        if self.saving is None:
            return
        try:
            self.saving.wait(patience=_PARTS_WRITTEN)
        except Exception as error:
            say(f"onpath: the checkpoint that was being written is lost: {one_line(str(error))}")

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
        distributed.first_decides(lambda: self._accept(done, loaded.inputs if loaded else {}))
        self.reopened = False
        if loaded:
            self.notes.append(f"going on from {loaded.path} (step {done})")
            self.notes += [
                f"checkpoint {name} is damaged or incomplete and was passed over" for name in loaded.broken
            ]
        if distributed.rank() == 0:
            evaluated = done if done else -1
            self.metrics.rewind(step=done)
            self.evals.rewind(step=evaluated)
            _forget((self.directory / "trajectories").glob("step_*"), after=done)
            _forget((self.directory / "evals").glob("*_step_*"), after=evaluated)
        self.best.recall()
        if loaded:
            self.parts.generators.student.sync_weights(done)
        return done

    def _accept(self, done: int, inputs: Mapping[str, str]) -> None:
        """Goes on after `done` steps with what has changed, and records it.

        Args:
            inputs: what the checkpoint was made with; empty: it does not say. An option that one side alone
                names is another.

        Raises:
            UserError: data or models are others, or more steps are done than asked for.
        """
        config = self.parts.config
        if done > config.optim.steps:
            raise UserError(
                f"{self.directory} has done {done} steps already; set optim.steps to more than that"
            )
        refreshed = self.parts.refreshed
        kept = {} if refreshed is None else refreshed.made_of()
        inputs = inputs or kept  # before the first checkpoint there may be rollouts already
        others = differing(inputs, self.inputs)
        self._refuse_others(others)
        # Nothing is refused from here on.
        if others or any(change.rule in ("asked", "longer") for change in self.changes):
            self.best.disown(done)
        if refreshed is not None:
            self._keep_phases(refreshed, done, moved=bool(differing(kept or inputs, self.inputs)))
        if self.reopened:
            _set_aside(self.directory, self.last_step)
        found = [vars(change) for change in self.changes]
        found += [
            {"key": k, "before": inputs.get(k), "after": self.inputs.get(k), "rule": "asked"} for k in others
        ]
        lines = JsonLines(self.directory / "changes.jsonl")
        for change in found:
            lines.write({"step": done, **change})
        if self.changes:
            write_text(self.directory / "config.yaml", config.to_yaml())
        self.notes += [_note(change, config, done) for change in self.changes]
        self.notes += [f"{key} is other than before step {done}, as you allow" for key in others]

    def _keep_phases(self, refreshed: Refreshed, done: int, *, moved: bool) -> None:
        """Those that the run as it is now would have made, from the same weights and inputs; what it is made
        of now is recorded for the next ones.

        Args:
            done: steps of the checkpoint; a phase that began before it goes on, as its rule says.
            moved: other data or models than the kept phases were made of.
        """
        rules = {change.rule for change in self.changes}
        # A longer run has other weights only after the checkpoint; what begins there is of its very weights.
        first = done if moved or "asked" in rules else done + 1 if "longer" in rules else None
        if first is not None and forget_phases(refreshed.root, first):
            self.notes.append(f"rollouts from step {first + 1} on are made anew: those kept are of before")
        refreshed.record(self.inputs)

    def evaluates_first(self, done: int) -> bool:
        """Whether an evaluation is due before another step: of the start; or of the last step, where an
        earlier process was not asked for it, or has not ended it."""
        config = self.parts.config
        if done == 0:
            return config.eval.start
        lines = distributed.first_decides(lambda: read_lines(self.evals.path))
        seen = {row["split"] for row in lines if row["step"] == done}
        ends = done == config.optim.steps or self.best.stalled
        if not (ends or config.eval.falls_on(done)) or config.evaluations.keys() <= seen:
            return False
        if distributed.rank() == 0:
            self.evals.rewind(step=done - 1)  # some sets were done: all are, in one go
        self.best.recall()
        return True

    def steps_left(self, done: int) -> Iterator[int]:
        """Steps (from 0) after those that are done, until the run stalls."""
        for step in range(done, self.parts.config.optim.steps):
            if self.best.stalled:
                return
            if self.saving is not None and self.saving.ended:
                self.settle()  # a full disk is said now, not at the next checkpoint
            yield step

    def judge(self, display: Display, results: Sequence[EvalResult]) -> bool:
        """Keeps the weights if they did better than any before them.

        Returns:
            Whether the run has stalled.
        """
        best = self.best
        for result in results:
            if result.split != self.parts.config.run.keep_best:
                continue
            if best.beaten_by(result):
                self._save(best.weights, merged=False, step=result.step, told=best.record(result))
                distributed.barrier()
            if best.stalled:
                display.say(
                    f"{best.since} evaluations were no better on {result.split} than {best.value:.1%}: the "
                    f"run ends at step {result.step}; its best weights are in {best.weights}"
                )
        return best.stalled

    def leave(self, asked: Requests, step: int) -> None:
        """Ends the process, which was asked to; `step` steps are done and saved.

        Raises:
            Stopped: by a signal to end.
            Interrupted: by Ctrl-C.
        """
        where = f"step {step} of {self.parts.config.optim.steps} is saved; the same command goes on"
        if asked.name == "SIGINT":
            raise Interrupted(f"interrupted: {where}")
        why = asked.name if distributed.world() == 1 else "asked to stop"  # the same on all processes
        raise Stopped(f"{why}: {where}")

    def announce(self, display: Display, done: int) -> None:
        """What people should know before the first step."""
        config = self.parts.config
        if self.parts.prompts.skipped:
            told = f"{self.parts.prompts.skipped} bad rows of {config.data.train} were skipped"
            self.notes.append(told)
            if display.quiet and distributed.rank() == 0:
                say(f"onpath: {told}")
        alone = idle_alone(config) if distributed.world() == 1 else ()
        idle = (f"{key} has no effect here: it goes with several processes (torchrun)" for key in alone)
        for warning in (*self.parts.warnings, *idle):
            display.say(f"warning: {warning}")
        for note in self.notes:
            display.say(note)
        steps = config.optim.steps
        left = f"steps {done + 1} to {steps}" if done < steps else f"all {steps} steps are done"
        display.say(
            f"{config.run.name}: {config.method.name}, {len(self.parts.prompts.pool):,} prompts, {left} → "
            f"{self.directory}"
        )

    def log(self, step: int, meter: Meter, *, lr: float) -> dict[str, Any]:
        """The step's line of metrics.jsonl."""
        row = {"step": step, **meter.metrics, "seconds": meter.watch.rounded()}
        row |= {"lr": lr, "policy_version": step}
        versions = [r.policy_version for r in meter.rollouts]
        row["staleness"] = step - 1 - min(versions) if versions else None
        self.method_state.check()
        if distributed.rank() == 0:
            self.metrics.write(row)
            tell(self.trackers, flatten({k: v for k, v in row.items() if k != "step"}), step)
        return row

    def checkpoint(self, step: int, optimizer: torch.optim.Optimizer, *, wait: bool) -> None:
        """Saves the complete state; it is written while the next step runs, unless nothing comes after it.

        Raises:
            UserError: it cannot be written.
        """
        self.settle()
        self.method_state.check_alike()
        if distributed.rank() == 0 or sharded(self.parts.models.student):
            self.saving = self._saving(step, optimizer)
        if wait or not self.parts.config.run.save_in_background:
            self.settle()

    def save_alone(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Likewise, where processes can no longer speak with each other, at once; no older one goes for it.

        Raises:
            UserError: it cannot be written.
        """
        saving, self.saving = self.saving, None
        if saving is not None:
            saving.wait(patience=_ALONE)
        if saving is None or checkpoint.step_of(saving.target) != step:
            if step in map(checkpoint.step_of, checkpoint.list_steps(self.directory / "checkpoints")):
                return
            saving = self._saving(step, optimizer, exchange=False)
            saving.wait()
        saving.wait_for_the_first(_ALONE)

    def _saving(self, step: int, optimizer: torch.optim.Optimizer, *, exchange: bool = True) -> Saving:
        return checkpoint.save(
            self.directory / "checkpoints",
            step=step,
            model=self.parts.models.student,
            optimizer=optimizer,
            extra=self.state(),
            inputs=self.inputs,
            timeout=self.parts.config.longest_wait if exchange else _ALONE,
            exchange=exchange,
        )

    def settle(self) -> None:
        """Waits for the checkpoint that is being written, then removes old ones.

        Raises:
            UserError: it cannot be written.
        """
        saving, self.saving = self.saving, None
        if saving is not None:
            saving.wait()
            if distributed.rank() == 0:
                keep = self.parts.config.run.keep
                checkpoint.prune(saving.target.parent, keep=keep, written=saving.target)

    def save_model(self) -> Path:
        """Final weights: complete or not at all.

        Raises:
            UserError: nothing was trained.
        """
        if distributed.rank() == 0:
            self.check_trained()
        target, config = self.directory / "model", self.parts.config
        if not distributed.first_decides(lambda: checkpoint.holds_model(target)):
            if config.student.lora_merge and config.student.lora_rank:
                self._save(self.directory / "merged", merged=True, step=self.last_step)
            self._save(target, merged=False, step=self.last_step)
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
                f"{self.directory}: in none of {len(rows):,} steps was a token trained on, so no model is "
                "written; the columns kept, reason and weights of trajectories/ say why"
            )

    def _save(self, target: Path, *, merged: bool, step: int, told: str = "") -> None:
        """The first process writes; of a sharded model all send it their rows.

        Args:
            told: of the evaluation for which best/ is kept (`Best.record`).
        """
        model = self.parts.models.student

        def weights(directory: Path | None) -> None:
            give_back(model)
            adapters.save_merged(model, directory) if merged else adapters.save(model, directory, home=target)

        if distributed.rank() > 0:
            return weights(None) if sharded(model) else None
        with quietly(), written(target, also=(SafetensorError,)) as temporary:
            weights(temporary)
            self.parts.text.renderer.tokenizer.save_pretrained(temporary)
            card = model_card(
                self.parts.config,
                problems=len(self.parts.prompts.pool),
                step=step,
                evaluations=read_lines(self.evals.path),
                adapter=bool(self.parts.config.student.lora_rank) and not merged,
            )
            (temporary / "README.md").write_text(card, encoding="utf-8")
            if told:
                (temporary / BEST_OF).write_text(told, encoding="utf-8")


def _forget(files: Iterable[Path], *, after: int) -> None:
    """What was stored of later steps goes with their lines: the run comes by there again, or never.

    Raises:
        UserError: it cannot be removed.
    """
    for path in files:
        found = _STORED.fullmatch(path.name)
        if found is not None and int(found[1]) > after:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise unwritable(path, error) from None


def _set_aside(directory: Path, step: int) -> None:
    """The model of a finished run that goes on stays, under the name of its step.

    Raises:
        UserError: it cannot be renamed.
    """
    try:
        for name in ("merged", "model"):
            if (directory / name).is_dir():
                target = directory / f"{name}_step_{step}"
                shutil.rmtree(target, ignore_errors=True)  # of the same step, from an earlier time
                (directory / name).rename(target)
    except OSError as error:
        raise UserError(f"run.dir: cannot write to {directory}: {error.strerror or error}") from None


def _note(change: Change, config: Config, done: int) -> str:
    if change.key == "optim.steps" and done == config.optim.steps:
        return f"optim.steps is {done}, as many as are done; it was {change.before!r}"
    text = f"{change.key} is {change.after!r} from step {done + 1} on, it was {change.before!r}"
    if change.key != "optim.steps":
        return text
    shorter = config.model_copy(update={"optim": config.optim.model_copy(update={"steps": change.before})})
    last, schedule = max(0, min(done, change.before) - 1), config.optim.schedule
    before, after = rate(last, shorter), rate(done, config)
    if schedule == "constant" and before == after:
        return text
    shares = f"optim.schedule {schedule}" if schedule != "constant" else "optim.warmup"
    return (
        f"{text}; {shares} is stretched over all of them: the learning rate goes from "
        f"{config.optim.lr * before:.3g} to {config.optim.lr * after:.3g}"
    )


def _named(config: Config, key: str) -> str:
    """The place that an option names."""
    value: Any = config.model_dump(mode="json")
    for part in key.split("."):
        value = value[part] if isinstance(value, dict) and part in value else key
    return str(value)
