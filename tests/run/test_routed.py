"""Several teachers: each prompt is scored, rewritten and continued by the one that it names."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from onpath import config as configuration
from onpath.commands.doctor.command import run_doctor
from onpath.commands.report.run import gather_run
from onpath.commands.study.config import StudyConfig
from onpath.commands.study.plan import arm_config
from onpath.config.changes import changes
from onpath.config.whole import Config
from onpath.engines.forward import per_token
from onpath.engines.routed import RoutedTeacher
from onpath.methods.base import own_response
from onpath.records import Rollout
from onpath.run.assemble import assemble
from onpath.run.inputs import load_pool
from onpath.run.log import read_lines
from onpath.run.optimizer import make_optimizer
from onpath.run.parts import Parts
from onpath.run.sampling import sample
from onpath.system.errors import UserError
from onpath.training import one_step, train
from tests.conftest import make_model, make_tokenizer
from tests.engines.test_server import fake_of
from tests.methods.family import ARMS, options_of
from tests.run.test_golden import TRD
from tests.run.test_resume import Stopped, contents, stop_at
from tests.system.test_two_processes import COLUMNS, in_ranks

Tiny = Callable[..., Config]
Options = dict[str, Any]

METHODS: dict[str, Options] = {
    "opd": {},
    "written by the teacher": {"method__writer": "teacher", "method__divergence": "cross_entropy"},
    "trd": TRD,
    "trd, minimal": {**TRD, "method__minimal_edit": True, "method__locate": "teacher_logprob"},
    "relay, side by side": {"method__name": "relay", "method__delta": 1.0},
    **{name: options_of(arm) for name, arm in ARMS.items()},
}


def with_one(options: Options, model: str) -> Options:
    """The same with one teacher for all."""
    found = {key: value for key, value in options.items() if not key.startswith("teachers__")}
    return {**found, "data__teacher_column": None, "teacher__model": model}


def weights(run: Path) -> dict[str, Any]:
    """The final ones."""
    return {name: tensor.tolist() for name, tensor in load_file(run / "model" / "model.safetensors").items()}


def alone(parts: Parts, name: str, rollouts: Sequence[Rollout]) -> list[Any]:
    """What one teacher measures on rollouts that name nobody."""
    models = replace(parts.models, teacher=parts.models.teacher.of(name))
    nameless = [replace(r, prompt=replace(r.prompt, teacher=None)) for r in rollouts]
    return per_token(models, [own_response(r) for r in nameless])


def test_each_prompt_is_scored_by_its_teacher(tiny: Tiny, two: Options) -> None:
    parts = assemble(tiny(**two))
    rollouts = sample(parts, 0)
    names = [r.prompt.teacher for r in rollouts]
    assert set(names) == {"math", "code"}
    together = per_token(parts.models, [own_response(r) for r in rollouts])
    each = {name: alone(parts, name, rollouts) for name in ("math", "code")}
    for i, name in enumerate(names):
        other_name = "code" if name == "math" else "math"
        assert together[i]["reverse_kl"] == pytest.approx(each[name][i]["reverse_kl"], abs=1e-5)
        assert together[i]["reverse_kl"] != pytest.approx(each[other_name][i]["reverse_kl"], abs=1e-2)


def test_the_loss_is_that_of_both_plain_loops(tiny: Tiny, two: Options, model_dirs: dict[str, Path]) -> None:
    """Σ over both teachers' tokens ÷ all tokens, and each one's own mean in `teachers`."""
    run = train(tiny(**two, optim__steps=1, run__trajectories_every=1), quiet=True).directory
    (row,) = read_lines(run / "metrics.jsonl")
    parts = assemble(tiny(**two))
    rollouts = sample(parts, 0)
    kls = {}
    for name in ("math", "code"):
        mine = [r for r in rollouts if r.prompt.teacher == name]
        kls[name] = [kl for values in alone(parts, name, mine) for kl in values["reverse_kl"]]
        found = row["teachers"][name]
        assert found["tokens"] == len(kls[name])
        assert found["reverse_kl_nats"] == pytest.approx(sum(kls[name]) / len(kls[name]), abs=1e-5)
        assert found["rollouts"] == len(mine)
        assert 0 < found["overlap"] < 1
    both = [kl for name in kls for kl in kls[name]]
    assert row["loss"] == pytest.approx(sum(both) / len(both), abs=1e-5)
    right = [row["teachers"][name]["accuracy"] * row["teachers"][name]["rollouts"] for name in kls]
    assert sum(right) == pytest.approx(row["accuracy"] * len(rollouts))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_from_two(method: str, tiny: Tiny, two: Options) -> None:
    run = train(tiny(**{**two, **METHODS[method]}, optim__steps=2), quiet=True).directory
    for row in read_lines(run / "metrics.jsonl"):
        tokens = [row["teachers"][name]["tokens"] for name in ("math", "code")]
        assert min(tokens) > 0
        assert sum(tokens) == row["tokens"]


@pytest.mark.parametrize("method", ["opd", "topd", "trd", "relay, side by side"])
def test_one_model_of_two_names_is_one_teacher(
    method: str, tiny: Tiny, two: Options, model_dirs: dict[str, Path]
) -> None:
    options = {**two, **METHODS[method], "optim__steps": 2}
    same = {"model": str(model_dirs["teacher"]), "device": "cpu"}
    config = tiny(**{**options, "teachers__code": same}, run__name="two")
    assert len(assemble(config).models.teacher.models) == 1, "loaded once"
    one = train(tiny(**with_one(options, same["model"]), run__name="one"), quiet=True).directory
    rows = [read_lines(run / "metrics.jsonl") for run in (one, train(config, quiet=True).directory)]
    for a, b in zip(*rows, strict=True):
        assert {k: a[k] for k in COLUMNS} == pytest.approx({k: b[k] for k in COLUMNS}, rel=1e-5, abs=1e-6)


def test_the_teacher_of_all_rows_is_the_only_one(tiny: Tiny, two: Options) -> None:
    """Called default it needs no column; the micro-batches are the same, and so is every bit."""
    options = {**with_one(two, two["teachers__math"]["model"]), "optim__steps": 2}
    one = train(tiny(**options, run__name="one"), quiet=True).directory
    del options["teacher__model"]
    options["teachers__default"] = two["teachers__math"]
    two_ = train(tiny(**options, run__name="two"), quiet=True).directory
    rows = [[{**row, "seconds": 0} for row in read_lines(run / "metrics.jsonl")] for run in (one, two_)]
    assert rows[0] == rows[1]
    assert weights(one) == weights(two_)


def test_engines_answer_in_the_name_of_each_prompt(tiny: Tiny, two: Options) -> None:
    parts = assemble(tiny(**two))
    rollouts, sampling = sample(parts, 0), replace(parts.sampling, max_new_tokens=6)
    keys = [r.key for r in rollouts]
    places = [(i, len(r.ids) // 2) for i, r in enumerate(rollouts)]
    tools, engine = parts.tools, parts.generators.teacher
    answers = tools.in_teachers_name(
        [r.prompt for r in rollouts], [r.context for r in rollouts], sampling, keys=keys
    )
    went_on = tools.teacher_continues(rollouts, places, sampling, keys)
    for i, r in enumerate(rollouts):
        mine = engine.of(r.prompt.teacher)
        assert answers[i].ids == mine.continue_from([r.context], sampling, keys=[keys[i]])[0].ids
        prefix = r.prefix(len(r.ids) // 2)
        assert went_on[i].ids == mine.continue_from([prefix], sampling, keys=[keys[i]])[0].ids
    swapped = [replace(r.prompt, teacher="math" if r.prompt.teacher == "code" else "code") for r in rollouts]
    others = tools.in_teachers_name(swapped, [r.context for r in rollouts], sampling, keys=keys)
    assert [a.ids for a in others] != [a.ids for a in answers], "the two write other things"
    with pytest.raises(UserError, match="token ids do not say whose they are"):
        engine.continue_from([rollouts[0].context], sampling)


def test_another_may_rewrite_than_scores(tiny: Tiny, two: Options, subjects: Path, tmp_path: Path) -> None:
    """The rewriter needs no prompt of its own."""
    path = tmp_path / "code.jsonl"
    path.write_text(subjects.read_text().replace('"math"', '"code"'))
    found = {}
    for rewriter in (None, "math"):
        options = {**two, **TRD, "method__rewriter": rewriter}
        options |= {"data__train": str(path)} if rewriter else {}
        parts = assemble(tiny(**options))
        trained = parts.method.prepare(sample(parts, 0), step=0).trajectories
        found[rewriter] = {(t.origin.key, t.origin.prompt.teacher): t.response for t in trained if t.origin}
    assert {teacher for _, teacher in found["math"]} == {"code"}, "who scores"
    for (key, teacher), ids in found[None].items():
        assert (found["math"][key, "code"] == ids) is (teacher == "math"), "who rewrote"


def test_what_was_read_before_and_what_is_new_come_teacher_by_teacher(tiny: Tiny, two: Options) -> None:
    config = tiny(
        **two, method__name="relay", method__delta=4.75, rollout__max_new_tokens=20, rollout__prompts=16
    )
    parts = assemble(config)
    done = parts.method.prepare(sample(parts, 0), step=0)
    kinds = {(t.teacher, t.edit.kind) for t in done.trajectories}
    assert len(kinds) == 4, "of both teachers some are changed and some are not"
    batches = done.kept.batches(done.trajectories, max_tokens=60, device=torch.device("cpu"))
    found = [rows[0].teacher for rows in batches]
    assert found == sorted(found)
    assert len(found) > 4


def test_an_offloaded_teacher_comes_once_a_step(tiny: Tiny, two: Options) -> None:
    config = tiny(**two, parallel__teacher="offload", optim__micro_batch_tokens=60)
    parts = assemble(config)
    teacher = parts.models.teacher
    assert isinstance(teacher, RoutedTeacher)
    optimizer, schedule = make_optimizer(config, parts.models.student)
    for step in range(2):
        before = teacher.moves
        schedule(step)
        one_step(parts, optimizer, step)
        assert teacher.moves - before in (1, 2)  # one of them may still be there
    whole = train(tiny(**two, optim__micro_batch_tokens=60, run__name="whole"), quiet=True).directory
    moved = train(config, quiet=True).directory
    assert weights(whole) == weights(moved)


def test_one_model_is_at_home_at_a_time() -> None:
    """Devices are those of the next one that is asked for; the other's go back."""

    class Placed(torch.nn.Module):
        where = "cpu"

        def to(self, device: torch.device) -> "Placed":  # type: ignore[override]
            self.where = device.type
            return self

    from onpath.engines.teacher import Teacher

    members = {}
    for name in ("a", "b"):
        members[name] = Teacher()
        members[name].model = Placed()
    homes = {name: torch.device("cuda") for name in members}
    routed = RoutedTeacher(members, homes=homes)
    for name, places in (("a", ["cuda", "cpu"]), ("b", ["cpu", "cuda"]), ("b", ["cpu", "cuda"])):
        routed.of(name)
        assert [m.model.where for m in members.values()] == places  # type: ignore[union-attr]
    assert routed.moves == 2


