"""The command line is a thin skin over functions."""

import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import onpath
from onpath.commands.cli import main, make_parser, split_overrides
from onpath.commands.demo import demo
from onpath.commands.doctor.command import run_doctor
from onpath.commands.inspect import ONLY, run_inspect
from onpath.commands.options import FIRST, all_options, first_options
from onpath.commands.probes.command import PROBES, run_named
from onpath.config import Config, describe
from onpath.config.methods import METHODS
from onpath.system.errors import UserError
from tests.commands.report_data import make_run

COMMANDS: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "demo": (demo, []),
    "doctor": (run_doctor, []),
    "eval": (onpath.evaluate_model, ["MODEL"]),
    "export": (onpath.export_model, ["RUN", "OUT"]),
    "inspect": (run_inspect, ["DIR"]),
    "inspect --probe": (run_named, ["DIR"]),
    "report": (onpath.write_report, ["DIR"]),
    "study": (onpath.run_study, ["F"]),
    "train": (onpath.train, []),
}
NOT_OPTIONS = {"overrides", "each"}
"""The rest of the command line, and where the findings go."""
OBJECTS = {"method", "divergence", "grader", "rewards", "train_dataset", "eval_dataset", "engine"}
"""Of `onpath.train`: what a YAML names instead."""


@pytest.mark.parametrize("command", COMMANDS)
def test_defaults_are_those_of_the_function(command: str) -> None:
    function, needed = COMMANDS[command]
    options = vars(make_parser().parse_args([command.split()[0], *needed]))
    options |= {"prompt_id": options.get("id"), "directory": options.get("dir")}
    parameters = inspect.signature(function).parameters
    left_out = NOT_OPTIONS | (OBJECTS if command == "train" else set())
    known = {n: p.default for n, p in parameters.items() if p.default is not p.empty and n not in left_out}
    assert {name: options[name] for name in known} == known
    assert "Namespace" not in str(inspect.signature(function))


def test_choices_are_those_of_the_functions() -> None:
    commands = next(a for a in make_parser()._actions if a.dest == "command").choices
    assert isinstance(commands, dict)
    choices = {a.dest: a.choices for a in commands["inspect"]._actions}
    assert choices["only"] == list(ONLY)
    assert choices["probe"] == list(PROBES)


def test_functions_check_what_the_parser_would_have(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for changes, says in (
        ({"only": "odd"}, "only is 'odd'; it must be one of right, wrong"),
        ({"sort": "size"}, "sort is 'size'; it must be one of stored, kl"),
        ({"limit": 0}, "limit is 0"),
    ):
        with pytest.raises(UserError, match=says):
            run_inspect(run, **changes)  # type: ignore[arg-type]
    assert len(run_inspect(run, limit=None).rows) > len(run_inspect(run, limit=2).rows) == 2
    with pytest.raises(UserError, match="no probe 'prefix'; there are prefix-failure, divergence"):
        run_named("prefix", run)
    with pytest.raises(UserError, match="no such config file"):
        run_doctor(tmp_path / "none.yaml")


def keys(text: str) -> list[str]:
    return re.findall(r"^  ([\w.]+)  \(", text, flags=re.M)


def test_values_may_begin_as_options_do() -> None:
    arguments = ["train", "--eval.seed", "-3", "--data.system=--be brief", "--rollout.stop", "-- end"]
    pairs = [("eval.seed", "-3"), ("data.system", "--be brief"), ("rollout.stop", "-- end")]
    assert split_overrides([*arguments, "--quiet"]) == (["train", "--quiet"], pairs)
    assert split_overrides(["--optim.lr", "-.5e-3", "--run.name", "---"])[1][0] == ("optim.lr", "-.5e-3")


def test_every_option_is_described_once() -> None:
    """Of a method's options those that all methods have, and then its own."""
    described = {key: rest for key, *rest in describe()}
    assert len(described) == len(list(describe()))
    for section, info in Config.model_fields.items():
        fields = getattr(info.annotation, "model_fields", {})
        assert {f"{section}.{name}" for name in fields} <= described.keys()
    for method, options in METHODS.items():
        for name in options.model_fields:
            assert f"method[{method}].{name}" in described or f"method.{name}" in described, (method, name)
            assert described.get(f"method[{method}].{name}") != described.get(f"method.{name}")
    assert described["method[opsd].divergence"][1] == '"forward_kl"'
    assert "method[topd].divergence" not in described
    assert described["method.name"][:2] == [" | ".join((*METHODS, "file.py:Class")), '"opd"']
    assert all(text for _, _, text in described.values())


def test_a_first_configs_options_stand_first_and_all_others_once() -> None:
    assert keys(first_options()) == list(FIRST)
    assert keys(all_options())[: len(FIRST)] == list(FIRST)
    expected = [re.sub(r"method\[.+?\]", "method", key) for key, *_ in describe()]
    assert sorted(keys(all_options())) == sorted(expected)


@pytest.mark.parametrize("columns", ["72", "100"])
def test_text_of_several_lines_is_indented(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    lines = all_options().splitlines()
    assert max(map(len, lines)) <= int(columns)
    after_key = [b for a, b in pairwise(lines) if re.match(r"  [\w.]+  \(.*\)$", a)]
    assert len(after_key) > 100
    assert all(line.startswith(" " * 6) and line[6] != " " for line in after_key)
    assert all(re.match(r"( {2}| {6}| {8})\S|\S|$", line) for line in lines)


def test_help_of_train_and_of_config(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    said = capsys.readouterr().out
    assert keys(said) == list(FIRST)
    assert "onpath config --options" in said
    assert main(["config", "--options"]) == 0
    assert "optim.betas" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["config", "--options", "--schema"])
    assert "not allowed with" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["eval", "--help"]])
def test_help_is_quick(arguments: list[str]) -> None:
    """It loads next to nothing."""
    code = (
        "import sys; from onpath.commands.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as ended: assert not ended.code\n"
        "heavy = {'torch', 'transformers', 'pyarrow', 'numpy', 'pydantic', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, stdout=subprocess.DEVNULL)


def test_the_options_of_a_config_load_no_torch() -> None:
    code = (
        "import sys; from onpath.commands.cli import main\n"
        "assert main(['config', '--options']) == main(['config']) == 0\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
