"""A study per level of a strength: its YAML, its runs, its table, its page and picture."""

import copy
import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from onpath.commands.cli import main
from onpath.commands.picture import picture
from onpath.commands.report import doses as doses_report
from onpath.commands.report.command import write_report
from onpath.commands.report.doses import (
    PICTURE,
    arms_of,
    draw_doses,
    gather_doses,
    look,
    points,
    price,
    responses,
)
from onpath.commands.study import doses as doses_module
from onpath.commands.study import plan
from onpath.commands.study.command import NothingFinished, load_study
from onpath.commands.study.doses import Doses, dose_sheets, load_doses
from onpath.commands.study.plan import Job
from onpath.commands.study.run import run_study
from onpath.system.errors import UserError

Make = Callable[..., Path]


@pytest.fixture
def make(model_dirs: dict[str, Path], data_file: Path, tmp_path: Path) -> Make:
    """Writes a study at two learning rates as levels; keywords replace its sections."""

    def write(**changes: Any) -> Path:
        data = {
            "name": "rates",
            "dir": str(tmp_path / "studies"),
            "x": {"name": "rate", "levels": [0.001, 0.01]},
            "base": {
                "student": {"model": str(model_dirs["student"]), "device": "cpu"},
                "teacher": {"model": str(model_dirs["teacher"]), "device": "cpu"},
                "data": {"train": str(data_file)},
                "rollout": {"prompts": 4, "max_new_tokens": 4},
                "optim": {"steps": 1, "lr": "{x}"},
                "eval": {"grader": "exact", "max_new_tokens": 1},
                "run": {"save_every": 0, "trajectories_every": 0},
            },
            "arms": {"opd": {}, "forward": {"method.divergence": "forward_kl"}},
            "seeds": 2,
            "evals": {"splits": {"test": str(data_file)}, "n": 2, "k": 2, "limit": 6},
            "parallel": {"processes": 1},
        }
        given = {k: v for k, v in (data | changes).items() if v is not None}
        path = tmp_path / "rates.yaml"
        path.write_text(yaml.safe_dump(given, sort_keys=False))
        return path

    return write


def loaded(path: Path) -> Doses:
    found = load_doses(path)
    assert found is not None
    return found


def test_bytes_in_a_study_of_levels_are_a_sentence(make: Make, tmp_path: Path) -> None:
    path = make()
    lines = [line for line in path.read_text().splitlines() if not line.startswith("name:")]
    path.write_text("\n".join([*lines, "seeds: !!binary aGVsbG8="]))
    with pytest.raises(UserError, match="seeds"):
        load_doses(path)


def test_each_level_is_a_study_with_the_level_in_it(make: Make, tmp_path: Path) -> None:
    doses = loaded(make(arms={"opd": {}, "half": {"method": {"divergence": "jensen_shannon", "beta": 0.5}}}))
    assert list(doses.studies) == [0.001, 0.01]
    assert [s.base.optim.lr for s in doses.studies.values()] == [0.001, 0.01]
    assert [s.directory for s in doses.studies.values()] == [
        tmp_path / "studies" / "rates" / f"rate-{x}" for x in ("0.001", "0.01")
    ]
    assert load_doses(make(x=None, base={})) is None


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"x": {"name": "rate", "levels": [0.5]}}, "x.levels"),
        ({"x": {"name": "rate", "levels": [1, 0.5]}}, "levels must ascend"),
        ({"x": {"levels": [0, 1]}}, "x.name"),
        ({"x": {"name": "late", "levels": [0, 1]}, "base": {}}, r"nothing says \{x\}"),
        ({"x": {"name": "rate", "levels": [0, 1]}}, "optim.lr"),
        (
            {"base": {"optim": {"lr": {"x": None}}}},
            r"base\.optim\.lr is \{x\} without quotes, a mapping in YAML",
        ),
        ({"dir": 5}, "dir is 5, which is no text: write it in quotes"),
        ({"name": "../../up"}, r"name is '\.\./\.\./up', which cannot name a directory"),
    ],
)
def test_what_cannot_be_read(make: Make, changes: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=why):
        load_doses(make(**changes))


