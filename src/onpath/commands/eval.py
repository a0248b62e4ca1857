"""`onpath eval`: one model, or two on the same problems."""

import gc
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from onpath.config import Config, Data, Student
from onpath.config.build import build, named_rows
from onpath.config.sections import Eval, Parallel
from onpath.data.render import Renderer
from onpath.data.tasks import split_name
from onpath.engines import sharding
from onpath.engines.foreign import check_model
from onpath.engines.head import head_of
from onpath.engines.hf import HFEngine
from onpath.engines.make import student_engine
from onpath.engines.models import model_directory, pick_device, stop_ids
from onpath.evaluate.scores import EvalResult, PairedDifference, compare
from onpath.grade.base import Grader
from onpath.grade.graders import grader_for
from onpath.records import Graded, Prompt, Rollout, Sampling
from onpath.run.alike import check_given
from onpath.run.evaluation import error_kind_of, evaluate_together
from onpath.run.inputs import Prompts, load_problems, make_renderer
from onpath.run.trained import Trained, find, load_its_tokenizer, load_start
from onpath.run.trajectories import sample_row, ungraded_row, write_parquet
from onpath.system import code, distributed
from onpath.system.errors import UserError
from onpath.system.files import make_directory, place, unwritable, write_text

_DTYPES = ("float32", "bfloat16", "float16")
_PROMPTS = ("template", "chat_template", "system", "enable_thinking")  # of `data`: how prompts are worded
_COLUMNS = (
    "model", "split", "problems", "avg@n", "95% interval", "pass@k", "95% interval", "length", "ended"
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """What `evaluate_model` found."""

    results: Mapping[str, EvalResult]
    """Model → its numbers; the first is the model that was asked for. A run without a final model is
    `run (checkpoints/step_N)`."""
    difference: PairedDifference | None
    """The model minus the one that it was compared with."""
    skipped: int = 0
    """Bad rows of the data that were left out (data.skip_bad)."""
    asked_apart: tuple[str, ...] = ()
    """Keys in which two runs differ that are each asked in its own way: what they are worth is in the
    difference."""

    def and_of(self, model: str, result: EvalResult) -> "Evaluated":
        """The same with one more model; of a second one, how far they are apart."""
        results = {**self.results, model: result}
        return replace(
            self, results=results, difference=compare(*results.values()) if len(results) == 2 else None
        )

    def to_json(self) -> dict[str, Any]:
        """eval.json."""
        report: dict[str, Any] = {"models": {name: r.to_json() for name, r in self.results.items()}}
        if self.skipped:
            report["skipped_rows"] = self.skipped
        if self.asked_apart:
            report["asked_apart"] = list(self.asked_apart)
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
    data: Any = None,
    columns: Mapping[str, str] | None = None,
    against: str | Path | None = None,
    n: int | None = None,
    k: int | None = None,
    limit: int | None = None,
    grader: str | Callable[..., Any] | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    max_new_tokens: int | None = None,
    batch_tokens: int = 32_768,
    seed: int | None = None,
    dtype: str | None = None,
    device: str = "auto",
    allow_code: bool = False,
    out: str | Path | None = None,
    engine: str = "hf",
    vllm: Mapping[str, Any] | None = None,
    shard: str = "none",
    timeout: float = 3600.0,
) -> Evaluated:
    """Samples a model's answers and grades them; with `against` also a second model's, on the same problems.

    A run, or a checkpoint of one, is asked as the run asks: its system prompt, template and thinking switch;
    what is None comes from its config. Prompts of any other model are rendered by the tokenizer's own
    template, and what is None comes from the defaults of the config's section `eval`; but one that is
    compared with a run is asked as that run asks, with its sampling and stops, whichever is named first.

    Of several processes (torchrun) each samples and grades its share of the problems; all return what one
    would, and the first writes. All of them must call it, with the same; for one alone take WORLD_SIZE out
    of its environment.

    Args:
        model: a run directory (its final model), its `checkpoints/step_N` or `best`; or a Hugging Face model
            directory or hub name, a LoRA adapter, `gym:student` or `gym:teacher`.
        data: problems with answers, as `data.eval`, a `datasets.Dataset`, a list of mappings, or the name of
            one of the run's evaluation sets; None: the run's only one.
        columns: what the problems' columns are called, as `data.columns`; None: as the run's own.
        against: a second model; of two runs each is asked in its own way.
        n: samples per problem; None: k, if that is given.
        k: of pass@k.
        limit: only the first so many problems.
        grader: auto, gym, math, exact, code, or a function of your own, itself or as file.py:name.
        temperature, top_p, top_k, max_new_tokens, seed: of the samples; temperature 0 is greedy.
        batch_tokens: tokens in one generation batch.
        dtype: of the weights: float32, bfloat16 or float16; None: a run's own, or float32.
        device: auto, or as torch names it.
        allow_code: run the Python files that `grader`, `data` and a run's config name. A run's own grader is
            not looked up where `grader` is given.
        out: directory for eval.json and the graded samples; where a grader fails, for the ungraded ones.
        engine, vllm: who samples, as `rollout.engine` and `rollout.vllm`, whatever a run has sampled with; a
            vLLM does not read `device` and `batch_tokens`.
        shard, timeout: of several processes, as `parallel.shard` (none: whole models in each; layer: a part
            of the weights, each layer gathered when it runs; step: all gathered while it samples) and
            `parallel.timeout`: seconds that a process waits for the one with the longest samples.

    Raises:
        UserError: something that the caller can fix, in one sentence.
    """
    code.not_while_loading("onpath.evaluate_model")
    data = None if data is None else named_rows("data", data)
    if callable(grader):
        grader = code.register_all({"eval.grader": grader})["eval.grader"]
    n, k, limit, seed, top_k = _numbers(Integral, n=n, k=k, limit=limit, seed=seed, top_k=top_k)
    lengths = {"max_new_tokens": max_new_tokens, "batch_tokens": batch_tokens}
    max_new_tokens, batch_tokens = _numbers(Integral, **lengths)
    temperature, top_p = _numbers(Real, temperature=temperature, top_p=top_p)
    around = _around(engine, vllm, shard, timeout)
    with distributed.one_fate():
        where = _meet(device, around.parallel)
        with code.allowed(allow_code):
            first = _subject(str(model), dtype, device, "model", graded=grader is None)
            subjects = _alike(first, *_others(against, first, dtype, device, graded=grader is None))
        leads = next((s for s in subjects if s.of_run is not None), first)
        told = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "max_new_tokens": max_new_tokens}
        asked = _asked(leads.config.eval, n=n, k=k, grader=grader, seed=seed, **told)
        _check(asked.sampling(), n=asked.n, k=asked.k, limit=limit, batch_tokens=batch_tokens)
        split, source = _problems(leads, data)
        if limit is None and (data is None or data in leads.config.data.eval):  # as the run asks
            limit = leads.config.data.eval_limit
        with code.allowed(allow_code):
            called = _with_columns(leads.config.data, columns)
            key = "--data" if source == data else f"data.eval.{split}"
            loaded = load_problems(called, source, limit=limit, grader=asked.grader, key=key)
            chosen = grader_for(asked.grader, {source: loaded.prompts})
        with chosen as judge:
            return _Questions(
                prompts=loaded.prompts,
                grader=judge,
                asked=asked,
                split=split,
                source=source,
                batch_tokens=batch_tokens,
                around=around,
                device=where,
            ).to_all(subjects, out, skipped=loaded.skipped)


