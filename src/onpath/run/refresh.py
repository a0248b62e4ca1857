"""Semi-online distillation (`rollout.refresh`): rollouts of older weights, and what the method made of them.

    step               0      1      2      3      4      5        every: 3
    trained on         W0     W0     W0     W3     W3     W3       of the generator: policy_version
    phase              └─ phase_000000 ──┘  └─ phase_000003 ──┘

When a phase begins, the student as it is generates every prompt of the phase once, and the method prepares
the rollouts: rewrites, windows, repairs. Both go to disk as lines of JSON, all floats as they are, so that a
run that is killed goes on with them; every step of the phase reads its prompts' lines and scores them with
both models as ever. So the divergence is always the current student's, exactly: what is stale is the prefix
that it stands on. Draws are named by the step in which a prompt comes first, so `every: 1` samples what
`always` does.

Distilling on fixed rollouts of the untouched student: arXiv 2604.13010, 2610.11291.
"""

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from onpath.config.sections import NEVER, Refresh
from onpath.config.whole import Config
from onpath.data.load import digest_prompts, prompts_of_step
from onpath.engines.base import Engine, sample_keys, unwritten
from onpath.methods.base import Method, Prepared
from onpath.records import WRITERS, Edit, Guidance, Prompt, Rollout, Sampling, Trajectory
from onpath.system import distributed
from onpath.system.errors import UserError
from onpath.system.files import append_lines, write_text
from onpath.system.reading import parse_json, read_json

DIRECTORY = "rollouts"
"""Of a run's phases."""
_COMPLETE = "complete.json"
_INPUTS = "inputs.json"
_COMPARED = 32
"""Rollouts of a process that are scored to see how far the student has moved."""
_TOGETHER = 8
"""Steps whose rollouts are generated in one go."""


