"""`onpath doctor`: all checks, cheap ones first, printed as they come or as one JSON object."""

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text
from transformers import AutoConfig

from onpath import config as configuration
from onpath.commands.doctor import costs, inputs, scores, tokens, training
from onpath.commands.doctor.finding import Finding, Status, about, alone, guarded, skipped
from onpath.commands.doctor.sample import Probe, make_probe, untouched
from onpath.config import Student, Teacher
from onpath.config.sections import teacher_option
from onpath.config.whole import Config
from onpath.engines import sharding
from onpath.engines.models import context_length, load_tokenizer, locate
from onpath.engines.self_check import Disagreement
from onpath.grade.graders import grader_for
from onpath.run.assemble import assemble, data_warnings, join
from onpath.run.inputs import by_source, make_renderer
from onpath.run.parts import Parts
from onpath.run.trained import find, load_its_tokenizer
from onpath.system import code, distributed, launcher
from onpath.system.errors import UserError, is_lack_of_memory
from onpath.system.text import one_line

_STYLES = {"ok": "green", "warning": "yellow", "fail": "bold red", "skipped": "dim"}
_ALONG_TRAJECTORIES = (
    training.contexts, training.eos, scores.teacher_itself, scores.alignment, scores.teacher_differs,
    training.gradient, training.guidance,
)  # fmt: skip
_NEED_SCORES = ("teacher_itself", "alignment", "teacher_differs")
_NEED_DATA = ("evals", "columns", "answers", "solutions", "tokens", "specials", "template", "context")
"""Checks that look at prompts."""
_NEED_MODELS = (
    "passes", "server_tokens", "trajectories", "accuracy", "engine_logprobs", "on_policy",
    *(f.__name__ for f in _ALONG_TRAJECTORIES), "refine", "engine_follows", "speed", "rate", "memory", "fits",
    "disk", "restored",
)  # fmt: skip
"""Checks that cannot run where the models cannot."""
_OTHER_FAMILY = "docs/models.md lists the families that are right"


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What the doctor found."""

    config: Config
    findings: tuple[Finding, ...]
    seconds: float
    """That it took."""

    @property
    def status(self) -> Status:
        """The worst: fail, warning or ok."""
        found = {f.status for f in self.findings}
        return "fail" if "fail" in found else "warning" if "warning" in found else "ok"

    def to_json(self) -> dict[str, Any]:
        """The JSON object."""
        method = self.config.method
        return {
            "status": self.status,
            "method": method.name,
            "student": self.config.student.model,
            "teacher": None
            if method.self_taught
            else ", ".join(t.model for t in self.config.taught_by.values()),
            "seconds": round(self.seconds, 2),
            "checks": [
                {**vars(f), "values": {k: _json_ready(v) for k, v in f.values.items()}} for f in self.findings
            ],
        }


def run_doctor(
    config: Config | str | Path | None = None,
    *,
    overrides: Sequence[tuple[str, str]] = (),
    allow_code: bool = False,
    each: Callable[[Finding], None] = lambda finding: None,
) -> Diagnosis:
    """Checks a config for silent faults with a small real batch; writes nothing.

    Under torchrun all processes look at the same batch, and the step that is measured is that of all.

    Args:
        config: see `onpath.config`; or the path of its YAML; None: the gym.
        overrides: dotted keys and values, of a YAML.
        allow_code: run the Python files that the config names.
        each: is told every finding as it comes, in the first process.

    Raises:
        UserError: no config at all; of several processes also what would be a finding of one alone.
    """
    begun, refused = time.perf_counter(), None
    found = []
    with code.allowed(allow_code), distributed.one_fate():
        if not isinstance(config, Config):
            config, refused = load_leniently(config, overrides)
        if launcher.several():  # only the first speaks, from the first check on
            join(config)
        for finding in diagnose(config, refused=refused):
            found.append(finding)
            if distributed.rank() == 0:
                each(finding)
    return Diagnosis(config=config, findings=tuple(found), seconds=time.perf_counter() - begun)


def load_leniently(
    path: str | Path | None, overrides: Sequence[tuple[str, str]]
) -> tuple[Config, str | None]:
    """The config; and if only its sampling is refused, why, with the config that accepts it, so that the
    other checks still run."""
    try:
        return configuration.load(path, overrides), None
    except UserError as error:
        if "rollout.temperature must be 1" not in str(error):
            raise
        try:
            accepted = configuration.load(path, [*overrides, ("method.off_policy", "true")])
        except UserError:  # a method that cannot take them at all
            raise error from None
        return accepted, str(error)


def _json_ready(value: Any) -> Any:
    """JSON has no infinity and no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_finding(console: Console, finding: Finding) -> None:
    """One line, and one more with what to do."""
    line = Text(f"{finding.status:<8}", style=_STYLES[finding.status])
    line.append(f" {finding.name:<16} ", style="bold")
    line.append(finding.message, style="dim" if finding.status == "skipped" else "not dim")
    console.print(line, highlight=False)
    if finding.advice:
        console.print(Text(f"{'':<26}→ {finding.advice}"), highlight=False)


