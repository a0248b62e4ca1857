"""Evaluation: n samples per problem, graded; avg@k and pass@k with intervals; paired comparisons.

Works with any engine: `generate` and `decode` are passed in. No torch.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from onpath.evaluate.stats import bootstrap_interval, difference_interval, pass_at_k, sign_flip_p_value
from onpath.grade.base import Grader
from onpath.records import Graded, Prompt, Rollout, Sampling
from onpath.system.errors import UserError
from onpath.system.files import place, write_text
from onpath.system.reading import check_keys, parse_json, read_text
from onpath.system.text import one_line

Generate = Callable[[Sequence[Prompt], int], Sequence[Rollout]]
"""(prompts, n) → n rollouts per prompt, the prompts in order, a prompt's rollouts together."""
Decode = Callable[[Sequence[int]], str]
"""Response ids → the text that is graded, with special tokens only where they are tags of thinking."""
ErrorKind = Callable[[Rollout], str]
"""What went wrong first in a wrong sample."""
Keep = Callable[[Sequence[Rollout]], Path]
"""Writes samples that could not be graded; says where."""
NAMED = 3
"""Differing problems named in a message."""


@dataclass(frozen=True, kw_only=True)
class ProblemResult:
    """One problem's samples.

    >>> ProblemResult(id="0", digest="", correct=(True, False), lengths=(9, 12), finished=(True, True)).score
    0.5
    """

    id: str
    digest: str
    """Of question and answer: equal ids of different data sets are not the same problem."""
    correct: tuple[bool, ...]
    lengths: tuple[int, ...]
    """Response tokens, the stop token included."""
    finished: tuple[bool, ...]
    """Whether the sample ended by itself (finish_reason stop)."""
    errors: tuple[str | None, ...] = ()
    """What went wrong first in each sample, where the task can tell; None: the sample is right."""

    @property
    def score(self) -> float:
        """Share of right samples."""
        return sum(self.correct) / len(self.correct)


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """A line of eval.jsonl, and behind it the problems one by one.

    `avg_at_k` is the mean over problems of the share of all n samples that are right; `pass_at_k` the mean of
    the unbiased estimate for k of n. Intervals are 95%, over problems.
    """

    step: int
    """Optimiser steps that the weights had seen."""
    split: str
    n: int
    k: int
    problems: int
    avg_at_k: float
    ci95: tuple[float, float]
    """Of avg_at_k."""
    pass_at_k: float
    pass_at_k_ci95: tuple[float, float]
    mean_length: float
    """Tokens per response, the stop token included."""
    finished: float
    """Share of responses that ended by themselves."""
    first_errors: Mapping[str, float] | None = None
    """Kind of first error → share of all samples that are wrong by it; together 1 − avg_at_k. None: the task
    cannot tell."""
    grader: str
    sampling: Sampling
    details: tuple[ProblemResult, ...] = field(repr=False)
    """In the order of the prompts; written by `write_details`, not by `to_json`."""

    def to_json(self) -> dict[str, Any]:
        """JSON-ready, without the details."""
        plain = asdict(self)
        del plain["details"]
        if self.first_errors is None:
            del plain["first_errors"]
        return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}

    @property
    def scores(self) -> dict[str, tuple[bool, ...]]:
        """Problem id → verdicts, for `paired_difference`."""
        return {problem.id: problem.correct for problem in self.details}


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """Model a minus model b on the same problems."""

    problems: int
    mean_a: float
    mean_b: float
    difference: float
    """mean_a − mean_b."""
    ci95: tuple[float, float]
    p_value: float
    """Two-sided, sign flips over problems."""
    notes: tuple[str, ...] = ()
    """Settings that differ without forbidding the comparison."""


def evaluate(
    prompts: Sequence[Prompt],
    generate: Generate,
    decode: Decode,
    grader: Grader,
    *,
    n: int,
    k: int,
    step: int,
    split: str,
    error_kind: ErrorKind | None = None,
    keep: Keep | None = None,
) -> tuple[EvalResult, list[Graded]]:
    """Samples, grades and counts.

    Args:
        prompts: problems with answers and unique ids.
        n: samples per problem, k: of pass@k, 1 ≤ k ≤ n.
        step: optimiser steps that the weights had seen.
        error_kind: says what went wrong first in a wrong sample.
        keep: is given the rollouts where the grader fails; None: then they are lost.

    Returns:
        The result, and every rollout with its verdict in the engine's order.

    Raises:
        UserError: no prompts, k > n, a prompt without an answer, or a grader that says what is wrong.
    """
    check(prompts, n=n, k=k, split=split)
    rollouts = list(generate(prompts, n))
    expected = [prompt.id for prompt in prompts for _ in range(n)]
    assert [r.prompt.id for r in rollouts] == expected, (
        "the engine must return n rollouts per prompt, in order"
    )
    sampling = rollouts[0].sampling
    assert all(r.sampling == sampling for r in rollouts), "an evaluation samples in one way"
    try:
        verdicts = grader.grade_many([(decode(r.ids), r.prompt.answer or "") for r in rollouts])
    except Exception as error:
        if keep is None:
            raise
        said = f"the {len(rollouts):,} samples are kept, ungraded, in {keep(rollouts)}"
        if isinstance(error, UserError):
            told = UserError(f"{error}; {said}")
            told.frames = error.frames
            raise told from error
        error.add_note(said)
        raise
    graded = [
        Graded(rollout=r, correct=v.correct, extracted=v.extracted)
        for r, v in zip(rollouts, verdicts, strict=True)
    ]
    details = tuple(_problem_result(graded[i : i + n], error_kind) for i in range(0, len(graded), n))
    return summarise(details, n=n, k=k, step=step, split=split, grader=grader.name, sampling=sampling), graded


