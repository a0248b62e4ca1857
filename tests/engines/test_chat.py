"""Black-box teachers: what a chat endpoint writes is learnt by cross-entropy, exactly as if it were here."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from onpath.commands.cli import main
from onpath.commands.study.command import load_study
from onpath.commands.study.plan import arm_config
from onpath.config.build import build
from onpath.config.sections import Teacher as TeacherSection
from onpath.config.whole import Config
from onpath.data.render import Renderer
from onpath.engines.remote import chat
from onpath.engines.remote.chat import ChatEngine
from onpath.engines.remote.wire import Line
from onpath.methods.opd import OPD
from onpath.records import Prompt, Sampling
from onpath.run.assemble import assemble, thinking_warning
from onpath.run.log import read_lines
from onpath.system.errors import UserError
from onpath.training import sample, train
from tests.conftest import CHARACTERS, make_tokenizer
from tests.engines.fake_vllm import FakeVLLM
from tests.engines.test_server import fake_of
from tests.stepping import step_on

Tiny = Callable[..., Config]
SOUND: dict[str, Any] = {
    "teacher": {"engine": "chat", "url": "http://localhost:1", "model": "m"},
    "method": {"name": "trd", "divergence": "cross_entropy"},
}
TRD = {
    "method__name": "trd", "method__gate": False, "method__divergence": "cross_entropy",
    "method__template": "{problem}{attempt}",
}  # fmt: skip


@pytest.fixture
def endpoint(model_dirs: dict[str, Path]) -> Iterator[FakeVLLM]:
    fake = fake_of(model_dirs["teacher"])
    yield fake
    fake.stop()


def black_box(tiny: Tiny, endpoint: FakeVLLM, **more: Any) -> Config:
    where = {"teacher__engine": "chat", "teacher__url": endpoint.url, "teacher__model": "somebody/large"}
    return tiny(**{**where, "teacher__patience": 5.0, **more})


def writer_to(endpoint: FakeVLLM, **section: Any) -> ChatEngine:
    line = Line(TeacherSection(url=endpoint.url, engine="chat", patience=5.0), "teacher")
    extra = TeacherSection(**section).extra_body
    return ChatEngine(line, "large", endpoint.engine.renderer, stop_ids=frozenset({2}), extra=extra)


def test_rewrites_teach_as_those_of_a_teacher_in_process(tiny: Tiny, endpoint: FakeVLLM) -> None:
    trd = {**TRD, "method__rewrite_temperature": 0.0}
    here, there = assemble(tiny(**trd)), assemble(black_box(tiny, endpoint, **trd))
    special = set(here.text.renderer.tokenizer.all_special_ids)
    drawn = [
        t.origin
        for t in here.method.prepare(sample(here, 0), step=0).trajectories
        if not special & set(t.response[:-1])
    ]
    made = [r for r in drawn if r is not None]
    assert len(made) >= 2, "the others spell control tokens, which stay text"
    written, learnt = (p.method.prepare(made, step=0) for p in (here, there))
    assert [t.response for t in learnt.trajectories] == [t.response for t in written.trajectories]
    assert learnt.means["accuracy_z"] == written.means["accuracy_z"]
    assert learnt.means["support_gap_nats"] == pytest.approx(written.means["support_gap_nats"])
    (ours, mine), (theirs, got) = step_on(here, written.trajectories), step_on(there, learnt.trajectories)
    assert theirs.sums["loss"] == pytest.approx(ours.sums["loss"], abs=1e-6)
    assert max(float((mine[n] - got[n]).abs().max()) for n in mine) < 1e-6
    assert {r["model"] for r in endpoint.requests} == {"somebody/large"}
    assert "gives text and no log-probs" in there.warnings[0]


def test_sft_on_what_it_writes(tiny: Tiny, endpoint: FakeVLLM) -> None:
    sft = {"method__writer": "teacher", "method__divergence": "cross_entropy", "optim__steps": 2}
    result = train(black_box(tiny, endpoint, **sft), quiet=True)
    rows = read_lines(result.directory / "metrics.jsonl")
    assert [r["step"] for r in rows] == [1, 2]
    assert all(r["loss"] > 0 and r["reverse_kl_nats"] is None for r in rows)
    assert rows[0]["teacher_tokens_generated"] > 0
    assert len({r["seed"] for r in endpoint.requests}) == len(endpoint.requests)


class OfMine(OPD):
    """OPD under another name, whose rollouts are looked at."""


def test_what_it_says_nothing_of_is_stored_as_nothing(
    tiny: Tiny, endpoint: FakeVLLM, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not as NaN, which is no JSON; and an own method may have no log-probs either."""
    sft = {"method__writer": "teacher", "method__divergence": "cross_entropy", "optim__steps": 1}
    config = black_box(tiny, endpoint, **sft, run__trajectories_every=1)
    own = OfMine.Options(writer="teacher", divergence="cross_entropy")
    result = train(config, method=own, quiet=True)
    capsys.readouterr()
    assert main(["inspect", str(result.directory), "--json"]) == 0
    for line in capsys.readouterr().out.splitlines():
        row = json.loads(line, parse_constant=lambda said: pytest.fail(f"{said} is no JSON"))
        assert row["origin_logprobs"] is None


