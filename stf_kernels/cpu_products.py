"""Exact products of int8 digits on the CPU.

Where the processor has VNNI or AMX instructions `torch._int_mm` multiplies int8 digits exactly.
Elsewhere oneDNN may saturate in int16 or has no kernel at all, and pairs of digits are multiplied
in float64 instead, which is exact too: 2^15 * 2^7 a term, and sums stay below 2^53.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from . import arithmetic as ar

PRODUCT_BYTES = 8 << 20  # of the products held at a time, and of a float64 copy of one side


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
    """The left side of products: digits [m, L, k] as [m L, k], or pairs of them in float64."""
    rows, limbs, terms = digits.shape
    if in_int8(terms):
        return digits.reshape(rows * limbs, terms)
    pairs = digits[:, ::2].double()
    pairs[:, : limbs // 2] += digits[:, 1::2].double() * ar.LIMB_RADIX
    return pairs.view(-1, terms)


def multiply(left: Tensor, right: Tensor, out: Tensor) -> None:
    """out[m, c] = left [m, k] @ right [k, c], exact; right is int8."""
    if left.dtype == torch.int8:
        torch._int_mm(left, right, out=out)
    else:
        torch.matmul(left, right.double(), out=out)


def sums_dtype(left: Tensor) -> torch.dtype:
    return torch.int32 if left.dtype == torch.int8 else torch.float64


def at_a_time(column_bytes: int, terms: int, dtype: torch.dtype) -> int:
    """How many columns of products fit PRODUCT_BYTES.

    Args:
        column_bytes: of the products of one column
        terms: of each sum, of which a float64 product copies one side
        dtype: of the sums
    """
    copied = 8 * terms if dtype == torch.float64 else 0
    return PRODUCT_BYTES // max(column_bytes, copied)