def test_whole_levels_are_whole_numbers(make: Make) -> None:
    x = {"name": "many", "levels": [1, 2.0]}
    evals = {"splits": ["gym:hard"], "n": "{x}", "k": 1}
    doses = loaded(make(x=x, base={}, seeds="{x}", evals=evals))
    assert [study.seeds for study in doses.studies.values()] == [[0], [0, 1]]
    with pytest.raises(UserError, match=r"x\.name"):
        loaded(make(x={"name": "a/../b", "levels": [1, 2]}))


def test_what_depends_on_the_level_is_not_the_first_one_s(make: Make, in_process: list[Job]) -> None:
    x, levels = "samples", [1, 2]
    base = yaml.safe_load(make().read_text())["base"] | {"optim": {"steps": 1, "lr": 0.001}}
    evals = yaml.safe_load(make().read_text())["evals"] | {"n": "{x}", "k": 1, "limit": "{x}"}
    found = run_study(
        make(x={"name": x, "levels": levels}, base=base, evals=evals, seeds=1, arms={"opd": {}}), quiet=True
    )
    (sheet,) = dose_sheets(found.data)
    assert sheet.title == "test: 1 to 2 problems, by samples"
    assert "avg@1 to 2" in sheet.columns
    facts = dict(gather_doses(found.directory)["facts"])
    assert facts["problems"] == "test 1 to 2"
    assert facts["samples per problem"] == "1, 2"
    assert draw_doses(found.directory).is_file()


def test_one_study_is_asked_for(make: Make) -> None:
    with pytest.raises(UserError, match="a study per level"):
        load_study(make())


def test_runs_resume_and_are_shown(
    make: Make, in_process: list[Job], capsys: pytest.CaptureFixture[str]
) -> None:
    path = make()
    found = run_study(path, quiet=True)
    assert len(in_process) == 8
    assert [level["x"] for level in found.data["levels"]] == [0.001, 0.01]
    assert main(["study", str(path), "--quiet"]) == 0
    assert len(in_process) == 8, "finished levels are not run again"
    assert "test: 6 problems, by rate" in capsys.readouterr().out

    (sheet,) = dose_sheets(found.data)
    assert [row[0] for row in sheet.rows] == [
        f"{a}, rate {x}" for a in ("opd", "forward") for x in (0.001, 0.01)
    ]
    data = json.loads((found.directory / "doses.json").read_text())
    assert arms_of(data) == ["opd", "forward"]
    for level, (x, value) in zip(data["levels"], points(data, "test", "forward", "difference"), strict=True):
        gap = level["arms"][1]["evals"]["test"]["avg_at_k"]["difference"]
        assert (x, value["mean"], value["low"]) == (level["x"], gap["mean"], gap["ci95"][0])
    accuracy, apart = responses(data, "test")
    assert accuracy is not None
    assert apart is not None
    assert [s["name"] for s in accuracy["series"]] == ["opd", "forward"]
    assert [(s["name"], s["colour"]) for s in apart["series"]] == [("forward", 1)], "as in the other chart"
    page = write_report(found.directory)
    assert "Paired difference from opd" in page.read_text()
    assert (found.directory / PICTURE).read_bytes()[:4] == b"\x89PNG"
    assert draw_doses(found.directory, "test") == found.directory / PICTURE


def test_the_data_of_all_levels_is_opened_before_the_first_one_runs(
    make: Make, in_process: list[Job], data_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "at_0.001.jsonl").write_bytes(data_file.read_bytes())
    splits = {"test": str(tmp_path / "at_{x}.jsonl")}
    with pytest.raises(UserError, match=r"at_0\.01\.jsonl': no such file"):
        run_study(make(evals={"splits": splits, "n": 1, "k": 1}), quiet=True)
    assert not in_process


