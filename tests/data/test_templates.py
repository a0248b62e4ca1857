"""Chat templates of others: programs that may never end, take all memory, or fail."""

import time

import pytest
from transformers import AddedToken

from onpath.data.render import Renderer
from onpath.records import Prompt
from onpath.system.errors import UserError
from onpath.system.limits import excess
from tests.conftest import make_tokenizer
from tests.faults.templates import ENDLESS, FAILING


@pytest.mark.parametrize("template", ENDLESS)
def test_templates_that_take_too_much(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onpath.data.render._SECONDS", 0.4)
    tokenizer, begun = make_tokenizer(), time.monotonic()
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=r"the chat template (takes more than|refuses it)"):
        Renderer(tokenizer).ids(Prompt(id="0", text="7"))
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("template", FAILING)
def test_templates_that_fail(template: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    renderer = Renderer(tokenizer)
    with pytest.raises(UserError, match="prompt '0': the chat template refuses it") as caught:
        renderer.ids(Prompt(id="0", text="7"))
    assert len(str(caught.value)) < 400
    assert not set("\n\x1b") & set(str(caught.value))
    assert renderer.turn_end() == []
    renderer.check(Prompt(id="0", text="7"))


def test_what_is_tried_leaves_nothing_behind() -> None:
    seen: list[int] = []
    assert excess(lambda: seen.append(1), seconds=5, memory=2**20) == ""
    assert excess(lambda: 1 / 0, seconds=5, memory=2**20) == ""
    # More than this process can have lying free from earlier tests.
    assert excess(lambda: bytearray(2**34), seconds=5, memory=2**20) == "takes more than 1 MiB"
    assert excess(lambda: time.sleep(60), seconds=0.1, memory=2**20) == "takes more than 0.1 s"
    assert seen == []


def test_the_end_of_an_answer_is_found_whoever_names_it() -> None:
    """A special token that the tokenizer's lists do not name, as those of many hubs' models are."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}<|end|>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<sol>{% endif %}"
    ).replace("{{ m['content'] }}", "{% if m['role'] == 'assistant' %}<sol>{% endif %}{{ m['content'] }}")
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert end not in tokenizer.all_special_ids
    assert Renderer(tokenizer).turn_end() == [end]
