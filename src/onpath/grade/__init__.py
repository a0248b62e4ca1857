"""Is an answer right? One checker for training filters and for evaluation."""

from onpath.grade.base import Grader, Verdict
from onpath.grade.graders import GRADERS, grader_for, make_grader
from onpath.grade.math import grade

__all__ = ["GRADERS", "Grader", "Verdict", "grade", "grader_for", "make_grader"]