def check(prompts: Sequence[Prompt], *, n: int, k: int, split: str) -> None:
    """Refuses an impossible evaluation: call it before a model loads. `UserError` says what is wrong."""
    if not 1 <= k <= n:
        raise UserError(f"eval.k is {k}, but must be between 1 and eval.n, the {n} samples per problem")
    if not prompts:
        raise UserError(f"evaluation set {split!r} has no prompts")
    without = [prompt.named for prompt in prompts if prompt.answer is None]
    if without:
        raise UserError(
            f"evaluation set {split!r}: {len(without)} of {len(prompts)} prompts have no answer to grade "
            f"against, the first is {without[0]}; add a column 'answer', or say with "
            "data.columns which one it is (onpath eval: --columns)"
        )


def summarise(
    details: Sequence[ProblemResult],
    *,
    n: int,
    k: int,
    step: int,
    split: str,
    grader: str,
    sampling: Sampling,
) -> EvalResult:
    """The numbers of an evaluation from its problems, each of which has n samples."""
    scores = [problem.score for problem in details]
    passes = [pass_at_k(n=n, c=sum(problem.correct), k=k) for problem in details]
    return EvalResult(
        step=step,
        split=split,
        n=n,
        k=k,
        problems=len(details),
        avg_at_k=float(np.mean(scores)),
        ci95=bootstrap_interval(scores),
        pass_at_k=float(np.mean(passes)),
        pass_at_k_ci95=bootstrap_interval(passes),
        mean_length=float(np.mean([problem.lengths for problem in details])),
        finished=float(np.mean([problem.finished for problem in details])),
        first_errors=first_errors(details),
        grader=grader,
        sampling=sampling,
        details=tuple(details),
    )


def first_errors(details: Sequence[ProblemResult]) -> dict[str, float] | None:
    """Kind → share of all samples; None where no sample says."""
    if not any(problem.errors for problem in details):
        return None
    samples = sum(len(problem.correct) for problem in details)
    kinds = Counter(kind for problem in details for kind in problem.errors if kind is not None)
    return {kind: count / samples for kind, count in sorted(kinds.items())}


def _problem_result(graded: Sequence[Graded], error_kind: ErrorKind | None) -> ProblemResult:
    prompt = graded[0].rollout.prompt
    kinds = tuple(None if g.correct else error_kind(g.rollout) for g in graded) if error_kind else ()
    return ProblemResult(
        id=prompt.id,
        digest=_digest(prompt),
        correct=tuple(g.correct for g in graded),
        lengths=tuple(len(g.rollout.ids) for g in graded),
        finished=tuple(g.rollout.finish_reason == "stop" for g in graded),
        errors=kinds,
    )


