"""TRD: what the student is trained on, token by token; its options; its gate; what it refuses."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

from onpath import config as configuration
from onpath.commands.probes.prefix_failure import run_probe
from onpath.config.idle import idle_options
from onpath.config.methods.topd import TOPDOptions
from onpath.config.methods.trd import TRDOptions
from onpath.config.whole import Config
from onpath.data.batch import collate
from onpath.data.tasks import Task
from onpath.engines.base import Engine
from onpath.grade.base import Grader, Verdict
from onpath.losses.interface import TeacherHidden
from onpath.methods import make_method
from onpath.methods.base import Prepared
from onpath.methods.tools import Tools
from onpath.methods.trd.compare import edit_distance, is_foreign
from onpath.methods.trd.edits import Rewrite
from onpath.methods.trd.gate import Refinement, refusal
from onpath.methods.trd.method import TRD
from onpath.methods.trd.rewriter import Rewriter
from onpath.records import Completion, Prompt, Rollout, Sampling
from onpath.run.assemble import assemble
from onpath.run.parts import Parts
from onpath.system.errors import UserError
from onpath.training import sample, train
from tests.conftest import CHARACTERS, make_tokenizer

TEMPLATE = "{problem} try:{attempt} redo:"
SELF_TEMPLATE = "{problem} ref:{solution} try:{attempt} redo:"


def ids(text: str) -> tuple[int, ...]:
    """`<bos>`, `<sol>`, `<eos>` and characters → ids, without the tokenizer."""
    found = []
    while text:
        token = next(t for t in CHARACTERS if text.startswith(t))
        found.append(CHARACTERS.index(token))
        text = text[len(token) :]
    return tuple(found)


class Scripted(Engine):
    """An engine that writes what it was told to, in turn, and notes what it was asked."""

    def __init__(self, *texts: str) -> None:
        self.texts, self.asked, self.keys, self.sampling = list(texts), [], [], None

    def continue_from(
        self, prefixes: Sequence[Sequence[int]], sampling: Sampling, *, keys: Sequence[str] | None = None
    ) -> list[Completion]:
        self.asked += [tuple(p) for p in prefixes]
        self.keys += list(keys or ())
        self.sampling = sampling
        done = []
        for i in range(len(prefixes)):
            tokens = ids(self.texts[i % len(self.texts)])
            done.append(
                Completion(
                    ids=tokens,
                    logprobs=(-0.1,) * len(tokens),
                    finish_reason="stop" if tokens[-1:] == ids("<eos>") else "length",
                )
            )
        return done

    def score(
        self, contexts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> list[tuple[float, ...]]:
        return [tuple(-float(i) for i in r) for r in responses]


class Threes(Task):
    """Whose checker of steps takes the first 3 for an error."""

    name, splits, checks_steps = "threes", {}, True

    def first_error(self, problem: str, response: str) -> int | None:
        return response.find("3") if "3" in response else None


class LastTwo(Grader):
    """Right if the text ends with the answer."""

    name = "last two"

    def grade_many(self, pairs: Any) -> list[Verdict]:
        return [Verdict(correct=t.endswith(a), extracted=t) for t, a in pairs]


def attempt(
    text: str, *, question: str = "7+5=?", answer: str | None = "12", solution: str = "7 plus 5"
) -> Rollout:
    tokens = ids(text)
    return Rollout(
        prompt=Prompt(id="p", text=question, answer=answer, solution=solution),
        ids=tokens,
        logprobs=(-0.5,) * len(tokens),
        finish_reason="stop" if tokens[-1:] == ids("<eos>") else "length",
        policy_version=0,
        sampling=Sampling(max_new_tokens=12),
        context=ids(f"<bos>{question}<sol>"),
    )


@pytest.fixture
def parts(tiny: Callable[..., Config]) -> Parts:
    return assemble(tiny(method__name="trd", method__template=TEMPLATE))


def with_writer(parts: Parts, writer: Engine, **text: Any) -> Tools:
    """The run's tools with another engine in the teacher's name, and a grader that looks at ends of texts."""
    return replace(
        parts.tools,
        generators=replace(parts.generators, teacher=writer),
        text=replace(parts.text, grader=LastTwo(), **text),
    )


def scripted(parts: Parts, *texts: str, **options: Any) -> tuple[TRD, Scripted]:
    """TRD whose rewriter writes the texts, and whose grader looks at the ends of texts."""
    writer = Scripted(*texts)
    tools = with_writer(parts, writer)
    method = make_method(TRDOptions(**{"template": TEMPLATE, "diagnose_every": 0, **options}), tools)
    assert isinstance(method, TRD)
    return method, writer


def test_worked_example_with_a_teacher(parts: Parts) -> None:
    method, writer = scripted(parts, "7+5 is 12<eos>")
    (t,) = method.prepare([attempt("so 13<eos>")], step=3).trajectories
    assert t.student_context == ids("<bos>7+5=?<sol>")
    assert t.teacher_context == ids("<bos>7+5=? try:so 13 redo:<sol>")
    assert writer.asked == [t.teacher_context], "the ids that score z are those that wrote it"
    assert t.response == ids("7+5 is 12<eos>"), "sampled ids, EOS kept"
    assert t.token_weights == (1.0,) * 10, "every token counts, EOS too"
    assert writer.sampling == Sampling(temperature=0.6, max_new_tokens=12)
    batch = collate([t])
    assert batch.student_at_N.tolist() == list(range(6, 16)), (
        "the last of 7 context tokens predicts the first"
    )
    assert batch.teacher_at_N.tolist() == list(range(22, 32)), "of 23 here"
    assert batch.token_N.tolist() == list(ids("7+5 is 12<eos>"))
    assert t.edit.kind == "rewrite"
    assert t.edit.detail == {
        "writer": "teacher",
        "attempt_right": False,
        "right": True,
        "finished": True,
        "edit_distance": 7,
        "length_ratio": 10 / 6,
        "empty": False,
        "identical": False,
        "foreign": False,
        "teacher_tokens": 10,
    }


def test_worked_example_with_oneself_and_the_reference(parts: Parts) -> None:
    method, writer = scripted(parts, "12<eos>", teacher="self", template=SELF_TEMPLATE)
    (t,) = method.prepare([attempt("13<eos>")], step=0).trajectories
    assert t.student_context == ids("<bos>7+5=?<sol>")
    assert t.teacher_context == ids("<bos>7+5=? ref:7 plus 5 try:13 redo:<sol>")
    assert writer.asked == [t.teacher_context]
    assert t.response == ids("12<eos>")
    batch = collate([t])
    assert batch.student_at_N.tolist() == [6, 7, 8]
    assert batch.teacher_at_N.tolist() == [32, 33, 34]
    assert t.edit.detail["writer"] == "self (base)"


GYM: dict[str, Any] = {"student__model": "gym:student", "teacher__model": "gym:teacher", "data__limit": 16}


LONGER = {"rollout__max_new_tokens": 96, "method__rewrite_max_new_tokens": 96}


def kept_of(tiny: Callable[..., Config], **options: Any) -> tuple[Parts, Prepared]:
    """A step's rewrites by a teacher in this process."""
    given = {"method__name": "trd", "method__template": TEMPLATE, "method__diagnose_every": 0}
    parts = assemble(tiny(**{**given, **options}))
    rollouts = parts.generators.student.generate(parts.prompts.pool[:16], parts.sampling)
    rollouts = [replace(r, place=i) for i, r in enumerate(rollouts)]
    return parts, parts.method.prepare(rollouts, step=0)


