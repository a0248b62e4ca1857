"""Bad input: one sentence that names what is wrong, exit code 2, no traceback, nothing half-written."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3ForCausalLM

from onpath.commands.cli import main
from onpath.config.build import build, load
from onpath.config.whole import Config
from onpath.records import Sampling
from onpath.run.assemble import assemble
from onpath.run.log import read_lines
from onpath.system.errors import UserError
from onpath.training import sample, train
from tests.conftest import CHARACTERS, make_model, make_tokenizer

Break = Callable[["Case"], None]


class Case:
    """A config that would run, ready to be broken."""

    def __init__(self, config: Config, root: Path) -> None:
        self.root = root
        self.data: dict[str, dict[str, Any]] = config.model_dump(mode="json")
        self.overrides: list[str] = []
        self.text: str | None = None
        for side in ("student", "teacher"):
            shutil.copytree(self.data[side]["model"], root / side)
            self.data[side]["model"] = str(root / side)
        self.train = root / "train.jsonl"
        shutil.copy(self.data["data"]["train"], self.train)
        self.data["data"] |= {"train": str(self.train), "eval": {"test": str(self.train)}}
        self.run = Path(self.data["run"]["dir"]) / self.data["run"]["name"]

    def set(self, dotted: str, value: object) -> None:
        section, key = dotted.split(".")
        if dotted == "method.name":
            self.data["method"] = {}
        self.data[section][key] = value

    def rows(self, *rows: object) -> None:
        self.train.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows))

    def arguments(self) -> list[str]:
        path = self.root / "config.yaml"
        path.write_text(json.dumps(self.data) if self.text is None else self.text)
        return ["train", str(path), "--quiet", *self.overrides]


def changed_tokenizer(case: Case) -> None:
    other = [*CHARACTERS[:4], *reversed(CHARACTERS[4:14]), *CHARACTERS[14:]]
    make_tokenizer(other).save_pretrained(case.root / "teacher")


def no_eos(case: Case) -> None:
    for name in ("tokenizer_config.json", "generation_config.json", "config.json"):
        path = case.root / "student" / name
        settings = json.loads(path.read_text())
        for key in ("eos_token", "eos_token_id"):
            settings.pop(key, None)
        path.write_text(json.dumps(settings))


def half_the_weights(case: Case) -> None:
    path = case.root / "student" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:2000])


def other_config_there(case: Case) -> None:
    case.run.mkdir(parents=True)
    (case.run / "config.yaml").write_text("optim: {lr: 0.5}\n")
    (case.run / "environment.jsonl").touch()
    (case.run / "eval.jsonl").write_text('{"step": 0}\n')


def nan_weight(case: Case) -> None:
    path = case.root / "student" / "model.safetensors"
    tensors = load_file(path)
    name = next(n for n in sorted(tensors) if "mlp" in n)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})


def directory_is_a_file(case: Case) -> None:
    case.run.parent.parent.mkdir(parents=True, exist_ok=True)
    case.run.parent.write_text("")


def longer_context(case: Case) -> None:
    case.rows(*({"prompt": "1" * (505 if i == 7 else 1), "answer": "1"} for i in range(9)))


def one_weight_missing(case: Case) -> None:
    path = case.root / "student" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


def settings(name: str, file: str = "config.json", **changes: object) -> Break:
    """A change to one of the files beside a model."""

    def change(case: Case) -> None:
        path = case.root / name / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def chat_template(text: str) -> Break:
    return lambda case: (case.root / "student" / "chat_template.jinja").write_text(text) and None


def broken_config_there(text: str) -> Break:
    def write(case: Case) -> None:
        case.run.mkdir(parents=True)
        (case.run / "config.yaml").write_text(text)
        (case.run / "environment.jsonl").touch()
        (case.run / "eval.jsonl").write_text('{"step": 0}\n')

    return write


def adapter_of_nothing(case: Case) -> None:
    (case.root / "student" / "adapter_config.json").write_text("{}")


CASES: dict[str, tuple[Break, str]] = {
    "invalid YAML": (
        lambda c: setattr(c, "text", "optim:\n  lr: [1\n"),
        r"config\.yaml, line \d+: not valid YAML",
    ),
    "not a mapping": (lambda c: setattr(c, "text", "- 1\n"), r"must be a mapping of sections"),
    "wrong section": (lambda c: c.data.update(optimizer={}), r"unknown key optimizer; did you mean optim\?"),
    "wrong key": (lambda c: c.set("optim.learning_rate", 1), r"unknown key optim\.learning_rate"),
    "a dotted key in a file": (
        lambda c: c.data.update({"optim.steps": 3}),
        r"unknown key optim\.steps: in a file it is written optim: \{steps: …\}",
    ),
    "misspelt key": (lambda c: c.overrides.extend(["--rollout.promts", "3"]), r"did you mean prompts\?"),
    "wrong type": (lambda c: c.set("optim.steps", "many"), r"optim\.steps is 'many'"),
    "out of range": (lambda c: c.set("optim.lr", -1), r"optim\.lr is -1: input should be greater than 0"),
    "wrong method": (
        lambda c: c.set("method.name", "grpo"),
        r"method\.name is 'grpo'; .*opd, opsd, relay, topd, trd, truncate",
    ),
    "key of another method": (
        lambda c: (c.set("method.name", "opd"), c.set("method.window", 5))[0],
        r"unknown key method\.window",
    ),
    "k above n": (lambda c: c.set("eval.k", 9), r"eval\.k is 9, but eval\.n gives only 2"),
    "tempered rollouts": (lambda c: c.set("rollout.temperature", 0.7), r"assumes untruncated samples"),
    **{
        f"the sampled estimator on tempered rollouts, {name}": (
            lambda c, name=name: (
                c.set("method.name", name),
                c.set("method.divergence", "sampled"),
                c.set("method.off_policy", True),
                c.set("method.entry_clip", None),
                c.set("rollout.temperature", 0.7),
            )[0],
            r"assumes untruncated samples",
        )
        for name in ("opd", "opsd", "topd", "truncate")
    },
    "bare top-k advantage": (
        lambda c: (c.set("method.divergence", "sampled"), c.set("method.support", "teacher_topk"))[0],
        r"zero expected gradient",
    ),
    "override without value": (lambda c: c.overrides.append("--optim.lr"), r"--optim\.lr needs a value"),
    "missing data file": (lambda c: c.train.unlink(), r"data\.train: '.*train\.jsonl': no such file"),
    "bad JSON line": (
        lambda c: c.rows({"prompt": "1", "answer": "1"}, "{oops\n"),
        r"train\.jsonl, line 2: .*skip_bad",
    ),
    "missing column": (lambda c: c.rows({"question": "1"}), r"line 1: .*prompt"),
    "wrong prompt type": (lambda c: c.rows({"prompt": 3, "answer": "1"}), r"line 1: .*prompt"),
    "empty data": (lambda c: c.rows(), r"no prompts to use"),
    "same id twice": (
        lambda c: c.rows(
            {"id": "a", "prompt": "1", "answer": "1"}, {"id": "a", "prompt": "2", "answer": "2"}
        ),
        r"line 2: id 'a'",
    ),
    "pool too small": (lambda c: c.set("data.limit", 3), r"rollout\.prompts is 8, but there are only 3"),
    "eval without answers": (lambda c: c.rows(*({"prompt": str(i)} for i in range(9))), r"have no answer"),
    "prompt too long": (
        longer_context,
        r"'7' \(.*train\.jsonl, line 8\) has 507 tokens.* does not fit the student's context of 512",
    ),
    "vLLM with too little room": (
        lambda c: (c.set("rollout.engine", "vllm"), c.set("rollout.vllm", {"max_model_len": 16})),
        r"rollout\.vllm: max_model_len is 16, but a prompt has .* set it to at least",
    ),
    "opsd without solution": (
        lambda c: (
            c.set("method.name", "opsd"),
            c.rows(*({"prompt": str(i), "answer": "1"} for i in range(9))),
        )[0],
        r"column solution for every prompt, but 9 of 9 have none, the first .*'0' \(.*train\.jsonl, line 1\)",
    ),
    "no such model": (
        lambda c: c.set("student.model", "./nowhere"),
        r"student\.model: there is no directory",
    ),
    "no model inside": (lambda c: (c.root / "teacher" / "config.json").unlink(), r"teacher\.model"),
    "no model at all": (
        lambda c: [p.unlink() for p in (c.root / "student").iterdir()],
        r"student\.model: .* is no model's directory: it has no config\.json",
    ),
    "no tokenizer": (
        lambda c: [(c.root / "student" / f).unlink() for f in ("tokenizer.json", "tokenizer_config.json")],
        r"student\.model: .* has no tokenizer",
    ),
    "damaged weights": (half_the_weights, r"student\.model"),
    "other vocabulary": (
        changed_tokenizer,
        r"one vocabulary, but 10 tokens differ: ('.' is \d+ .*; ){5}choose",
    ),
    "no EOS": (no_eos, r"EOS"),
    "LoRA on nothing": (
        lambda c: (c.set("student.lora_rank", 2), c.set("student.lora_targets", ["nothing"]))[0],
        r"student\.lora_targets",
    ),
    "LoRA on one name of two": (
        lambda c: (c.set("student.lora_rank", 2), c.set("student.lora_targets", ["q_proj", "v_prj"]))[0],
        r"student\.lora_targets: no module is called 'v_prj'; linear ones are .*q_proj, up_proj, v_proj",
    ),
    "LoRA on a name as a text": (
        lambda c: (c.set("student.lora_rank", 2), c.set("student.lora_targets", "v_proj"))[0],
        r"student\.lora_targets: no module is called 'v_proj'; a text is a regular .* names are a list",
    ),
    "LoRA on no regular expression": (
        lambda c: (c.set("student.lora_rank", 2), c.set("student.lora_targets", "*q_proj"))[0],
        r"student\.lora_targets: nothing to repeat",
    ),
    "unknown device": (lambda c: c.set("student.device", "gpu"), r"student\.device"),
    "tracker not known": (lambda c: c.set("run.trackers", ["mlflow"]), r"run\.trackers"),
    "run of another config": (other_config_there, r"belongs to a run with another config"),
    "directory is a file": (directory_is_a_file, r"cannot write"),
    "Python in YAML": (
        lambda c: setattr(c, "text", "optim: !!python/object/apply:os.system ['true']\n"),
        r"line 1: not valid YAML",
    ),
    "key of a value": (lambda c: c.overrides.extend(["--optim.lr.x", "3"]), r"optim\.lr is .*has no key x"),
    "infinite rate": (lambda c: c.overrides.extend(["--optim.lr", ".inf"]), r"optim\.lr .*finite"),
    "key twice": (
        lambda c: setattr(c, "text", "optim: {lr: 0.1}\nrun: {}\noptim: {steps: 3}\n"),
        r"line 3: not valid YAML: optim stands here a second time",
    ),
    "moment decay": (lambda c: c.set("optim.betas", [0.9, 1.5]), r"optim\.betas: must be two numbers"),
    "run beside its directory": (
        lambda c: c.set("run.name", "../x"),
        r"run\.name: '\.\./x' cannot name a directory",
    ),
    "wrong on the command line": (
        lambda c: c.overrides.extend(["--optim.lr", "abc"]),
        r"^onpath: the command line: optim\.lr is 'abc'",
    ),
    "weights that are not numbers": (nan_weight, r"student\.model: its logits are not finite \(model\."),
    "run without a name": (lambda c: c.set("run.name", ""), r"run\.name is ''"),
    "student in float16": (
        lambda c: c.set("student.dtype", "float16"),
        r"student\.dtype float16 cannot train",
    ),
    "top-k without a tail": (
        lambda c: (c.set("method.support", "teacher_topk"), c.set("method.tail", "none"))[0],
        r"method\.tail is 'none'",
    ),
    "clip of another objective": (
        lambda c: c.set("method.ppo_clip", 0.2),
        r"ppo_clip.* belong to kind sampled",
    ),
    "unknown file type": (
        lambda c: (shutil.copy(c.train, c.root / "a.tsv"), c.set("data.train", str(c.root / "a.tsv")))[1],
        r"unknown file type '\.tsv'",
    ),
    "one weight missing": (
        one_weight_missing,
        r"1 weights of .* are missing, the first is model\.norm\.weight",
    ),
    "weights of another shape": (
        settings("teacher", intermediate_size=80),
        r"teacher\.model: 6 weights of .* have another shape than its config\.json says",
    ),
    "model family without a name": (settings("student", model_type="zzz"), r"student\.model: .* `zzz`"),
    "not a causal LM": (settings("student", model_type="t5"), r"student\.model: cannot load a causal LM"),
    "broken tokenizer": (
        lambda c: (c.root / "student" / "tokenizer.json").write_text("{") and None,
        r"student\.model: cannot load a tokenizer",
    ),
    "broken chat template": (
        chat_template("{% for m in %}"),
        r"prompt '0' \(.*train\.jsonl, line 1\): the chat template refuses it",
    ),
    "chat template that refuses": (
        chat_template("{{ raise_exception('no such role') }}"),
        r"the chat template refuses it: no such role",
    ),
    "teacher with a short context": (
        settings("teacher", max_position_embeddings=16),
        r"teacher\.model: its context of 16 tokens is too short",
    ),
    "solution too long": (
        lambda c: (
            c.set("method.name", "opsd"),
            c.set("method.template", "{problem} {solution}"),
            c.rows(
                *(
                    {"prompt": str(i), "answer": "1", "solution": "1" * (505 if i == 8 else 3)}
                    for i in range(9)
                )
            ),
        )[0],
        r"prompt '8' \(.*train\.jsonl, line 9\) with its solution has \d+ tokens",
    ),
    "adapter without a base": (
        adapter_of_nothing,
        r"adapter_config\.json: damaged: base_model_name_or_path is missing",
    ),
    "device that holds nothing": (lambda c: c.set("student.device", "meta"), r"student\.device is meta"),
    "teacher's device": (lambda c: c.set("teacher.device", "cpu:x"), r"teacher\.device is cpu:x"),
    "run of a damaged config": (broken_config_there("optim: [\n"), r"config\.yaml: damaged"),
    "run of an empty config": (broken_config_there(""), r"config\.yaml: damaged"),
}


@pytest.mark.parametrize("name", CASES)
def test_one_sentence_and_exit_2(
    name: str, tiny: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = Case(tiny(), tmp_path)
    break_it, expected = CASES[name]
    break_it(case)
    there = case.run.exists()
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != "config.yaml"}
    try:
        code = main(case.arguments())
    except SystemExit as stop:
        code = int(stop.code or 0)
    said = capsys.readouterr()
    assert code == 2, said.err
    assert "Traceback" not in said.err
    sentence = said.err.strip()
    assert sentence.startswith("onpath: ")
    assert "\n" not in sentence, "one sentence, one line"
    assert re.search(expected, sentence), sentence
    after = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != "config.yaml"}
    assert {p: after.get(p) for p in before} == before, "what was there stays as it was"
    assert case.run.exists() == there, "the corrected command must not meet the directory of another config"
    assert not (case.run / "metrics.jsonl").exists()
    assert not (case.run / "model").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["trian"], "unknown command trian; did you mean train?"),
        (["frob"], "unknown command frob; known here: demo, train, eval"),
        (["eval"], "the following arguments are required: MODEL"),
        (["train", "--quie"], "unrecognized arguments: --quie"),
        (["eval", "gym:student", "--data", "gym:test", "--k", "x"], "argument --k: invalid int value: 'x'"),
    ],
)
def test_a_mistyped_command_line_is_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.startswith(f"onpath: {sentence}")
    assert said.count("\n") == 1


@pytest.mark.parametrize("name", ["off", "no", "y"])
def test_a_run_may_be_called_what_yaml_takes_for_a_truth_value(name: str) -> None:
    assert load(None, [("run.name", name)]).run.name == name
    assert load(None, [("eval.start", "off")]).eval.start is False


@pytest.mark.parametrize(
    ("sets", "also_at", "name"),
    [
        ({"test": "gym:test", "test_T0.6": "gym:hard"}, [0.6], "test_T0.6"),
        ({"test_greedy": "gym:hard", "test": "gym:test"}, [0.0], "test_greedy"),
        ({"test": "gym:test"}, [0.123456789, 0.1234567891], "test_T0.123457"),
    ],
)
def test_two_evaluations_of_one_name_are_refused(
    sets: dict[str, str], also_at: list[float], name: str
) -> None:
    with pytest.raises(UserError, match=f"two evaluations would be called {name}"):
        build({"data": {"eval": sets}, "eval": {"also_at": also_at}})


def test_no_config_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, what in (
        (tmp_path / "nope.yaml", "no such config file"),
        (tmp_path, "is a directory, and no config file"),
    ):
        assert main(["train", str(path)]) == 2
        assert capsys.readouterr().err == f"onpath: {path}: {what}\n"


def test_an_empty_section_takes_an_override(tmp_path: Path) -> None:
    """Somebody has commented out all of its keys."""
    (tmp_path / "a.yaml").write_text("optim:\n")
    assert load(tmp_path / "a.yaml", {"optim.lr": "0.5"}).optim.lr == 0.5


def test_a_model_that_does_more_to_its_logits_is_refused(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses are formed from hidden states and head: a family that also scales, say, must be known."""
    real = Qwen3ForCausalLM.forward

    def scaled(self: Any, *args: Any, **named: Any) -> Any:
        output = real(self, *args, **named)
        output.logits = 1.1 * output.logits
        return output

    monkeypatch.setattr(Qwen3ForCausalLM, "forward", scaled)
    with pytest.raises(UserError, match=r"student\.model: qwen3 models change their logits in a way"):
        assemble(tiny())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_said(temperature: float, tiny: Callable[..., Config]) -> None:
    parts = assemble(tiny())
    with torch.no_grad():
        parts.models.student.model.norm.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="logits are not finite"):
        parts.generators.student.continue_from([(1, 5)], Sampling(temperature=temperature, max_new_tokens=3))


