"""One published method, one small file, one signature: rollouts in, trajectories out."""

from onpath.config.methods.base import LossOptions
from onpath.config.methods.opd import OPDOptions
from onpath.config.methods.opsd import OPSDOptions
from onpath.config.methods.topd import TOPDOptions
from onpath.config.methods.trd import TRDOptions
from onpath.methods.base import Method, Prepared, Tools
from onpath.methods.opd import OPD
from onpath.methods.opsd import OPSD
from onpath.methods.topd.method import TOPD
from onpath.methods.trd.method import TRD

__all__ = ["Method", "Prepared", "Tools", "make_method"]


def make_method(options: LossOptions, tools: Tools) -> Method:
    """The method that the options belong to."""
    match options:
        case OPDOptions():
            return OPD(options, tools)
        case OPSDOptions():
            return OPSD(options, tools)
        case TRDOptions():
            return TRD(options, tools)
        case TOPDOptions():
            return TOPD(options, tools)
        case _:
            raise NotImplementedError(type(options).__name__)