@pytest.mark.parametrize("method", ["opd", "topd"])
def test_a_stopped_run_goes_on_exactly(
    method: str, tiny: Tiny, two: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {
        **two,
        **METHODS[method],
        "optim__steps": 3,
        "run__save_every": 1,
        "run__trajectories_every": 1,
    }
    whole = train(tiny(**options, run__name="whole"), quiet=True).directory
    config = tiny(**options, run__name="stopped")
    with monkeypatch.context() as patched:
        stop_at(patched, "onpath.training", "store_step", call=2, after=False)
        with pytest.raises(Stopped):
            train(config, quiet=True)
    stopped = train(config, quiet=True).directory
    assert contents(whole / "trajectories") == contents(stopped / "trajectories")
    assert weights(whole) == weights(stopped)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "shard"), [("opd", "none"), ("topd", "layer")])
def test_two_processes_are_one(method: str, shard: str, tiny: Tiny, two: Options, tmp_path: Path) -> None:
    """One of them has fewer micro-batches of a teacher, or none."""
    options = {**two, **METHODS[method], "optim__steps": 2, "rollout__prompts": 3, "optim__lr": 1e-2}
    options |= {"optim__eps": 1e-4, "optim__micro_batch_tokens": 40}
    one = train(tiny(**options, run__name="one"), quiet=True).directory
    config = tiny(**options, run__name="two", parallel__shard=shard, parallel__timeout=30)
    rows = [read_lines(run / "metrics.jsonl") for run in (one, in_ranks(config, tmp_path, processes=2))]
    for a, b in zip(*rows, strict=True):
        assert {k: a[k] for k in COLUMNS} == pytest.approx({k: b[k] for k in COLUMNS}, rel=5e-5, abs=1e-6)
        for name in ("math", "code"):
            mine = {k: v for k, v in a["teachers"][name].items() if v is not None}
            assert mine == pytest.approx({k: b["teachers"][name][k] for k in mine}, rel=5e-5, abs=1e-6)


