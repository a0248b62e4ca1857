"""What a method of one's own answers is looked at before anything is trained on it."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import onpath
from onpath.config import Config
from onpath.methods import Edit, Method, MethodOptions, Prepared, own_response
from onpath.records import Guidance, Trajectory
from onpath.run.card import model_card
from onpath.run.log import read_lines
from onpath.run.trajectories import write_parquet
from onpath.system.errors import UserError

Tiny = Callable[..., Config]

BAD_TOKENS = [
    ("weights", float("nan"), r"weights that are not finite \(nan\)"),
    ("advantages", float("inf"), r"advantages that are not finite \(inf\)"),
    ("weights", torch.tensor(1.0), "weights that are no plain numbers but Tensor"),
    ("advantages", 1.0, "advantages, which method.divergence: sampled alone reads"),
    ("response", 48, "a response with ids that are not within the 48 of both models"),
    ("response", -1, "a response with ids that are not within the 48 of both models"),
    ("student_context", 48, "a student_context with ids that are not within the student's 48"),
    ("writers", "old", "a writer 'old'; there are student, teacher, forced"),
    ("response", "5", "str in its response; it is a tuple of token ids, plain whole numbers"),
    ("response", None, "NoneType in its response; it is a tuple of token ids"),
    ("response", 0.0, r"0\.0 in its response; it is a tuple of token ids"),
    ("writers", "", "a writer ''; there are student, teacher, forced"),
    ("response", 5.0, r"5\.0 in its response; it is a tuple of token ids"),
    ("response", torch.tensor(5), "Tensor in its response; it is a tuple of token ids"),
    ("teacher_context", 48, "a teacher_context with ids that are not within the teacher's 48"),
    ("behaviour_logprobs", float("nan"), r"behaviour_logprobs that are not finite \(nan\)"),
]
BAD_PARTS = [
    ({"response": [4, 5], "behaviour_logprobs": None}, "response as list; it is a tuple of token ids"),
    ({"student_context": (4,) * 600}, r"6\d\d tokens with its student_context, and the student takes 512"),
    ({"teacher_context": (4,) * 600}, r"6\d\d tokens with its teacher_context, and the teacher takes 512"),
    ({"edit": Edit(kind="none", detail={"seen": {1}})}, "seen in its edit's detail, which is no JSON"),
    ({"edit": Edit(kind="none", detail={"seen": math.nan})}, "seen in its edit's detail, which is no JSON"),
    ({"edit": Edit(kind="none", detail=None)}, "its edit's detail as NoneType; it is a mapping by names"),  # type: ignore[arg-type]
    ({"edit": Edit(kind="none", kept="no")}, "'no' for its edit's kept; it is True or False"),  # type: ignore[arg-type]
    ({"edit": None}, r"its edit as NoneType; see Trajectory\.edit"),
    ({"origin": 3}, r"its origin as int; see Trajectory\.origin"),
    ({"guidance": (Guidance(start=0, targets=({48: 1.0},)),)}, "guidance to 48, which is none of the 48 ids"),
    (
        {"guidance": (Guidance(start=0, targets=({4: -1.0},)),)},
        r"guidance of mass -1\.0; it is a finite number above",
    ),
    (
        {"guidance": (Guidance(start=0, targets=({4: math.nan},)),)},
        "guidance of mass nan; it is a finite number",
    ),
    (
        {"guidance": (Guidance(start=0, targets=({4: 1.0},)),) * 2},
        "guidance at 0 behind that of 0; each place has one",
    ),
]
BAD_ANSWERS: list[tuple[Any, str]] = [
    (None, "prepare gave NoneType; it gives a Prepared"),
    ([], "prepare gave list; it gives a Prepared"),
    (Prepared(trajectories=[4]), "trajectory 0 is int; it is a Trajectory"),  # type: ignore[list-item]
    (Prepared(trajectories=[], metrics={"a": torch.ones(())}), "metrics has a as Tensor, which is no JSON"),
    (
        Prepared(trajectories=[], means={"a": 1.0}),
        r"means has a, which is no \(sum, count\) of finite numbers",
    ),  # type: ignore[dict-item]
    (
        Prepared(trajectories=[], totals={"a": torch.ones(())}),
        "totals has a as Tensor, which is no finite number",
    ),  # type: ignore[dict-item]
    (Prepared(trajectories=[], metrics={"a": math.nan}), "metrics has a as nan, which is no JSON"),
    (Prepared(trajectories=[], means={"a": (math.nan, 1)}), "means has a, which is no"),
    (Prepared(trajectories=[], totals={"a": math.inf}), "totals has a as inf, which is no finite number"),
    (Prepared(trajectories=[], metrics={1: 2}), "metrics is dict; it is a mapping by names"),  # type: ignore[dict-item]
    (Prepared(trajectories=[], metrics=[]), "metrics is list; it is a mapping by names"),  # type: ignore[arg-type]
    (Prepared(trajectories=None), "trajectories is NoneType; it is a list"),  # type: ignore[arg-type]
    (Prepared(trajectories=(t for t in ())), "trajectories is generator; it is a list"),  # type: ignore[arg-type]
    (Prepared(trajectories=[], guidance_weight="1"), "guidance_weight is '1', which is no finite number"),  # type: ignore[arg-type]
    (
        Prepared(trajectories=[], guidance_weight=math.nan),
        "guidance_weight is nan, which is no finite number",
    ),
]


class Giving(Method):
    """Answers what a test says."""

    class Options(MethodOptions):
        """None."""

    answer: Any = None

    def prepare(self, rollouts: Any, *, step: int) -> Prepared:
        found: Prepared = self.answer(rollouts)
        return found


def refused(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, answer: Callable[[Any], Any], expected: str) -> None:
    monkeypatch.setattr(Giving, "answer", staticmethod(answer))
    with pytest.raises(UserError, match=f"Giving: {expected}"):
        onpath.train(tiny(eval__start=False), method=Giving, quiet=True)


@pytest.mark.parametrize(("part", "value", "expected"), BAD_TOKENS)
def test_what_a_method_gives_for_tokens_is_looked_at(
    part: str, value: Any, expected: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = dict.fromkeys(("response", "student_context", "teacher_context"), 5)
    before = {**ids, "writers": "student"}.get(part, 1.0)

    def answer(rollouts: Any) -> Prepared:
        rows = [own_response(r) for r in rollouts]
        return Prepared(
            trajectories=[replace(t, **{part: (*[before] * (len(t.response) - 1), value)}) for t in rows]
        )

    refused(tiny, monkeypatch, answer, f"trajectory 0 has {expected}")


@pytest.mark.parametrize(("change", "expected"), BAD_PARTS)
def test_what_a_trajectory_is_made_of_is_looked_at(
    change: Any, expected: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(rollouts: Any) -> Prepared:
        return Prepared(trajectories=[replace(own_response(r), **change) for r in rollouts])

    refused(tiny, monkeypatch, answer, f"trajectory 0 has {expected}")


@pytest.mark.parametrize(("given", "expected"), BAD_ANSWERS)
def test_what_prepare_gives_is_looked_at(
    given: Any, expected: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(tiny, monkeypatch, lambda _: given, f"(Prepared.)?{expected}")


def test_numbers_of_a_library_s_own_are_named(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor has no truth value; one of the wrong length says so itself."""

    def answer(rollouts: Any) -> Prepared:
        rows = [own_response(r) for r in rollouts]
        return Prepared(trajectories=[replace(t, weights=torch.ones(len(t.response))) for t in rows])  # type: ignore[arg-type]

    refused(tiny, monkeypatch, answer, "trajectory 0 has weights as Tensor; it is a tuple of numbers")
    with pytest.raises(ValueError, match="1 behaviour_logprobs for 2 response tokens"):
        Trajectory(student_context=(1,), teacher_context=(1,), response=(2, 3), behaviour_logprobs=(0.0,))


