"""Headless Chromium for the report's tests; skipped where there is none and we may not install it."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--force-device-scale-factor=1",
    "--hide-scrollbars",
)
PACKAGES = "chromium chromium-driver fonts-dejavu-core"
INSTALL = f"apt-get update -qq && apt-get install -y -qq --no-install-recommends {PACKAGES}"
INSTALL_SECONDS = 600


def find_chromium() -> tuple[str, str] | None:
    """Paths of browser and driver."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


def install_chromium() -> str:
    """Tries Debian's packages; returns why that did not work, empty where it did."""
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return "only root on Debian can have them installed by the tests"
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    # Unlike subprocess's own limit, timeout ends what bash has started too.
    command = ["timeout", "--kill-after=10", str(INSTALL_SECONDS), "bash", "-c", INSTALL]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 124:
        return f"apt-get did not end within {INSTALL_SECONDS} s"
    said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()
    return f"apt-get failed, saying: {said[-1]}" if done.returncode else ""


@pytest.fixture(scope="session")
def chromium() -> tuple[str, str]:
    """Debian's Chromium, installed here where it is missing and we are root."""
    why = "" if find_chromium() else install_chromium()
    found = find_chromium()
    if found is None:
        pytest.skip(f"no chromium and chromedriver: {why}")
    return found


@pytest.fixture(scope="session")
def driver(chromium: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A browser with a fresh profile; it logs its console and every request."""
    selenium = pytest.importorskip("selenium", reason="needs selenium: pip install selenium")
    assert selenium
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium[0]
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}", "--window-size=1280,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    made = webdriver.Chrome(options=options, service=Service(chromium[1]))
    yield made
    made.quit()
