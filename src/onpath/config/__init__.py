"""The configuration: one YAML section per stage, checked before anything is loaded. No torch."""

from onpath.config.build import Config, all_keys, build, load, nearest, resolved, with_own
from onpath.config.describe import describe, json_schema
from onpath.config.methods import METHODS
from onpath.config.sections import Data, Eval, Optim, RolloutSection, Run, Student, Teacher
from onpath.system.reading import read_yaml

__all__ = [
    "METHODS", "Config", "Data", "Eval", "Optim", "RolloutSection", "Run", "Student", "Teacher",
    "all_keys", "build", "describe", "json_schema", "load", "nearest", "read_yaml", "resolved", "with_own",
]  # fmt: skip
