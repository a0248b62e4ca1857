"""The command line is a thin skin over functions."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import onpath
from onpath.commands.cli import make_parser
from onpath.commands.demo import demo
from onpath.commands.doctor.command import run_doctor
from onpath.commands.inspect import ONLY, run_inspect
from onpath.commands.probes.command import PROBES, run_named
from onpath.system.errors import UserError
from tests.commands.report_data import make_run

COMMANDS: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "demo": (demo, []),
    "doctor": (run_doctor, []),
    "eval": (onpath.evaluate_model, ["MODEL", "--data", "F"]),
    "export": (onpath.export_model, ["RUN", "OUT"]),
    "inspect": (run_inspect, ["DIR"]),
    "inspect --probe": (run_named, ["DIR"]),
    "report": (onpath.write_report, ["DIR"]),
    "study": (onpath.run_study, ["F"]),
    "train": (onpath.train, []),
}
NOT_OPTIONS = {"overrides", "each"}
"""The rest of the command line, and where the findings go."""


@pytest.mark.parametrize("command", COMMANDS)
def test_defaults_are_those_of_the_function(command: str) -> None:
    function, needed = COMMANDS[command]
    options = vars(make_parser().parse_args([command.split()[0], *needed]))
    options |= {"prompt_id": options.get("id"), "directory": options.get("dir")}
    parameters = inspect.signature(function).parameters
    known = {n: p.default for n, p in parameters.items() if p.default is not p.empty and n not in NOT_OPTIONS}
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
