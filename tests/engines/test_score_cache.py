"""`teacher.cache`: scores that are kept are the scores, and whatever is damaged is computed again."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import onpath
from onpath.commands.cli import main
from onpath.config.whole import Config
from onpath.data.batch import collate
from onpath.engines.score_cache import CachedTeacher, ScoreStore, prune, scoring_digest, usage, weights_digest
from onpath.engines.teacher import ModelTeacher
from onpath.losses import TeacherHidden
from onpath.records import Trajectory
from onpath.run.assemble import assemble
from onpath.run.log import flatten, read_lines
from onpath.system.errors import UserError
from onpath.training import train
from tests.conftest import make_model
from tests.forks import TIMEOUT, done_by_two
from tests.run.test_refresh import FAST, METHODS, TRD
from tests.run.test_resume import Stopped, contents, stop_at

Tiny = Callable[..., Config]


def trajectory(response: tuple[int, ...], context: tuple[int, ...] = (1, 5)) -> Trajectory:
    return Trajectory(student_context=(1,), teacher_context=context, response=response)


class Counting(ModelTeacher):
    """Knows which responses it was asked for."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.asked: list[tuple[int, ...]] = []

    def scores(self, batch: Any, cache: Any = None) -> TeacherHidden:
        self.asked += [t.response for t in batch.trajectories]
        return super().scores(batch, cache)


def cached(directory: Path, *, seed: int = 1, dtype: torch.dtype = torch.float32, most: float = 1e9) -> Any:
    inner = Counting(make_model(seed))
    weights = weights_digest(inner.model)
    return CachedTeacher(inner, ScoreStore(directory, most=most), weights=weights, dtype=dtype)


def test_kept_in_float32_bit_for_bit(tmp_path: Path) -> None:
    batch = collate([trajectory((4, 2)), trajectory((7, 7, 2)), trajectory((4, 2), (1, 6))])
    plain = ModelTeacher(make_model(1)).scores(batch)
    for again in range(2):
        teacher = cached(tmp_path)
        found = teacher.scores(batch)
        assert found.hidden.equal(plain.hidden)
        assert found.head.weight.equal(plain.head.weight)
        assert bool(teacher.teacher.asked) == (again == 0)
        counts = {"teacher_tokens_scored": 7 * (again == 0), "teacher_tokens_from_cache": 7 * again}
        assert teacher.measured() == counts
        assert sum(teacher.measured().values()) == 0


def test_only_what_is_lacking_is_read(tmp_path: Path) -> None:
    cached(tmp_path).scores(collate([trajectory((4, 2))]))
    teacher = cached(tmp_path)
    batch = collate([trajectory((9,)), trajectory((4, 2)), trajectory((8, 2))])
    assert teacher.scores(batch).hidden.allclose(ModelTeacher(make_model(1)).scores(batch).hidden, atol=1e-5)
    assert teacher.teacher.asked == [(9,), (8, 2)]


def test_half_precision_is_within_its_rounding(tmp_path: Path) -> None:
    """11 bits of mantissa: each state to 2⁻¹¹ of itself; and the first use says what the later ones say."""
    batch = collate([trajectory((4, 2, 9, 3))])
    plain = ModelTeacher(make_model(1)).scores(batch)
    first, second = (cached(tmp_path, dtype=torch.float16).scores(batch) for _ in range(2))
    assert first.hidden.equal(second.hidden)
    assert first.hidden.dtype == torch.float32
    gap = (first.hidden - plain.hidden).abs()
    assert gap.max() > 0
    assert bool((gap <= plain.hidden.abs() * 2**-11 + 1e-7).all())


def test_states_beyond_half_precision_stay_as_they_are(tmp_path: Path) -> None:
    batch = collate([trajectory((4, 2))])
    teacher = cached(tmp_path, dtype=torch.float16)
    with torch.no_grad():
        teacher.model.model.norm.weight *= 1e6
    assert teacher.scores(batch).hidden.equal(ModelTeacher(teacher.model).scores(batch).hidden)
    assert teacher.scores(batch).hidden.isfinite().all()


