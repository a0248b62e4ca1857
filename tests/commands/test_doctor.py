"""Ten planted faults, each caught by name; clean configs pass; nothing is left changed.

A fault is planted where users make it: in a config, a data file, a tokenizer's directory, or as an engine or
a teacher that does not keep its promise.
"""

import copy
import json
import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from onpath.commands.cli import main
from onpath.commands.doctor import costs, scores, training
from onpath.commands.doctor.command import Diagnosis, diagnose, load_leniently
from onpath.commands.doctor.finding import Finding
from onpath.commands.doctor.inputs import read_pool
from onpath.commands.doctor.sample import Probe, logp_of, make_probe, rows_of, untouched
from onpath.config.build import build
from onpath.config.whole import Config
from onpath.data.batch import Batch
from onpath.engines.hf import HFEngine
from onpath.engines.score_cache import weights_digest
from onpath.engines.teacher import Teacher
from onpath.losses import Head, TeacherHidden, TeacherTopK
from onpath.methods import Prepared
from onpath.records import Completion, Prompt, Rollout, Sampling
from onpath.run.assemble import assemble
from onpath.run.parts import Parts
from onpath.training import train
from tests.conftest import CHARACTERS, TEMPLATE, make_tokenizer

Tiny = Callable[..., Config]
NAMES = [
    "sampling", "data", "evals", "columns", "answers", "solutions", "tokens", "specials", "template",
    "context", "models", "passes", "server_tokens", "trajectories", "accuracy", "engine_logprobs",
    "on_policy", "contexts", "eos", "teacher_itself", "alignment", "teacher_differs", "gradient", "guidance",
    "refine", "engine_follows", "speed", "rate", "memory", "fits", "disk", "restored",
]  # fmt: skip
"""Scripts read them: a change is a change of the interface."""


@pytest.fixture
def parts(tiny: Tiny) -> Parts:
    """Enough tokens for statistics."""
    return assemble(tiny(rollout__prompts=32, rollout__max_new_tokens=24))


@pytest.fixture
def probe(parts: Parts) -> Probe:
    return make_probe(parts)


def doctor(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, Any]:
    """Exit code and JSON of the command."""
    path = tmp_path / "doctor.yaml"
    path.write_text(config.to_yaml())
    code = main(["doctor", str(path), "--json", *more])
    return code, json.loads(capsys.readouterr().out)


def by_name(report: Any) -> dict[str, Any]:
    return {check["name"]: check for check in report["checks"]}


def failed(report: Any) -> list[str]:
    return [check["name"] for check in report["checks"] if check["status"] == "fail"]


def sides(config: Config, tmp_path: Path) -> tuple[Config, Path, Path]:
    """The config over copies of both models, ready to be spoilt."""
    tree = config.model_dump(mode="json")
    for side in ("student", "teacher"):
        shutil.copytree(tree[side]["model"], tmp_path / side)
        tree[side]["model"] = str(tmp_path / side)
    return build(tree), tmp_path / "student", tmp_path / "teacher"


# Clean configs


