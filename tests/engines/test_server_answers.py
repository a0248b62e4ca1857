"""Answers that no server should give: each is asked for again and then said in a sentence, never a traceback
and never a wrong number."""

import math
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from onpath.config.sections import Teacher
from onpath.engines.weights import save_weights
from onpath.engines.wire import Server
from onpath.records import Sampling
from onpath.system.errors import UserError
from tests.conftest import make_model
from tests.engines.fake_vllm import FakeVLLM
from tests.engines.test_server import client, fake_of

Spoil = Callable[[Any], Any]
NUMBERS = "not numbers, or above 0"


@pytest.fixture(scope="module")
def serving(model_dirs: dict[str, Path]) -> Iterator[FakeVLLM]:
    fake = fake_of(model_dirs["teacher"])
    yield fake
    fake.stop()


@pytest.fixture
def teacher(serving: FakeVLLM, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeVLLM]:
    monkeypatch.setattr("onpath.engines.wire._FIRST_WAIT", 0.001)
    yield serving
    serving.spoil, serving.slow = lambda answer: answer, 0.0


def every_logprob(value: Any) -> Spoil:
    return every_entry({"logprob": value})


def every_entry(value: Any) -> Spoil:
    def spoil(answer: Any) -> Any:
        for entry in answer["choices"][0]["prompt_logprobs"][1:]:
            entry.update(dict.fromkeys(entry, value))
        return answer

    return spoil


def named(name: str, logprob: float = -50.0) -> Spoil:
    def spoil(answer: Any) -> Any:
        answer["choices"][0]["prompt_logprobs"][-1][name] = {"logprob": logprob}
        return answer

    return spoil


SCORES: dict[str, tuple[Spoil, str]] = {
    "text": (every_logprob("-1"), NUMBERS),
    "null": (every_logprob(None), NUMBERS),
    "list": (every_logprob([-1.0]), NUMBERS),
    "true": (every_logprob(False), NUMBERS),
    "bare number": (every_entry(-1.0), NUMBERS),
    "no logprob": (every_entry({}), NUMBERS),
    "named by text": (named("the"), NUMBERS),
    "certain of all": (every_logprob(0.0), r"probabilities of one token that sum to [45]"),
    "a little above 1": (every_logprob(math.log(0.3)), r"probabilities of one token that sum to 1\.[25]"),
    "choices are a number": (lambda a: {**a, "choices": 1}, "without exactly one choice"),
    "choice is text": (lambda a: {**a, "choices": ["x"]}, "without exactly one choice"),
    "choice is null": (lambda a: {**a, "choices": [None]}, "without exactly one choice"),
}


@pytest.mark.parametrize("fault", SCORES)
def test_scores_that_are_none(fault: str, teacher: FakeVLLM) -> None:
    teacher.spoil, said = SCORES[fault]
    with pytest.raises(UserError, match=rf"teacher\.url: the server at .* talks nonsense: .*{said}"):
        client(teacher).score_top([(1, 5, 6)], [(7, 8, 2)], k=4)


@pytest.mark.parametrize("value", [-9999.0, -math.inf, -30.0])
def test_distributions_without_mass(value: float, teacher: FakeVLLM) -> None:
    """Of such a teacher the KL would be almost 0, and training would go on."""
    teacher.spoil = every_logprob(value)
    for k in (1, 4):
        with pytest.raises(UserError, match=r"so little mass that all have at most"):
            client(teacher).score_top([(1, 5, 6)], [(7, 8, 2)], k=k)


def test_answers_of_two_requests_swapped(teacher: FakeVLLM) -> None:
    """Of equal length, and with the same response: the contexts tell."""
    kept: list[Any] = []

    def swapped(answer: Any) -> Any:
        kept.append(answer)
        return kept[0]

    teacher.spoil = swapped
    asked = client(teacher)
    asked.score_top([(1, 5, 6)], [(7, 8, 2)], k=2)
    with pytest.raises(UserError, match=r"without the prompt's own token|another prompt"):
        asked.score_top([(1, 9, 30)], [(7, 8, 2)], k=2)


