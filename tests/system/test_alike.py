"""Processes that were not given the same say so before their first step: a run of theirs would be wrong."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen3Config, Qwen3ForCausalLM

from onpath.config.whole import Config
from onpath.engines.head import foreign
from onpath.run import alike
from onpath.run.inputs import load_data
from onpath.system.errors import UserError
from onpath.training import train
from tests.forks import TIMEOUT, done_by_two, forked

Tiny = Callable[..., Config]


def said_by_both(options: list[Config], tmp_path: Path, *, code: int = 2) -> str:
    """What both of two processes say, each of which has a config of its own."""
    sentences = set()
    for ended, _, err in forked(lambda rank: train(options[rank], quiet=True), tmp_path):
        assert ended == code, err
        sentences.add(next(line for line in reversed(err.splitlines()) if line.startswith("onpath: ")))
    (sentence,) = sentences
    return sentence.removeprefix("onpath: ")


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"optim__lr": 0.5}, "process 2 of 2 has optim.lr: 0.5, the first 0.001; start all with one config"),
        ({"optim__steps": 7, "parallel__shard": "layer"}, "process 2 of 2 has optim.steps: 7, the first 2;"),
        ({"eval__every": 1}, "process 2 of 2 has eval.every: 1, the first 0;"),
        (
            {"teacher__dtype": "bfloat16"},
            "process 2 of 2 has teacher.dtype: 'bfloat16', the first 'float32';",
        ),
    ],
    ids=["lr", "steps of a sharded run", "evaluations", "teacher"],
)
def test_another_option_is_named(other: dict[str, Any], says: str, tiny: Tiny, tmp_path: Path) -> None:
    options: dict[str, Any] = {"parallel__timeout": TIMEOUT, "data__eval": {}}
    options |= {"optim__steps": 2, "optim__lr": 1e-3, "eval__every": 0}
    options |= {key: value for key, value in other.items() if key == "parallel__shard"}
    both = [tiny(**options), tiny(**options | other)]
    assert says in said_by_both(both, tmp_path)
    assert not (Path(both[0].run.dir) / both[0].run.name).exists()


def test_content_is_compared_and_not_where_it_lies(tiny: Tiny, data_file: Path, tmp_path: Path) -> None:
    moved, changed = tmp_path / "moved.jsonl", tmp_path / "changed.jsonl"
    shutil.copy(data_file, moved)
    changed.write_text(data_file.read_text().replace("7+4", "7+5", 1))
    assert changed.read_text() != data_file.read_text()
    ours = {"data__eval": {}, "parallel__timeout": TIMEOUT}
    config = tiny(**ours)
    told = said_by_both([config, tiny(**ours, data__train=str(changed))], tmp_path)
    assert told == (
        "process 2 of 2 has another content of data.train than the first; give all the same files"
    )
    more = tiny(**{**ours, "data__eval": {"sums": str(data_file)}})
    assert said_by_both([config, more], tmp_path) == (
        "process 2 of 2 has data.eval: ['sums'], the first []; start all with one config"
    )
    there = tmp_path / "student"
    shutil.copytree(config.student.model, there)
    elsewhere = tiny(**ours, data__train=str(moved), student__model=str(there))
    done_by_two(lambda rank: train([config, elsewhere][rank], quiet=True), tmp_path)


@pytest.mark.parametrize("key", ["student", "teacher"])
def test_another_model_of_the_same_shape(key: str, tiny: Tiny, tmp_path: Path) -> None:
    options = {"data__eval": {}, "parallel__timeout": TIMEOUT, "parallel__shard": "layer"}
    config = tiny(**options)
    other = tmp_path / "other"
    shutil.copytree(getattr(config, key).model, other)
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    told = said_by_both([config, tiny(**options, **{f"{key}__model": str(other)})], tmp_path)
    assert told.startswith(f"process 2 of 2 has another content of {key}.model than the first;")


def test_a_model_that_one_host_still_has_to_download_is_no_difference(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And an adapter's base may lie elsewhere on each, as long as it is that one."""
    config, known = tiny(data__eval={}, parallel__timeout=TIMEOUT), alike._fingerprint
    monkeypatch.setattr(
        alike, "_fingerprint", lambda name: known(name) if os.environ["RANK"] == "0" else None
    )
    done_by_two(lambda _: train(config, quiet=True), tmp_path)
    monkeypatch.setattr(alike, "_fingerprint", known)
    places = []
    for host in ("a", "b", "c"):
        base, adapter = tmp_path / host / "base", tmp_path / host / "adapter"
        shutil.copytree(config.student.model, base)
        adapter.mkdir()
        (adapter / "adapter_model.safetensors").write_bytes(b"0" * 9)
        (adapter / "adapter_config.json").write_text(
            json.dumps({"r": 2, "base_model_name_or_path": str(base)})
        )
        places.append(str(adapter))
    (tmp_path / "c" / "base" / "model.safetensors").write_bytes(b"other")
    (tmp_path / "b" / "base" / "training_args.bin").write_bytes(b"of another program")
    prints = [known(where) for where in places]
    assert prints[0] == prints[1] != prints[2]
    assert known("nobody/has-this") is None