def test_a_request_is_messages_and_limits(endpoint: FakeVLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONPATH_API_KEY", "secret")
    extra = {"reasoning_effort": "low", "seed": None}
    messages = ({"role": "system", "content": "be brief"}, {"role": "user", "content": "1+2"})
    prompt = Prompt(id="a", messages=messages)
    sampling = Sampling(temperature=0.5, top_p=0.9, max_new_tokens=5)
    (done,) = writer_to(endpoint, extra_body=extra).answer([prompt], [()], sampling, keys=["k"])
    assert endpoint.requests == [{
        "model": "large", "messages": list(messages), "temperature": 0.5, "top_p": 0.9, "max_tokens": 5,
        "reasoning_effort": "low",
    }]  # fmt: skip
    assert endpoint.headers[-1] == "Bearer secret"
    assert 1 <= len(done.ids) <= 5
    assert done.logprobs == ()


def test_its_text_becomes_ids_of_the_student(endpoint: FakeVLLM) -> None:
    tokenizer = make_tokenizer()
    writer = writer_to(endpoint)

    def says(text: str | None, reason: str) -> Callable[[Any], Any]:
        return lambda a: {**a, "choices": [{"message": {"content": text}, "finish_reason": reason}]}

    def written(room: int = 8) -> Any:
        return writer.answer([Prompt(id="a", text="1")], [()], Sampling(max_new_tokens=room), keys=["k"])[0]

    endpoint.spoil = says("1+2", "stop")
    plain = tuple(tokenizer("1+2", add_special_tokens=False)["input_ids"])
    assert (written().ids, written().finish_reason) == ((*plain, 2), "stop")
    assert (written(3).ids, written(3).finish_reason) == (plain, "length")  # no room for the stop token
    assert written(2).ids == plain[:2]
    endpoint.spoil = says("1+2", "length")
    assert (written().ids, written().finish_reason) == (plain, "length")
    endpoint.spoil = says(None, "stop")
    assert written().ids == (2,)


def test_control_tokens_in_text_are_text() -> None:
    renderer = Renderer(make_tokenizer())
    special = set(renderer.tokenizer.all_special_ids)
    assert special & set(renderer.tokenizer("1<eos>2", add_special_tokens=False)["input_ids"])
    assert not (special - {renderer.tokenizer.unk_token_id}) & set(renderer.text_ids("1<eos>2"))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda a: {**a, "choices": []}, "without exactly one choice"),
        (lambda a: {**a, "choices": [{"text": "1"}]}, "a choice without a message"),
        (lambda a: {**a, "choices": [{"message": {"content": 3}}]}, "a choice without a message"),
        (lambda a: [a], "without exactly one choice"),
        (lambda a: 401, "status 401: told to"),
        (lambda a: 503, "no answer from"),
    ],
)
def test_what_is_no_answer_stops_the_run(spoil: Any, said: str, tiny: Tiny, endpoint: FakeVLLM) -> None:
    endpoint.spoil = spoil
    config = black_box(tiny, endpoint, **TRD, teacher__patience=0.5)
    with pytest.raises(UserError, match=said):
        train(config, quiet=True)


def test_an_endpoint_that_says_nothing_is_refused(tiny: Tiny, endpoint: FakeVLLM) -> None:
    endpoint.spoil = lambda a: {**a, "choices": [{"message": {"content": ""}, "finish_reason": "stop"}]}
    with pytest.raises(UserError, match="the rewriter returned no text for any of"):
        train(black_box(tiny, endpoint, **TRD), quiet=True)


