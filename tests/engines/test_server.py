"""Served teachers and rollout servers: the numbers of this process, and every fault waited for or said."""

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from onpath import training
from onpath.commands.cli import main
from onpath.config.sections import RolloutSection
from onpath.config.sections import Teacher as TeacherSection
from onpath.config.whole import Config
from onpath.data.render import Renderer
from onpath.engines.adapters import merged_weights
from onpath.engines.head import own_logprobs
from onpath.engines.hf import HFEngine
from onpath.engines.remote.server import ServerEngine
from onpath.engines.remote.wire import Server
from onpath.engines.weights import probe_ids, save_weights
from onpath.records import Sampling
from onpath.run import evaluation
from onpath.run.assemble import assemble
from onpath.run.log import read_lines
from onpath.run.parts import Parts
from onpath.system.draws import request_seed
from onpath.system.errors import UserError
from onpath.training import sample, train
from tests.conftest import make_model
from tests.engines.fake_vllm import FakeVLLM
from tests.engines.test_hf import lora
from tests.run.test_train import rollouts_of
from tests.stepping import step_on

Tiny = Callable[..., Config]
TOPK = {"method__support": "teacher_topk", "method__support_k": 8, "method__tail": "bucket"}


def fake_of(directory: Path) -> FakeVLLM:
    model = AutoModelForCausalLM.from_pretrained(directory)
    renderer = Renderer(AutoTokenizer.from_pretrained(directory))
    return FakeVLLM(HFEngine(model.eval(), renderer, stop_ids=frozenset({2})), str(directory))


def scaled(model: nn.Module) -> None:
    """Weights that nobody has seen."""
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)


def restarted(fake: FakeVLLM) -> None:
    """With the weights of its directory, as after a crash."""
    fake.stop()
    fake.start(fresh=True)


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


def served(tiny: Tiny, teacher: FakeVLLM, support: Mapping[str, Any] = TOPK, **more: Any) -> Config:
    where = {"teacher__engine": "vllm", "teacher__url": teacher.url, "teacher__patience": 20.0}
    return tiny(**{**where, **support, **more})


def client(fake: FakeVLLM, **section: Any) -> ServerEngine:
    server = Server(TeacherSection(url=fake.url, engine="vllm", **section), "teacher", [fake.name])
    return ServerEngine(
        server, fake.engine.renderer, stop_ids=frozenset({2}), vocabulary=len(fake.engine.renderer.tokenizer)
    )


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "sampled"])
def test_a_served_teacher_gives_the_loss_of_one_in_process(kind: str, tiny: Tiny, teacher: FakeVLLM) -> None:
    support = {} if kind == "sampled" else TOPK
    here = assemble(tiny(method__divergence=kind, **support))
    there = assemble(served(tiny, teacher, support=support, method__divergence=kind))
    made = rollouts_of(here)
    (ours, mine), (theirs, got) = step_on(here, made), step_on(there, made)
    assert theirs.sums["loss"] == pytest.approx(ours.sums["loss"], abs=1e-5)
    assert max(float((mine[n] - got[n]).abs().max()) for n in mine) < 1e-5
    if kind == "sampled":
        return
    other = assemble(served(tiny, teacher, method__divergence=kind, method__support_k=3))
    assert step_on(other, made)[0].sums["loss"] != pytest.approx(ours.sums["loss"], abs=1e-4), "k matters"


@pytest.mark.parametrize("method", ["trd", "topd", "relay", "branch", "bridge", "truncate"])
def test_methods_run_with_a_served_teacher(method: str, tiny: Tiny, teacher: FakeVLLM) -> None:
    own: dict[str, dict[str, Any]] = {
        "trd": {"method__gate": False, "method__template": "{problem}{attempt}"},
        "topd": {"method__window": 4, "method__top_share": 0.2},
        "relay": {"method__delta": 1.0},
        "branch": {},
        "bridge": {"method__window": 4, "method__keep": "all"},
        "truncate": {"method__overlap_k": 4, "method__window": 4},
    }
    config = served(tiny, teacher, method__name=method, optim__steps=2, **own[method])
    result = train(config, quiet=True)
    rows = read_lines(result.directory / "metrics.jsonl")
    assert [r["step"] for r in rows] == [1, 2]
    assert all(math.isfinite(r["loss"]) and r["loss"] > 0 for r in rows)
    writes = method not in ("branch", "truncate")
    assert (rows[0]["teacher_tokens_generated"] > 0) is writes
    assert any("prompt_logprobs" not in r for r in teacher.requests) is writes, "the server wrote"
    assert method != "truncate" or rows[0]["truncated_share"] > 0
    assert any("prompt_logprobs" in r for r in teacher.requests), "the server scored"