def test_a_run_stands_for_its_model_here_too(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    (run / "metrics.jsonl").write_text("")
    prints = set()
    for weights in (b"1", b"2"):
        (run / "model" / "model.safetensors").write_bytes(weights)
        prints |= {alike._fingerprint(str(run)), alike._fingerprint(str(run / "model"))}
    assert len(prints) == 2


def test_a_chat_template_is_compared_by_what_it_says(tiny: Tiny, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("one.jinja", "same.jinja", "other.jinja")]
    for path, text in zip(
        files, ("{{ messages[0].content }}", "{{ messages[0].content }}", "{{ 1 }}"), strict=True
    ):
        path.write_text(text)
    options = {"data__eval": {}, "parallel__timeout": TIMEOUT, "teacher__timeout": 600.0}
    one, same, other = (tiny(**options, data__chat_template=str(path)) for path in files)
    given = [dict(alike._given(c, load_data(c), None)) for c in (one, same, other)]
    assert given[0] == given[1]
    assert [key for key in given[0] if given[0][key] != given[2][key]] == ["data.chat_template"]


def test_versions_are_compared(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, known = tiny(data__eval={}, parallel__timeout=TIMEOUT), alike.versions

    def of_rank() -> dict[str, str]:
        return known() | ({"torch": "9.9"} if os.environ.get("RANK") == "1" else {})

    monkeypatch.setattr(alike, "versions", of_rank)
    told = said_by_both([config, config], tmp_path)
    assert told == (
        f"process 2 of 2 runs torch 9.9, the first {known()['torch']}; install the same everywhere"
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_data_that_one_host_lacks_is_said_at_once(rank: int, tiny: Tiny, tmp_path: Path) -> None:
    both = [tiny(data__eval={}, parallel__timeout=TIMEOUT) for _ in range(2)]
    both[rank] = tiny(data__eval={}, parallel__timeout=TIMEOUT, data__train="/nowhere/prompts.jsonl")
    assert "/nowhere/prompts.jsonl" in said_by_both(both, tmp_path)


def test_a_directory_that_is_not_shared_is_refused(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found at the first checkpoint, it had cost all steps up to there."""
    monkeypatch.setattr(alike, "_HIDDEN", 0.5)
    config = tiny(data__eval={}, parallel__timeout=TIMEOUT, run__dir="runs", run__name="here")

    def run(rank: int) -> None:
        own = tmp_path / f"host{rank}"
        own.mkdir()
        os.chdir(own)
        train(config, quiet=True)

    for code, _, err in forked(run, tmp_path):
        assert code == 2
        assert "run.dir: process 2 of 2 does not see what the first writes to runs/here" in err
    assert not [*(tmp_path / "host0" / "runs" / "here").glob(".shared-*")]
    assert not (tmp_path / "host1" / "runs").exists()


def test_a_lost_process_is_not_blamed_on_the_model() -> None:
    model = Qwen3ForCausalLM(Qwen3Config(hidden_size=8, num_hidden_layers=1, vocab_size=9))
    with pytest.raises(RuntimeError, match="gloo"), foreign(model, "teacher.model"):
        raise RuntimeError("[../third_party/gloo/pair.cc] Connection closed by peer")
    with pytest.raises(UserError, match="use another model family"), foreign(model, "teacher.model"):
        raise RuntimeError("size mismatch")
