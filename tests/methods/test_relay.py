"""relay: token by token as a plain loop over both models would write it; triggers, controls, cost."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from onpath import config as configuration
from onpath.data.batch import Batch, collate
from onpath.engines.decoding.draw import draw
from onpath.engines.decoding.side_by_side import Start, side_by_side
from onpath.engines.forward import Kept, Models, forward, teacher_key
from onpath.engines.hf import HFEngine
from onpath.engines.teacher import ModelTeacher
from onpath.methods import make_method
from onpath.methods.base import Prepared
from onpath.methods.relay import method as relay
from onpath.records import Rollout, Sampling, token_count
from onpath.run.assemble import assemble
from onpath.run.loss import student_states, teacher_states
from onpath.run.parts import Parts
from onpath.system.draws import noise
from onpath.system.errors import UserError
from onpath.training import one_step, sample, train
from tests.methods.family import Tiny, logp_after, logps_along, options_of, parts_of, prepared
from tests.stepping import Recorder, flat, step_on

Written = tuple[tuple[int, ...], tuple[str, ...]]

SERVED = {"teacher__engine": "vllm", "teacher__url": "http://localhost:1"}


def plain_loop(parts: Parts, y: Rollout, place: int, *, delta: float, hold: int) -> Written:
    """The equations of the method's docstring, one token at a time, without cache, rounds or batches."""
    student, teacher = parts.models.student, parts.models.teacher.model
    limit, stops = parts.sampling.max_new_tokens, parts.stops.ids

    def drawn(model: nn.Module, ids: Sequence[int], key: str, position: int) -> tuple[int, float]:
        logits = logp_after(model, y.context + tuple(ids))[None]
        uniform = torch.from_numpy(noise(parts.sampling.seed, key, limit)[[position]])
        token, logp = draw(logits, Sampling(), uniform)
        return int(token), float(logp)

    z: list[int] = []
    writers: list[str] = []
    leg, start = f"step 0/{place}/0", 0
    while len(z) < limit and not (z and z[-1] in stops):
        a, ours = drawn(student, z, leg, len(z) - start)
        theirs = float(logp_after(teacher, y.context + tuple(z))[a])
        if ours - theirs <= delta:
            z.append(a)
            writers.append("student")
            continue
        key = f"step 0/{y.key}/relay {len(z)}/draw"
        for n in range(1 + hold):
            if n == 0 or (z[-1] not in stops and len(z) < limit):
                z.append(drawn(teacher, z, key, n)[0])
                writers.append("teacher")
        start, leg = len(z), f"step 0/{y.key}/relay {len(z)}"
    return tuple(z), tuple(writers)


