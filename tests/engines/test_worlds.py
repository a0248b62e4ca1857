"""A world around engine and teacher: spoiled rollouts, a teacher that is lost behind an error, resume."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from onpath.config.whole import Config
from onpath.data.batch import collate
from onpath.data.render import Renderer
from onpath.data.tasks import World
from onpath.engines.base import Engine, gone_on
from onpath.engines.hf import HFEngine
from onpath.engines.models import load_model
from onpath.engines.teacher import ModelTeacher
from onpath.engines.worlds import (
    LostEngine,
    LostTeacher,
    RepeatingEngine,
    SpoilingEngine,
    lost_behind,
    world_of,
)
from onpath.records import Completion, Prompt, Sampling, Trajectory
from onpath.run import assemble
from onpath.run.log import read_lines
from onpath.system.errors import UserError
from onpath.training import train

SAMPLING = Sampling(max_new_tokens=9, seed=3)
PROMPTS = [Prompt(id=str(i), text=f"{i}+{i}=?", answer="0") for i in range(6)]


@dataclass(frozen=True)
class Sevens:
    """Every third character of an even problem becomes a 7; behind a 7 the teacher is lost."""

    spoils: bool = True
    loses: bool = True
    repeats: bool = False

    def spoiled(self, seed: int, problem: str, tokens: Sequence[str]) -> tuple[int, str] | None:
        return (2, "7") if len(tokens) > 2 and int(problem[0]) % 2 == seed % 2 else None

    def spoiled_again(self, seed: int, tokens: Sequence[str], begin: int) -> tuple[int, str] | None:
        start = tokens.index("<sol>") + 1
        return (start + 2, "7") if len(tokens) > start + 2 >= begin else None

    def lost_after(self, seed: int, tokens: Sequence[str]) -> int | None:
        start = tokens.index("<sol>") + 1
        return next((i for i in range(start, len(tokens)) if tokens[i] == "7"), None)


@pytest.fixture(scope="module")
def engines(model_dirs: dict[str, Path], tokenizer) -> dict[str, HFEngine]:  # type: ignore[no-untyped-def]
    from onpath.config import Student

    found = {}
    for role, path in model_dirs.items():
        model = load_model(Student(model=str(path)), "student.model", torch.device("cpu"))
        found[role] = HFEngine(model, Renderer(tokenizer), stop_ids=frozenset({2}))
    return found


def test_a_spoiled_rollout_goes_on_from_what_was_put_into_it(engines: dict[str, HFEngine]) -> None:
    plain = engines["student"].generate(PROMPTS, SAMPLING, n=2)
    engine = SpoilingEngine(engines["student"], Sevens(), seed=0, longest=512)
    made = engine.generate(PROMPTS, SAMPLING, n=2)
    assert made == engine.generate(PROMPTS, SAMPLING, n=2)
    (seven,) = engine.renderer.text_ids("7")
    changed = 0
    for before, after in zip(plain, made, strict=True):
        assert (before.prompt, before.sample, before.place) == (after.prompt, after.sample, after.place)
        if int(before.prompt.question[0]) % 2 or len(before.ids) < 3:
            assert after == before
            continue
        changed += 1
        assert after.ids[:3] == (*before.ids[:2], seven)
        assert 3 <= len(after.ids) == len(after.logprobs) <= SAMPLING.max_new_tokens
        assert (after.finish_reason == "stop") == (after.ids[-1] == 2)
        # All log-probs, of the token from outside too, are the student's own.
        (scored,) = engine.score([after.context], [after.ids])
        assert after.logprobs == pytest.approx(scored, abs=1e-4)
    assert changed >= 4


def test_what_the_student_writes_anew_holds_the_error_again(engines: dict[str, HFEngine]) -> None:
    """Only where it writes that place itself: not behind a token that somebody else has put there."""
    inner = engines["student"]
    engine = RepeatingEngine(inner, Sevens(repeats=True), seed=0, longest=512)
    assert (engine.stop_ids, engine.shares_weights) == (inner.stop_ids, inner.shares_weights)
    context = inner.renderer.ids(PROMPTS[0])
    (seven,) = inner.renderer.text_ids("7")
    prefixes = [(*context, *[9] * count) for count in range(5)]
    plain = inner.continue_from(prefixes, SAMPLING, keys=list("abcde"))
    made = engine.continue_from(prefixes, SAMPLING, keys=list("abcde"))
    assert made == engine.continue_from(prefixes, SAMPLING, keys=list("abcde"))
    for count, (prefix, before, after) in enumerate(zip(prefixes, plain, made, strict=True)):
        if count > 2 or len(before.ids) < 3 - count:
            assert after == before
            continue
        own = 2 - count
        assert after.ids[: own + 1] == (*before.ids[:own], seven)
        assert len(after.ids) == len(after.logprobs) <= SAMPLING.max_new_tokens
        (scored,) = inner.score([prefix], [after.ids])
        assert after.logprobs == pytest.approx(scored, abs=1e-4)
    assert any(a != b for a, b in zip(plain, made, strict=True))


def test_only_the_method_s_writer_errs_again(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluations and the rollouts' own sampler do not."""
    for repeats in (True, False):
        monkeypatch.setattr(assemble, "world_of", lambda source, r=repeats: Sevens(loses=False, repeats=r))
        parts = assemble.assemble(tiny())
        assert isinstance(parts.sampler, SpoilingEngine)
        assert isinstance(parts.tools.generators.student, RepeatingEngine) == repeats
        assert isinstance(parts.generators.student, HFEngine)
        parts.close()


