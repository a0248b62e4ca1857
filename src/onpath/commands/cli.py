"""The command line. Exit codes: 0 done, 2 the user can fix it (one sentence on stderr), 1 a fault of ours.

Subcommands import what they need when they run, so that `onpath --help` is quick and `onpath config` loads no
torch.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn

from onpath.system import __version__, code, launcher
from onpath.system.arguments import Parser
from onpath.system.errors import UserError, guarded
from onpath.system.streams import say
from onpath.system.text import one_line

_OF_SEVERAL = ("train", "doctor", "eval")
"""Commands whose processes, under a launcher, share the work."""
TAKES_OVERRIDES = ("train", "doctor", "config")
_OPTION = re.compile(r"--[A-Za-z][\w.-]*(=.*)?", re.DOTALL)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["gym"]:
        from onpath import gym

        return guarded(lambda: gym.main(arguments[1:]))
    overrides: list[tuple[str, str]] = []
    of_config = bool(arguments) and arguments[0] in TAKES_OVERRIDES
    if of_config:
        arguments, overrides = split_overrides(arguments)
    if "--allow-code" in arguments:
        code.allow()
    parser = make_parser(partial(_own_options, arguments, overrides))
    parser.of_config = of_config
    options = parser.parse_args(arguments)

    def run() -> int:
        command = options.command
        shares = command in _OF_SEVERAL or getattr(options, "probe", None)
        if launcher.several() and not shares:
            raise UserError(
                f"onpath {command} is one process, and WORLD_SIZE says several: start it without torchrun"
            )
        return int(options.run(options, overrides) or 0)

    return guarded(run)


def _own_options(arguments: Sequence[str], overrides: Sequence[tuple[str, str]]) -> Any:
    """The options of the method of one's own that a command line names, for its help; None: a built-in one's,
    or nothing that can be read."""
    from onpath.config import METHODS, load

    named = [a for a in arguments[1:] if not a.startswith("-")]
    try:
        chosen = type(load(named[0] if named else None, overrides).method)
    except UserError:
        return None
    return None if chosen in METHODS.values() else chosen


class _Parser(Parser):
    """Says in one sentence what is wrong with a command line, and guesses no abbreviations.

    Args:
        more: what stands below the options; it is asked only when the help is printed.
    """

    def __init__(self, *, more: Callable[[], str] | None = None, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)
        self.more = more
        self.of_config = False
        """Whether the command takes a config's options."""

    def format_help(self) -> str:
        """The epilog is made now."""
        if self.more is not None:
            self.epilog = self.more().replace("%", "%%")
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        """Exit code 2."""
        if found := re.match(r"argument COMMAND: invalid choice: '(.*?)' \(choose from (.*)\)", message):
            from onpath.config import nearest

            known = re.findall(r"[\w-]+", found[2])
            message = f"unknown command {found[1]}; {nearest(found[1], known)}"
        if found := re.match(r"unrecognized arguments: (.*)", message):
            from onpath.config.elsewhere import first_answer

            words = [w for w in found[1].split() if w.startswith("--")]
            section = _whole_section(words) or _section_of(words) if self.of_config else None
            message = section or first_answer(words) or message
        super().error(message)


def _whole_section(words: Sequence[str]) -> str | None:
    """How the options of a section are given, whose name is one of these."""
    from onpath.config import Config

    names = (word.removeprefix("--").partition("=")[0] for word in words)
    found = next((name for name in names if name in Config.model_fields), None)
    return found and f"--{found}: options are given one by one, as --{found}.option value, or in a file"


def _section_of(words: Sequence[str]) -> str | None:
    """Where the first option of a config that was given without its section belongs."""
    from onpath.config import options_called

    for word in words:
        ours = options_called(word.removeprefix("--").partition("=")[0].replace("-", "_"))
        if ours:
            told = " or ".join(f"--{key}" for key in ours)
            return f"{word}: an option of a config has its section before it, as {told}"
    return None


def _add_allow_code(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--allow-code",
        action="store_true",
        help="run the Python files that the config names (docs/extending.md); read them first",
    )


