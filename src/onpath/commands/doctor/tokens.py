"""Checks of tokenizers and prompts, which need no weights: ids, specials, template, room.

onpath renders every prompt once, with the student's tokenizer, and the teacher reads those ids: a teacher
whose own tokenizer would have written others reads prompts that it was never trained on.
"""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from onpath.commands.doctor.finding import Finding, skipped
from onpath.config.whole import Config
from onpath.data.load import some_of
from onpath.data.render import Renderer
from onpath.engines.models import check_vocabulary
from onpath.engines.remote.host import Nonsense
from onpath.records import Prompt
from onpath.run.parts import Parts
from onpath.system.errors import UserError
from onpath.system.text import shared_start

Tokenizer = PreTrainedTokenizerBase
_SENTENCE = "If 3 · (x − 1) = 12, then x = 5.\n\n\\boxed{5} — naïve? “yes” 你好 🙂"
"""Numbers, spaces, line ends and letters that tokenizers split in different ways."""


def texts_of(prompts: Sequence[Prompt]) -> list[str]:
    """What the two tokenizers are compared on."""
    some = some_of(prompts)
    return [*(p.question for p in some), *(p.solution for p in some if p.solution), _SENTENCE]


def same_tokens(student: Tokenizer, teacher: Tokenizer | None, texts: Sequence[str]) -> Finding:
    """One id, one token; and the same text gives the same ids.

    Args:
        teacher: None where the student is its own teacher, or the teacher a chat endpoint.
    """
    if teacher is None:
        message = "no other model reads the student's ids: one tokenizer"
        return Finding(name="tokens", status="ok", message=message)
    mine, theirs = student.get_vocab(), teacher.get_vocab()
    differing = sum(mine.get(t) != theirs.get(t) for t in {**mine, **theirs})
    split = [t for t in texts if _plain(student, t) != _plain(teacher, t)]
    values = {
        "student_tokens": len(mine),
        "teacher_tokens": len(theirs),
        "different_ids": differing,
        "texts": len(texts),
        "texts_split_differently": len(split),
    }
    advice = "choose a teacher of the student's model family, or convert one side's tokenizer"
    try:
        check_vocabulary(mine, theirs)
    except UserError as error:
        return Finding(name="tokens", status="fail", message=str(error), advice=advice, values=values)
    if split:
        message = (
            f"one vocabulary, but {len(split)} of {len(texts)} texts become other ids, {split[0][:40]!r} say"
        )
        return Finding(name="tokens", status="fail", message=message, advice=advice, values=values)
    message = f"{len(mine):,} tokens have the same ids on both sides; {len(texts)} texts, the same ids"
    return Finding(name="tokens", status="ok", message=message, values=values)


def served_tokens(parts: Parts) -> Finding:
    """A server makes the same ids of the same texts: its model was started with the student's tokenizer."""
    teachers = (parts.generators.teacher.of(name) for name in parts.models.teacher.names)
    servers = [e.server for e in (parts.generators.student, *teachers) if e.server is not None]
    if not servers:
        return skipped("server_tokens", "no vLLM server takes part")
    everything = [*parts.prompts.pool, *(p for prompts in parts.prompts.evals.values() for p in prompts)]
    texts = texts_of(everything)
    for server, host in [(one, host) for one in servers for host in one.hosts]:
        asked = [{"model": server.model, "prompt": t, "add_special_tokens": False} for t in texts]
        try:
            theirs = server.ask("/tokenize", asked, _tokens, at=host)
        except UserError as error:
            advice = "token ids go over the wire, so training does not need it, but nothing was compared"
            return Finding(name="server_tokens", status="warning", message=str(error), advice=advice)
        split = [
            t for t, ids in zip(texts, theirs, strict=True) if ids != _plain(parts.text.renderer.tokenizer, t)
        ]
        if split:
            message = f"{server.key}.url: {host.url} makes other ids of {len(split)} of {len(texts)} texts, "
            message += f"{split[0][:40]!r} say"
            advice = "start the server with the student's tokenizer: its log-probs would be of other tokens"
            return Finding(name="server_tokens", status="fail", message=message, advice=advice)
    where = " and ".join(f"{server.key}.url" for server in servers)
    return Finding(
        name="server_tokens", status="ok", message=f"{where}: {len(texts)} texts, the student's ids",
        values={"servers": len(servers), "texts": len(texts)},
    )  # fmt: skip


def _tokens(_: int, answer: Any) -> list[int]:
    ids = answer.get("tokens") if isinstance(answer, dict) else None
    if not isinstance(ids, list):
        raise Nonsense("no tokens at /tokenize")
    return ids


def specials(student: Tokenizer, teacher: Tokenizer | None) -> Finding:
    """BOS and EOS: the same ids, and put before and after a text by both sides or by none."""
    sides = {"student": student} | ({} if teacher is None else {"teacher": teacher})
    values: dict[str, Any] = {}
    for side, tokenizer in sides.items():
        before, after = _added(tokenizer)
        values[f"{side}_bos_id"], values[f"{side}_eos_id"] = tokenizer.bos_token_id, tokenizer.eos_token_id
        values[f"{side}_adds_before"], values[f"{side}_adds_after"] = before, after
    if student.eos_token_id is None:
        message = "the student's tokenizer names no EOS token"
        advice = "set eos_token in its tokenizer_config.json"
        return Finding(name="specials", status="fail", message=message, advice=advice, values=values)
    keys = ("adds_before", "adds_after", "bos_id", "eos_id")
    differing = [k for k in keys if teacher is not None and values[f"student_{k}"] != values[f"teacher_{k}"]]
    if differing:
        key = differing[0]
        message = (
            f"{key}: {values[f'student_{key}']} for the student's tokenizer, {values[f'teacher_{key}']} for "
            "the teacher's"
        )
        return Finding(
            name="specials",
            status="fail" if key == "adds_before" else "warning",
            message=message,
            advice="the teacher reads what the student's tokenizer writes: give both the same add_bos_token "
            "and special tokens",
            values=values,
        )
    before = values["student_adds_before"]
    message = f"EOS is id {student.eos_token_id}; a plain text is opened by {before or 'nothing'}"
    message += "" if teacher is None else "; the same on both sides"
    return Finding(name="specials", status="ok", message=message, values=values)


