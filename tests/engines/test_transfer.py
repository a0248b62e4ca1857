"""`rollout.push: nccl`: servers get all weights over vLLM's own transfer, here over wires of the test."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from onpath import config as configuration
from onpath.commands.cli import main
from onpath.config.whole import Config
from onpath.engines.remote import transfer
from onpath.engines.remote.host import Busy, Host
from onpath.engines.remote.server import ServerEngine
from onpath.engines.remote.transfer import Client, OverNCCL, Source
from onpath.engines.weights import checkpoint_weights
from onpath.run.assemble import assemble
from onpath.run.log import read_lines
from onpath.run.parts import Parts
from onpath.system import distributed
from onpath.system.errors import UserError
from onpath.training import train
from tests.engines.fake_vllm import FakeVLLM
from tests.engines.test_server import fake_of, restarted, scaled
from tests.forks import forked, ranks

Tiny = Callable[..., Config]


class Wire:
    """vLLM's trainer side, in memory: the handshake, and tensors while the server receives."""

    def __init__(self, client: Client, source: Source, fake: FakeVLLM) -> None:
        self.client, self.source, self.fake = client, source, fake
        client.init_weight_transfer_engine({"world_size": 2})

    def send_weights(self) -> None:
        names = [m.name for m in self.source.metadata()]
        self.client.start_weight_update()
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(self.client.update_weights, {"names": names})
            for name, tensor in self.source:
                self.fake.inbox.put((name, tensor))
            asked.result()
        self.client.finish_weight_update()


@pytest.fixture
def servers(model_dirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeVLLM]]:
    monkeypatch.setattr("onpath.engines.remote.wire._FIRST_WAIT", 0.001)
    fakes = [fake_of(model_dirs["student"]) for _ in range(2)]

    def open_line(client: Client, source: Source, *, address: str, port: int, world: int) -> Wire:
        assert (address, world) == ("127.0.0.1", 2)
        return Wire(client, source, next(f for f in fakes if f.url == client.host.url))

    monkeypatch.setattr(transfer, "open_line", open_line)
    yield fakes
    for fake in fakes:
        fake.stop()


def sent(tiny: Tiny, servers: list[FakeVLLM], **more: Any) -> Config:
    where = {"rollout__engine": "vllm", "rollout__url": ",".join(s.url for s in servers)}
    return tiny(**{**where, "rollout__push": "nccl", "optim__lr": 0.01, "rollout__patience": 10.0, **more})


def engine_of(parts: Parts) -> ServerEngine:
    engine = parts.generators.student
    assert isinstance(engine, ServerEngine)
    return engine


def check_logprobs(parts: Parts, *, within: float = 1e-5) -> None:
    rollouts = parts.generators.student.generate(parts.prompts.pool, parts.sampling)
    own = parts.generators.over(parts.models.student)
    scores = own.score([r.context for r in rollouts], [r.ids for r in rollouts])
    for r, expected in zip(rollouts, scores, strict=True):
        assert r.logprobs == pytest.approx(expected, abs=within)


@pytest.mark.parametrize("lora", [{}, {"student__lora_rank": 4, "student__lora_alpha": 16.0}])
def test_a_run_is_that_of_files(lora: dict[str, Any], tiny: Tiny, servers: list[FakeVLLM]) -> None:
    over = train(sent(tiny, servers, run__name="over", **lora), quiet=True)
    assert not (over.directory / "weights").exists(), "no file"
    assert [s.meetings for s in servers] == [1, 1], "one group for all steps"
    for fake in servers:
        restarted(fake)
    files = train(sent(tiny, servers, run__name="files", rollout__push="weights", **lora), quiet=True)
    rows = [read_lines(r.directory / "metrics.jsonl") for r in (over, files)]
    assert [r["loss"] for r in rows[0]] == [r["loss"] for r in rows[1]]
    assert rows[0][-1]["loss"] != rows[0][0]["loss"]


def test_one_that_was_restarted_is_met_anew_and_given_the_same(tiny: Tiny, servers: list[FakeVLLM]) -> None:
    """Not what has been trained since: that may be half a step."""
    parts = assemble(sent(tiny, servers))
    engine = engine_of(parts)
    scaled(parts.models.student)
    engine.sync_weights(1)
    check_logprobs(parts)
    restarted(servers[1])
    kept = {k: v.clone() for k, v in parts.models.student.state_dict().items()}
    scaled(parts.models.student)
    engine.generate(parts.prompts.pool, parts.sampling)
    time.sleep(0.03)
    engine.generate(parts.prompts.pool, parts.sampling)
    parts.models.student.load_state_dict(kept)
    check_logprobs(parts)
    assert engine.resyncs == 1
    assert [s.meetings for s in servers] == [1, 2]
    assert len({s.version for s in servers}) == 1


def test_one_restarted_between_two_pushes_is_met_anew(tiny: Tiny, servers: list[FakeVLLM]) -> None:
    parts = assemble(sent(tiny, servers))
    engine_of(parts).sync_weights(0)
    restarted(servers[0])
    scaled(parts.models.student)
    engine_of(parts).sync_weights(1)
    check_logprobs(parts)
    assert [s.meetings for s in servers] == [2, 1]


