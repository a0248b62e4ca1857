"""The real vLLM, in process and as a server: `make test-vllm` makes its environment and runs this."""

import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

pytest.importorskip("vllm")

from onpath.commands.eval import evaluate_model
from onpath.config.build import build
from onpath.config.whole import Config
from onpath.engines.models import locate
from onpath.engines.remote import transfer
from onpath.engines.remote.server import ServerEngine
from onpath.engines.vllm import VLLMEngine
from onpath.records import Sampling
from onpath.run.assemble import assemble
from onpath.run.log import read_lines
from onpath.system.errors import UserError
from onpath.training import train
from tests.conftest import make_model, make_tokenizer
from tests.stored import read_trajectories
from tests.vllm import gloo_transfer

GYM: dict[str, Any] = {
    "data": {"train": "gym:train", "limit": 64, "eval": {}},
    "rollout": {"prompts": 16, "max_new_tokens": 96},
    "optim": {"steps": 3, "lr": 1e-3},
    "eval": {"grader": "gym", "start": False},
    "run": {"save_every": 0, "trajectories_every": 0, "threads": 1},
}
TOPK = {"support": "teacher_topk", "support_k": 20, "tail": "bucket"}
IN_PROCESS = {"engine": "vllm", "vllm": {"enforce_eager": True}}


def gym(tmp_path: Path, name: str, **sections: dict[str, Any]) -> Any:
    data = {k: {**v} for k, v in GYM.items()}
    for section, values in sections.items():
        data[section] = {**data.get(section, {}), **values}
    data["run"] |= {"name": name, "dir": str(tmp_path / "runs")}
    return build(data)


class Served:
    """A `vllm serve` process that can be killed and started again at the same port."""

    def __init__(self, model: str, log: Path, more: str = "", **environment: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.model, self.log, self.more, self.environment = str(locate(model)), log, more, environment
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        environment = {
            **os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_SERVER_DEV_MODE": "1", "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", **self.environment,
        }  # fmt: skip
        command = [str(Path(sys.executable).parent / "vllm"), "serve", self.model, "--port", str(self.port)]
        options = (
            "--enforce-eager --dtype float32 --max-model-len 512 --max-logprobs 64 "
            f"--no-enable-chunked-prefill --logprobs-mode processed_logprobs {self.more}"
        )
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [*command, *options.split()], stdout=output, stderr=output, env=environment,
                start_new_session=True,
            )  # fmt: skip

    def wait(self) -> "Served":
        for _ in range(600):
            assert self.process.poll() is None, self.log.read_text()[-2000:]
            try:
                if httpx.get(f"{self.url}/health").is_success:
                    return self
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        raise AssertionError(f"no server: {self.log.read_text()[-2000:]}")

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    server = Served("gym:teacher", tmp_path_factory.mktemp("teacher") / "log.txt").wait()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    server = Served("gym:student", tmp_path_factory.mktemp("student") / "log.txt").wait()
    yield server
    server.kill()


def check_engine(parts: Any) -> None:
    """Greedy tokens, log-probs of samples, batching and new weights: against the engine in this process."""
    engine, own = parts.generators.student, parts.generators.over(parts.models.student)
    prompts = parts.prompts.pool[:16]
    greedy = Sampling(temperature=0.0, max_new_tokens=64)
    assert [r.ids for r in engine.generate(prompts, greedy)] == [r.ids for r in own.generate(prompts, greedy)]
    assert gap_of(engine, own, prompts) < 1e-4
    one = engine.generate(prompts, parts.sampling, n=2)
    two = engine.generate(prompts[::-1], parts.sampling, n=2)
    assert {(r.prompt.id, r.sample): r.ids for r in one} == {(r.prompt.id, r.sample): r.ids for r in two}
    with torch.no_grad():
        for p in parts.models.student.parameters():
            p.add_(0.02 * torch.randn_like(p))
    assert engine.gap() > 1e-2, "stale weights are seen"
    engine.sync_weights(1)
    assert gap_of(engine, own, prompts) < 1e-4
    assert {r.policy_version for r in engine.generate(prompts[:2], parts.sampling)} == {1}