def test_offline_asks_once(tiny: Tiny, endpoint: FakeVLLM) -> None:
    """What was paid for is not asked for again: neither in later epochs nor by a restarted run."""
    offline = {**TRD, "method__offline": True, "optim__steps": 6, "run__save_every": 2}
    train(black_box(tiny, endpoint, **offline), quiet=True)
    asked = [json.dumps(r, sort_keys=True) for r in endpoint.requests]
    assert len(asked) == len(set(asked))
    config = black_box(tiny, endpoint, **offline)
    assert len(asked) <= len(assemble(config).prompts.pool)
    run = Path(config.run.dir) / "tiny"
    before = read_lines(run / "metrics.jsonl")
    for name in ("model", "checkpoints"):
        shutil.rmtree(run / name)
    train(config, quiet=True)
    assert len(endpoint.requests) == len(asked)
    after = read_lines(run / "metrics.jsonl")
    assert [r["loss"] for r in after] == [r["loss"] for r in before]


def test_a_failure_keeps_the_answers_that_were_there(tiny: Tiny, endpoint: FakeVLLM) -> None:
    def spoil(answer: Any) -> Any:
        return 401 if len(endpoint.requests) > 5 else answer

    endpoint.spoil = spoil
    offline = {**TRD, "method__offline": True, "teacher__concurrency": 2}
    with pytest.raises(UserError, match="status 401"):
        train(black_box(tiny, endpoint, **offline), quiet=True)
    endpoint.spoil = lambda answer: answer
    paid = [json.dumps(r, sort_keys=True) for r in endpoint.requests[:4]]
    endpoint.requests.clear()
    train(black_box(tiny, endpoint, **offline), quiet=True)
    asked = [json.dumps(r, sort_keys=True) for r in endpoint.requests]
    assert len(asked) == len(set(asked)) > 4
    assert not set(paid) & set(asked)


def test_empty_samples_are_not_learnt(tiny: Tiny, endpoint: FakeVLLM) -> None:
    def spoil(answer: Any) -> Any:
        if len(endpoint.requests) % 2:
            return answer
        return {**answer, "choices": [{"message": {"content": None}, "finish_reason": "stop"}]}

    endpoint.spoil = spoil
    sft = {"method__writer": "teacher", "method__divergence": "cross_entropy"}
    parts = assemble(black_box(tiny, endpoint, **sft))
    made = parts.method.prepare(sample(parts, 0), step=0).trajectories
    assert {t.edit.kept for t in made} == {True, False}
    assert all(t.edit.kept == bool(parts.text.renderer.text(t.response).strip()) for t in made)
    endpoint.spoil = lambda a: {**a, "choices": [{"message": {"content": ""}, "finish_reason": "length"}]}
    with pytest.raises(UserError, match=r"the teacher returned no text for any of .*thought for all"):
        parts.method.prepare(sample(parts, 0), step=0)


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ("<think>hm, 4</think>\n\n1+1=2", "1+1=2"),
        ("hm, 4\n</think>\n\n1+1=2", "1+1=2"),
        ("`</think>` ends it: 1+1=2", "`</think>` ends it: 1+1=2"),
        ("[THINK]emit </think>?[/THINK] 1+1=2", "1+1=2"),
        ("\n[THINK]4?[/THINK] 1+1=2", "1+1=2"),
        ("<think>hm, 4", ""),
        ("1+1=2 <think>no</think>", "1+1=2 <think>no</think>"),
        ("1+1=2", "1+1=2"),
        (None, ""),
    ],
)
def test_inline_thinking_is_not_learnt(said: str | None, text: str) -> None:
    """A server without a parser of reasoning sends it in the text."""
    answer = {"choices": [{"message": {"content": said}, "finish_reason": "stop"}]}
    assert chat._understood(0, answer) == (text, True)


def test_what_a_filter_has_cut_is_not_learnt(tiny: Tiny, endpoint: FakeVLLM) -> None:
    def spoil(answer: Any) -> Any:
        cut = len(endpoint.requests) % 2 == 0
        reason = "content_filter" if cut else "length"
        return {**answer, "choices": [{"message": {"content": "1+1"}, "finish_reason": reason}]}

    endpoint.spoil = spoil
    sft = {"method__writer": "teacher", "method__divergence": "cross_entropy"}
    parts = assemble(black_box(tiny, endpoint, **sft))
    made = parts.method.prepare(sample(parts, 0), step=0).trajectories
    assert {(t.edit.kept, len(t.response)) for t in made} == {(True, 3), (False, 0)}