def test_a_world_may_lack_what_it_does_not_do(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Spoils(World):
        spoils = True

    monkeypatch.setattr(assemble, "world_of", lambda source: Spoils())
    parts = assemble.assemble(tiny())
    assert isinstance(parts.sampler, SpoilingEngine)
    assert isinstance(parts.tools.generators.student, HFEngine), "it does not repeat"
    assert Spoils().spoiled(0, "1+1=?", ["2"]) is Spoils().spoiled_again(0, ["2"], 0) is None
    assert not Spoils().loses
    assert Spoils().lost_after(0, ["2"]) is None
    parts.close()


def test_behind_an_error_the_scores_are_the_other_models(engines: dict[str, HFEngine]) -> None:
    sound, lost = (ModelTeacher(engines[role].model) for role in ("teacher", "student"))
    renderer = engines["student"].renderer
    teacher = LostTeacher(sound, lost, lost_behind(Sevens(), 0, renderer))
    texts = ["1+17+2", "123456", "7"]
    batch = collate(
        [
            Trajectory(student_context=(1, 5, 3), teacher_context=(1, 6, 5, 3), response=renderer.text_ids(t))
            for t in texts
        ],
        device=torch.device("cpu"),
    )

    def logp(teacher: ModelTeacher | LostTeacher) -> torch.Tensor:
        scores = teacher.scores(batch)
        return (scores.hidden @ scores.head.weight.T).log_softmax(-1)

    mixed_NV, sound_NV, lost_NV = logp(teacher), logp(sound), logp(lost)
    behind_N = torch.tensor([False] * 4 + [True] * 2 + [False] * 6 + [False])
    assert [r for t in batch.trajectories for r in renderer.tokens(t.response)] == list("".join(texts))
    torch.testing.assert_close(mixed_NV[~behind_N], sound_NV[~behind_N], atol=1e-5, rtol=0)
    torch.testing.assert_close(mixed_NV[behind_N], lost_NV[behind_N], atol=1e-5, rtol=0)
    assert (sound_NV - lost_NV).abs().max() > 0.1


def test_a_head_with_more_to_it_is_refused(
    engines: dict[str, HFEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    sound, lost = (ModelTeacher(engines[role].model) for role in ("teacher", "student"))
    monkeypatch.setattr(sound.model.config, "final_logit_softcapping", 30.0, raising=False)
    with pytest.raises(UserError, match="a bias, a scale or a softcap"):
        LostTeacher(sound, lost, lambda ids: None)


def test_prefixes_with_an_error_are_gone_on_from_by_the_lost_model(engines: dict[str, HFEngine]) -> None:
    student, teacher = engines["student"], engines["teacher"]
    renderer = student.renderer
    engine = LostEngine(teacher, student, lost_behind(Sevens(), 0, renderer))
    start = renderer.ids(PROMPTS[0])
    prefixes = [start + renderer.text_ids(t) for t in ("12", "17", "", "73")]
    greedy = Sampling(temperature=0, max_new_tokens=6)
    keys = list("abcd")
    own, other = (e.continue_from(prefixes, greedy, keys=keys) for e in (teacher, student))
    assert engine.continue_from(prefixes, greedy, keys=keys) == [own[0], other[1], own[2], other[3]]
    assert own[1] != other[1]


def test_a_world_that_does_nothing_is_none() -> None:
    assert world_of("gym:train") is None
    assert world_of("gym:train?late=1") is None
    assert world_of("data.jsonl") is None
    assert world_of("gym:train?spoil=0.1") is not None


def test_lost_needs_a_teacher_model_here(tiny: Callable[..., Config]) -> None:
    with pytest.raises(UserError, match="lost is about a teacher model in this process"):
        tiny(data__train="gym:train?lost=1", method__name="opsd")


def test_a_run_in_a_world_goes_on_bit_for_bit(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assemble, "world_of", lambda source: Sevens())

    def run() -> tuple[Path, list[dict[str, float]]]:
        directory = train(tiny(data__eval={}, run__save_every=1, optim__steps=3), quiet=True).directory
        rows = [
            {k: v for k, v in r.items() if k != "seconds"} for r in read_lines(directory / "metrics.jsonl")
        ]
        return directory, rows

    directory, whole = run()
    for path in (directory / "model", directory / "checkpoints" / "step_3"):
        shutil.rmtree(path)
    assert run()[1] == whole
    shutil.rmtree(directory)
    monkeypatch.setattr(assemble, "world_of", lambda source: Sevens(loses=False))
    spoiled = run()[1]
    assert spoiled[0]["student_tokens_generated"] == whole[0]["student_tokens_generated"]
    assert spoiled[0]["loss"] != whole[0]["loss"]


def test_a_teacher_writes_for_as_many_steps_as_the_student(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written in the world's engine's name has seen as many steps as the engine has."""
    monkeypatch.setattr(assemble, "world_of", lambda source: Sevens(loses=False))
    options = {"method__writer": "teacher", "data__eval": {}, "optim__steps": 4}
    rows = read_lines(train(tiny(**options), quiet=True).directory / "metrics.jsonl")
    assert [(row["staleness"], row["student_tokens_generated"]) for row in rows] == [(0, 0)] * 4


class Limited(Engine):
    """Takes 11 tokens in all."""

    renderer = None  # type: ignore[assignment]

    def continue_from(self, prefixes: Any, sampling: Sampling, *, keys: Any = None) -> list[Completion]:
        assert max(map(len, prefixes)) + sampling.max_new_tokens <= 11
        assert len(keys) == len(prefixes)
        n = sampling.max_new_tokens
        return [Completion(ids=(p[0],) * n, logprobs=(0.0,) * n, finish_reason="length") for p in prefixes]


def test_each_spoiled_rollout_has_the_room_that_its_prompt_leaves() -> None:
    prefixes, rooms = [(0,) * 9, (1,) * 5, (2,) * 4, (3,) * 8], [2, 6, 7, 2]
    found = gone_on(Limited(), prefixes, rooms, SAMPLING, keys=list("abcd"), longest=11)
    assert [c.ids[0] for c in found] == [0, 1, 2, 3]
    assert all(len(c.ids) >= room for c, room in zip(found, rooms, strict=True))
