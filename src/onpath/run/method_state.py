"""What a method keeps from step to step (`Method.state`): the same tensors all along, in all processes."""

import hashlib
from typing import Any

from torch import Tensor

from onpath.engines.sharding import digest_weights
from onpath.methods.base import Method
from onpath.system import distributed
from onpath.system.errors import UserError

_REMEDY = "make each tensor once, in __init__, and change it in place (self.seen += 1)"


class MethodState:
    """Looks at a method's state as a checkpoint and a resumed run will use it: what was there at the start is
    filled in place, so that whatever came later, or is another tensor each time, would be lost.

    Raises:
        UserError: it could not be restored.
    """

    def __init__(self, method: Method, *, of: str) -> None:
        self.method, self.of = method, of
        self.begun = self._seen()
        self.check()

    def check(self) -> None:
        """Raises UserError if names, shapes, types or the tensors themselves are not those of the start."""
        now = self._seen()
        if changed := next((k for k in {**self.begun, **now} if (k in self.begun) is not (k in now)), None):
            had, has = (", ".join(sorted(names)) or "nothing" for names in (self.begun, now))
            raise self._wrong(f"state() had {had} at the start, and {has} later: {changed} would be lost")
        for name, (*kind, place) in now.items():
            *before, first = self.begun[name]
            if kind != before:
                told = " and then ".join(f"{tuple(shape)} of {dtype}" for shape, dtype in (before, kind))
                raise self._wrong(f"state()[{name!r}] was {told}: a resumed run could not fill it")
            if place != first:
                raise self._wrong(
                    f"state()[{name!r}] is another tensor each time: a resumed run would lose it"
                )

    def check_alike(self) -> None:
        """Raises UserError if it is not the same in all processes: a checkpoint holds one. Each must call."""
        self.check()
        if distributed.world() == 1:
            return
        digest = hashlib.blake2b()
        digest_weights(digest, self.method.state())
        if len({*distributed.gather([digest.hexdigest()])}) > 1:
            raise UserError(
                f"method.name {self.of}: its state() differs from process to process, and a checkpoint holds "
                "one for all; let each keep the same, of everybody's rollouts (self.tools.gather)"
            )

    def _seen(self) -> dict[str, tuple[Any, ...]]:
        state = dict(self.method.state())
        for name, value in state.items():
            if not isinstance(value, Tensor):
                raise self._wrong(f"state()[{name!r}] is {type(value).__name__} and no tensor")
        return {k: (v.shape, v.dtype, v.untyped_storage().data_ptr()) for k, v in state.items()}

    def _wrong(self, what: str) -> UserError:
        return UserError(f"method.name {self.of}: {what}; {_REMEDY}")