def test_doctor_looks_at_each(tiny: Tiny, two: Options, model_dirs: dict[str, Path]) -> None:
    found = run_doctor(tiny(**two))
    for name in ("tokens", "template", "teacher_itself", "alignment", "teacher_differs"):
        mine = [f for f in found.findings if f.name == name]
        assert [f.values["teacher"] for f in mine] == ["math", "code"]
        assert all(f.message.startswith(f"teachers.{f.values['teacher']}: ") for f in mine)
        assert "fail" not in {f.status for f in mine}, [f.message for f in mine]
    student = {"teachers__code": {"model": str(model_dirs["student"]), "device": "cpu"}}
    found = run_doctor(tiny(**{**two, **student}))
    differs = [f.status for f in found.findings if f.name == "teacher_differs"]
    assert differs == ["warning", "fail"], "one of the two is the student"


def test_the_report_shows_each(tiny: Tiny, two: Options) -> None:
    page = gather_run(train(tiny(**two, optim__steps=2), quiet=True).directory)
    (section,) = [s for s in page["sections"] if s["title"] == "Teachers"]
    drawn = {chart["title"]: [s["name"] for s in chart["series"]] for chart in section["charts"]}
    assert drawn["Reverse KL(student‖teacher)"] == ["math", "code"]
    assert drawn["Accuracy by teacher"] == ["math", "code"]
    facts = dict(page["facts"])
    assert facts["teacher"].startswith("math: ")