@pytest.mark.parametrize(
    "options", [{}, {"method__best_of": 2}, {"method__teacher": "self", "method__template": SELF_TEMPLATE}]
)
def test_the_teacher_scores_what_it_read_while_it_wrote(
    options: dict[str, Any], tiny: Callable[..., Config]
) -> None:
    parts, prepared = kept_of(tiny, **options)
    for t in prepared.trajectories:
        batch = collate([t], device=parts.models.device)
        known, anew = prepared.kept.teacher_hidden(batch), parts.models.teacher.scores(batch)
        assert known is not None
        assert isinstance(anew, TeacherHidden)
        torch.testing.assert_close(known, anew.hidden, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"method__scoring": "plain"},  # in another context
        {"method__paper_compat": True},
        {"optim__bf16": True},
        {**GYM, "data__train": "gym:train?lost=1"},  # two models score
    ],
)
def test_states_that_are_not_those_that_score_are_not_kept(
    options: dict[str, Any], tiny: Callable[..., Config]
) -> None:
    _, prepared = kept_of(tiny, **options)
    assert prepared.trajectories
    assert not prepared.kept.teacher


def test_of_a_minimal_edit_only_whole_rewrites_are_kept(tiny: Callable[..., Config]) -> None:
    """Of the others the beginning was read before."""
    _, prepared = kept_of(tiny, **GYM, data__train="gym:train", method__minimal_edit=True, **LONGER)
    whole = {t.response for t in prepared.trajectories if t.edit.detail["kept_tokens"] == 0}
    assert {response for _, _, response in prepared.kept.teacher} <= whole
    assert len(whole) < len(prepared.trajectories)


def bigram(rows: dict[str, dict[str, float]]) -> Qwen3ForCausalLM:
    """A model without layers: what follows a token is as the rows say, whatever stands before it."""
    size = len(CHARACTERS)
    settings = {"hidden_size": size, "intermediate_size": 4, "num_attention_heads": 1, "head_dim": 4}
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=size, num_hidden_layers=0, num_key_value_heads=1, tie_word_embeddings=False,
            max_position_embeddings=256, rms_norm_eps=1e-12, eos_token_id=2, pad_token_id=0, **settings,
        )
    )  # fmt: skip
    model.generation_config.eos_token_id = 2
    logits_VV = torch.full((size, size), -40.0)  # [token before, token]
    for before, row in rows.items():
        for token, p in row.items():
            logits_VV[CHARACTERS.index(before), CHARACTERS.index(token)] = log(p)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(torch.eye(size))
        model.get_output_embeddings().weight.copy_(logits_VV.T / size**0.5)  # the norm makes √V of a 1
    return model.eval()


