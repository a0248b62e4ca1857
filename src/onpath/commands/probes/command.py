"""`onpath inspect --probe NAME`: measurements that a finished run, or a config, is asked for afterwards."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from onpath import config as configuration
from onpath.run.checkpoint import holds_model
from onpath.system.errors import UserError
from onpath.system.files import make_directory, place
from onpath.system.reading import read_json

PROBES = ("prefix-failure", "divergence", "local-correction")


def run_named(
    name: str,
    where: str | Path,
    *,
    rollouts: int = 32,
    continuations: int = 4,
    every: int = 8,
    allow_code: bool = False,
) -> Path:
    """Runs a probe and returns the path of its JSON lines; summary and picture lie beside it.

    Args:
        name: one of `PROBES`.
        rollouts: looked at; for local-correction, prefixes.
        continuations, every: of prefix-failure.
        allow_code: run the Python files that the config names.
        where: a run directory (its final model is probed, if it has one) or a config file (its student is).

    Raises:
        UserError: no such probe, neither a run nor a config, numbers that make no sense, or a teacher that
            only answers messages.
    """
    if name not in PROBES:
        raise UserError(f"there is no probe {name!r}; there are {', '.join(PROBES)}")
    path = place(where)
    file = path if path.is_file() else path / "config.yaml"
    if not file.is_file():
        raise UserError(f"{where}: neither a run directory nor a config file")
    config = configuration.load(file, allow_code=allow_code)
    if holds_model(path / "model"):
        trained = config.student.model_copy(update={"model": str(path / "model"), "lora_rank": 0})
        config = config.model_copy(update={"student": trained})
    from onpath.commands.probes import futures as divergence
    from onpath.commands.probes import local_correction, prefix_failure
    from onpath.run.assemble import assemble

    out = path / "probes" if path.is_dir() else Path(config.run.dir) / config.run.name / "probes"
    make_directory(out)
    parts = assemble(config)
    if not parts.generators.teacher.takes_prefixes:
        raise UserError(
            "teacher.engine: chat answers messages only, and every probe asks what the teacher would go on "
            "with; use hf or vllm"
        )
    match name:
        case "divergence":
            return divergence.run_probe(parts, rollouts=rollouts, out=out)
        case "local-correction":
            return local_correction.run_probe(parts, prefixes=rollouts, out=out)
        case _:
            return prefix_failure.run_probe(
                parts, rollouts=rollouts, continuations=continuations, every=every, out=out
            )


def shown(path: Path) -> Iterator[str]:
    """Lines for people: a line per entry of the summary beside `path`, and where the rest is."""
    summary = read_json(path.with_suffix(".json"), keys={})
    yield from (f"{name.replace('_', ' ')}: {_said(value)}" for name, value in summary.items())
    yield f"{path}, summary {path.with_suffix('.json').name}, picture {path.with_suffix('.png').name}"


def _said(value: Any) -> str:
    """
    >>> _said({"high": {"n": 32, "mean": 0.0345547}, "none": None})
    'high (n 32, mean 0.0346), none –'
    """
    match value:
        case None:
            return "–"
        case float():
            return f"{value:.3g}"
        case list():
            return " ".join(map(_said, value))
        case dict():
            inner = [(str(k).replace("_", " "), v) for k, v in value.items()]
            return ", ".join(
                f"{k} ({_said(v)})" if isinstance(v, dict) else f"{k} {_said(v)}" for k, v in inner
            )
        case _:
            return str(value)