def test_rows_that_name_nobody(tiny: Tiny, two: Options, subjects: Path, tmp_path: Path) -> None:
    """They are the default's, or bad ones."""
    path = tmp_path / "rows.jsonl"
    path.write_text(subjects.read_text() + json.dumps({"id": "bad", "prompt": "1+1=?"}) + "\n")
    options = {**two, "data__train": str(path)}
    with pytest.raises(UserError, match=r"rows.jsonl, line 41: it names no teacher"):
        load_pool(tiny(**options))
    assert load_pool(tiny(**options, data__skip_bad=True)).skipped == 1
    found = load_pool(tiny(**options, teachers__default=two["teachers__math"]))
    assert [p.teacher for p in found.prompts[-3:]] == ["code", "math", "default"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method__name": "opsd"}, "the student is its own teacher; take teachers out"),
        ({"teachers__law": {"engine": "chat", "url": "http://x"}}, "teachers.law.engine: chat"),
        ({"data__teacher_column": None}, "set data.teacher_column"),
        ({"data__train": "gym:train"}, "the rows of gym:train name no teacher"),
        ({**TRD, "method__rewriter": "law"}, "rewriter is 'law'; it must be one of teachers: math, code"),
        ({"method__name": "topd", "method__embedding": "teacher"}, "method.embedding: teacher is for one"),
        ({"teachers__law": {"engine": "vllm", "url": "http://x"}}, "teachers.law.engine: vllm: a server"),
        (
            {"teachers__math": {"device": "cuda:1"}, "parallel__shard": "layer"},
            "teachers.math.device is cuda:1: with parallel.shard",
        ),
    ],
)  # fmt: skip
def test_configs_that_cannot_be(options: Options, words: str, tiny: Tiny, two: Options) -> None:
    with pytest.raises(UserError, match=words):
        tiny(**{**two, **options})


def test_one_teacher_or_several() -> None:
    tree = {"teacher": {"model": "x"}, "teachers": {"math": {}}, "data": {"teacher_column": "of"}}
    with pytest.raises(UserError, match="teacher and teachers are both set"):
        configuration.build(tree)
    found = configuration.build({**tree, "teacher": {}, "data": {"teacher_column": "of", "train": "x.jsonl"}})
    assert configuration.build(found.model_dump(mode="json")) == found, "as a run keeps it"


def test_what_a_resumed_run_may_change_of_each(tiny: Tiny, two: Options) -> None:
    """As of the only one: another spelling of its place, and how a server is asked; not the model."""
    before = tiny(**two).model_dump(mode="json")
    place = two["teachers__math"]["model"]
    spelt = {"model": f"{place}/../{Path(place).name}", "device": "cpu", "timeout": 5.0}
    found = changes(before, tiny(**{**two, "teachers__math": spelt}))
    assert [(c.key, c.allowed) for c in found] == [("teachers.math.timeout", True)]
    found = changes(before, tiny(**{**two, "teachers__math": {"model": "x", "device": "cpu"}}))
    assert [(c.key, c.allowed) for c in found] == [("teachers.math.model", False)]