def gap_of(engine: Any, own: Any, prompts: Any) -> float:
    rollouts = engine.generate(prompts, Sampling(max_new_tokens=64, seed=4), n=2)
    scores = own.score([r.context for r in rollouts], [r.ids for r in rollouts])
    return max(
        abs(a - b) for r, s in zip(rollouts, scores, strict=True) for a, b in zip(r.logprobs, s, strict=True)
    )


def test_in_process(tmp_path: Path) -> None:
    parts = assemble(gym(tmp_path, "engine", rollout=IN_PROCESS))
    assert isinstance(parts.generators.student, VLLMEngine)
    check_engine(parts)


@pytest.mark.parametrize("shard", ["none", "layer"])
def test_in_process_on_every_rank(shard: str, tmp_path: Path) -> None:
    """Two of torchrun's processes give the run of one, each with a vLLM of its own."""
    one = gym(tmp_path, "one", rollout=IN_PROCESS)
    two = gym(tmp_path, "two", rollout=IN_PROCESS, parallel={"shard": shard})
    config = tmp_path / "two.yaml"
    config.write_text(two.to_yaml())
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "onpath", "train", str(config)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    train(one, quiet=True)
    rows = [read_lines(tmp_path / "runs" / name / "metrics.jsonl") for name in ("one", "two")]
    for a, b in zip(*rows, strict=True):
        for key in ("loss", "tokens", "reverse_kl_nats", "grad_norm", "mean_length"):
            assert a[key] == pytest.approx(b[key], rel=1e-4)


SHARED: dict[str, dict[str, Any]] = {
    "opd": {"parallel__shard": "layer"},
    "relay": {"method__name": "relay", "method__delta": 0.5},
    "branch": {"method__name": "branch"},
}


