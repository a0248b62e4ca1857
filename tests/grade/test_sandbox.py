"""Programs that attack the grader: none passes, none leaves a trace, as root and as an ordinary user."""

import json
import os
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import which

import pytest

from onpath.grade import sandbox
from onpath.grade.sandbox import Limits, Outcome, run_script, run_tests
from onpath.system import code
from onpath.system.errors import UserError
from tests.grade.programs import FUNCTIONS, HARM, HONEST, SCRIPTS, SLOW

ASKED = {"tests": "assert all(f(x) == x + 1 for x in map(int, '135'))\nassert f(1) == 2", "entry_point": "f"}
SHORT = Limits(cpu_seconds=1, wall_seconds=8.0, memory_bytes=1 << 28)
IMPATIENT = Limits(cpu_seconds=1, wall_seconds=0.8, memory_bytes=1 << 28)
SECRET = "ONPATH_TEST_SECRET"

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="programs are confined on Linux alone"
)


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, object]]:
    """A place that everybody may write to, a listener, a secret in the environment."""
    monkeypatch.setenv(SECRET, "hunter2")
    with (
        tempfile.TemporaryDirectory() as name,  # pytest's own are for one user alone
        socket.create_server(("127.0.0.1", 0)) as listener,
    ):
        place, kept = Path(name), Path(name) / "kept"
        kept.write_text("kept")
        place.chmod(0o777)
        kept.chmod(0o666)
        listener.setblocking(False)
        yield {"trace": place, "parent": os.getpid(), "port": listener.getsockname()[1]}
        with pytest.raises(BlockingIOError):
            listener.accept()
        assert [p.name for p in place.iterdir()] == ["kept"]
        assert kept.read_text() == "kept"


def filled(program: str, scene: Mapping[str, object]) -> str:
    for name, value in scene.items():
        program = program.replace(f"{{{name}}}", str(value))
    return program


def attack(scene: Mapping[str, object], names: Iterable[str]) -> dict[str, Outcome]:
    """What becomes of these programs, of scripts, and of honest ones."""

    def judged(name: str) -> tuple[str, Outcome]:
        limits = IMPATIENT if name in SLOW else SHORT
        return name, run_tests(filled(FUNCTIONS[name], scene), ASKED, limits, confined=True)

    with ThreadPoolExecutor(4) as pool:
        outcomes = dict(pool.map(judged, names))
    for name, program in SCRIPTS.items():
        outcome, printed = run_script(program, "1\n", SHORT, confined=True)
        outcomes[f"script: {name}"] = Outcome(
            passed=outcome.passed and printed.rstrip() == "2", reason=outcome.reason
        )
    for name, program in HONEST.items():
        outcomes[f"honest: {name}"] = run_tests(program, ASKED, SHORT, confined=True)
    probe = f"import os\ndef f(x):\n    return os.environ.get('{SECRET}') or sorted(os.environ)"
    tests = {"tests": "assert f(1) == []"}
    outcomes["honest: an empty environment"] = run_tests(probe, tests, SHORT, confined=True)
    return outcomes


def check(outcomes: Mapping[str, Outcome]) -> None:
    passed = {name for name, outcome in outcomes.items() if outcome.passed}
    assert passed == {f"honest: {name}" for name in (*HONEST, "an empty environment")}, {
        name: outcome.reason for name, outcome in outcomes.items() if name.startswith("honest")
    }
    assert not any(outcome.fault for outcome in outcomes.values())
    refused = ("PermissionError", "Operation not permitted", "AssertionError", "ended", "ValueError")
    for name in ("a file", "the network", "fork bomb", "signalling its parent", "a daemon"):
        assert any(word in outcomes[name].reason for word in refused), (name, outcomes[name])


def test_nothing_that_attacks_passes_or_leaves_a_trace(scene: Mapping[str, object]) -> None:
    before = processes()
    check(attack(scene, FUNCTIONS))
    deadline = time.monotonic() + 5
    while processes() - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not processes() - before


def processes() -> set[int]:
    """Workers on this machine."""
    found = set()
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and b"code_worker" in (entry / "cmdline").read_bytes():
                found.add(int(entry.name))
        except OSError:
            continue
    return found


