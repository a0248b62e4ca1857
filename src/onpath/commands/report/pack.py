"""Trajectories as the page embeds them: tokens as indices into one table, numbers as base64 of float16.

200 trajectories of 1,000 tokens with six numbers each would be 8 MB of decimal text; so they are 4. Half
floats carry three digits, which is what the page shows.
"""

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from onpath.commands.report.text import cell, diff, sides, was_changed
from onpath.run.trajectories import Row, listed, quantities

PLAN_SHARE = 0.1
"""Transport entries below this share of a student's token are not drawn."""
_LONGEST_PROMPT = 20_000  # characters
_MOST_STRINGS = 2**16  # what an index of two bytes can name
_FORK = {
    "position": "at",
    "decision": "decision",
    "loss": "loss",
    "sampled_gap": "gap",
    "distance": "d",
    "weight": "w",
}


@dataclass
class Vocabulary:
    """Display strings of all tokens on the page, each once.

    >>> table = Vocabulary()
    >>> table.indices(["a", "b", "a"]), table.strings
    ([0, 1, 0], ['a', 'b'])
    """

    places: dict[str, int] = field(default_factory=dict)

    def indices(self, tokens: Iterable[str]) -> list[int]:
        """Place of each token, new ones added."""
        return [self.places.setdefault(token, len(self.places)) for token in tokens]

    @property
    def strings(self) -> list[str]:
        return list(self.places)


def pack_all(
    rows: Sequence[Row], *, known: Mapping[int, str], budget: int, labels: Any = None
) -> tuple[list[dict[str, Any]], list[str]]:
    """Packed trajectories and the table of their tokens, as many as fit into `budget` bytes of JSON; then, as
    long as there is room, the likeliest tokens of both models along them.

    Args:
        rows: the most wanted first.
        known: token id → display string, for rollouts that were rewritten.
        labels: (prompt, tokens) → one kind per token, where the task knows the truth.
    """
    table, spent = Vocabulary(), 0
    packed: list[dict[str, Any]] = []
    for row in rows:
        one = pack(row, table, known, labels)
        spent += len(json.dumps(one))
        if packed and (spent > budget or len(table.places) > _MOST_STRINGS):
            break
        packed.append(one)
    strings = table.strings[:_MOST_STRINGS]
    room = budget - spent - len(json.dumps(strings))
    for row, one in zip(rows, packed, strict=False):
        writers = [who for who in ("student", "teacher") if row.get(f"{who}_top_tokens")]
        top = {who: _top(row, who, table) for who in writers} if room > 0 else {}
        new = table.strings[len(strings) :]
        room -= len(json.dumps(top)) + len(json.dumps(new)) if top else 0
        if top and room > 0 and len(table.places) <= _MOST_STRINGS:
            one["top"] = top
            strings += new
        elif writers:
            room, one["top_left_out"] = 0, True
    return packed, strings


def pack(row: Row, table: Vocabulary, known: Mapping[int, str], labels: Any = None) -> dict[str, Any]:
    """One trajectory."""
    detail = dict(row["detail"])
    forks = detail.pop("forks", None) or []
    packed: dict[str, Any] = {
        **{key: row.get(key) for key in ("step", "sample", "correct", "edit", "kept", "reason", "arm")},
        "id": row.get("prompt_id"),
        "finish": row.get("finish_reason"),
        "version": row.get("policy_version"),
        "prompt": (row.get("prompt") or "")[:_LONGEST_PROMPT],
        "answer": row.get("answer"),
        "solution": row.get("solution"),
        "cell": cell(row),
        "tokens": integers(table.indices(row["tokens"])),
        "values": {name: halves(row[name]) for name in quantities(row)},
        "max_kl": round(max(row.get("reverse_kl") or [0.0]), 4),
        "detail": {k: v for k, v in detail.items() if isinstance(v, bool | int | float | str)},
        "forks": [pack_fork(fork, table) for fork in forks],
    }
    if any(w != 1.0 for w in row.get("weights") or ()):
        packed["values"]["weight"] = halves(row["weights"])
    if any(who != "student" for who in row.get("writers") or ()):
        packed["values"]["not by the student"] = halves([float(who != "student") for who in row["writers"]])
    if was_changed(row):
        y, z = sides(row, known)
        packed |= {"y": integers(table.indices(y)), "z": integers(table.indices(z)), "diff": diff(y, z)}
    if labels is not None:
        packed["labels"] = labels(row.get("prompt") or "", row["tokens"])
    return {key: value for key, value in packed.items() if value not in (None, [], {})}


def _top(row: Row, who: str, table: Vocabulary) -> dict[str, Any]:
    """The likeliest tokens of one model at every position: k of them, flattened."""
    tokens, logps = (listed(row[f"{who}_top_{what}"]) for what in ("tokens", "logp"))
    return {
        "k": len(tokens[0]) if tokens else 0,
        "tokens": integers(table.indices(t for place in tokens for t in place)),
        "logp": halves([x for place in logps for x in place]),
    }


def pack_fork(fork: Mapping[str, Any], table: Vocabulary) -> dict[str, Any]:
    """One fork: its numbers, both windows, and the stronger entries of the plan, flattened to i, j, share."""
    strong = [entry for entry in fork.get("plan") or () if entry[2] >= PLAN_SHARE]
    return {
        **{short: _rounded(fork.get(name)) for name, short in _FORK.items()},
        "s": integers(table.indices(fork.get("student_tokens") or ())),
        "t": integers(table.indices(fork.get("teacher_tokens") or ())),
        "plan": halves([x for entry in strong for x in entry]),
        "spread": bool(fork.get("plan")) and not strong,
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}") if np.isfinite(value) else None
    return value


def integers(values: Sequence[int]) -> str:
    """Little-endian unsigned 16-bit, base64."""
    low = np.minimum(np.asarray(values, dtype=np.int64), _MOST_STRINGS - 1)
    return base64.b64encode(low.astype("<u2").tobytes()).decode()


def halves(values: Sequence[float | None]) -> str:
    """Little-endian float16, base64; None is NaN; beyond ±65,504 it is infinite, as a log-prob of −∞ is."""
    with np.errstate(over="ignore"):
        return base64.b64encode(np.asarray(values, dtype=np.float64).astype("<f2").tobytes()).decode()


def script_json(data: Any) -> str:
    """JSON that can stand inside a script element: no markup character, no JavaScript line separator.

    >>> script_json({"a": "</script>"})
    '{"a":"\\\\u003c/script\\\\u003e"}'
    """
    text = json.dumps(_finite(data), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode("utf-8", "backslashreplace").decode()  # a lone surrogate is not UTF-8


def _finite(data: Any) -> Any:
    """NaN and infinities are not JSON: null."""
    match data:
        case dict():
            return {str(key): _finite(value) for key, value in data.items()}
        case list() | tuple():
            return [_finite(value) for value in data]
        case float() if not np.isfinite(data):
            return None
        case _:
            return data