def test_a_clean_config_passes_and_nothing_is_written(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny()
    code, report = doctor(config, tmp_path, capsys)
    assert code == 0, failed(report)
    assert set(report) == {"status", "method", "student", "teacher", "seconds", "checks"}
    assert [check["name"] for check in report["checks"]] == NAMES
    for check in report["checks"]:
        assert set(check) == {"name", "status", "message", "advice", "values"}
        assert check["status"] in ("ok", "warning", "skipped")
    found = by_name(report)
    assert found["engine_logprobs"]["values"]["max_gap_nats"] < 1e-4
    assert (
        found["alignment"]["values"]["gap_nats"]
        < 1e-4
        < 0.1
        < found["alignment"]["values"]["gap_one_late_nats"]
    )
    assert found["speed"]["values"]["hours"] > 0
    assert found["memory"]["values"]["room_gib"] > found["memory"]["values"]["peak_gib"] > 0
    assert not Path(config.run.dir).exists()


@pytest.mark.parametrize(("lr", "status"), [(1e-5, "ok"), (0.3, "warning")])
def test_a_rate_that_is_too_high_is_seen(
    lr: float, status: str, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The warm-up of a long run does not hide it."""
    config = tiny(optim__lr=lr, optim__steps=1000, optim__warmup=0.5)
    found = by_name(doctor(config, tmp_path, capsys)[1])["rate"]
    assert (found["status"], found["values"]["lr"]) == (status, lr)
    assert (found["values"]["moved_nats"] >= 0.1) == (status == "warning")


def test_the_bundled_student_s_rate_is_named_where_it_is_another_s(tiny: Tiny) -> None:
    tree = tiny().model_dump(mode="json")
    said = "optim.lr is 0.0005, the default, which is the bundled student's"
    assert not any(said in warning for warning in assemble(build(tree)).warnings)
    del tree["optim"]["lr"]
    assert any(said in warning for warning in assemble(build(tree)).warnings)
    tree["student"]["model"] = tree["teacher"]["model"] = "gym:student"
    tree["data"]["train"] = "gym:train"
    assert not any(said in warning for warning in assemble(build(tree)).warnings)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "train"),
    [("opsd", "gym:train"), ("trd", "gym:train"), ("topd", "gym:train"), ("topd", "gym:train?lost=0.5")],
)
def test_the_gyms_defaults_pass(method: str, train: str) -> None:
    config = build(
        {
            "student": {"device": "cpu"},
            "data": {"train": train, "limit": 64, "eval_limit": 20},
            "method": {"name": method},
            "rollout": {"prompts": 32},
        }
    )
    found = {f.name: f for f in diagnose(config)}
    assert not [f for f in found.values() if f.status == "fail"]
    assert list(found) == NAMES
    assert found["refine"].status == ("ok" if method == "trd" else "skipped")
    assert found["teacher_differs"].values["reverse_kl_nats"] > 0.01


@pytest.mark.parametrize("method", ["opd", "opsd", "topd", "relay", "truncate"])
@pytest.mark.parametrize("lora", [0, 4])
def test_every_method_leaves_the_weights_as_they_were(method: str, lora: int, tiny: Tiny) -> None:
    parts = assemble(tiny(method__name=method, student__lora_rank=lora, optim__lr=0.1))
    before = weights_digest(parts.models.student), {k: v.clone() for k, v in parts.method.state().items()}
    with untouched(parts) as restore:
        probe = make_probe(parts)
        costs.measure(parts, probe)
        assert weights_digest(parts.models.student) != before[0], "the step was a real one"
        assert restore()
    assert weights_digest(parts.models.student) == before[0]
    assert all(v.nan_to_num(-1).equal(before[1][k].nan_to_num(-1)) for k, v in parts.method.state().items())
    assert parts.generators.student.policy_version == 0


def test_long_responses_are_cut_and_long_steps_shared(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a minute is enough."""
    parts = assemble(tiny(rollout__max_new_tokens=400))
    probe = make_probe(parts)
    assert probe.shortened
    assert {r.sampling.max_new_tokens for r in probe.rollouts} == {256}
    assert status(scores.on_policy(parts, probe.rollouts)) == "ok"
    assert status(training.accuracy(parts, probe)) == "skipped"
    monkeypatch.setattr(costs, "_STEP_SECONDS", 0.0)
    with untouched(parts):
        cost = costs.measure(parts, probe)
    assert cost.scale == 8, "one prompt of eight"
    assert "scaled up 8.0 times" in costs.speed(parts, cost).message
    assert "at least that" in costs.memory(parts, cost).message


# 1. Wrong template


def test_a_template_unlike_the_teachers(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, student, _ = sides(tiny(), tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("{{ m['content'] }}", "q: {{ m['content'] }}")
    tokenizer.save_pretrained(student)
    code, report = doctor(config, tmp_path, capsys)
    assert (code, failed(report)) == (1, ["template"])
    assert "'q: " in by_name(report)["template"]["message"]


@pytest.mark.parametrize(
    ("template", "status", "says"),
    [
        ("<bos>" + TEMPLATE, "fail", "BOS twice"),
        (TEMPLATE.replace("if add_generation_prompt", "if false"), "warning", "opens no answer"),
        (TEMPLATE.replace("<sol>", "<|assistant|>"), "warning", "unknown token"),
    ],
)
def test_a_template_wrong_on_both_sides(
    template: str, status: str, says: str, tiny: Tiny, tmp_path: Path
) -> None:
    config, student, teacher = sides(tiny(), tmp_path)
    for side in (student, teacher):
        tokens = ["<unk>" if t == "?" else t for t in CHARACTERS]
        tokenizer = make_tokenizer(tokens)
        tokenizer.add_special_tokens({"unk_token": "<unk>"})
        tokenizer.backend_tokenizer.model.unk_token = "<unk>"
        tokenizer.chat_template = template
        tokenizer.save_pretrained(side)
    rows = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(10)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    tree = config.model_dump(mode="json")
    tree["data"] |= {"train": str(tmp_path / "rows.jsonl"), "eval": {}}
    found = next(f for f in diagnose(build(tree)) if f.name == "template")
    assert (found.status, says in found.message) == (status, True), found


def test_an_end_of_turn_that_ends_nothing(tiny: Tiny, tmp_path: Path) -> None:
    config, student, teacher = sides(tiny(), tmp_path)
    for side in (student, teacher):
        tokenizer = make_tokenizer()
        tokenizer.chat_template = (
            "<bos>{% for m in messages %}"
            "{% if m['role'] == 'assistant' %}<sol>{{ m['content'] }}<pad>{% else %}"
            "{{ m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}<sol>{% endif %}"
        )
        tokenizer.save_pretrained(side)
    found = next(f for f in diagnose(config) if f.name == "eos")
    assert found.status == "fail"
    assert "'<pad>'" in found.message


# 2. BOS on one side


def test_a_bos_that_only_one_tokenizer_adds(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, _, teacher = sides(tiny(), tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    tokenizer.save_pretrained(teacher)
    code, report = doctor(config, tmp_path, capsys)
    assert (code, failed(report)) == (1, ["specials"])
    assert by_name(report)["specials"]["values"]["teacher_adds_before"] == [1]


@pytest.mark.parametrize(
    ("bos", "says"), [((), "on one side only"), ((1, 1), "BOS twice")], ids=["lost", "doubled"]
)
def test_a_bos_in_one_context_only(bos: tuple[int, ...], says: str, parts: Parts, probe: Probe) -> None:
    changed = [replace(t, teacher_context=(*bos, *t.teacher_context[1:])) for t in probe.trajectories]
    found = training.contexts(parts, replace(probe, trajectories=changed))
    assert found.status == "fail"
    assert says in found.message


def test_an_engine_that_adds_a_bos(parts: Parts, probe: Probe) -> None:
    class Adds(Passes):
        def score(self, contexts: Any, responses: Any) -> Any:
            return self.engine.score([(1, *c) for c in contexts], responses)

    assert (
        status(scores.engine_logprobs(with_engine(parts, Adds(parts.generators.student)), probe.rollouts))
        == "fail"
    )


# 3. Shifted scores


class Shifted(Teacher):
    """A teacher whose scores are those of the position beside."""

    def __init__(self, teacher: Any, by: int) -> None:
        self.teacher, self.model, self.by = teacher, teacher.model, by
        self.context_length = teacher.context_length

    @property
    def head(self) -> Head:
        return self.teacher.head

    def scores(self, batch: Batch, cache: Any = None) -> TeacherHidden:
        return TeacherHidden(hidden=self.hidden(batch), head=self.head)

    def hidden(self, batch: Batch) -> Tensor:
        return self.teacher.hidden(batch).roll(self.by, 0)


@pytest.mark.parametrize("by", [-1, 1])
def test_shifted_scores(by: int, parts: Parts, probe: Probe) -> None:
    spoilt = with_teacher(parts, Shifted(parts.models.teacher, by))
    found = scores.alignment(spoilt, probe)
    assert found.status == "fail"
    assert f"shifted by {by:+d}" in found.advice
    assert scores.alignment(parts, probe).status == "ok"


def test_scores_that_depend_on_the_padding(parts: Parts, probe: Probe) -> None:
    class Padded(Shifted):
        def hidden(self, batch: Batch) -> Tensor:
            return self.teacher.hidden(batch) * (1 + 0.05 * (len(batch.trajectories) > 1))

    assert status(scores.teacher_itself(parts, probe)) == "ok"
    assert (
        status(scores.teacher_itself(with_teacher(parts, Padded(parts.models.teacher, 0)), probe)) == "fail"
    )


# 4. Another tokenizer of equal size


def test_another_tokenizer_of_equal_size_and_a_wrong_grader_in_one_go(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, _, teacher = sides(tiny(rollout__max_new_tokens=600), tmp_path)
    other = [*CHARACTERS[:4], *reversed(CHARACTERS[4:14]), *CHARACTERS[14:]]
    make_tokenizer(other).save_pretrained(teacher)
    code, report = doctor(config, tmp_path, capsys)
    assert code == 1
    assert failed(report) == ["tokens", "template", "context", "models"], "all that is wrong, in one go"
    tokens = by_name(report)["tokens"]["values"]
    assert tokens["student_tokens"] == tokens["teacher_tokens"]
    assert tokens["different_ids"] == 10
    assert [check["name"] for check in report["checks"]] == NAMES
    assert by_name(report)["gradient"]["status"] == "skipped"


# 5. Stale weights


def with_engine(parts: Parts, engine: Any) -> Parts:
    """The run with another engine over the student's weights."""
    return replace(parts, generators=replace(parts.generators, student=engine))


def with_teacher(parts: Parts, teacher: Any) -> Parts:
    return replace(parts, models=replace(parts.models, teacher=teacher))


class Passes:
    """An engine that hands everything on: faults are made by what a subclass changes."""

    def __init__(self, engine: HFEngine) -> None:
        self.engine = engine
        self.shares_weights = engine.shares_weights

    @property
    def policy_version(self) -> int:
        return self.engine.policy_version

    def in_step(self) -> AbstractContextManager[None]:
        return self.engine.in_step()

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, **options: Any) -> list[Rollout]:
        return self.engine.generate(prompts, sampling, **options)

    def continue_from(
        self, prefixes: Sequence[Sequence[int]], sampling: Sampling, **options: Any
    ) -> list[Completion]:
        return self.engine.continue_from(prefixes, sampling, **options)

    def score(self, contexts: Any, responses: Any) -> Any:
        return self.engine.score(contexts, responses)

    def sync_weights(self, version: int) -> None:
        self.engine.sync_weights(version)


def status(found: Finding) -> str:
    return found.status


def aged(parts: Parts) -> HFEngine:
    """An engine over a copy of the weights."""
    stops = parts.generators.student.stop_ids
    return HFEngine(
        copy.deepcopy(parts.models.student),
        parts.text.renderer,
        stop_ids=stops,
        vocabulary=parts.models.vocabulary,
    )


def test_an_engine_that_keeps_its_weights(parts: Parts, probe: Probe) -> None:
    spoilt = with_engine(parts, aged(parts))
    assert status(scores.engine_logprobs(spoilt, probe.rollouts)) == "ok", "equal so far"
    with untouched(spoilt):
        found = scores.engine_follows(spoilt)
    assert found.status == "fail"
    assert found.values["gap_nats"] > 0.2
    with untouched(parts):
        assert status(scores.engine_follows(parts)) == "ok"


def test_an_engine_with_older_weights(parts: Parts, probe: Probe) -> None:
    spoilt = with_engine(parts, aged(parts))
    with untouched(parts):
        scores.stir(parts, share=0.05, seed=0)
        assert status(scores.engine_logprobs(spoilt, probe.rollouts)) == "fail"


def test_an_engine_that_forgets_its_version(parts: Parts) -> None:
    class Forgets(Passes):
        def sync_weights(self, version: int) -> None:
            self.engine.sync_weights(0)

    with untouched(parts):
        found = scores.engine_follows(with_engine(parts, Forgets(parts.generators.student)))
    assert (found.status, "version 0" in found.message) == ("fail", True)


# 6. and 7. Temperature, top-p


@pytest.mark.parametrize(
    ("option", "value"), [("rollout.temperature", "0.7"), ("rollout.top_p", "0.9"), ("rollout.top_k", "5")]
)
def test_settings_that_are_not_on_policy(
    option: str, value: str, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, report = doctor(tiny(), tmp_path, capsys, f"--{option}", value)
    assert (code, failed(report)) == (1, ["sampling"])
    assert f"{option}" in by_name(report)["sampling"]["message"]
    accepted = doctor(tiny(), tmp_path, capsys, f"--{option}", value, "--method.off_policy", "true")
    assert accepted[0] == 0
    assert by_name(accepted[1])["sampling"]["status"] == "warning"


@pytest.mark.parametrize(
    "truly", [{"temperature": 0.6}, {"temperature": 1.6}, {"top_p": 0.7}, {"top_k": 3}], ids=str
)
@pytest.mark.parametrize("reports", ["what it drew from", "the model's"])
def test_an_engine_that_samples_otherwise_than_asked(truly: dict[str, Any], reports: str, tiny: Tiny) -> None:
    """Its rollouts carry the settings asked for, with log-probs of either distribution."""

    class Otherwise(Passes):
        def generate(self, prompts: Sequence[Prompt], sampling: Sampling, **options: Any) -> list[Rollout]:
            rollouts = self.engine.generate(prompts, replace(sampling, **truly), **options)
            rollouts = [replace(r, sampling=sampling) for r in rollouts]
            if reports == "what it drew from":
                return rollouts
            logps = self.engine.score([r.context for r in rollouts], [r.ids for r in rollouts])
            return [replace(r, logprobs=p) for r, p in zip(rollouts, logps, strict=True)]

    parts = assemble(tiny(rollout__prompts=32, rollout__max_new_tokens=24))
    spoilt = with_engine(parts, Otherwise(parts.generators.student))
    rollouts = make_probe(spoilt).rollouts
    assert status(scores.on_policy(spoilt, rollouts)) == "fail"
    gaps = scores.engine_logprobs(spoilt, rollouts)
    assert gaps.status == ("fail" if reports == "what it drew from" else "ok")
    assert status(scores.on_policy(parts, make_probe(parts).rollouts)) == "ok"


# 8. EOS masked


def with_eos(probe: Probe) -> Probe:
    """Every response finished."""
    rollouts = [
        replace(r, ids=(*r.ids[:3], 2), logprobs=r.logprobs[:4], finish_reason="stop") for r in probe.rollouts
    ]
    trajectories = [
        replace(t, response=r.ids, origin=r, behaviour_logprobs=None)
        for t, r in zip(probe.trajectories, rollouts, strict=True)
    ]
    return replace(probe, rollouts=rollouts, trajectories=trajectories)


def test_a_masked_eos(parts: Parts, probe: Probe) -> None:
    ended = with_eos(probe)
    assert status(training.eos(parts, ended)) == "ok"
    masked = [replace(t, weights=(1.0, 1.0, 1.0, 0.0)) for t in ended.trajectories]
    found = training.eos(parts, replace(ended, trajectories=masked))
    assert (found.status, found.values["of_which_masked"]) == ("fail", 32)
    cut = [replace(t, response=t.response[:-1]) for t in ended.trajectories]
    assert status(training.eos(parts, replace(ended, trajectories=cut))) == "warning"


def test_an_engine_that_strips_the_eos(parts: Parts, probe: Probe) -> None:
    ended = with_eos(probe)
    stripped = [replace(r, ids=r.ids[:-1], logprobs=r.logprobs[:-1]) for r in ended.rollouts]
    assert status(training.eos(parts, replace(ended, rollouts=stripped))) == "fail"


def test_responses_that_never_end(parts: Parts, probe: Probe) -> None:
    cut = [replace(r, finish_reason="length") for r in probe.rollouts]
    found = training.eos(parts, replace(probe, rollouts=cut))
    assert (found.status, "max_new_tokens" in found.advice) == ("warning", True)


# 9. Teacher = student


def test_the_teacher_is_the_student(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], model_dirs: dict[str, Path]
) -> None:
    code, report = doctor(tiny(teacher__model=str(model_dirs["student"])), tmp_path, capsys)
    assert code == 1
    assert failed(report) == ["teacher_differs"]
    found = by_name(report)["gradient"]
    assert (found["status"], "see teacher_differs" in found["message"]) == ("skipped", True)
    assert by_name(report)["models"]["status"] == "warning"


def test_a_hint_that_changes_nothing(tiny: Tiny) -> None:
    parts = assemble(tiny(method__name="opsd"))
    probe = make_probe(parts)
    assert status(scores.teacher_differs(parts, probe)) != "fail"
    blind = [replace(t, teacher_context=t.student_context) for t in probe.trajectories]
    assert status(scores.teacher_differs(parts, replace(probe, trajectories=blind))) == "fail"


def test_stop_tokens_that_the_models_use_differently(tiny: Tiny, model_dirs: dict[str, Path]) -> None:
    parts = assemble(tiny(rollout__prompts=32, rollout__max_new_tokens=24, rollout__stop_ids=[20]))
    probe = make_probe(parts)
    found = training.eos(parts, probe)
    masses = found.values["end_mass"]
    assert set(masses) == {"student", "teacher"}
    assert all(set(of) == {"2", "20"} and 0 < sum(of.values()) <= 1 for of in masses.values())
    ended = [r for r in probe.rollouts if r.finish_reason == "stop"][:4]
    engine = parts.generators.teacher
    (first,) = engine.score([ended[0].prefix(len(ended[0].ids) - 1)], [(20,)])
    assert masses["teacher"]["20"] >= math.exp(first[0]) / len(ended) - 1e-6
    likeliest = {max(of, key=of.get) for of in masses.values()}
    assert (found.status == "warning") == (len(likeliest) > 1)


# 10. Unreadable answers


@pytest.mark.parametrize("grader", ["math", "exact"])
def test_unreadable_answers(
    grader: str, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"prompt": f"{i}+1=?", "answer": str(i + 1) if i % 2 else f"see page {i}\nof the key"}
        for i in range(10)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    config = tiny(data__train=str(path), data__eval={}, eval__grader=grader)
    code, report = doctor(config, tmp_path, capsys)
    assert (code, failed(report)) == (1, ["answers"])
    assert by_name(report)["answers"]["values"]["unreadable"] == 5


# What else it sees


def test_a_gradient_without_a_teacher(parts: Parts, probe: Probe) -> None:
    class Constant(Shifted):
        def hidden(self, batch: Batch) -> Tensor:
            return torch.ones_like(self.teacher.hidden(batch))

    assert status(training.gradient(parts, probe)) == "ok"
    found = training.gradient(with_teacher(parts, Constant(parts.models.teacher, 0)), probe)
    assert (found.status, "does not depend" in found.advice) == ("fail", True)


@pytest.mark.parametrize(
    "options",
    [
        {"divergence": "forward_kl"},
        {"divergence": "jensen_shannon"},
        {"divergence": "sampled"},
        {"support": "teacher_topk", "support_k": 8},
        {"name": "topd"},
        {"reweight": "divergence"},
    ],
    ids=str,
)
def test_the_gradient_of_every_objective(options: dict[str, Any], tiny: Tiny) -> None:
    parts = assemble(tiny(**{f"method__{k}": v for k, v in options.items()}))
    found = training.gradient(parts, make_probe(parts))
    assert found.status == "ok", found
    assert found.values["norm_with_student_as_teacher"] < 1e-4 * found.values["norm"]


@pytest.mark.parametrize(("window", "expected"), [(1, "ok"), (8, "warning")])
def test_targets_of_another_context(window: int, expected: str, tiny: Tiny) -> None:
    """A window of one token says what the teacher would say right there; behind it, two random models have
    little in common."""
    options = {"method__top_share": 0.2, "method__decide": "all_high_loss", "rollout__max_new_tokens": 24}
    parts = assemble(tiny(method__name="topd", method__window=window, **options))
    found = training.guidance(parts, make_probe(parts))
    assert status(found) == expected
    assert found.values["tokens"] > 10
    assert found.message.startswith(f"{found.values['on_teacher']:.0%} of the targets' mass lies on what")
    assert f"{found.values['on_own']:.0%} on the student's own token" in found.message
    assert ("use method.mass: literal" in found.advice) is (expected == "warning")
    if window == 1:
        assert found.values["on_teacher"] == pytest.approx(1)


def test_likelihood_of_the_students_own_text_is_warned_of(tiny: Tiny) -> None:
    for writer, said in (("student", 1), ("teacher", 0)):
        parts = assemble(tiny(method__divergence="cross_entropy", method__writer=writer))
        assert sum("trains the student on its own samples" in w for w in parts.warnings) == said


def test_an_objective_without_a_teacher_is_not_asked_for_one(tiny: Tiny) -> None:
    parts = assemble(tiny(method__divergence="cross_entropy", method__writer="teacher"))
    assert status(training.gradient(parts, make_probe(parts))) == "skipped"


@pytest.mark.parametrize(
    ("options", "metric", "advice"),
    [
        ({"name": "relay", "delta": 60.0}, "relay_share", "lower method.delta (60)"),
        ({"name": "relay", "delta": 60.0, "from_start": True}, "relay_share", "lower method.delta (60)"),
        ({"name": "relay", "trigger": "fork", "distance": 2.5}, "relay_share", "lower method.distance (2.5)"),
        (
            {"name": "bridge", "distance": 2.5},
            "bridge_share",
            "where one failed no fork reached method.di",
        ),
        ({"name": "truncate", "overlap_below": 0.0}, "truncated_share", "raise method.overlap_below (0)"),
        ({"name": "truncate", "stop_when": "fork", "distance": 2.5}, "truncated_share", "lower method.dis"),
        ({"name": "topd", "decide": "threshold", "threshold": 2.5}, "fork_share", "lower method.threshold"),
    ],
)
def test_a_method_that_finds_nothing_says_so(
    options: dict[str, Any], metric: str, advice: str, tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the first step of a run, and before: it would be OPD, unnoticed, at a higher price."""
    config = tiny(**{f"method__{k}": v for k, v in options.items()}, data__eval={}, optim__steps=2)
    parts = assemble(config)
    found = training.method_kept(parts, make_probe(parts))
    assert status(found) == "warning"
    assert "found nothing to correct in these rollouts" in found.message
    assert advice in found.message
    result = train(config)
    said = capsys.readouterr().err
    assert said.count(f"warning: step 1: {options['name']} found nothing to correct in these rollouts") == 1
    assert advice in said
    rows = (result.directory / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)[metric] for row in rows] == [0, 0]


def test_a_method_that_finds_something_says_nothing(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny(method__name="relay", method__delta=-1.0, data__eval={}, optim__steps=1)
    parts = assemble(config)
    assert status(training.method_kept(parts, make_probe(parts))) == "ok"
    train(config)
    assert "found nothing" not in capsys.readouterr().err


def test_nothing_to_train_on(parts: Parts, probe: Probe) -> None:
    empty = replace(probe, trajectories=[], prepared=Prepared(trajectories=[]))
    assert status(training.method_kept(parts, empty)) == "fail"


def test_a_missing_solution_column(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"{i}+1=?", "answer": str(i + 1)}) + "\n" for i in range(9))
    )
    config = tiny(data__train=str(path), data__eval={}, method__name="opsd")
    code, report = doctor(config, tmp_path, capsys)
    assert code == 1
    assert failed(report) == ["columns", "models"]
    assert by_name(report)["columns"]["values"] == {"without_solution": 9}


def test_problems_that_are_trained_on(tiny: Tiny) -> None:
    found = {f.name: f for f in diagnose(tiny())}
    assert (found["evals"].status, found["evals"].values["trained_on"]) == ("warning", 5)
    assert found["models"].status == "ok", "it is said once"


def test_training_prompts_that_stand_there_twice(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{i % 5}+1=?", "answer": "1"} for i in range(10)]
    for many, status in ((rows, "warning"), (rows[:5], "ok")):
        path.write_text("".join(json.dumps(row) + "\n" for row in many))
        _, found = read_pool(tiny(data__train=str(path), rollout__prompts=4))
        assert (found.status, found.values["different"]) == (status, 5)
        assert ("5 of them are different" in found.message) == (status == "warning")


def test_bad_evaluation_rows_are_said_beside_what_is_trained_on(tiny: Tiny, tmp_path: Path) -> None:
    path, known = tmp_path / "rows.jsonl", Path(tiny().data.train).read_text().splitlines()[0]
    path.write_text(known + "\n{}\n")
    found = {f.name: f for f in diagnose(tiny(data__eval={"few": str(path)}, data__skip_bad=True))}
    assert found["evals"].message.startswith("1 of 1 evaluation problems are also training prompts; ")
    assert found["evals"].message.endswith("bad rows left out: 1 of few")
    assert "; mend the bad rows; the first is" in found["evals"].advice
    assert found["models"].status == "ok"


HARMFUL = {"method__name": "trd", "method__template": "{problem}{attempt}"}


def test_a_rewriter_that_repairs_nothing(tiny: Tiny) -> None:
    """Random models rewrite at random; nothing is written by the offline variant either."""
    config = tiny(**HARMFUL, method__offline=True)
    found = {f.name: f for f in diagnose(config)}
    assert found["refine"].status == "fail"
    assert found["refine"].values["wrong"] == found["refine"].values["attempts"] == 40
    assert not Path(config.run.dir).exists()
    found = {f.name: f for f in diagnose(tiny(**HARMFUL, method__gate=False))}
    assert found["refine"].status == "warning"


def test_a_method_that_cannot_start(tiny: Tiny) -> None:
    """Our own rewrite prompt does not fit these models."""
    found = {f.name: f for f in diagnose(tiny(method__name="trd"))}
    assert list(found) == NAMES
    assert [f.name for f in found.values() if f.status == "fail"] == ["trajectories", "refine", "speed"]
    assert "rewrite prompt" in found["trajectories"].message
    assert found["gradient"].status == "skipped"


def test_user_errors_are_one_sentence(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("optim: {sterps: 3}\n")
    assert main(["doctor", str(path)]) == 2
    assert "did you mean steps?" in capsys.readouterr().err
    with pytest.raises(Exception, match=r"rollout\.temperature must be 1"):
        load_leniently(None, [("method.divergence", "sampled"), ("rollout.temperature", "0.5")])


def test_served_scores_are_read_alike() -> None:
    """Of tokens in the set and outside it; rows move together; a reading has no distance to itself."""
    served = TeacherTopK(
        ids=torch.tensor([[5, 8], [7, 3]]), logp=torch.tensor([[0.6, 0.3], [0.5, 0.25]]).log()
    )
    assert logp_of(served, torch.tensor([8, 4])).exp().tolist() == pytest.approx([0.3, 0.25])
    turned = rows_of(served, torch.tensor([1, 0]))
    assert logp_of(turned, torch.tensor([7, 5])).exp().tolist() == pytest.approx([0.5, 0.6])
    assert scores.distance(served, served).tolist() == [0.0, 0.0]
    louder = replace(served, logp=served.logp - torch.tensor([[0.0, 0.2], [0.0, 0.0]]))
    assert scores.distance(served, louder).tolist() == pytest.approx([0.2, 0.0])


def test_json_has_no_infinity(tiny: Tiny, parts: Parts, probe: Probe) -> None:
    class Short(Passes):
        def score(self, contexts: Any, responses: Any) -> Any:
            return [row[:-1] for row in self.engine.score(contexts, responses)]

    found = scores.engine_logprobs(with_engine(parts, Short(parts.generators.student)), probe.rollouts)
    assert (found.status, found.values["max_gap_nats"]) == ("fail", float("inf")), "a log-prob is missing"
    text = json.dumps(
        Diagnosis(config=parts.config, findings=(found,), seconds=1.0).to_json(), allow_nan=False
    )
    assert json.loads(text)["checks"][0]["values"]["max_gap_nats"] is None


def test_the_printed_report(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(tiny(data__train=str(tmp_path / "gone.jsonl")).to_yaml())
    assert main(["doctor", str(path)]) == 1
    out = capsys.readouterr().out
    assert "fail     data" in out
    assert "gone.jsonl" in out
    assert "2 fail" in out


def test_what_does_not_fit_is_told_what_would(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ended in a traceback just where one asks how many GPUs it takes."""

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr("onpath.run.assemble.make_teacher", full)
    found = list(diagnose(tiny()))
    assert [f.name for f in found] == NAMES
    by_name = {f.name: f for f in found}
    assert by_name["models"].status == "fail"
    assert "CUDA out of memory. Tried to allocate 20.00 GiB" in by_name["models"].message
    assert by_name["fits"].values["layer_8_gib"] > 0
    assert by_name["speed"].status == "skipped"