@pytest.mark.parametrize("scoring", ["rewrite", "plain"])
def test_paper_compat_is_plain_text_on_both_sides(scoring: str, parts: Parts) -> None:
    """With a line break before z, which is written after the template all the same."""
    method, writer = scripted(parts, "7+5 is 12<eos>", paper_compat=True, scoring=scoring)
    method.bare.tokenizer = make_tokenizer([*CHARACTERS, "\n"])
    (t,) = method.prepare([attempt("so 13<eos>")], step=0).trajectories
    line_break = (len(CHARACTERS),)
    plain = ids("7+5=?") + line_break
    assert t.student_context == plain
    assert t.teacher_context == (ids("7+5=? try:so 13 redo:") + line_break if scoring == "rewrite" else plain)
    assert writer.asked == [ids("<bos>7+5=? try:so 13 redo:<sol>")]
    assert t.response == ids("7+5 is 12")


def test_paper_compat_takes_out_stop_tokens_alone(parts: Parts) -> None:
    """Not the text that completes a stop string, and in an attempt that is left alone too."""
    method, _ = scripted(parts, "12<eos>", paper_compat=True, refine="wrong_only")
    rewrites = method.rewrite([attempt("so 13<eos>"), attempt("so 12<eos>")], when="x")
    assert [(w.kind, w.finished) for w in rewrites] == [("rewrite", True), ("none", True)]
    assert [method.trajectory(w).response for w in rewrites] == [ids("12"), ids("so 12")]
    by_string = [replace(w, ids=w.ids[:-1]) for w in rewrites]
    assert [method.trajectory(w).response for w in by_string] == [ids("12"), ids("so 12")]


def test_loss_of_two_tokens_by_hand(tiny: Callable[..., Config], tmp_path: Path) -> None:
    student = {"<sol>": {"a": 0.5, "b": 0.5}, "a": {"<eos>": 0.3, "a": 0.7}, "b": {"<eos>": 1.0}}
    teacher = {"<sol>": {"a": 0.6, "b": 0.4}, "a": {"<eos>": 0.9, "a": 0.1}, "b": {"<eos>": 1.0}}
    for name, rows in (("s", student), ("t", teacher)):
        bigram(rows).save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    options = {"method__name": "trd", "method__template": TEMPLATE, "method__rewrite_temperature": 0.0}
    models = {"student__model": str(tmp_path / "s"), "teacher__model": str(tmp_path / "t")}
    config = tiny(**models, **options, method__gate=False, optim__steps=1)
    result = train(config, quiet=True)
    row = json.loads((result.directory / "metrics.jsonl").read_text())
    first = 0.6 * log(0.6 / 0.5) + 0.4 * log(0.4 / 0.5)  # z = a <eos>
    second = 0.9 * log(0.9 / 0.3) + 0.1 * log(0.1 / 0.7)
    assert row["tokens"] == 2 * 8
    assert row["loss"] == pytest.approx((first + second) / 2, rel=1e-5)
    assert row["loss"] == pytest.approx(0.407148, abs=1e-5)


def fingerprint(method: TRD, attempts: Sequence[Rollout], step: int = 0) -> list[tuple[Any, ...]]:
    made = method.prepare(attempts, step=step).trajectories
    return [(t.student_context, t.teacher_context, t.response, t.edit.kept, t.edit.kind) for t in made]


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"see_attempt": False, "template": "{problem} go:"}, "context"),
        ({"reference": True, "template": SELF_TEMPLATE}, "context"),
        ({"scoring": "plain"}, "context"),
        ({"paper_compat": True}, "context response"),
        ({"refine": "wrong_only"}, "kept response"),
        ({"filter": "drop_harmed"}, "kept"),
        ({"filter": "wrong_to_right"}, "kept"),
        ({"unfinished": "drop"}, "kept"),
        ({"rewrite_max_new_tokens": 3}, "response"),
        ({"rewrite_prompt_tokens": 21}, "context"),
        ({"minimal_edit": True, "locate": "teacher_logprob", "locate_drop": 30.0}, "response"),
        ({"best_of": 2}, "response"),
        ({"offline": True}, ""),
    ],
)  # fmt: skip
def test_each_option_changes_what_is_trained_on(parts: Parts, options: dict[str, Any], what: str) -> None:
    attempts = [attempt("so 13<eos>"), attempt("12<eos>"), attempt("ab 12<eos>")]
    texts = ("it is 12<eos>", "12 or 11<eos>", "again and ag")
    base, other = (fingerprint(scripted(parts, *texts, **o)[0], attempts) for o in ({}, options))
    for part, places in {"context": (0, 1), "response": (2,), "kept": (3,)}.items():
        changed = [[row[i] for i in places] for row in base] != [[row[i] for i in places] for row in other]
        assert changed == (part in what.split()), part


def test_sampling_options_reach_the_writer(parts: Parts) -> None:
    method, writer = scripted(parts, "12<eos>", rewrite_temperature=0.9, rewrite_top_p=0.95)
    method.prepare([attempt("13<eos>")], step=0)
    assert writer.sampling == Sampling(temperature=0.9, top_p=0.95, max_new_tokens=12)


