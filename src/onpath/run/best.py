"""A run's best weights so far (`run.keep_best`), and whether the run stalls (`run.stop_after`)."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onpath.config import sections
from onpath.evaluate.scores import EvalResult
from onpath.run import checkpoint
from onpath.run.log import JsonLines, read_lines
from onpath.run.trained import BEST, BEST_OF
from onpath.system import distributed
from onpath.system.files import write_text
from onpath.system.reading import read_json


@dataclass(kw_only=True)
class Best:
    """What eval.jsonl and best/ say together; on every process alike after `recall`."""

    weights: Path
    """best/ of the run."""
    evals: JsonLines
    asked: sections.Run
    """The section `run`: `keep_best` and `stop_after`."""
    value: float | None = None
    """avg@n of the weights that are kept; None: there are none of this run and this evaluation set."""
    since: int = 0
    """Evaluations after theirs, none of which was better."""

    @classmethod
    def of_run(cls, directory: Path, evals: JsonLines, asked: sections.Run) -> "Best":
        """Nothing is read yet."""
        return cls(weights=directory / BEST, evals=evals, asked=asked)

    @property
    def stalled(self) -> bool:
        """Whether run.stop_after evaluations were no better than the best one."""
        return bool(self.asked.stop_after) and self.since >= self.asked.stop_after

    def beaten_by(self, result: EvalResult) -> bool:
        """Counts an evaluation of the set that is asked for; whether its weights are to be kept."""
        self.value, self.since = _after(self.value, self.since, result.avg_at_k)
        return self.since == 0

    def record(self, result: EvalResult) -> str:
        """What best/ says of the weights in it."""
        return json.dumps({"split": result.split, "step": result.step, "avg_at_k": result.avg_at_k}) + "\n"

    def recall(self) -> None:
        """Value and count as the files have them, read by the first process for all."""
        self.value, self.since = distributed.first_decides(self.read)

    def read(self) -> tuple[float | None, int]:
        """Likewise, by this process alone, changing nothing."""
        value: float | None = None
        since = 0
        if not checkpoint.holds_model(self.weights):
            return None, 0
        rows = [row for row in read_lines(self.evals.path) if row["split"] == self.asked.keep_best]
        if kept := self._recorded():  # else an earlier version wrote them
            is_past = kept["step"] <= max((row["step"] for row in rows), default=-1)
            if kept["split"] != self.asked.keep_best or kept.get("replaced"):
                return None, 0
            rows = [row for row in rows if row["step"] >= kept["step"] or not is_past]
        for row in rows:
            value, since = _after(value, since, row["avg_at_k"])
        return value, since

    def disown(self, done: int) -> None:
        """From `done` steps on the run comes to other weights than it did: best/ of a later step is not its
        own, whichever process looks at it next."""
        kept = self._recorded()
        if kept and kept["step"] > done:
            told = {**kept, "replaced": f"the run went on otherwise from step {done}"}
            write_text(self.weights / BEST_OF, json.dumps(told))

    def _recorded(self) -> dict[str, Any]:
        path = self.weights / BEST_OF
        return read_json(path, keys={"split": str, "step": int}) if path.is_file() else {}


def _after(value: float | None, since: int, new: float) -> tuple[float, int]:
    """The best value, and the evaluations since, once there is a new one."""
    return (new, 0) if value is None or new > value else (value, since + 1)
