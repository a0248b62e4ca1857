"""The report's data and page, without a browser: what is gathered, packed, escaped, refused."""

import json
import re
import shutil
import struct
from base64 import b64decode
from pathlib import Path
from typing import Any

import pytest
import yaml

from onpath.commands.cli import main
from onpath.commands.report import charts, signal
from onpath.commands.report.command import write_report
from onpath.commands.report.pack import Vocabulary, halves, integers, pack_all, pack_fork, script_json
from onpath.commands.report.run import gather_run
from onpath.commands.report.signal import pearson, scatter
from onpath.commands.report.text import diff, sides
from onpath.run.trajectories import read_rows, sample, write_parquet
from onpath.system.errors import UserError
from tests.commands.report_data import CELLS, HOSTILE, make_run, make_study, safe, trajectory_rows


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "demo")


def stored(run: Path) -> Path:
    return run / "trajectories" / "step_000006.parquet"


def wrecked(content: bytes) -> bytes:
    """The footer is whole, the values are not."""
    return content[:4] + bytes(len(content) // 2) + content[4 + len(content) // 2 :]


def data_of(page: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.S)
    assert found
    return json.loads(found[1])


def unpacked(text: str) -> list[float]:
    raw = b64decode(text)
    return list(struct.unpack(f"<{len(raw) // 2}e", raw))


def test_page_holds_everything_and_loads_nothing(run: Path) -> None:
    page = write_report(run)
    text = page.read_text()
    assert page == run / "report.html"
    assert page.stat().st_size < 5e6
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)|@import|url\(""", text)
    assert "default-src 'none'" in text
    assert list(run.glob(".*")) == []


def test_numbers_on_the_page_are_those_of_the_files(run: Path) -> None:
    data = data_of(write_report(run))
    learning = {chart["title"]: chart for chart in data["sections"][0]["charts"]}
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    shown = learning["Divergence"]["series"][0]
    assert shown["x"] == [row["step"] for row in logged]
    assert shown["y"] == pytest.approx([row["reverse_kl_nats"] for row in logged], rel=1e-4)
    evals = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
    test = learning["Accuracy"]["series"][1]
    assert (test["y"], test["low"]) == (
        pytest.approx([row["avg_at_k"] for row in evals]),
        pytest.approx([row["ci95"][0] for row in evals]),
    )


def test_trajectories_come_back_as_stored(run: Path) -> None:
    data = data_of(write_report(run))
    stored = {(row["step"], row["prompt_id"]): row for row in trajectory_rows(run)}
    assert len(data["trajectories"]) == len(stored)
    for shown in data["trajectories"]:
        row = stored[shown["step"], shown["id"]]
        raw = b64decode(shown["tokens"])
        places = struct.unpack(f"<{len(raw) // 2}H", raw)
        assert [data["vocabulary"][i] for i in places] == row["tokens"]
        assert unpacked(shown["values"]["reverse_kl"]) == pytest.approx(row["reverse_kl"], rel=1e-3, abs=1e-7)
        assert [f["at"] for f in shown.get("forks", [])] == [
            f["position"] for f in row["detail"].get("forks", [])
        ]
    assert {shown["cell"] for shown in data["trajectories"]} == {
        "right",
        "wrong",
        "right_to_right",
        "wrong_to_right",
    }


def test_signals_of_every_kind_are_drawn_and_what_is_new_appears_by_itself(run: Path) -> None:
    sections = {s["title"]: [c["title"] for c in s["charts"]] for s in gather_run(run)["sections"]}
    assert "Reverse KL by position" in sections["Signal"]
    assert {"From attempt to rewrite", "Length ratio of stored rewrites"} <= set(sections["Rewrites"])
    assert {"Loss against distance", "Distance D by decision"} <= set(sections["Forks"])
    others = sections["Everything else that was logged"]
    assert "guidance_grad_ratio" in others
    assert not any(title.startswith("target_") for title in others), "they stand with TOPD's forks"


def test_what_topd_s_targets_say_stands_with_its_forks(run: Path) -> None:
    """Also where no trajectory with a fork is stored."""
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (forks,) = [s["charts"] for s in gather_run(run)["sections"] if s["title"] == "Forks"]
    assert forks[-2:] == signal.of_forks(metrics, [], None)
    teacher, own = forks[-2]["series"]
    (entropy,) = forks[-1]["series"]
    for series, key in (
        (teacher, "target_teacher_share"), (own, "target_own_share"), (entropy, "target_entropy_nats"),
    ):  # fmt: skip
        assert series["y"] == [row[key] for row in metrics]
    assert forks[-2]["unit"] == "%"
    assert signal.of_forks([{"step": 1}], [], None) == [None, None]


def test_flow_shares_are_means_over_steps(run: Path) -> None:
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    flow = next(c for s in gather_run(run)["sections"] for c in s["charts"] if c["kind"] == "flow")
    assert flow["cells"] == pytest.approx({c: sum(r[c] for r in logged) / len(logged) for c in CELLS})
    assert sum(flow["cells"].values()) == pytest.approx(1)


def test_hostile_text_cannot_leave_its_script_element(tmp_path: Path) -> None:
    page = write_report(make_run(tmp_path / "hostile", hostile=True))
    text, data = page.read_text(encoding="utf-8"), data_of(page)
    assert text.count("</script") == 2
    assert data["title"] == HOSTILE[0]
    assert {safe(h) for h in HOSTILE} <= set(data["vocabulary"])
    assert "{{" not in re.sub(r"\{\{(data|script)\}\}", "", text[text.index('id="data"') :])


@pytest.mark.parametrize("text", [*HOSTILE, "\u2028\u2029", "é 日本 🙂"])
def test_script_json_is_json_without_markup(text: str) -> None:
    made = script_json({"a": [text, float("nan"), float("inf")]})
    assert not set("<>&\u2028\u2029") & set(made)
    assert json.loads(made) == {"a": [text, None, None]}
    made.encode("utf-8")


def test_halves_keep_three_digits_missing_and_infinite() -> None:
    values = unpacked(halves([0.1234, -7.5, None, float("-inf"), 1e-4]))
    assert values[0] == pytest.approx(0.1234, rel=1e-3)
    assert (values[1], values[2] != values[2], values[3]) == (-7.5, True, float("-inf"))
    assert b64decode(integers([0, 513])) == b"\x00\x00\x01\x02"


def test_as_many_trajectories_as_fit(run: Path) -> None:
    rows = trajectory_rows(run)
    one, _ = pack_all(rows, known={}, budget=1)
    some, strings = pack_all(rows, known={}, budget=20_000)
    assert len(one) == 1 < len(some) < len(rows)
    assert strings == list(dict.fromkeys(strings))


def test_many_trajectories_are_sampled_and_the_page_says_so(tmp_path: Path, monkeypatch: Any) -> None:
    run = make_run(tmp_path / "many", rows=30)
    monkeypatch.setattr("onpath.commands.report.run.ROWS", 12)
    data = gather_run(run)
    assert len(data["trajectories"]) == 12
    assert data["notes"] == [
        "A sample: 12 of 90 stored trajectories can be looked at; the statistics below are over 12."
    ]
    again = sample(run, rows=12, tokens=10**6)
    assert [r["prompt_id"] for r in again.rows] == [
        r["prompt_id"] for r in sample(run, rows=12, tokens=10**6).rows
    ]
    assert {r["step"] for r in again.rows} == set(again.steps)
    few = sample(run, rows=30, tokens=3 * 80)  # 40 tokens a row, three files: two rows of each
    assert len(few.rows) == 6


def test_unfinished_run_says_so(tmp_path: Path) -> None:
    data = gather_run(make_run(tmp_path / "cut", finished=False))
    assert data["notes"][0] == "This run has not finished: 6 of 12 steps are logged."


def test_run_that_only_began(tmp_path: Path) -> None:
    run = tmp_path / "began"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump({"run": {"name": "began"}, "optim": {"steps": 5}}))
    data = data_of(write_report(run))
    assert data["notes"][0].startswith("This run has not finished: 0 of 5")
    assert "No trajectories are stored" in data["notes"][1]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda run: stored(run).write_bytes(b"PAR1 but no"), "step_000006.parquet: damaged"),
        (lambda run: stored(run).write_bytes(stored(run).read_bytes()[:-9]), "damaged or not Parquet"),
        (lambda run: stored(run).write_bytes(wrecked(stored(run).read_bytes())), "damaged or not Parquet"),
        (lambda run: (run / "config.yaml").write_text("a: ["), "config.yaml, line 1: not valid YAML"),
        (lambda run: (run / "config.yaml").unlink(), "neither a run (no config.yaml) nor a study"),
        (lambda run: (run / "environment.json").write_text("{"), "environment.json: damaged"),
        (lambda run: (run / "study.json").write_text("{}"), "not a study's results"),
        (lambda run: (run / "trajectories" / "step_x.parquet").write_bytes(b""), "step_NNNNNN.parquet"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence_and_exit_2(
    damage: Any, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run")
    damage(run)
    assert main(["report", str(run)]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1
    assert not (run / "report.html").exists()


def test_a_parquet_of_something_else_is_named(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "step_000001.parquet"
    pq.write_table(pa.table({"step": [1]}), path)
    with pytest.raises(UserError, match="lacks the column detail"):
        list(read_rows(path))


def test_command_line_writes_where_asked(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(run), "--out", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'page.html'} (")
    assert main(["report", str(run), "--out", str(tmp_path / "no" / "page.html")]) == 2


def test_study_shows_arms_differences_costs_and_curves(tmp_path: Path) -> None:
    data = data_of(write_report(make_study(tmp_path / "study")))
    kinds = {s["title"]: [c["kind"] for c in s["charts"]] for s in data["sections"]}
    assert kinds["Comparison"] == ["intervals", "intervals", "intervals", "table"]
    assert kinds["Cost"] == ["lines", "lines"]
    means, _, apart, table = data["sections"][0]["charts"]
    assert [row["name"] for row in means["rows"]] == ["opd", "trd <b>"]
    assert means["reference"] == means["rows"][0]["mean"]
    assert [(row["name"], row["mean"]) for row in apart["rows"]] == [("trd <b>", 0.05)]
    assert apart["reference"] == 0
    assert "+5.0%" in table["rows"][1]
    assert "inside the noise" in table["rows"][1]
    curves = {chart["title"]: chart for chart in data["sections"][2]["charts"]}
    accuracy = curves["Accuracy, test"]["series"][0]
    assert accuracy["low"] < accuracy["y"] < accuracy["high"]  # the range over two seeds
    assert curves["pass@k, test"]["series"][0]["x"] == [1, 2]
    assert curves["pass@k, test"]["series"][0]["y"] == pytest.approx([1 / 2, 2 / 3], rel=1e-4)
    assert {t["arm"] for t in data["trajectories"]} == {"opd", "trd <b>"}
    assert data["notes"][0] == "opd has no finished run for seed 7"


def test_interval_by_position() -> None:
    rows = [("right", [1.0, 3.0, 5.0]), ("right", [3.0, 5.0]), ("wrong", [0.0, float("nan")])]
    (name, x, middle, low, high), (other, _, only, none, _) = charts.by_position(rows, bins=2)
    assert (name, x, middle) == ("right", [0.5, 2.5], [3.0, 5.0])  # two tokens a bin
    students_t = 12.7062  # at one degree of freedom
    assert low[0] == pytest.approx(3 - students_t * 2**0.5 / 2**0.5, rel=1e-4)
    assert high[0] == pytest.approx(3 + students_t, rel=1e-4)
    assert (low[1], other, only, none) == (None, "wrong", [0.0, None], [None, None])


def test_a_colour_is_a_place_whatever_is_not_drawn() -> None:
    """An arm without a curve, as the untouched student, shifts no other arm's colour."""
    empty, one, other = None, charts.series("opd", [1], [0.5]), charts.series("trd", [1], [0.7])
    chart = charts.lines("reverse KL", [empty, one, charts.series("sft", [1], [None]), other])
    assert chart is not None
    assert [(s["name"], s.get("colour")) for s in chart["series"]] == [("opd", 1), ("trd", 3)]
    plain = charts.lines("reverse KL", [one, other])
    assert plain is not None
    assert [s.get("colour") for s in plain["series"]] == [None, None]


def test_long_series_are_thinned_with_their_ends() -> None:
    made = charts.series("loss", list(range(5000)), [float(i) for i in range(5000)])
    assert len(made["x"]) == charts.MOST_POINTS
    assert (made["x"][0], made["x"][-1], made["y"][-1]) == (0, 4999, 4999.0)


def test_scatter_splits_where_decisions_change() -> None:
    forks = [
        {"loss": x, "distance": d, "decision": k, "position": 3}
        for x, d, k in [(1.0, 0.1, "surface"), (2.0, 0.3, "surface"), (4.0, 0.5, "fork")]
    ]
    row = {"step": 1, "prompt_id": "a", "sample": 0}
    made = scatter([(row, fork) for fork in forks])
    assert made["split"] == [2.0, 0.4]
    assert made["points"][0] == [1.0, 0.1, "surface", "a", 0, 1, 3]
    assert pearson([1, 2, 3], [3, 1, 2]) == pytest.approx(-0.5)
    assert pearson([1, 1], [3, 4]) == 0


def test_diff_spans_rebuild_the_rewrite() -> None:
    y, z = list("the cat sat"), list("the cart sits")
    rebuilt = [t for tag, a, b, c, d in diff(y, z) for t in (y[a:b] if tag == "equal" else z[c:d])]
    assert rebuilt == z


def test_both_sides_of_a_diff_are_cut_alike() -> None:
    row = {
        "origin_response": [1, 9],
        "origin_text": "so it is",
        "tokens": ["s", "o it"],
        "response_text": "so it",
    }
    assert sides(row, {1: "so", 9: " it is"}) == (["so", " it is"], ["s", "o it"])
    assert sides(row, {1: "so"}) == (["so", " it", " is"], ["so", " it"])  # words, where an id is unknown
    assert sides({**row, "origin_tokens": ["so it", " is"]}, {})[0] == ["so it", " is"]


def test_table_of_tokens_counts_each_once() -> None:
    table = Vocabulary()
    assert table.indices(["a", "b", "a", "c"]) == [0, 1, 0, 2]
    assert table.strings == ["a", "b", "c"]


def test_likeliest_tokens_come_back_as_stored_and_yield_to_trajectories(run: Path) -> None:
    rows = trajectory_rows(run)
    packed, strings = pack_all(rows, known={}, budget=10**7)
    assert [bool(one.get("top")) for one in packed] == [bool(row["student_top_tokens"]) for row in rows]
    assert any(one.get("top") for one in packed)
    for row, one in zip(rows, packed, strict=True):
        for who, top in one.get("top", {}).items():
            raw = b64decode(top["tokens"])
            names = [strings[i] for i in struct.unpack(f"<{len(raw) // 2}H", raw)]
            assert top["k"] == 5
            assert names == [t for place in row[f"{who}_top_tokens"] for t in place]
            logps = [x for place in row[f"{who}_top_logp"] for x in place]
            assert unpacked(top["logp"]) == pytest.approx(logps, rel=1e-3, abs=1e-7)
    plain = [{k: v for k, v in row.items() if "_top_" not in k} for row in rows]
    without, _ = pack_all(plain, known={}, budget=10**7)
    budget = len(json.dumps(without)) + 8_000
    tight, _ = pack_all(rows, known={}, budget=budget)
    assert len(tight) == len(rows)  # no trajectory is lost to them
    kinds = ["shown" if t.get("top") else "left out" if t.get("top_left_out") else "none" for t in tight]
    assert set(kinds) == {"shown", "left out", "none"}
    assert len(json.dumps(tight)) < budget


def test_recoverability_by_position_is_drawn_where_the_probe_has_looked(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    sections = {s["title"]: s["charts"] for s in gather_run(run)["sections"]}
    recovery, modes = sections["Failed prefixes"]
    student, teacher = recovery["series"]
    # Laid over each other at the first error: 4, 4, 4 and 8; one of them reaches −8, which is left out.
    assert student["x"] == teacher["x"] == [-4, 0, 4]
    assert student["y"] == pytest.approx([(1 + 0.5 + 0.5 + 0.25) / 4, (3 * 0.25 + 0) / 4, 0])
    assert teacher["y"] == pytest.approx([1, (3 * 0.5 + 0) / 4, 0])
    assert all(
        low <= y <= high for low, y, high in zip(student["low"], student["y"], student["high"], strict=True)
    )
    assert "4 rollouts with a known first error, 4 continuations" in recovery["help"]
    assert max(modes["series"][1]["y"]) == pytest.approx(0.03)

    path = run / "probes" / "prefix_failure.jsonl"
    path.with_suffix(".json").write_text('{"student": "gym:student"}')
    said = next(s["text"] for s in gather_run(run)["sections"] if s["title"] == "Failed prefixes")
    assert said.endswith("The student here: gym:student.")
    path.write_text(path.read_text()[:-40])
    with pytest.raises(UserError, match=r"prefix_failure.jsonl: not lines of the prefix-failure probe"):
        gather_run(run)
    path.unlink()
    assert gather_run(run)["sections"][-2]["charts"] == []


def test_a_missing_parquet_is_said(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["run"]["trajectories_every"] = 6  # what make_run stores: steps 1, 6 and 12
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert gather_run(run)["notes"] == []
    stored(run).unlink()
    (note,) = gather_run(run)["notes"]
    assert note.startswith("Trajectories of 1 stored steps are missing, first ")
    assert "step_000006.parquet" in note
    for path in (run / "trajectories").iterdir():
        path.unlink()
    (note,) = gather_run(run)["notes"]
    assert note.startswith("Trajectories of 3 stored steps are missing")
    (run / "model" / "config.json").unlink()  # still running: the last file may be on its way
    assert gather_run(run)["notes"][1].startswith("Trajectories of 2 stored steps are missing")


def test_a_rule_that_changed_holds_from_there_on(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["run"]["trajectories_every"] = 2
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert gather_run(run)["notes"]
    change = {"step": 11, "key": "run.trajectories_every", "before": 6, "after": 2, "rule": "neutral"}
    (run / "changes.jsonl").write_text(json.dumps(change) + "\n")
    assert gather_run(run)["notes"] == []


def test_a_step_without_trajectories_has_none(tmp_path: Path) -> None:
    write_parquet(tmp_path / "step_000001.parquet", [])
    assert list(read_rows(tmp_path / "step_000001.parquet")) == []


def test_passes_are_of_what_the_study_asks_now(tmp_path: Path) -> None:
    directory = make_study(tmp_path / "study")
    data = json.loads((directory / "study.json").read_text())
    row = data["rows"][0]
    (directory / "evaluations").mkdir()
    shutil.copytree(directory / row["run"], directory / "evaluations" / "again")
    details = max((directory / "evaluations" / "again" / "evals").glob("test_step_*.jsonl"))
    lines = [json.loads(line) for line in details.read_text().splitlines()]
    right = [{**line, "correct": [True] * len(line["correct"])} for line in lines]
    details.write_text("".join(json.dumps(line) + "\n" for line in right))
    row["evaluation"] = "evaluations/again"
    data["rows"] = [row]
    (directory / "study.json").write_text(json.dumps(data))
    page = data_of(write_report(directory))
    curves = {chart["title"]: chart for chart in page["sections"][2]["charts"]}
    assert curves["pass@k, test"]["series"][0]["y"] == [1, 1]
    assert any("were asked while they trained" in note for note in page["notes"])


@pytest.mark.slow
def test_a_million_trajectories_are_sampled_and_the_page_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "million", rows=200, length=8)
    first, *others = sorted((run / "trajectories").iterdir())
    for path in others:
        path.unlink()
    for step in range(2, 5_001):
        (run / "trajectories" / f"step_{step:06d}.parquet").hardlink_to(first)
    page = write_report(run)
    assert page.stat().st_size < 5e6
    notes = data_of(page)["notes"]
    assert notes == [
        "A sample: 400 of 1,000,000 stored trajectories can be looked at; the statistics below are over 800."
    ]


def test_a_transport_that_spreads_is_not_one_that_is_missing() -> None:
    table = Vocabulary()
    one = {"student_tokens": ["a"] * 20, "teacher_tokens": ["e"] * 20}
    spread = [[i, j, 0.05] for i in range(20) for j in range(20)]
    found = {
        name: pack_fork(one | {"plan": plan}, table)
        for name, plan in {"spread": spread, "none": [], "strong": [[0, 0, 0.9], *spread]}.items()
    }
    assert {name: fork["spread"] for name, fork in found.items()} == {
        "spread": True, "none": False, "strong": False,
    }  # fmt: skip
    assert unpacked(found["strong"]["plan"]) == pytest.approx([0, 0, 0.9], rel=1e-3)


def test_small_screens_can_read_the_page() -> None:
    """Axis text is 11 px or more on the narrowest card, lists wrap, the token box covers nothing on low
    windows."""
    assets = Path(charts.__file__).parent / "assets"
    css, script = (assets / "page.css").read_text(), (assets / "chart.js").read_text()
    size = float(re.findall(r"^svg text \{ font: ([\d.]+)px", css, flags=re.M)[0])
    # Just above a width with fewer of them in a row; the page keeps 40 of it, each gap 16.
    narrowing = re.findall(
        r"^@media \(max-width: (\d+)px\) \{ \.card \{ grid-column: ([^;]+);", css, flags=re.M
    )
    assert [columns for _, columns in narrowing] == ["span 3", "1 / -1"], "three, two, one in a row"
    widths = [
        (int(width) + 1 - 40 - 16 * (n - 1)) / n for (width, _), n in zip(narrowing, (3, 2), strict=True)
    ]
    card = min(widths) - 32  # its padding
    frame = float(re.findall(r"FRAME = \{ width: (\d+)", script)[0])
    assert size * card / frame >= 11
    what = re.findall(r"^\.list \.what \{(.*)\}", css, flags=re.M)[0]
    assert "nowrap" not in what
    assert re.search(r"@media \(max-height: 7\d\dpx\) \{ \.panel \{ position: static; \} \}", css)


def test_a_greedy_set_is_in_no_curve_of_several_samples() -> None:
    """It has one sample a problem: its pass@1 is no pass@4."""
    from onpath.commands.report.run import learning

    row = {"avg_at_k": 0.5, "ci95": [0.4, 0.6], "pass_at_k": 0.7, "pass_at_k_ci95": [0.6, 0.8]}
    evals = [{**row, "step": s, "split": n, "k": k} for s in (1, 2) for n, k in (("greedy", 1), ("test", 4))]
    metrics = [{"step": step, "accuracy": 0.5} for step in (1, 2)]
    drawn = {
        chart["title"]: [s["name"] for s in chart["series"]] for chart in learning(metrics, evals) if chart
    }
    assert drawn["pass@4"] == ["test"]
    assert {"greedy", "test"} <= set(drawn["Accuracy"])


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ({"divergence": "reverse_kl", "support": "full", "support_k": 32, "token_clip": None}, "reverse_kl"),
        (
            {
                "divergence": "forward_kl",
                **{"support": "teacher_topk", "support_k": 8, "tail": "bucket"},
                **{"token_clip": 0.06, "teacher_temperature": 1.0, "beta": 0.5},
            },
            "forward_kl, teacher_topk 8, tail bucket, token_clip 0.06",
        ),
        (
            {"divergence": "jensen_shannon", "beta": 0.3, "teacher_temperature": 0.8},
            "jensen_shannon, beta 0.3, teacher_temperature 0.8",
        ),
        ({}, None),
    ],
)
def test_the_setting_names_the_loss(tmp_path: Path, method: dict[str, Any], says: str | None) -> None:
    run = make_run(tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"method": {"name": "trd", **method}}))
    assert dict(gather_run(run)["facts"]).get("divergence") == says


def test_what_was_generated_is_told_from_what_was_trained_on(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    for theirs, says in ((0, "1 step; generated: student 2,100"), (48, "student 2,100, teacher 48")):
        (run / "metrics.jsonl").write_text(json.dumps(row | {"teacher_tokens_generated": theirs}) + "\n")
        assert gather_run(run)["tiles"][-1]["note"].endswith(says)


def test_a_page_takes_the_place_of_pages_only(tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_run(run)
    before = (run / "config.yaml").read_text()
    with pytest.raises(UserError, match=r"config\.yaml is there, and is no page of onpath's"):
        write_report(run, run / "config.yaml")
    assert (run / "config.yaml").read_text() == before
    assert write_report(run, tmp_path / "page.html") == write_report(run, tmp_path / "page.html")