def test_filters_and_their_reasons(parts: Parts) -> None:
    attempts = [
        attempt("13<eos>"),
        attempt("13<eos>"),
        attempt("12<eos>"),
        attempt("12<eos>"),
        attempt("13<eos>"),
    ]
    texts = ("12<eos>", "14<eos>", "12<eos>", "13<eos>", "so 12")
    reasons = {
        "none": ["kept"] * 5,
        "drop_harmed": ["kept", "kept", "kept", "harmed", "unfinished"],
        "wrong_to_right": ["kept", "not repaired", "not repaired", "not repaired", "kept"],
    }
    for name, wanted in reasons.items():
        prepared = scripted(parts, *texts, filter=name)[0].prepare(attempts, step=0)
        assert [t.edit.reason for t in prepared.trajectories] == wanted
        assert [t.edit.kept for t in prepared.trajectories] == [w == "kept" for w in wanted]
        assert prepared.means["wrong_to_right"] == (2, 5), "unfinished and dropped ones are counted"
        assert prepared.means["right_to_wrong"] == (1, 5)
        assert prepared.means["accuracy_y"] == (2, 5)
        assert prepared.means["accuracy_z"] == (3, 5)
        assert prepared.means["unfinished_z"] == (1, 5)
        assert prepared.totals == {"teacher_tokens_generated": 3 + 3 + 3 + 3 + 5}


def test_right_attempts_can_be_left_alone(parts: Parts) -> None:
    method, writer = scripted(parts, "12<eos>", refine="wrong_only")
    right, wrong = method.prepare([attempt("12<eos>"), attempt("13<eos>")], step=0).trajectories
    assert (right.edit.kind, right.edit.kept, right.edit.reason) == ("none", False, "attempt is right")
    assert wrong.edit.kept
    assert len(writer.asked) == 1


def test_best_of_keeps_the_likeliest_of_the_verified(parts: Parts) -> None:
    # The scripted student gives token i the log-prob −i: the likeliest has the smallest mean id.
    attempts = [attempt("13<eos>")]
    method, writer = scripted(parts, "9<eos>", "zz12<eos>", "12<eos>", "1<eos>", best_of=4)
    generators = replace(method.tools.generators, student=Scripted("12<eos>"))
    method.tools = method.rewrite.tools = replace(method.tools, generators=generators)
    (t,) = method.prepare(attempts, step=0).trajectories
    assert t.response == ids("12<eos>")
    assert (t.edit.detail["candidates"], t.edit.detail["verified"]) == (4, 2)
    assert t.edit.detail["teacher_tokens"] == 2 + 5 + 3 + 2
    assert len(set(writer.keys)) == 4


def test_minimal_edit_keeps_the_sound_part(parts: Parts) -> None:
    writer = Scripted("2<eos>")
    options = TRDOptions(template=TEMPLATE, minimal_edit=True, diagnose_every=0)
    method = make_method(options, with_writer(parts, writer, task=Threes()))
    wrong, right, lost = method.prepare(
        [attempt("so 13<eos>"), attempt("12<eos>"), attempt("14<eos>")], step=0
    ).trajectories
    context = ids("<bos>7+5=? try:so 13 redo:<sol>")
    assert writer.asked[0] == context + ids("so 1"), "goes on after what stands before the error"
    assert wrong.teacher_context == context
    assert wrong.response == ids("so 12<eos>")
    assert (wrong.edit.kind, wrong.edit.detail["kept_tokens"], wrong.edit.detail["teacher_tokens"]) == (
        "minimal_edit",
        4,
        2,
    )
    assert right.response == ids("12<eos>"), "nothing to repair"
    assert (right.edit.kind, right.edit.kept) == ("none", True)
    assert lost.response == ids("2<eos>"), "wrong, but no error found: from the start"
    assert len(writer.asked) == 2


def test_what_the_student_drew_has_what_it_was_drawn_with(parts: Parts) -> None:
    """So that method.importance weighs what stays of y."""
    y = attempt("so 13<eos>")
    y = replace(y, logprobs=tuple(-0.1 * i for i in range(len(y.ids))))
    for options, own in (({"minimal_edit": True}, 4), ({"refine": "wrong_only"}, 0), ({}, 0)):
        chosen = TRDOptions(template=TEMPLATE, diagnose_every=0, **options)
        method = make_method(chosen, with_writer(parts, Scripted("2<eos>"), task=Threes()))
        (t,) = method.prepare([y], step=0).trajectories
        assert t.behaviour_logprobs == y.logprobs[:own] + (0.0,) * (len(t.response) - own)
        assert t.written_by.count("student") == own
    importance = {"method": {"name": "trd", "importance": "token"}}
    assert "method.importance" in idle_options(configuration.build(importance))
    importance["method"]["minimal_edit"] = True  # type: ignore[assignment]
    assert "method.importance" not in idle_options(configuration.build(importance))