def template(
    config: Config, student: Renderer, teacher: Renderer | None, prompts: Sequence[Prompt]
) -> Finding:
    """Prompts open once, have no unknown token, open an answer, and are what the teacher's own template
    gives."""
    try:
        for prompt in prompts:
            student.check(prompt)
    except UserError as error:
        return Finding(name="template", status="fail", message=str(error))
    some = some_of(prompts)
    rendered = [student.ids(p) for p in some]
    tokenizer = student.tokenizer
    bos = tokenizer.bos_token_id
    theirs = None if teacher is None else [_rendering(teacher, p) for p in some]
    differing = 0 if theirs is None else sum(a != b for a, b in zip(rendered, theirs, strict=True))
    values = {
        "prompts": len(some),
        "chat": student.chat,
        "teacher_chat": None if teacher is None else teacher.chat,
        "opened_twice": sum(bos is not None and ids[:2] == (bos, bos) for ids in rendered),
        "with_unknown_tokens": sum(map(student.holds_unknown, rendered)),
        "teacher_renders_differently": differing,
    }

    def found(status: Any, message: str, advice: str = "") -> Finding:
        return Finding(name="template", status=status, message=message, advice=advice, values=values)

    if values["opened_twice"]:
        return found(
            "fail",
            f"{values['opened_twice']} of {len(some)} prompts begin with BOS twice",
            "take the BOS out of the chat template, or set add_bos_token false",
        )
    if differing and teacher is not None and teacher.chat == student.chat:
        return found(
            "fail",
            f"the teacher's own template renders {differing} of {len(some)} prompts differently "
            f"({_difference(student, rendered, theirs)})",
            "use the teacher's chat template in the student's tokenizer, or a teacher of the same family",
        )
    if values["with_unknown_tokens"]:
        message = f"{values['with_unknown_tokens']} of {len(some)} prompts hold the unknown token"
        return found("warning", message, "the tokenizer lacks these characters: is it this model's own?")
    if student.chat and not student.opens_answers():
        message = "the chat template opens no answer: it ignores add_generation_prompt"
        return found("warning", message, "mend the template, or the student goes on with the user's turn")
    if config.data.template == "plain" and tokenizer.chat_template:
        message = "data.template is plain, but the student's tokenizer has a chat template"
        return found("warning", message, "a chat model wants data.template: auto")
    if differing and teacher is not None:
        with_one, without = ("student", "teacher") if student.chat else ("teacher", "student")
        message = f"the {with_one}'s tokenizer has a chat template and the {without}'s none"
        return found("warning", message, "the teacher reads the student's rendering: see that it knows it")
    kind = "the chat template" if student.chat else "plain text"
    both = "" if teacher is None else ", as the teacher's own tokenizer would"
    return found("ok", f"{kind} renders {len(some)} prompts without an unknown token{both}")


def context(config: Config, renderer: Renderer, prompts: Sequence[Prompt], rooms: dict[str, int]) -> Finding:
    """Longest prompt and longest response fit student and teacher.

    Args:
        rooms: most positions of each model.
    """
    longest_texts = sorted(prompts, key=lambda p: len(p.question), reverse=True)[:500]
    longest = max(len(renderer.ids(p)) for p in longest_texts)
    asked = config.eval.sampling().max_new_tokens if config.data.eval else 0
    new = max(config.longest_generated[0], asked)
    if not rooms:
        return skipped("context", "the models' configs name no context length")
    side, room = min(rooms.items(), key=lambda item: item[1])
    values = {"longest_prompt_tokens": longest, "new_tokens": new, "room_tokens": room}
    if longest + new > room:
        message = f"a prompt of {longest} tokens and {new} new ones do not fit the {side}'s context of {room}"
        advice = "drop long prompts, or lower rollout.max_new_tokens and eval.max_new_tokens"
        return Finding(name="context", status="fail", message=message, advice=advice, values=values)
    message = f"longest prompt {longest} tokens + {new} new ones, in a context of {room} ({side})"
    return Finding(name="context", status="ok", message=message, values=values)


def _plain(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _added(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer puts before and after a plain text."""
    bare, whole = _plain(tokenizer, "1"), list(tokenizer("1")["input_ids"])
    starts = [i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare]
    at = starts[0] if starts else 0
    return whole[:at], whole[at + len(bare) :]


def _rendering(renderer: Renderer, prompt: Prompt) -> tuple[int, ...]:
    """Empty where the teacher's template cannot take the prompt at all."""
    try:
        return renderer.ids(prompt)
    except UserError:
        return ()


def _difference(
    renderer: Renderer, mine: Sequence[tuple[int, ...]], theirs: Sequence[tuple[int, ...]] | None
) -> str:
    """How the first differing prompt starts, or ends, on both sides."""
    a, b = next((a, b) for a, b in zip(mine, theirs or (), strict=True) if a != b)
    if not b:
        return "it refuses them"
    at = shared_start(a, b)
    ours, other = ("".join(renderer.tokens(x[at : at + 8])) for x in (a, b))
    return f"from token {at} on {ours!r} there, {other!r} from the teacher's"
