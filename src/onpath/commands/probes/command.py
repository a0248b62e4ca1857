"""`onpath inspect --probe NAME`: measurements that a finished run, or a config, is asked for afterwards."""

from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from onpath import config as configuration
from onpath.engines import sharding
from onpath.run.checkpoint import holds_model
from onpath.system import distributed, launcher
from onpath.system.errors import UserError
from onpath.system.files import make_directory, place
from onpath.system.reading import read_json

PROBES = ("prefix-failure", "divergence", "local-correction", "meter")


def run_named(
    name: str,
    where: str | Path,
    *,
    rollouts: int = 32,
    continuations: int = 4,
    every: int = 8,
    allow_code: bool = False,
) -> Path:
    """Runs a probe and returns the path of its JSON lines; summary and picture (meter: none) lie beside it.

    Of several processes (torchrun) all measure the same, and the first writes it; sharded models are whole
    meanwhile.

    Args:
        name: one of `PROBES`.
        rollouts: looked at; for local-correction, prefixes.
        continuations, every: of prefix-failure.
        allow_code: run the Python files that the config names.
        where: a run directory (its final model is probed, if it has one) or a config file (its student is).

    Raises:
        UserError: no such probe, neither a run nor a config, a config whose run there is, numbers that make
            no sense, a teacher that only answers messages, or local-correction of a sharded student.
    """
    with distributed.one_fate():
        return _run_named(name, where, rollouts, continuations, every, allow_code)


def _run_named(
    name: str, where: str | Path, rollouts: int, continuations: int, every: int, allow_code: bool
) -> Path:
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
    from onpath.commands.probes import local_correction, predictors, prefix_failure
    from onpath.run.assemble import assemble

    run = path if path.is_dir() else Path(config.run.dir) / config.run.name
    if path.is_file() and (run / "config.yaml").exists():
        raise UserError(
            f"{where}: its run is in {run} already, and probes there are of what that has trained; probe "
            f"{run}, or give the config another run.name"
        )
    out = run / "probes"
    make_directory(out)
    if launcher.several() and config.parallel.shard != "none" and name == "local-correction":
        raise UserError(
            "parallel.shard: local-correction trains copies of a student that is whole; set it to none"
        )
    parts = assemble(config)
    models = parts.models
    with (
        closing(parts),
        parts.generators.student.in_step(),
        sharding.whole(models.student, *models.teacher.models),
    ):
        if not parts.generators.teacher.takes_prefixes:
            raise UserError(
                "teacher.engine: chat answers messages only, and every probe asks what the teacher would go "
                "on with; use hf or vllm"
            )
        match name:
            case "divergence":
                return divergence.run_probe(parts, rollouts=rollouts, out=out)
            case "local-correction":
                return local_correction.run_probe(parts, prefixes=rollouts, out=out)
            case "meter":
                return predictors.run_probe(parts, rollouts=rollouts, out=out)
            case _:
                return prefix_failure.run_probe(
                    parts, rollouts=rollouts, continuations=continuations, every=every, out=out
                )


def summary_of(path: Path) -> dict[str, Any]:
    """What a probe found, from the file beside its JSON lines."""
    found: dict[str, Any] = read_json(path.with_suffix(".json"), keys={})
    return found


def shown(path: Path) -> Iterator[str]:
    """Lines for people: a line per entry of the summary beside `path`, what lies inside it further to the
    right, and where the rest is."""
    yield from _lines(summary_of(path), indent="")
    picture = path.with_suffix(".png")
    drawn = f", picture {picture.name}" if picture.exists() else ""
    yield f"{path}, summary {path.with_suffix('.json').name}{drawn}"


def _lines(entries: Mapping[str, Any], *, indent: str) -> Iterator[str]:
    """
    >>> found = {"distance": {"high": {"n": 32, "mean": 0.0345547}, "none": None}, "n": 1}
    >>> print(*_lines(found, indent=""), sep="\\n")
    distance:
      high: n 32, mean 0.0346
      none: –
    n: 1
    """
    for name, value in entries.items():
        said = name.replace("_", " ")
        if isinstance(value, dict) and any(isinstance(inner, dict) for inner in value.values()):
            yield f"{indent}{said}:"
            yield from _lines(value, indent=indent + "  ")
        elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
            yield f"{indent}{said}:"
            yield from (f"{indent}  {_said(inner)}" for inner in value)
        else:
            yield f"{indent}{said}: {_said(value)}"


def _said(value: Any) -> str:
    match value:
        case None:
            return "–"
        case float():
            return f"{value:.3g}"
        case list():
            return " ".join(map(_said, value))
        case dict():
            return ", ".join(f"{str(k).replace('_', ' ')} {_said(v)}" for k, v in value.items())
        case _:
            return str(value)
