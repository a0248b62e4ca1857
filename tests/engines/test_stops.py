"""What ends a response: the union of both models' EOS, stop strings at the token that completes one."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from onpath.config.whole import Config
from onpath.data.render import Renderer
from onpath.engines.hf import HFEngine
from onpath.engines.stops import string_end
from onpath.records import Completion, Prompt, Sampling
from onpath.run.assemble import assemble
from onpath.run.log import read_lines
from onpath.system.errors import UserError
from onpath.training import train
from tests.conftest import make_model, make_tokenizer
from tests.engines.test_server import fake_of
from tests.engines.test_vllm_sleep import Recorder

Tiny = Callable[..., Config]
PROMPTS = [Prompt(id=str(i), text=f"{i}+{3 * i}=?") for i in range(16)]
SAMPLING = Sampling(max_new_tokens=24, seed=5)
TEACHER_END = 20


def ends_on(directory: Path, ids: list[int], to: Path) -> Path:
    """A copy of a model that declares these stops."""
    to.mkdir()
    for file in directory.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    config = GenerationConfig.from_pretrained(directory)
    config.eos_token_id = ids
    config.save_pretrained(to)
    return to


def contexts(renderer: Renderer) -> list[tuple[int, ...]]:
    return [renderer.ids(p) for p in PROMPTS]


def test_the_teachers_own_eos_ends_what_it_writes(
    tiny: Tiny, model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    teacher = ends_on(model_dirs["teacher"], [2, TEACHER_END], tmp_path / "teacher")
    parts = assemble(tiny(method__name="trd", teacher__model=str(teacher)))
    assert parts.stops.to_json() == {
        "student": [2], "teacher": [2, TEACHER_END], "asked": [], "strings": [], "ids": [2, TEACHER_END],
    }  # fmt: skip
    for engine in (parts.generators.teacher, parts.generators.student):
        done = engine.continue_from(contexts(parts.text.renderer), SAMPLING)
        assert any(c.ids[-1] == TEACHER_END for c in done)
        assert not any({2, TEACHER_END} & set(c.ids[:-1]) for c in done)
    (warning,) = (w for w in parts.warnings if "stop tokens" in w)
    assert "student: 2 '<eos>'; teacher: 2 '<eos>', 20 'a'" in warning


def test_ends_as_one_outcome(tiny: Tiny, model_dirs: dict[str, Path], tmp_path: Path) -> None:
    """The same first rollouts, and less divergence: which end it is no longer counts."""
    teacher = ends_on(model_dirs["teacher"], [2, TEACHER_END], tmp_path / "teacher")
    found = {}
    for ends in ("apart", "one"):
        config = tiny(
            teacher__model=str(teacher), method__ends=ends, optim__steps=1, data__eval={}, run__name=ends
        )
        (found[ends],) = read_lines(train(config, quiet=True).directory / "metrics.jsonl")
    assert found["one"]["mean_length"] == found["apart"]["mean_length"]
    assert 0 < found["one"]["reverse_kl_nats"] < found["apart"]["reverse_kl_nats"] - 1e-3
    assert found["one"]["loss"] == pytest.approx(found["one"]["reverse_kl_nats"], rel=1e-5)
    for options, words in (
        ({"method__name": "topd"}, "ends: one is not for guidance"),
        ({"method__divergence": "cross_entropy"}, "cross_entropy compares none"),
        ({"teacher__engine": "vllm", "teacher__url": "http://x"}, "use method.ends: apart"),
    ):
        with pytest.raises(UserError, match=words):
            tiny(method__ends="one", **options)


def test_models_that_end_alike_are_not_warned_of(tiny: Tiny) -> None:
    parts = assemble(tiny(data__eval={}))
    assert parts.stops.ids == parts.stops.student == parts.stops.teacher == {2}
    assert parts.warnings == ()


def test_the_saved_model_and_the_log_know_the_stops(
    tiny: Tiny, model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    teacher = ends_on(model_dirs["teacher"], [2, TEACHER_END], tmp_path / "teacher")
    result = train(tiny(teacher__model=str(teacher), optim__steps=1), quiet=True)
    saved = GenerationConfig.from_pretrained(result.directory / "model")
    assert saved.eos_token_id == [2, TEACHER_END]
    log = json.loads((result.directory / "environment.json").read_text())
    assert (log["stops"]["student"], log["stops"]["teacher"]) == ([2], [2, TEACHER_END])


def engine_with(tokenizer: PreTrainedTokenizerFast, strings: Sequence[str]) -> HFEngine:
    return HFEngine(make_model(0), Renderer(tokenizer), stop_ids=frozenset({2}), stop_strings=strings)


def cut_by_hand(free: Completion, strings: Sequence[str], renderer: Renderer) -> tuple[tuple[int, ...], str]:
    """Token after token, as a reader would."""
    for n in range(1, len(free.ids) + 1):
        if any(s in renderer.text(free.ids[:n]) for s in strings):
            return free.ids[:n], "stop"
    return free.ids, free.finish_reason


@pytest.mark.parametrize("batch_tokens", [64, 4096])
def test_a_stop_string_ends_a_response_where_its_text_shows_it(
    tokenizer: PreTrainedTokenizerFast, batch_tokens: int
) -> None:
    free = engine_with(tokenizer, ()).continue_from(contexts(Renderer(tokenizer)), SAMPLING)
    strings = [Renderer(tokenizer).text(free[0].ids[3:5]), Renderer(tokenizer).text(free[5].ids[6:8])]
    engine = engine_with(tokenizer, strings)
    engine.batch_tokens = batch_tokens
    done = engine.continue_from(contexts(engine.renderer), SAMPLING)
    expected = [cut_by_hand(c, strings, engine.renderer) for c in free]
    assert [(c.ids, c.finish_reason) for c in done] == expected
    assert sum(len(c.ids) < len(f.ids) for c, f in zip(done, free, strict=True)) >= 2
    for c, f in zip(done, free, strict=True):
        assert c.logprobs == pytest.approx(f.logprobs[: len(c.ids)], abs=1e-4)


def test_a_token_that_completes_the_string_stays_whole() -> None:
    words = {1: "ab", 2: "cST", 3: "OPd", 4: "e"}

    def text(ids: Sequence[int]) -> str:
        return "".join(words[i] for i in ids)

    assert string_end((1, 2, 3, 4), ("STOP",), text) == 3
    assert string_end((1, 2, 4), ("STOP",), text) is None
    assert string_end((), ("STOP",), text) is None
    assert string_end((1, 2, 3, 4), ("e", "b"), text) == 1


def test_a_server_stops_at_the_same_tokens(model_dirs: dict[str, Path], tiny: Tiny) -> None:
    fake = fake_of(model_dirs["student"])
    try:
        config = {"rollout__stop": ["1", "x"]}
        served = assemble(tiny(rollout__engine="vllm", rollout__url=fake.url, **config)).generators.student
        done = served.continue_from(contexts(served.renderer), SAMPLING)
    finally:
        fake.stop()
    assert fake.requests[-1]["stop"] == ["1", "x"]
    assert fake.requests[-1]["stop_token_ids"] == [2]
    assert any(c.finish_reason == "stop" and c.ids[-1] != 2 for c in done)


def test_vllm_in_this_process_is_given_the_strings(
    model_dirs: dict[str, Path], tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[SimpleNamespace] = []

    class Stopping(Recorder):
        def generate(self, prompts: Sequence[object], params: Sequence[SimpleNamespace], **_: object) -> list:  # type: ignore[type-arg]
            asked.extend(params)
            self.engine.stop_strings = tuple(params[0].stop)
            return super().generate(prompts, params, use_tqdm=False)

    fake = fake_of(model_dirs["student"])
    fake.stop()
    started: list[dict[str, object]] = []
    module = ModuleType("vllm")
    monkeypatch.setattr(Stopping, "engine", fake.engine, raising=False)
    monkeypatch.setattr(Stopping, "calls", [], raising=False)
    monkeypatch.setattr(
        module, "LLM", lambda model, **settings: started.append(settings) or Stopping(), raising=False
    )
    monkeypatch.setattr(module, "SamplingParams", SimpleNamespace, raising=False)
    monkeypatch.setitem(sys.modules, "vllm", module)
    engine = assemble(tiny(rollout__engine="vllm", rollout__stop=["1", "x"])).generators.student
    done = engine.continue_from(contexts(engine.renderer), SAMPLING)
    assert started[0]["skip_tokenizer_init"] is False
    assert (asked[0].stop, asked[0].detokenize) == (["1", "x"], True)
    assert any(c.finish_reason == "stop" and c.ids[-1] != 2 for c in done)


def test_the_spelling_of_a_special_token_is_that_token(tiny: Tiny) -> None:
    stops = assemble(tiny(rollout__stop=["<sol>", "Q:"], rollout__stop_ids=[30])).stops
    assert (stops.asked, stops.strings, stops.ids) == ({3, 30}, ("Q:",), {2, 3, 30})


def test_stops_that_cannot_be(tiny: Tiny) -> None:
    with pytest.raises(UserError, match=r"rollout.stop: an empty text would end every response at once"):
        tiny(rollout__stop=[""])
    with pytest.raises(UserError, match=r"rollout.stop_ids: token ids are 0 or above, not -1"):
        tiny(rollout__stop_ids=[-1])
    with pytest.raises(UserError, match=r"rollout.stop_ids: 999 is no token; the vocabulary has \d+"):
        assemble(tiny(rollout__stop_ids=[999]))


def test_a_run_with_stop_strings(tiny: Tiny) -> None:
    result = train(tiny(rollout__stop="1", optim__steps=2, eval__start=True), quiet=True)
    assert result.directory.is_dir()


def test_a_base_model_uses_a_template_of_the_users(
    tiny: Tiny, model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    bare = ends_on(model_dirs["student"], [2], tmp_path / "bare")
    for file in ("chat_template.jinja",):
        (bare / file).unlink(missing_ok=True)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(bare)
    template = tmp_path / "mine.jinja"
    template.write_text("{% for m in messages %}q: {{ m['content'] }}{% endfor %} a: ")
    config = tiny(student__model=str(bare), data__chat_template=str(template), optim__steps=1)
    parts = assemble(config)
    assert parts.text.renderer.chat
    assert "".join(parts.text.renderer.tokens(parts.text.renderer.ids(PROMPTS[1]))) == "q: 1+3=? a: "
    result = train(config, quiet=True)
    assert AutoTokenizer.from_pretrained(result.directory / "model").chat_template == template.read_text()


def test_templates_that_cannot_be(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.chat_template: .*absent.jinja: cannot be read: No such file"):
        assemble(tiny(data__chat_template=str(tmp_path / "absent.jinja")))
    with pytest.raises(UserError, match="chat_template is for chat prompts, but template is plain"):
        tiny(data__chat_template="a.jinja", data__template="plain")
