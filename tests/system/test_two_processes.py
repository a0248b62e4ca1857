"""Two gloo processes give what one process gives."""

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from onpath.config.build import Config
from onpath.run.log import read_lines
from onpath.system.draws import request_seed
from onpath.training import train
from tests.engines.test_server import fake_of, restarted
from tests.forks import forked

COLUMNS = ("loss", "tokens", "reverse_kl_nats", "student_entropy_nats", "grad_norm", "mean_length", "lr")


def in_ranks(config: Config, tmp_path: Path, *, processes: int) -> Path:
    """The run's directory, by so many ranks, without a launcher."""
    ended = forked(lambda _: train(config, quiet=True), tmp_path, world=processes)
    assert [code for code, _, _ in ended] == [0] * processes, "\n".join(err for _, _, err in ended)
    return Path(config.run.dir) / config.run.name


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [7, 1])  # an odd share; a rank that has nothing to do
def test_two_processes_are_one(prompts: int, tiny: Callable[..., Config], tmp_path: Path) -> None:
    options = {"rollout__prompts": prompts, "optim__steps": 3, "eval__start": True}
    one = train(tiny(**options, run__name="one"), quiet=True).directory
    two = in_ranks(tiny(**options, run__name="two"), tmp_path, processes=2)
    assert_same(one, two)


@pytest.mark.slow
@pytest.mark.parametrize(("servers", "overlap"), [(2, False), (1, True)])
def test_two_processes_share_rollout_servers(
    servers: int, overlap: bool, tiny: Callable[..., Config], model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    """New weights go to each once for both, and not before the second has its samples of the old ones."""
    fakes = [fake_of(model_dirs["student"]) for _ in range(servers)]
    urls = [fake.url for fake in fakes]
    options = {"rollout__engine": "vllm", "rollout__url": urls, "rollout__overlap": overlap}
    options |= {"rollout__prompts": 2, "optim__steps": 3, "optim__lr": 0.01, "eval__start": True}
    ones = [tiny(**options, run__name=name) for name in ("one", "two")]
    late = {request_seed(ones[0].run.seed, f"step {step}/1/0") for step in range(3)}  # of the second process
    for fake in fakes:
        fake.waits_for_push = lambda body: body.get("seed") in late
    one = train(ones[0], quiet=True).directory
    pushes = [fake.resets for fake in fakes]
    asked = {body.get("seed") for fake in fakes for body in fake.requests}
    for fake in fakes:
        restarted(fake)
    two = in_ranks(ones[1], tmp_path, processes=2)
    for fake in fakes:
        fake.stop()
    assert late <= asked
    assert_same(one, two)
    assert pushes == [1 + 3] * servers
    assert [fake.resets for fake in fakes] == [2 * (1 + 3)] * servers


def assert_same(one: Path, two: Path) -> None:
    """Metrics, evaluations and weights of two runs."""
    rows = [read_lines(run / "metrics.jsonl") for run in (one, two)]
    assert len(rows[0]) == len(rows[1]) == 3
    for a, b in zip(*rows, strict=True):
        assert {k: a[k] for k in COLUMNS} == pytest.approx({k: b[k] for k in COLUMNS}, rel=1e-5, abs=1e-7)
    evals = [read_lines(run / "eval.jsonl") for run in (one, two)]
    assert evals[0] == evals[1]
    weights = [load_file(run / "model" / "model.safetensors") for run in (one, two)]
    for name, tensor in weights[0].items():
        assert tensor.allclose(weights[1][name], rtol=1e-4, atol=2e-6), name