@dataclass
class Phase:
    """Steps `first` to `last` − 1, trained on what the weights of `first` generated.

    In `directory` each process has a file of lines: a prompt's rollouts with their trajectories, or what the
    method measured while it prepared those of a step. `complete.json` comes last.
    """

    directory: Path
    first: int
    last: int
    places: dict[tuple[str, str], tuple[Path, int]] = field(default_factory=dict)
    """Prompt's id and digest → file and byte where its line begins. Ask `place`."""
    measured: dict[int, list[Mapping[str, Any]]] = field(default_factory=dict)
    """Step → what was measured when its prompts were prepared, of each process."""

    @classmethod
    def running(cls, root: Path, step: int) -> "Phase | None":
        """The last phase that began at `step` or before it, if it is complete."""
        for path in sorted(root.glob(f"phase_*/{_COMPLETE}"), reverse=True):
            first, last = (read_json(path, keys={"first": int, "last": int})[k] for k in ("first", "last"))
            if first <= step:
                phase = cls(path.parent, first, last)
                phase.read()
                return phase
        return None

    def read(self) -> None:
        """Finds the lines of all processes; the first one of a prompt stands. A step's prompts count once the
        line of what was measured with them is there: it is written last."""
        self.places, self.measured = {}, {}
        for path in sorted(self.directory.glob("process-*.jsonl")):
            prompts: dict[tuple[str, str], tuple[Path, int]] = {}
            for at, row in _lines(path):
                if isinstance(row.get("prompt"), str):
                    prompts[row["prompt"], str(row.get("digest", ""))] = path, at
                elif isinstance(row.get("step"), int):
                    for prompt, place in prompts.items():
                        self.places.setdefault(prompt, place)
                    prompts = {}
                    self.measured.setdefault(row["step"], []).append(row)

    def place(self, prompt: Prompt) -> tuple[Path, int] | None:
        """Where its rollouts are; None for another problem under its id, which other data have."""
        known = self.places.get((prompt.id, digest_prompts([prompt])))
        return known or self.places.get((prompt.id, ""))  # as lines were before they said whose they are

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Lines of this process, on disk when this returns.

        Raises:
            UserError: the disk is full or not writable.
        """
        append_lines(self.directory / f"process-{distributed.rank()}.jsonl", map(json.dumps, rows))

    def complete(self) -> None:
        """All processes have written all."""
        distributed.barrier()
        if distributed.rank() == 0:
            write_text(
                self.directory / _COMPLETE, json.dumps({"first": self.first, "last": self.last}) + "\n"
            )
        distributed.barrier()
        self.read()

    def of(self, prompt: Prompt, sampling: Sampling) -> tuple[list[Rollout], list[Trajectory]]:
        """A prompt's rollouts, and what is trained on.

        Raises:
            UserError: its line is damaged or of another problem, and the weights that wrote it are gone.
        """
        place = self.place(prompt)
        path, at = place or (self.directory, 0)
        try:
            with path.open("rb") as file:
                file.seek(at)
                row = parse_json(file.readline())
            rollouts = [
                Rollout(
                    prompt=prompt,
                    ids=tuple(r["ids"]),
                    logprobs=tuple(r["logprobs"] or (math.nan,) * len(r["ids"])),
                    writers=tuple(WRITERS[w] for w in r.get("writers", ())),
                    finish_reason=r["finish_reason"],
                    policy_version=self.first,
                    sampling=sampling,
                    context=tuple(row["context"]),
                    sample=sample,
                )
                for sample, r in enumerate(row["rollouts"])
            ]
            return rollouts, [_trajectory(t, rollouts) for t in row["trajectories"]]
        except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError):
            what, bring = "missing or damaged", "the file"
            if place is None and any(known == prompt.id for known, _ in self.places):
                what, bring = "those of another problem with this id", "the data"
            raise UserError(
                f"{path}: the rollouts of prompt {prompt.id!r} are {what}, and the weights that "
                f"wrote them, those of step {self.first}, are gone; bring {bring} back, or remove "
                f"{self.directory.parent.parent} and start the run again"
            ) from None


class Refreshed:
    """Hands out each step's rollouts and trajectories, and has new ones made when the rule says so.

    Args:
        config: of the run: sizes, seed, steps, directory.
        pool: the training prompts.
        sampler: generates rollouts, and student: scores them, both with the weights that train.
        method: prepares them.
    """

    def __init__(
        self,
        config: Config,
        rule: Refresh,
        pool: Sequence[Prompt],
        *,
        sampler: Engine,
        student: Engine,
        sampling: Sampling,
        method: Method,
    ) -> None:
        self.root = Path(config.run.dir) / config.run.name / DIRECTORY
        self.config, self.rule, self.pool = config, rule, pool
        self.sampler, self.student, self.sampling, self.method = sampler, student, sampling, method
        self.phase: Phase | None = None
        self.overlap: float | None = None
        """Of the student and the weights that wrote the last step's rollouts, where the rule asks for it."""
        self._lines: dict[str, tuple[list[Rollout], list[Trajectory]]] = {}
        """What the last step has read, by prompt: each line is parsed once."""

    @classmethod
    def asked(cls, config: Config, pool: Sequence[Prompt], **tools: Any) -> "Refreshed | None":
        """None: each step has its own rollouts."""
        return None if config.refresh is None else cls(config, config.refresh, pool, **tools)

    def check_longer(self, steps: int) -> None:
        """A run that was to have so many steps may have more of them.

        Raises:
            UserError: `never`, and they come to prompts that the starting weights were not asked.
        """
        if self.rule != NEVER:
            return
        known = {p.id for step in range(steps) for p in self._prompts(step)}
        for step in range(steps, self.config.optim.steps):
            if new := next((p.id for p in self._prompts(step) if p.id not in known), None):
                raise UserError(
                    f"rollout.refresh is never: there are rollouts of what {steps} steps train on, step "
                    f"{step + 1} comes to prompt {new!r}, and the weights that wrote them are gone; leave "
                    f"optim.steps at {steps}, or choose another run.name"
                )

    def made_of(self) -> Mapping[str, str]:
        """Digests of what the phases there were made of, by option; none where there are no phases, or they
        do not say.

        Raises:
            UserError: the record is damaged.
        """
        path = self.root / _INPUTS
        known = path.is_file() and any(self.root.glob("phase_*"))
        found: dict[str, str] = read_json(path, keys={}) if known else {}
        return found

    def record(self, inputs: Mapping[str, str]) -> None:
        """What the phases to come are made of.

        Raises:
            UserError: it cannot be written.
        """
        write_text(self.root / _INPUTS, json.dumps(dict(inputs), indent=1) + "\n")

    def rollouts(self, step: int) -> list[Rollout]:
        """Those of a step (of this process). If a phase begins with it, all of the phase are made first."""
        phase, self.overlap = self.phase or Phase.running(self.root, step), None
        asked, steps = self._prompts(step), self.config.optim.steps
        # One that an earlier process has begun with this step may have to be longer than it was then; why it
        # was begun is asked of the one before it, as it was then.
        begun = phase is not None and step == phase.first and phase is not self.phase
        before = Phase.running(self.root, step - 1) if begun else phase
        over = before is None or self._is_over(before, asked, step) or self._has_moved(before, asked, step)
        if phase is None or begun or over:
            last = min(steps, step + (self.rule.every or steps))
            phase = Phase(self.root / f"phase_{step:06d}", step, last)
        if step == phase.first and phase is not self.phase:
            self._make(phase)
        self.phase, self._lines = phase, {}
        return [r for p in distributed.share(asked) for r in self._line(phase, p)[0]]

    def prepared(self, rollouts: Sequence[Rollout], step: int) -> Prepared:
        """What the method made of them. What was generated counts in the step in which it was."""
        phase = self.phase
        assert phase is not None, "rollouts come first"
        trajectories = []
        for r in rollouts:
            _, made = self._line(phase, r.prompt)
            mine = [t for t in made if t.origin is not None and t.origin.sample == r.sample]
            trajectories += [replace(t, origin=r) for t in mine]
        here, everywhere = phase.measured.get(step, []), [m for rows in phase.measured.values() for m in rows]
        counts = step == phase.first and distributed.rank() == 0
        totals = {k: 0.0 for m in everywhere for k in m["totals"]}
        for row in everywhere if counts else ():
            totals = {k: v + row["totals"].get(k, 0.0) for k, v in totals.items()}
        means: dict[str, tuple[float, float]] = {k: (0.0, 0.0) for m in here for k in m["means"]}
        for row in here if distributed.rank() == 0 else ():
            means |= {k: (means[k][0] + a, means[k][1] + b) for k, (a, b) in row["means"].items()}
        metrics = {} if self.overlap is None else {"rollout_overlap": self.overlap}
        weights = [m["guidance_weight"] for m in here or everywhere]
        return Prepared(
            trajectories=trajectories,
            totals=totals,
            means=means,
            metrics={**(here[0]["metrics"] if here else {}), **metrics},
            guidance_weight=weights[0] if weights else 1.0,
        )

    def generated(self, step: int) -> int:
        """Tokens of all rollouts of the phase that begins with `step`, if one does; said by one process."""
        if self.phase is None or step != self.phase.first or distributed.rank() > 0:
            return 0
        return sum(m["tokens"] for rows in self.phase.measured.values() for m in rows)

    def _is_over(self, phase: Phase, asked: Sequence[Prompt], step: int) -> bool:
        """By count; or a run that was made longer has come to prompts that the phase has not."""
        if self.rule.every is not None and step >= phase.first + self.rule.every:
            return True
        return self.rule != NEVER and any(phase.place(p) is None for p in asked)

    def _has_moved(self, phase: Phase, asked: Sequence[Prompt], step: int) -> bool:
        """Whether the student overlaps too little with the weights that wrote the step's rollouts."""
        if self.rule.overlap_below is None or step == phase.first:
            return False
        some = asked[: -(-_COMPARED // self.config.rollout.n)]  # at least so many rollouts, of all processes
        mine = [r for p in distributed.share(some) for r in phase.of(p, self.sampling)[0]]
        self.overlap = overlap(mine, self.student)
        return self.overlap < self.rule.overlap_below

    def _line(self, phase: Phase, prompt: Prompt) -> tuple[list[Rollout], list[Trajectory]]:
        if prompt.id not in self._lines:
            self._lines[prompt.id] = phase.of(prompt, self.sampling)
        return self._lines[prompt.id]

    def _prompts(self, step: int) -> list[Prompt]:
        return prompts_of_step(
            self.pool, size=self.config.rollout.prompts, seed=self.config.run.seed, step=step
        )

    def _make(self, phase: Phase) -> None:
        """Generates and prepares whatever a phase lacks; the student is at the phase's first step."""
        distributed.barrier()
        if self.method.state() and distributed.rank() == 0:
            # It moves while it prepares: what a killed process has left would not move it again.
            shutil.rmtree(phase.directory, ignore_errors=True)
        distributed.barrier()
        phase.read()
        distributed.barrier()  # nobody writes before everybody has read: all must lack the same
        n, seen = self.config.rollout.n, set[str]()
        for begin in range(phase.first, phase.last, _TOGETHER):
            lots: list[tuple[int, list[tuple[int, Prompt]]]] = []
            for step in range(begin, min(begin + _TOGETHER, phase.last)):
                fresh = []
                for place, prompt in enumerate(self._prompts(step)):
                    known = prompt.id in seen or phase.place(prompt)
                    fresh += [] if known else [(place, prompt)]
                    seen.add(prompt.id)
                lots += [(step, distributed.share(fresh))] if fresh else []
            prompts = [p for _, lot in lots for _, p in lot]
            keys = [f"step {step}/{place}" for step, lot in lots for place, _ in lot]
            writes = self.config.method.writes_rollouts
            engine = self.student if writes else self.sampler
            rollouts = (
                unwritten(engine, engine.renderer, prompts, self.sampling, n=n)
                if writes
                else engine.generate(prompts, self.sampling, n=n, keys=keys)
            )
            for step, lot in lots:
                some, rollouts = rollouts[: n * len(lot)], rollouts[n * len(lot) :]
                if writes:
                    named = [f"step {step}/{place}" for place, _ in lot]
                    some = list(self.method.write_rollouts(some, keys=sample_keys(named, n), step=step))
                some = [replace(r, place=place) for place, r in enumerate(some)]
                phase.add(_rows(some, self.method.prepare(some, step=step), step))
        phase.complete()


def list_phases(root: Path) -> list[Path]:
    """Directories of phases, oldest first."""
    found = [p for p in root.glob("phase_*") if p.is_dir() and p.name.removeprefix("phase_").isdigit()]
    return sorted(found, key=first_step)


def first_step(phase: Path) -> int:
    """The step that a phase's directory begins with."""
    return int(phase.name.removeprefix("phase_"))


def rollouts_in(phase: Path) -> tuple[int, int]:
    """Rollouts that lie in a phase's directory, and their tokens."""
    kept = [r for path in sorted(phase.glob("process-*.jsonl")) for _, row in _lines(path) for r in _of(row)]
    return len(kept), sum(len(r.get("ids", ())) for r in kept)


def _of(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = row.get("rollouts")
    return [r for r in found if isinstance(r, dict)] if isinstance(found, list) else []


def forget_phases(root: Path, step: int) -> bool:
    """Removes phases that begin with `step` or later; nothing else that lies there.

    Returns:
        Whether there were any.
    """
    gone = [path for path in list_phases(root) if first_step(path) >= step]
    for path in gone:
        shutil.rmtree(path, ignore_errors=True)
    return bool(gone)


def overlap(rollouts: Sequence[Rollout], engine: Engine) -> float:
    """Mass that the engine's next-token distributions have in common with those that the rollouts were drawn
    from, a mean over their tokens: Σ_v min(π(v), μ(v)) = E_{y ~ μ} min(1, π(y) / μ(y)) = 1 − total variation.

    Over all processes; without a token 1.
    """
    scored = engine.score([r.context for r in rollouts], [r.ids for r in rollouts]) if rollouts else []
    terms = [
        math.exp(min(0.0, now - then))
        for r, row in zip(rollouts, scored, strict=True)
        for now, then in zip(row, r.logprobs, strict=True)
    ]
    mass, tokens = distributed.total([sum(terms), len(terms)])
    return mass / tokens if tokens else 1.0


def _rows(rollouts: Sequence[Rollout], prepared: Prepared, step: int) -> list[dict[str, Any]]:
    """Lines of one step's rollouts and trajectories: what `Phase.of` reads, and what was measured.

    Raises:
        UserError: a trajectory does not say which rollout it came from, or it is none of these.
    """
    drawn = {(r.prompt.id, r.sample): r.ids for r in rollouts}
    found: dict[str, dict[str, Any]] = {}
    for r in rollouts:
        whose = {"prompt": r.prompt.id, "digest": digest_prompts([r.prompt]), "context": r.context}
        row = found.setdefault(r.prompt.id, {**whose, "rollouts": [], "trajectories": []})
        known = not math.isnan(sum(r.logprobs))  # a black box has none
        stored = {"ids": r.ids, "logprobs": r.logprobs if known else None, "finish_reason": r.finish_reason}
        others = {"writers": [WRITERS.index(w) for w in r.writers]} if r.writers else {}
        row["rollouts"].append({**stored, **others})
    for t in prepared.trajectories:
        if t.origin is None:
            raise UserError(
                "rollout.refresh keeps trajectories with the rollouts that they come from, and this method "
                "makes some without Trajectory.origin; set it there, or rollout.refresh: always"
            )
        if drawn.get((t.origin.prompt.id, t.origin.sample)) != t.origin.ids:
            raise UserError(
                "rollout.refresh keeps trajectories with the rollouts that they come from, and this method "
                f"makes one of another time's (of prompt {t.origin.prompt.id!r}); set rollout.refresh: always"
            )
        found[t.origin.prompt.id]["trajectories"].append(_as_row(t, t.origin))
    measured = {
        "step": step,
        "tokens": sum(r.written_by.count("student") for r in rollouts),
        "totals": dict(prepared.totals),
        "means": dict(prepared.means),
        "metrics": dict(prepared.metrics),
        "guidance_weight": prepared.guidance_weight,
    }
    return [*found.values(), measured]


def _as_row(t: Trajectory, origin: Rollout) -> dict[str, Any]:
    return {
        "sample": origin.sample,
        "student_context": t.student_context,
        "teacher_context": t.teacher_context,
        "response": t.response,
        "weights": t.weights,
        "counted": t.counted,
        "behaviour_logprobs": t.behaviour_logprobs,
        "advantages": t.advantages,
        "begins": t.begins,
        "writers": None if t.writers is None else [WRITERS.index(w) for w in t.writers],
        "guidance": [
            {
                "start": g.start,
                "ids": [list(x) for x in g.targets],
                "mass": [list(x.values()) for x in g.targets],
            }
            for g in t.guidance
        ],
        "edit": {**vars(t.edit), "detail": dict(t.edit.detail)},
    }


def _trajectory(row: Mapping[str, Any], rollouts: Sequence[Rollout]) -> Trajectory:
    def tokens(name: str) -> Any:
        return None if row.get(name) is None else tuple(row[name])

    return Trajectory(
        student_context=tokens("student_context"),
        teacher_context=tokens("teacher_context"),
        response=tokens("response"),
        weights=tokens("weights"),
        counted=tokens("counted"),
        behaviour_logprobs=tokens("behaviour_logprobs"),
        advantages=tokens("advantages"),
        begins=row.get("begins", 0),
        writers=None if row["writers"] is None else tuple(WRITERS[w] for w in row["writers"]),
        guidance=tuple(
            Guidance(
                start=g["start"],
                targets=tuple(dict(zip(i, m, strict=True)) for i, m in zip(g["ids"], g["mass"], strict=True)),
            )
            for g in row["guidance"]
        ),
        edit=Edit(**row["edit"]),
        origin=rollouts[row["sample"]],
    )


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Where each whole line begins, in bytes, and what it says."""
    at = 0
    with path.open("rb") as file:
        for line in file:
            start, at = at, at + len(line)
            if line.endswith(b"\n"):
                try:
                    row = parse_json(line)
                except ValueError:
                    continue
                if isinstance(row, dict):
                    yield start, row