@pytest.mark.parametrize("model", ["student", "teacher"])
def test_logits_that_are_no_numbers_are_said_side_by_side(
    model: str, tiny: Callable[..., Config], tmp_path: Path
) -> None:
    parts = assemble(tiny(method__name="relay", method__from_start=True))
    parts.method.before_training(parts.prompts.pool, tmp_path)
    with torch.no_grad():
        (parts.models.student if model == "student" else parts.models.teacher.model).model.norm.weight.fill_(
            float("nan")
        )
    with pytest.raises(UserError, match="logits are not finite"):
        sample(parts, 0)


def test_a_gradient_that_is_no_number_stops_the_run(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = import_module("onpath.training")
    real = module.loss_of

    def spoilt(*args: Any) -> Any:
        result = real(*args)
        return replace(result, loss=result.loss * float("nan"))

    monkeypatch.setattr(module, "loss_of", spoilt)
    config = tiny()
    with pytest.raises(UserError, match="step 1: the gradient is not finite"):
        module.train(config, quiet=True)
    assert not (Path(config.run.dir) / config.run.name / "model").exists()


def test_the_unbroken_case_runs(tiny: Callable[..., Config], tmp_path: Path) -> None:
    case = Case(tiny(), tmp_path)
    assert main(case.arguments()) == 0
    assert (case.run / "model").is_dir()


def test_teacher_equal_to_student_is_warned_about(
    tiny: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = Case(tiny(), tmp_path)
    case.set("teacher.model", case.data["student"]["model"])
    assert main([a for a in case.arguments() if a != "--quiet"]) == 0
    assert "teacher.model is the student's own directory" in capsys.readouterr().err


def test_no_space_for_a_checkpoint(
    tiny: Callable[..., Config],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The disk fills up at step 4: exit 2, the checkpoint of step 2 is whole, and the run goes on from it."""
    from onpath.run import checkpoint

    case = Case(tiny(), tmp_path)
    case.data["optim"]["steps"], case.data["run"]["save_every"] = 4, 2
    real, calls = checkpoint.save_file, []

    def full(tensors: Any, path: Any, **options: Any) -> None:
        calls.append(path)
        if "step_4" in str(path):
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(tensors, path, **options)

    monkeypatch.setattr(checkpoint, "save_file", full)
    assert main(case.arguments()) == 2
    assert "cannot write the checkpoint of step 4" in capsys.readouterr().err
    assert [p.name for p in (case.run / "checkpoints").iterdir()] == ["step_2"]
    monkeypatch.setattr(checkpoint, "save_file", real)
    assert main(case.arguments()) == 0
    assert calls


def test_eval_and_inspect_say_what_is_wrong(
    model_dirs: dict[str, Path], data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = str(model_dirs["student"])
    for arguments, expected in (
        (["eval", "./nowhere", "--data", str(data_file)], "model: there is no directory"),
        (["eval", student, "--data", "none.jsonl"], "--data: 'none.jsonl': no such file"),
        (["eval", student, "--data", str(data_file), "--n", "2", "--k", "3"], "k is 3, but there are 2"),
        (["eval", student, "--data", str(data_file), "--k", "0"], "k is 0; pass@k needs 1"),
        (["eval", student, "--data", str(data_file), "--temperature", "nan"], "temperature is nan"),
        (["inspect", str(tmp_path)], "not a run directory"),
    ):
        assert main(arguments) == 2
        assert expected in capsys.readouterr().err


def test_a_run_that_failed_before_its_first_step_is_no_run(
    tiny: Callable[..., Config], tmp_path: Path
) -> None:
    """Its settings stand there, and nothing else: the mended config takes the directory over."""
    case = Case(tiny(), tmp_path)
    other_config_there(case)
    (case.run / "eval.jsonl").unlink()
    assert main(case.arguments()) == 0
    assert load(case.run / "config.yaml").optim.lr == case.data["optim"]["lr"]


def test_a_long_evaluation_does_not_refuse_training_prompts(
    tiny: Callable[..., Config], tmp_path: Path
) -> None:
    case = Case(tiny(), tmp_path)
    case.data["data"]["eval"] = {}
    case.set("eval.max_new_tokens", 511)
    assert main(case.arguments()) == 0


def test_wider_padding_is_no_difference(tiny: Callable[..., Config], tmp_path: Path) -> None:
    """Vocabularies are compared by token and id, never by the number of rows of the embedding."""
    case = Case(tiny(), tmp_path)
    make_model(1, hidden=48, vocabulary=len(CHARACTERS) + 16).save_pretrained(tmp_path / "teacher")
    assert main(case.arguments()) == 0


@pytest.mark.parametrize("option", ["system", "enable_thinking"])
def test_what_only_chat_prompts_have_is_refused_for_plain_text(
    option: str, tiny: Callable[..., Config], tmp_path: Path
) -> None:
    """It was dropped without a word: the instruction never reached the model."""
    value = {"system": "sum", "enable_thinking": False}[option]
    with pytest.raises(UserError, match=rf"data: {option} is for chat prompts, but template is plain"):
        tiny(**{f"data__{option}": value}, data__template="plain")
    config = tiny(**{f"data__{option}": value})
    without = tmp_path / "no template"
    shutil.copytree(config.student.model, without)
    (without / "chat_template.jinja").unlink(missing_ok=True)
    described = json.loads((without / "tokenizer_config.json").read_text())
    described.pop("chat_template", None)
    (without / "tokenizer_config.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match=rf"data\.{option} is for chat prompts, and .* has no chat template"):
        assemble(tiny(**{f"data__{option}": value}, student__model=str(without)))


def test_a_chat_template_that_ignores_an_option_is_warned_of(tiny: Callable[..., Config]) -> None:
    parts = assemble(tiny(data__enable_thinking=False))
    assert "data.enable_thinking has no effect here: the chat template ignores it" in parts.warnings
    parts.close()


def test_an_adapter_has_its_base_s_tokenizer_and_a_run_its_model(
    tiny: Callable[..., Config], tmp_path: Path
) -> None:
    """peft saves none beside an adapter; a finished run is a teacher under its own name."""
    made = train(tiny(student__lora_rank=2, optim__steps=1, data__eval={}, run__name="made"), quiet=True)
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(made.model / name, bare)
    both = []
    for where in (bare, made.directory):
        options = {"teacher__model": str(where), "run__name": where.name + " taught", "data__eval": {}}
        run = train(tiny(**options, optim__steps=1), quiet=True)
        both.append([row["loss"] for row in read_lines(run.directory / "metrics.jsonl")])
    assert both[0] == both[1]
    train(tiny(student__model=str(bare), optim__steps=1, data__eval={}, run__name="bare"), quiet=True)


def test_a_data_set_in_place_of_its_name_is_told_how_to_become_one(
    tiny: Callable[..., Config], tmp_path: Path
) -> None:
    rows = datasets.Dataset.from_list([{"prompt": f"{n}+1=?", "answer": str(n + 1)} for n in range(9)])
    with pytest.raises(UserError, match=r'data: train is a Dataset, .*\.to_json\("prompts\.jsonl"'):
        build({"data": {"train": rows}})
    with pytest.raises(UserError, match=r"data: train is a list, .* train_dataset=…\), .* as JSON lines"):
        build({"data": {"train": rows.to_list()}})
    with pytest.raises(UserError, match=r"data: train is a list of 2; it names one source"):
        build({"data": {"train": ["a.jsonl", "b.jsonl"]}})
    with pytest.raises(UserError, match=r"config: it is \[1\]; it must be a mapping of sections"):
        build([1])  # type: ignore[arg-type]
    rows.to_json(tmp_path / "prompts.jsonl", orient="records", lines=True)
    parts = assemble(tiny(data__train=str(tmp_path / "prompts.jsonl"), data__eval={}))
    assert len(parts.prompts.pool) == 9
    parts.close()


def test_a_run_beside_its_base_is_the_adapter_and_not_the_base(
    tiny: Callable[..., Config], tmp_path: Path
) -> None:
    """Several teachers share a base: a run that is named by its directory was taken for that."""
    options = {"student__lora_rank": 2, "optim__steps": 2, "optim__lr": 0.1, "data__eval": {}}
    made = train(tiny(**options, run__name="made"), quiet=True)
    base, found = tiny().student.model, []
    for where in (made.directory, made.model):
        teachers = {"tuned": {"model": str(where)}, "base": {"model": base}}
        config = build(
            {
                "student": {"model": base, "device": "cpu"},
                "teachers": teachers,
                "data": {"train": str(routed(tmp_path)), "teacher_column": "of", "eval": {}},
                "rollout": {"prompts": 2, "max_new_tokens": 3},
                "run": {"dir": str(tmp_path / "runs"), "name": "several"},
            }
        )
        parts = assemble(config)
        ids = torch.tensor([[1, 5, 6, 7]])
        with torch.no_grad():
            tuned, plain = (parts.models.teacher.of(name).model(input_ids=ids).logits for name in teachers)
        found.append((tuned - plain).abs().max().item())
        parts.close()
    assert found[0] == found[1] > 0.01


def routed(directory: Path) -> Path:
    path = directory / "routed.jsonl"
    rows = [{"prompt": f"{n}+1=?", "answer": "1", "of": "tuned" if n % 2 else "base"} for n in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