@pytest.mark.parametrize(
    ("delta", "hold", "window"), [(1.0, 0, 8), (1.0, 0, 3), (1.0, 0, None), (3.0, 0, 1), (3.0, 2, None)]
)
def test_it_is_the_plain_loop(
    delta: float, hold: int, window: int | None, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Side by side in windows, or (None) in rounds."""
    parts = parts_of(tiny, name="relay", delta=delta, hold=hold)
    rollouts = sample(parts, 0)
    asked: list[int] = []

    def relay(self: HFEngine, teacher: HFEngine, starts: Sequence[Start], *args: Any, **named: Any) -> Any:
        asked.append(len(starts))
        return side_by_side(self, teacher, starts, *args, **named, window=window) if window else None

    monkeypatch.setattr(HFEngine, "relay", relay)
    done = parts.method.prepare(rollouts, step=0)
    replaced = 0
    for place, (y, t) in enumerate(zip(rollouts, done.trajectories, strict=True)):
        assert (t.response, t.written_by) == plain_loop(parts, y, place, delta=delta, hold=hold)
        assert t.student_context == t.teacher_context == y.context
        assert (t.edit.kind == "relay") is ("teacher" in t.written_by)
        assert {t.written_by[at] for at in t.edit.detail.get("places", [])} <= {"teacher"}
        replaced += t.written_by.count("teacher")
    assert replaced > 8
    assert bool(asked) is (hold == 0)
    assert done.totals["student_tokens_generated"] > 0
    if window is not None:
        known = [t for t in done.trajectories if done.kept.teacher_hidden(collate([t])) is not None]
        assert any("teacher" in t.written_by for t in known)
    assert any(len(t.edit.detail.get("places", [])) > 1 for t in done.trajectories), "several legs"
    assert replaced <= done.totals["teacher_tokens_generated"] <= replaced + 3 * hold  # the limit cuts some
    assert token_count(done.trajectories) == sum(len(t.response) for t in done.trajectories)


@pytest.mark.parametrize(("delta", "legs"), [(1.0, None), (3.0, None), (0.5, 2)])
def test_from_the_start_is_the_same_loop(delta: float, legs: int | None, tiny: Tiny) -> None:
    """Token by token what relaying finished rollouts gives, with several samples of a prompt; the teacher's
    states serve the loss; less is generated."""
    given = {"name": "relay", "delta": delta, "legs": legs}
    options = options_of(given) | {"rollout__n": 2, "rollout__max_new_tokens": 20}
    after, both = (assemble(tiny(**options, method__from_start=on)) for on in (False, True))
    ys, zs = sample(after, 0), sample(both, 0)
    assert [z.key for z in zs] == [y.key for y in ys]
    made = [p.method.prepare(some, step=0) for p, some in ((after, ys), (both, zs))]
    told = [[(t.response, t.written_by, t.edit.detail.get("places")) for t in m.trajectories] for m in made]
    assert told[1] == told[0]
    assert [(z.ids, z.writers) for z in zs] == [(t.response, t.written_by) for t in made[1].trajectories]
    assert all(t.origin is z for t, z in zip(made[1].trajectories, zs, strict=True))
    for t, other in zip(*(m.trajectories for m in made), strict=True):
        assert t.behaviour_logprobs == pytest.approx(other.behaviour_logprobs, abs=1e-4)
    batch = collate(made[1].trajectories)
    theirs = [teacher_states(both.models, batch, m) for m in (made[1], replace(made[1], kept=Kept()))]
    assert made[1].kept.has_scored(made[1].trajectories)
    torch.testing.assert_close(theirs[0].hidden, theirs[1].hidden, rtol=1e-4, atol=1e-5)
    extra = [m.totals["student_tokens_generated"] for m in made]
    assert sum(len(z.ids) for z in zs) + extra[1] < sum(len(y.ids) for y in ys) + extra[0]
    taught = sum(t.written_by.count("teacher") for t in made[1].trajectories)
    assert made[1].totals["teacher_tokens_generated"] == taught > 0
    again = both.method.prepare(ys, step=0)  # rollouts of the student's own: as ever
    assert [t.response for t in again.trajectories] == [t.response for t in made[0].trajectories]


def test_from_the_start_trains_as_relaying_afterwards_does(tiny: Tiny) -> None:
    given = {"name": "relay", "delta": 1.0}
    steps = []
    for on in (False, True):
        parts = parts_of(tiny, **given, from_start=on)
        optimizer = Recorder(parts.models.student)
        one_step(parts, optimizer, 0)
        steps.append(flat(optimizer.gradients))
    torch.testing.assert_close(*steps, rtol=1e-3, atol=1e-6)


def test_a_prompt_may_be_one_token(tiny: Tiny) -> None:
    """Then there is nothing to read before both write."""
    parts = assemble(tiny())
    student, teacher = parts.generators.student, parts.generators.teacher
    starts = [Start(ids=(i,), position=0, room=12, key="", first=str(i), takeovers=0) for i in (5, 9)]
    found = student.relay(teacher, starts, parts.sampling, delta=8.0)
    assert found is not None
    alone = student.continue_from([s.ids for s in starts], parts.sampling, keys=[s.first for s in starts])
    assert [f.ids for f in found] == [c.ids for c in alone]


def test_batches_do_not_matter(tiny: Tiny) -> None:
    parts = parts_of(tiny, name="relay", delta=1.0)
    rollouts = sample(parts, 0)
    whole = [(t.response, t.written_by) for t in parts.method.prepare(rollouts, step=0).trajectories]
    parts.generators.student.batch_tokens = 90
    tools = replace(parts.tools, models=replace(parts.models, max_tokens=60))
    made = make_method(parts.config.method, tools).prepare(rollouts, step=0).trajectories
    assert [(t.response, t.written_by) for t in made] == whole
    later = make_method(parts.config.method, tools).prepare(rollouts, step=1).trajectories
    assert [(t.response, t.written_by) for t in later] != whole


def test_a_high_delta_is_opd(tiny: Tiny) -> None:
    """Bit for bit, gradients too."""
    relay, opd = parts_of(tiny, name="relay", delta=100.0), parts_of(tiny)
    made = [prepared(parts).trajectories for parts in (relay, opd)]
    assert [t.response for t in made[0]] == [t.response for t in made[1]]
    gradients = [flat(step_on(p, t)[1]) for p, t in zip((relay, opd), made, strict=True)]
    assert torch.equal(*gradients)


def test_what_was_read_on_the_way_serves_the_loss(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = parts_of(tiny, name="relay", delta=3.0)
    done = prepared(parts)
    assert done.kept.teacher, "the rollouts that need nothing"
    monkeypatch.setattr(HFEngine, "relay", lambda *_, **__: None)  # rounds read on the way
    done = prepared(parts)
    known = [t for t in done.trajectories if done.kept.teacher_hidden(collate([t])) is not None]
    ended = [t for t in done.trajectories if t.written_by[-1] == "teacher"]
    assert len(known) == len(done.trajectories) > len(ended) > 0, "those that a takeover has ended too"
    assert any("teacher" in t.written_by for t in known)
    batch, fresh = collate(known), replace(done, kept=Kept())
    theirs = [teacher_states(parts.models, batch, d) for d in (done, fresh)]
    torch.testing.assert_close(theirs[0].hidden, theirs[1].hidden, rtol=1e-4, atol=1e-5)
    ours = [student_states(parts.models, batch, d) for d in (done, fresh)]
    torch.testing.assert_close(*ours, rtol=1e-4, atol=1e-5)


def test_the_reverse_kl_runs_along_z(tiny: Tiny) -> None:
    """The rejected token's position is in the loss, over the whole vocabulary; each token counts once."""
    parts = parts_of(tiny, name="relay", delta=1.0)
    done = prepared(parts)
    meter, _ = step_on(parts, done.trajectories)
    total, count = 0.0, 0
    for t in done.trajectories:
        s, q = (logps_along(m, t) for m in (parts.models.student, parts.models.teacher.model))
        total += float((s.exp() * (s - q)).sum())
        count += len(t.response)
    row = meter.row(parts.models.device)
    assert row["loss"] == pytest.approx(total / count, rel=1e-4)
    assert row["tokens_written_by"]["teacher"] == sum(
        t.written_by.count("teacher") for t in done.trajectories
    )


def places_of(done: Prepared) -> list[list[int]]:
    return [t.edit.detail.get("places", []) for t in done.trajectories]


def test_legs_are_limited(tiny: Tiny) -> None:
    free, two = (prepared(parts_of(tiny, name="relay", delta=0.5, legs=legs)) for legs in (None, 2))
    assert max(map(len, places_of(free))) > 2
    assert max(map(len, places_of(two))) == 2
    assert [p[:2] for p in places_of(free)] == places_of(two)


def test_the_control_draws_itself(tiny: Tiny) -> None:
    """At the first place the same, with no token of the teacher's, and another token than before."""
    given = {"name": "relay", "delta": 1.0, "legs": 1}
    rule, control = (parts_of(tiny, **given, control=c) for c in ("none", "own_token"))
    rollouts = sample(rule, 0)
    theirs, own = (p.method.prepare(rollouts, step=0) for p in (rule, control))
    assert places_of(theirs) == places_of(own)
    assert all(set(t.written_by) <= {"student"} for t in own.trajectories)
    assert own.totals["teacher_tokens_generated"] == 0 < own.totals["student_tokens_generated"]
    changed = [(t, r) for t, r in zip(own.trajectories, rollouts, strict=True) if t.edit.kind == "relay"]
    assert changed
    assert any(t.response != r.ids for t, r in changed)


def test_the_control_takes_over_elsewhere(tiny: Tiny) -> None:
    given = {"name": "relay", "delta": 2.0, "legs": 1}
    rule, control = (parts_of(tiny, **given, control=c) for c in ("none", "random_place"))
    rollouts = sample(rule, 0)
    theirs, lots = (places_of(p.method.prepare(rollouts, step=0)) for p in (rule, control))
    assert list(map(len, theirs)) == list(map(len, lots))
    moved = [a != b for a, b, r in zip(theirs, lots, rollouts, strict=True) if a and len(r.ids) > 1]
    assert moved
    assert all(moved), "never where the rule fires"
    assert lots == places_of(control.method.prepare(rollouts, step=0))


def test_the_control_elsewhere_takes_over_about_as_often() -> None:
    """A place that is drawn late in a leg would settle all before it: half as many takeovers."""
    sections = {"student": {"device": "cpu"}, "teacher": {"device": "cpu"}, "rollout": {"prompts": 24}}
    often = {}
    for control in ("none", "random_place"):
        method = {"name": "relay", "control": control}
        parts = assemble(configuration.build({**sections, "data": {"eval": {}}, "method": method}))
        done = parts.method.prepare(sample(parts, 0), step=0)
        often[control] = done.means["places_per_response"][0]
    assert 0.75 < often["random_place"] / often["none"] < 1.5


def test_forks_trigger_where_topd_finds_them(tiny: Tiny) -> None:
    parts = parts_of(tiny, name="relay", trigger="fork", window=6, distance=0.8, legs=1)
    topd = parts_of(tiny, name="topd", window=6, decide="threshold", threshold=0.8)
    found = places_of(prepared(parts))
    for mine, t in zip(found, prepared(topd).trajectories, strict=True):
        real = [f["position"] for f in t.edit.detail["forks"] if f["decision"] == "fork"]
        assert mine == ([min(real)] if real else [])
    assert any(found)


def test_reflection_triggers_where_the_teacher_would_correct(tiny: Tiny) -> None:
    words = ("w", "7", "x", "3", "e")
    parts = parts_of(tiny, name="relay", trigger="reflection", words=words, reflection_k=5, legs=1)
    opens = {parts.text.renderer.tokenizer.convert_tokens_to_ids(w) for w in words}
    found, expected = places_of(prepared(parts)), []
    for t in prepared(parts_of(tiny)).trajectories:
        s, q = (logps_along(m, t) for m in (parts.models.student, parts.models.teacher.model))
        likeliest, ours = q.argmax(-1).tolist(), s.topk(5).indices.tolist()
        fires = [i for i, v in enumerate(likeliest) if v in opens and v not in ours[i]]
        expected.append(fires[:1])
    assert found == expected
    assert any(found)


def test_first_error_replaces_the_first_wrong_token() -> None:
    """On the gym, whose checker labels every token."""
    tree = {"student": {"device": "cpu"}, "teacher": {"device": "cpu"}, "rollout": {"prompts": 12}}
    method = {"name": "relay", "trigger": "first_error", "legs": 1}
    parts = assemble(configuration.build({**tree, "method": method}))
    rollouts = sample(parts, 0)
    task, renderer = parts.text.task, parts.text.renderer
    assert task is not None
    found = places_of(parts.method.prepare(rollouts, step=0))
    for r, places in zip(rollouts, found, strict=True):
        labels = task.labels(r.prompt.question, renderer.tokens(r.ids))
        assert places == ([labels.index("error")] if "error" in labels else [])
    assert any(found)


def test_paragraphs_end_the_teachers_turn(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = parts_of(tiny, name="relay", delta=1.0, hold=9, paragraphs=2, legs=1)
    monkeypatch.setattr(parts.text.renderer, "text", lambda ids: "\n\n" * (len(ids) // 2))
    turns = [t.written_by.count("teacher") for t in prepared(parts).trajectories if t.edit.kind == "relay"]
    assert turns
    assert max(turns) == 4, "two paragraphs of two tokens each"


def test_no_response_outgrows_the_students_context(tiny: Tiny) -> None:
    """What one row may still write would be too much behind another's longer prompt."""
    parts = parts_of(tiny, name="relay", delta=1.0)
    rollouts = sample(parts, 0)
    assert len({len(r.context) for r in rollouts}) > 1
    room = max(len(r.context) for r in rollouts) + parts.sampling.max_new_tokens
    whole = [t.response for t in parts.method.prepare(rollouts, step=0).trajectories]
    parts.models.student.config.max_position_embeddings = room
    parts.models.teacher.model.config.max_position_embeddings = room
    made = make_method(parts.config.method, parts.tools).prepare(rollouts, step=0).trajectories
    assert [t.response for t in made] == whole


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"divergence": "sampled"}, "use reverse_kl"),
        ({"paragraphs": 3}, "set hold"),
        ({"trigger": "doubt"}, "method.trigger"),
        ({"from_start": True, "hold": 1}, "hold: 0"),
        ({"from_start": True, "trigger": "first_error"}, "trigger: log_ratio"),
        ({"from_start": True, "control": "own_token"}, "control: none"),
    ],
)
def test_impossible_options_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        configuration.build({"method": {"name": "relay", **changes}})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rollout": {"overlap": True}}, "rollout.overlap"),
        ({"rollout": {"refresh": "never"}}, "rollout.refresh"),
        ({"data": {"train": "gym:train?spoil=0.5"}}, "puts errors into the student's own rollouts"),
    ],
)
def test_from_the_start_takes_rollouts_of_this_step_alone(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        configuration.build({"method": {"name": "relay", "from_start": True}, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method__ends": "one"}, "method.ends: one takes several tokens for one: take apart"),
        ({"rollout__stop": ["x"]}, "rollout.stop has strings, which only a whole text shows"),
        ({"rollout__engine": "vllm"}, "rollout.engine is vllm: take hf"),
        ({**SERVED, "method__support": "teacher_topk"}, "teacher.engine is vllm: take hf"),
        ({"data__train": "gym:train?lost=1"}, r"a teacher that is lost \(gym:train\?lost=1\) is two models"),
    ],
)
def test_from_the_start_says_before_it_begins_that_it_cannot(
    changes: dict[str, Any], words: str, tiny: Tiny
) -> None:
    said = f"method.from_start has both models write in this process, token by token, and {words}"
    with pytest.raises(UserError, match=said):
        tiny(method__name="relay", method__from_start=True, **changes)


def test_from_the_start_asks_the_models_whether_it_can(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onpath.engines.hf.accepts_4d_mask", lambda model: False)
    with pytest.raises(UserError, match=r"it needs transformers models that take a mask of onpath's"):
        train(tiny(method__name="relay", method__from_start=True), quiet=True)


def test_legs_leave_nothing_that_the_loss_does_not_use(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is read with a graph: those of all legs would live at once."""
    parts = parts_of(tiny, name="relay", delta=0.5, hold=1)
    graphs: list[int] = []

    def counted(*args: Any, keep: Kept, **options: Any) -> Any:
        graphs.append(len(keep.student))
        return forward(*args, keep=keep, **options)

    monkeypatch.setattr(relay, "forward", counted)
    done = parts.method.prepare(sample(parts, 0), step=0)
    assert len(graphs) > 5, "several legs"
    assert max(graphs) <= 1
    assert done.kept.teacher.keys() <= {teacher_key(t) for t in done.trajectories}
    assert sum(graph.tokens for graph in done.kept.student) <= 1.5 * token_count(done.trajectories)


@pytest.mark.parametrize("delta", [4.25, 4.75])
def test_what_is_known_is_not_read_again(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, delta: float) -> None:
    """Responses that needed nothing take the states of the pass that read them, whatever became of the
    others; the gradient is that of batches which know nothing."""
    parts = parts_of(tiny, name="relay", delta=delta)
    read: dict[str, list[tuple[int, ...]]] = {"teacher": [], "student": []}

    def told(who: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(self: object, batch: Batch, *rest: Any) -> Any:
            read[who] += [t.response for t in batch.trajectories]
            return function(self, batch, *rest)

        return wrapped

    def step(*, forgets: bool) -> tuple[Prepared, torch.Tensor]:
        done: list[Prepared] = []

        def prepare(rollouts: Sequence[Rollout], *, step: int) -> Prepared:
            found = type(parts.method).prepare(parts.method, rollouts, step=step)
            done.append(replace(found, kept=Kept()) if forgets else found)
            for names in read.values():
                names.clear()
            return done[-1]

        monkeypatch.setattr(parts.method, "prepare", prepare)
        recorder = Recorder(parts.models.student)
        one_step(parts, recorder, 0)  # type: ignore[arg-type]
        return done[0], flat(recorder.gradients)

    monkeypatch.setattr(ModelTeacher, "scores", told("teacher", ModelTeacher.scores))
    monkeypatch.setattr(Models, "student_states", told("student", Models.student_states))
    done, found = step(forgets=False)
    changed = [t.response for t in done.trajectories if t.edit.kind != "none"]
    assert 0 < len(changed) < len(done.trajectories)
    assert not read["teacher"], "the windows have read what changed"
    # The student's graph serves where more than two thirds of it are left (6 of 8 rollouts, not 4).
    assert len(read["student"]) == {4.25: len(done.trajectories), 4.75: len(changed)}[delta]
    _, plain = step(forgets=True)
    assert len(read["teacher"]) == len(done.trajectories)
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-7)
