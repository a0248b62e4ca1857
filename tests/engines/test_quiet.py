"""Loading and saving show nothing, and a host program keeps its own progress bars."""

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
from transformers.utils import logging

from onpath.config import Student
from onpath.engines.models import load_model, load_tokenizer, quietly


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of huggingface_hub, where the environment decides
        logging.enable_progress_bar()


def state() -> tuple[bool, bool, int]:
    return logging.is_progress_bar_enabled(), are_progress_bars_disabled(), logging.get_verbosity()


@pytest.mark.parametrize(("bars", "downloads"), [(True, True), (True, False), (False, False)])
def test_the_host_programs_settings_come_back(bars: bool, downloads: bool) -> None:
    logging.enable_progress_bar() if bars else logging.disable_progress_bar()
    if not downloads:
        disable_progress_bars()
    before = state()
    with quietly():
        assert state() == (False, True, logging.ERROR)
    assert state() == before
    with pytest.raises(KeyError), quietly():
        raise KeyError
    assert state() == before


LOADS = """
import sys
from pathlib import Path
import torch
from onpath.config import Student
from onpath.engines.models import load_model, load_tokenizer, quietly
from transformers.utils import logging
bars = logging.is_progress_bar_enabled()
section = Student(model=sys.argv[1])
model = load_model(section, "MODEL", torch.device("cpu"))
load_tokenizer(section, "MODEL")
with quietly():
    model.save_pretrained(sys.argv[2])
print(bars, logging.is_progress_bar_enabled())
"""


def test_a_new_process_prints_nothing(model_dirs: dict[str, Path], tmp_path: Path) -> None:
    command = [sys.executable, "-c", LOADS, str(model_dirs["student"]), str(tmp_path / "out")]
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_DISABLE_PROGRESS_BARS"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert run.stderr == ""
    assert run.stdout.split() == ["True", "True"]


@pytest.mark.parametrize("disabled", [None, False, True])
def test_nothing_is_printed(
    disabled: bool | None,
    model_dirs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Whatever HF_HUB_DISABLE_PROGRESS_BARS said when huggingface_hub was imported."""
    monkeypatch.setattr(sys.modules["huggingface_hub.utils.tqdm"], "HF_HUB_DISABLE_PROGRESS_BARS", disabled)
    logging.disable_progress_bar() if disabled else logging.enable_progress_bar()
    section = Student(model=str(model_dirs["student"]))
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load_model(section, "MODEL", torch.device("cpu"))
        load_tokenizer(section, "MODEL")
        with quietly():
            model.save_pretrained(tmp_path / "out")
    assert capfd.readouterr() == ("", "")
    assert logging.is_progress_bar_enabled() == (not disabled)
    if disabled is None:
        model.save_pretrained(tmp_path / "loud")
        assert "Writing model shards" in capfd.readouterr().err, "what would be printed otherwise"