def test_one_of_two_may_be_served(tiny: Tiny, two: Options, model_dirs: dict[str, Path]) -> None:
    """What a server sends of all ids is what its model gives here."""
    fake = fake_of(model_dirs["teacher"])
    size = len(make_tokenizer())
    options = {**two, "method__support": "teacher_topk", "method__support_k": size, "optim__steps": 1}
    here = train(tiny(**options, run__name="here"), quiet=True).directory
    options["teachers__math"] = {"engine": "vllm", "url": fake.url, "model": str(model_dirs["teacher"])}
    there = train(tiny(**options, run__name="there"), quiet=True).directory
    fake.stop()
    rows = [read_lines(run / "metrics.jsonl")[0]["teachers"] for run in (here, there)]
    for name in ("math", "code"):
        kls = [row[name]["reverse_kl_nats"] for row in rows]
        assert kls[0] == pytest.approx(kls[1], abs=1e-3)


def test_no_arm_of_a_study_is_several_teachers(two: Options, tiny: Tiny) -> None:
    study = StudyConfig.model_validate(
        {
            "name": "s",
            "base": tiny(**two),
            "arms": {"opd": {}, "teacher": "teacher"},
            "budget": {"updates": 1},
        }
    )
    with pytest.raises(UserError, match="arm teacher: there are several teachers"):
        arm_config(study, "teacher")


def test_a_teacher_that_nobody_names(tiny: Tiny, two: Options, tmp_path: Path) -> None:
    config = tiny(**two, teachers__law=two["teachers__math"])
    with pytest.raises(UserError, match=r"teachers.law: none of the 40 rows of .* names it in 'of'"):
        load_pool(config)
    with pytest.raises(
        UserError, match=r"no row has 'subject', which data.teacher_column says is its teacher"
    ):
        load_pool(tiny(**{**two, "data__teacher_column": "subject", "teachers__default": {}}))


def test_vocabularies_that_differ(tiny: Tiny, two: Options, tmp_path: Path) -> None:
    make_model(3).save_pretrained(tmp_path / "law")
    tokens = [*make_tokenizer().get_vocab()]
    tokens[10], tokens[11] = tokens[11], tokens[10]
    make_tokenizer(tokens).save_pretrained(tmp_path / "law")
    wrong = {"model": str(tmp_path / "law"), "device": "cpu"}
    with pytest.raises(
        UserError, match=r"teachers.code.model: student and teacher must share one vocabulary"
    ):
        assemble(tiny(**{**two, "teachers__code": wrong}))


def test_a_method_of_ones_own_must_say_whose_its_trajectories_are(tiny: Tiny, two: Options) -> None:
    parts = assemble(tiny(**two))
    nameless = [replace(own_response(r), origin=None) for r in sample(parts, 0)]
    with pytest.raises(UserError, match="must say by its origin whose it is"):
        per_token(parts.models, nameless)


def test_kept_rollouts_and_scores_of_each(tiny: Tiny, two: Options, tmp_path: Path) -> None:
    """One directory for both, of hidden states of two widths; each teacher reads each response once."""
    options = {**two, "data__limit": 8, "rollout__refresh": "never", "optim__steps": 3, "data__eval": {}}
    cached = {**options, "run__name": "cached"}
    for name in ("teachers__math", "teachers__code"):
        cached[name] = {**two[name], "cache": str(tmp_path / "scores"), "cache_dtype": "float32"}
    plain, kept = (
        read_lines(train(tiny(**o), quiet=True).directory / "metrics.jsonl") for o in (options, cached)
    )
    assert [r["loss"] for r in kept] == pytest.approx([r["loss"] for r in plain], rel=1e-6)
    for a, b in zip(plain, kept, strict=True):
        assert set(b["teachers"]) == {"math", "code"}
        assert b["teachers"]["code"]["reverse_kl_nats"] == pytest.approx(
            a["teachers"]["code"]["reverse_kl_nats"], rel=1e-6
        )
    assert [r["teacher_tokens_scored"] for r in kept] == [kept[0]["tokens"], 0, 0]
