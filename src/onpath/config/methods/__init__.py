"""Options of each method: `method.name` chooses one of these. Data only, no torch.

What a method does is in `onpath.methods`.
"""

from onpath.config.methods.base import LossOptions
from onpath.config.methods.opd import OPDOptions
from onpath.config.methods.opsd import OPSDOptions
from onpath.config.methods.topd import TOPDOptions
from onpath.config.methods.trd import TRDOptions

Method = OPDOptions | OPSDOptions | TRDOptions | TOPDOptions


METHOD_OPTIONS: dict[str, type[LossOptions]] = {
    "opd": OPDOptions,
    "opsd": OPSDOptions,
    "trd": TRDOptions,
    "topd": TOPDOptions,
}
