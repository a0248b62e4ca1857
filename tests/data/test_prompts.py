"""Prompts carry what they should, and nothing else: rendered once, no clock, no tools dropped."""

import copy
import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from onpath.config.whole import Config
from onpath.data.load import load_prompts
from onpath.data.render import Renderer
from onpath.data.tasks import correction_ids
from onpath.data.templates import EPISTEMIC_WORDS
from onpath.records import Prompt
from onpath.run.assemble import assemble
from onpath.run.log import read_lines
from onpath.system.errors import UserError
from onpath.training import train
from tests.conftest import TEMPLATE, make_tokenizer

Tiny = Callable[..., Config]
INST = "{{ bos_token }}{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"
CLOCK = "<bos>{{ strftime_now('%H%M%S') }};{% for m in messages %}{{ m['content'] }}{% endfor %}<sol>"


def with_template(template: str) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "text", "mark"),
    [
        (TEMPLATE, "<bos>1+2?<sol>", "<bos>"),
        (TEMPLATE, "1+2?<sol>", "<sol>"),
        (INST, "<bos>[INST] 1+2? [/INST]", "<bos>"),
        (INST, "[INST] 1+2? [/INST]", "[INST]"),
    ],
)
def test_prompts_that_are_rendered_already_are_refused(template: str, text: str, mark: str) -> None:
    renderer = Renderer(with_template(template))
    for prompt in (Prompt(id="7", text=text), Prompt(id="7", messages=({"role": "user", "content": text},))):
        with pytest.raises(UserError, match="prompt '7' is rendered already") as error:
            renderer.check(prompt)
        assert repr(mark) in str(error.value)
        assert "data.template: plain" in str(error.value)


@pytest.mark.parametrize("text", ["1+2?", "what does [INST] mean?", "a <eos> b", "[/INST] [INST]"])
def test_prompts_that_only_speak_of_marks_are_not(text: str) -> None:
    for template in (TEMPLATE, INST):
        Renderer(with_template(template)).check(Prompt(id="0", text=text))


def test_rendered_prompts_are_plain_text_with_one_bos() -> None:
    core = make_tokenizer().backend_tokenizer.to_str()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(core), bos_token="<bos>", eos_token="<eos>", add_bos_token=True
    )
    renderer = Renderer(tokenizer, template="plain")
    renderer.check(Prompt(id="0", text="<bos>1+2?<sol>"))
    bare, opened = (renderer.ids(Prompt(id="0", text=t)) for t in ("1+2?", "<bos>1+2?"))
    assert opened.count(1) == 1
    assert opened[-4:] == bare[-4:]