def test_a_stop_string_may_begin_in_what_is_kept(parts: Parts) -> None:
    writer = Scripted("2 so 12<eos>")
    options = TRDOptions(template=TEMPLATE, minimal_edit=True, diagnose_every=0)
    tools = with_writer(parts, writer, task=Threes())
    tools.generators.student.stop_strings = ("12",)
    try:
        (t,) = make_method(options, tools).prepare([attempt("so 13<eos>")], step=0).trajectories
    finally:
        tools.generators.student.stop_strings = ()
    assert t.response == ids("so 12")


def test_minimal_edit_from_the_teachers_doubt(parts: Parts) -> None:
    attempts = sample(parts, 0)
    ours = parts.tools.generators.student.score([r.context for r in attempts], [r.ids for r in attempts])
    theirs = parts.tools.generators.teacher.score([r.context for r in attempts], [r.ids for r in attempts])
    method = make_method(
        TRDOptions(template=TEMPLATE, minimal_edit=True, locate="teacher_logprob", locate_drop=2.0),
        parts.tools,
    )
    made = method.prepare(attempts, step=0).trajectories
    kept = [t.edit.detail["kept_tokens"] for t in made]
    gaps = [[s - t for s, t in zip(a, b, strict=True)] for a, b in zip(ours, theirs, strict=True)]
    assert kept == [next((i for i, g in enumerate(row) if g > 2.0), 0) for row in gaps]
    assert any(kept)
    for t, r, k in zip(made, attempts, kept, strict=True):
        assert t.response[:k] == r.ids[:k]


def test_minimal_edit_from_the_first_fork(parts: Parts) -> None:
    attempts = sample(parts, 0)
    options = {"minimal_edit": True, "locate": "fork", "locate_window": 4, "template": TEMPLATE}
    method = make_method(TRDOptions(**options, locate_distance=0.8, diagnose_every=0), parts.tools)
    made = method.prepare(attempts, step=0)
    topd = TOPDOptions(window=4, decide="threshold", threshold=0.8)
    forks = [
        [f for f in t.edit.detail["forks"] if f["decision"] == "fork"]
        for t in make_method(topd, parts.tools).prepare(attempts, step=7).trajectories
    ]
    kept = [t.edit.detail["kept_tokens"] for t in made.trajectories]
    assert kept == [min((f["position"] for f in row), default=0) for row in forks]
    assert any(kept)
    assert not all(row for row in forks), "a distance that tells some attempts from others"
    spent = [t.edit.detail["locate_tokens"] for t in made.trajectories]
    assert all(spent)
    written = [t.edit.detail["teacher_tokens"] for t in made.trajectories]
    assert made.totals["teacher_tokens_generated"] == sum(spent) + sum(written)
    half = method.prepare(attempts[::2], step=0).trajectories
    assert [t.response for t in half] == [t.response for t in made.trajectories[::2]]


def test_attempt_is_trimmed_before_the_reference(parts: Parts) -> None:
    whole = len(ids("<bos>7+5=? ref:7 plus 5 try:so 13 redo:<sol>"))
    y = attempt("so 13<eos>")

    def context(room: int) -> tuple[tuple[int, ...], dict[str, int]]:
        method = scripted(
            parts, "12<eos>", teacher="self", template=SELF_TEMPLATE, rewrite_prompt_tokens=room
        )[0]
        (t,) = method.prepare([y], step=0).trajectories
        trimmed = {k: v for k, v in t.edit.detail.items() if k.endswith("trimmed")}
        return t.teacher_context, trimmed

    assert context(whole) == (ids("<bos>7+5=? ref:7 plus 5 try:so 13 redo:<sol>"), {})
    # Two tokens too long: the stop token is no text, so its loss does not help, and two more go.
    found, trimmed = context(whole - 2)
    assert found == ids("<bos>7+5=? ref:7 plus 5 try:so  redo:<sol>")
    assert trimmed == {"attempt_tokens_trimmed": 3}
    found, trimmed = context(whole - 7)
    assert found == ids("<bos>7+5=? ref:7 plus try: redo:<sol>")
    assert trimmed == {"attempt_tokens_trimmed": 6, "solution_tokens_trimmed": 2}
    with pytest.raises(UserError, match=r"prompt 'p': its rewrite prompt has 23 tokens .* only 20 fit"):
        context(20)


def test_the_judges_reference_loses_its_end(parts: Parts) -> None:
    text = replace(parts.text, templates={**parts.text.templates, "hint": "{problem} ref:{solution}"})
    y, whole = attempt("so 13<eos>"), ids("<bos>7+5=? ref:7 plus 5<sol>")
    found = [text.judging_context(y, reference=True, room=len(whole) - n) for n in (0, 3, 8, 9)]
    assert found == [whole, ids("<bos>7+5=? ref:7 plu<sol>"), ids("<bos>7+5=? ref:<sol>"), y.context]


