"""OPSD: two contexts and one response, whose weights the teacher has, and what it refuses."""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from onpath import config as configuration
from onpath.commands.doctor.command import run_doctor
from onpath.config.methods.opsd import OPSDOptions
from onpath.config.whole import Config
from onpath.data.batch import collate
from onpath.engines.forward import per_token
from onpath.engines.teacher import SelfTeacher
from onpath.methods import Prepared, make_method
from onpath.methods.opsd import misled, neighbours
from onpath.records import Trajectory
from onpath.run import checkpoint
from onpath.run.assemble import assemble
from onpath.run.log import read_lines
from onpath.run.loss import Step, loss_of
from onpath.system.errors import UserError
from onpath.training import sample, train
from tests.conftest import make_model
from tests.methods.test_trd import attempt, ids, logps

TEMPLATE = "{problem} ref:{solution} now:"


def test_worked_example(tiny: Callable[..., Config]) -> None:
    parts = assemble(tiny(method__name="opsd", method__template=TEMPLATE, method__diagnose_every=0))
    y = attempt("so 13<eos>")
    (t,) = parts.method.prepare([y], step=0).trajectories
    assert t.student_context == ids("<bos>7+5=?<sol>")
    assert t.teacher_context == ids("<bos>7+5=? ref:7 plus 5 now:<sol>")
    assert t.response == ids("so 13<eos>")
    assert t.origin is y
    assert t.edit.kind == "none"
    batch = collate([t])
    assert batch.student_at_N.tolist() == list(range(6, 12))
    assert batch.teacher_at_N.tolist() == list(range(24, 30))
    assert batch.weight_N.tolist() == [1.0] * 6


def test_the_answer_alone_as_a_hint(tiny: Callable[..., Config]) -> None:
    options = {"method__hint": "answer", "method__template": "{problem} it is {answer}."}
    parts = assemble(tiny(method__name="opsd", method__diagnose_every=0, **options))
    (t,) = parts.method.prepare([attempt("13<eos>")], step=0).trajectories
    assert t.teacher_context == ids("<bos>7+5=? it is 12.<sol>")


def test_our_own_wording_shows_problem_and_solution(tiny: Callable[..., Config]) -> None:
    parts = assemble(tiny())  # our wording does not fit a tiny model, but it can be rendered
    method = make_method(OPSDOptions(diagnose_every=0), parts.tools)
    (t,) = method.prepare([attempt("13<eos>")], step=0).trajectories
    text = parts.text.renderer.text(t.teacher_context)
    assert text.startswith("7+5=?")
    assert text.index("7 plus 5") > 5


def loss(parts: Any, trajectories: Sequence[Any], clip: float | None) -> float:
    """Forward KL in float64 by full softmax, entries capped, token mean."""
    total, count = 0.0, 0
    for t in trajectories:
        ours = logps(parts.models.student.eval(), t.student_context, t.response)
        with parts.models.teacher.acting() as model:
            theirs = logps(model, t.teacher_context, t.response)
        terms = theirs.exp() * (theirs - ours)
        total += float((terms if clip is None else terms.clamp(max=clip)).sum())
        count += len(t.response)
    return total / count


@pytest.mark.parametrize("clip", [0.05, 0.01, None])
def test_clipped_forward_kl(tiny: Callable[..., Config], clip: float | None) -> None:
    config = tiny(method__name="opsd", method__template=TEMPLATE, method__entry_clip=clip, optim__steps=1)
    parts = assemble(config)
    expected = loss(parts, parts.method.prepare(sample(parts, 0), step=0).trajectories, clip)
    row = json.loads((train(config, quiet=True).directory / "metrics.jsonl").read_text())
    assert row["loss"] == pytest.approx(expected, abs=1e-5)
    assert abs(expected) > 1e-3, "below 0 where the cap bites: a clipped divergence is none"


@pytest.mark.parametrize("lora", [0, 4])
@pytest.mark.parametrize("weights", ["base", "live", "ema"])
def test_whose_weights_the_teacher_has(tiny: Callable[..., Config], lora: int, weights: str) -> None:
    options = {"method__weights": weights, "method__ema_decay": 0.75, "student__lora_rank": lora}
    parts = assemble(tiny(method__name="opsd", method__template=TEMPLATE, **options))
    batch = collate(parts.method.prepare(sample(parts, 0), step=0).trajectories)
    before = parts.models.teacher.hidden(batch)
    trained = [p for p in parts.models.student.parameters() if p.requires_grad]
    starts = [p.detach().clone() for p in trained]
    with torch.no_grad():
        for p in trained:
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())), alpha=0.3)
    assert bool((parts.models.teacher.hidden(batch) == before).all()) == (weights != "live")
    parts.models.teacher.follow()
    state = parts.models.teacher.state()
    if weights == "base":
        assert torch.equal(parts.models.teacher.hidden(batch), before)
    if weights != "ema":
        assert not state
        return
    average = dict(parts.models.teacher.model.named_parameters())
    names = [n for n, p in parts.models.student.named_parameters() if p.requires_grad]
    for name, start, p in zip(names, starts, trained, strict=True):
        torch.testing.assert_close(average[name], 0.75 * start + 0.25 * p.detach())
        assert torch.equal(state[f"ema.{name}"], average[name])


