"""Where Chromium cannot be had the browser tests are skipped, and say why."""

import os
import shutil
from pathlib import Path

import pytest

from tests.browser import conftest


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A path that holds no program but bash, timeout and our own apt-get."""
    fake = tmp_path / "bin"
    fake.mkdir()
    for name in ("bash", "timeout"):
        (fake / name).symlink_to(shutil.which(name) or "")
    monkeypatch.setenv("PATH", str(fake))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    return fake / "apt-get"


def program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def test_a_failing_install_gives_its_own_words(apt: Path) -> None:
    program(apt, 'echo "E: Unable to locate package chromium" >&2; exit 100')
    assert conftest.install_chromium() == "apt-get failed, saying: E: Unable to locate package chromium"
    assert conftest.find_chromium() is None


def test_lists_are_brought_up_to_date_before_packages_are_asked_for(apt: Path) -> None:
    program(apt, f'echo "$1" >> {apt.parent}/asked')
    assert conftest.install_chromium() == ""
    assert (apt.parent / "asked").read_text().split() == ["update", "install"]


def test_an_install_that_hangs_is_given_up(apt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(apt, "/bin/sleep 61")
    monkeypatch.setattr(conftest, "INSTALL_SECONDS", 0.2)
    assert conftest.install_chromium() == "apt-get did not end within 0.2 s"


def test_others_are_told_who_can_install(apt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(apt, "exit 0")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "only root on Debian" in conftest.install_chromium()
    assert not (apt.parent / "asked").exists()