def test_a_column_of_two_kinds_is_no_full_disk(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.parquet: what the method says of its trajectories is no table"):
        write_parquet(tmp_path / "a.parquet", [{"a": 1}, {"a": "b"}])
    assert not list(tmp_path.iterdir())


class Writing(Method):
    """Writes rollouts as a test says: the student's tokens, some of them said to be the teacher's."""

    class Options(MethodOptions):
        """The kind of method."""

        @property
        def writes_rollouts(self) -> bool:
            return True

    answer: Any = None

    def write_rollouts(self, blank: Any, *, keys: Any, step: int) -> Any:
        engine, sampling = self.tools.generators.student, self.tools.sampling
        done = engine.continue_from([r.context for r in blank], sampling, keys=keys)
        return self.answer([r.continued(c) for r, c in zip(blank, done, strict=True)])

    def prepare(self, rollouts: Any, *, step: int) -> Prepared:
        return Prepared(trajectories=[own_response(r) for r in rollouts])


def by_turns(rollouts: Any) -> Any:
    return [
        replace(r, writers=tuple("teacher" if i % 2 else "student" for i in range(len(r.ids))))
        for r in rollouts
    ]


BAD_ROLLOUTS: list[tuple[Callable[[Any], Any], str]] = [
    (lambda _: None, "write_rollouts gave NoneType; it gives a list of Rollout"),
    (lambda rs: rs[:1], r"write_rollouts gave 1 rollouts that are not the \d that it was given"),
    (lambda rs: rs[::-1], r"write_rollouts gave \d rollouts that are not the \d that it was given"),
    (lambda rs: [replace(r, logprobs=(math.nan,) * len(r.ids)) for r in rs], "has logprobs that are not"),
    (lambda rs: [replace(r, writers=("teach",) * len(r.ids)) for r in rs], "has a writer 'teach'"),
    (lambda rs: [replace(r, ids=(48,) * len(r.ids)) for r in rs], "has ids that are not within the 48"),
    (lambda rs: [replace(r, ids=(5,) * 99, logprobs=(0.0,) * 99) for r in rs], "has 99 tokens, and"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "expected"), BAD_ROLLOUTS)
def test_what_a_method_writes_is_looked_at(
    answer: Callable[[Any], Any], expected: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Writing, "answer", staticmethod(answer))
    with pytest.raises(UserError, match=f"Writing: (rollout 0 )?{expected}"):
        onpath.train(tiny(eval__start=False), method=Writing, quiet=True)


class Elsewhere(Writing):
    """And trains on nothing that the student has drawn, which is no reason to be given its rollouts."""

    class Options(MethodOptions):
        """The kind of method."""

        @property
        def writes_rollouts(self) -> bool:
            return True

        @property
        def trains_on_rollouts(self) -> bool:
            return False


@pytest.mark.parametrize("method", [Writing, Elsewhere])
def test_a_method_that_writes_is_not_given_the_students(method: type[Method], tiny: Tiny) -> None:
    with pytest.raises(UserError, match=r"writes the rollouts of each step itself, and rollout\.refresh has"):
        onpath.train(tiny(rollout__refresh="never"), method=method, quiet=True)


def test_what_a_teacher_writes_does_not_say_how_far_the_student_has_moved(tiny: Tiny) -> None:
    with pytest.raises(UserError, match="overlap_below compares the student with what it wrote"):
        tiny(method__writer="teacher", rollout__refresh={"overlap_below": 0.9})


def test_a_card_says_who_wrote_the_text(tiny: Tiny) -> None:
    for writer, tag, said in (
        ("student", "- on-policy-distillation", "by on-policy distillation with onpath"),
        ("teacher", "- distillation", "by distillation on the teacher's own samples, with onpath"),
    ):
        card = model_card(tiny(method__writer=writer), problems=3, step=2, evaluations=[], adapter=False)
        assert tag in card
        assert said in card


def test_a_method_that_says_that_it_writes_must(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Writing, "write_rollouts")
    with pytest.raises(UserError, match="its options say writes_rollouts, and it has no"):
        onpath.train(tiny(eval__start=False), method=Writing, quiet=True)


def test_only_its_own_tokens_count_as_the_student_s(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Writing, "answer", staticmethod(by_turns))
    config = tiny(eval__start=False)
    rows = read_lines(onpath.train(config, method=Writing, quiet=True).directory / "metrics.jsonl")
    written = rows[0]["tokens_written_by"]
    assert written["teacher"] > 0
    assert rows[0]["student_tokens_generated"] == written["student"]


def test_a_run_says_that_it_trains_on_nothing(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Giving, "answer", staticmethod(lambda _: Prepared(trajectories=[])))
    with pytest.raises(UserError, match="in none of 2 steps was a token trained on"):
        onpath.train(tiny(optim__steps=2, eval__start=False), method=Giving)
    assert capsys.readouterr().err.count("step 1 has no token to train on") == 1


def test_kept_rollouts_are_those_of_their_trajectories(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay buffer's are of another time."""
    buffer: list[Any] = []

    def answer(rollouts: Any) -> Prepared:
        buffer.extend(rollouts)
        return Prepared(trajectories=[own_response(buffer[0]) for _ in rollouts])

    monkeypatch.setattr(Giving, "answer", staticmethod(answer))
    config = tiny(eval__start=False, rollout__refresh={"every": 1})
    with pytest.raises(UserError, match=r"makes one of another time's \(of prompt .*\); set rollout.refresh"):
        onpath.train(config, method=Giving, quiet=True)
    assert onpath.train(tiny(eval__start=False, run__name="fresh"), method=Giving, quiet=True).steps > 1