@pytest.mark.parametrize(("weights", "lora"), [("base", 0), ("ema", 0), ("ema", 4)])
def test_killed_and_resumed_is_the_same_run(tiny: Callable[..., Config], weights: str, lora: int) -> None:
    options = {"method__name": "opsd", "method__template": TEMPLATE, "method__weights": weights}
    options |= {"student__lora_rank": lora}
    whole = train(tiny(**options, run__save_every=1, run__keep=3, run__name="whole"), quiet=True).directory
    config = tiny(**options, run__save_every=1, run__keep=3, run__name="cut")
    cut = train(config, quiet=True).directory
    for name in ("model", "checkpoints/step_3", "checkpoints/step_2"):
        for file in (cut / name).iterdir():
            file.unlink()
        (cut / name).rmdir()
    train(config, quiet=True)
    rows = [[json.loads(x) for x in (d / "metrics.jsonl").read_text().splitlines()] for d in (whole, cut)]
    assert [{**r, "seconds": 0} for r in rows[0]] == [{**r, "seconds": 0} for r in rows[1]]


def test_diagnostics_split_by_verdict(tiny: Callable[..., Config]) -> None:
    parts = assemble(tiny(method__name="opsd", method__template=TEMPLATE))
    attempts = [attempt("13<eos>"), attempt("12<eos>"), attempt("so 12<eos>")]
    method = make_method(
        OPSDOptions(template=TEMPLATE), replace(parts.tools, text=replace(parts.text, correction_ids=(30,)))
    )
    prepared = method.prepare(attempts, step=0)
    by_verdict: dict[str, list[float]] = {"right": [], "wrong": []}
    for t, name in zip(prepared.trajectories, ("wrong", "right", "wrong"), strict=True):
        ours = logps(parts.models.student.eval(), t.student_context, t.response)
        theirs = logps(parts.models.teacher.model, t.teacher_context, t.response)
        by_verdict[name] += (ours.exp() * (ours - theirs)).sum(-1).tolist()
    for name, values in by_verdict.items():  # the exact grader: the last line is the answer, and no more
        total, count = prepared.means[f"reverse_kl_y_{name}_nats"]
        assert count == len(values)
        assert total == pytest.approx(sum(values), abs=1e-5)
    assert method.prepare(attempts, step=1).means
    rarely = make_method(OPSDOptions(template=TEMPLATE, diagnose_every=2), parts.tools)
    assert not rarely.prepare(attempts, step=1).means


@pytest.mark.parametrize(("column", "hint"), [("solution", "solution"), ("answer", "answer")])
def test_missing_columns_stop_before_models_load(
    tiny: Callable[..., Config], tmp_path: Path, column: str, hint: str
) -> None:
    path = tmp_path / "rows.jsonl"
    whole = {"id": "a", "prompt": "1+1=?", "answer": "2", "solution": "one and one"}
    for other in ({**whole, column: "  "}, {k: v for k, v in whole.items() if k != column}):
        path.write_text(json.dumps(whole) + "\n" + json.dumps({**other, "id": "b"}) + "\n")
        config = tiny(
            method__name="opsd",
            method__hint=hint,
            data__train=str(path),
            student__model="/nowhere",
            rollout__prompts=2,
        )
        with pytest.raises(
            UserError, match=f"opsd needs the column {column} for .* 1 of 2|line 2: .* is empty"
        ):
            assemble(config)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"template": "{problem}"}, "the slots {problem}, {solution}; it has {problem}"),
        ({"template": "{problem} {solution}", "hint": "answer"}, "the slots {answer}, {problem}"),
        ({"weights": "old"}, "base"),
    ],
)
def test_impossible_options(tiny: Callable[..., Config], method: dict[str, Any], message: str) -> None:
    data = tiny().model_dump(mode="json")
    data["method"] = {"name": "opsd", **method}
    with pytest.raises(UserError) as raised:
        configuration.build(data)
    assert message in str(raised.value)


