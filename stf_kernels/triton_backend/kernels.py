"""All kernels, and what they were compiled or interpreted by."""

from __future__ import annotations

import triton
from triton.runtime.jit import JITFunction

from . import products
from .preparation import fix, magnitude, norms, transpose
from .products import logits, multiply_dense
from .rows import clear, coefficients, finish, gather, quantize, weights

__all__ = [
    "INTERPRETED",
    "SAFE_TERMS",
    "VERSION",
    "clear",
    "coefficients",
    "finish",
    "fix",
    "gather",
    "logits",
    "magnitude",
    "multiply_dense",
    "norms",
    "quantize",
    "transpose",
    "weights",
]

SAFE_TERMS = products.SAFE_TERMS.value
VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
INTERPRETED = not isinstance(logits, JITFunction)
