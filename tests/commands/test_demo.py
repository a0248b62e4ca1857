"""`onpath demo`: what it shows, and that it starts anew."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from onpath.commands import demo as module
from onpath.commands import demo_world
from onpath.commands.cli import main
from onpath.commands.demo import BEFORE, demo_study, forked, most_telling, repaired, table
from onpath.commands.study.command import StudyConfig
from onpath.commands.study.jobs import locked
from onpath.commands.study.plan import Job, arm_config
from onpath.run.trajectories import write_parquet
from onpath.system.errors import UserError
from tests.commands.report_data import WORDS

ARMS = (BEFORE, "opd", "trd", "topd")


def smaller(study: StudyConfig) -> StudyConfig:
    """Two updates of four prompts, six problems."""
    tree = study.model_dump(mode="json")
    tree["base"]["data"]["eval_limit"] = 6
    tree["base"]["rollout"] |= {"prompts": 4, "max_new_tokens": 48}
    tree["base"]["eval"]["max_new_tokens"] = 32
    tree["budget"] = {"updates": 2}
    arms = {
        name: arm["kind"] if arm["kind"] != "train" else arm["overrides"]
        for name, arm in tree["arms"].items()
    }
    return StudyConfig.model_validate(tree | {"arms": arms})


def test_it_replaces_neither_another_study_nor_a_demo_at_work(tmp_path: Path) -> None:
    study = demo_study(quick=True, directory=str(tmp_path))
    kept = study.directory / "runs" / "kept.txt"
    kept.parent.mkdir(parents=True)
    kept.write_text("mine")
    (study.directory / "study.yaml").write_text("arms: {opd: {}}")
    with pytest.raises(UserError, match="is not an earlier demo's"):
        module.clear(study)
    (study.directory / "study.yaml").write_text(study.model_dump_json())
    with locked(study.directory), pytest.raises(UserError, match="is at work here"):
        module.clear(study)
    assert kept.read_text() == "mine"
    module.clear(study)
    assert [path.name for path in study.directory.iterdir()] == [".lock"]


@pytest.mark.slow
def test_three_methods_side_by_side_from_the_start(
    tmp_path: Path, in_process: list[Job], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("demo_study", "world_study"):
        whole = getattr(module, name)
        monkeypatch.setattr(module, name, lambda whole=whole, **options: smaller(whole(**options)))
    earlier = tmp_path / "demo" / "runs" / "opd-seed0"
    earlier.mkdir(parents=True)
    before = module.demo_study(quick=True, directory=str(tmp_path))
    (tmp_path / "demo" / "study.yaml").write_text(before.model_dump_json())
    (earlier / "earlier.jsonl").write_text("of an earlier demo")
    assert main(["demo", "--quick", "--dir", str(tmp_path)]) == 0
    assert not list(tmp_path.rglob("earlier.jsonl"))
    assert [job.arm for job in in_process] == [*ARMS, *demo_world.ARMS]
    said = capsys.readouterr().out
    rows = [f"{split}, {arm} " for split in ("test", "hard") for arm in ARMS]
    places = [said.index(row) for row in rows]
    assert places == sorted(places)
    assert "cover problems only" in said
    assert all(f"\n{n}. " in said for n in (1, 2, 3))
    assert "y → z: " in said or "None among the stored" in said
    assert "A world in which errors stay: 2 updates each; 6 hard problems" in said
    assert re.search(r"relay .*%.* to .*[+-]\d+\.\d% ", said)

    folder = tmp_path / "demo"
    data = json.loads((folder / "study.json").read_text())
    assert {arm["steps"] for arm in data["arms"] if arm["kind"] == "train"} == {2}
    assert (folder / "world" / "study.json").is_file()
    for arm in data["arms"]:
        mean = arm["evals"]["test"]["avg_at_k"]["mean"]
        assert re.search(rf"test, {arm['arm']} +{mean:.1%}", said)
    assert (folder / "demo.png").stat().st_size > 10_000
    page = (folder / "report.html").read_text()
    assert f"page {folder / 'report.html'}" in said.replace("\n", "")
    for arm in ARMS[1:]:
        assert f'"arm":"{arm}"' in page
    assert '"top":{"student":' in page
    assert "one seed cover problems only" in page


def test_the_world_is_the_same_for_both_arms_and_differs_from_the_gym() -> None:
    study = demo_world.world_study(quick=False, directory="somewhere")
    plain, repaired = (arm_config(study, arm) for arm in study.trained)
    assert plain.model_dump(exclude={"method"}) == repaired.model_dump(exclude={"method"})
    assert plain.method.name == "opd"
    assert "spoil=" in plain.data.train


def test_the_rollout_shown_is_one_that_both_arms_had(tmp_path: Path) -> None:
    study = demo_world.world_study(quick=True, directory=str(tmp_path))
    assert demo_world.same_rollout(study) is None
    plain = [stored_row(prompt_id=p, edit="none") for p in "abcd"]
    cases = {"a": (False, True, 5), "b": (False, True, 4), "c": (False, False, 3), "x": (False, True, 1)}
    repaired = [
        stored_row(prompt_id=p, correct=y, edit="relay", detail={"right": z}) | {"tokens": ["a"] * n}
        for p, (y, z, n) in cases.items()
    ]
    store(study, "opd", plain)
    store(study, "relay", repaired)
    found = demo_world.same_rollout(study)
    assert found is not None
    assert [row["prompt_id"] for row in found] == ["b", "b"]
    assert [row["edit"] for row in found] == ["none", "relay"]


def test_all_methods_start_from_the_same_and_take_as_many_updates() -> None:
    for quick in (False, True):
        study = demo_study(quick=quick, directory="somewhere")
        configs = [arm_config(study, arm).model_dump(exclude={"method"}) for arm in study.trained]
        assert all(c == configs[0] for c in configs)
        assert [arm_config(study, arm).method.name for arm in study.trained] == ["opd", "trd", "topd"]
        assert study.budget is not None


def test_the_problem_shown_was_wrong_and_the_most_methods_set_it_right() -> None:
    def samples(**correct: list[bool]) -> dict[str, Any]:
        return {
            arm: {str(i): {"correct": c, "length": 10 + i} for i, c in enumerate(row)}
            for arm, row in correct.items()
        }

    right, wrong = True, False
    before = [right, wrong, wrong, wrong, wrong]
    found = samples(before=before, opd=[right] * 4 + [wrong], trd=[right, right, right, wrong, wrong])
    assert most_telling(found) == "2"  # of 1 and 2 the longer one
    assert most_telling(samples(before=before, opd=[wrong] * 5)) is None
    assert most_telling(samples(before=[right], opd=[right])) is None


def stored_row(**changes: Any) -> dict[str, Any]:
    """A trajectory as a run stores it, of a gym problem with a wrong result at token 4."""
    tokens = ["a: ", "3", "5", " = ", "9"]
    row = {
        "step": 1, "prompt_id": "p", "sample": 0, "prompt": "a: 35 + 10; a?", "answer": "45",
        "correct": False, "response": [WORDS.index(t) if t in WORDS else 40 for t in tokens],
        "response_text": "".join(tokens),
        "tokens": tokens, "weights": [1.0] * 5, "origin_response": [1, 2], "origin_text": "x",
        "edit": "none", "kept": True, "reason": "", "reverse_kl": [0.1] * 5,
    }  # fmt: skip
    detail = changes.pop("detail", {})
    return row | changes | {"detail": json.dumps(detail)}


@pytest.fixture
def study(tmp_path: Path) -> StudyConfig:
    return demo_study(quick=True, directory=str(tmp_path))


def store(study: StudyConfig, arm: str, rows: list[dict[str, Any]]) -> None:
    write_parquet(study.directory / "runs" / f"{arm}-seed0" / "trajectories" / "step_000001.parquet", rows)


def test_the_rewrite_shown_repairs_with_the_fewest_changes(study: StudyConfig) -> None:
    assert repaired(study) is None
    cases = [(False, True, 9), (False, True, 3), (False, False, 1), (True, True, 2)]
    rows = [
        stored_row(correct=y, prompt_id=str(i), edit="rewrite", detail={"right": z, "edit_distance": d})
        for i, (y, z, d) in enumerate(cases)
    ]
    store(study, "trd", rows)
    found = repaired(study)
    assert found is not None
    assert found["prompt_id"] == "1"


def test_the_fork_shown_is_at_an_error_and_alone(study: StudyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert forked(study) is None
    monkeypatch.setattr(module, "_is_error", lambda row, fork: fork["position"] == 4)

    def fork(position: int, distance: float, decision: str = "fork") -> dict[str, Any]:
        return {"position": position, "distance": distance, "decision": decision}

    store(study, "topd", [stored_row(detail={"forks": [fork(0, 0.9, "surface")]})])
    assert forked(study) is None
    rows = [
        stored_row(prompt_id="a", detail={"forks": [fork(1, 0.8), fork(4, 0.2), fork(4, 0.3)]}),
        stored_row(prompt_id="b", detail={"forks": [fork(4, 0.9, "surface"), fork(2, 0.7)]}),
    ]
    store(study, "topd", rows)
    found = forked(study)
    assert found is not None
    assert found["prompt_id"] == "a"
    assert found["detail"]["forks"] == [fork(4, 0.3)]


def test_errors_are_those_of_the_task() -> None:
    row = stored_row() | {
        "tokens": ["a: ", "35", " + ", "10", " = ", "a", "9", "9"],
        "prompt": "a: 35 + 10; a?",
    }
    kinds = [module._is_error(row, {"position": i}) for i in range(len(row["tokens"]))]
    assert any(kinds)
    assert not all(kinds)


def test_table_pairs_labels_with_numbers() -> None:
    def measured(mean: float, gain: float | None) -> dict[str, Any]:
        gap = {"mean": gain, "ci95": [gain - 0.1, gain + 0.1], "verdict": "higher"} if gain else None
        return {"mean": mean, "ci95": [mean - 0.1, mean + 0.1], "difference": gap}

    arms = [
        {
            "arm": arm,
            "steps": steps,
            "evals": {
                split: {"avg_at_k": measured(mean, gain), "pass_at_k": {"mean": 0.9}}
                for split, mean in (("test", 0.4 + (gain or 0)), ("hard", 0.2 + (gain or 0)))
            },
        }
        for arm, steps, gain in ((BEFORE, 0, None), ("opd", 7, 0.25))
    ]
    about = {"splits": ["test", "hard"], "problems": {"test": 500, "hard": 400}, "n": 4, "k": 2}
    sheet = table({"study": about, "arms": arms})
    assert sheet.title.startswith("7 updates each; 500 test and 400 hard problems")
    assert sheet.rows[1] == (
        "test, opd", "65.0%", "55.0 to 75.0", "+25.0%", "+15.0 to +35.0", "higher", "90.0%"
    )  # fmt: skip
    assert sheet.rows[2][:2] == ("hard, before", "20.0%")
