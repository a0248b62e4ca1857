"""Under torchrun a mistake is said once, and its report ends with the sentence."""

import json
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from onpath.commands.cli import main


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
