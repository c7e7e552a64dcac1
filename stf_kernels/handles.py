"""Objects named by a number, because an operator of PyTorch takes tensors and numbers only."""

from __future__ import annotations

import itertools
import secrets
from typing import TYPE_CHECKING, Generic, TypeVar
from weakref import WeakValueDictionary

from .storage import Values

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")


class Handles(Generic[T]):
    """Numbers > 0 for objects, as long as these live."""

    def __init__(self) -> None:
        self._objects: WeakValueDictionary[int, T] = WeakValueDictionary()
        # Another process that loads a compiled call finds nothing under its numbers.
        self._numbers = itertools.count(secrets.randbits(61) + 1)

    def name(self, thing: T) -> int:
        """A new number for `thing`."""
        number = next(self._numbers)
        self._objects[number] = thing
        return number

    def __getitem__(self, number: int) -> T:
        try:
            return self._objects[number]
        except KeyError:
            raise RuntimeError(
                "what this compiled call used is gone, or in another process: references that are "
                "not on the device, and groups, have to outlive it"
            ) from None


STORED: Handles[Values] = Handles()
GROUPS: Handles[ProcessGroup] = Handles()