def interpreter_for_all() -> str | None:
    """A Python that an ordinary user may run: ours may lie in root's home."""
    for python in (sys.executable, which("python3.11", path="/usr/bin:/usr/local/bin")):
        if python and all(d.stat().st_mode & 0o001 for d in Path(os.path.realpath(python)).parents):
            return python
    return None


@pytest.mark.skipif(os.geteuid() != 0, reason="the other tests run as an ordinary user already")
def test_the_same_as_an_ordinary_user(scene: Mapping[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    python = interpreter_for_all()
    if python is None or not all(p.stat().st_mode & 0o001 for p in Path(sandbox.__file__).parents):
        pytest.skip("an ordinary user may not read where Python or this clone lies")
    monkeypatch.setattr(sandbox, "PYTHON", python)
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12 warns of threads; none of them is used
        child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setresgid(12345, 12345, 12345)
            os.setresuid(12345, 12345, 12345)
            sandbox.confinement.cache_clear()
            assert sandbox.is_confined()
            # Forgeries do not ask who runs them, nor does what only a limit of time ends.
            outcomes = attack({**scene, "parent": os.getpid()}, [n for n in HARM if n not in SLOW])
            said = json.dumps({name: [o.passed, o.reason, o.fault] for name, o in outcomes.items()})
        except BaseException as error:
            said = json.dumps({"failed": [True, repr(error), True]})
        with os.fdopen(writing, "w") as file:
            file.write(said)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        said = file.read()
    assert os.waitpid(child, 0)[1] == 0
    check({n: Outcome(passed=p, reason=r, fault=f) for n, (p, r, f) in json.loads(said).items()})


TASKS = """
import ctypes, mmap, os
libc = ctypes.CDLL(None)
libc.clone.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]
stacks = mmap.mmap(-1, 8000 * 4096)
base, there = ctypes.addressof(ctypes.c_char.from_buffer(stacks)), 0
wait = ctypes.cast(libc.pause, ctypes.c_void_p)
while there < 8000 and libc.clone(wait, base + (there + 1) * 4096, 0x50F00, None) > 0:
    there += 1
print(there, flush=True)
os._exit(0)
"""
"""Threads that the kernel starts without Python, each with a page of memory."""


def test_a_program_may_have_some_threads_and_not_all_that_there_are() -> None:
    before = int(Path("/proc/loadavg").read_text().split()[3].partition("/")[2])
    outcome, printed = run_script(TASKS, "", Limits(), confined=True)
    assert outcome.passed
    assert 32 < int(printed) < min(before + 5000, 8000)


def test_where_programs_cannot_be_confined_they_run_only_if_somebody_says_so(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sandbox, "confinement", lambda: "the kernel refuses seccomp")
    with pytest.raises(UserError, match=r"cannot confine programs.*the kernel refuses seccomp.*--allow-code"):
        sandbox.is_confined()
    with code.allowed():
        assert not sandbox.is_confined()
    assert "programs of the model run unconfined" in capfd.readouterr().err
    assert run_tests(HONEST["plain"], ASKED, SHORT, confined=False).passed
    assert not run_tests(FUNCTIONS["_exit when called"], ASKED, SHORT, confined=False).passed


def test_a_machine_without_seccomp_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The worker's own word reaches the parent: a filter that is refused is not taken for one that holds."""
    worker = Path(sandbox.code_worker.__file__)
    for name in (worker.name, "code_source.py"):
        (tmp_path / name).write_text(worker.with_name(name).read_text())
    told = worker.with_name("seccomp.py").read_text().replace('"x86_64": (0', '"pdp11": (0')
    (tmp_path / "seccomp.py").write_text(told.replace('"aarch64": (1', '"vax": (1'))
    monkeypatch.setattr(sandbox.code_worker, "__file__", str(tmp_path / worker.name))
    sandbox.confinement.cache_clear()
    try:
        assert sandbox.confinement().startswith("there is no seccomp filter for linux on ")
    finally:
        sandbox.confinement.cache_clear()
