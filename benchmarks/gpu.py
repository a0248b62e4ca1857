"""Everything that wants a GPU, in one command of at most nine minutes.

    benchmarks/gather_wheels.sh wheels                       with a network: what may be missing there
    python benchmarks/gpu.py --out results --wheels wheels   there: one H100 or H200, no network

Parts run in the order of `PARTS`, each in a process of its own with its own time limit. A part that fails is
recorded with its error, and the rest goes on. After every row that a part hands over, `gpu.json` and
`gpu.md` under --out are whole and up to date, so however short the time is, numbers come back.

Without a GPU, and with --tiny, all of it runs to its end in tiny shapes on the CPU: that tells nothing but
that the script works (tests/test_benchmarks.py).
"""

import argparse
import datetime
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PARTS = {"machine": 20, "tests": 90, "loss": 110, "step": 160, "packing": 45, "windows": 50, "peer": 45}
"""Name → seconds that it may take, most important first; one that takes all of its own takes no other's."""
_WHOLE = 520.0
"""Seconds of all parts together: the command stays below nine minutes."""
_LEAST = 15.0
"""Seconds below which no part is begun."""
_ERROR_LINES = 12

Row = dict[str, Any]


def run_parts(
    out: Path,
    limits: Mapping[str, float],
    command: Callable[[str, float], Sequence[str]],
    *,
    seconds: float,
    before: Mapping[str, Row] | None = None,
) -> bool:
    """All parts, one after the other; whether each came to its end without an error.

    Args:
        limits: seconds that each part may take.
        command: of a part and the seconds it is given, what is run.
        seconds: of all together, and of those before them.
        before: states of what was done already.
    """
    begun, states = time.monotonic(), dict(before or {})
    begun -= sum(state["seconds"] for state in states.values())
    for name, limit in limits.items():
        left = seconds - (time.monotonic() - begun)
        if left < _LEAST:
            states[name] = {"state": f"not begun: {left:.0f} s left"}
        else:
            given = min(limit, left)
            states[name] = _run_part(name, out, command(name, given), given, states)
        _write(out, states, time.monotonic() - begun)
    return all(state["state"] == "done" for state in states.values())


def _run_part(name: str, out: Path, command: Sequence[str], limit: float, states: Mapping[str, Row]) -> Row:
    log, begun, written = out / f"{name}.log", time.monotonic(), -1
    with log.open("wb") as output:
        # A session of its own: what the part has started ends with it.
        part = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True
        )
        while True:
            left = limit - (time.monotonic() - begun)
            try:
                code = part.wait(timeout=max(0.01, min(2.0, left)))
                break
            except subprocess.TimeoutExpired:
                if left <= 0:
                    os.killpg(part.pid, signal.SIGKILL)
                    part.wait()
                    return {"state": f"stopped after {limit:.0f} s", "seconds": limit}
                if (size := _size(out / f"{name}.jsonl")) != written:
                    written = size
                    _write(out, {**states, name: {"state": "running", "seconds": limit - left}}, None)
    state = {"state": "done" if code == 0 else f"failed (exit code {code})"}
    if code:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        state["error"] = "\n".join(lines[-_ERROR_LINES:])
    return {**state, "seconds": round(time.monotonic() - begun, 1)}


def environment(site: Path, *, tiny: bool) -> dict[str, str]:
    """Of the parts: our sources first, the wheels' packages behind them."""
    paths = [
        str(ROOT / "src"),
        str(HERE),
        str(ROOT),
        str(site),
        *filter(None, [os.environ.get("PYTHONPATH")]),
    ]
    found = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    found |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return found | ({"CUDA_VISIBLE_DEVICES": ""} if tiny else {})


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def rows_of(out: Path, name: str) -> list[Row]:
    """What a part has handed over; a killed writer's last line is passed over."""
    path, found = out / f"{name}.jsonl", []
    for line in path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []:
        found.append(json.loads(line))
    return found


def _write(out: Path, states: Mapping[str, Row], seconds: float | None) -> None:
    data = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(sys.argv),
        "seconds": seconds,
        "parts": {name: {**state, "rows": rows_of(out, name)} for name, state in states.items()},
    }
    for name, text in (("gpu.json", json.dumps(data, indent=1)), ("gpu.md", markdown(data))):
        new = out / f"{name}.tmp"
        new.write_text(text + "\n", encoding="utf-8")
        new.replace(out / name)


