"""What people type: text on a command line, names from other trainers, lengths that follow."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import PreTrainedTokenizerFast

from onpath.commands.cli import main
from onpath.commands.study.config import load_study
from onpath.commands.study.plan import check_alike
from onpath.config import Config, build, json_schema, load
from onpath.engines.student import shared_vocabulary
from onpath.system.errors import UserError
from onpath.training import train


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("run.name", "2024"),
        ("run.name", "1e5"),
        ("run.name", "2024-01-02"),
        ("run.name", "null-model"),
        ("run.name", "0x10"),
        ("run.dir", "007"),
        ("data.system", "Note: answer in {braces} # really"),
        ("data.system", "- a\n- b"),
        ("data.system", "'quoted'"),
        ("data.train", "2024.jsonl"),
        ("data.eval.test", "[a].jsonl"),
        ("student.model", "1.5"),
        ("student.lora_targets", "all: linear"),
        ("eval.grader", "math"),
        ("teacher.url", "http://localhost:8000"),
    ],
)
def test_text_is_taken_as_it_stands(key: str, text: str) -> None:
    given: list[tuple[str, Any]] = [(key, text)]
    if key == "teacher.url":
        given += [("teacher.engine", "vllm"), ("method.support", "teacher_topk")]
    value: Any = load(None, given)
    for part in key.split("."):
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    assert value == text


@pytest.mark.parametrize("first", [True, False])
def test_a_template_may_look_like_yaml(first: bool) -> None:
    text = "Fix. {problem} Try: {attempt}"
    given = [("method.template", text), ("method.name", "trd")]
    assert load(None, given if first else given[::-1]).method.template == text  # type: ignore[attr-defined]


def test_a_rule_is_a_word_or_a_mapping() -> None:
    assert load(None, [("rollout.refresh", "never")]).rollout.refresh == "never"
    assert load(None, [("rollout.refresh", "{every: 2}")]).refresh.every == 2  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        (
            {"rollout": {"refresh": {"every": 0}}},
            r"rollout\.refresh\.every is 0: .*greater than or equal to 1$",
        ),
        ({"rollout": {"refresh": {"evry": 2}}}, r"unknown key rollout\.refresh\.evry; did you mean every\?$"),
        ({"rollout": {"refresh": {"every": True}}}, r"rollout\.refresh: every is true, which is no number$"),
        ({"parallel": {"hosts": 0}}, r"parallel\.hosts is 0: .* equal to 1, or 'auto'$"),
        (
            {"method": {"name": "topd", "guidance_weight": "x"}},
            r"method\.guidance_weight is 'x': .*, or 'auto'$",
        ),
        ({"teacher": {"url": 5}}, r"teacher\.url is 5: input should be a valid string, or a valid list$"),
    ],
)
def test_an_option_of_several_types_is_named_as_it_is_written(tree: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        build(tree)


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({"student": {"dtype": "bf16"}}, "student.dtype is 'bf16': .*; did you mean bfloat16\\?$"),
        ({"teacher": {"dtype": "torch.float16"}}, "; did you mean float16\\?$"),
        ({"student": {"dtype": "int4"}}, "'float32', 'bfloat16' or 'float16'$"),
        ({"method": {"name": "gkd"}}, "; did you mean opd with method.divergence: jensen_shannon\\?$"),
        ({"method": {"name": "topdd"}}, "; did you mean topd\\?$"),
        ({"method": "gkd"}, r"such as \{name: opd\}; did you mean opd with method.divergence: jensen_shan"),
        ({"method": "trd"}, r"it must be a mapping such as \{name: trd\}$"),
        ({"method": ["opd"]}, r"it must be a mapping such as \{name: opd\}$"),
        ({"method": {"divergence": "JSD"}}, "; did you mean jensen_shannon\\?$"),
        ({"method": {"divergence": "reverse-kl"}}, "; did you mean reverse_kl\\?$"),
        ({"run": {"trackers": ["WandB"]}}, "; did you mean wandb\\?$"),
        ({"run": {"trackers": "wandb"}}, r"trackers is 'wandb'; it must be a list, such as \['wandb'\]$"),
        ({"parallel": {"shard": "fsdp"}}, "; did you mean layer\\?$"),
        ({"optim": {"schedule": "cosin"}}, "; did you mean cosine\\?$"),
        ({"optim": {"steps": "1e3"}}, "optim.steps is '1e3', which YAML reads as text; write 1000$"),
        ({"optim": {"steps": "1e-3"}}, "optim.steps is '1e-3': input should be a valid integer"),
        ({"student": "m"}, r"student is 'm'; it must be a mapping of options, such as \{model: "),
    ],
)
def test_values_from_elsewhere_are_answered_with_ours(tree: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        build(tree)


def test_so_is_an_option_of_a_study(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text("arms: {opd: {}}\nparallel: {processes: [1]}\n")
    with pytest.raises(UserError, match=r"study.yaml: parallel\.processes is '\[1\]': .*, or 'auto'$"):
        load_study(path)


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({"data": {"eval": ["a.jsonl"]}}, r"data.eval is \['a.jsonl'\]; it must be a file, or {name: file}"),
        ({"teachers": "m"}, r"teachers is 'm'; it must be {name: {model: …}}"),
        (
            {"rewards": "a.py:f"},
            "rewards is 'a.py:f'; it must be {name: file.py:function}, a list of those, or",
        ),
        ({"optim": None}, "optim is None; it must be a mapping of options, or be left out"),
        ({"rollout": {"vllm": 5}}, "rollout.vllm is 5; it must be a mapping$"),
    ],
)
def test_what_takes_a_mapping_says_which(tree: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        build(tree)


def test_own_code_is_named_as_contributing_says() -> None:
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    said = re.findall(r"`([a-z_.]+): ([^`]*mine\.py:[^`]*)`", text)
    assert len(said) >= 6
    for dotted, value in said:
        section, _, key = dotted.partition(".")
        given = yaml.safe_load(value)
        with pytest.raises(UserError, match="is Python code that the config names"):
            build({section: {key: given} if key else given})


def test_a_list_on_the_command_line_is_no_file() -> None:
    with pytest.raises(UserError, match=r"data.eval is \['a.jsonl'\]; it must be a file, or {name: file}"):
        load(None, [("data.eval", "[a.jsonl]")])


@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        ([("method.name", "odp")], "the command line: method.name is 'odp'"),
        ([("eval.k", "8")], "the command line: eval.k is 8"),
        ([("rollout.temperature", "0.5")], "the command line: method.name opd assumes"),
        (
            [("data.eval", "maze:test"), ("eval.grader", "gym")],
            "the command line: eval.grader: gym reads the gym's answers, not those of maze:test; use auto",
        ),
        ([("method.beta", "1")], "the command line: method.beta"),
        ([("method.discount", "0.5")], "the command line: method: ppo_clip and discount"),
        ({"optim.lrr": 1}, "overrides: unknown key optim.lrr"),
        ({"lr": 1}, "overrides: lr: options are section.key; "),
        ([("lr", "1")], "--lr: options are --section.key value; "),
    ],
)
def test_an_error_is_said_of_where_it_was_made(overrides: Any, where: str, tmp_path: Path) -> None:
    path = tmp_path / "base.yaml"
    path.write_text("optim: {steps: 2}\n")
    with pytest.raises(UserError, match=f"^{re.escape(where)}"):
        load(path, overrides)
    path.write_text("eval: {k: 8}\n")
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}: eval.k is 8"):
        load(path, [("optim.steps", "3")])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("arms: {opd: {eval.k: 8}}", "arm opd: eval.k is 8"),
        ("arms: {opd: {}}\nseeds: 0", "seeds: 0 makes no run; give a number of seeds"),
    ],
)
def test_so_is_one_of_a_study(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}: {says}"):
        check_alike(load_study(path))


@pytest.mark.parametrize("given", [False, True])
def test_a_teacher_that_nobody_gave_is_said_to_be_the_default(
    given: bool, model_dirs: dict[str, Path], tokenizer: PreTrainedTokenizerFast
) -> None:
    teacher = {"model": "gym:teacher"} if given else {}
    config = build(
        {
            "student": {"model": str(model_dirs["student"])},
            "teacher": teacher,
            "data": {"train": "rows.jsonl"},
        }
    )
    named = "teacher.model: " if given else "teacher.model (not given, so gym:teacher): "
    with pytest.raises(UserError, match=f"^{re.escape(named)}student and teacher must share one vocabulary"):
        shared_vocabulary(config, tokenizer)


def test_what_is_not_text_is_still_yaml() -> None:
    config = load(
        None,
        [
            ("optim.steps", "7"),
            ("optim.betas", "[0.5, 0.6]"),
            ("data.limit", "null"),
            ("data.system", "None"),
            ("student.lora_targets", "[q_proj, v_proj]"),
            ("data.eval", "{a: gym:test, b: gym:hard}"),
            ("rollout.vllm", "{gpu_memory_utilization: 0.4}"),
            ("eval.start", "false"),
            ("run.trackers", "[]"),
        ],
    )
    assert (config.optim.steps, config.optim.betas, config.data.limit) == (7, (0.5, 0.6), None)
    assert (config.data.system, config.eval.start) == (None, False)
    assert config.student.lora_targets == ["q_proj", "v_proj"]
    assert config.data.eval == {"a": "gym:test", "b": "gym:hard"}
    assert load(None, [("data.eval", "gym:hard")]).data.eval == {"hard": "gym:hard"}
    assert load(None, [("method.name", "topd"), ("method.guidance_weight", "auto")]).method
    assert (
        load(None, [("method.name", "topd"), ("method.guidance_weight", "0.5")]).method.guidance_weight == 0.5
    )  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("data.eval", r"data\.eval is None; it must be .* \(\{\} for none\)"),
        ("student.model", r"student\.model is None: "),
    ],
)
def test_null_is_no_name(key: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        load(None, [(key, "null")])


def test_a_limit_of_evaluations_is_not_that_of_training() -> None:
    for call in (lambda: build({"eval": {"limit": 5}}), lambda: load(None, [("eval.limit", "5")])):
        with pytest.raises(UserError, match=r"eval\.limit.* data\.eval_limit$"):
            call()


@pytest.mark.parametrize(
    ("key", "ours"),
    [
        ("optim.learning_rate", "optim.lr"),
        ("optim.per_device_train_batch_size", "rollout.prompts"),
        ("run.push_to_hub", "hf upload"),
        ("student.load_in_4bit", "student.quantization"),
        ("optim.fsdp", "parallel.shard"),
        ("student.chat_template", "data.chat_template"),
        ("optim.num_train_epochs", "optim.steps"),
        ("optim.beta", "method.beta"),
        ("method.lmbda", "student's own"),
        ("run.save_steps", "run.save_every"),
        ("run.report_to", "run.trackers"),
        ("optim.warmup_ratio", "optim.warmup"),
        ("rollout.max_completion_length", "rollout.max_new_tokens"),
        ("optim.save_every", "run.save_every"),
        ("optim.temperature", "rollout.temperature or eval.temperature"),
        ("run.early_stopping_patience", "run.stop_after"),
    ],
)
def test_names_from_elsewhere_are_answered_with_ours(key: str, ours: str) -> None:
    section, name = key.split(".")
    for tree in ({section: {name: 1}}, {name: 1}, {"training": {name: 1}}):
        if "." not in ours or (tree.keys() == {"training"}):
            continue
        with pytest.raises(UserError, match=rf"unknown key .*{name}; (here it is|it is not) .*{ours}"):
            build(tree)
    with pytest.raises(UserError, match=f"{ours}"):
        load(None, [(key, "1")])


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        (
            {"actor_rollout_ref": {"hybrid": True, "model": {"path": "m"}}},
            r"unknown key actor_rollout_ref; actor_rollout_ref\.model\.path: here it is student\.model",
        ),
        ({"trainer": {"save_freq": 3}}, r"trainer; trainer\.save_freq: here it is run\.save_every"),
        ({"trainer": {"mine": 3}}, "unknown key trainer; known here: student"),
        (
            {"data": {"columns": {"question": "prompt"}}},
            r"data\.columns\.question: our name comes first, then yours; write prompt: question",
        ),
        ({"data": {"columns": {"question": "text"}}}, "then yours; ours are prompt, messages"),
    ],
)
def test_a_section_of_theirs_and_columns_the_other_way_round(tree: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        build(tree)


@pytest.mark.parametrize(
    ("words", "ours"),
    [
        (["--learning_rate", "1e-5"], "--learning_rate: here it is optim.lr"),
        (["--lr", "1e-5"], "--lr: an option of a config has its section before it, as --optim.lr"),
        (["--max-new-tokens=9"], "as --rollout.max_new_tokens or --eval.max_new_tokens"),
        (["--per-device-train-batch-size", "8"], "here it is rollout.prompts"),
        (["--training.learning_rate", "1e-5"], "here it is optim.lr"),
        (["--push_to_hub"], "--push_to_hub: it is not done; hf upload"),
        (["--actor_rollout_ref.model.path", "m"], "here it is student.model"),
        (["--actor_rollout_ref.rollout.n", "4"], "here it is rollout.n or eval.n"),
        (["--method", "{name: opd}"], "--method: options are given one by one, as --method.option value"),
    ],
)
def test_so_are_they_on_the_command_line(
    words: list[str], ours: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["train", *words])
    except SystemExit as stop:
        code = int(stop.code or 0)
    said = capsys.readouterr().err
    assert code == 2
    assert said.startswith("onpath: ")
    assert ours in said
    assert said.count("\n") == 1


def test_a_run_on_columns_of_other_names(
    tiny: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"problem": f"{i}+1=?", "meta": {"final": i + 1}} for i in range(9)]
    source = tmp_path / "theirs.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = tmp_path / "config.yaml"
    file.write_text(tiny(data__train=str(source), optim__steps=1).to_yaml())
    columns = ["--data.columns", "{prompt: problem}", "--data.columns.answer", "meta.final"]
    assert main(["train", str(file), "--quiet", *columns]) == 0
    assert main(["train", str(file), "--quiet", "--data.columns", "{question: problem}"]) == 2
    assert "data.columns.question" in capsys.readouterr().err


def test_evaluations_are_as_long_as_rollouts() -> None:
    assert Config().eval.max_new_tokens == Config().rollout.max_new_tokens
    config = build({"rollout": {"max_new_tokens": 4096}})
    assert config.eval.max_new_tokens == config.eval.sampling().max_new_tokens == 4096
    assert build(config.model_dump(mode="json")) == config
    assert load(None, [("rollout.max_new_tokens", "300"), ("eval.n", "8")]).eval.max_new_tokens == 300
    assert build({"rollout": {"max_new_tokens": 9}, "eval": {"max_new_tokens": 7}}).eval.max_new_tokens == 7
    with pytest.raises(UserError, match=r"rollout\.max_new_tokens is 'many'"):
        build({"rollout": {"max_new_tokens": "many"}})


def test_the_evaluation_line_shows_what_was_cut(
    tiny: Callable[..., Config], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    result = train(tiny(optim__steps=1, eval__max_new_tokens=2))
    (line,) = result.evaluations
    assert line["finished"] < 1
    assert f"unfinished {1 - line['finished']:.1%}" in capsys.readouterr().err


def test_processes_outwait_a_server_that_one_of_them_waits_for() -> None:
    assert build({}).longest_wait == 600
    assert build({"parallel": {"timeout": 5}}).longest_wait == 5
    served = {"engine": "vllm", "url": "http://localhost:1", "patience": 300, "timeout": 20}
    assert build({"rollout": served, "parallel": {"timeout": 5}}).longest_wait == 380
    assert build({"rollout": served, "parallel": {"timeout": 500}}).longest_wait == 500
    teaches = {"teacher": {"model": "a/b", **served, "patience": 900}, "method": {"support": "teacher_topk"}}
    assert build(teaches).longest_wait == 980


def test_the_schema_takes_own_code_by_its_name() -> None:
    """JSON Schema searches for a pattern; nothing but this checks it, for the config does so itself."""
    built_in, own = json_schema()["$defs"]["Eval"]["properties"]["grader"]["anyOf"]
    assert "math" in built_in["enum"]
    for name, fits in {
        "mine.py:grade": True,
        "a/b.py:_f2": True,
        "mine.py:2": False,
        "mine.py": False,
    }.items():
        assert bool(re.search(own["pattern"], name)) == fits, name
