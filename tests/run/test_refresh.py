"""`rollout.refresh`: rollouts of older weights, kept with what the method made of them."""

import copy
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from onpath.commands.cli import main
from onpath.config.methods import MethodOptions
from onpath.config.whole import Config
from onpath.data.load import prompts_of_step
from onpath.engines.hf import HFEngine
from onpath.methods.base import Method, Prepared, own_response
from onpath.records import Edit, Guidance, Rollout, Trajectory
from onpath.run.assemble import assemble
from onpath.run.log import flatten, read_lines
from onpath.run.optimizer import make_optimizer
from onpath.run.refresh import _as_row, _trajectory, overlap
from onpath.run.sampling import prepare, sample
from onpath.system.errors import UserError
from onpath.training import one_step, train
from tests.forks import TIMEOUT, done_by_two, free_ports
from tests.run.test_resume import Stopped, contents, stop_at
from tests.stored import read_trajectories

Tiny = Callable[..., Config]
TRD = {"method__name": "trd", "method__template": "{problem} {attempt}", "method__gate": False}
METHODS: dict[str, dict[str, Any]] = {
    "opd": {"rollout__n": 2},
    "opsd": {"method__name": "opsd", "method__weights": "ema", "method__ema_decay": 0.5},
    "trd": TRD,
    "topd": {"method__name": "topd", "method__window": 4, "method__top_share": 0.5},
    "spliced": {"method__name": "topd", "method__window": 4, "method__plan": "spliced"},
    "relay": {"method__name": "relay", "method__delta": 2.0},
    "branch": {"method__name": "branch", "method__branches": 2},
    "bridge": {"method__name": "bridge", "method__window": 4, "method__keep": "all"},
    "truncate": {"method__name": "truncate", "method__stop_when": "low_kl", "method__window": 3},
}
FAST = {"optim__lr": 0.02, "data__eval": {}}


def rows_of(config: Config) -> list[dict[str, Any]]:
    return read_lines(train(config, quiet=True).directory / "metrics.jsonl")


@pytest.mark.parametrize("name", METHODS)
def test_every_step_is_always(name: str, tiny: Tiny) -> None:
    """Each phase one step long: the same draws, the same trajectories; hidden states are computed anew."""
    options = {**FAST, **METHODS[name], "optim__steps": 3}
    always, every = (
        rows_of(tiny(**options, run__name=how, rollout__refresh=rule))
        for how, rule in (("always", "always"), ("every", {"every": 1}))
    )
    for a, b in zip(always, every, strict=True):
        one, two = (flatten({k: v for k, v in row.items() if "seconds" not in k}) for row in (a, b))
        assert one.keys() == two.keys()
        assert two == pytest.approx(one, rel=2e-4, abs=1e-6)


def test_phases_are_those_of_copies(tiny: Tiny) -> None:
    """Against the same done by hand: a copy of the weights with which each phase begins samples."""
    run = train(tiny(**FAST, optim__steps=5, rollout__refresh={"every": 2}), quiet=True).directory
    lines = read_lines(run / "metrics.jsonl")
    assert [r["staleness"] for r in lines] == [0, 1, 0, 1, 0]
    assert [p.name for p in sorted((run / "rollouts").glob("phase_*"))] == [
        f"phase_00000{i}" for i in (0, 2, 4)
    ]

    parts = assemble(tiny(**FAST, optim__steps=5))
    optimizer, schedule = make_optimizer(parts.config, parts.models.student)
    parts.config.__dict__["rollout"] = parts.config.rollout.model_copy(update={"max_staleness": 9})
    losses = []
    for step in range(5):
        if step % 2 == 0:
            writer = HFEngine(
                copy.deepcopy(parts.models.student),
                parts.text.renderer,
                stop_ids=parts.generators.student.stop_ids,
                vocabulary=parts.models.vocabulary,
            )
        schedule(step)
        losses.append(one_step(replace(parts, sampler=writer), optimizer, step).sums["loss"])
    assert [r["loss"] for r in lines] == pytest.approx(losses, rel=1e-6)
    fresh = rows_of(tiny(**FAST, optim__steps=5, run__name="fresh"))
    assert fresh[1]["loss"] != pytest.approx(lines[1]["loss"], rel=1e-3), "old rollouts are others"
    assert fresh[0]["loss"] == lines[0]["loss"]


