"""The compiled module _C (csrc/), or why there is none."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor

from . import parameterization
from .stages import Queries

KINDS = list(parameterization.KINDS)  # by their numbers in csrc/coefficients.h

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


def levels(queries: Queries, step: Tensor, affine: Tensor, numbers: Tensor) -> tuple[int, ...]:
    """csrc/coefficients.h: Levels."""
    first, second = queries.pair
    return (
        address(queries.sigma),
        address(queries.alpha),
        address(queries.D),
        KINDS.index(queries.kind),
        address(first),
        address(second),
        address(affine),
        address(step),
        address(numbers),
        len(numbers),
    )