def print_counts(console: Console, found: Diagnosis) -> None:
    """The last line."""
    counts = [f"{n} {s}" for s in _STYLES if (n := sum(f.status == s for f in found.findings))]
    console.print(f"{', '.join(counts)} in {found.seconds:.0f} s", highlight=False)


def diagnose(config: Config, *, refused: str | None = None) -> Iterator[Finding]:
    """All findings, in order. Nothing is written, and no weight is left changed.

    Args:
        config: see `onpath.config`.
        refused: why `onpath train` would refuse the config's sampling.
    """
    findings = list(_of_data(config, refused))
    yield from findings
    try:
        parts = assemble(_undecorated(config))
    except Disagreement as error:
        alone(error)
        yield Finding(name="models", status="fail", message="the run cannot start: see below")
        yield Finding(name="passes", status="fail", message=str(error), advice=_OTHER_FAMILY)
        yield from (skipped(name, "the run cannot start") for name in _NEED_MODELS if name != "passes")
        return
    except UserError as error:
        alone(error)
        known = next((f for f in findings if f.status == "fail" and f.message == str(error)), None)
        said = "see above" if known else str(error)
        yield Finding(name="models", status="fail", message=f"the run cannot start: {said}")
        yield from (skipped(name, "the run cannot start") for name in _NEED_MODELS)
        return
    except Exception as error:
        if not is_lack_of_memory(error):
            raise
        alone(error)
        message = f"the models are not loaded: {one_line(str(error) or type(error).__name__, 200)}"
        yield Finding(name="models", status="fail", message=message, advice="see fits")
        for name in _NEED_MODELS:
            unloaded = guarded(name, lambda: costs.fits_unloaded(config)) if name == "fits" else None
            yield unloaded or skipped(name, "the models do not fit")
        return
    with closing(parts.text.grader), closing(parts):
        yield _models(parts)
        yield _passes(parts)
        yield tokens.served_tokens(parts)
        yield from _of_models(parts)


def _of_data(config: Config, refused: str | None) -> Iterator[Finding]:
    """What can be said before a model loads; each check that cannot run says why."""
    yield inputs.sampling(config, refused)
    try:
        loaded, finding = inputs.read_pool(config)
        yield finding
        evals, finding = inputs.read_evals(config, loaded.prompts)
        yield finding
    except UserError as error:
        yield Finding(name="data", status="fail", message=str(error))
        yield from (skipped(name, "the data cannot be read") for name in _NEED_DATA)
        return
    pool = loaded.prompts
    everything = [*pool, *(p for prompts in evals.values() for p in prompts)]
    yield inputs.columns(config, pool)
    with grader_for(config.eval.grader, by_source(config.data, pool, evals)) as grader:
        yield guarded("answers", lambda: inputs.answers(grader, everything))
        yield guarded("solutions", lambda: inputs.solutions(grader, everything))
    try:
        student = load_its_tokenizer(config.student, find(config.student.model), "student.model")
        others: dict[str | None, Any] = {
            name: load_tokenizer(section, f"{teacher_option(name)}.model")
            for name, section in config.sharing_ids.items()
        }
        renderer = make_renderer(config, student)
    except UserError as error:
        yield Finding(name="tokens", status="fail", message=str(error))
        return
    for name, teacher in (others or {None: None}).items():
        theirs = None if teacher is None else _renderer_of(config, teacher)
        yield about(name, tokens.same_tokens(student, teacher, tokens.texts_of(everything)))
        yield about(name, tokens.specials(student, teacher))
        look = partial(tokens.template, config, renderer, theirs, everything)
        yield about(name, guarded("template", look))
    rooms = _rooms(config)
    if config.data.skip_bad and (student_room := rooms.get("student")):  # a run leaves out what does not fit
        room = student_room - config.longest_generated[0]
        fit = [p for p in pool if len(renderer.ids(p)) <= room] or list(pool)
        everything = [*fit, *everything[len(pool) :]]
    yield guarded("context", lambda: tokens.context(config, renderer, everything, rooms))


