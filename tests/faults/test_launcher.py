"""Under torchrun: runs one after the other; a mistake is said once, and the launcher's report ends with the
sentence."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from onpath.commands.cli import main
from onpath.config.whole import Config
from onpath.training import train
from tests.methods.family import ARMS, options_of
from tests.system.test_sharded_runs import OPTIM, assert_same

OF_ITS_METHODS = ("relay", "branch", "bridge", "truncate", "topd")
ONE_AFTER_THE_OTHER = """
import sys
from onpath.commands.cli import main
for path in sys.argv[1:]:
    code = main(["train", path, "--quiet", "--parallel.shard", "layer"])
    if code:
        sys.exit(code)
"""


@pytest.mark.slow
def test_two_runs_and_a_mistake_in_the_same_processes(tiny: Callable[..., Config], tmp_path: Path) -> None:
    """The launcher's store remembers the first run; the mistake is one that the first process finds. What
    they come to is what one process comes to, whatever the method."""
    options = {**OPTIM, "parallel__timeout": 30.0, "teacher__device": "auto", "run__trajectories_every": 1}
    asked = {name: {**options, **options_of(ARMS[name])} for name in OF_ITS_METHODS}
    asked = {"first": options, **asked, "second": options, "mistaken": {**options, "optim__eps": 1e-3}}
    files = []
    for name, given in asked.items():
        files.append(tmp_path / f"{name}.yaml")
        run = "second" if name == "mistaken" else name
        files[-1].write_text(tiny(**given, run__name=run).to_yaml())
    script = tmp_path / "script.py"
    script.write_text(ONE_AFTER_THE_OTHER)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, str(script), *map(str, files)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode != 0
    (ours,) = [line for line in done.stderr.splitlines() if line.startswith("onpath: ")]
    assert "belongs to a run with another config" in ours
    runs = [tmp_path / "runs" / name for name in ("first", "second")]
    first, second = (load_file(run / "model" / "model.safetensors") for run in runs)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert len(list((runs[0] / "checkpoints" / "step_2").glob("model-*"))) == 2, "in shards"
    for name in ("first", *OF_ITS_METHODS):
        alone = train(tiny(**asked[name], run__name=f"one {name}"), quiet=True)
        assert_same(alone.directory, tmp_path / "runs" / name)


def test_torchruns_report_ends_with_our_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failures = {}
    for rank in (0, 1):
        file = tmp_path / "attempt_0" / str(rank) / "error.json"
        file.parent.mkdir(parents=True)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
        assert main(["train", "--optim.lr", "abc"]) == 2
        assert json.loads(file.read_text())["message"]["message"].startswith("onpath: the command line")
        failures[rank] = ProcessFailure(local_rank=rank, pid=1, exitcode=2, error_file=str(file))
    said = capsys.readouterr().err
    assert said.count("optim.lr is 'abc'") == 1
    report = str(ChildFailedError("onpath", failures))
    assert f"traceback : {said.strip()}" in report.strip().splitlines()[-2]
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "gone" / "error.json"))
    assert main(["train", "--optim.lr", "abc"]) == 2