def test_an_attempt_that_is_left_alone_fits_its_context(parts: Parts) -> None:
    """Where rewrites may be shorter than rollouts."""
    y = attempt("1+1+1+1+12<eos>")
    options = {"refine": "wrong_only", "rewrite_max_new_tokens": 2}
    for spare in (0, 1):
        parts.models.teacher.context_length, parts.models.teacher.spare = 36, spare
        method, _ = scripted(parts, "12<eos>", **options)
        (t,) = method.prepare([y], step=0).trajectories
        assert t.response == y.ids
        assert len(t.teacher_context + t.response) == 36 - spare


def test_a_line_break_takes_no_place_that_is_not_there(parts: Parts) -> None:
    """Of paper_compat; the prompts were found to fit without it."""
    method, _ = scripted(parts, paper_compat=True)
    asked = Prompt(id="p", text="7+5=? try:so 13 redo:")
    z = Rewrite(
        attempt=attempt("so 13"), asked=asked, context=(), ids=ids("so 12"), finished=False,
        attempt_right=False,
    )  # fmt: skip
    for room, response in ((5, "so 12"), (4, "so 1")):
        parts.models.teacher.context_length = len(method.bare_ids(asked)) + room
        t = method.trajectory(z)
        assert t.response == ids(response)
        assert t.teacher_context == method.bare_ids(asked)


@pytest.fixture
def narrow(tmp_path: Path, data_file: Path) -> dict[str, Any]:
    """Models of learned positions, which fail behind their context, and data whose references fill it."""
    found: dict[str, Any] = {"data__train": str(tmp_path / "long.jsonl"), "data__eval": {}}
    for seed, role in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 140, "initializer_range": 0.5}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=len(CHARACTERS), **sizes, eos_token_id=2))
        model.save_pretrained(tmp_path / role)
        make_tokenizer().save_pretrained(tmp_path / role)
        found[f"{role}__model"] = str(tmp_path / role)
    rows = [json.loads(line) for line in data_file.read_text().splitlines()]
    long = [json.dumps({**row, "solution": row["solution"] * 20}) + "\n" for row in rows]
    (tmp_path / "long.jsonl").write_text("".join(long))
    return found


