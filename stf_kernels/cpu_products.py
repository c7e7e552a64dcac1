"""Exact products of int8 digits on the CPU.

Where the processor has VNNI or AMX instructions `torch._int_mm` multiplies int8 digits exactly.
Elsewhere oneDNN may saturate in int16 or has no kernel at all, and halves, two digits joined, are
multiplied in int16 by the extension (csrc/cpu_products.cpp).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from . import arithmetic as ar
from .extension import address, extension

PRODUCT_BYTES = 8 << 20  # of the products held at a time


@cache
def has_int8_products() -> bool:
    """Whether `torch._int_mm` is fast and exact here: it is asked for the largest sums once."""
    if not (torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported()):
        return False
    a = torch.full((64, 256), -128, dtype=torch.int8, device="cpu")
    try:
        return bool((torch._int_mm(a, a.t()) == 256 * 2**14).all())
    except RuntimeError:
        return False


def in_int8(terms: int) -> bool:
    """Whether sums of so many products are made in int8.

    `torch._int_mm` is wrong for a single term (it misreads the strides: torch 2.13), and int32
    sums have a largest number of terms.
    """
    return has_int8_products() and 1 < terms <= ar.MAX_INT32_TERMS


def factor(digits: Tensor) -> Tensor:
    """The left side of products: digits [m, L, k] as [m L, k], or as halves [m 2, k] in int16."""
    rows, limbs, terms = digits.shape
    if in_int8(terms):
        return digits.reshape(rows * limbs, terms)
    return halves(digits).view(2 * rows, terms)


def tops(digits: Tensor) -> Tensor:
    """The most significant part of a left side, [m, k]: a digit, or a half."""
    return digits[:, -1] if in_int8(digits.shape[2]) else halves(digits)[:, 1]


def halves(digits: Tensor) -> Tensor:
    """Numbers of digits [m, L, k] as 2^16 high + low, int16 [m, 2, k], low first."""
    rows, limbs, terms = digits.shape
    digits = digits.contiguous()
    out = torch.empty((rows, 2, terms), dtype=torch.int16, device="cpu")
    extension().halve((address(digits), terms, limbs), rows, address(out), torch.get_num_threads())
    return out


def multiply(left: Tensor, right: Tensor, out: Tensor) -> None:
    """out[m, c] = left [m, k] @ right [k, c], exact; right is int8, left and out contiguous."""
    if left.dtype == torch.int8:
        torch._int_mm(left, right, out=out)
        return
    matrix = (address(right), right.shape[1], *right.stride())
    extension().multiply(address(left), *left.shape, matrix, address(out), torch.get_num_threads())


def sums_dtype(left: Tensor) -> torch.dtype:
    return torch.int32 if left.dtype == torch.int8 else torch.int64