def _around(engine: object, options: Mapping[str, Any] | None, shard: str, timeout: float) -> Config:
    """What samples and shares, as a config's `rollout` and `parallel` say it."""
    parallel = build({"parallel": {"shard": shard, "timeout": timeout}}, source="parallel").parallel
    given = {"engine": engine} | ({} if options is None else {"vllm": options})
    found = build({"rollout": given}, source="rollout").rollout
    if options is not None and found.engine != "vllm":
        raise UserError("rollout.vllm has arguments for a vLLM, and rollout.engine is hf; set it to vllm")
    if found.engine == "vllm" and parallel.shard != "none":
        raise UserError(
            f"parallel.shard: {parallel.shard} is of a model that samples by itself; processes share a vLLM "
            "by rollout.vllm: {tensor_parallel_size: 2}; leave one of them out"
        )
    return Config().model_copy(update={"parallel": parallel, "rollout": found})


def _meet(device: object, parallel: Parallel) -> torch.device:
    """This process's device; under a launcher it meets the others: one's mistake is said by all then."""
    if not isinstance(device, str):
        raise UserError(f"device is {device!r}; it must be auto, cpu, cuda or cuda:0")
    found = distributed.local_device(pick_device(device, "device"))
    distributed.start(found, timeout=parallel.timeout)
    return found


