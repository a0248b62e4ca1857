"""The configuration: one YAML section per stage, checked before anything is loaded. No torch."""

from onpath.config.build import build, load, resolved, with_own
from onpath.config.describe import describe, json_schema
from onpath.config.methods import METHODS
from onpath.config.sections import Data, Eval, Optim, RolloutSection, Run, Student, Teacher
from onpath.config.sentences import nearest, options_called
from onpath.config.whole import Config
from onpath.system.reading import read_yaml

__all__ = [
    "METHODS", "Config", "Data", "Eval", "Optim", "RolloutSection", "Run", "Student", "Teacher",
    "build", "describe", "json_schema", "load", "nearest", "options_called", "read_yaml", "resolved",
    "with_own",
]  # fmt: skip
