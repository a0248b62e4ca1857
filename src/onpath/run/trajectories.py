"""What was trained on, as Parquet: one file per stored step, readable with pandas; read back with care: a
damaged file is named, a huge run is sampled.
"""

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from onpath.config.whole import Config
from onpath.data.load import prompts_of_step
from onpath.data.render import Renderer
from onpath.records import Graded, Rollout, Trajectory
from onpath.run.meter import Meter
from onpath.run.parts import Parts
from onpath.system import distributed
from onpath.system.errors import UserError
from onpath.system.files import written
from onpath.system.reading import parse_json
from onpath.system.text import one_line


def store_step(parts: Parts, directory: Path, meter: Meter, step: int, *, last: bool = False) -> None:
    """What the step trained on, as Parquet in `directory`/trajectories, every so many steps.

    Args:
        last: the run ends with this step, before its time too (`run.stop_after`).
    """
    if not (is_stored(parts.config, step) or (last and parts.config.run.trajectories_every)):
        return
    rows = []
    for place, t in enumerate(meter.step.prepared.trajectories):
        known = meter.of_origins
        verdict = None if t.origin is None else known.verdicts[t.origin.place]
        rows.append(
            trajectory_row(
                t,
                step=step,
                renderer=parts.text.renderer,
                correct=None if verdict is None else verdict.correct,
                values=meter.per_token.get(place, {}),
                top=meter.top.get(place),
                rewards={} if t.origin is None else {k: v[t.origin.place] for k, v in known.rewards.items()},
            )
        )
    rows = distributed.gather(rows)
    if distributed.world() > 1:  # as one process would have them
        size, seed = parts.config.rollout.prompts, parts.config.run.seed
        asked = prompts_of_step(parts.prompts.pool, size=size, seed=seed, step=step - 1)
        order = {prompt.id: i for i, prompt in enumerate(asked)}
        end = len(order)  # of another step's prompts, or of none
        rows.sort(key=lambda row: (order.get(row["prompt_id"], end), row["sample"] or 0))
    if distributed.rank() == 0:
        write_parquet(directory / "trajectories" / f"step_{step:06d}.parquet", rows)


TOP_TOKENS = 5
"""Likeliest tokens of both models that are stored per response token."""


def is_stored(config: Config, step: int) -> bool:
    """Whether the trajectories of a step (the first is 1) are written."""
    every = config.run.trajectories_every
    return bool(every) and (step in (1, config.optim.steps) or step % every == 0)


def top_tokens(config: Config, step: int) -> int:
    """How many of the likeliest tokens the loss's pass looks up: those that are stored with the step, or may
    be, where its evaluation may end the run."""
    run = config.run
    may_end = run.stop_after > 0 and run.trajectories_every > 0 and config.eval.falls_on(step)
    return TOP_TOKENS if may_end or is_stored(config, step) else 0


