"""References in fixed point, their norms, and the transposed copy that stage 4 reads."""

from __future__ import annotations

import triton
import triton.language as tl

from .numerics import (
    INFINITY_WORD,
    RADIX,
    fixed_point_exponent,
    magnitude_word,
    padded,
    power_of_two,
    rint_int,
    store_digits,
    sum_of_squares,
    to_double,
)


@triton.jit
def magnitude(p_data, p_largest, size, STEPS: tl.constexpr, BD: tl.constexpr):
    """The largest magnitude of a set.

    Input     data, floats [size]
    Output    largest int64 [1], raised to the magnitude word of max |data|
    Math      int64 order is the order of magnitudes, infinity above them, NaN on top
    Presumes  largest starts at 0
    Tiles     STEPS times BD values
    """
    begin = tl.program_id(0).to(tl.int64) * (STEPS * BD)
    largest = tl.zeros((BD,), tl.int64)
    for step in range(STEPS):
        o = begin + step * BD + tl.arange(0, BD)
        largest = tl.maximum(largest, magnitude_word(tl.load(p_data + o, mask=o < size, other=0.0)))
    tl.atomic_max(p_largest, tl.max(largest, 0), sem="relaxed")


@triton.jit
def fix(p_data, p_largest, p_values, p_affine, size, R: tl.constexpr, BD: tl.constexpr):
    """Float references in fixed point.

    Input     data, floats [size]; largest int64 [1], as `magnitude` leaves it
    Output    values int8 [R, size]; scale float64 [1]
    Math      v = rint(y / a), a = 2^e the smallest with max |y| <= a lim(R)
    Presumes  nothing: a set that is not finite has v = 0 and a = NaN
    Tiles     BD values
    """
    word = tl.load(p_largest)
    finite = word < INFINITY_WORD
    exponent = fixed_point_exponent(tl.where(finite, word, 0), R)
    o = tl.program_id(0).to(tl.int64) * BD + tl.arange(0, BD)
    y = tl.load(p_data + o, mask=o < tl.where(finite, size, 0), other=0.0)
    v = rint_int(to_double(y) * power_of_two(-exponent)).to(tl.int32)
    store_digits(p_values + o, tl.cast(size, tl.int64), v, o < size, R)
    if tl.program_id(0) == 0:
        tl.store(p_affine, tl.where(finite, power_of_two(exponent), float("nan")))


@triton.jit(do_not_specialize=["n"])
def norms(p_values, p_ratio, p_norms, n, d, R: tl.constexpr, BD: tl.constexpr):
    """What of ||x - alpha y||^2 belongs to the reference alone.

    Input     values int8 [R, n, d]; ratio float64 [1]: 2 b / a
    Output    norms float64 [n]
    Math      N = sum v^2 + ratio sum v, with v = 2^16 high + low
    Presumes  nothing
    Tiles     one reference, BD values at a time
    """
    i_ref = tl.program_id(0).to(tl.int64)
    low_low = tl.zeros((BD,), tl.int64)
    low_sum = tl.zeros((BD,), tl.int64)
    high_high = tl.zeros((BD,), tl.int64)
    high_low = tl.zeros((BD,), tl.int64)
    high_sum = tl.zeros((BD,), tl.int64)
    for j in range(0, d, BD):
        o_j = j + tl.arange(0, BD)
        low = half(p_values, i_ref, o_j, n, d, 0, R)
        low_low += low * low
        low_sum += low
        if R > 2:
            high = half(p_values, i_ref, o_j, n, d, 2, R)
            high_high += high * high
            high_low += high * low
            high_sum += high
    square = sum_of_squares(low_low, high_low, high_high)
    total = tl.sum(low_sum, 0).to(tl.float64)
    if R > 2:
        total = tl.sum(high_sum, 0).to(tl.float64) * 2.0**16 + total
    tl.store(p_norms + i_ref, square + tl.load(p_ratio) * total)


@triton.jit
def half(p_values, i_ref, o_j, n, d, FIRST: tl.constexpr, R: tl.constexpr):
    """Two limbs of a reference's values from limb FIRST on, int64; one where R ends there."""
    p_limb = p_values + (i_ref + FIRST * n.to(tl.int64)) * d + o_j
    v = tl.load(p_limb, mask=o_j < d, other=0).to(tl.int64)
    if FIRST + 1 < R:
        v += RADIX * tl.load(p_limb + n.to(tl.int64) * d, mask=o_j < d, other=0).to(tl.int64)
    return v


@triton.jit(do_not_specialize=["n", "pitch"])
def transpose(
    p_values, p_columns, n, d, pitch, R: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr
):
    """The copy of the references in which a value's n references lie side by side.

    Input     values int8 [R, n, d], limbs `pitch` references apart
    Output    columns int8 [R, d, n padded to 128], zero in the padding
    Math      columns_rjk = values_rkj
    Presumes  BN divides 128
    Tiles     BN references by BD values of one limb
    """
    width = padded(n)
    value_tiles = tl.cdiv(d, BD)
    i_limb = tl.program_id(0) % R
    o_value = tl.program_id(0) // R % value_tiles * BD + tl.arange(0, BD)
    o_ref = tl.program_id(0) // R // value_tiles * BN + tl.arange(0, BN)
    p_in = p_values + (i_limb * tl.cast(pitch, tl.int64) + o_ref)[:, None] * d + o_value[None, :]
    b_values = tl.load(p_in, mask=(o_ref < n)[:, None] & (o_value < d)[None, :], other=0)
    p_out = p_columns + (i_limb * d + o_value.to(tl.int64))[:, None] * width + o_ref[None, :]
    tl.store(p_out, b_values.T, mask=(o_value < d)[:, None])