def test_a_rollout_server_with_too_little_room(tiny: Tiny, student: FakeVLLM) -> None:
    where = {"rollout__engine": "vllm", "rollout__url": student.url, "rollout__max_new_tokens": 8}
    parts = assemble(tiny())
    longest = max(len(parts.text.renderer.ids(prompt)) for prompt in parts.prompts.pool)
    student.longest = longest + 8
    assemble(tiny(**where, eval__max_new_tokens=8))
    student.longest -= 1
    with pytest.raises(UserError, match=rf"a prompt has {longest} tokens and rollout\.max_new_tokens is 8"):
        assemble(tiny(**where, eval__max_new_tokens=8))
    student.longest = longest + 8
    with pytest.raises(UserError, match=r"and eval\.max_new_tokens is 16; start it with --max-model-len"):
        assemble(tiny(**where, eval__max_new_tokens=16))


def test_a_served_student_is_relayed_in_rounds(tiny: Tiny, student: FakeVLLM) -> None:
    """By prefix continuation: each round asks for what follows the teacher's token."""
    where = {"rollout__engine": "vllm", "rollout__url": student.url}
    parts = assemble(tiny(**where, method__name="relay", method__delta=1.0))
    parts.generators.student.sync_weights(0)
    rollouts = sample(parts, 0)
    asked = len(student.requests)
    made = parts.method.prepare(rollouts, step=0).trajectories
    prompts = [tuple(r["prompt"]) for r in student.requests[asked:] if "prompt" in r]
    legs = [(t, at) for t in made for at in t.edit.detail.get("places", []) if at + 1 < len(t.response)]
    assert len(legs) > len(made), "several rounds"
    for t, at in legs:
        assert t.student_context + t.response[: at + 1] in prompts


def test_each_response_is_scored_once(tiny: Tiny, teacher: FakeVLLM) -> None:
    config = served(tiny, teacher, method__name="topd", method__window=4, optim__steps=1)
    train(config, quiet=True)
    scored = [tuple(r["prompt"]) for r in teacher.requests if "prompt_logprobs" in r]
    assert len(scored) == len(set(scored))


def test_a_server_samples_from_the_weights_that_train(tiny: Tiny, student: FakeVLLM, tmp_path: Path) -> None:
    where = {"rollout__engine": "vllm", "rollout__url": student.url}
    result = train(tiny(**where, optim__steps=3), quiet=True)
    assert student.resets >= 4, "cached prefixes are those of other weights"
    trained = AutoModelForCausalLM.from_pretrained(result.model)
    held = student.engine.model.state_dict()
    assert all(torch.equal(ours, held[name]) for name, ours in trained.state_dict().items())
    assert [r["staleness"] for r in read_lines(result.directory / "metrics.jsonl")] == [0, 0, 0]


def test_rollouts_of_a_server_carry_the_models_logprobs(tiny: Tiny, student: FakeVLLM) -> None:
    parts = assemble(tiny(rollout__engine="vllm", rollout__url=student.url))
    rollouts = parts.generators.student.generate(parts.prompts.pool[:6], parts.sampling, n=2)
    own = parts.generators.over(parts.models.student)
    scores = own.score([r.context for r in rollouts], [r.ids for r in rollouts])
    for r, expected in zip(rollouts, scores, strict=True):
        assert r.logprobs == pytest.approx(expected, abs=1e-5)
    assert len({r.ids for r in rollouts}) > 6, "samples of one prompt differ"
    again = parts.generators.student.generate(parts.prompts.pool[:6][::-1], parts.sampling, n=2)
    assert {(r.prompt.id, r.sample): r.ids for r in again} == {
        (r.prompt.id, r.sample): r.ids for r in rollouts
    }


def test_a_models_own_generation_config_changes_no_sample(teacher: FakeVLLM) -> None:
    """What a request leaves open vLLM takes from there: of an instruct model often a penalty."""
    client(teacher).continue_from([(1, 5)], Sampling(max_new_tokens=3))
    nothing = {
        "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0,
        "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
    }  # fmt: skip
    assert {name: teacher.requests[-1].get(name) for name in nothing} == nothing


