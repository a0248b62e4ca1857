"""Prompts from files, `datasets`, tasks and own code, and the order in which training sees them. No torch.

Columns: `prompt` (text, or messages of role and content) or `messages` (a conversation, asked up to its last
assistant turn), optional `answer`, verl's `reward_model.ground_truth`, or `tests` of a program (what the
grader compares with), optional `solution` or TRL's `privileged_context` (what only a teacher may see),
optional `id`, and with several teachers the column that `data.teacher_column` says. Other columns are
ignored, so TRL's prompt-only data sets work unchanged.
"""

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

from onpath.data.packs import pack_of
from onpath.data.rows import BadRow, in_words_of, prompt_of, renamed
from onpath.data.sources import rows_of
from onpath.data.tasks import task_of
from onpath.records import Prompt
from onpath.system.errors import UserError

_SOME = 64
REASONS_KEPT = 5


@dataclass(frozen=True, kw_only=True)
class LoadedPrompts:
    """What a source held.

    >>> LoadedPrompts(prompts=(Prompt(id="0", text="7 + 5?"),), skipped=0, source="a.jsonl").skipped
    0
    """

    prompts: tuple[Prompt, ...]
    """Never empty; ids are unique."""
    skipped: int
    """Bad rows that `skip_bad` left out."""
    source: str
    reasons: tuple[str, ...] = ()
    """Where and why, for the first few skipped rows."""


def load_prompts(
    source: str,
    *,
    limit: int | None = None,
    skip_bad: bool = False,
    split_default: str = "train",
    columns: Mapping[Any, str] | None = None,
    all_columns: bool = True,
    teachers: Sequence[str] = (),
    refuses: Callable[[Prompt], str | None] | None = None,
    key: str = "",
) -> LoadedPrompts:
    """Reads the prompts of a source.

    Args:
        source: a JSONL, JSON, CSV or Parquet file, a directory written by `Dataset.save_to_disk`, a
            `datasets` name (both of the latter with an optional `:split`), a task's split such as
            `gym:train`, a pack such as `pack:humaneval`, or own code that gives rows (`file.py:name`: an
            iterable, or a function without arguments that returns one).
        limit: keep only the first so many good rows; None keeps all (of a task: as many as it says).
        skip_bad: count bad rows instead of stopping at the first.
        split_default: split of a `datasets` source that names none.
        columns: ours → what the source calls it; a dot leads into a mapping. Rows of tasks and packs are
            ours.
        all_columns: whether each of them must be there; else our own names will do where one is not.
        teachers: names, of which each row must have one; the one called `default` has the rows that name
            none. Without them no row has a teacher.
        refuses: why a prompt is a bad row after all; None: it is none.
        key: the option that names the source, for the sentence where it is not there.

    Raises:
        UserError: unreadable or empty source, missing column, or a bad row (with file, line and reason).
    """
    prompts: dict[str, Prompt] = {}
    skipped: list[str] = []
    theirs = {} if task_of(source) or pack_of(source) else dict(columns or {})
    seen: set[str] = set()
    for number, row in enumerate(rows_of(source, limit, split_default, theirs, key)):
        if limit is not None and len(prompts) >= limit:
            break
        here: set[str] = set()
        try:
            if row.wrong:
                raise BadRow(row.wrong)
            found = renamed(row.value, theirs, here)
            seen |= here
            with in_words_of({ours: theirs[ours] for ours in here}):
                prompt = prompt_of(
                    found, default_id=str(number), teachers=teachers, told=theirs.get("prompt")
                )
            prompt = replace(prompt, where=row.where)
            if refuses is not None and (why := refuses(prompt)):
                raise BadRow(why)
            if prompt.id in prompts:
                first = prompts[prompt.id].where
                raise BadRow(f"id {prompt.id!r} is also that of {first}; ids must be unique")
        except BadRow as reason:
            if not skip_bad:
                raise UserError(f"{row.where}: {reason} (data.skip_bad: true skips such rows)") from None
            skipped.append(f"{row.where}: {reason}")
            continue
        prompts[prompt.id] = prompt
    if all_columns and (unseen := [ours for ours in theirs if ours not in seen]):
        key = "data.teacher_column" if unseen[0] == "teacher" else f"data.columns.{unseen[0]}"
        raise UserError(f"{source}: no row has {theirs[unseen[0]]!r}, which {key} says is its {unseen[0]}")
    if not prompts:
        detail = f"all {len(skipped)} rows are bad, first {skipped[0]}" if skipped else "it has no rows"
        raise UserError(f"{source}: no prompts to use: {detail}")
    return LoadedPrompts(
        prompts=tuple(prompts.values()),
        skipped=len(skipped),
        source=source,
        reasons=tuple(skipped[:REASONS_KEPT]),
    )


@lru_cache(maxsize=4)
def shuffled(n: int, *, seed: int, epoch: int) -> Sequence[int]:
    """The order of `n` prompts in an epoch: a permutation that depends on (n, seed, epoch) alone."""
    order = list(range(n))
    # A text seed goes through SHA-512, so that neighbouring seeds and epochs give unrelated orders.
    random.Random(f"onpath order {seed} {epoch}").shuffle(order)
    return order


def some_of(prompts: Sequence[Prompt]) -> Sequence[Prompt]:
    """At most 64, spread over all: what tells how prompts are worded and rendered."""
    return prompts[:: max(1, len(prompts) // _SOME)][:_SOME]


def digest_prompts(prompts: Sequence[Prompt]) -> str:
    """Digest of problems, answers and solutions in their order."""
    made = hashlib.blake2b(digest_size=16)
    for prompt in prompts:
        known = asdict(prompt)
        del known["where"]  # a path does not say what it holds
        for name in ("teacher", "tests"):  # as it was digested when there were no such fields
            if not known[name]:
                del known[name]
        made.update(json.dumps(known, sort_keys=True).encode() + b"\n")
    return made.hexdigest()


def prompts_of_step(prompts: Sequence[Prompt], *, size: int, seed: int, step: int) -> list[Prompt]:
    """The `size` prompts of optimiser step `step` (from 0): entries step·size … (step+1)·size − 1 of an
    endless sequence of shuffled epochs.

    A pure function, so that a resumed run needs no state. Within an epoch no prompt repeats; a step that
    spans two epochs (where `size` does not divide the pool) may hold a prompt twice.

    Raises:
        UserError: `size` exceeds the pool.
    """
    pool = len(prompts)
    if size > pool:
        raise UserError(
            f"rollout.prompts is {size}, but there are only {pool} training prompts; lower it to at most "
            f"{pool} (rollout.n draws more samples of each)"
        )
    return [
        prompts[shuffled(pool, seed=seed, epoch=position // pool)[position % pool]]
        for position in range(step * size, (step + 1) * size)
    ]