def make_parser(own: Callable[[], Any] = lambda: None) -> _Parser:
    """All subcommands with their options.

    Args:
        own: asked by the help for the options of a method of one's own.
    """
    parser = _Parser(prog="onpath", description="On-policy distillation that corrects whole trajectories.")
    parser.add_argument("--version", action="version", version=f"onpath {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_train(commands, own)
    _add_eval(commands)
    _add_study(commands)
    _add_report(commands)
    _add_export(commands)
    _add_cache(commands)
    _add_inspect(commands)
    _add_doctor(commands)
    _add_config(commands)
    # Its own parser answers `onpath gym --help`; here it only shows in the list.
    commands.add_parser(
        "gym", help="make the gym's tasks, train its models anew, measure them", add_help=False
    )
    return parser


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser(
        "demo",
        help="distil the bundled student by OPD, TRD, TOPD and relay, and show what happened",
        description="Distils the bundled student from the bundled teacher on the gym, by OPD, TRD and TOPD "
        "side by side, and by OPD and relay in a world in which errors stay; prints tables and trajectories, "
        "and writes a page that compares the first three.",
    )
    demo.add_argument("--quick", action="store_true", help="at most a minute: fewer updates, fewer problems")
    demo.add_argument(
        "--dir",
        default="runs",
        help="where the directory demo goes; the one of an earlier demo is replaced (default: runs)",
    )
    demo.set_defaults(run=_demo)


def _demo(options: argparse.Namespace, _: Sequence[tuple[str, str]]) -> int:
    from onpath.commands.demo import demo, print_demo
    from onpath.commands.terminal import console_for

    print_demo(console_for(sys.stdout), demo(quick=options.quick, directory=options.dir))
    return 0


def _add_train(commands: Any, own: Callable[[], Any]) -> None:
    train = commands.add_parser(
        "train",
        help="run a config to its end, or go on where it stopped",
        usage="onpath train [CONFIG.yaml] [--resume-with-changes] [--allow-code] [--section.key value ...]",
        description="Runs a config to its end; the same command goes on where a stopped run was.",
        more=lambda: _first_options(own()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("config", nargs="?", metavar="CONFIG.yaml", help="its options (default: the gym)")
    train.add_argument("--quiet", action="store_true", help="no progress display")
    train.add_argument(
        "--resume-with-changes",
        action="store_true",
        help="go on with a run even if its config, data or models are others than they were (changes.jsonl "
        "records it)",
    )
    _add_allow_code(train)
    train.set_defaults(run=_train)


def _first_options(own: Any) -> str:
    from onpath.commands.options import first_options

    return first_options(own)


def _train(options: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> int:
    from onpath.config import load

    config = load(options.config, overrides)  # what is wrong with it is said before torch is imported
    from onpath.training import train

    result = train(config, resume_with_changes=options.resume_with_changes, quiet=options.quiet)
    if launcher.speaks():
        if options.quiet and not result.trained:
            say(f"onpath: {result.directory} was finished before: nothing is trained")
        print(f"model: {result.model}")
    return 0


def _add_doctor(commands: Any) -> None:
    command = commands.add_parser(
        "doctor",
        help="look for silent faults before a run: ids, templates, scores, gradient, cost",
        usage="onpath doctor [CONFIG.yaml] [--json] [--allow-code] [--section.key value ...]",
        description="Checks a config for silent faults with a small real batch; writes nothing. Exit code 1: "
        "a check failed. docs/doctor.md says what each one looks at.",
    )
    command.add_argument("config", nargs="?", metavar="CONFIG.yaml", help="as for train (default: the gym)")
    command.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    _add_allow_code(command)
    command.set_defaults(run=_doctor)


def _doctor(options: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> int:
    from onpath.commands.doctor.command import print_counts, print_finding, run_doctor
    from onpath.commands.terminal import Shown

    console = Shown(file=sys.stdout, soft_wrap=True)
    each = (lambda _: None) if options.json else partial(print_finding, console)
    found = run_doctor(options.config, overrides=overrides, each=each)
    if options.json and launcher.speaks():
        print(json.dumps(found.to_json(), indent=1, ensure_ascii=False))
    elif launcher.speaks():
        print_counts(console, found)
    return int(found.status == "fail")


def _add_eval(commands: Any) -> None:
    command = commands.add_parser(
        "eval",
        help="grade a model's samples: avg@k, pass@k, intervals",
        description="Samples and grades a run, one of its checkpoints, a Hugging Face model directory, a gym "
        "model or a LoRA adapter. A run is asked as it asks itself: its data.system, data.template, "
        "data.enable_thinking, and what no option says here comes from its config. Any other model's prompts "
        "are rendered by the tokenizer's own template, but those of one that is compared with a run as the "
        "run's.",
    )
    command.add_argument(
        "model",
        metavar="MODEL",
        help="run directory, its checkpoints/step_N or best; directory or hub name, gym:student, adapter, "
        "gym:teacher",
    )
    command.add_argument(
        "--data", metavar="F", help="problems with answers: as data.eval (default: those of a run)"
    )
    command.add_argument(
        "--columns",
        metavar="YAML",
        help="what their columns are called: '{prompt: question}', as data.columns (default: as a run's)",
    )
    command.add_argument("--against", metavar="MODEL", help="a second model, compared on the same problems")
    command.add_argument(
        "--n", type=int, help="samples per problem (default: k if that is given, else the run's, or 4)"
    )
    command.add_argument("--k", type=int, help="pass@k (default: the run's, or 4; at most n)")
    command.add_argument("--limit", type=int, help="only the first so many problems")
    command.add_argument(
        "--grader",
        metavar="NAME",
        help="auto, gym, math, exact, code, or your own as file.py:name (default: the run's, or auto)",
    )
    command.add_argument("--temperature", type=float, help="0 is greedy (default: the run's, or 1)")
    command.add_argument("--top-p", type=float, help="default: the run's, or 1")
    command.add_argument("--top-k", type=int, help="default: the run's, or off")
    command.add_argument("--max-new-tokens", type=int, help="default: the run's, or 128")
    command.add_argument(
        "--batch-tokens", type=int, default=32_768, help="tokens in one generation batch (default: 32768)"
    )
    command.add_argument("--seed", type=int, help="of the samples (default: the run's, or 1234)")
    command.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="default: the run's, or float32"
    )
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:0")
    command.add_argument("--out", metavar="DIR", help="write eval.json and the graded samples there")
    command.add_argument(
        "--rollout.engine",
        dest="engine",
        choices=["hf", "vllm"],
        default="hf",
        help="who samples: transformers (default), or a vLLM in this process (docs/engines.md)",
    )
    command.add_argument(
        "--rollout.vllm", dest="vllm", metavar="YAML", help="its arguments: '{tensor_parallel_size: 2}'"
    )
    command.add_argument(
        "--parallel.shard",
        dest="shard",
        choices=["none", "layer", "step"],
        default="none",
        help="under torchrun: whole models in each process (default); or each has a part of the weights, and "
        "gathers a layer when it runs, or all of them while it samples (docs/scale.md)",
    )
    command.add_argument(
        "--parallel.timeout",
        dest="timeout",
        metavar="S",
        type=float,
        default=3600.0,
        help="seconds that a process waits for the others: shares of the samples may take one that much "
        "longer than another (default: 3600)",
    )
    command.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    _add_allow_code(command)
    command.set_defaults(run=_eval)


def _eval(options: argparse.Namespace, _: Sequence[tuple[str, str]]) -> int:
    from onpath.commands.eval import evaluate_model, print_evaluated
    from onpath.commands.terminal import console_for
    from onpath.system.reading import parse_yaml

    found = evaluate_model(
        options.model,
        data=options.data,
        columns=None if options.columns is None else parse_yaml(options.columns, where="--columns"),
        against=options.against,
        n=options.n,
        k=options.k,
        limit=options.limit,
        grader=options.grader,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        max_new_tokens=options.max_new_tokens,
        batch_tokens=options.batch_tokens,
        seed=options.seed,
        dtype=options.dtype,
        device=options.device,
        out=options.out,
        engine=options.engine,
        vllm=None if options.vllm is None else parse_yaml(options.vllm, where="--rollout.vllm"),
        shard=options.shard,
        timeout=options.timeout,
    )
    if options.json and launcher.speaks():
        print(json.dumps(found.to_json()))
    elif launcher.speaks():
        print_evaluated(console_for(sys.stdout), found)
    return 0


def _add_study(commands: Any) -> None:
    command = commands.add_parser(
        "study",
        help="compare arms over seeds: runs, intervals, paired differences",
        description="Runs arms × seeds from one YAML; the same command continues a stopped study.",
    )
    command.add_argument(
        "config", metavar="CONFIG.yaml", help="base, arms, seeds, budget, tune, evals, parallel"
    )
    command.add_argument("--quiet", action="store_true", help="no progress display")
    _add_allow_code(command)
    command.set_defaults(run=_study)


def _study(options: argparse.Namespace, _: Sequence[tuple[str, str]]) -> int:
    from onpath.commands.study.run import from_yaml, print_found
    from onpath.commands.terminal import console_for

    # What `run_study` does; but where some runs have failed, the results of the others are shown first.
    found = from_yaml(options.config, quiet=options.quiet)
    print_found(console_for(sys.stdout), found.data)
    found.check()
    print(f"study: {found.directory}")
    return 0


def _add_report(commands: Any) -> None:
    command = commands.add_parser(
        "report",
        help="one self-contained HTML page of a run or a study",
        description="Writes one HTML page with curves, comparisons and trajectories; it loads nothing.",
    )
    command.add_argument("directory", metavar="DIR", help="of a run or of a study")
    command.add_argument("--out", metavar="FILE", help="default: DIR/report.html")
    command.set_defaults(run=_report)


def _report(options: argparse.Namespace, _: Sequence[tuple[str, str]]) -> int:
    from onpath.commands.report.command import write_report

    page = write_report(options.directory, options.out)
    print(f"{page} ({page.stat().st_size / 1e6:.1f} MB)")
    return 0


def _add_cache(commands: Any) -> None:
    command = commands.add_parser(
        "cache",
        help="what is kept of teachers' scores and of rollouts; make it smaller",
        description="Says how many responses' scores a directory of teacher.cache holds, or a run of "
        "rollout.refresh how many rollouts, and how large they are. Removes damaged files of scores and "
        "those used longest ago; of rollouts the oldest phases, and none that the run would read if it went "
        "on.",
    )
    command.add_argument(
        "directory",
        nargs="?",
        metavar="DIRECTORY",
        help="a run, or as in teacher.cache (default: every run in runs that keeps rollouts)",
    )
    command.add_argument("--keep-gb", type=float, metavar="GB", help="remove what is beyond this size")
    command.set_defaults(run=_cache)


def _cache(options: argparse.Namespace, _: Sequence[tuple[str, str]]) -> int:
    from onpath.commands.cache import told

    for line in told(options.directory, keep_gb=options.keep_gb):
        print(line)
    return 0


def _add_export(commands: Any) -> None:
    command = commands.add_parser(
        "export",
        help="a Hugging Face model of a run or of one of its checkpoints",
        description="Writes a model directory that transformers loads by itself, with its tokenizer. A LoRA "
        "adapter is merged into the weights of its base.",
    )
    command.add_argument(
        "source",
        metavar="RUN_OR_CHECKPOINT",
        help="directory of a run (its final model, else its newest sound checkpoint), checkpoints/step_N "
        "or best",
    )
    command.add_argument("out", metavar="OUT", help="directory to write; it must not exist")
    command.add_argument(
        "--adapter", action="store_true", help="of a LoRA run: the adapter alone, not merged"
    )
    command.set_defaults(run=_export)


def _export(options: argparse.Namespace, _: Sequence[tuple[str, str]]) -> int:
    from onpath.commands.export import export_model

    print(f"model: {export_model(options.source, options.out, adapter=options.adapter)}")
    return 0


def _add_inspect(commands: Any) -> None:
    command = commands.add_parser(
        "inspect",
        help="look at what a run trained on: coloured tokens, edits, forks",
        description="Shows a run's stored trajectories, tokens coloured by a quantity.",
    )
    command.add_argument("directory", metavar="RUN_DIR")
    command.add_argument("--step", type=int, help="only this step (default: the last stored one)")
    command.add_argument(
        "--only",
        choices=["right", "wrong", "repaired", "harmed", "edited", "dropped", "forks"],
        help="filter: by verdict, wrong → right, right → wrong, rewritten, not trained on, with real forks",
    )
    command.add_argument("--id", metavar="PROMPT_ID", help="only trajectories of this prompt")
    command.add_argument(
        "--sort",
        default="stored",
        choices=["stored", "kl", "length"],
        help="largest first (default: as stored)",
    )
    command.add_argument(
        "--colour", help="per-token column to colour by (default: reverse_kl, or the first that there is)"
    )
    command.add_argument("--limit", type=int, default=5, help="how many (default: 5)")
    command.add_argument(
        "--json", action="store_true", help="for machines: JSON lines; of a probe its summary"
    )
    command.add_argument(
        "--probe",
        choices=["prefix-failure", "divergence", "local-correction", "meter"],
        help="measure instead of showing (RUN_DIR may be a config file): from where on can neither student "
        "nor teacher save a rollout; where do near futures part; what do a few updates at one prefix change; "
        "in one scoring pass, what predicts that a correction pays",
    )
    command.add_argument("--rollouts", type=int, default=32, help="of a probe (default: 32)")
    command.add_argument("--continuations", type=int, default=4, help="of a probe, per position (default: 4)")
    command.add_argument(
        "--every", type=int, default=8, help="tokens between a probe's positions (default: 8)"
    )
    _add_allow_code(command)
    command.set_defaults(run=_inspect)


_OF_PROBES = ("rollouts", "continuations", "every")
_OF_SHOWING = ("step", "only", "id", "sort", "colour", "limit")


def _check_inspect(options: argparse.Namespace) -> None:
    """No option is passed over in silence."""
    standard = vars(make_parser().parse_args(["inspect", "."]))
    given = [name for name, value in vars(options).items() if name in standard and value != standard[name]]
    for name in given:
        if not options.probe and name in _OF_PROBES:
            raise UserError(f"--{name} is of a probe; name one with --probe")
        if options.probe and name in _OF_SHOWING:
            raise UserError(f"--{name} chooses what is shown of a run, and --probe measures instead")
        if options.probe not in (None, "prefix-failure") and name in _OF_PROBES[1:]:
            raise UserError(f"--{name} is of --probe prefix-failure alone")


def _inspect(options: argparse.Namespace, _: Sequence[tuple[str, str]]) -> int:
    _check_inspect(options)
    if options.probe:
        from onpath.commands.probes.command import run_named, shown, summary_of

        path = run_named(
            options.probe,
            options.directory,
            rollouts=options.rollouts,
            continuations=options.continuations,
            every=options.every,
        )
        if launcher.speaks():
            print(json.dumps(summary_of(path)) if options.json else "\n".join(shown(path)))
        return 0
    from onpath.commands.inspect import print_inspected, run_inspect
    from onpath.commands.terminal import console_for

    found = run_inspect(
        options.directory,
        step=options.step,
        only=options.only,
        prompt_id=options.id,
        sort=options.sort,
        colour=options.colour,
        limit=options.limit,
    )
    if options.json:
        for row in found.rows:
            print(json.dumps(row, ensure_ascii=False))
    else:
        print_inspected(console_for(sys.stdout), found)
    return 0


def _add_config(commands: Any) -> None:
    command = commands.add_parser(
        "config",
        help="print the resolved defaults, all options, or the JSON schema",
        usage="onpath config [CONFIG.yaml] [--options | --schema] [--section.key value ...]",
        description="Prints the resolved config: defaults, then the file, then the overrides.",
    )
    command.add_argument("config", nargs="?", metavar="CONFIG.yaml", help="as for train (default: the gym)")
    instead = command.add_mutually_exclusive_group()
    instead.add_argument("--options", action="store_true", help="print what each option means instead")
    instead.add_argument("--schema", action="store_true", help="print the JSON schema instead")
    _add_allow_code(command)
    command.set_defaults(run=_config)


def _config(options: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> int:
    from onpath import config as configuration

    if options.options:
        from onpath.commands.options import all_options

        chosen = type(configuration.load(options.config, overrides).method)
        print(all_options(None if chosen in configuration.METHODS.values() else chosen))
    elif options.schema:
        print(json.dumps(configuration.json_schema(), indent=2))
    else:
        print(configuration.load(options.config, overrides).to_yaml(), end="")
    return 0


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Takes `--section.key value` and `--section.key=value` out of the arguments; argparse sees the rest.
    What looks like an option is a value only behind the sign of equality."""
    rest: list[str] = []
    pairs: list[tuple[str, str]] = []
    items = iter(arguments)
    for item in items:
        name, equals, value = item.removeprefix("--").partition("=")
        if not item.startswith("--") or "." not in name:
            rest.append(item)
            continue
        following = value if equals else next(items, None)
        if following is None or (not equals and _OPTION.fullmatch(following)):
            lacks = f"{item} needs a value: --section.key value"
            if following is not None:
                lacks += f", and {following} is an option (as a value: {item}={following})"
            print(f"onpath: {one_line(lacks, 400)}", file=sys.stderr)
            raise SystemExit(2)
        pairs.append((name, following))
    return rest, pairs


if __name__ == "__main__":
    sys.exit(main())