def test_a_server_that_came_back_with_its_old_weights_is_given_the_new_ones(
    tiny: Tiny, student: FakeVLLM
) -> None:
    parts = assemble(tiny(rollout__engine="vllm", rollout__url=student.url))
    engine = parts.generators.student
    assert isinstance(engine, ServerEngine)
    scaled(parts.models.student)
    engine.sync_weights(1)
    assert engine.gap() < 1e-4
    restarted(student)
    assert engine.gap() > 1e-2, "the fault is planted"
    (rollout,) = engine.generate(parts.prompts.pool[:1], parts.sampling)
    assert engine.resyncs == 1
    assert rollout.policy_version == 1
    (expected,) = parts.generators.over(parts.models.student).score([rollout.context], [rollout.ids])
    assert rollout.logprobs == pytest.approx(expected, abs=1e-5)
    restarted(student)
    (scores,) = engine.score([rollout.context], [rollout.ids])
    assert engine.resyncs == 2
    assert scores == pytest.approx(expected, abs=1e-5)


def test_a_restart_is_seen_however_little_the_weights_have_moved(tiny: Tiny, student: FakeVLLM) -> None:
    parts = assemble(tiny(rollout__engine="vllm", rollout__url=student.url))
    engine = parts.generators.student
    assert isinstance(engine, ServerEngine)
    engine.sync_weights(0)
    with torch.no_grad():
        for p in parts.models.student.parameters():
            p.mul_(1.00004)
    engine.sync_weights(1)
    restarted(student)
    assert engine.gap() < engine.tolerance, "less than rounding may explain"
    engine.generate(parts.prompts.pool[:1], parts.sampling)
    assert engine.resyncs == 1


def test_rollouts_of_old_weights_stop_the_run(tiny: Tiny) -> None:
    parts = assemble(tiny())
    assert len(sample(parts, 1)) == 8, "one step old"
    with pytest.raises(UserError, match=r"step 3: rollouts were written by weights 2 steps old"):
        sample(parts, 2)
    parts.generators.student.sync_weights(2)
    assert len(sample(parts, 2)) == 8


def test_weights_that_do_not_arrive_stop_the_run(tiny: Tiny, student: FakeVLLM) -> None:
    student.takes_weights = False
    config = tiny(rollout__engine="vllm", rollout__url=student.url, optim__lr=0.1)
    with pytest.raises(UserError, match=r"rollout\.url: after step 1 the server's log-probs differ"):
        train(config, quiet=True)
    assert len(read_lines(Path(config.run.dir) / "tiny" / "metrics.jsonl")) <= 1


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("arrives", [True, False])
def test_a_small_step_that_does_not_arrive_stops_the_run(
    bf16: bool, arrives: bool, tiny: Tiny, student: FakeVLLM
) -> None:
    """Smaller than what half precision rounds away: the server's own answers tell."""
    options = {"rollout__engine": "vllm", "rollout__url": student.url, "optim__bf16": bf16}
    config = tiny(**options, optim__lr=5e-6, optim__schedule="constant", optim__warmup=0.0)
    student.takes_weights = arrives
    if arrives:
        assert train(config, quiet=True).steps == 3
        return
    words = "did not change at all" if bf16 else "differ"
    with pytest.raises(UserError, match=f"after step 1 the server's log-probs {words}"):
        train(config, quiet=True)


def test_a_push_of_the_same_weights_changes_nothing(tiny: Tiny, student: FakeVLLM) -> None:
    engine = assemble(tiny(rollout__engine="vllm", rollout__url=student.url)).generators.student
    for version in range(3):
        engine.sync_weights(version)


def no_ids(answer: Any) -> Any:
    answer["choices"][0].pop("token_ids")
    return answer


def drop_one(answer: Any) -> Any:
    choice = answer["choices"][0]
    for key in ("prompt_logprobs", "token_ids"):
        choice[key] = choice.get(key, [])[:-1]
    return answer


def not_a_number(answer: Any) -> Any:
    choice = answer["choices"][0]
    for entry in choice.get("prompt_logprobs", []):
        for value in (entry or {}).values():
            value["logprob"] = float("nan")
    if "logprobs" in choice:
        choice["logprobs"]["token_logprobs"] = [float("nan")] * len(choice["token_ids"])
    return answer


def positive(answer: Any) -> Any:
    for entry in answer["choices"][0].get("prompt_logprobs", []):
        for value in (entry or {}).values():
            value["logprob"] = 0.5
    return answer