def _digest(prompt: Prompt) -> str:
    messages = None if prompt.messages is None else [dict(message) for message in prompt.messages]
    content = json.dumps([prompt.text, messages, prompt.answer], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def paired_difference(
    a: Mapping[str, Sequence[float]],
    b: Mapping[str, Sequence[float]],
    *,
    graders: tuple[str, str] | None = None,
    seed: int = 0,
) -> PairedDifference:
    """Compares two models on the same problems; the numbers of samples may differ.

    Args:
        a, b: problem id → scores of its samples, each within [0, 1] (True and False will do).
        graders: what graded a and b, where known.

    Raises:
        UserError: the problems or the graders differ, or there are none.
    """
    if graders is not None and graders[0] != graders[1]:
        raise UserError(f"cannot compare: one was graded by {graders[0]!r}, the other by {graders[1]!r}")
    for ours, theirs, which in ((a, b, "second"), (b, a, "first")):
        if missing := [key for key in ours if key not in theirs]:
            raise UserError(
                f"cannot compare: the {which} lacks {_named(missing)}; evaluate both on the same data"
            )
    if empty := [key for key in a if not len(a[key]) or not len(b[key])]:
        raise UserError(f"cannot compare: no samples of {_named(empty)}")
    if not a:
        raise UserError("cannot compare: there are no problems")
    means_a, means_b = (np.array([np.mean(side[key]) for key in a], dtype=np.float64) for side in (a, b))
    return PairedDifference(
        problems=len(a),
        mean_a=float(means_a.mean()),
        mean_b=float(means_b.mean()),
        difference=float((means_a - means_b).mean()),
        ci95=difference_interval(means_a - means_b, seed=seed),
        p_value=sign_flip_p_value(means_a - means_b, seed=seed),
    )


def _named(ids: Sequence[str]) -> str:
    shown = ", ".join(map(repr, ids[:NAMED]))
    more = f" and {len(ids) - NAMED} more" if len(ids) > NAMED else ""
    return f"problem{'s' if len(ids) > 1 else ''} {shown}{more}"


def write_details(path: Path, result: EvalResult) -> None:
    """Writes one JSON line per problem, whole or not at all.

    Keys: id, digest, correct, lengths, finished, errors where the task knows them; and the same on every
    line: step, split, grader, sampling.

    Raises:
        UserError: the file cannot be written.
    """
    shared = {
        "step": result.step,
        "split": result.split,
        "grader": result.grader,
        "sampling": asdict(result.sampling),
    }
    rows = [{**asdict(problem), **shared} for problem in result.details]
    for row in rows:
        if not row["errors"]:
            del row["errors"]
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


@dataclass(frozen=True, kw_only=True)
class Details:
    """What a comparison needs of an evaluation."""

    name: str
    """For messages: the file, or step and split."""
    grader: str
    sampling: Mapping[str, Any]
    problems: Mapping[str, ProblemResult]


_KINDS: dict[str, type] = {"correct": bool, "lengths": int, "finished": bool}
_OF_DETAILS = {"id": str, "digest": str, "grader": str, "sampling": dict, **dict.fromkeys(_KINDS, list)}


def read_details(path: str | Path) -> Details:
    """Reads what `write_details` wrote.

    Raises:
        UserError: missing, empty or foreign file (with the line).
    """
    lines = read_text(place(path), most=2**32).split("\n")
    problems: dict[str, ProblemResult] = {}
    settings: list[tuple[str, Mapping[str, Any]]] = []
    for number, line in enumerate(lines, start=1):
        if not line and number == len(lines):
            continue
        where = f"{path}, line {number}: not a line of evaluation details"
        try:
            row = parse_json(line)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from None
        check_keys(row, _OF_DETAILS, where=where)
        samples = {key: tuple(row[key]) for key in _KINDS}
        for key, kind in _KINDS.items():
            if len(samples[key]) != len(samples["correct"]) or any(type(v) is not kind for v in samples[key]):
                raise UserError(f"{where}: damaged: {key} is {one_line(repr(row[key]), 40)}")
        errors = tuple(row.get("errors") or ())
        if any(e is not None and not isinstance(e, str) for e in errors):
            raise UserError(f"{where}: damaged: errors is {one_line(repr(row['errors']), 40)}")
        problems[row["id"]] = ProblemResult(id=row["id"], digest=row["digest"], **samples, errors=errors)
        settings.append((row["grader"], row["sampling"]))
    if not problems:
        raise UserError(f"{path}: holds no evaluation details")
    grader, sampling = settings[0]
    if any(other != settings[0] for other in settings):
        raise UserError(f"{path}: mixes evaluations with different graders or sampling settings")
    return Details(name=str(path), grader=grader, sampling=sampling, problems=problems)


def _details(evaluation: str | Path | EvalResult) -> Details:
    if not isinstance(evaluation, EvalResult):
        return read_details(evaluation)
    return Details(
        name=f"{evaluation.split} at step {evaluation.step}",
        grader=evaluation.grader,
        sampling=asdict(evaluation.sampling),
        problems={problem.id: problem for problem in evaluation.details},
    )


def compare(a: str | Path | EvalResult, b: str | Path | EvalResult) -> PairedDifference:
    """Paired difference (a minus b) of two evaluations, saved by `write_details` or in memory; sampling
    settings that differ are noted.

    Raises:
        UserError: unreadable file, or the problems or graders differ.
    """
    one, two = _details(a), _details(b)
    common = one.problems.keys() & two.problems.keys()
    if other := sorted(key for key in common if one.problems[key].digest != two.problems[key].digest):
        raise UserError(f"cannot compare {one.name} with {two.name}: {_named(other)} not the same in both")
    try:
        result = paired_difference(
            {key: problem.correct for key, problem in one.problems.items()},
            {key: problem.correct for key, problem in two.problems.items()},
            graders=(one.grader, two.grader),
        )
    except UserError as error:
        raise UserError(f"{one.name} and {two.name}: {error}") from None
    keys = sorted(one.sampling.keys() | two.sampling.keys())
    pairs = {key: (one.sampling.get(key), two.sampling.get(key)) for key in keys}
    notes = tuple(f"sampling.{key}: {x} against {y}" for key, (x, y) in pairs.items() if x != y)
    return replace(result, notes=notes)