def test_a_run_and_the_doctor_refuse_rendered_prompts(tiny: Tiny, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": f"<bos>{i}+1=?<sol>", "answer": "1"}) + "\n" for i in range(9))
    )
    config = tiny(data__train=str(rows), data__eval={}, method__name="opd")
    with pytest.raises(UserError, match=r"prompt '0' \(.*rows\.jsonl, line 1\) is rendered already"):
        assemble(config)
    from onpath.commands.doctor.command import diagnose

    found = {f.name: f for f in diagnose(config)}
    assert found["template"].status == "fail"
    assert "is rendered already" in found["template"].message
    assemble(tiny(data__train=str(rows), data__eval={}, data__template="plain"))


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Splits a leading space mark from most words, as Llama 2 and Mistral do."""
    tokens = ["<unk>", "▁", "▁Wait", "Wait", "Hmm", "▁Hmm", "Oh", *"abcdefghijklmnopqrstuvwxyz"]
    tokens += [w for w in EPISTEMIC_WORDS if w not in tokens]
    core = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="never"), pre_tokenizers.Split("▁", "isolated")]
    )
    core.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


def test_a_bare_space_mark_opens_no_correction() -> None:
    tokenizer = sentencepiece_like()
    assert tokenizer(" Wait", add_special_tokens=False)["input_ids"][0] == 1, "the case of Llama 2"
    ids = correction_ids(None, "a.jsonl", tokenizer)
    assert 1 not in ids
    assert tokenizer.convert_tokens_to_ids("Wait") in ids
    assert len(ids) == len(EPISTEMIC_WORDS)
    assert correction_ids(["▁", " "], "a.jsonl", tokenizer) == ()


def test_punctuation_is_an_onset_only_of_itself(tokenizer: PreTrainedTokenizerFast) -> None:
    dot, wait = (tokenizer.convert_tokens_to_ids(t) for t in (".", "w"))
    assert correction_ids([".wait"], "a.jsonl", tokenizer) == (wait,)
    assert correction_ids(["."], "a.jsonl", tokenizer) == (dot,)


def test_a_template_that_prints_the_clock_is_told_one_moment() -> None:
    moment = datetime(2026, 1, 31, 12, 34, 56)
    renderer = Renderer(with_template(CLOCK), clock=moment)
    shown = "".join(renderer.tokens(renderer.ids(Prompt(id="0", text="1?"))))
    assert shown == "<bos>123456;1?<sol>"
    assert copy.deepcopy(renderer).ids(Prompt(id="0", text="1?")) == renderer.ids(Prompt(id="0", text="1?"))
    assert Renderer(with_template(TEMPLATE)).clock is None


def test_prompts_do_not_change_from_start_to_resume(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = tmp_path / "clock.jinja"
    template.write_text(CLOCK)
    options = {"data__chat_template": str(template), "optim__steps": 4, "run__save_every": 2}
    train(tiny(run__name="whole", **options))
    assert "the chat template prints the clock; every prompt of this run says" in capsys.readouterr().err
    (kept,) = tmp_path.glob("runs/whole/clock.txt")
    later = tiny(run__name="later", **options)
    other = tmp_path / "runs" / "later"
    other.mkdir()
    (other / "clock.txt").write_text("2001-02-03T04:05:06\n")
    assert assemble(later).text.renderer.clock == datetime(2001, 2, 3, 4, 5, 6)
    assert datetime.fromisoformat(kept.read_text().strip()) != datetime(2001, 2, 3, 4, 5, 6)
    (other / "clock.txt").write_text(kept.read_text())
    train(later, quiet=True)
    assert (other / "clock.txt").read_text() == kept.read_text()
    losses = [[r["loss"] for r in read_lines(d / "metrics.jsonl")] for d in (kept.parent, other)]
    assert losses[0] == losses[1]
    (other / "clock.txt").write_text("noon")
    with pytest.raises(UserError, match=r"clock.txt is not a moment such as"):
        assemble(later)


def test_a_template_with_dice_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    template = tmp_path / "dice.jinja"
    template.write_text("<bos>{{ range(10 ** 5) | random }}{{ messages[0]['content'] }}<sol>")
    with pytest.raises(UserError, match="renders the same prompt differently each time"):
        assemble(tiny(data__chat_template=str(template)))


def test_tools_are_not_dropped_silently(tmp_path: Path) -> None:
    path = tmp_path / "tools.jsonl"
    path.write_text(json.dumps({"prompt": "1?", "tools": [{"name": "add"}]}) + "\n")
    with pytest.raises(UserError, match=r"tools.jsonl, line 1: it has 'tools', which onpath does not render"):
        load_prompts(str(path))
    nothing = {
        "tools": None,
        "images": [],
        "image": {"bytes": None, "path": None},
        "chat_template_kwargs": {},
    }
    path.write_text(json.dumps({"prompt": "1?", **nothing}) + "\n")
    assert len(load_prompts(str(path)).prompts) == 1, "a table has a column for every row"


def test_a_conversation_that_is_named_is_the_prompt(tmp_path: Path) -> None:
    """Whatever else the row calls a prompt."""
    path = tmp_path / "rows.jsonl"
    row = {"prompt": "a system text", "conv": [{"role": "user", "content": "7 + 5?"}]}
    path.write_text(json.dumps(row) + "\n")
    (named,) = load_prompts(str(path), columns={"messages": "conv"}).prompts
    assert named.question == "7 + 5?"
    (plain,) = load_prompts(str(path)).prompts
    assert plain.question == "a system text"
