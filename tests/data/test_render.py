"""Rendering: golden text and ids for chat and plain prompts, and templates with slots."""

import copy

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from onpath.data.render import Renderer, fill, with_question
from onpath.data.thinking import answer_part
from onpath.engines.models import check_vocabulary
from onpath.records import Prompt
from onpath.system.errors import UserError

# Ids of conftest's tokenizer: <pad> 0, <bos> 1, <eos> 2, <sol> 3, digits from 4, then + - = ? ; space letters
ONE, PLUS, TWO, ASK = 5, 14, 6, 17
MESSAGES = ({"role": "system", "content": "a"}, {"role": "user", "content": "1+2?"})
A = 20


def test_chat_prompts_end_with_the_generation_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    renderer = Renderer(tokenizer)
    assert renderer.ids(Prompt(id="0", text="1+2?")) == (1, ONE, PLUS, TWO, ASK, 3)
    assert renderer.ids(Prompt(id="0", messages=MESSAGES)) == (1, A, ONE, PLUS, TWO, ASK, 3)


def test_a_system_message_goes_where_none_is(tokenizer: PreTrainedTokenizerFast) -> None:
    renderer = Renderer(tokenizer, system="b")
    assert renderer.ids(Prompt(id="0", text="1?")) == (1, A + 1, ONE, ASK, 3)
    assert renderer.ids(Prompt(id="0", messages=MESSAGES))[1] == A, "the prompt's own system message stays"


def test_plain_prompts_are_the_text_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    renderer = Renderer(tokenizer, template="plain")
    assert renderer.ids(Prompt(id="0", text="1+2?")) == (ONE, PLUS, TWO, ASK)
    with pytest.raises(UserError, match="list of messages"):
        renderer.ids(Prompt(id="0", messages=MESSAGES))
    with pytest.raises(UserError, match="no token to continue from"):
        renderer.ids(Prompt(id="0", text=""))


def test_chat_without_a_template_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>")
    with pytest.raises(UserError, match="no chat template"):
        Renderer(bare, template="chat")
    assert not Renderer(bare).chat


def test_text_leaves_special_tokens_out_and_tokens_keep_them(tokenizer: PreTrainedTokenizerFast) -> None:
    renderer = Renderer(tokenizer)
    assert renderer.text((ONE, PLUS, TWO, 2)) == "1+2"
    assert renderer.tokens((ONE, 2)) == ["1", "<eos>"]


@pytest.fixture
def thinker(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Its tags of thinking are special tokens."""
    copy = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), eos_token="<eos>"
    )
    copy.chat_template = tokenizer.chat_template
    copy.add_special_tokens({"additional_special_tokens": ["<think>", "</think>", "<other>"]})
    return copy


def test_graders_see_tags_of_thinking_that_are_special_tokens(thinker: PreTrainedTokenizerFast) -> None:
    opening, closing, other = (thinker.convert_tokens_to_ids(t) for t in ("<think>", "</think>", "<other>"))
    renderer = Renderer(thinker)
    ids = (opening, ONE, PLUS, closing, other, TWO, 2)
    assert renderer.text(ids) == "1+2"
    assert renderer.graded(ids) == "<think>1+</think>2"
    assert renderer.graded((ONE, PLUS, TWO, 2)) == "1+2"
    assert answer_part(renderer.graded((opening, ONE, PLUS))) == ""


def test_thinking_that_the_template_opens_is_seen_too(thinker: PreTrainedTokenizerFast) -> None:
    thinker.chat_template = (thinker.chat_template or "") + "<think>\n"
    assert Renderer(thinker).graded((ONE, TWO)) == "<think>12"
    assert Renderer(thinker, template="plain").graded((ONE, TWO)) == "12"


def test_the_question_is_the_last_user_message() -> None:
    prompt = with_question(Prompt(id="0", messages=MESSAGES, answer="3"), "x")
    assert prompt.question == "x"
    assert prompt.messages is not None
    assert prompt.messages[0] == MESSAGES[0]
    assert prompt.answer == "3"
    assert with_question(Prompt(id="0", text="y"), "x").text == "x"


def test_slots_are_filled_and_checked() -> None:
    assert fill("{problem} so {attempt}", problem="{a}", attempt="}{") == "{a} so }{"
    with pytest.raises(UserError, match=r"exactly the slots \{attempt\}, \{problem\}; it has \{problem\}"):
        fill("{problem}", problem="a", attempt="b")
    with pytest.raises(UserError, match="it has none"):
        fill("no slots", problem="a")


def test_vocabularies_are_compared_by_token_and_id() -> None:
    check_vocabulary({"a": 0, "b": 1}, {"b": 1, "a": 0})
    with pytest.raises(UserError, match="2 tokens differ: 'a' is 0 for the student, 1 for the teacher"):
        check_vocabulary({"a": 0, "b": 1}, {"a": 1, "b": 0})
    with pytest.raises(UserError, match="'c' is absent for the student, 2 for the teacher"):
        check_vocabulary({"a": 0, "b": 1}, {"a": 0, "b": 1, "c": 2})


def test_what_a_template_does_not_hear_is_found(tokenizer: PreTrainedTokenizerFast) -> None:
    """Neither a system message that it leaves out nor a switch that it does not know."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    deaf = Renderer(tokenizer, system="1 + 1", template_options={"enable_thinking": True})
    assert deaf.unheard() == ["system", "enable_thinking"]
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if enable_thinking %}={% endif %}"
    )
    for thinking in (True, False):
        heard = Renderer(tokenizer, system="1 + 1", template_options={"enable_thinking": thinking})
        assert heard.unheard() == []
    assert Renderer(tokenizer).unheard() == []
    own = "{% if messages[0].role != 'system' %}1 + 1{% endif %}"
    tokenizer.chat_template = own + "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert Renderer(tokenizer, system="1 + 1").unheard() == [], "the template's own, said aloud"
