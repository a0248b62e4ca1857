"""`onpath inspect`: filters, JSON, rewrites and forks on a terminal and in a pipe, bad input."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from onpath.commands.cli import main
from onpath.commands.inspect import show_row
from onpath.commands.terminal import coloured, forks, rewritten, visible
from tests.commands.report_data import make_run, trajectory_rows


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "demo")


def lines_of(run: Path, capsys: pytest.CaptureFixture[str], *options: str) -> list[dict[str, object]]:
    assert main(["inspect", str(run), "--json", *options]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_json_is_what_was_stored(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = lines_of(run, capsys, "--limit", "99")
    assert shown == [row for row in trajectory_rows(run) if row["step"] == 12]
    assert {row["step"] for row in lines_of(run, capsys, "--step", "6")} == {6}


@pytest.mark.parametrize(
    ("only", "holds"),
    [
        ("right", lambda r: r["correct"]),
        ("wrong", lambda r: not r["correct"]),
        ("repaired", lambda r: not r["correct"] and r["detail"]["right"]),
        ("edited", lambda r: r["edit"] == "rewrite"),
        ("forks", lambda r: any(f["decision"] == "fork" for f in r["detail"]["forks"])),
    ],
)
def test_filters_keep_what_they_name(
    run: Path, only: str, holds: object, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = lines_of(run, capsys, "--only", only, "--limit", "99")
    everything = lines_of(run, capsys, "--limit", "99")
    assert callable(holds)
    assert 0 < len(shown) < len(everything)
    assert all(holds(row) for row in shown)


def test_order_limit_and_prompt(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peaks = [max(row["reverse_kl"]) for row in lines_of(run, capsys, "--sort", "kl", "--limit", "99")]  # type: ignore[call-overload]
    assert peaks == sorted(peaks, reverse=True)
    assert len(lines_of(run, capsys, "--limit", "2")) == 2
    assert [row["prompt_id"] for row in lines_of(run, capsys, "--id", "p4")] == ["p4"]


def test_in_a_pipe_there_is_no_colour_and_nothing_is_cut(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(run), "--limit", "3"]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert "y → z: " in said
    assert "[-" in said
    assert "{+" in said
    assert "◆ token" in said
    assert "student … " in said
    assert "teacher … " in said
    assert "wrong → right" in said or "right → right" in said


def test_on_a_terminal_there_is_colour(run: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=200)
    for row in trajectory_rows(run)[:3]:
        show_row(console, row, "reverse_kl", {})
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[" in said
    assert "[-" not in said


def test_recorded_only_rows_show_their_text(run: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    show_row(console, {**trajectory_rows(run)[0], "reverse_kl": None}, "reverse_kl", {})
    assert trajectory_rows(run)[0]["response_text"] in console.file.getvalue()  # type: ignore[attr-defined]


def test_rewrite_without_colour() -> None:
    (line,) = rewritten(["7", "2"], ["7", "1", "3"], colour=False)
    assert line.plain == "y → z: 7[-2-]{+13+}"


def test_fork_shows_both_futures_and_what_the_transport_moves() -> None:
    fork = {
        "position": 3, "decision": "fork", "loss": 2.0, "distance": 0.4, "sampled_gap": 1.5,
        "student_tokens": ["7", ";"], "teacher_tokens": ["8", ";"], "plan": [[0, 0, 0.75], [1, 1, 1.0]],
    }  # fmt: skip
    head, ours, theirs, plan = (line.plain for line in forks([fork, {"decision": "reference"}], colour=False))
    assert head == "  ◆ token 3: fork  loss 2.00  D 0.400  gap +1.50"
    assert (ours, theirs) == ("      student … 7;", "      teacher … 8;")
    assert plan == "      transport ‘7’ → ‘8’ 75%"


def test_nothing_in_a_token_can_steer_the_terminal() -> None:
    assert visible("\x1b[2J\u202eab\n") == "⟨001B⟩[2J⟨202E⟩ab⏎\n"
    assert "\x1b" not in coloured(["\x1b[31m"], [0.0]).plain


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--step", "5"], "step 5 is not stored; there are 1, 6, 12"),
        (["--colour", "loss"], "colour loss: no such per-token column"),
        (["--id", "nobody"], "no such prompt"),
        (["--rollouts", "4"], "--rollouts is of a probe; name one with --probe"),
        (["--probe", "divergence", "--step", "1"], "--step chooses what is shown of a run"),
        (["--probe", "divergence", "--every", "4"], "--every is of --probe prefix-failure alone"),
    ],
)
def test_bad_options(run: Path, options: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(run), *options]) == 2
    assert says in capsys.readouterr().err


def test_bad_directories(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path)]) == 2
    run = make_run(tmp_path / "run")
    (run / "trajectories" / "step_000012.parquet").write_bytes(b"no")
    assert main(["inspect", str(run)]) == 2
    assert "step_000012.parquet: damaged" in capsys.readouterr().err
    assert main(["inspect", str(run), "--step", "1", "--limit", "1"]) == 0  # the other files are whole


def test_tokens_that_are_not_trained_on_are_told_apart(run: Path) -> None:
    row = {**trajectory_rows(run)[0], "kept": True, "tokens": ["a", "b", "c"], "response": [1, 2, 3]}
    row |= {"reverse_kl": [5.0, 5.0, 5.0], "weights": [0.0, 1.0, 0.0], "writers": ["student"] * 3}
    stream = io.StringIO()
    console = Console(file=stream, width=200, color_system=None)
    show_row(console, row, "reverse_kl", {})
    assert "a⟦b 5.0⟧c" in stream.getvalue()
    assert "  not trained on: 0 ‘a’, 2 ‘c’" in stream.getvalue()
    show_row(console, row, "weights", {})
    assert "⟦a 0.0⟧b⟦c 0.0⟧" in stream.getvalue(), "as on the page: what is off 1"