def test_weights_that_do_not_arrive_are_noticed(tiny: Tiny, servers: list[FakeVLLM]) -> None:
    parts = assemble(sent(tiny, servers))
    engine_of(parts).sync_weights(0)
    servers[1].takes_weights = False
    scaled(parts.models.student)
    with pytest.raises(UserError, match=r"did not take the weights \(sent over NCCL\)"):
        engine_of(parts).sync_weights(1)


def test_half_precision_is_sent_as_half(tiny: Tiny, servers: list[FakeVLLM]) -> None:
    parts = assemble(sent(tiny, servers, optim__bf16=True))
    engine = engine_of(parts)
    engine.sync_weights(0)
    assert isinstance(engine.handover, OverNCCL)
    assert {tensor.dtype for _, tensor in engine.handover.source.held} == {torch.bfloat16}


def test_a_server_that_refuses_while_we_wait_is_heard(
    tiny: Tiny, servers: list[FakeVLLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our side of a transfer waits for ever for one that never comes, on its GPU."""

    class Stuck(Wire):
        def send_weights(self) -> None:
            with ThreadPoolExecutor(1) as pool:
                pool.submit(self.client.update_weights, {"names": []})
                threading.Event().wait()

    def open_line(client: Client, source: Source, **_: Any) -> Stuck:
        return Stuck(client, source, servers[0])

    monkeypatch.setattr(transfer, "open_line", open_line)
    monkeypatch.setattr(transfer, "_GRACE", 0.01)
    parts = assemble(sent(tiny, servers[:1], rollout__patience=0.5))
    monkeypatch.setattr(servers[0], "_receive", lambda names: 500)
    with pytest.raises(
        UserError, match=r"broke off while .* \(status 500: told to\), and this process's GPU may wait"
    ):
        engine_of(parts).sync_weights(0)


def test_a_server_that_was_not_started_for_it_is_named(tiny: Tiny, servers: list[FakeVLLM]) -> None:
    servers[1].transfers = False
    parts = assemble(sent(tiny, servers))
    with pytest.raises(UserError, match=rf"{servers[1].url} takes no weights .* start vllm serve with"):
        engine_of(parts).sync_weights(0)


REAL = transfer.open_line


@pytest.mark.parametrize(
    ("device", "sentence"),
    [("cpu", r"sends from a GPU, and the student is on cpu"), ("meta", r"needs vLLM from 0\.29 on")],
)
def test_what_this_process_lacks_is_said(
    device: str, sentence: str, tiny: Tiny, servers: list[FakeVLLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_line(client: Client, source: Source, **meeting: Any) -> Any:
        there = torch.device("cuda" if device == "meta" else device)
        return REAL(client, Source(there), **meeting)

    monkeypatch.setattr(transfer, "open_line", open_line)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=sentence):
        engine_of(assemble(sent(tiny, servers))).sync_weights(0)


def test_of_shards_the_first_process_holds_the_whole(
    tiny: Tiny, servers: list[FakeVLLM], tmp_path: Path
) -> None:
    config = sent(tiny, servers, parallel__shard="layer")
    expected = dict(checkpoint_weights(assemble(sent(tiny, servers)).models.student))

    def run(rank: int) -> None:
        handover = engine_of(assemble(config)).handover
        assert isinstance(handover, OverNCCL)
        handover.write()
        held = dict(handover.source.held)
        assert held.keys() == (expected.keys() if rank == 0 else set())
        assert all(torch.equal(held[name], expected[name]) for name in held)

    ended = ranks(run, tmp_path)
    assert [code for code, _, _ in ended] == [0, 0], ended


def test_of_two_processes_the_first_gives_and_the_other_waits(
    tiny: Tiny, servers: list[FakeVLLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One group, and weights once a step; a server that was restarted has the other ask elsewhere."""
    fake, path = servers[0], tmp_path / "sent.safetensors"

    class OverAFile(Wire):
        def send_weights(self) -> None:
            save_file(dict(self.source), path)
            self.client.start_weight_update()
            self.client.update_weights({"names": [m.name for m in self.source.metadata()]})
            self.client.finish_weight_update()

    def receive(names: list[str]) -> dict[str, Any]:
        assert names
        for name, tensor in load_file(path).items():
            fake.inbox.put((name, tensor))
        return FakeVLLM._receive(fake, sorted(names))

    monkeypatch.setattr(fake, "_receive", receive)
    monkeypatch.setattr(transfer, "open_line", lambda client, source, **_: OverAFile(client, source, fake))
    config = sent(tiny, servers[:1])

    def run(rank: int) -> None:
        train(config, quiet=True)

    ended = forked(run, tmp_path)
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert fake.meetings == 1
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    handover = OverNCCL(torch.nn.Linear(1, 1), dtype=None)
    host = Host(fake.url, config.rollout, "rollout")
    with pytest.raises(Busy, match="waits for the first process"):
        handover.give(host)
    handover.version = fake.version
    handover.give(host)
    assert fake.meetings == 1, "nothing is sent to one that has them"


def test_without_servers_it_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"rollout\.push: nccl sends weights to servers"):
        configuration.build({"rollout": {"push": "nccl"}})
    assert main(["train", "--rollout.push", "nccl", "--run.dir", str(tmp_path)]) == 2
    assert "set rollout.url" in capsys.readouterr().err