def test_the_stop_token_is_the_one_that_closes_an_answer() -> None:
    tokenizer = make_tokenizer([*CHARACTERS, "<turn>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    end = tokenizer.convert_tokens_to_ids("<turn>")
    tokenizer.chat_template = (
        "<bos>{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}<turn>{% endif %}"
        "{% endfor %}"
    )
    line = Line(TeacherSection(url="http://localhost:1", engine="chat"), "teacher")
    assert ChatEngine(line, "m", Renderer(tokenizer), stop_ids=frozenset({2, end})).stop == end
    assert ChatEngine(line, "m", Renderer(tokenizer), stop_ids=frozenset({2})).stop == 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": {"name": "opd"}}, "method.divergence: cross_entropy"),
        ({"method": {"name": "trd"}}, "method.divergence: cross_entropy"),
        ({"method": {"name": "topd"}}, "use method.name trd"),
        ({"method": {"name": "opsd"}}, "the student is its own teacher"),
        ({"method": {**SOUND["method"], "minimal_edit": True}}, "go on from the student's"),
        ({"method": {**SOUND["method"], "reweight": "divergence"}}, "method.reweight"),
        ({"teacher": {"url": None}}, "set teacher.url"),
    ],
)  # fmt: skip
def test_what_text_cannot_teach_is_refused(changes: dict[str, Any], said: str) -> None:
    build(SOUND)
    teacher = {**SOUND["teacher"], **changes.get("teacher", {})}
    with pytest.raises(UserError, match=said):
        build({"teacher": teacher, "method": changes.get("method", SOUND["method"])})


def test_the_doctor_looks_at_what_there_is(
    tiny: Tiny, endpoint: FakeVLLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(black_box(tiny, endpoint, **TRD).to_yaml())
    main(["doctor", str(path), "--json"])
    checks = {c["name"]: c for c in json.loads(capsys.readouterr().out)["checks"]}
    assert {n for n, c in checks.items() if "chat endpoint" in c["message"]} == {
        "teacher_itself", "alignment", "teacher_differs",
    }  # fmt: skip
    assert checks["models"]["status"] == "warning"
    assert checks["tokens"]["status"] == "ok"
    assert not [c for c in checks.values() if c["status"] == "fail"], checks


@pytest.mark.parametrize("probe", ["prefix-failure", "divergence", "local-correction", "meter"])
def test_probes_say_what_they_need(
    probe: str, tiny: Tiny, endpoint: FakeVLLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(black_box(tiny, endpoint, **TRD).to_yaml())
    assert main(["inspect", "--probe", probe, str(path)]) == 2
    assert "what the teacher would go on with" in capsys.readouterr().err
    assert not endpoint.requests


def test_a_run_is_inspected_and_reported(
    tiny: Tiny, endpoint: FakeVLLM, capsys: pytest.CaptureFixture[str]
) -> None:
    result = train(black_box(tiny, endpoint, **TRD, run__trajectories_every=1), quiet=True)
    assert main(["inspect", str(result.directory)]) == 0
    assert "student_" in capsys.readouterr().out
    assert main(["inspect", str(result.directory), "--colour", "reverse_kl"]) == 2
    assert main(["report", str(result.directory)]) == 0


@pytest.mark.parametrize("engine", ["chat", "vllm"])
def test_a_study_evaluates_the_untouched_student(engine: str, tmp_path: Path) -> None:
    method = SOUND["method"] if engine == "chat" else {"name": "opd", "support": "teacher_topk"}
    base = {"teacher": {**SOUND["teacher"], "engine": engine}, "method": method}
    path = tmp_path / "study.yaml"
    arms = {"untouched": "untouched", "teacher": "teacher", "trained": {}}
    path.write_text(yaml.safe_dump({"base": base, "arms": arms, "seeds": 1, "base_arm": "trained"}))
    study = load_study(path)
    assert arm_config(study, "untouched").teacher.engine == engine
    if engine == "chat":
        with pytest.raises(UserError, match="drop this arm"):
            arm_config(study, "teacher")
    else:
        assert arm_config(study, "teacher").student.model == "m"


@pytest.mark.parametrize(
    ("ending", "engine", "said"),
    [("<think>\n", "chat", True), ("<think>\n\n</think>\n\n", "chat", False), ("<think>\n", "hf", False)],
)
def test_answers_inside_of_open_thinking_are_warned_of(
    ending: str, engine: str, said: bool, tiny: Tiny
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}" + ending
    url = {"teacher__url": "http://localhost:1", "teacher__model": "m"} if engine == "chat" else {}
    config = tiny(**TRD, teacher__engine=engine, **url)
    warning = thinking_warning(config, Renderer(tokenizer, template="chat"))
    assert (warning is not None) == said
    if warning:
        assert "ends in <think>" in warning
        assert "data.enable_thinking: false" in warning