def _of_models(parts: Parts) -> Iterator[Finding]:
    with untouched(parts) as restore:
        with parts.whole():
            probe = make_probe(parts)
        yield training.method_kept(parts, probe)
        yield guarded("accuracy", lambda: training.accuracy(parts, probe))
        yield guarded("engine_logprobs", lambda: scores.engine_logprobs(parts, probe.rollouts))
        yield guarded("on_policy", lambda: scores.on_policy(parts, probe.rollouts))
        for check in _ALONG_TRAJECTORIES:
            name = check.__name__
            for teacher in parts.models.teacher.names if name in _NEED_SCORES else (None,):
                mine = probe.of(teacher)
                if not mine.trajectories:
                    yield about(teacher, skipped(name, "there is no trajectory to look at"))
                    continue
                if name in _NEED_SCORES and not parts.models.teacher.gives_scores:
                    yield skipped(name, "a chat endpoint gives no scores")
                    continue
                yield about(teacher, guarded(name, partial(check, parts, mine)))
        yield guarded("refine", lambda: training.refine(parts))
        yield guarded("engine_follows", lambda: scores.engine_follows(parts))
        restore()
        yield from _of_a_step(parts, probe)
        yield restored(restore())


def _of_a_step(parts: Parts, probe: Probe) -> Iterator[Finding]:
    try:
        cost = costs.measure(parts, probe)
    except UserError as error:
        alone(error)
        yield Finding(name="speed", status="fail", message=f"the first step does not run: {error}")
        yield from (skipped(name, "the first step does not run") for name in ("rate", "memory", "fits"))
    else:
        yield costs.speed(parts, cost)
        yield costs.rate(parts, cost)
        yield costs.memory(parts, cost)
        yield costs.fits(parts, cost)
    yield costs.disk(parts)


def restored(same: bool) -> Finding:
    """The doctor leaves no trace."""
    if same:
        message = "after a real step weights and method are, bit for bit, what they were"
        return Finding(name="restored", status="ok", message=message)
    return Finding(name="restored", status="fail", message="weights did not come back: a fault of onpath's")


def _models(parts: Parts) -> Finding:
    trained = sum(p.numel() for p in parts.models.student.parameters() if p.requires_grad)
    total = sum(p.numel() for p in parts.models.student.parameters())
    device, sizes = parts.models.device, f"{total / 1e6:,.3g}M parameters, {trained / 1e6:,.3g}M of them"
    message = f"student of {sizes} trained, on {device}{_processes(parts)}"
    values = {"parameters": total, "trained": trained, "device": str(device)}
    said = data_warnings(parts.prompts)  # by evals
    if warnings := [warning for warning in parts.warnings if warning not in said]:
        return Finding(name="models", status="warning", message="; ".join(warnings), values=values)
    return Finding(name="models", status="ok", message=message, values=values)


def _processes(parts: Parts) -> str:
    """How many hold the models, and how; empty: one."""
    if (world := distributed.world()) == 1:
        return ""
    how = f"in shards by {parts.config.parallel.shard}" if sharding.asked(parts.config) else "whole in each"
    return f", of {world} processes, {how}"


def _passes(parts: Parts) -> Finding:
    """What the start-up check measured: `assemble` would have refused more."""
    values = {key: vars(found) for key, found in parts.agreements.items()}
    worst = max(
        gap for a in parts.agreements.values() for gap in (a.scored_gap_nats, a.generated_gap_nats or 0.0)
    )
    message = f"scores, samples and training pass are the models' own, to {worst:.1e} nats a token"
    return Finding(name="passes", status="ok", message=message, values=values)


def _undecorated(config: Config) -> Config:
    """Without what would write into the run's directory (rollout.refresh) or a store (teacher.cache), or
    sample in the background."""
    rollout = config.rollout.model_copy(update={"overlap": False, "refresh": "always"})
    plain: dict[str, Any] = {"method": config.method.without_traces(), "rollout": rollout}
    kept = Teacher()
    no_store = {"cache": None, "cache_dtype": kept.cache_dtype, "cache_gb": kept.cache_gb}
    plain["teacher"] = config.teacher.model_copy(update=no_store)
    plain["teachers"] = {k: t.model_copy(update=no_store) for k, t in config.teachers.items()}
    return config.model_copy(update=plain)


def _renderer_of(config: Config, tokenizer: Any) -> Any:
    """The teacher's own rendering; where it has no chat template, plain text."""
    try:
        return make_renderer(config, tokenizer)
    except UserError:
        plain = config.data.model_copy(update={"template": "plain"})
        return make_renderer(config.model_copy(update={"data": plain}), tokenizer)


def _rooms(config: Config) -> dict[str, int]:
    sections: dict[str, Student | Teacher] = {"student": config.student}
    sections |= {teacher_option(name): section for name, section in config.sharing_ids.items()}
    found = {}
    for side, section in sections.items():
        where = Path(locate(section.model)).expanduser()
        if where.is_dir() and (where / "config.json").is_file():
            read = AutoConfig.from_pretrained(where, trust_remote_code=section.trust_remote_code)
            found[side] = context_length(read)
    return {side: room for side, room in found.items() if room < sys.maxsize}