@pytest.mark.parametrize("name", SHARED)
def test_processes_share_one(name: str, tiny: Callable[..., Config], tmp_path: Path) -> None:
    """Two give the run of one; they ask for different numbers of batches."""
    student = tmp_path / "student"  # heads of 32 numbers: vLLM's attention on CPUs reads no shorter ones
    make_model(0, hidden=64).save_pretrained(student)
    make_tokenizer().save_pretrained(student)
    options: dict[str, Any] = {"rollout__engine": "vllm", "rollout__prompts": 7, "eval__every": 2}
    options |= {"data__eval_limit": 3, "student__model": str(student), **SHARED[name]}
    alone, group = ({"enforce_eager": True, "tensor_parallel_size": size} for size in (1, 2))
    two = tiny(**{**options, "rollout__vllm": group, "run__name": "two"})
    config = tmp_path / "two.yaml"
    config.write_text(two.to_yaml())
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "onpath", "train", str(config)]
    subprocess.run(command, check=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    one = {**options, "rollout__vllm": alone, "run__name": "one", "parallel__shard": "none"}
    train(tiny(**one), quiet=True)
    runs = Path(two.run.dir)
    rows = [read_lines(runs / run / "metrics.jsonl") for run in ("one", "two")]
    for a, b in zip(*rows, strict=True):
        for key in ("loss", "tokens", "reverse_kl_nats", "grad_norm", "mean_length"):
            assert a[key] == pytest.approx(b[key], rel=1e-4)
    evals = [read_lines(runs / run / "eval.jsonl") for run in ("one", "two")]
    assert [e["avg_at_k"] for e in evals[0]] == [e["avg_at_k"] for e in evals[1]]


def test_in_process_with_an_adapter(tmp_path: Path) -> None:
    parts = assemble(gym(tmp_path, "lora", rollout=IN_PROCESS, student={"lora_rank": 4}))
    with torch.no_grad():
        for name, p in parts.models.student.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
    assert parts.generators.student.gap() > 1e-2
    parts.generators.student.sync_weights(1)
    assert (
        gap_of(parts.generators.student, parts.generators.over(parts.models.student), parts.prompts.pool[:8])
        < 1e-3
    )


def test_evaluation(tmp_path: Path) -> None:
    """Two models after each other, greedily: what transformers would say, but for ties by rounding."""
    asked: dict[str, Any] = {"data": "gym:test", "limit": 40, "n": 1, "k": 1, "temperature": 0}
    asked |= {"max_new_tokens": 96, "grader": "gym", "against": "gym:teacher"}
    ours = evaluate_model("gym:student", **asked, engine="vllm", vllm={"enforce_eager": True})
    theirs = evaluate_model("gym:student", **asked)
    for name, found in ours.results.items():
        assert abs(found.avg_at_k - theirs.results[name].avg_at_k) <= 1 / 40
        assert found.mean_length == pytest.approx(theirs.results[name].mean_length, rel=0.02)


def test_a_server_as_engine(tmp_path: Path, student: Served) -> None:
    parts = assemble(gym(tmp_path, "server", rollout={"engine": "vllm", "url": student.url}))
    assert isinstance(parts.generators.student, ServerEngine)
    parts.generators.student.sync_weights(0)
    check_engine(parts)


def test_a_server_is_given_the_adapter_alone(tmp_path: Path) -> None:
    """Its log-probs are those of the student, also after it was killed; a run is trained with it."""
    server = Served("gym:student", tmp_path / "log.txt", "--enable-lora --max-lora-rank 8").wait()
    where = {"engine": "vllm", "url": server.url, "push": "adapter", "patience": 300.0}
    try:
        parts = assemble(gym(tmp_path, "lora", rollout=where, student={"lora_rank": 4}))
        engine, own = parts.generators.student, parts.generators.over(parts.models.student)
        assert isinstance(engine, ServerEngine)
        engine.sync_weights(0)
        with torch.no_grad():
            for name, p in parts.models.student.named_parameters():
                if "lora_B" in name:
                    p.normal_(std=0.3)
        assert engine.gap() > 1e-2, "stale weights are seen"
        engine.sync_weights(1)
        assert gap_of(engine, own, parts.prompts.pool[:8]) < 1e-3
        server.kill()
        server.start()
        assert gap_of(engine, own, parts.prompts.pool[:8]) < 1e-3
        assert engine.resyncs == 1
        names = engine.server.models_at(engine.server.hosts[0])
        assert len(names) == 2, "the base and the adapter"
        result = train(gym(tmp_path, "run", rollout=where, student={"lora_rank": 4}), quiet=True)
        rows = read_lines(result.directory / "metrics.jsonl")
        assert [r["staleness"] for r in rows] == [0, 0, 0]
        assert all(abs(r["importance_ratio"] - 1) < 1e-3 for r in rows)
    finally:
        server.kill()


def test_weights_go_over_vllms_own_transfer(
    tmp_path: Path, student: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL's handshake and routes, with gloo's wires; also after the server was killed. One that was started
    without a transfer is told how."""
    gloo_transfer.register()
    monkeypatch.setattr(transfer, "open_line", gloo_transfer.open_line)
    plugin = gloo_transfer.install(tmp_path / "plugin")
    more = '--weight-transfer-config={"backend":"gloo"}'
    server = Served("gym:student", tmp_path / "log.txt", more, **plugin).wait()
    where = {"engine": "vllm", "url": server.url, "push": "nccl", "patience": 300.0}
    try:
        parts = assemble(gym(tmp_path, "sent", rollout=where))
        engine = parts.generators.student
        assert isinstance(engine, ServerEngine)
        engine.sync_weights(0)
        check_engine(parts)
        server.kill()
        server.start()
        own = parts.generators.over(parts.models.student)
        assert gap_of(engine, own, parts.prompts.pool[:8]) < 1e-4
        assert engine.resyncs == 1
        result = train(gym(tmp_path, "run", rollout=where), quiet=True)
        assert [r["staleness"] for r in read_lines(result.directory / "metrics.jsonl")] == [0, 0, 0]
        assert not (result.directory / "weights").exists()
    finally:
        server.kill()
    other = assemble(gym(tmp_path, "other", rollout={**where, "url": student.url}))
    with pytest.raises(UserError, match=r"start vllm serve with --weight-transfer-config"):
        other.generators.student.sync_weights(0)


METHODS: dict[str, dict[str, Any]] = {
    "opd": {},
    "trd": {},
    "topd": {},
    "relay": {"delta": 4.0},
    "branch": {},
    "bridge": {"window": 14, "distance": 0.02},
    "truncate": {"overlap_k": 10},
}


@pytest.mark.parametrize("method", METHODS)
def test_methods_with_both_servers(method: str, tmp_path: Path, student: Served, teacher: Served) -> None:
    config = gym(
        tmp_path, method,
        method={"name": method, **TOPK, **METHODS[method]}, run={"trajectories_every": 1},
        rollout={"engine": "vllm", "url": student.url},
        teacher={"engine": "vllm", "url": teacher.url},
    )  # fmt: skip
    result = train(config, quiet=True)
    rows = read_lines(result.directory / "metrics.jsonl")
    assert [r["staleness"] for r in rows] == [0, 0, 0]
    assert all(math.isfinite(r["loss"]) and r["loss"] > 0.05 for r in rows)
    if method == "trd":
        assert rows[0]["accuracy_z"] > 0.9, "the server rewrites as the bundled teacher does"
    edits = {row["edit"] for row in read_trajectories(result.directory)}
    assert (edits == {"none"}) is (method == "opd"), "it did nothing"


@pytest.mark.parametrize("where", ["in process", "server"])
def test_the_next_batch_is_written_while_this_one_trains(where: str, tmp_path: Path, student: Served) -> None:
    rollout = IN_PROCESS if where == "in process" else {"engine": "vllm", "url": student.url}
    config = gym(tmp_path, "overlap", rollout={**rollout, "overlap": True}, run={"trajectories_every": 1})
    result = train(config, quiet=True)
    rows = read_lines(result.directory / "metrics.jsonl")
    assert [r["staleness"] for r in rows] == [0, 1, 1]
    assert all(math.isfinite(r["loss"]) and r["loss"] > 0.05 for r in rows)


def test_a_chat_endpoint_rewrites(tmp_path: Path, teacher: Served) -> None:
    config = gym(
        tmp_path, "chat",
        method={"name": "trd", "divergence": "cross_entropy"}, optim={"steps": 2, "lr": 1e-3},
        teacher={"engine": "chat", "url": teacher.url, "model": teacher.model},
    )  # fmt: skip
    rows = read_lines(train(config, quiet=True).directory / "metrics.jsonl")
    assert len(rows) == 2
    assert all(r["accuracy_z"] > 0.9 and r["length_ratio"] > 0.5 for r in rows)
    assert rows[0]["reverse_kl_nats"] is None


def test_both_servers_are_killed_and_come_back(tmp_path: Path, student: Served, teacher: Served) -> None:
    config = gym(
        tmp_path, "killed",
        method={"name": "opd", **TOPK}, optim={"steps": 6, "lr": 1e-3},
        rollout={"engine": "vllm", "url": student.url, "patience": 300.0},
        teacher={"engine": "vllm", "url": teacher.url, "patience": 300.0},
    )  # fmt: skip
    metrics = tmp_path / "runs" / "killed" / "metrics.jsonl"
    killed_at: list[int] = []

    def strike() -> None:
        for server, after in ((teacher, 1), (student, 3)):
            while not metrics.exists() or len(read_lines(metrics)) < after:
                time.sleep(0.05)
            server.kill()
            killed_at.append(len(read_lines(metrics)))
            server.start()

    thread = threading.Thread(target=strike)
    thread.start()
    result = train(config, quiet=True)
    thread.join()
    rows = read_lines(result.directory / "metrics.jsonl")
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6]
    assert max(killed_at) < 6, "both died while there was work to do"
