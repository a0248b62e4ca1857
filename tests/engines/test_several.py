"""Several servers: requests are spread over them, one that is away or has other weights is not missed and not
used, and nobody sees from a result who gave it."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from onpath.commands.cli import main
from onpath.config.build import load
from onpath.config.sections import Teacher
from onpath.config.whole import Config
from onpath.engines.head import unwrapped
from onpath.engines.remote.server import ServerEngine
from onpath.engines.remote.wire import Server
from onpath.records import Rollout
from onpath.run.assemble import assemble
from onpath.run.log import read_lines
from onpath.run.parts import Parts
from onpath.system.errors import UserError
from onpath.training import train
from tests.engines.fake_vllm import FakeVLLM
from tests.engines.test_server import TOPK, fake_of, restarted, scaled

Tiny = Callable[..., Config]
Pair = list[FakeVLLM]
CONTEXTS = [(1, 5 + i, 6) for i in range(8)]
RESPONSES = [(7, 8, 2)] * 8


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onpath.engines.remote.wire._FIRST_WAIT", 0.02)
    monkeypatch.setattr("onpath.engines.remote.wire._LONGEST_WAIT", 0.02)


def pair_of(directory: Path) -> Iterator[Pair]:
    with ExitStack() as stack:
        pair = [fake_of(directory) for _ in range(2)]
        for fake in pair:
            stack.callback(fake.stop)
        yield pair


@pytest.fixture
def teachers(model_dirs: dict[str, Path]) -> Iterator[Pair]:
    yield from pair_of(model_dirs["teacher"])


@pytest.fixture
def students(model_dirs: dict[str, Path]) -> Iterator[Pair]:
    yield from pair_of(model_dirs["student"])


def scorer(fakes: Pair, **section: Any) -> ServerEngine:
    urls = [fake.url for fake in fakes]
    server = Server(Teacher(url=urls, engine="vllm", **section), "teacher", [fakes[0].name])
    renderer = fakes[0].engine.renderer
    return ServerEngine(server, renderer, stop_ids=frozenset({2}), vocabulary=len(renderer.tokenizer))


def sampler(tiny: Tiny, students: Pair, **more: Any) -> tuple[Parts, ServerEngine]:
    urls = [fake.url for fake in students]
    parts = assemble(tiny(rollout__engine="vllm", rollout__url=urls, **more))
    engine = parts.generators.student
    assert isinstance(engine, ServerEngine)
    return parts, engine


def rollouts_of(parts: Parts) -> list[Rollout]:
    return parts.generators.student.generate(parts.prompts.pool[:8], parts.sampling, n=2)


def check_logprobs(parts: Parts, rollouts: list[Rollout]) -> None:
    """They are those of the weights that train."""
    own = parts.generators.over(parts.models.student)
    scores = own.score([r.context for r in rollouts], [r.ids for r in rollouts])
    for r, expected in zip(rollouts, scores, strict=True):
        assert r.logprobs == pytest.approx(expected, abs=1e-5)


def asked(fake: FakeVLLM) -> list[tuple[int, ...]]:
    return [tuple(r["prompt"]) for r in fake.requests]


def test_neighbours_go_to_one_server_and_answers_are_those_of_one(teachers: Pair) -> None:
    alone = scorer(teachers[:1]).score(CONTEXTS, RESPONSES)
    teachers[0].requests.clear()
    together = scorer(teachers)
    assert together.score(CONTEXTS, RESPONSES) == alone
    halves = [sorted(c for *c, _, _, _ in asked(fake)) for fake in teachers]
    assert halves == [[list(c) for c in CONTEXTS[:4]], [list(c) for c in CONTEXTS[4:]]]


def test_a_server_with_room_takes_over_from_one_without(teachers: Pair) -> None:
    engine = scorer(teachers, concurrency=1)
    teachers[0].slow = 0.3
    engine.score(CONTEXTS, RESPONSES)
    assert len(asked(teachers[1])) > 4


def test_samples_do_not_depend_on_who_draws_them(tiny: Tiny, students: Pair) -> None:
    one, _ = sampler(tiny, students[:1])
    two, _ = sampler(tiny, students)
    assert [r.ids for r in rollouts_of(one)] == [r.ids for r in rollouts_of(two)]
    assert any("seed" in r for r in students[1].requests)


def test_a_run_goes_on_with_one_dead_teacher_and_one_warning(
    tiny: Tiny, teachers: Pair, capfd: pytest.CaptureFixture[str]
) -> None:
    options = {"teacher__engine": "vllm", "teacher__url": [f.url for f in teachers], **TOPK}
    calm = train(tiny(**options, run__name="calm"), quiet=True)
    teachers[1].requests.clear()
    teachers[1].spoil = lambda answer: 503 if len(teachers[1].requests) > 1 else answer
    rough = train(tiny(**options, run__name="rough"), quiet=True)
    losses = [[row["loss"] for row in read_lines(r.directory / "metrics.jsonl")] for r in (calm, rough)]
    assert losses[0] == losses[1]
    said = [line for line in capfd.readouterr().err.splitlines() if "warning" in line]
    assert len(said) == 1
    assert (
        f"teacher.url: no answer from {teachers[1].url} (status 503: told to); the other servers" in said[0]
    )


def test_a_server_that_is_back_is_asked_again(teachers: Pair) -> None:
    engine = scorer(teachers)
    expected = engine.score(CONTEXTS, RESPONSES)
    teachers[1].stop()
    assert engine.score(CONTEXTS, RESPONSES) == expected
    teachers[1].start()
    teachers[1].requests.clear()
    time.sleep(0.03)
    engine.score(CONTEXTS, RESPONSES)
    engine.score(CONTEXTS, RESPONSES)
    assert len(asked(teachers[1])) >= 5, "one finds out, then all of its part"


def test_both_dead_is_one_sentence(
    tiny: Tiny, teachers: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    urls = ",".join(fake.url for fake in teachers)
    config = tiny(teacher__engine="vllm", teacher__url=urls, teacher__patience=0.3, **TOPK)
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    for fake in teachers:
        fake.spoil = lambda answer, fake=fake: 503 if len(fake.requests) > 6 else answer
    assert main(["train", str(path)]) == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("onpath: ")]
    assert all(fake.url in said for fake in teachers)
    assert "for 0.3 s (status 503: told to); nothing is lost" in said


def test_a_busy_server_is_not_a_dead_one(teachers: Pair, capfd: pytest.CaptureFixture[str]) -> None:
    engine = scorer(teachers)
    teachers[1].spoil = lambda answer: 429 if len(teachers[1].requests) < 9 else answer
    engine.score(CONTEXTS, RESPONSES)
    assert all(host.well for host in engine.server.hosts)
    assert "warning" not in capfd.readouterr().err


def test_another_model_on_one_of_them_is_refused(tiny: Tiny, teachers: Pair, students: Pair) -> None:
    urls = [teachers[0].url, students[0].url]
    with pytest.raises(UserError, match=rf"teacher\.url: the server at {students[0].url} has .*, not "):
        assemble(tiny(teacher__engine="vllm", teacher__url=urls, **TOPK))


def test_one_that_is_not_there_at_the_start_is_named(teachers: Pair) -> None:
    teachers[1].stop()
    with pytest.raises(UserError, match=rf"no answer from {teachers[1].url} for 0\.1 s"):
        scorer(teachers, patience=0.1)
    teachers[1].start()


def test_all_are_given_the_weights(tiny: Tiny, students: Pair) -> None:
    parts, engine = sampler(tiny, students)
    scaled(parts.models.student)
    engine.sync_weights(1)
    assert [fake.resets for fake in students] == [1, 1]
    check_logprobs(parts, rollouts_of(parts))


def test_one_that_does_not_take_them_is_named(tiny: Tiny, students: Pair) -> None:
    parts, engine = sampler(tiny, students)
    students[1].takes_weights = False
    scaled(parts.models.student)
    with pytest.raises(
        UserError, match=rf"after step 1 the server's log-probs differ .*: {students[1].url} did"
    ):
        engine.sync_weights(1)


def stale_answers(fake: FakeVLLM) -> list[Any]:
    """From now on, seeds of what it generates with the weights that it was started with."""
    found: list[Any] = []

    def note(answer: Any) -> Any:
        state = unwrapped(fake.engine.model).state_dict()
        if "seed" in fake.requests[-1] and all(v.equal(fake._original[k]) for k, v in state.items()):
            found.append(fake.requests[-1]["seed"])
        return answer

    fake.spoil = note
    return found


def test_one_with_stale_weights_is_given_the_new_ones_first(tiny: Tiny, students: Pair) -> None:
    parts, engine = sampler(tiny, students)
    scaled(parts.models.student)
    engine.sync_weights(1)
    restarted(students[1])
    stale = stale_answers(students[1])
    check_logprobs(parts, rollouts_of(parts))
    assert engine.resyncs == 1
    assert not stale
    assert students[1].requests, "and it is used"


def test_one_that_missed_a_push_is_given_it_when_it_is_back(tiny: Tiny, students: Pair) -> None:
    parts, engine = sampler(tiny, students)
    engine.sync_weights(0)
    students[1].stop()
    scaled(parts.models.student)
    engine.sync_weights(1)
    check_logprobs(parts, rollouts_of(parts))
    students[1].start()
    stale = stale_answers(students[1])
    students[1].requests.clear()
    time.sleep(0.03)
    check_logprobs(parts, rollouts_of(parts))
    check_logprobs(parts, rollouts_of(parts))
    assert any("seed" in r for r in students[1].requests)
    assert not stale


def test_one_that_cannot_be_given_it_is_not_used(tiny: Tiny, students: Pair) -> None:
    parts, engine = sampler(tiny, students)
    scaled(parts.models.student)
    engine.sync_weights(1)
    restarted(students[1])
    students[1].takes_weights = False
    with pytest.raises(UserError, match=rf"{students[1].url} was restarted and does not answer as before"):
        rollouts_of(parts)
    assert not any("seed" in r for r in students[1].requests)


@pytest.mark.parametrize("count", [1, 2])
def test_a_restart_within_a_batch_spoils_nothing(count: int, tiny: Tiny, students: Pair) -> None:
    """The last server loses its weights while it answers: what it says from then on is not taken."""
    parts, engine = sampler(tiny, students[:count])
    scaled(parts.models.student)
    engine.sync_weights(1)
    fake, struck = students[count - 1], list[int]()

    def strike(answer: Any) -> Any:
        if len(fake.requests) < 4 or struck:
            return answer
        struck.append(len(fake.requests))
        unwrapped(fake.engine.model).load_state_dict(fake._original)
        return 503

    fake.requests.clear()
    fake.spoil = strike
    check_logprobs(parts, rollouts_of(parts))
    assert struck
    if count > 1 and not engine.resyncs:  # the other one may have taken all that was left
        time.sleep(0.03)
        check_logprobs(parts, rollouts_of(parts))
    assert engine.resyncs == 1


@pytest.mark.parametrize(
    ("given", "held"),
    [
        ("http://a:1", "http://a:1"),
        ("http://a:1,http://b:1", ["http://a:1", "http://b:1"]),
        ("http://a:1, http://b:1", ["http://a:1", "http://b:1"]),
        ("[http://a:1, http://b:1]", ["http://a:1", "http://b:1"]),
        ("[http://a:1]", "http://a:1"),
    ],
)
def test_addresses_of_the_command_line(given: str, held: Any) -> None:
    config = load(None, [("rollout.engine", "vllm"), ("rollout.url", given)])
    assert config.rollout.url == held
    assert config.rollout.urls == ((held,) if isinstance(held, str) else tuple(held))
    assert load(None, [("rollout.engine", "vllm"), ("rollout.url", held)]).rollout == config.rollout


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("http://a:1,http://a:1/v1", "listed twice"),
        ("http://a:1,,http://b:1", "an empty address"),
        ("[]", "an empty list of servers"),
        ("[1, 2]", "rollout.url"),
    ],
)
def test_lists_that_are_none(given: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--rollout.engine", "vllm", "--rollout.url", given]) == 2
    assert sentence in capsys.readouterr().err