def test_the_gym_has_no_prompt_with_the_answer_alone() -> None:
    with pytest.raises(UserError, match="use hint: solution"):
        configuration.build({"method": {"name": "opsd", "hint": "answer"}})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_average_moves_whatever_the_students_dtype(dtype: torch.dtype) -> None:
    """500 follows at 0.99 leave 0.99^500 of the way."""
    student = make_model(0).to(dtype)
    teacher = SelfTeacher(student, weights="ema", decay=0.99)
    start = {n: p.detach().float().clone() for n, p in teacher.model.named_parameters()}
    goal = {n: p.detach().float().clone() for n, p in make_model(1).to(dtype).named_parameters()}
    student.load_state_dict({n: goal[n] for n in goal}, strict=False)
    for _ in range(500):
        teacher.follow()
    away = sum(float((p - goal[n]).norm() ** 2) for n, p in teacher.model.named_parameters()) ** 0.5
    whole = sum(float((start[n] - goal[n]).norm() ** 2) for n in goal) ** 0.5
    assert away / whole == pytest.approx(0.99**500, rel=1e-2)
    assert all(v.dtype == torch.float32 for v in teacher.state().values())
    batch = collate([Trajectory(student_context=(1,), teacher_context=(1, 9), response=(5, 2))])
    assert bool(teacher.scores(batch).hidden.isfinite().all())


@pytest.mark.parametrize("lora", [0, 4])
@pytest.mark.parametrize("weights", ["base", "live", "ema"])
def test_a_teacher_that_is_the_student_has_nothing_to_teach(
    tiny: Callable[..., Config], weights: str, lora: int
) -> None:
    """Under autocast too: both read the same tokens with the same weights."""
    options = {"method__name": "opsd", "method__shown": "none", "method__weights": weights, "optim__steps": 1}
    for half in (False, True):
        config = tiny(**options, student__lora_rank=lora, optim__bf16=half, run__name=f"half-{half}")
        (row,) = read_lines(train(config, quiet=True).directory / "metrics.jsonl")
        assert abs(row["loss"]) < 1e-7
        assert row["grad_norm"] < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_average_of_an_adapter_has_the_base_once(tiny: Callable[..., Config], dtype: str) -> None:
    """It holds, moves and stores what trains, and reads the student's own other weights."""
    options = {"method__weights": "ema", "student__lora_rank": 4, "student__dtype": dtype}
    parts = assemble(tiny(method__name="opsd", method__template=TEMPLATE, **options))
    student, teacher = parts.models.student, parts.models.teacher
    theirs = dict(student.named_parameters())
    own = [n for n, p in teacher.models[0].named_parameters() if p is not theirs[n]]
    assert own == [n for n, p in theirs.items() if p.requires_grad]
    assert {*teacher.state()} == {f"ema.{n}" for n in own}
    assert all(p.dtype == torch.float32 for p in teacher.state().values())
    assert all(p.dtype == getattr(torch, dtype) for p in theirs.values() if not p.requires_grad)


