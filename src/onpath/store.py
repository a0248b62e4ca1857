"""What was trained on, as Parquet: one file per stored step, readable with pandas."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from onpath.config import Config
from onpath.errors import UserError
from onpath.records import Graded, Trajectory
from onpath.render import Renderer

TOP_TOKENS = 5
"""Likeliest tokens of both models that are stored per response token."""


def is_stored(config: Config, step: int) -> bool:
    """Whether the trajectories of a step (the first is 1) are written."""
    every = config.run.trajectories_every
    return bool(every) and (step in (1, config.optim.steps) or step % every == 0)


def trajectory_row(
    trajectory: Trajectory,
    *,
    step: int,
    renderer: Renderer,
    correct: bool | None,
    values: Mapping[str, Sequence[float]],
    top: Mapping[str, Sequence[Sequence[Any]]] | None = None,
) -> dict[str, Any]:
    """One trajectory as plain values.

    Args:
        values: per-token numbers by name, as long as the response.
        top: `{student,teacher}_top_{ids,logp}`, a list per response token, likeliest first.
    """
    origin = trajectory.origin
    return {
        "step": step,
        "prompt_id": origin.prompt.id if origin else None,
        "sample": origin.sample if origin else None,
        "prompt": origin.prompt.question if origin else None,
        "answer": origin.prompt.answer if origin else None,
        "solution": origin.prompt.solution if origin else None,
        "correct": correct,
        "student_context": list(trajectory.student_context),
        "teacher_context": list(trajectory.teacher_context),
        "response": list(trajectory.response),
        "response_text": renderer.text(trajectory.response),
        "tokens": renderer.tokens(trajectory.response),
        "weights": list(trajectory.token_weights),
        "origin_response": list(origin.ids) if origin else None,
        "origin_text": renderer.text(origin.ids) if origin else None,
        "origin_tokens": renderer.tokens(origin.ids) if origin else None,
        "origin_logprobs": list(origin.logprobs) if origin else None,
        "finish_reason": origin.finish_reason if origin else None,
        "policy_version": origin.policy_version if origin else None,
        "edit": trajectory.edit.kind,
        "kept": trajectory.edit.kept,
        "reason": trajectory.edit.reason,
        "detail": json.dumps(dict(trajectory.edit.detail)),
        **{name: list(v) for name, v in values.items()},
        **top_columns(top or {}, renderer),
    }


def top_columns(top: Mapping[str, Sequence[Sequence[Any]]], renderer: Renderer) -> dict[str, Any]:
    """`{student,teacher}_top_{tokens,logp}`: what both models would rather, or also, have written; nats."""
    return {
        name.replace("_ids", "_tokens"): [
            renderer.tokens(r) if name.endswith("_ids") else list(r) for r in rows
        ]
        for name, rows in top.items()
    }


def sample_row(graded: Graded, renderer: Renderer) -> dict[str, Any]:
    """One graded sample as plain values."""
    rollout = graded.rollout
    return {
        "id": rollout.prompt.id,
        "sample": rollout.sample,
        "correct": graded.correct,
        "extracted": graded.extracted,
        "length": len(rollout.ids),
        "finish_reason": rollout.finish_reason,
        "text": renderer.text(rollout.ids),
        "ids": list(rollout.ids),
    }


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Complete or not at all.

    Raises:
        UserError: the disk is full or not writable.
    """
    temporary = path.with_suffix(f".tmp-{os.getpid()}")
    columns = dict.fromkeys(name for row in rows for name in row)  # the first row may not have been scored
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({c: [row.get(c) for row in rows] for c in columns}), temporary)
        os.replace(temporary, path)
    except (OSError, pa.ArrowException) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"{path}: cannot write: {error}; free some space and start the same command again"
        ) from None


def read_trajectories(run: Path) -> list[dict[str, Any]]:
    """All stored rows of a run, oldest step first."""
    rows: list[dict[str, Any]] = []
    for path in sorted((run / "trajectories").glob("step_*.parquet")):
        rows += pq.read_table(path).to_pylist()
    return rows