def test_a_level_that_fails_does_not_stop_the_others(
    make: Make, in_process: list[Job], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, real, broken = make(), doses_module.carry_out, ["rate-0.001"]

    def carry_out(study: Any, **options: Any) -> Any:
        if study.name in broken:
            raise NothingFinished("4 of the study's runs failed, first opd-seed0: no memory")
        return real(study, **options)

    monkeypatch.setattr(doses_module, "carry_out", carry_out)
    assert main(["study", str(path), "--quiet"]) == 2
    said = capsys.readouterr()
    assert "first rate 0.001: 4 of the study's runs failed, first opd-seed0: no memory" in said.err
    assert "opd, rate 0.01" in said.out
    broken.append("rate-0.01")
    with pytest.raises(NothingFinished, match=r"2 of the study's runs failed, first rate 0\.001"):
        run_study(path, quiet=True)


def test_pages_of_sets_that_came_later_of_one_arm_and_of_odd_names(make: Make, in_process: list[Job]) -> None:
    found = run_study(make(), quiet=True)
    path = found.directory / "doses.json"
    data = json.loads(path.read_text())

    def shown(change: Callable[[dict[str, Any]], None]) -> None:
        other = copy.deepcopy(data)
        change(other)
        path.write_text(json.dumps(other))
        assert dose_sheets(other)
        assert write_report(found.directory).is_file()
        assert (found.directory / PICTURE).read_bytes()[:4] == b"\x89PNG"

    def later(other: dict[str, Any], name: str = "easy") -> None:
        new = other["levels"][0]
        new["study"]["splits"].append(name)
        for of in (new["study"][key] for key in ("problems", "samples")):
            of[name] = of["test"]
        for arm in new["arms"]:
            arm["evals"][name] = arm["evals"]["test"]

    def alone(other: dict[str, Any]) -> None:
        for level in other["levels"]:
            level["arms"] = level["arms"][:1]

    def renamed(other: dict[str, Any]) -> None:
        for level in other["levels"]:
            level["study"]["splits"] = ["AIME_Test"]
            for of in (level["study"][key] for key in ("problems", "samples")):
                of["AIME_Test"] = of.pop("test")
            for arm in level["arms"]:
                arm["evals"]["AIME_Test"] = arm["evals"].pop("test")

    for change in (later, alone, renamed):
        shown(change)


MAP = Path(__file__).parents[2] / "recipes" / "when-it-pays"
LEVELS = ["late", "lost", "spoil", "surface"]


@pytest.mark.parametrize("name", LEVELS)
def test_arms_of_the_map_s_pictures_are_told_apart(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of sixteen no two share a colour, of more none colour and marker; each name has its line's beside it,
    and touches no other."""
    figures: list[Any] = []

    @contextmanager
    def kept(path: Path, **options: Any) -> Iterator[Any]:
        with picture(path, **options) as (figure, axes):
            figures.append(figure)
            yield figure, axes

    monkeypatch.setattr(doses_report, "picture", kept)
    shutil.copy(MAP / f"{name}.json", tmp_path / "doses.json")
    assert draw_doses(tmp_path).stat().st_size < 200_000
    (axis,) = figures[0].axes
    data = json.loads((MAP / f"{name}.json").read_text())
    arms = arms_of(data)
    assert len(arms) in (15, 17)
    assert len({look(place)[0] for place in range(len(arms))}) == min(16, len(arms))
    assert len({look(place) for place in range(len(arms))}) == len(arms)
    names = [text for text in axis.texts if text.get_text()]
    costs = {arm: price(data, arm) for arm in arms}
    told = [arm + (f" {costs[arm]:.1f}×" if costs[arm] else "") for arm in arms if arm != "opd"]
    assert [text.get_text() for text in names] == told
    relayed = None if name == "surface" else pytest.approx(130 / 64, rel=1e-2)  # thousands, in the table
    assert (costs["relay"], costs["untouched"]) == (relayed, None)
    lines = {line.get_label(): line for line in axis.containers}
    marks = [line for line in axis.lines if [*line.get_xdata()] == [1.02]]  # right of all levels
    for text, mark in zip(names, marks, strict=True):
        line = lines[text.get_text().split()[0]].lines[0]
        expected = look(arms.index(text.get_text().split()[0]))
        assert expected == (line.get_color(), line.get_marker()) == (mark.get_color(), mark.get_marker())
        assert text.get_color() == expected[0]
        assert text.xy[1] == mark.get_ydata()[0], "side by side"
    renderer = figures[0].canvas.get_renderer()
    boxes = sorted((text.get_window_extent(renderer) for text in names), key=lambda box: box.y0)
    assert all(above.y0 > below.y0 + 0.7 * below.height for below, above in pairwise(boxes))


def test_no_two_of_48_arms_look_alike() -> None:
    assert len({look(place) for place in range(48)}) == 48
    assert len({look(place)[0] for place in range(16)}) == 16


@pytest.mark.parametrize("name", LEVELS)
def test_the_map_is_a_study_of_each_strength(name: str) -> None:
    file = MAP / f"{name}.yaml"
    doses = loaded(file)
    assert doses.axis.name == file.stem
    assert len(doses.axis.levels) >= 3
    for level, one in doses.studies.items():
        assert len(one.seeds) >= 5
        assert one.base.optim.max_grad_norm == 0.25
        sources = [one.base.data.train, one.base.student.model, *(one.evals.splits or {}).values()]
        assert any(f"{file.stem}={level:g}" in source for source in sources)
        plan.check_alike(one)
        planned = plan.runs(one, dict.fromkeys(one.trained, 20), dict.fromkeys(one.trained, 1e-3))
        assert len(planned) == 5 * len(one.trained) + 1


def test_the_trained_teacher_s_study_is_the_map_s_world_without_the_checker() -> None:
    assert {path.stem for path in MAP.glob("*.yaml")} == {*LEVELS, "persona", *OTHERS}
    one, world = load_study(MAP / "persona.yaml"), loaded(MAP / "spoil.yaml").studies[0.8]
    assert len(one.seeds) == 5
    assert one.base.data.train + "&lost=1" == world.base.data.train
    same = {"teacher": one.base.teacher, "data": one.base.data}
    assert one.base == world.base.model_copy(update={**same, "optim": one.base.optim})
    assert one.base.optim.lr == 2e-3
    assert one.base.optim.max_grad_norm == 0.25
    plan.check_alike(one)


OTHERS = {"controls": 0.25, "again": 0.25, "clip": 0.05, "signals": 0.25, "maze": 0.25}
"""Studies beside the map's strengths → the clip of the gradient."""


@pytest.mark.parametrize("name", OTHERS)
def test_the_map_s_other_worlds_are_studies_of_five_seeds_with_one_clip(name: str) -> None:
    file = MAP / f"{name}.yaml"
    doses = load_doses(file)
    world = loaded(MAP / "lost.yaml").studies[1.0]
    for level, one in {None: load_study(file)}.items() if doses is None else doses.studies.items():
        assert len(one.seeds) == 5
        assert one.base.optim.max_grad_norm == OTHERS[name]
        plan.check_alike(one)
        if name == "maze":
            continue
        again = "" if level is None else f"&again={level:g}"
        assert one.base.data.train == world.base.data.train.replace("&lost", f"{again}&lost")
        assert one.evals.splits == world.evals.splits
        assert one.base.optim.lr == 2e-3
        changed = {arm: plan.arm_config(one, arm).method for arm in one.trained}
        for arm in (arm for arm in changed if arm.endswith(("_own_token", "_random_place"))):
            repair, control = changed[arm.rsplit("_", 2)[0]], changed[arm]
            assert control == repair.model_copy(update={"control": "_".join(arm.split("_")[-2:])})


def test_studies_ask_at_other_temperatures_where_errors_have_kinds(make: Make) -> None:
    def asked(base: Any = (), **evals: Any) -> list[float]:
        study = load_study(make(x=None, base=dict(base), evals=evals))
        return plan.arm_config(study, "opd").eval.also_at

    assert asked(splits=["gym:hard"]) == [0.6, 0.0]
    assert asked(splits=["gym:hard"], also_at=[]) == []
    for own in ([], [0.3]):
        assert asked(base={"eval": {"also_at": own}}, splits=["gym:hard"]) == own
        assert asked(base={"eval.also_at": own}, splits=["gym:hard"], also_at=[0.5]) == [0.5]
    assert asked(base={"eval": {"n": 8}}, splits=["gym:hard"]) == [0.6, 0.0]
    (file,) = (loaded(make()).studies[0.001].evals.splits or {}).values()
    assert asked(splits={"gym": "gym:hard", "file": file}) == []


def test_the_map_shows_every_arm_that_it_names(tmp_path: Path) -> None:
    """From the JSON beside it; each arm is in a panel, each panel has OPD's own numbers."""
    home = Path(__file__).parents[2] / "recipes" / "when-it-pays"
    spec = importlib.util.spec_from_file_location("map_of_strengths", home / "map.py")
    assert spec is not None
    assert spec.loader is not None
    drawn = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(drawn)
    drawn.draw(tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 50_000
    data = {name: json.loads((home / f"{name}.json").read_text()) for name in drawn.STRENGTHS}
    for arm in drawn.ARMS:
        assert any(points(one, "hard", arm, "difference") for one in data.values()), arm
    for one in data.values():
        assert len(points(one, "hard", "opd", None)) == len(one["levels"])
