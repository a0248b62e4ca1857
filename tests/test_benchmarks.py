"""The GPU script works before there is a GPU: every part in tiny shapes, and a runner that loses nothing."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from onpath.run import loss as story

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def gpu() -> Iterator[ModuleType]:
    """benchmarks/gpu.py, as it is when it is run."""
    sys.path.insert(0, str(BENCHMARKS))
    known = set(sys.modules)
    yield importlib.import_module("gpu")
    sys.path.remove(str(BENCHMARKS))
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
            del sys.modules[name]


def tables(gpu: ModuleType, out: Path, name: str) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    gpu.child(name, out, seconds=600.0, tiny=True)
    for row in gpu.rows_of(out, name):
        found.setdefault(row.pop("table"), []).append(row)
    return found


def test_machine(gpu: ModuleType, tmp_path: Path) -> None:
    found = tables(gpu, tmp_path, "machine")
    assert found["Versions"][0]["torch"] == torch.__version__
    assert all(value > 0 for value in found["Ceilings"][0].values())


@pytest.mark.filterwarnings("ignore")
def test_loss(gpu: ModuleType, tmp_path: Path) -> None:
    (rows, profile) = tables(gpu, tmp_path, "loss").values()
    by_name = {row["loss by"]: row for row in rows}
    assert list(by_name) == ["onpath", "trl", "plain", "liger"]
    for name in ("onpath", "trl", "plain"):
        assert by_name[name]["ms"] > 0
        assert by_name[name]["off onpath's by"] < 0.03
        assert by_name[name]["said"] is None
    assert profile[0]["share"] >= profile[-1]["share"] > 0


def test_step(gpu: ModuleType, tmp_path: Path) -> None:
    found = tables(gpu, tmp_path, "step")
    opd, topd, *again = found["Whole steps"]
    assert opd["response tokens"] == 4 * 24
    assert topd["windows"] > 0
    assert topd["topd windows, s"] > 0
    assert [row["step"] for row in again] == ["opd, second step", "topd, second step"]
    assert all(row["loss"] > 0 and row["grad_norm"] > 0 for row in found["Whole steps"])
    stages = found["Seconds and peak memory by stage"]
    assert {row["stage"] for row in stages if row.get("plan, s")} == {"score", "train"}


def test_windows(gpu: ModuleType, tmp_path: Path) -> None:
    ((_, first, shorter, anew),) = tables(gpu, tmp_path, "windows").values()
    assert first["rounds"] > 0
    assert shorter["window tokens"] < first["window tokens"] == anew["window tokens"]
    assert anew["fed tokens"] > first["fed tokens"]


def test_packing(gpu: ModuleType, tmp_path: Path) -> None:
    """What packing is compared with are full micro-batches: on a GPU the library pads until they are."""
    packing = importlib.import_module("on_gpu.packing")
    rollouts = packing._trajectories([[0] * n for n in packing.lengths_of(64, 1500, 4096)])
    micros = packing.micro_batches(rollouts, max_tokens=16_384, device=torch.device("cuda"))
    full = [len(micro) * max(len(t.response) + 1 for t in micro) for micro in micros]
    assert sum(full[:-1]) > 0.9 * 16_384 * len(full[:-1])
    (rows,) = tables(gpu, tmp_path, "packing").values()
    padded, packed, unmasked = rows
    assert packed["way"].startswith("packed")
    for row in (packed, unmasked):
        assert row["loss off by"] < 2e-3
        assert row["gradient norm off by"] < 2e-3
    assert padded["tokens/s"] > 0


@pytest.mark.filterwarnings("ignore")
def test_peer(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    # The script times these in place; here they are put back.
    monkeypatch.setattr(torch.Tensor, "backward", torch.Tensor.backward)
    for name in ("student_states", "fused_objective"):
        monkeypatch.setattr(story, name, getattr(story, name))
    found = tables(gpu, tmp_path, "peer")
    agreed = found["Agreement on one batch, and the ratio of paired steps"]
    assert [row["models"] for row in agreed] == ["gym", "SmolLM2-135M"]
    assert all(row["loss_difference"] < 1e-4 for row in agreed)


def commands(gpu: ModuleType, out: Path, parts: dict[str, str], *, seconds: float = 60.0) -> bool:
    limits = {name: 0.8 if name == "slow" else 20.0 for name in parts}
    done: bool = gpu.run_parts(
        out, limits, lambda name, _: [sys.executable, "-c", parts[name]], seconds=seconds
    )
    return done


def test_the_runner_goes_on_after_failures(gpu: ModuleType, tmp_path: Path) -> None:
    """A part that raises, one that hangs after a row, one that works."""
    row = f"open(r'{tmp_path}/%s.jsonl', 'a').write('{{\"table\": \"T\", \"s\": 1.5}}\\n')"
    cut = f"open(r'{tmp_path}/slow.jsonl', 'a').write('{{\"tab')"
    parts = {
        "raises": "raise ValueError('no such kernel')",
        "slow": f"import time; {row % 'slow'}; {cut}; time.sleep(60)",
        "works": row % "works",
    }
    assert not commands(gpu, tmp_path, parts)
    data = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert data["raises"]["state"] == "failed (exit code 1)"
    assert "no such kernel" in data["raises"]["error"]
    assert data["slow"]["state"] == "stopped after 1 s"
    assert data["slow"]["rows"] == data["works"]["rows"] == [{"table": "T", "s": 1.5}]
    assert data["works"]["state"] == "done"
    page = (tmp_path / "gpu.md").read_text()
    assert "no such kernel" in page
    assert page.count("| 1.5 |") == 2


def test_the_whole_command_from_a_checkout_alone(tmp_path: Path) -> None:
    """As on the machine with the GPU: beside the checkout there are others' packages and no onpath."""
    site, out = tmp_path / "site", tmp_path / "out"
    site.mkdir()
    for package in Path(sysconfig.get_path("purelib")).iterdir():
        if "onpath" not in package.name and package.suffix != ".pth":
            (site / package.name).symlink_to(package)
    plain = os.path.realpath(sys.executable)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    env |= {"PYTHONPATH": str(site), "PYTHONNOUSERSITE": "1"}
    there = [plain, "-c", "import onpath"]
    assert subprocess.run(there, cwd=tmp_path, env=env, capture_output=True, check=False).returncode == 1
    command = [plain, str(BENCHMARKS / "gpu.py"), "--tiny", "--only", "machine", "tests", "--out", str(out)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    parts = json.loads((out / "gpu.json").read_text())["parts"]
    assert {name: part["state"] for name, part in parts.items()} == {"machine": "done", "tests": "done"}
    assert done.returncode == 0, done.stderr


def test_the_runner_says_what_it_had_no_time_for(gpu: ModuleType, tmp_path: Path) -> None:
    assert not commands(gpu, tmp_path, {"late": "pass"}, seconds=gpu._LEAST - 1)
    data = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert data["late"]["state"].startswith("not begun")


def test_all_parts_fit_into_nine_minutes(gpu: ModuleType) -> None:
    assert sum(gpu.PARTS.values()) <= gpu._WHOLE <= 9 * 60 - 15
    assert {p.stem for p in (BENCHMARKS / "on_gpu").glob("*.py")} >= set(gpu.PARTS)


def test_a_wheel_that_cannot_be_installed_stops_no_other(gpu: ModuleType, tmp_path: Path) -> None:
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    wheels.mkdir()
    (wheels / "junk-1.0-py3-none-any.whl").write_bytes(b"no wheel")
    with zipfile.ZipFile(wheels / "onpath_tried-1.0-py3-none-any.whl", "w") as wheel:
        told = "onpath_tried-1.0.dist-info/"
        wheel.writestr("onpath_tried.py", "")
        wheel.writestr(f"{told}METADATA", "Metadata-Version: 2.1\nName: onpath-tried\nVersion: 1.0\n")
        wheel.writestr(f"{told}WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{told}RECORD", "")
    lone = tmp_path / "lone"
    shutil.copytree(wheels, lone, ignore=lambda *_: ["onpath_tried-1.0-py3-none-any.whl"])
    assert gpu.install(lone, tmp_path / "no site")["state"] == "1 not installed"
    state = gpu.install(wheels, site)
    assert state["state"] == "1 not installed"
    assert state["error"].startswith("junk-1.0-py3-none-any.whl: ")
    assert (site / "onpath_tried.py").is_file()
    assert not gpu.run_parts(
        tmp_path, {"x": 9.0}, lambda *_: ["true"], seconds=60.0, before={"wheels": state}
    )
    data = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert [data[part]["state"] for part in ("wheels", "x")] == ["1 not installed", "done"]


def test_wheels_are_only_what_is_missing(gpu: ModuleType) -> None:
    assert gpu._installed("pydantic_core")
    assert not gpu._installed("no_such_package")


def test_scale(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny shapes, in processes of their own: they share what one has, and the page has them."""
    scale = importlib.import_module("scale")
    some = [case for case in scale.cases_of("tiny") if case.shard == "layer" and not case.balance]
    monkeypatch.setattr(scale, "cases_of", lambda model: some)
    data = scale.run(["tiny"], steps=2)
    cases = data["models"]["tiny"]
    assert list(cases) == [case.name for case in some]
    for found in cases.values():
        assert all(found[key]["n"] == 2 and found[key]["median"] > 0 for key in list(found)[:4])
        assert found["memory, MiB"]["planned"] > 0
    assert cases["2 × layer, as drawn"]["slowest ÷ mean, tokens"]["median"] >= 1
    assert all(f"| {name} |" in scale.markdown(data) for name in cases)


def test_the_memory_plan_is_that_of_the_page(gpu: ModuleType, tmp_path: Path) -> None:
    """What was compared with measured peaks is what is calculated today."""
    memory = importlib.import_module("memory")
    data = json.loads((BENCHMARKS / "results" / "memory.json").read_text())["settings"]
    stored = {(row["setting"], *row["shape"]): row["peak"] for row in data}
    for name in memory.SETTINGS:
        (directory := tmp_path / name).mkdir()
        parts = memory.made(directory, name, memory.SHAPES[0])
        today = memory.planned(parts, memory.SHAPES[0], world=2 if name.startswith("two") else 1)
        assert today["peak"] == pytest.approx(stored[name, *memory.SHAPES[0]], rel=0.01), name


def test_the_memory_plan_was_within_15_percent_of_what_was_measured() -> None:
    """At most as far off in every setting of the page that is committed, which says nothing else."""
    found = json.loads((BENCHMARKS / "results" / "memory.json").read_text())["settings"]
    page = (BENCHMARKS / "results" / "memory.md").read_text()
    assert {(row["setting"], tuple(row["shape"])) for row in found} >= {
        (setting, shape)
        for setting in ("all weights", "LoRA 64", "two processes, layer", "two processes, layer, LoRA 64")
        for shape in ((4, 32, 96), (8, 64, 192))
    }
    for row in found:
        share = row["peak"] / row["measured"]
        assert 0.85 < share < 1.15
        assert any(
            line.startswith(f"| {row['setting']} | {row['shape'][0]} of ")
            and line.endswith(f" {share:.2f} |")
            for line in page.splitlines()
        )
