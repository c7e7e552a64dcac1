"""The arithmetic of MATH.md that is not a matrix product, in kernels; csrc/arithmetic.h's twin.

Every product and sum rounds on its own: launch with enable_fp_fusion=False.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import arithmetic as ar

BLOCK = tl.constexpr(ar.BLOCK)
RADIX = tl.constexpr(ar.LIMB_RADIX)
EXP2 = tl.constexpr(ar.EXP2_COEFFICIENTS)
EXP2_DEGREE = tl.constexpr(len(ar.EXP2_COEFFICIENTS) - 1)
LOG2 = tl.constexpr(ar.LOG2_COEFFICIENTS)
LOG2_DEGREE = tl.constexpr(len(ar.LOG2_COEFFICIENTS) - 1)
ABOVE_SQRT_HALF = tl.constexpr(ar.ONE_WORD - ar.SQRT_HALF_WORD)

# 1.5 2^52 + x has x's nearest integer in its low bits, for |x| < 2^51.
MAGIC = tl.constexpr(1.5 * 2.0**52)
MAGIC_WORD = tl.constexpr(0x4338000000000000)
INFINITY_WORD = tl.constexpr(0x7FF0000000000000)
SIGN_MASK = tl.constexpr(0x7FFFFFFFFFFFFFFF)
MANTISSA_MASK = tl.constexpr(0x000FFFFFFFFFFFFF)
HALF_WORD = tl.constexpr(1022 << 52)


@triton.jit
def padded(size):
    """The smallest multiple of 128 that is not below `size`."""
    return tl.cdiv(size, BLOCK) * BLOCK


@triton.jit
def to_double(x):
    """x in float64; two-byte types go by float32, which holds them."""
    if x.dtype.primitive_bitwidth == 16:
        x = x.to(tl.float32)
    return x.to(tl.float64)


@triton.jit
def rint(x):
    """x to the nearest integer, ties to even, as float64, for |x| < 2^51."""
    return (x + MAGIC) - MAGIC


@triton.jit
def rint_int(x):
    """x to the nearest integer, ties to even, as int64, for |x| < 2^51."""
    return (x + MAGIC).to(tl.int64, bitcast=True) - MAGIC_WORD


@triton.jit
def power_of_two(exponent):
    """2^exponent in float64 for an int64 exponent in [-1022, 1023]."""
    return ((exponent + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def exp2(e):
    """2^e for -63 <= e <= 0: a degree-8 polynomial in e - rint(e)."""
    f = e - rint(e)
    p = tl.full(e.shape, EXP2[EXP2_DEGREE], tl.float64)
    for i in tl.static_range(1, EXP2_DEGREE + 1):
        p = p * f
        p = p + EXP2[EXP2_DEGREE - i]
    return p * power_of_two(rint_int(e))


@triton.jit
def log2_1p(u):
    """log2(1 + u) for u >= 0: k + t P(t^2), 1 + u = 2^k (1 + f), t = f / (2 + f).

    NaN for NaN and for infinity.
    """
    word = (1.0 + u).to(tl.int64, bitcast=True)
    k = ((word + ABOVE_SQRT_HALF) >> 52) - 1023
    f = (u - (power_of_two(k) - 1.0)) * power_of_two(-k)
    t = f / (2.0 + f)
    z = t * t
    p = tl.full(u.shape, LOG2[LOG2_DEGREE], tl.float64)
    for i in tl.static_range(1, LOG2_DEGREE + 1):
        p = p * z
        p = p + LOG2[LOG2_DEGREE - i]
    return k.to(tl.float64) + t * p


@triton.jit
def magnitude_word(x):
    """|x| in float64 as int64: ordered like the magnitudes, infinity above them, NaN on top."""
    return to_double(x).to(tl.int64, bitcast=True) & SIGN_MASK


@triton.jit
def fixed_point_exponent(word, L: tl.constexpr):
    """The smallest e >= -1022 with largest <= 2^e lim(L), int64; 0 for 0.

    `word` is the magnitude word of `largest`, which is finite.
    """
    largest = word.to(tl.float64, bitcast=True)
    tiny = largest < 2.0**-1000
    normal = tl.where(tiny, largest * 2.0**64, largest).to(tl.int64, bitcast=True)
    exponent = (normal >> 52) - 1022 - tl.where(tiny, 64, 0)
    mantissa = ((normal & MANTISSA_MASK) | HALF_WORD).to(tl.float64, bitcast=True)
    above = mantissa * 2.0 ** (8 * L - 1) > 127 * ((RADIX**L - 1) // (RADIX - 1))
    exponent = exponent - (8 * L - 1) + above.to(tl.int64)
    return tl.where(word > 0, tl.maximum(exponent, -1022), 0)


@triton.jit
def lowest_digit(q):
    """The balanced base-256 digit of q that is left when all above it is taken away."""
    return ((q + 128) & 255) - 128


@triton.jit
def store_digits(p_digits, o_limb, q, mask, L: tl.constexpr):
    """The L balanced base-256 digits of q (int32), least significant first, `o_limb` apart."""
    for limb in tl.static_range(L):
        digit = lowest_digit(q)
        tl.store(p_digits + limb * o_limb, digit.to(tl.int8), mask=mask)
        q = (q - digit) >> 8


@triton.jit
def sum_of_squares(low_low, high_low, high_high):
    """sum (2^16 high + low)^2 in float64, from int64 vectors of sums of the halves' products."""
    upper = tl.sum(high_high, 0).to(tl.float64) * 2.0**32
    middle = tl.sum(high_low, 0).to(tl.float64) * 2.0**17
    return (upper + middle) + tl.sum(low_low, 0).to(tl.float64)
