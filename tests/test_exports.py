"""The package's face: what is promised is there, says what it is, and costs nothing until it is used."""

import inspect
import subprocess
import sys
from importlib.metadata import version
from types import ModuleType

import pytest

import onpath

PROMISED = {
    "Config", "RunResult", "UserError", "__version__", "evaluate_model", "export_model", "kept_scores",
    "run_study", "train", "write_report",
}  # fmt: skip
PACKAGES = ("config", "divergence", "evaluate", "grade", "gym", "losses", "records", "transport")


def test_what_is_promised() -> None:
    assert set(onpath.__all__) == PROMISED
    assert onpath.__version__ == version("onpath")


@pytest.mark.parametrize("name", sorted(PROMISED))
def test_a_promised_name_is_there_and_documented(name: str) -> None:
    value = getattr(onpath, name)
    assert name in dir(onpath)
    assert not isinstance(value, ModuleType)
    if name != "__version__":
        assert inspect.getdoc(value)
        assert value.__doc__ != object.__doc__
        assert value is getattr(onpath, name)


@pytest.mark.parametrize("name", PACKAGES)
def test_packages_stay_packages(name: str) -> None:
    """`onpath.evaluate` is where `pass_at_k` is, whatever the commands are called."""
    package = getattr(onpath, name)
    assert isinstance(package, ModuleType)
    assert package.__doc__
    assert name in dir(onpath)
    for inner in getattr(package, "__all__", ()):
        assert getattr(package, inner) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        _ = onpath.trian


def test_importing_loads_nothing_heavy() -> None:
    code = (
        "import sys, onpath; dir(onpath); onpath.UserError, onpath.Config\n"
        "heavy = {'torch', 'transformers', 'datasets', 'peft', 'pyarrow', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