def _write(out: Path, index: int, graded: Sequence[Graded], renderer: Renderer, found: Evaluated) -> None:
    """A model's samples, then all numbers so far."""
    write_parquet(out / f"samples_{index}.parquet", [sample_row(g, renderer) for g in graded])
    write_text(out / "eval.json", json.dumps(found.to_json(), indent=1) + "\n")


def _clear(out: Path) -> None:
    """Removes an earlier call's files: eval.json comes after samples, and where it is, those of its models
    are, and no others."""
    samples = (f"{kind}_{index}.parquet" for kind in ("samples", "ungraded") for index in (0, 1))
    for name in ("eval.json", *samples):
        try:
            (out / name).unlink(missing_ok=True)
        except OSError as error:
            raise unwritable(out / name, error) from None


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """A model, and how it is asked."""

    name: str
    key: str
    """What names it in errors."""
    config: Config
    """The run's `data`, `eval` and `optim`, or the defaults; `student` says what to load."""
    of_run: Trained | None
    like: Trained | None = None
    """Of a model that is no run: the run that it is compared with, and asked as."""

    @property
    def label(self) -> str:
        """What its numbers stand by."""
        return self.name if self.of_run is None else self.of_run.shown(self.name)


def _subject(name: str, dtype: str | None, device: str, key: str, *, graded: bool) -> _Subject:
    """`graded`: by the grader of its own config."""
    found = find(name)
    config = Config() if found is None else found.config("data", "eval", "optim", graded=graded)
    if found is None:  # what the defaults say of data is about the gym
        config = config.model_copy(update={"data": Data(train=name, eval={})})
    own = "float32" if found is None else config.student.dtype
    _check_dtype(dtype)
    student = Student.model_validate({"model": name, "dtype": dtype or own, "device": device})
    return _Subject(name=name, key=key, config=config.model_copy(update={"student": student}), of_run=found)


def _others(
    against: str | Path | None, first: _Subject, dtype: str | None, device: str, *, graded: bool
) -> Sequence[_Subject]:
    if against is None:
        return ()
    if Path(against) == Path(first.name):
        raise UserError(f"against: {against} is the same model; name another one to compare it with")
    return (_subject(str(against), dtype, device, "against", graded=graded and first.of_run is None),)


def _alike(*subjects: _Subject) -> Sequence[_Subject]:
    """A run is compared with its base, say, on the same prompts: a model that is none has no system message
    or thinking switch of its own, and what they are worth would count as what was learnt."""
    runs = [s for s in subjects if s.of_run is not None]
    return [_asked_as(s, runs[0]) if runs and s.of_run is None else s for s in subjects]


def _asked_as(subject: _Subject, run: _Subject) -> _Subject:
    told = {name: getattr(run.config.data, name) for name in _PROMPTS}
    data = subject.config.data.model_copy(update=told)
    return replace(subject, config=subject.config.model_copy(update={"data": data}), like=run.of_run)


def _asked_apart(*subjects: _Subject) -> tuple[str, ...]:
    """Keys in which runs differ that decide how they are asked: of two runs each keeps its own."""
    of_runs = [s for s in subjects if s.of_run is not None]
    if len(of_runs) < 2:
        return ()
    first, second = of_runs
    words = [f"data.{n}" for n in _PROMPTS if getattr(first.config.data, n) != getattr(second.config.data, n)]
    return (*words, *(["student.dtype"] if first.config.student.dtype != second.config.student.dtype else []))