@pytest.mark.parametrize(
    "options",
    [
        {"reference": True},
        {"teacher": "self"},
        {"reference": True, "minimal_edit": True, "locate": "teacher_logprob", "diagnose_every": 0},
    ],
)
def test_a_reference_longer_than_the_context(
    tiny: Callable[..., Config], narrow: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    given = {"name": "trd", "template": SELF_TEMPLATE, "gate": False, **options}
    config = tiny(**narrow, **{f"method__{k}": v for k, v in given.items()}, optim__steps=1)
    train(config, quiet=True)
    run_probe(assemble(config), rollouts=2, continuations=1, every=8, out=tmp_path / "probe")


def test_rewrites_do_not_depend_on_company_or_process(parts: Parts) -> None:
    attempts = sample(parts, 0)
    whole = fingerprint(parts.method, attempts, step=5)
    halves = [fingerprint(parts.method, attempts[i::2], step=5) for i in (0, 1)]
    assert whole[0::2] == halves[0]
    assert whole[1::2] == halves[1]
    assert whole != fingerprint(parts.method, attempts, step=6)


@pytest.mark.parametrize(("weights", "moves"), [("base", False), ("live", True), ("ema", False)])
def test_who_writes_for_oneself_under_lora(tiny: Callable[..., Config], weights: str, moves: bool) -> None:
    options = {"method__name": "trd", "method__teacher": "self", "method__weights": weights}
    parts = assemble(tiny(student__lora_rank=4, method__template=SELF_TEMPLATE, **options))
    attempts = sample(parts, 0)
    before = fingerprint(parts.method, attempts)
    with torch.no_grad():
        for name, p in parts.models.student.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    assert (fingerprint(parts.method, attempts) != before) == moves
    if weights == "ema":
        parts.models.teacher.follow()  # now the average has moved
        assert parts.models.teacher.state()


def test_diagnostics_by_another_way(parts: Parts) -> None:
    attempts = sample(parts, 0)
    method = make_method(
        TRDOptions(template=TEMPLATE), replace(parts.tools, text=replace(parts.text, correction_ids=(5, 9)))
    )
    prepared = method.prepare(attempts, step=0)
    student, teacher = parts.models.student.eval(), parts.models.teacher.model
    rows: dict[str, list[Any]] = {
        k: [] for k in ("y_s", "z_s", "token_gap_y", "token_gap_z", "mass_y", "mass_z", "kl")
    }
    for t in prepared.trajectories:
        y = t.origin
        for which, context, response in (("y", y.context, y.ids), ("z", t.teacher_context, t.response)):
            ours = logps(student, t.student_context, response)
            theirs = logps(teacher, context, response)
            rows[f"{which}_s"].append(ours[range(len(response)), response].mean().item())
            rows[f"token_gap_{which}"] += (ours - theirs)[range(len(response)), response].tolist()
            rows[f"mass_{which}"] += theirs[:, [5, 9]].exp().sum(-1).tolist()
            if which == "y":
                rows["kl"] += (ours.exp() * (ours - theirs)).sum(-1).tolist()
        assert t.edit.detail["student_logp_y"] == pytest.approx(rows["y_s"][-1], abs=1e-5)
        assert t.edit.detail["student_logp_z"] == pytest.approx(rows["z_s"][-1], abs=1e-5)

    def of(name: str) -> float:
        total, count = prepared.means[name]
        return total / count

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    assert of("support_gap_nats") == pytest.approx(mean(rows["z_s"]) - mean(rows["y_s"]), abs=1e-5)
    assert of("epistemic_mass_y") == pytest.approx(mean(rows["mass_y"]), abs=1e-6)
    assert of("epistemic_mass_z") == pytest.approx(mean(rows["mass_z"]), abs=1e-6)
    assert of("reverse_kl_y_wrong_nats") == pytest.approx(mean(rows["kl"]), abs=1e-5)
    assert prepared.means["reverse_kl_y_right_nats"] == (0, 0)
    for which in "yz":
        gap = mean(rows[f"token_gap_{which}"])
        assert of(f"log_perplexity_gap_{which}_nats") == pytest.approx(gap, abs=1e-5)


@torch.no_grad()
def logps(model: Any, context: Sequence[int], response: Sequence[int]) -> torch.Tensor:
    every = model(torch.tensor([[*context, *response]])).logits[0].double().log_softmax(-1)
    return every[len(context) - 1 : -1]


def test_nothing_written_is_refused(parts: Parts) -> None:
    method, _ = scripted(parts, "<eos>")
    with pytest.raises(UserError, match="step 3: the rewriter returned no text for any of 2 attempts"):
        method.prepare([attempt("13<eos>"), attempt("14<eos>")], step=2)
    prepared = scripted(parts, "<eos>", "12<eos>")[0].prepare(
        [attempt("13<eos>"), attempt("14<eos>")], step=0
    )
    assert prepared.means["empty_z"] == (1, 2)
    assert [t.edit.kept for t in prepared.trajectories] == [False, True]


def test_unchanged_rewrites_are_counted(parts: Parts) -> None:
    prepared = scripted(parts, "13<eos>", "12<eos>")[0].prepare(
        [attempt("13<eos>"), attempt("14<eos>")], step=0
    )
    assert prepared.means["identical_z"] == (1, 2)
    assert prepared.trajectories[0].edit.kept, "counted, not dropped: there may be nothing to change"


def test_foreign_scripts() -> None:
    assert is_foreign("пять и семь 12", known="7+5? so it is 13")
    assert not is_foreign("five and семь is 12", known="7+5? so it is 13")
    assert not is_foreign("пять и семь", known="сколько будет 7+5?")
    assert not is_foreign("12", known="7+5?")


def counts(**changes: int) -> Refinement:
    fine = {"attempts": 64, "wrong": 40, "repaired": 30, "retried": 5, "right": 24, "harmed": 1}
    return Refinement(**{**fine, "empty": 0, "foreign": 0, "identical": 20, "unfinished": 0, **changes})


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (counts(), ""),
        (counts(repaired=5), "no more wrong attempts than chance"),
        (counts(repaired=6), ""),
        (counts(harmed=3), "spoils more than 10%"),
        (counts(harmed=2), ""),
        (counts(wrong=7, repaired=0, right=57), ""),
        (counts(right=7, harmed=7, wrong=57), ""),
        (counts(empty=20, foreign=13), "33 of 64 rewrites are empty or in a foreign script"),
        (counts(empty=20, foreign=12), ""),
        (
            counts(repaired=1, retried=0, unfinished=40),
            "40 of 64 rewrites are cut off, and they are not told",
        ),
        (counts(repaired=1, retried=0, unfinished=32), ""),
        (counts(unfinished=64), ""),
    ],
)
def test_what_the_gate_refuses(found: Refinement, reason: str) -> None:
    said = refusal(found, max_harm=0.1)
    assert reason in said
    assert bool(said) == bool(reason)


def test_how_likely_a_lead_is_by_luck() -> None:
    """Of the attempts that one of both alone got right, by hand: heads in so many throws."""
    assert counts(repaired=1, retried=0).luck == 0.5
    assert counts(repaired=5, retried=1).luck == pytest.approx((6 + 1) / 64)
    assert counts(repaired=6, retried=2, both=1).luck == pytest.approx((6 + 1) / 64)
    assert counts(repaired=0, retried=0).luck == 1.0
    assert "own second try: 0; such a lead comes by luck in 50%)" in counts(repaired=1, retried=0).sentence
    assert "own second try: 5)" in counts().sentence


def test_gate_stops_a_run_before_it_trains(tiny: Callable[..., Config]) -> None:
    options = {"method__name": "trd", "method__template": TEMPLATE, "method__gate_prompts": 10}
    with pytest.raises(
        UserError, match=r"the refine gate stops this run: the rewriter repairs no more .*of 10 wrong"
    ):
        train(tiny(**options), quiet=True)
    run = Path(tiny(**options).run.dir) / "tiny"
    found = json.loads((run / "refine.json").read_text())
    assert (found["attempts"], found["passed"]) == (10, False)
    assert not (run / "metrics.jsonl").exists()
    with pytest.raises(UserError, match="the refine gate"):
        train(tiny(**options), quiet=True)
    result = train(tiny(**options, method__gate=False, run__name="open"), quiet=True)
    assert len((result.directory / "metrics.jsonl").read_text().splitlines()) == 3
    assert not (result.directory / "refine.json").exists()