def test_never_writes_each_prompt_once(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three passes over a pool of one step: sampled once, and the first step pays for it."""
    asked: list[int] = []
    plain = HFEngine.continue_from

    def counting(self: HFEngine, prefixes: Any, *rest: Any, **named: Any) -> Any:
        asked.append(len(prefixes))
        return plain(self, prefixes, *rest, **named)

    config = tiny(**FAST, **METHODS["relay"], data__limit=8, rollout__refresh="never", run__save_every=1)
    parts = assemble(config)
    optimizer, _ = make_optimizer(config, parts.models.student)
    monkeypatch.setattr(HFEngine, "continue_from", counting)
    found = []
    for step in range(3):
        before = len(asked)
        meter = one_step(parts, optimizer, step)
        found.append(sorted((r.prompt.id, r.ids) for r in meter.rollouts))
        row = meter.row(parts.models.device)
        assert (len(asked) > before) == (row["student_tokens_generated"] > 0) == (step == 0)
        assert (row["teacher_tokens_generated"] > 0) == (step == 0)
        assert row["loss"] > 0
    assert found[0] == found[1] == found[2]


def test_offline_is_never(tiny: Tiny) -> None:
    one = rows_of(tiny(**FAST, **TRD, method__offline=True, run__name="one"))
    two = rows_of(tiny(**FAST, **TRD, rollout__refresh="never", run__name="two"))
    assert [{**r, "seconds": 0} for r in one] == [{**r, "seconds": 0} for r in two]
    assert [r["staleness"] for r in one] == [0, 1, 2]


def test_overlap_is_the_mass_in_common(tiny: Tiny) -> None:
    """Its expectation over tokens is Σ min(π, μ): summed here over all first tokens of the vocabulary."""
    parts = assemble(tiny())
    student = parts.models.student
    prompt = parts.prompts.pool[0]
    (rollout,) = parts.sampler.generate([prompt], parts.sampling)
    assert overlap([rollout], parts.generators.student) == pytest.approx(1.0, abs=1e-5)

    def first_logp() -> torch.Tensor:
        with torch.no_grad():
            logits = student(torch.tensor([rollout.context])).logits[0, -1, : parts.models.vocabulary]
        return logits.double().log_softmax(-1)

    mu = first_logp()
    with torch.no_grad():
        for p in student.parameters():
            p.mul_(1.3)
    pi = first_logp()
    exact = float(torch.minimum(pi.exp(), mu.exp()).sum())
    terms = [
        overlap([replace(rollout, ids=(v,), logprobs=(float(mu[v]),))], parts.generators.student)
        for v in range(len(mu))
    ]
    expected = sum(float(p) * t for p, t in zip(mu.exp(), terms, strict=True))
    assert exact < 0.99
    assert expected == pytest.approx(exact, abs=1e-5)
    assert overlap([], parts.generators.student) == 1.0


@pytest.mark.parametrize(("below", "phases"), [(0.9999, [0, 1, 2, 3]), (0.01, [0])])
def test_refreshed_when_the_student_has_moved(below: float, phases: list[int], tiny: Tiny) -> None:
    options = {**FAST, "optim__steps": 4, "optim__warmup": 0.0, "optim__schedule": "constant"}
    run = train(tiny(**options, rollout__refresh={"overlap_below": below}), quiet=True).directory
    lines = read_lines(run / "metrics.jsonl")
    assert [int(p.name[-6:]) for p in sorted((run / "rollouts").glob("phase_*"))] == phases
    measured = [r.get("rollout_overlap") for r in lines]
    assert measured[0] is None, "nothing to compare with"
    assert all(m is not None and 0 < m < 1 for m in measured[1:])
    stale = [step - max(p for p in phases if p <= step) for step in range(4)]
    assert [r["staleness"] for r in lines] == stale
    if len(phases) == 1:
        assert measured[3] < measured[1], "it moves on"


def test_both_rules(tiny: Tiny) -> None:
    rule = {"every": 2, "overlap_below": 0.01}
    rows = rows_of(tiny(**FAST, optim__steps=4, rollout__refresh=rule))
    assert [r["staleness"] for r in rows] == [0, 1, 0, 1]


@pytest.mark.parametrize("name", ["trd", "truncate"])
@pytest.mark.parametrize("call", [2, 4])
def test_killed_and_resumed_is_the_same_run(
    name: str, call: int, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a phase, and where one has been written but not trained on; `truncate` has a state
    that moves while it prepares."""
    options = {**FAST, **METHODS[name], "optim__steps": 6, "rollout__refresh": {"every": 3}}
    options |= {"run__save_every": 1, "run__trajectories_every": 1}
    whole = contents(train(tiny(**options, run__name="whole"), quiet=True).directory)
    cut = tiny(**options, run__name="cut")
    with monkeypatch.context() as patch:
        stop_at(patch, "onpath.training", "accumulate", call=call, after=False)
        with pytest.raises(Stopped):
            train(cut, quiet=True)
    found = contents(train(cut, quiet=True).directory)
    assert found.keys() == whole.keys()
    for file, value in whole.items():
        if file not in ("environment.json", "model/README.md"):
            assert found[file] == value, file


@pytest.mark.parametrize("name", ["opd", "truncate"])
def test_why_a_phase_was_begun_is_said_after_a_stop_too(
    name: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {
        **FAST,
        **METHODS[name],
        "optim__steps": 4,
        "optim__warmup": 0.0,
        "optim__schedule": "constant",
    }
    options |= {"rollout__refresh": {"overlap_below": 0.9999}, "run__save_every": 1}
    whole = contents(train(tiny(**options, run__name="whole"), quiet=True).directory)
    cut = tiny(**options, run__name="cut")
    with monkeypatch.context() as patch:
        stop_at(patch, "onpath.training", "accumulate", call=3, after=False)
        with pytest.raises(Stopped):
            train(cut, quiet=True)
    assert (Path(cut.run.dir) / "cut" / "rollouts" / "phase_000002").is_dir()
    assert contents(train(cut, quiet=True).directory)["metrics.jsonl"] == whole["metrics.jsonl"]


def test_a_trajectory_survives_its_line(tiny: Tiny) -> None:
    parts = assemble(tiny())
    (rollout,) = parts.sampler.generate([parts.prompts.pool[0]], parts.sampling)
    t = Trajectory(
        student_context=(1, 9),
        teacher_context=(1, 7, 9),
        response=(4, 5, 6),
        weights=(1.0, 0.1, 1 / 3),
        counted=(True, False, True),
        writers=("student", "teacher", "forced"),
        behaviour_logprobs=(-0.1, -1e-9, float("-inf")),
        advantages=(0.5, -1 / 3, 0.0),
        guidance=(Guidance(start=1, targets=({5: 0.25, 11: 0.75}, {7: 1 / 7})),),
        edit=Edit(kind="bridge", kept=False, reason="why", detail={"at": 1, "x": [0.5]}),
        origin=rollout,
    )
    assert _trajectory(json.loads(json.dumps(_as_row(t, rollout))), [rollout]) == t
    bare = Trajectory(student_context=(1,), teacher_context=(1,), response=(), origin=rollout)
    row = json.loads(json.dumps(_as_row(bare, rollout)))
    assert _trajectory(row, [rollout]) == bare
    del row["advantages"]  # as it was stored when there were none
    assert _trajectory(row, [rollout]) == bare


def test_a_damaged_line(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written again while the weights that wrote it are there; later it is named."""
    config = tiny(**FAST, rollout__refresh="never", run__save_every=1)
    with monkeypatch.context() as patch:
        stop_at(patch, "onpath.training", "accumulate", call=1, after=False)
        with pytest.raises(Stopped):
            train(config, quiet=True)
    path = Path(config.run.dir) / "tiny" / "rollouts" / "phase_000000" / "process-0.jsonl"
    text = path.read_text()
    path.write_text(text.replace('{"prompt"', '{"prmpt', 1))
    with monkeypatch.context() as patch:
        stop_at(patch, "onpath.training", "one_step", call=2, after=False)
        with pytest.raises(Stopped):
            train(config, quiet=True)
    lost = prompts_of_step(assemble(config).prompts.pool, size=8, seed=config.run.seed, step=1)[0].id
    lines = [line for line in path.read_text().splitlines() if f'"prompt": "{lost}"' not in line]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=rf"rollouts of prompt '{lost}' are missing or damaged.*run again"):
        train(config, quiet=True)


def test_what_never_cannot_do_is_said(tiny: Tiny) -> None:
    """A longer run comes to prompts that the starting weights were not asked for."""
    options = {**FAST, "run__save_every": 1, "optim__schedule": "constant"}
    done = train(tiny(**options, rollout__refresh="never", optim__steps=1), quiet=True)
    with pytest.raises(UserError, match=r"step 2 comes to prompt '.*', and the weights .* gone; leave"):
        train(tiny(**options, rollout__refresh="never", optim__steps=3), quiet=True)
    again = train(tiny(**options, rollout__refresh="never", optim__steps=1), quiet=True)
    assert again.model == done.model, "finished, as it was"
    whole: Any = {**options, "rollout__refresh": "never", "data__limit": 8, "run__name": "whole pool"}
    train(tiny(**whole, optim__steps=1), quiet=True)
    assert len(rows_of(tiny(**whole, optim__steps=3))) == 3, "all prompts were asked"
    rule: Any = {"overlap_below": 0.01}
    train(tiny(**options, rollout__refresh=rule, optim__steps=1, run__name="by overlap"), quiet=True)
    rows = rows_of(tiny(**options, rollout__refresh=rule, optim__steps=3, run__name="by overlap"))
    assert [r["staleness"] for r in rows] == [0, 0, 1]


class NoOrigin(Method):
    """Forgets where its trajectories come from."""

    class Options(MethodOptions):
        name: str = "no origin"

    def prepare(self, rollouts: Sequence[Rollout], *, step: int) -> Prepared:
        return Prepared(trajectories=[replace(own_response(r), origin=None) for r in rollouts])


def test_trajectories_must_know_their_origin(tiny: Tiny) -> None:
    with pytest.raises(UserError, match=r"without Trajectory\.origin; set it there"):
        train(tiny(**FAST, rollout__refresh="never"), method=NoOrigin, quiet=True)


def test_two_processes(tiny: Tiny, tmp_path: Path) -> None:
    """Sums, draws and phases of two are those of one; a prompt that comes again may be another process's."""
    options = {**FAST, **METHODS["relay"], "data__limit": 12, "optim__steps": 4, "optim__eps": 1e-4}
    many = {**FAST, "data__limit": 40, "rollout__prompts": 40, "optim__steps": 2, "optim__eps": 1e-4}
    rules: dict[str, dict[str, Any]] = {
        "n": {**options, "rollout__refresh": {"every": 2}},
        "x": {**options, "rollout__refresh": {"overlap_below": 0.97}},
        "more than are compared": {**many, "rollout__refresh": {"overlap_below": 0.01}},
    }

    ports = free_ports(len(rules))

    def run(rank: int) -> None:
        for port, (name, rule) in zip(ports, rules.items(), strict=True):
            os.environ["MASTER_PORT"] = port  # else the faster one may meet the other's last group
            where = {"run__name": name.replace(" ", "-"), "run__dir": str(tmp_path / "two")}
            train(tiny(**rule, **where, parallel__timeout=TIMEOUT), quiet=True)

    done_by_two(run, tmp_path)
    for name, rule in rules.items():
        name = name.replace(" ", "-")
        one = rows_of(tiny(**rule, run__name=name))
        two = read_lines(tmp_path / "two" / name / "metrics.jsonl")
        for a, b in zip(one, two, strict=True):
            numbers = {k: v for k, v in a.items() if isinstance(v, int | float)}
            assert numbers == pytest.approx({k: b[k] for k in numbers}, rel=2e-4, abs=1e-6), name


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rollout__refresh": "often"}, r"rollout\.refresh"),
        ({"rollout__refresh": {}}, "give every, overlap_below or both"),
        ({"rollout__refresh": {"every": 0}}, "every"),
        ({"rollout__refresh": {"overlap_below": 1.5}}, "overlap_below"),
        ({"rollout__refresh": "never", "rollout__overlap": True}, "set rollout.overlap: false"),
        ({"rollout__refresh": "never", "method__divergence": "sampled"}, r"set method\.ppo_clip"),
        ({**TRD, "method__offline": True, "rollout__refresh": {"every": 2}}, "take one of them out"),
        ({**TRD, "rollout__temperature": 0.6, "rollout__refresh": {"overlap_below": 0.9}}, "or use every"),
        (
            {"method__name": "topd", "method__guidance_weight": "auto", "rollout__refresh": "never"},
            "give it a number",
        ),
    ],
)
def test_impossible_pairs(options: dict[str, Any], says: str, tiny: Tiny) -> None:
    with pytest.raises(UserError, match=says):
        tiny(**options)


def test_on_the_command_line(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(**FAST)
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml().replace("  refresh: always\n", ""))
    assert main(["train", str(file), "--quiet", "--rollout.refresh.every", "2"]) == 0
    run = Path(config.run.dir) / config.run.name
    assert [r["staleness"] for r in read_lines(run / "metrics.jsonl")] == [0, 1, 0]
    shutil.rmtree(run)
    assert main(["train", str(file), "--quiet", "--rollout.refresh", "never"]) == 0
    assert [r["staleness"] for r in read_lines(run / "metrics.jsonl")] == [0, 1, 2]


def test_another_config_takes_no_rollouts_of_a_run_that_never_began(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ended while its first phase was being made."""
    options = {**FAST, "optim__steps": 2, "rollout__refresh": "never"}
    with monkeypatch.context() as patch:
        stop_at(patch, "onpath.training", "prepare", call=1, after=False)
        with pytest.raises(Stopped):
            train(tiny(**options, run__name="first"), quiet=True)
    shorter = {**options, "rollout__max_new_tokens": 5}
    found, expected = (rows_of(tiny(**shorter, run__name=name)) for name in ("first", "fresh"))
    assert found[0]["mean_length"] == expected[0]["mean_length"] <= 5
    assert found[0]["loss"] == expected[0]["loss"]


@pytest.mark.parametrize(
    ("changed", "stays"),
    [
        ({"run__save_every": 7}, True),
        ({"rollout__batch_tokens": 1000}, True),
        ({"optim__steps": 3}, True),
        ({"rollout__max_new_tokens": 5}, False),
    ],
    ids=["neutral", "rounding", "longer", "asked"],
)
def test_a_first_phase_stays_if_it_depends_on_no_option_that_changed(
    changed: dict[str, Any],
    stays: bool,
    tiny: Tiny,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The run was killed before its first step; a longer one makes what lacks."""
    options = {**FAST, "optim__steps": 2, "rollout__refresh": "never"}
    with monkeypatch.context() as patch:
        stop_at(patch, "onpath.training", "accumulate", call=1, after=False)
        with pytest.raises(Stopped):
            train(tiny(**options), quiet=True)
    path = Path(tiny().run.dir) / "tiny" / "rollouts" / "phase_000000" / "process-0.jsonl"
    before = path.read_bytes()
    run = train(tiny(**{**options, **changed})).directory
    assert path.read_bytes().startswith(before) == stays
    assert ("rollout.max_new_tokens changed" in capsys.readouterr().err) == (not stays)
    rows = read_lines(run / "metrics.jsonl")
    assert [row["staleness"] for row in rows] == [*range(len(rows))]
    assert len(rows) == changed.get("optim__steps", 2)


@pytest.mark.parametrize("save_every", [0, 1])
def test_kept_rollouts_are_of_the_data_that_they_were_made_of(
    save_every: int, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first checkpoint too; whoever goes on all the same has them made anew."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "{i}+6=?", "answer": "{i + 6}"}}\n' for i in range(8)))
    options = {**FAST, "data__train": str(rows), "optim__steps": 2, "run__save_every": save_every}
    config = tiny(**options, rollout__refresh={"every": 1})
    with monkeypatch.context() as patch:
        stop_at(patch, "onpath.training", "accumulate", call=2, after=False)
        with pytest.raises(Stopped):
            train(config, quiet=True)
    run = Path(config.run.dir) / config.run.name
    before = contents(run / "rollouts")
    rows.write_text(rows.read_text().replace("+6=?", "+9=?"))
    with pytest.raises(UserError, match=r"another content of data\.train than .* has now; bring it back"):
        train(config, quiet=True)
    assert contents(run / "rollouts") == before
    train(config, resume_with_changes=True, quiet=True)
    of = {p.id: p for p in assemble(config).prompts.pool}
    renderer = assemble(config).text.renderer
    for step in range(save_every, 2):
        lines = (run / "rollouts" / f"phase_00000{step}" / "process-0.jsonl").read_text().splitlines()
        made = [row for row in map(json.loads, lines) if "prompt" in row]
        assert made
        assert all(tuple(row["context"]) == renderer.ids(of[row["prompt"]]) for row in made)
    train(config, quiet=True)


@pytest.mark.parametrize("rule", ["every", "never"])
def test_kept_rollouts_are_never_put_under_other_problems(
    rule: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows without an id are numbered: with other data the same ids are other problems."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "{i}+6=?", "answer": "{i + 6}"}}\n' for i in range(8)))
    refresh: Any = "never" if rule == "never" else {"every": 9}
    options = {**FAST, "data__train": str(rows), "optim__steps": 3, "run__save_every": 1}
    config = tiny(**options, rollout__refresh=refresh, run__trajectories_every=1)
    with monkeypatch.context() as patch:
        stop_at(patch, "onpath.training", "one_step", call=2, after=False)
        with pytest.raises(Stopped):
            train(config, quiet=True)
    rows.write_text(rows.read_text().replace("+6=?", "+9=?"))
    if rule == "never":
        with pytest.raises(UserError, match=r"those of another problem with this id, .*bring the data back"):
            train(config, resume_with_changes=True, quiet=True)
        return
    train(config, resume_with_changes=True, quiet=True)
    run = Path(config.run.dir) / config.run.name
    assert [row["staleness"] for row in read_lines(run / "metrics.jsonl")] == [0, 0, 1], "a phase from step 2"
    told = [row["prompt"] for row in read_trajectories(run) if row["step"] > 1]
    assert told
    assert all("+9=?" in prompt for prompt in told)


@pytest.mark.parametrize(
    ("changed", "flag"), [({"optim__steps": 9}, False), ({"optim__lr": 0.04}, True)], ids=["longer", "asked"]
)
def test_phases_of_weights_that_are_no_more_are_made_anew(
    changed: dict[str, Any], flag: bool, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint is of step 2, and a phase of step 4 was there. What begins a phase is on-policy."""
    options = {**FAST, "optim__steps": 6, "optim__warmup": 0.0, "run__save_every": 2}
    options |= {"rollout__refresh": {"every": 2}, "run__keep": 9}
    config = tiny(**options)
    with monkeypatch.context() as patch:
        stop_at(patch, "onpath.training", "accumulate", call=6, after=False)
        with pytest.raises(Stopped):
            train(config, quiet=True)
    run = Path(config.run.dir) / config.run.name
    shutil.rmtree(run / "checkpoints" / "step_4")
    there = {p.name: (p / "process-0.jsonl").read_bytes() for p in (run / "rollouts").glob("phase_*")}
    assert [*sorted(there)] == ["phase_000000", "phase_000002", "phase_000004"]
    train(tiny(**{**options, **changed}), resume_with_changes=flag, quiet=True)
    now = {name: (run / "rollouts" / name / "process-0.jsonl").read_bytes() for name in there}
    assert [now[name] == there[name] for name in sorted(there)][::2] == [True, False]
    for row in read_lines(run / "metrics.jsonl"):
        if row["staleness"] == 0:
            assert row["importance_ratio"] == pytest.approx(1.0, abs=1e-5)


def test_a_step_that_was_half_written_is_made_again(tiny: Tiny) -> None:
    """Its prompts count with the line of what was measured, which is written last."""
    whole = tiny(**FAST, optim__steps=2, rollout__refresh="never", run__name="whole")
    rows = rows_of(whole)
    cut = tiny(**FAST, optim__steps=2, rollout__refresh="never", run__name="cut")
    phase, there = (Path(c.run.dir) / c.run.name / "rollouts" / "phase_000000" for c in (cut, whole))
    phase.mkdir(parents=True)
    lines = (there / "process-0.jsonl").read_bytes().splitlines(keepends=True)
    (phase / "process-0.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:20])
    (phase.parent.parent / "config.yaml").write_text(cut.to_yaml())
    (phase.parent.parent / "environment.jsonl").touch()
    for a, b in zip(rows, rows_of(cut), strict=True):
        names = ("loss", "student_tokens_generated", "tokens", "mean_length")
        assert [a[k] for k in names] == [b[k] for k in names]


def test_a_prompt_twice_in_a_step_is_drawn_twice_by_all(tiny: Tiny) -> None:
    """The step goes over the end of an epoch."""
    parts = assemble(tiny(**FAST, method__writer="teacher", data__limit=10, rollout__prompts=8, rollout__n=2))
    rollouts = sample(parts, 1)
    twice = [p for p, n in Counter(r.prompt.id for r in rollouts).items() if n > 2]
    assert twice
    made = {t.origin.place: t.response for t in prepare(parts, rollouts, 1).trajectories if t.origin}
    for prompt in twice:
        mine = [r for r in rollouts if r.prompt.id == prompt]
        assert [r.sample for r in mine] == [0, 1, 2, 3]
        assert len({r.ids for r in mine}) == len({made[r.place] for r in mine}) == 4


def test_the_cache_command_looks_at_rollouts(
    tiny: Tiny, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run, or of all in runs; what the run could still read stays, and it goes on as one left alone."""
    monkeypatch.chdir(tmp_path)
    options = {
        **FAST,
        "rollout__refresh": {"every": 2},
        "rollout__n": 2,
        "run__save_every": 1,
        "run__keep": 1,
    }
    both = [tiny(**options, optim__steps=6, run__dir="runs", run__name=name) for name in ("pruned", "whole")]
    for config in both:
        with monkeypatch.context() as patch:
            stop_at(patch, "onpath.training", "accumulate", call=6, after=False)
            with pytest.raises(Stopped):
                train(config, quiet=True)
    run = Path("runs/pruned")
    rows = [
        json.loads(line)
        for path in run.rglob("process-0.jsonl")
        for line in path.read_text().splitlines()
        if line
    ]
    rollouts = sum(len(row.get("rollouts", ())) for row in rows)
    assert rollouts > 80
    assert main(["cache", str(run)]) == 0
    assert f"{run}: {rollouts} rollouts, " in (said := capsys.readouterr().out)
    assert "in 3 phases of " in said
    assert main(["cache"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert main(["cache", str(run), "--keep-gb", "0"]) == 0
    assert "2 phases removed" in capsys.readouterr().out
    ends = [read_lines(train(c, quiet=True).directory / "metrics.jsonl") for c in both]
    assert [row["loss"] for row in ends[0]] == [row["loss"] for row in ends[1]]
    for wrong in (["--keep-gb", "1"], [str(run), "--keep-gb", "nan"]):
        assert main(["cache", *wrong]) == 2
        assert "--keep-gb" in capsys.readouterr().err
    shutil.rmtree("runs")
    assert main(["cache"]) == 2
    assert "no run in runs keeps rollouts" in capsys.readouterr().err
