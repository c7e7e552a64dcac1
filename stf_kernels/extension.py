"""The compiled module _C (csrc/), or why there is none."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor

_C: Any
absence: str | None = None
try:
    _C = importlib.import_module("stf_kernels._C")
except ImportError as error:
    _C, absence = None, str(error)


def extension() -> Any:
    """The compiled module, or None."""
    return _C


def address(tensor: Tensor | None) -> int:
    """Where a tensor begins, 0 for none: how _C takes it."""
    return 0 if tensor is None else tensor.data_ptr()
