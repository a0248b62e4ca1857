"""`onpath eval`: one model, or two on the same problems."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from onpath.config import Student
from onpath.data.load import load_prompts
from onpath.data.render import Renderer
from onpath.data.tasks import split_name
from onpath.engines.head import head_of
from onpath.engines.hf import HFEngine
from onpath.engines.models import load_model, load_tokenizer, pick_device, stop_ids
from onpath.evaluate.scores import EvalResult, PairedDifference, compare, evaluate
from onpath.grade.base import Grader
from onpath.grade.graders import grader_for
from onpath.records import Prompt, Rollout, Sampling
from onpath.run.trajectories import sample_row, write_parquet
from onpath.system import code
from onpath.system.errors import UserError
from onpath.system.files import make_directory, write_text

_DTYPES = ("float32", "bfloat16", "float16")
_COLUMNS = (
    "model", "split", "problems", "avg@n", "95% interval", "pass@k", "95% interval", "length", "ended"
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """What `evaluate_model` found."""

    results: Mapping[str, EvalResult]
    """Model → its numbers; the first is the model that was asked for."""
    difference: PairedDifference | None
    """The model minus the one that it was compared with."""

    def to_json(self) -> dict[str, Any]:
        """eval.json."""
        report: dict[str, Any] = {"models": {name: r.to_json() for name, r in self.results.items()}}
        if self.difference is not None:
            report["paired_difference"] = {
                "avg_at_k": self.difference.difference,
                "ci95": list(self.difference.ci95),
                "p_value": self.difference.p_value,
            }
        return report


def evaluate_model(
    model: str | Path,
    *,
    data: str | Path,
    against: str | Path | None = None,
    n: int | None = None,
    k: int = 4,
    limit: int | None = None,
    grader: str = "auto",
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    max_new_tokens: int = 128,
    batch_tokens: int = 32_768,
    seed: int = 1234,
    dtype: str = "float32",
    device: str = "auto",
    allow_code: bool = False,
    out: str | Path | None = None,
) -> Evaluated:
    """Samples a model's answers and grades them; with `against` also a second model's, on the same problems.

    Prompts are rendered by the tokenizer's own template.

    Args:
        model: a Hugging Face model directory or hub name, a LoRA adapter, `gym:student` or `gym:teacher`.
        data: problems with answers, as `data.eval`.
        against: a second model.
        n: samples per problem; None: k.
        k: of pass@k.
        limit: only the first so many problems.
        grader: auto, gym, math, exact, or a function of your own as file.py:name.
        temperature, top_p, top_k, max_new_tokens, seed: of the samples; temperature 0 is greedy.
        batch_tokens: tokens in one generation batch.
        dtype: of the weights: float32, bfloat16 or float16.
        device: auto, or as torch names it.
        allow_code: run the Python files that `grader` and `data` name.
        out: directory for eval.json and the graded samples.

    Raises:
        UserError: something that the caller can fix, in one sentence.
    """
    count = k if n is None else n
    sampling = Sampling(
        temperature=temperature, top_p=top_p, top_k=top_k, max_new_tokens=max_new_tokens, seed=seed
    )
    _check(sampling, n=count, k=k, batch_tokens=batch_tokens, dtype=dtype)
    source = str(data)
    with code.allowed(allow_code):
        prompts = load_prompts(source, limit=limit, split_default="test").prompts
        chosen = grader_for(grader, [source])
    split = split_name(source)
    if out is not None:
        make_directory(Path(out))
        (Path(out) / "eval.json").unlink(missing_ok=True)  # it comes last: where it is, the samples are
    results = {}
    with chosen as judge:
        questions = _Questions(
            prompts=prompts,
            grader=judge,
            sampling=sampling,
            n=count,
            k=k,
            split=split,
            batch_tokens=batch_tokens,
        )
        for index, name in enumerate([str(model), *([] if against is None else [str(against)])]):
            section = Student.model_validate({"model": name, "dtype": dtype, "device": device})
            results[name], rows = questions.to(section, "against" if index else "model")
            if out is not None:
                write_parquet(Path(out) / f"samples_{index}.parquet", rows)
    difference = None if against is None else compare(results[str(model)], results[str(against)])
    found = Evaluated(results=results, difference=difference)
    if out is not None:
        write_text(Path(out) / "eval.json", json.dumps(found.to_json(), indent=1) + "\n")
    return found


def _check(sampling: Sampling, *, n: int, k: int, batch_tokens: int, dtype: str) -> None:
    """Before anything loads."""
    if k < 1:
        raise UserError(f"k is {k}; pass@k needs 1 or more")
    if k > n:
        raise UserError(f"k is {k}, but there are {n} samples per problem; raise n or lower k")
    if not 0 <= sampling.temperature < math.inf:
        raise UserError(f"temperature is {sampling.temperature}; use 0 (greedy) or a number above it")
    if not 0 < sampling.top_p <= 1:
        raise UserError(f"top_p is {sampling.top_p}; use a number above 0, at most 1")
    for name, value, least in (
        ("top_k", sampling.top_k, 0),
        ("max_new_tokens", sampling.max_new_tokens, 1),
        ("batch_tokens", batch_tokens, 1),
    ):
        if value < least:
            raise UserError(f"{name} is {value}; use {least} or more")
    if dtype not in _DTYPES:
        raise UserError(f"dtype is {dtype!r}; it must be one of {', '.join(_DTYPES)}")


@dataclass(frozen=True, kw_only=True)
class _Questions:
    """The same for every model."""

    prompts: Sequence[Prompt]
    grader: Grader
    sampling: Sampling
    n: int
    k: int
    split: str
    batch_tokens: int

    def to(self, section: Student, key: str) -> tuple[EvalResult, list[dict[str, Any]]]:
        """A model's numbers, and every graded sample as plain values; `key` names the model in errors.

        The model is freed at the end: the next one may need its room.
        """
        tokenizer = load_tokenizer(section, key)
        model = load_model(section, key, pick_device(section.device, "device"))
        renderer, stops = Renderer(tokenizer), stop_ids(model, tokenizer, key)
        for prompt in self.prompts:
            renderer.check(prompt)
        ids = min(max(tokenizer.get_vocab().values()) + 1, head_of(model).vocabulary)  # as in training
        engine = HFEngine(model, renderer, stop_ids=stops, batch_tokens=self.batch_tokens, vocabulary=ids)

        def generate(prompts: Sequence[Prompt], n: int) -> list[Rollout]:
            return engine.generate(prompts, self.sampling, n=n)

        result, graded = evaluate(
            self.prompts, generate, renderer.graded, self.grader, n=self.n, k=self.k, step=0, split=self.split
        )
        return result, [sample_row(g, renderer) for g in graded]


def print_evaluated(console: Console, found: Evaluated) -> None:
    """A line per model, and how far they are apart."""
    table = Table(box=None, pad_edge=False)
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column in ("model", "split") else "right", no_wrap=True)
    for name, row in found.results.items():
        low, high = row.ci95
        below, above = row.pass_at_k_ci95
        table.add_row(
            name,
            row.split,
            f"{row.problems:,}",
            f"@{row.n} {row.avg_at_k:.1%}",
            f"{low:.1%} to {high:.1%}",
            f"@{row.k} {row.pass_at_k:.1%}",
            f"{below:.1%} to {above:.1%}",
            f"{row.mean_length:.1f}",
            f"{row.finished:.1%}",
        )
    console.print(table)
    if found.difference is not None:
        low, high = found.difference.ci95
        console.print(
            f"first − second on the same problems: {found.difference.difference:+.1%} "
            f"[{low:+.1%}, {high:+.1%}], p = {found.difference.p_value:.2g}",
            highlight=False,
        )