def test_a_checkpoint_with_an_average_of_all_weights_is_gone_on_from(tiny: Callable[..., Config]) -> None:
    """As earlier versions wrote it."""
    options = {"method__name": "opsd", "method__template": TEMPLATE, "method__weights": "ema"}
    config = tiny(**options, student__lora_rank=4, run__save_every=1, run__keep=3, data__eval={})
    run = train(config, quiet=True).directory
    expected = load_file(run / "model" / "adapter_model.safetensors")
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "checkpoints" / "step_3")
    step, student = run / "checkpoints" / "step_2", assemble(config).models.student
    stored = load_file(step / "method.safetensors")
    base = {f"ema.{n}": p.detach().clone() for n, p in student.named_parameters() if not p.requires_grad}
    save_file({**stored, **base}, step / "method.safetensors")
    state = json.loads((step / "state.json").read_text())
    state["blake2b"]["method.safetensors"] = checkpoint._digest(step / "method.safetensors")
    (step / "state.json").write_text(json.dumps(state))
    train(config, quiet=True)
    found = load_file(run / "model" / "adapter_model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert {*load_file(run / "checkpoints" / "step_3" / "method.safetensors")} == {*stored}


@pytest.mark.parametrize(
    ("shown", "context"),
    [
        ("own", "<bos>7+5=? ref:7 plus 5 now:<sol>"),
        ("none", "<bos>7+5=?<sol>"),
        ("foreign", "<bos>7+5=? ref:9 times 2 is 18 now:<sol>"),
        ("wrong", "<bos>7+5=? ref:7 plus 5 18 now:<sol>"),
    ],
)
def test_what_the_controls_show(shown: str, context: str, tiny: Callable[..., Config]) -> None:
    y = attempt("so 13<eos>")
    other = replace(y.prompt, id="other", text="9*2=?", solution="9 times 2 is 18", answer="18")
    options = {"method__shown": shown, "method__template": TEMPLATE, "method__diagnose_every": 0}
    method = assemble(tiny(method__name="opsd", **options)).method
    method.check([y.prompt, replace(y.prompt, id="same answer"), other])
    (t,) = method.prepare([y], step=0).trajectories
    assert t.teacher_context == ids(context)
    assert t.student_context == ids("<bos>7+5=?<sol>")


def test_a_wrong_hint_is_wrong_in_its_last_answer() -> None:
    x = replace(attempt("4<eos>").prompt, solution="12 and 12 is so 12.", answer="12")
    assert misled(x, replace(x, answer="7"), wrong=True).solution == "12 and 12 is so 7."
    assert (
        misled(replace(x, answer="99"), replace(x, answer="7"), wrong=True).solution
        == "12 and 12 is so 12. 7"
    )
    assert misled(x, replace(x, solution="other"), wrong=False).solution == "other"
    y = replace(x, solution="It is 2. That took 12 words, 2.5 s.", answer="2")
    assert misled(y, replace(x, answer="7"), wrong=True).solution == "It is 7. That took 12 words, 2.5 s."


def test_a_neighbour_is_the_next_with_another_answer() -> None:
    """As looking for it one by one finds it."""
    for answers in ("aabba", "abc", "aaaa", "a", "abaab"):
        pool = [replace(attempt("4<eos>").prompt, id=str(i), answer=a) for i, a in enumerate(answers)]
        found = {p.id: other.id for p, other in neighbours(pool, "answer")}
        for i, p in enumerate(pool):
            ahead = [*pool[i + 1 :], *pool[:i]]
            assert found[p.id] == next((q for q in ahead if q.answer != p.answer), p).id


def test_a_foreign_solution_is_another_ones_where_there_are_no_answers(tiny: Callable[..., Config]) -> None:
    options = {"method__shown": "foreign", "method__template": TEMPLATE, "method__diagnose_every": 0}
    method = assemble(tiny(method__name="opsd", **options)).method
    y = attempt("so 13<eos>")
    own = replace(y.prompt, answer=None)
    method.check([own, replace(own, id="same"), replace(own, id="other", solution="9 times 2 is 18")])
    (t,) = method.prepare([replace(y, prompt=own)], step=0).trajectories
    assert t.teacher_context == ids("<bos>7+5=? ref:9 times 2 is 18 now:<sol>")
    with pytest.raises(UserError, match="shows another problem's solution, and all 2 have the same or none"):
        method.check([own, replace(own, id="same")])


def test_a_wrong_answer_alone_is_a_foreign_one(tiny: Callable[..., Config]) -> None:
    options = {"method__hint": "answer", "method__template": "{problem} {answer}"}
    with pytest.raises(UserError, match="use hint: solution, or shown: foreign"):
        tiny(method__name="opsd", method__shown="wrong", **options)


def test_a_contrast_is_what_the_own_hint_says_less_what_a_wrong_one_says(tiny: Callable[..., Config]) -> None:
    """The advantage of each token by two readings of the student's own start, and the loss that has it."""
    options = {"method__name": "opsd", "method__template": TEMPLATE, "method__diagnose_every": 0}
    sampled = {**options, "method__divergence": "sampled", "method__entry_clip": None}
    y = attempt("so 13<eos>")
    other = replace(y.prompt, id="other", text="9*2=?", solution="9 times 2 is 18", answer="18")
    pairs, parts = {}, None
    for shown in ("own", "wrong", "contrast"):
        parts = assemble(tiny(**sampled, method__shown=shown))
        parts.method.check([y.prompt, other])
        (pairs[shown],) = parts.method.prepare([y], step=0).trajectories
    assert parts is not None
    assert pairs["contrast"].teacher_context == pairs["own"].teacher_context
    own, wrong = ([*per_token(parts.models, [pairs[name]])[0]["teacher_logp"]] for name in ("own", "wrong"))
    expected = [a - b for a, b in zip(own, wrong, strict=True)]
    assert max(map(abs, expected)) > 0.01
    assert pairs["contrast"].advantages == pytest.approx(expected, abs=1e-6)
    batch = collate([pairs["contrast"]])
    step = Step(
        prepared=Prepared(trajectories=[pairs["contrast"]]), objective=parts.objective, denominator=1.0
    )
    found = loss_of(parts.models, batch, parts.models.teacher.scores(batch), step)
    assert found.loss.item() == pytest.approx(-sum(expected), rel=1e-4)
    found.loss.backward()
    weights = dict(parts.models.student.named_parameters())
    formed = {name: p.grad.clone() for name, p in weights.items() if p.grad is not None}
    parts.models.student.zero_grad()
    t = pairs["contrast"]
    logits = parts.models.student(torch.tensor([[*t.student_context, *t.response]])).logits
    logp_NV = logits[0, len(t.student_context) - 1 : -1, : parts.models.vocabulary].log_softmax(-1)
    of_tokens = logp_NV.gather(-1, torch.tensor(t.response)[:, None])[:, 0]
    (-(torch.tensor(expected) * of_tokens).sum()).backward()
    for name, grad in formed.items():
        assert torch.allclose(grad, weights[name].grad, rtol=1e-3, atol=1e-5), name  # type: ignore[arg-type]
    mixed = collate([pairs["contrast"], pairs["own"]])
    with pytest.raises(UserError, match="must give them to all"):
        loss_of(parts.models, mixed, parts.models.teacher.scores(mixed), step)


def test_a_contrast_needs_the_sampled_token(tiny: Callable[..., Config]) -> None:
    for options in (
        {},
        {"method__divergence": "sampled", "method__entry_clip": None, "method__discount": 0.5},
    ):
        with pytest.raises(UserError, match=r"set method\.divergence: sampled"):
            tiny(method__name="opsd", method__shown="contrast", **options)


@pytest.mark.parametrize("refresh", ["always", "never"])
def test_contrast_trains(refresh: str, tiny: Callable[..., Config]) -> None:
    options = {"method__template": TEMPLATE, "method__divergence": "sampled", "method__entry_clip": None}
    options |= {"rollout__refresh": refresh, "method__ppo_clip": 0.2 if refresh == "never" else None}
    runs = [
        train(
            tiny(method__name="opsd", method__shown=shown, run__name=shown, **options), quiet=True
        ).directory
        for shown in ("own", "contrast")
    ]
    losses = [[row["loss"] for row in read_lines(run / "metrics.jsonl")] for run in runs]
    assert losses[0] != losses[1]
    assert all(math.isfinite(x) for x in losses[1])


def test_a_contrast_of_weights_that_move_is_not_kept(tiny: Callable[..., Config]) -> None:
    options = {"method__divergence": "sampled", "method__entry_clip": None, "method__ppo_clip": 0.2}
    options |= {"rollout__refresh": {"every": 2}, "method__shown": "contrast"}
    tiny(method__name="opsd", **options)
    with pytest.raises(UserError, match=r"set method\.weights: base"):
        tiny(method__name="opsd", method__weights="ema", **options)


def test_the_longer_hint_of_a_contrast_must_fit(tiny: Callable[..., Config]) -> None:
    options = {"method__template": TEMPLATE, "method__divergence": "sampled", "method__entry_clip": None}
    method = assemble(tiny(method__name="opsd", method__shown="contrast", **options)).method
    x = attempt("4<eos>").prompt
    with pytest.raises(UserError, match="does not fit the model's context"):
        method.check([x, replace(x, id="long", answer="9" * 600)])


def test_a_hint_must_leave_room_for_the_response(tiny: Callable[..., Config]) -> None:
    """It may fit alone, and not with what is written behind it."""
    options = {"method__template": "{problem} ref:{answer} now:", "method__hint": "answer"}
    parts = assemble(tiny(method__name="opsd", **options))
    room = parts.models.teacher.context_length
    x = replace(attempt("4<eos>").prompt, answer="9")
    free = room - len(parts.method.privileged(x, "own")) - parts.sampling.max_new_tokens + 1
    parts.method.check([replace(x, id="just", answer="9" * free)])
    with pytest.raises(UserError, match=f"'long' with its answer has .* of {room}: drop it"):
        parts.method.check([replace(x, id="long", answer="9" * (free + 1))])


def test_the_doctor_has_nothing_to_say_of_given_advantages(tiny: Callable[..., Config]) -> None:
    options = {"method__template": TEMPLATE, "method__divergence": "sampled", "method__entry_clip": None}
    report = run_doctor(tiny(method__name="opsd", method__shown="contrast", **options))
    (found,) = [f for f in report.findings if f.name == "gradient"]
    assert found.status == "skipped"