def test_gate_lets_a_good_rewriter_pass_once(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def fine(rewriter: Rewriter, tools: Tools, pool: Sequence[Prompt]) -> Refinement:
        rollouts = tools.generators.student.generate(pool[:8], tools.sampling)
        asked.append(len(rewriter(rollouts, when="gate")))
        return counts()

    monkeypatch.setattr("onpath.methods.trd.gate.refinement", fine)
    options = {"method__name": "trd", "method__template": TEMPLATE, "method__offline": True}
    result = train(tiny(**options), quiet=True)
    assert json.loads((result.directory / "refine.json").read_text())["passed"]
    for file in (result.directory / "model").iterdir():
        file.unlink()
    (result.directory / "model").rmdir()
    train(tiny(**options), quiet=True)
    assert asked == [8], "before anything is written ahead, and not again when the run goes on"


def test_killed_and_resumed_is_the_same_run(tiny: Callable[..., Config]) -> None:
    options = {"method__name": "trd", "method__teacher": "self", "method__weights": "ema"}
    options |= {"method__template": SELF_TEMPLATE, "method__gate": False, "run__save_every": 1}
    whole = train(tiny(**options, run__name="whole"), quiet=True)
    config = tiny(**options, run__name="cut")
    parts_of = train(config, quiet=True).directory
    for path in ("model", "checkpoints/step_3"):
        for file in sorted((parts_of / path).iterdir()):
            file.unlink()
        (parts_of / path).rmdir()
    again = train(config, quiet=True)
    for name in ("metrics.jsonl",):
        rows = [
            [json.loads(line) for line in (d / name).read_text().splitlines()]
            for d in (whole.directory, again.directory)
        ]
        assert [{**r, "seconds": 0} for r in rows[0]] == [{**r, "seconds": 0} for r in rows[1]]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            {"template": "{problem} {try}"},
            "must have exactly the slots {attempt}, {problem}; it has {problem}, {try}",
        ),
        ({"template": "{problem} {attempt"}, "write literal braces doubled"),
        (
            {"template": "{problem} {attempt}", "teacher": "self"},
            "the slots {attempt}, {problem}, {solution}",
        ),
        ({"minimal_edit": True, "see_attempt": False}, "minimal_edit keeps a part of the attempt"),
        ({"minimal_edit": True}, "checker needs a task with a checker of steps"),
        ({"minimal_edit": True, "locate": "fork", "teacher": "self"}, "use teacher: model"),
        ({"scoring": "plain", "teacher": "self"}, "the teacher is the student itself"),
        ({"best_of": 0}, "best_of"),
        ({"filters": "none"}, "did you mean filter"),
    ],
)
def test_impossible_options(tiny: Callable[..., Config], method: dict[str, Any], message: str) -> None:
    data = tiny().model_dump(mode="json")
    data["method"] = {"name": "trd", **method}
    with pytest.raises(UserError) as raised:
        configuration.build(data)
    assert message in str(raised.value)


def test_columns_are_checked_before_models_load(tiny: Callable[..., Config], tmp_path: Path) -> None:
    path = tmp_path / "bare.jsonl"
    path.write_text(
        '{"id": "a", "prompt": "1+1=?", "answer": "2", "solution": "x"}\n'
        '{"id": "b", "prompt": "1+2=?", "solution": " "}\n'
    )
    for options, column in (({"teacher": "self"}, "solution"), ({"filter": "drop_harmed"}, "answer")):
        changes = {f"method__{k}": v for k, v in options.items()} | {"rollout__prompts": 2}
        config = tiny(method__name="trd", data__train=str(path), student__model="/nowhere", **changes)
        with pytest.raises(UserError, match=f"needs the column {column} .* 1 of 2 .* id 'b'"):
            assemble(config)


def test_edit_distance() -> None:
    def slow(a: str, b: str) -> int:
        if not a or not b:
            return len(a) + len(b)
        return min(slow(a[1:], b) + 1, slow(a, b[1:]) + 1, slow(a[1:], b[1:]) + (a[0] != b[0]))

    for a, b in (
        ("kitten", "sitting"),
        ("", "abc"),
        ("abc", ""),
        ("abcde", "xbxdx"),
        ("aab", "baa"),
        ("flaw", "lawn"),
        ("abab", "ab"),  # what they begin with alike is not what they end with alike once more
        ("aa", "aaaa"),
        ("abxcd", "abycd"),
        ("abc", "abc"),
    ):
        assert edit_distance([ord(c) for c in a], [ord(c) for c in b]) == slow(a, b)


def test_cells() -> None:
    y = attempt("13<eos>")
    base = Rewrite(
        attempt=y, asked=y.prompt, context=(1,), ids=(2,), finished=True, attempt_right=True, right=False
    )
    assert base.cell == "right_to_wrong"
    assert replace(base, attempt_right=None).cell is None
