"""The tests that need a GPU (marker `gpu`); with tiny shapes the same tests on the CPU."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_QUICK = "float64 and union or near_and_unbiased and reverse or waits or three_steps and sampled"


def run(record: Any, *, tiny: bool, left: Any) -> None:
    with TemporaryDirectory() as directory:
        report = Path(directory) / "tests.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            "gpu",
            "-q",
            "-W",
            "ignore",
            "-p",
            "no:cacheprovider",
        ]
        command += [f"--junitxml={report}", "tests/test_gpu.py", *(["-k", _QUICK] if tiny else [])]
        environment = {**os.environ, "ONPATH_GPU_TESTS_ON": "cpu" if tiny else "cuda"}
        code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
        cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [(c, child) for c in cases for child in c if child.tag in ("failure", "error")]
    skipped = sum(child.tag == "skipped" for c in cases for child in c)
    passed = len(cases) - len(failed) - skipped
    record("Tests marked gpu", passed=passed, failed=len(failed), skipped=skipped)
    for case, child in failed:
        record("Failed", test=case.get("name"), said=(child.get("message") or "").strip()[:300])
    if code or not passed:
        raise SystemExit(f"pytest ended with exit code {code}; {passed} tests passed")
