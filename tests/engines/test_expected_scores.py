"""A teacher on a server is asked ahead: for a whole step, and for rollouts while others are written."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from onpath.config.whole import Config
from onpath.data.batch import Batch, collate
from onpath.engines.ahead import AheadTeacher
from onpath.engines.make import _reads_ahead
from onpath.engines.remote.served import ServedTeacher
from onpath.engines.routed import RoutedTeacher
from onpath.engines.score_cache import CachedTeacher, ScoreStore
from onpath.engines.teacher import ModelTeacher, Teacher
from onpath.records import Trajectory
from onpath.run.assemble import assemble
from onpath.run.log import read_lines
from onpath.run.meter import Stopwatch
from onpath.run.parts import Parts
from onpath.system import distributed
from onpath.system.code import allowed
from onpath.system.errors import UserError
from onpath.training import accumulate, corrected, sample, train
from tests.engines.fake_vllm import FakeVLLM
from tests.engines.test_server import TOPK, fake_of, restarted
from tests.system.test_two_processes import in_ranks

Tiny = Callable[..., Config]
METHODS: dict[str, dict[str, Any]] = {
    "opd": {},
    "opd, first tokens": {"method__first_tokens": 5},
    "topd": {"method__name": "topd", "method__window": 4},
    "topd, first tokens": {"method__name": "topd", "method__window": 4, "method__first_tokens": 5},
}


@pytest.fixture
def teacher(model_dirs: dict[str, Path]) -> Iterator[FakeVLLM]:
    fake = fake_of(model_dirs["teacher"])
    yield fake
    fake.stop()


@pytest.fixture
def student(model_dirs: dict[str, Path]) -> Iterator[FakeVLLM]:
    fake = fake_of(model_dirs["student"])
    yield fake
    fake.stop()


def both(tiny: Tiny, student: FakeVLLM, teacher: FakeVLLM, **more: Any) -> Config:
    where = {
        "teacher__engine": "vllm", "teacher__url": teacher.url, "teacher__patience": 20.0,
        "rollout__engine": "vllm", "rollout__url": student.url,
    }  # fmt: skip
    return tiny(**{**where, **TOPK, **more})


def scored(teacher: FakeVLLM) -> list[tuple[int, ...]]:
    return [tuple(r["prompt"]) for r in teacher.requests if "prompt_logprobs" in r]


def soon(true: Callable[[], bool], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.005)
    return true()


def one_by_one(config: Config) -> Config:
    """Micro-batches of one trajectory."""
    return config.model_copy(update={"optim": config.optim.model_copy(update={"micro_batch_tokens": 1})})


def stopped_in_training(monkeypatch: pytest.MonkeyPatch, what: Callable[[], None]) -> None:
    """The first micro-batch that trains does something else first."""
    from onpath import training

    def first(*args: Any) -> Any:
        monkeypatch.undo()
        what()
        return training.loss_of(*args)

    monkeypatch.setattr("onpath.training.loss_of", first)


def test_a_step_is_asked_for_at_once(tiny: Tiny, teacher: FakeVLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    where = {"teacher__engine": "vllm", "teacher__url": teacher.url, "rollout__prompts": 6}
    config = one_by_one(tiny(**where, **TOPK, optim__steps=1))
    asked: list[bool] = []
    stopped_in_training(monkeypatch, lambda: asked.append(soon(lambda: len(scored(teacher)) == 6)))
    train(config, quiet=True)
    assert asked == [True], "the others are on their way while the first one trains"
    assert len(set(scored(teacher))) == len(scored(teacher)) == 6


@pytest.mark.parametrize("name", METHODS)
def test_the_teacher_scores_while_others_are_written(
    name: str, tiny: Tiny, student: FakeVLLM, teacher: FakeVLLM
) -> None:
    parts = assemble(both(tiny, student, teacher, **METHODS[name]))
    parts.generators.student.sync_weights(0)
    written, early = iter(range(1000)), list[bool]()

    def slow_third(answer: Any) -> Any:
        if "prompt_logprobs" not in answer["choices"][0] and next(written) == 2:
            early.append(soon(lambda: len(scored(teacher)) == 2))
        return answer

    student.spoil = slow_third
    meter = corrected(parts, 0, Stopwatch())
    assert early == [True]
    accumulate(parts, meter, 0)
    kept = [t for t in meter.step.prepared.trajectories if t.edit.kept]
    assert sorted(scored(teacher)) == sorted({t.teacher_context + t.response for t in kept}), "each once"
    parts.close()


@pytest.mark.parametrize("name", METHODS)
def test_what_was_asked_ahead_changes_nothing(
    name: str, tiny: Tiny, student: FakeVLLM, teacher: FakeVLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**METHODS[name], "optim__steps": 2}
    ahead = train(both(tiny, student, teacher, **options, run__name="ahead"), quiet=True)
    student.stop()
    student.start(fresh=True)
    monkeypatch.setattr("onpath.run.sampling.scored_early", lambda parts: {})
    after = train(both(tiny, student, teacher, **options, run__name="after"), quiet=True)
    rows = [read_lines(r.directory / "metrics.jsonl") for r in (ahead, after)]
    assert [r["loss"] for r in rows[0]] == [r["loss"] for r in rows[1]]


def local(tiny: Tiny, student: FakeVLLM, **more: Any) -> Config:
    """The teacher is in this process, the student's engine is not."""
    return tiny(rollout__engine="vllm", rollout__url=student.url, **more)