def _stops(
    subject: _Subject, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[frozenset[int], tuple[str, ...]]:
    """Where a model's responses end: those of the run that it is, or that it is compared with; that one's
    tokens only if they are the same here."""
    own, run = stop_ids(model, tokenizer, subject.key), subject.of_run or subject.like
    if run is None:
        return own, ()
    ids, strings = run.stops()
    same = subject.of_run is None and run.tokenizer().get_vocab() == tokenizer.get_vocab()
    return own | ids if same else own, strings


def _renderer(subject: _Subject, prompts: Sequence[Prompt]) -> Renderer:
    """How a model is asked; what can be known to be wrong with it before its weights load is said now.

    Raises:
        UserError: it is not there, or cannot be asked.
    """
    section, key = subject.config.student, subject.key
    renderer = make_renderer(subject.config, load_its_tokenizer(section, subject.of_run, key))
    if subject.of_run is None and (where := Path(model_directory(section.model, key))).is_dir():
        check_model(where, key)
    for prompt in prompts:
        renderer.check(prompt)
    return renderer


def _asked(own: Eval, *, n: int | None, k: int | None, **given: Any) -> Eval:
    """A run's own options, but for those that are given: not None."""
    samples = n if n is not None else own.n if k is None else k
    given |= {"n": samples, "k": min(own.k, samples) if k is None else k}
    return own.model_copy(update={name: value for name, value in given.items() if value is not None})


def _problems(subject: _Subject, data: str | None) -> tuple[str, str]:
    """Split and source."""
    own = subject.config.data.eval
    if data is not None:
        return (data, own[data]) if data in own else (split_name(data), data)
    if subject.of_run is None:
        here = "" if Path(subject.name).exists() else " (and no directory here)"
        raise UserError(
            f"{subject.name} is no run with evaluation sets of its own{here}; name one with --data"
        )
    if len(own) != 1:
        named = f"name one of {', '.join(own)}" if own else "name a file"
        raise UserError(f"{subject.name} has {len(own)} evaluation sets; {named} with --data")
    return next(iter(own.items()))


def _with_columns(data: Data, columns: Mapping[str, str] | None) -> Data:
    if columns is None:
        return data
    named = build({"data": {"columns": columns}}, source="columns").data.columns
    return data.model_copy(update={"columns": named})


def _numbers(kind: type, **given: Any) -> list[Any]:
    """As Python's own: from Python anything may come, and NumPy's do not go into JSON."""
    for name, value in given.items():
        if value is not None and not isinstance(value, kind):
            wanted = "a whole number" if kind is Integral else "a number"
            raise UserError(f"{name} is {value!r}; it must be {wanted}")
    plain = int if kind is Integral else float
    return [None if value is None else plain(value) for value in given.values()]


def _check(sampling: Sampling, *, n: int, k: int, limit: int | None, batch_tokens: int) -> None:
    """Before anything loads."""
    if limit is not None and limit < 1:
        raise UserError(f"--limit must be at least 1, not {limit}")
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


def _check_dtype(dtype: str | None) -> None:
    if dtype is not None and dtype not in _DTYPES:
        raise UserError(f"dtype is {dtype!r}; it must be one of {', '.join(_DTYPES)}")


@dataclass(frozen=True, kw_only=True)
class _Questions:
    """The same for every model."""

    prompts: Sequence[Prompt]
    grader: Grader
    asked: Eval
    split: str
    source: str
    batch_tokens: int
    around: Config
    """`rollout` and `parallel` say who samples."""
    device: torch.device

    def to_all(self, subjects: Sequence[_Subject], out: str | Path | None, *, skipped: int) -> Evaluated:
        """Every model's numbers, with files in a directory, if there is one. Of several processes the first
        writes, and the others hear whether it could."""
        directory = None if out is None else place(out, key="--out")
        self._check_alike(subjects, directory)
        if directory is not None:
            distributed.first_decides(partial(make_directory, directory))
        renderers = [_renderer(subject, self.prompts) for subject in subjects]
        if directory is not None:
            distributed.first_decides(partial(_clear, directory))
        found = Evaluated(results={}, difference=None, skipped=skipped, asked_apart=_asked_apart(*subjects))
        for index, (subject, renderer) in enumerate(zip(subjects, renderers, strict=True)):
            ungraded = None if directory is None else directory / f"ungraded_{index}.parquet"
            result, graded = self.to(subject, renderer, ungraded)
            found = found.and_of(subject.label, result)
            if directory is not None:  # before the next one, which may fail
                distributed.first_decides(partial(_write, directory, index, graded, renderer, found))
        return found

    def _check_alike(self, subjects: Sequence[_Subject], directory: Path | None) -> None:
        """Whether all processes were given the same."""
        if len({*distributed.gather([(len(subjects), directory is None)])}) > 1:
            raise UserError("some processes alone have --against, or --out; start all with one command")
        for subject in subjects:
            data = subject.config.data.model_copy(update={"eval": {self.split: self.source}})
            same = {"data": data, "eval": self.asked}
            same |= {"parallel": self.around.parallel, "rollout": self.around.rollout}
            prompts = Prompts(pool=(), evals={self.split: tuple(self.prompts)})
            check_given(subject.config.model_copy(update=same), prompts, subject.of_run)

    def to(
        self, subject: _Subject, renderer: Renderer, ungraded: Path | None
    ) -> tuple[EvalResult, list[Graded]]:
        """A model's numbers, and every graded sample.

        The model is freed at the end: the next one may need its room.

        Args:
            ungraded: where samples are written if their grading fails; None: nowhere.
        """
        config, section, key = subject.config, subject.config.student, subject.key
        tokenizer = renderer.tokenizer
        there = section.model if subject.of_run is None else str(subject.of_run.weights)
        student = section.model_copy(update={"model": there})
        told = self.around.model_copy(update={"optim": config.optim, "student": student})
        shards, served = sharding.asked(told), told.rollout.engine == "vllm"
        # A whole copy must not pass through each GPU, and the one beside a vLLM's own must not stay on it.
        host = torch.device("cpu") if shards or served else self.device
        model = load_start(section, subject.of_run, key, host, shards=shards)
        stops, strings = _stops(subject, model, tokenizer)
        ids = min(max(tokenizer.get_vocab().values()) + 1, head_of(model).vocabulary)
        if shards:
            sharding.shard(model, sharding.make_mesh(told, self.device), device=self.device)
        own = HFEngine(
            model,
            renderer,
            stop_ids=stops,
            stop_strings=strings,
            batch_tokens=self.batch_tokens,
            bf16=config.optim.bf16,
            vocabulary=ids,
        )

        engine = student_engine(told, model, own, longest={})

        def generate(prompts: Sequence[Prompt], n: int) -> list[Rollout]:
            gathered = (sharding.whole if told.parallel.shard == "step" else sharding.in_step)(model)
            with gathered, engine.in_step():
                return engine.generate(prompts, self.asked.sampling(), n=n)

        def keep(rollouts: Sequence[Rollout]) -> Path:
            assert ungraded is not None
            if distributed.rank() == 0:
                write_parquet(ungraded, [ungraded_row(r, renderer) for r in rollouts])
            return ungraded

        with closing(engine):
            engine.sync_weights(0)  # a vLLM's are compared with the model's
            found = evaluate_together(
                self.prompts,
                generate,
                renderer.graded,
                self.grader,
                n=self.asked.n,
                k=self.asked.k,
                step=0 if subject.of_run is None else subject.of_run.steps(),
                split=self.split,
                error_kind=error_kind_of(self.source, renderer),
                keep=None if ungraded is None else keep,
            )
        if shards:
            del model, own, engine, generate
            gc.collect()  # shards lie in circles
        return found


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
    if found.skipped:
        console.print(f"{found.skipped:,} bad rows were left out (data.skip_bad)", highlight=False)
    for name, row in found.results.items():
        if row.first_errors:
            kinds = ", ".join(f"{kind} {share:.1%}" for kind, share in row.first_errors.items())
            console.print(f"{name}: wrong {1 - row.avg_at_k:.1%}, by first error: {kinds}", highlight=False)
    if found.difference is not None:
        low, high = found.difference.ci95
        console.print(
            f"first − second on the same problems: {found.difference.difference:+.1%} "
            f"[{low:+.1%}, {high:+.1%}], p = {found.difference.p_value:.2g}",
            highlight=False,
        )
    if found.asked_apart:
        console.print(
            f"note: each run is asked in its own way, and they differ in {', '.join(found.asked_apart)}: "
            "what that is worth is in the difference",
            highlight=False,
        )