@pytest.mark.parametrize(
    ("other", "same"),
    [
        ({"seed": 2}, False),
        ({"dtype": torch.float16}, False),
        ({"response": (4, 3)}, False),
        ({"context": (1, 6)}, False),
        ({}, True),
    ],
)
def test_everything_that_scores_depend_on_is_in_the_key(
    other: dict[str, Any], same: bool, tmp_path: Path
) -> None:
    cached(tmp_path).scores(collate([trajectory((4, 2))]))
    asked = {"response": (4, 2), "context": (1, 5), **other}
    teacher = cached(tmp_path, **{k: v for k, v in other.items() if k in ("seed", "dtype")})
    teacher.scores(collate([trajectory(asked["response"], asked["context"])]))
    assert (not teacher.teacher.asked) == same


def spoilt(path: Path, how: str) -> None:
    data = path.read_bytes()
    match how:
        case "cut":
            path.write_bytes(data[: len(data) // 2])
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_bytes(b"hello" * 100)
        case "a number":
            path.write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
        case "gone":
            path.unlink()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("how", ["cut", "empty", "text", "a number", "gone"])
def test_damaged_entries_are_computed_again(how: str, when: str, tmp_path: Path) -> None:
    """Whether the store was opened before the damage or after it; and then they are whole again."""
    batch = collate([trajectory((4, 2)), trajectory((7, 2))])
    plain = cached(tmp_path).scores(batch).hidden
    (path,) = tmp_path.glob("*.safetensors")
    if when == "before":
        spoilt(path, how)
    teacher = cached(tmp_path)
    if when == "after":
        spoilt(path, how)
    assert teacher.scores(batch).hidden.equal(plain)
    assert teacher.teacher.asked
    again = cached(tmp_path)
    assert again.scores(batch).hidden.equal(plain)
    assert not again.teacher.asked


def test_the_files_used_longest_ago_go_first(tmp_path: Path) -> None:
    teacher = cached(tmp_path)
    paths = []
    for i in range(4):
        teacher.scores(collate([trajectory((i + 3, 2))]))
        (new,) = set(tmp_path.glob("*.safetensors")) - set(paths)
        paths.append(new)
        os.utime(new, ns=(i + 1, i + 1))
    teacher.scores(collate([trajectory((3, 2))]))  # the oldest is used
    size = paths[0].stat().st_size
    assert prune(tmp_path, most=2.5 * size) == 2
    assert set(tmp_path.glob("*.safetensors")) == {paths[0], paths[3]}
    small = cached(tmp_path, most=1.5 * size)
    small.scores(collate([trajectory((30, 2))]))
    assert usage(tmp_path).files == 1, "a new file makes room for itself"
    assert small.store.get(small._key(trajectory((30, 2)))) is not None


def test_a_full_disk_is_said_once_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("onpath.engines.score_cache.save_file", full)
    teacher = cached(tmp_path)
    for response in ((4, 2), (5, 2)):
        batch = collate([trajectory(response)])
        assert teacher.scores(batch).hidden.equal(ModelTeacher(make_model(1)).scores(batch).hidden)
    assert capsys.readouterr().err.count("No space left on device") == 1
    assert not list(tmp_path.iterdir())


RUNS: dict[str, dict[str, Any]] = {
    **{name: METHODS[name] for name in ("opd", "topd", "spliced", "relay")},
    "trd": TRD,
    "opsd": {"method__name": "opsd", "method__weights": "base"},
    "an adapter's base": {"method__name": "opsd", "method__weights": "base", "student__lora_rank": 4},
}


GOES_ON = ("topd", "spliced", "relay")
"""Whose teacher goes on from its own pass, which must be made for that."""


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_the_same_with_a_cache(name: str, tiny: Tiny, tmp_path: Path) -> None:
    """Filled by the run itself, and full from the start."""
    options = {**FAST, **RUNS[name], "optim__steps": 2, "teacher__cache_dtype": "float32"}
    plain, filling, full = (
        read_lines(
            train(tiny(**options, run__name=how, teacher__cache=cache), quiet=True).directory
            / "metrics.jsonl"
        )
        for how, cache in (("plain", None), ("filling", str(tmp_path / "c")), ("full", str(tmp_path / "c")))
    )
    for a, b, c in zip(plain, filling, full, strict=True):
        one, two, three = (flatten({k: v for k, v in row.items() if "seconds" not in k}) for row in (a, b, c))
        assert two["teacher_tokens_scored"] > 0
        assert (three["teacher_tokens_scored"] == 0) != (name in GOES_ON)
        for row in (two, three):
            assert {k: row[k] for k in one} == pytest.approx(one, rel=2e-4, abs=1e-6)


def test_autocast_has_scores_of_its_own(tiny: Tiny, tmp_path: Path) -> None:
    """Of a student that is its own teacher; another model is read without, and shares them."""
    read = []
    for method in ({"method__name": "opsd"}, {"method__name": "opd"}):
        for half in (True, False, True):
            parts = assemble(tiny(**method, optim__bf16=half, teacher__cache=str(tmp_path / "c")))
            t = trajectory((4, 2, 9))
            found = parts.models.teacher.scores(collate([t]))
            expected = parts.models.teacher.teacher.scores(collate([t]))
            assert found.hidden.half().equal(expected.hidden.half())
            read.append(parts.models.teacher.measured()["teacher_tokens_scored"])
    assert read == [3, 3, 0, 3, 0, 0]


def test_fixed_rollouts_are_scored_once(tiny: Tiny, tmp_path: Path) -> None:
    """Three passes over the same rollouts: the teacher reads them in the first one alone."""
    options = {**FAST, "data__limit": 8, "rollout__refresh": "never", "teacher__cache": str(tmp_path / "c")}
    rows = read_lines(train(tiny(**options), quiet=True).directory / "metrics.jsonl")
    assert [r["teacher_tokens_scored"] > 0 for r in rows] == [True, False, False]
    assert [r["teacher_tokens_from_cache"] for r in rows] == [0, rows[0]["tokens"], rows[0]["tokens"]]
    assert usage(tmp_path / "c").tokens == rows[0]["tokens"]


def test_killed_and_resumed_in_half_precision_is_the_same_run(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**FAST, "optim__steps": 4, "data__limit": 12, "rollout__refresh": {"every": 3}}
    options |= {"run__save_every": 1, "run__trajectories_every": 1}
    whole = tiny(**options, run__name="whole", teacher__cache=str(tmp_path / "a"))
    expected = contents(train(whole, quiet=True).directory)
    cut = tiny(**options, run__name="cut", teacher__cache=str(tmp_path / "b"))
    with monkeypatch.context() as patch:
        stop_at(patch, "onpath.training", "loss_of", call=3, after=True)
        with pytest.raises(Stopped):
            train(cut, quiet=True)
    found = contents(train(cut, quiet=True).directory)
    for file, value in expected.items():
        if file.endswith(".jsonl"):
            counts = ("teacher_tokens_scored", "teacher_tokens_from_cache")
            for row in (*value, *found[file]):
                for name in counts:
                    row.pop(name, None)  # what the killed process kept is not read again
        if file not in ("environment.json", "model/README.md"):
            assert found[file] == value, file


@pytest.mark.parametrize("shard", ["none", "layer"])
def test_two_processes_share_it(shard: str, tiny: Tiny, tmp_path: Path) -> None:
    """One has all scores of its share, the other none: where passes are exchanges both make them."""
    options = {**FAST, "optim__steps": 2, "optim__eps": 1e-4, "data__limit": 12, "teacher__device": "auto"}
    options |= {"rollout__refresh": "never", "teacher__cache_dtype": "float32", "parallel__timeout": TIMEOUT}

    def run(rank: int) -> None:
        where = {"run__dir": str(tmp_path / "two"), "teacher__cache": str(tmp_path / f"cache{rank}")}
        train(tiny(**options, **where, parallel__shard=shard), quiet=True)

    one = tiny(**options, teacher__cache=str(tmp_path / "cache0"))
    rows = read_lines(train(one, quiet=True).directory / "metrics.jsonl")
    done_by_two(run, tmp_path)
    two = read_lines(tmp_path / "two" / "tiny" / "metrics.jsonl")
    assert [r["loss"] for r in two] == pytest.approx([r["loss"] for r in rows], rel=2e-4)
    assert (two[0]["teacher_tokens_from_cache"] > 0) == (shard == "none")
    assert two[0]["teacher_tokens_scored"] > 0


def test_a_server_that_answers_once(tiny: Tiny, tmp_path: Path) -> None:
    """Through the fake vLLM of the engine's tests."""
    from tests.engines.test_server import fake_of

    options = {**FAST, "data__limit": 8, "rollout__refresh": "never", "optim__steps": 2}
    options |= {"method__support": "teacher_topk", "method__support_k": 4, "teacher__engine": "vllm"}
    server = fake_of(Path(tiny().teacher.model))
    try:
        plain = tiny(**options, run__name="plain", teacher__url=server.url)
        one = read_lines(train(plain, quiet=True).directory / "metrics.jsonl")
        kept = {"teacher__url": server.url, "teacher__cache": str(tmp_path / "c")}
        train(tiny(**options, **kept, run__name="filling"), quiet=True)
        before = len(server.requests)
        full = train(tiny(**options, **kept, run__name="full"), quiet=True).directory
        scoring = [r for r in server.requests[before:] if r.get("prompt_logprobs")]
    finally:
        server.stop()
    two = read_lines(full / "metrics.jsonl")
    assert not scoring
    assert [r["loss"] for r in two] == pytest.approx([r["loss"] for r in one], rel=1e-6)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method__name": "opsd", "method__weights": "ema"}, "teacher's are ema; leave it out, or use base"),
        ({"method__name": "opsd", "method__weights": "live"}, "teacher's are live"),
        ({"teacher__cache_gb": 0}, "cache_gb"),
        ({"teacher__cache_dtype": "int8"}, "cache_dtype"),
        (
            {
                **TRD,
                "method__divergence": "cross_entropy",
                "teacher__engine": "chat",
                "teacher__url": "http://x",
            },
            "chat gives none",
        ),
    ],
)
def test_impossible_pairs(options: dict[str, Any], says: str, tiny: Tiny) -> None:
    with pytest.raises(UserError, match=says):
        tiny(teacher__cache="c", **options)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = cached(tmp_path)
    for i in range(3):
        teacher.scores(collate([trajectory((i + 3, 2)), trajectory((i + 9, 8, 2))]))
    (tmp_path / f"{'0' * 24}.safetensors").write_bytes(b"hello")
    assert main(["cache", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "scores of 6 responses, 15 tokens, in 4 files" in said
    assert "1 damaged files" in said
    assert main(["cache", str(tmp_path), "--keep-gb", "1"]) == 0
    assert "in 3 files" in (said := capsys.readouterr().out)
    assert "1 files removed" in said
    assert onpath.kept_scores(tmp_path, keep_gb=0).files == 0
    assert not list(tmp_path.iterdir())
    for wrong in ("none",), (".", "--keep-gb", "-1"), (".", "--keep-gb", "nan"):
        assert main(["cache", str(tmp_path / wrong[0]), *wrong[1:]]) == 2
        assert capsys.readouterr().err.startswith("onpath: ")


def test_files_of_others_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The directory of a model, named by mistake, keeps its weights."""
    model = tmp_path / "model.safetensors"
    make_model(1).save_pretrained(tmp_path)
    before = model.read_bytes()
    for options in [], ["--keep-gb", "0"]:
        assert main(["cache", str(tmp_path), *options]) == 2
        assert "no scores are kept there, but other files" in capsys.readouterr().err
    teacher = cached(tmp_path, most=1.0)  # no two files fit
    for i in range(3):
        teacher.scores(collate([trajectory((i + 3, 2))]))
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    assert main(["cache", str(tmp_path), "--keep-gb", "0"]) == 0
    assert list(tmp_path.glob("*.safetensors")) == [model]
    assert model.read_bytes() == before


def test_the_same_weights_with_another_config_are_another_teacher() -> None:
    model, same, other = (make_model(1) for _ in range(3))
    other.config.rope_parameters = {**other.config.rope_parameters, "rope_theta": 5e5}
    same.config._name_or_path = "elsewhere"
    assert weights_digest(model) == weights_digest(other)
    assert scoring_digest(model) == scoring_digest(same) != scoring_digest(other)