def another_prompt(answer: Any) -> Any:
    entries = answer["choices"][0]["prompt_logprobs"]
    entries[-1] = {"999": {"logprob": -1.0}, **dict(list(entries[-1].items())[1:])}
    entries[-1] = {k: v for k, v in entries[-1].items() if k == "999"}
    return answer


def another_model(answer: Any) -> Any:
    return {**answer, "model": "somebody-else"}


SCORING = {
    "one token short": (drop_one, r"\d+ prompt log-probs for \d+ tokens"),
    "NaN": (not_a_number, "not numbers, or above 0"),
    "above 0": (positive, "not numbers, or above 0"),
    "another prompt": (another_prompt, "without the prompt's own token"),
    "another model": (another_model, "an answer of the model 'somebody-else'"),
    "no choice": (lambda answer: {**answer, "choices": []}, "without exactly one choice"),
}
WRITING = {
    "no token ids": (no_ids, "without token ids"),
    "NaN": (not_a_number, "log-probs that are missing, not finite or above 0"),
    "one token short": (drop_one, "without a stop token|missing|does not end"),
}


@pytest.mark.parametrize("fault", SCORING)
def test_nonsense_scores_are_never_a_kl(fault: str, teacher: FakeVLLM, no_waiting: None) -> None:
    teacher.spoil, said = SCORING[fault]
    engine = client(teacher)
    with pytest.raises(UserError, match=rf"teacher\.url: the server at .* talks nonsense: .*{said}"):
        engine.score_top([(1, 5, 6)], [(7, 8, 2)], k=4)
    assert len(teacher.requests) == 3, "asked again, not for ever"
    teacher.spoil = lambda answer: answer
    assert len(engine.score_top([(1, 5, 6)], [(7, 8, 2)], k=4)[0].ids) == 3


@pytest.mark.parametrize("fault", WRITING)
def test_nonsense_completions_are_refused(fault: str, teacher: FakeVLLM, no_waiting: None) -> None:
    teacher.spoil, said = WRITING[fault]
    with pytest.raises(UserError, match=rf"talks nonsense: .*({said})"):
        client(teacher).continue_from([(1, 5, 6)], Sampling(max_new_tokens=6))


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onpath.engines.remote.wire._FIRST_WAIT", 0.001)


def test_one_bad_answer_is_asked_for_again(teacher: FakeVLLM, no_waiting: None) -> None:
    count = iter(range(100))
    teacher.spoil = lambda answer: drop_one(answer) if next(count) < 2 else answer
    assert client(teacher).score([(1, 5)], [(7, 2)])[0] == pytest.approx(
        teacher.engine.score([(1, 5)], [(7, 2)])[0], abs=1e-5
    )


@pytest.mark.parametrize("status", [429, 500, 503, 529])
def test_a_busy_server_is_waited_for(status: int, teacher: FakeVLLM, no_waiting: None) -> None:
    count = iter(range(100))
    teacher.spoil = lambda answer: status if next(count) < 3 else answer
    engine = client(teacher)
    assert engine.score([(1, 5)], [(7, 2)])
    assert engine.server.waits == 3


def test_a_refusal_is_said_at_once(teacher: FakeVLLM) -> None:
    teacher.spoil = lambda _: 400
    with pytest.raises(UserError, match=r"refuses a request with status 400: told to"):
        client(teacher).score([(1, 5)], [(7, 2)])
    assert len(teacher.requests) == 1


def test_a_server_that_is_away_too_long_stops_the_run_with_a_sentence(teacher: FakeVLLM) -> None:
    engine = client(teacher, patience=0.5)
    teacher.stop()
    begun = time.monotonic()
    with pytest.raises(UserError, match=r"no answer from .* for 0\.5 s .*nothing is lost"):
        engine.score([(1, 5)], [(7, 2)])
    assert time.monotonic() - begun < 10
    teacher.start()


def test_a_slow_server_runs_into_the_time_limit(teacher: FakeVLLM) -> None:
    engine = client(teacher, timeout=0.1, patience=0.3)
    teacher.slow = 0.5
    with pytest.raises(UserError, match=r"no answer"):
        engine.score([(1, 5)], [(7, 2)])
    teacher.slow = 0.0


