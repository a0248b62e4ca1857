"""The examples in the docstrings of the numeric modules."""

import doctest
import importlib

import pytest

MODULES = [
    "divergence",
    "transport.plans",
    *(f"losses.{n}" for n in ("chunked", "fused", "head", "interface", "objective")),
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    found = doctest.testmod(importlib.import_module(f"onpath.{name}"), optionflags=doctest.ELLIPSIS)
    assert found.attempted > 0
    assert found.failed == 0