def test_an_answer_that_names_another_prompt(teacher: FakeVLLM) -> None:
    teacher.spoil = written(prompt_token_ids=[1, 2, 3])
    with pytest.raises(UserError, match="another prompt than was asked"):
        client(teacher).score_top([(1, 5, 6)], [(7, 8, 2)], k=2)
    with pytest.raises(UserError, match="another prompt than was asked"):
        client(teacher).continue_from([(1, 5, 6)], Sampling(max_new_tokens=6))


def test_scores_of_no_probability_are_scores(teacher: FakeVLLM) -> None:
    """A server writes -9999 for -inf: a token that the teacher rules out."""
    teacher.spoil = named("39", -9999.0)
    honest = client(teacher).score_top([(1, 5, 6)], [(7, 8, 2)], k=4)[0]
    assert all(sum(map(math.exp, row)) <= 1 + 1e-6 for row in honest.logprobs)


def written(**changes: Any) -> Spoil:
    return lambda answer: {**answer, "choices": [{**answer["choices"][0], **changes}]}


COMPLETIONS: dict[str, tuple[Spoil, str]] = {
    "log-probs are a list": (written(logprobs=[-1.0]), "without token ids and log-probs"),
    "log-probs are text": (
        written(token_ids=[5, 2], logprobs={"token_logprobs": ["a", "b"]}), "without token ids and log-probs",
    ),
    "ids are true": (
        written(token_ids=[True, 2], logprobs={"token_logprobs": [-1.0, -1.0]}), "without token ids",
    ),
    "cannot be drawn": (
        written(token_ids=[5, 2], logprobs={"token_logprobs": [-9999.0, -1.0]}), "cannot have been drawn",
    ),
    "choice is text": (lambda a: {**a, "choices": ["x"]}, "without exactly one choice"),
}  # fmt: skip


@pytest.mark.parametrize("fault", COMPLETIONS)
def test_completions_that_are_none(fault: str, teacher: FakeVLLM) -> None:
    teacher.spoil, said = COMPLETIONS[fault]
    with pytest.raises(UserError, match=rf"talks nonsense: .*{said}"):
        client(teacher).continue_from([(1, 5, 6)], Sampling(max_new_tokens=6))


@pytest.mark.parametrize("answer", [[1], None, {}, {"data": None}, {"data": ["x"]}], ids=str)
def test_a_server_without_a_list_of_models(
    answer: Any, teacher: FakeVLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onpath.engines.wire._body", lambda _: answer)
    with pytest.raises(UserError, match=r"teacher\.url: .* no list of models at /v1/models"):
        client(teacher)


@pytest.mark.parametrize("url", ["localhost:8000", "127.0.0.1", "http://", "ftp://host", "http://a b:x"])
def test_an_address_that_is_none_is_not_waited_for(url: str) -> None:
    begun = time.monotonic()
    with pytest.raises(UserError, match=r"teacher\.url: .* is not an address"):
        Server(Teacher(url=url, engine="vllm", patience=30.0), "teacher", ["any"])
    assert time.monotonic() - begun < 5


def test_a_request_that_runs_into_its_limit_is_sent_again(teacher: FakeVLLM) -> None:
    engine = client(teacher, timeout=0.4, patience=0.4)
    slow = iter([0.7])

    def once(answer: Any) -> Any:
        time.sleep(next(slow, 0.0))
        return answer

    teacher.spoil = once
    assert len(engine.score([(1, 5)], [(7, 2)])[0]) == 2
    assert engine.server.waits >= 1


def test_two_writers_of_the_same_weights_do_not_trip_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As two processes of one run do: each has a process id of its own."""
    model, faults = make_model(3), []
    monkeypatch.setattr("onpath.system.files.os.getpid", threading.get_ident)

    def write() -> None:
        try:
            for _ in range(30):
                save_weights(model, tmp_path)
        except UserError as error:
            faults.append(error)

    threads = [threading.Thread(target=write) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert [p.name for p in tmp_path.glob("*tmp*")] == []