def trajectory_row(
    trajectory: Trajectory,
    *,
    step: int,
    renderer: Renderer,
    correct: bool | None,
    values: Mapping[str, Sequence[float]],
    top: Mapping[str, Sequence[Sequence[Any]]] | None = None,
    rewards: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """One trajectory as plain values.

    Args:
        values: per-token numbers by name, as long as the response.
        top: `{student,teacher}_top_{ids,logp}`, a list per response token, likeliest first.
        rewards: of its rollout, by label.
    """
    origin = trajectory.origin
    return {
        "step": step,
        "prompt_id": origin.prompt.id if origin else None,
        "sample": origin.sample if origin else None,
        "prompt": origin.prompt.shown if origin else None,
        "answer": origin.prompt.answer if origin else None,
        "solution": origin.prompt.solution if origin else None,
        **({} if trajectory.teacher is None else {"teacher": trajectory.teacher}),
        "correct": correct,
        "student_context": list(trajectory.student_context),
        "teacher_context": list(trajectory.teacher_context),
        "response": list(trajectory.response),
        "response_text": renderer.text(trajectory.response),
        "tokens": renderer.tokens(trajectory.response),
        "weights": list(trajectory.token_weights),
        "writers": list(trajectory.written_by),
        "origin_response": list(origin.ids) if origin else None,
        "origin_text": renderer.text(origin.ids) if origin else None,
        "origin_tokens": renderer.tokens(origin.ids) if origin else None,
        "origin_logprobs": list(origin.logprobs) if origin and not isnan(sum(origin.logprobs)) else None,
        "finish_reason": origin.finish_reason if origin else None,
        "policy_version": origin.policy_version if origin else None,
        "edit": trajectory.edit.kind,
        "kept": trajectory.edit.kept,
        "reason": trajectory.edit.reason,
        "detail": json.dumps(dict(trajectory.edit.detail)),
        **(rewards or {}),
        **{name: list(v) for name, v in values.items()},
        **top_columns(top or {}, renderer),
    }


def top_columns(top: Mapping[str, Sequence[Sequence[Any]]], renderer: Renderer) -> dict[str, Any]:
    """`{student,teacher}_top_{tokens,logp}`: what both models would rather, or also, have generated; nats."""
    return {
        name.replace("_ids", "_tokens"): [
            renderer.tokens(r) if name.endswith("_ids") else list(r) for r in rows
        ]
        for name, rows in top.items()
    }


def sample_row(graded: Graded, renderer: Renderer) -> dict[str, Any]:
    """One graded sample as plain values."""
    return {
        "id": graded.rollout.prompt.id,
        "sample": graded.rollout.sample,
        "correct": graded.correct,
        "extracted": graded.extracted,
        **_response(graded.rollout, renderer),
    }


def ungraded_row(rollout: Rollout, renderer: Renderer) -> dict[str, Any]:
    """One sample without a verdict as plain values, with what a verdict takes."""
    return {
        "id": rollout.prompt.id,
        "sample": rollout.sample,
        "prompt": rollout.prompt.shown,
        "answer": rollout.prompt.answer,
        **_response(rollout, renderer),
    }


def _response(rollout: Rollout, renderer: Renderer) -> dict[str, Any]:
    return {
        "length": len(rollout.ids),
        "finish_reason": rollout.finish_reason,
        "text": renderer.text(rollout.ids),
        "ids": list(rollout.ids),
    }


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Complete or not at all.

    Raises:
        UserError: the disk is full or not writable; or a column holds values of several kinds, which only a
            method of one's own gives.
    """
    columns = dict.fromkeys(name for row in rows for name in row)  # the first row may not have been scored
    try:
        table = pa.table({c: [row.get(c) for row in rows] for c in columns})
    except (pa.ArrowException, TypeError, OverflowError) as error:
        reason = one_line(str(error), 200)
        raise UserError(f"{path}: what the method says of its trajectories is no table: {reason}") from None
    with written(path) as temporary:
        pq.write_table(table, temporary)


Row = dict[str, Any]
NOT_QUANTITIES = ("weights", "origin_logprobs")
"""Columns of one number per token that are not read off the models along the response."""
_UNUSED = ("student_context", "teacher_context")
_TOPS = tuple(f"{who}_top_{what}" for who in ("student", "teacher") for what in ("tokens", "logp"))
_BATCH = 64


def _list_of(inner: Callable[[pa.DataType], bool]) -> Callable[[pa.DataType], bool]:
    return lambda kind: pa.types.is_list(kind) and inner(kind.value_type)


_KINDS: dict[str, Callable[[pa.DataType], bool]] = {
    "step": pa.types.is_integer,
    "response": _list_of(lambda t: pa.types.is_integer(t) or pa.types.is_null(t)),
    "tokens": _list_of(lambda t: pa.types.is_string(t) or pa.types.is_null(t)),
    "edit": pa.types.is_string,
    "detail": pa.types.is_string,
}
"""What the columns that every reader needs must hold."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A sample of what a run stored."""

    rows: tuple[Row, ...]
    """As `trajectory_row` made them, `detail` parsed; contexts left out. The likeliest tokens, ten
    to a response token, stay with Arrow until `listed` is asked for them."""
    total: int
    """Rows in all files."""
    steps: tuple[int, ...]
    """Stored steps."""


def trajectory_files(run: Path) -> list[Path]:
    """Parquet files of a run, oldest step first."""
    return sorted((run / "trajectories").glob("step_*.parquet"))


def step_of(path: Path) -> int:
    """The step in a file's name.

    >>> step_of(Path("step_000012.parquet"))
    12
    """
    digits = path.stem.removeprefix("step_")
    if not digits.isdecimal():
        raise UserError(f"{path}: not a file of stored trajectories; they are named step_NNNNNN.parquet")
    return int(digits)


def sample(run: Path, *, rows: int, tokens: int) -> Stored:
    """At most so many rows and response tokens, drawn evenly over the files, the same at every call.

    Raises:
        UserError: a file is damaged or foreign.
    """
    files = trajectory_files(run)
    steps = tuple(map(step_of, files))
    chosen = _thin(files, rows)
    drawn: list[Row] = []
    for path in chosen:
        drawn += _draw(path, rows=rows // len(chosen), tokens=tokens // len(chosen))
    total = sum(_opened(path).metadata.num_rows for path in files)
    return Stored(rows=tuple(drawn), total=total, steps=steps)


def _thin(files: Sequence[Path], most: int) -> list[Path]:
    """Evenly spaced, the first and the last included."""
    if len(files) <= most:
        return list(files)
    if most == 1:
        return [files[-1]]
    return [files[round(i * (len(files) - 1) / (most - 1))] for i in range(most)]


def _draw(path: Path, *, rows: int, tokens: int) -> list[Row]:
    count = _opened(path).metadata.num_rows
    wanted = set(random.Random(path.name).sample(range(count), min(count, max(1, rows))))
    drawn: list[Row] = []
    left = tokens
    for row in read_rows(path, wanted=wanted, late=_TOPS):
        if drawn and left < len(row["response"]):
            break
        left -= len(row["response"])
        drawn.append(row)
    return drawn


def listed(value: Any) -> Any:
    """A value of a row as plain Python, whether it was read late or not."""
    return value.as_py() if isinstance(value, pa.Scalar) else value


def read_rows(
    path: Path, *, wanted: set[int] | None = None, contexts: bool = False, late: Sequence[str] = ()
) -> Iterator[Row]:
    """Rows of one file in order, all or those with a wanted index; a batch in memory at a time. Columns that
    are `late` come as Arrow scalars, and not at all where they are null.

    Raises:
        UserError: damaged, or not what a run stores.
    """
    file, start = _opened(path), 0
    if not file.metadata.num_rows:  # a step without trajectories has no columns either
        return
    columns = [c for c in file.schema_arrow.names if contexts or c not in _UNUSED]
    needed = {"step", "tokens", "response", "edit", "detail"}
    if contexts:
        needed |= {"prompt", "prompt_id", "answer", "finish_reason"}
    missing = needed - set(columns)
    if missing:
        raise UserError(f"{path}: not stored trajectories: it lacks the column {min(missing)}")
    for name, is_right in _KINDS.items():
        if name in columns and not is_right(file.schema_arrow.field(name).type):
            raise UserError(f"{path}: not stored trajectories: the column {name} has another type")
    try:
        for batch in file.iter_batches(batch_size=_BATCH, columns=columns):
            here = [i for i in range(batch.num_rows) if wanted is None or start + i in wanted]
            start += batch.num_rows
            if here:
                yield from _rows_of(batch.take(pa.array(here, pa.int64())), late)
            if wanted is not None and start > max(wanted, default=-1):
                return
    except (pa.ArrowException, OSError, ValueError, RecursionError) as error:
        raise _damaged(path, error) from None


def _rows_of(batch: pa.RecordBatch, late: Sequence[str]) -> Iterator[Row]:
    names = [name for name in late if name in batch.schema.names]
    for place, row in enumerate(batch.drop_columns(names).to_pylist()):
        kept = {name: batch.column(name)[place] for name in names}
        row |= {name: scalar for name, scalar in kept.items() if scalar.is_valid}
        detail = parse_json(row["detail"] or "{}")
        if not isinstance(detail, dict) or row["response"] is None or row["tokens"] is None:
            raise ValueError(f"row of prompt {row.get('prompt_id')!r}: no response, or a detail that is none")
        yield {**row, "detail": detail}


def quantities(row: Row) -> list[str]:
    """Names of the per-token quantities that a row holds.

    >>> quantities({"response": [4, 2], "reverse_kl": [0.1, 0.2], "weights": [1.0, 1.0], "edit": "none"})
    ['reverse_kl']
    """
    return [
        name
        for name, value in row.items()
        if name not in NOT_QUANTITIES and isinstance(value, list) and value and isinstance(value[0], float)
    ]


def _opened(path: Path) -> Any:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> UserError:
    reason = str(error).split("\n")[0].rstrip(". ")
    return UserError(f"{path}: damaged or not Parquet ({reason}); remove it, or run that step again")