def test_a_server_that_restarts_in_the_middle_of_a_run_changes_nothing(
    tiny: Tiny, teacher: FakeVLLM, tmp_path: Path
) -> None:
    expected = train(served(tiny, teacher, run__name="calm", optim__steps=4), quiet=True)
    done = threading.Event()

    def disturb() -> None:
        while not done.wait(0.4):
            teacher.stop()
            time.sleep(0.3)
            teacher.start()

    thread = threading.Thread(target=disturb)
    teacher.slow = 0.02  # so that a step lasts long enough to be hit
    thread.start()
    try:
        found = train(served(tiny, teacher, run__name="rough", optim__steps=4), quiet=True)
    finally:
        done.set()
        thread.join()
    calm, rough = (read_lines(r.directory / "metrics.jsonl") for r in (expected, found))
    assert [r["loss"] for r in rough] == [r["loss"] for r in calm]


def test_asked_to_stop_it_does_not_wait_for_a_server_that_is_away(
    tiny: Tiny, teacher: FakeVLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = served(tiny, teacher, optim__steps=4, run__save_every=1, teacher__patience=300.0)
    real = training.one_step

    def hit(parts: Any, optimizer: Any, step: int) -> Any:
        if step == 2:
            teacher.stop()
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return real(parts, optimizer, step)

    begun = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(training, "one_step", hit)
        with pytest.raises(UserError, match=r"SIGTERM while .* gave no answer"):
            train(config, quiet=True)
    assert time.monotonic() - begun < 60
    teacher.start()
    result = train(config, quiet=True)
    assert [r["step"] for r in read_lines(result.directory / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_run_whose_teacher_died_goes_on_where_it_was(tiny: Tiny, teacher: FakeVLLM) -> None:
    config = served(tiny, teacher, optim__steps=4, run__save_every=1, teacher__patience=0.3)
    count = iter(range(10_000))
    teacher.spoil = lambda answer: 503 if next(count) > 20 else answer
    with pytest.raises(UserError, match="nothing is lost"):
        train(config, quiet=True)
    before = read_lines(Path(config.run.dir) / "tiny" / "metrics.jsonl")
    assert 0 < len(before) < 4
    teacher.spoil = lambda answer: answer
    train(config, quiet=True)
    after = read_lines(Path(config.run.dir) / "tiny" / "metrics.jsonl")
    assert [r["step"] for r in after] == [1, 2, 3, 4]
    assert after[: len(before)] == before


def away_in(stage: str, servers: Mapping[str, FakeVLLM]) -> Callable[[Parts, Any, int], Any]:
    """`one_step`, in whose third call a server goes: while rollouts are written, scored, or weights moved."""
    real = training.one_step

    def step(parts: Parts, optimizer: Any, at: int) -> Any:
        if at == 2:
            if stage == "sync":
                optimizer.register_step_post_hook(lambda *_: servers["student"].stop())
            else:
                servers["teacher" if stage == "score" else "student"].stop()
        return real(parts, optimizer, at)

    return step


@pytest.mark.parametrize("stage", ["sample", "score", "sync"])
@pytest.mark.parametrize("method", ["opd", "topd"])
def test_a_server_that_goes_costs_no_finished_step(
    method: str, stage: str, tiny: Tiny, teacher: FakeVLLM, student: FakeVLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However rare checkpoints are; a method's state goes on as if nothing had happened."""
    where = {
        "rollout__engine": "vllm", "rollout__url": student.url, "rollout__patience": 0.3,
        "teacher__patience": 0.3, "optim__steps": 4, "run__save_every": 50,
        "method__name": method, **({"method__window": 4} if method == "topd" else {}),
    }  # fmt: skip
    servers = {"student": student, "teacher": teacher}
    calm = train(served(tiny, teacher, run__name="calm", **where), quiet=True)
    config = served(tiny, teacher, **where)
    with monkeypatch.context() as patch:
        patch.setattr(training, "one_step", away_in(stage, servers))
        with pytest.raises(UserError, match="no answer from"):
            train(config, quiet=True)
    done = 3 if stage == "sync" else 2
    assert [p.name for p in (Path(config.run.dir) / "tiny/checkpoints").iterdir()] == [f"step_{done}"]
    servers["teacher" if stage == "score" else "student"].start(fresh=True)
    rough = train(config, quiet=True)
    rows = [read_lines(r.directory / "metrics.jsonl") for r in (calm, rough)]
    assert [row["step"] for row in rows[1]] == [1, 2, 3, 4]
    assert [row["loss"] for row in rows[1]] == [row["loss"] for row in rows[0]]


def test_a_server_that_goes_during_an_evaluation(
    tiny: Tiny, student: FakeVLLM, data_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is made again, whole, and no step is."""
    where = {
        "rollout__engine": "vllm", "rollout__url": student.url, "rollout__patience": 0.3, "optim__steps": 4,
        "eval__every": 2, "data__eval": {"one": str(data_file), "two": str(data_file)},
    }  # fmt: skip
    calm = train(tiny(run__name="calm", **where), quiet=True)
    config, real, sets = tiny(**where), evaluation.evaluate, iter("abc")

    def goes(*given: Any, **options: Any) -> Any:
        if next(sets) == "b":
            student.stop()
        return real(*given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "evaluate", goes)
        with pytest.raises(UserError, match="no answer from"):
            train(config, quiet=True)
    run = Path(config.run.dir) / "tiny"
    assert [row["split"] for row in read_lines(run / "eval.jsonl")] == ["one"]
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step_2"]
    student.start(fresh=True)
    train(config, quiet=True)
    assert read_lines(run / "eval.jsonl") == read_lines(calm.directory / "eval.jsonl")
    assert [row["step"] for row in read_lines(run / "metrics.jsonl")] == [1, 2, 3, 4]


def test_another_model_at_the_url_is_refused(tiny: Tiny, student: FakeVLLM) -> None:
    with pytest.raises(UserError, match=r"teacher\.url: the server at .* has .*, not .*teacher"):
        assemble(served(tiny, student))


def test_the_api_key_comes_from_the_environment_and_is_never_written(
    tiny: Tiny, teacher: FakeVLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONPATH_API_KEY", "secret-of-nobody")
    result = train(served(tiny, teacher, optim__steps=1), quiet=True)
    assert set(teacher.headers) == {"Bearer secret-of-nobody"}
    for path in result.directory.rglob("*"):
        assert not path.is_file() or b"secret-of-nobody" not in path.read_bytes(), path


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--teacher.engine", "vllm"], "set teacher.url"),
        (["--teacher.url", "http://x:1"], "set teacher.engine: vllm, or chat for text only"),
        (["--rollout.url", "http://x:1"], "set rollout.engine: vllm"),
        (["--teacher.engine", "vllm", "--teacher.url", "http://x:1"], "method.support: teacher_topk"),
        (
            ["--teacher.engine", "vllm", "--teacher.url", "http://x:1", "--method.name", "opsd"],
            "the student is its own teacher",
        ),
        (["--rollout.max_staleness", "0", "--rollout.overlap", "true"], "set rollout.max_staleness: 1"),
    ],
)
def test_impossible_settings(options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", *options]) == 2
    assert sentence in capsys.readouterr().err


def test_vllm_that_is_not_there_is_said(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "vllm", None)
    with pytest.raises(UserError, match=r"cannot import vLLM .*install it \(docs/engines\.md\)"):
        assemble(tiny(rollout__engine="vllm"))


@pytest.mark.parametrize("tied", [True, False])
def test_merged_weights_are_the_adapted_model(tied: bool, tmp_path: Path) -> None:
    base = make_model(3, tied=tied)
    plain = {k: v.clone() for k, v in base.state_dict().items()}
    adapted = lora(base)
    save_weights(adapted, tmp_path)
    merged = make_model(4, tied=tied)
    merged.load_state_dict(dict(merged_weights(adapted)))
    ids = probe_ids(40)
    one, two = own_logprobs(merged, ids), own_logprobs(adapted, ids)
    assert torch.allclose(one, two, atol=1e-4)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.allclose(own_logprobs(again, ids), one, atol=1e-6)
    with adapted.disable_adapter():
        unchanged = own_logprobs(adapted, ids)
    fresh = make_model(3, tied=tied)
    fresh.load_state_dict(plain)
    assert torch.equal(unchanged, own_logprobs(fresh, ids)), "the model itself is left as it was, to the bit"


def test_seeds_of_requests_are_a_function_of_seed_and_key() -> None:
    seeds = {(s, k): request_seed(s, k) for s in range(3) for k in ("a", "b", "a/0")}
    assert len(set(seeds.values())) == 9
    assert all(0 <= v < 2**63 for v in seeds.values())
    assert request_seed(1, "a") == seeds[1, "a"]


def test_sections_know_their_server() -> None:
    section = RolloutSection(engine="vllm", url="http://localhost:8000/v1", vllm={"max_num_seqs": 8})
    assert json.loads(section.model_dump_json())["vllm"] == {"max_num_seqs": 8}