def test_a_teacher_in_process_reads_while_others_are_written(
    tiny: Tiny, student: FakeVLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    hidden = ModelTeacher.hidden

    def counted(teacher: ModelTeacher, batch: Batch, cache: Any = None) -> Tensor:
        done = hidden(teacher, batch, cache)
        read.append(len(batch.trajectories))
        return done

    monkeypatch.setattr(ModelTeacher, "hidden", counted)
    parts = assemble(local(tiny, student))
    parts.generators.student.sync_weights(0)
    written, early = iter(range(1000)), list[bool]()

    def slow_third(answer: Any) -> Any:
        if "prompt_logprobs" not in answer["choices"][0] and next(written) == 2:
            early.append(soon(lambda: len(read) == 2))
        return answer

    student.spoil = slow_third
    meter = corrected(parts, 0, Stopwatch())
    assert early == [True]
    accumulate(parts, meter, 0)
    assert read == [1] * len(meter.rollouts), "each once, alone"
    assert meter.scored == {}
    assert parts.models.teacher.measured() == {"teacher_tokens_scored_early": meter.step.denominator}
    parts.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("onpath-teacher")]


def test_what_was_read_ahead_is_what_a_batch_says(
    tiny: Tiny, student: FakeVLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead = train(local(tiny, student, optim__steps=3, run__name="ahead"), quiet=True)
    student.stop()
    student.start(fresh=True)
    monkeypatch.setattr("onpath.run.sampling.scored_early", lambda parts: {})
    after = train(local(tiny, student, optim__steps=3, run__name="after"), quiet=True)
    rows, plain = (read_lines(r.directory / "metrics.jsonl") for r in (ahead, after))
    assert [r["loss"] for r in rows] == pytest.approx([r["loss"] for r in plain], rel=1e-4)
    assert [r["teacher_tokens_scored_early"] for r in rows] == [r["tokens"] for r in rows]
    assert [r["teacher_tokens_scored_early"] for r in plain] == [0, 0, 0]


def slowly(answer: Any) -> Any:
    time.sleep(0.05)
    return answer


@pytest.mark.parametrize("balance", [True, False])
@pytest.mark.parametrize("kind", ["served", "served slowly", "served and kept", "several", "in process"])
def test_processes_score_early_wherever_their_rollouts_go(
    kind: str,
    balance: bool,
    tiny: Tiny,
    student: FakeVLLM,
    teacher: FakeVLLM,
    model_dirs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was read of those that are dealt to another process goes with them, one after the other."""
    exchanged = distributed.exchanged

    def alone(parcels: list[Any]) -> list[Any]:
        assert all(len(p) <= 1 for p in parcels if isinstance(p, dict))
        return exchanged(parcels)

    monkeypatch.setattr(distributed, "exchanged", alone)

    def config(name: str) -> Config:
        options = {"optim__steps": 2, "optim__eps": 1e-4, "parallel__balance": balance, "run__name": name}
        if kind == "in process":
            return local(tiny, student, **options)
        if kind == "served and kept":
            options["teacher__cache"] = str(tmp_path / f"kept-{name}")
        if kind == "served slowly":
            options["teacher__concurrency"] = 1
        if kind == "several":
            served = {"engine": "vllm", "url": teacher.url, "model": str(model_dirs["teacher"])}
            return local(tiny, student, **TOPK, **options, teachers__default=served)
        return both(tiny, student, teacher, **options)

    one = train(config("one"), quiet=True).directory
    restarted(student)
    written, early = iter(range(1000)), list[bool]()
    before = scored(teacher)

    def slow_last(answer: Any) -> Any:
        if "prompt_logprobs" not in answer["choices"][0] and next(written) == 7:
            early.append(soon(lambda: len(scored(teacher)) > len(before), 5.0))
        return answer

    student.spoil = slow_last
    if kind == "served slowly":  # others are asked for when all rollouts are there
        teacher.spoil = slowly
    two = in_ranks(config("two"), tmp_path, processes=2)
    rows, plain = (read_lines(run / "metrics.jsonl") for run in (two, one))
    assert [r["loss"] for r in rows] == pytest.approx([r["loss"] for r in plain], rel=5e-5)
    assert [r["tokens"] for r in rows] == [r["tokens"] for r in plain]
    if kind != "in process":
        assert early == [True]
        assert len(scored(teacher)) == 2 * len(before), "nothing is asked twice"
    else:
        assert [r["teacher_tokens_scored_early"] for r in rows] == [r["tokens"] for r in rows]


def test_a_method_that_reads_anyway_is_not_read_ahead_for(tiny: Tiny, student: FakeVLLM) -> None:
    """TOPD draws windows from the keys and values of its own pass."""
    parts = assemble(local(tiny, student, method__name="topd", method__window=4))
    parts.generators.student.sync_weights(0)
    teacher = parts.models.teacher
    assert isinstance(teacher, AheadTeacher)
    accumulate(parts, corrected(parts, 0, Stopwatch()), 0)
    teacher.follow()
    corrected(parts, 1, Stopwatch())
    assert not teacher._rows
    parts.close()


def test_where_nothing_idles_nothing_is_read_ahead(
    tiny: Tiny, student: FakeVLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _reads_ahead(local(tiny, student))
    assert not _reads_ahead(tiny())
    assert not _reads_ahead(local(tiny, student, rollout__overlap=True))
    assert not _reads_ahead(local(tiny, student, teacher__cache=str(tmp_path / "c")))
    monkeypatch.setattr("onpath.system.distributed.world", lambda: 2)
    assert not _reads_ahead(local(tiny, student, parallel__shard="layer"))


def test_what_may_be_left_out_is_not_asked_for(
    tiny: Tiny, student: FakeVLLM, teacher: FakeVLLM, tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text("def long(text):\n    return float(len(text) > 4)\n")
    reward = {"name": f"{tmp_path / 'own.py'}:long", "at_least": 1.0}
    with allowed():
        parts = assemble(both(tiny, student, teacher, rewards__long=reward))
        parts.generators.student.sync_weights(0)
        sample(parts, 0)
    assert not scored(teacher)


def pending(parts: Parts, teacher: FakeVLLM) -> ServedTeacher:
    """A teacher that was asked, and does not answer."""
    served = parts.models.teacher
    assert isinstance(served, ServedTeacher)
    teacher.spoil = lambda _: 503
    served.expect(
        [Trajectory(student_context=(1, 5), teacher_context=(1, 5), response=(7, i)) for i in range(40)]
    )
    assert soon(lambda: len(scored(teacher)) > 1)
    return served


def test_nobody_waits_for_what_is_not_wanted_any_more(tiny: Tiny, teacher: FakeVLLM) -> None:
    where = {"teacher__engine": "vllm", "teacher__url": teacher.url, "teacher__patience": 600.0}
    parts = assemble(tiny(**where, **TOPK))
    pending(parts, teacher)
    begun, before = time.monotonic(), threading.active_count()
    parts.close()
    assert time.monotonic() - begun < 10
    assert threading.active_count() < before, "and it leaves no threads"


def test_a_run_that_fails_in_training_ends_at_once(
    tiny: Tiny, teacher: FakeVLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = {"teacher__engine": "vllm", "teacher__url": teacher.url, "teacher__patience": 600.0}
    config = one_by_one(tiny(**where, **TOPK))

    def fail() -> None:
        teacher.spoil = lambda _: 503
        raise UserError("something else is wrong")

    stopped_in_training(monkeypatch, fail)
    begun = time.monotonic()
    with pytest.raises(UserError, match="something else is wrong"):
        train(config, quiet=True)
    assert time.monotonic() - begun < 30


def test_a_failure_is_not_kept(tiny: Tiny, teacher: FakeVLLM) -> None:
    where = {"teacher__engine": "vllm", "teacher__url": teacher.url, "teacher__patience": 0.3}
    parts = assemble(tiny(**where, **TOPK, method__name="topd", method__window=4))
    rollouts = parts.generators.student.generate(parts.prompts.pool[:4], parts.sampling)
    teacher.spoil = lambda _: 503
    with pytest.raises(UserError, match="no answer from"):
        parts.method.prepare(rollouts, step=0)
    teacher.spoil = lambda answer: answer
    assert parts.method.prepare(rollouts, step=0).trajectories
    parts.close()


def test_scores_are_kept_for_their_step_alone(tiny: Tiny, teacher: FakeVLLM) -> None:
    where = {"teacher__engine": "vllm", "teacher__url": teacher.url}
    parts = assemble(tiny(**where, **TOPK))
    served = parts.models.teacher
    assert isinstance(served, ServedTeacher)
    rows = [Trajectory(student_context=(1, 5), teacher_context=(1, 5), response=(7, i)) for i in range(3)]
    served.expect(rows)
    served.scores(collate(rows[:2]))
    served.follow()
    assert not served._known
    assert len(served._coming) == 1, "it may be of the next step"
    served.follow()
    assert not served._coming, "which is over"
    served.scores(collate(rows))
    assert len(scored(teacher)) == 6
    parts.close()


def test_a_question_that_was_not_sent_is_the_other_process_s(tiny: Tiny, teacher: FakeVLLM) -> None:
    where = {"teacher__engine": "vllm", "teacher__url": teacher.url, "teacher__concurrency": 1}
    parts = assemble(tiny(**where, **TOPK))
    served = parts.models.teacher
    assert isinstance(served, ServedTeacher)
    rows = [Trajectory(student_context=(1, 5), teacher_context=(1, 5), response=(7, i)) for i in range(3, 9)]
    may, teacher.spoil = threading.Event(), lambda answer: answer if may.wait(20) else 503
    served.expect(rows)
    assert soon(lambda: len(scored(teacher)) == 1)
    assert [served.begun(t) for t in rows[2:]] == [None] * 4
    may.set()
    assert served.begun(rows[0]) is not None, "what is on its way is waited for"
    served.scores(collate(rows[:2]))
    assert [ids[-1] for ids in scored(teacher)] == [3, 4]
    parts.close()


class Followed(Teacher):
    """Counts the steps that it is told of."""

    model = separate = None
    context_length = 64
    steps = 0

    def follow(self) -> None:
        self.steps += 1


@pytest.mark.parametrize("kind", ["several", "kept"])
def test_whoever_stands_before_a_teacher_says_that_a_step_is_over(kind: str, tmp_path: Path) -> None:
    inner = Followed()
    outer: Teacher = RoutedTeacher({"a": inner, "b": inner}, homes=None)
    if kind == "kept":
        outer = CachedTeacher(inner, ScoreStore(tmp_path, most=1e6), weights="w", dtype=torch.float16)
    outer.follow()
    assert inner.steps == 1