def markdown(data: Mapping[str, Any]) -> str:
    """The page: a section for each part, a table for each kind of row."""
    whole = "" if data["seconds"] is None else f", {data['seconds']:.0f} s in all"
    lines = ["# On a GPU", "", f"{data['date']}, `{data['command']}`{whole}.", ""]
    for name, part in data["parts"].items():
        took = f", {part['seconds']:.0f} s" if "seconds" in part else ""
        lines += [f"## {name}", "", f"{part['state']}{took}.", ""]
        if "error" in part:
            lines += ["```", part["error"], "```", ""]
        tables: dict[str, list[Row]] = {}
        for row in part["rows"]:
            tables.setdefault(row["table"], []).append(row)
        for title, rows in tables.items():
            lines += [f"**{title}**", "", *_table(rows), ""]
    return "\n".join(lines).rstrip()


def _table(rows: Sequence[Row]) -> list[str]:
    columns = list(dict.fromkeys(key for row in rows for key in row if key != "table"))
    cells = [[_cell(row.get(c)) for c in columns] for row in rows]
    return [f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *cells)]


def _cell(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return "" if value is None else str(value).lower()
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|").replace("\n", " ")


def child(name: str, out: Path, *, seconds: float, tiny: bool) -> None:
    """One part, in this process."""
    ends = time.monotonic() + seconds
    path = out / f"{name}.jsonl"

    def record(table: str, **cells: Any) -> None:
        print(table, cells, flush=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"table": table, **cells}) + "\n")

    part = importlib.import_module(f"on_gpu.{name}")
    part.run(record, tiny=tiny, left=lambda: ends - time.monotonic())


def install(wheels: Path, site: Path) -> Row:
    """The wheels of packages that this Python lacks, beside it: what is there, torch above all, stays. One
    that cannot be installed is named, and what needs it says so; all are tried in one go first.

    Returns:
        The state of this part.
    """
    lacking = [str(w) for w in sorted(wheels.glob("*.whl")) if not _installed(w.name.partition("-")[0])]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    command += ["--no-compile", "--target", str(site)]
    failed: list[str] = []
    begun = time.monotonic()
    if lacking and subprocess.run([*command, *lacking], capture_output=True, check=False).returncode:
        for wheel in lacking:
            done = subprocess.run([*command, wheel], capture_output=True, text=True, check=False)
            if done.returncode:
                failed.append(f"{Path(wheel).name}: {(done.stderr.strip().splitlines() or [''])[-1]}")
    state = {"state": "done", "seconds": round(time.monotonic() - begun, 1)}
    return {**state, "state": f"{len(failed)} not installed", "error": "\n".join(failed)} if failed else state


def _installed(name: str) -> bool:
    try:
        distribution(re.sub(r"[-_.]+", "-", name))
    except PackageNotFoundError:
        return False
    return True


def has_gpu() -> bool:
    """Without importing torch here: a context on the GPU would take memory from the parts."""
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="directory of gpu.json, gpu.md and the logs")
    parser.add_argument("--wheels", type=Path, help="what gather_wheels.sh has gathered")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on the CPU; so too without a GPU")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART")
    parser.add_argument("--seconds", type=float, default=_WHOLE, help="of all parts together")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if options.part:
        child(options.part, out, seconds=options.seconds, tiny=options.tiny)
        return 0
    tiny = options.tiny or not has_gpu()
    limits = {name: limit * (20 if tiny else 1) for name, limit in PARTS.items() if name in options.only}
    for name in limits:
        (out / f"{name}.jsonl").unlink(missing_ok=True)

    def command(name: str, seconds: float) -> list[str]:
        found = [sys.executable, str(HERE / "gpu.py"), "--part", name, "--out", str(out)]
        return [*found, "--seconds", str(seconds), *(["--tiny"] if tiny else [])]

    before: dict[str, Row] = {}
    with tempfile.TemporaryDirectory() as site:
        if options.wheels:
            before["wheels"] = install(options.wheels, Path(site))
            commit = options.wheels / "commit"
            os.environ.setdefault("ONPATH_COMMIT", commit.read_text().strip() if commit.exists() else "")
        os.environ.update(environment(Path(site), tiny=tiny))
        well = run_parts(out, limits, command, seconds=options.seconds * (20 if tiny else 1), before=before)
    print((out / "gpu.md").read_text(encoding="utf-8"))
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
