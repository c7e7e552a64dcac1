"""Stages 1, 3, 5 and the gather of stage 4: everything that goes row by row."""

from __future__ import annotations

import triton
import triton.language as tl

from .. import arithmetic as ar
from .numerics import (
    BLOCK,
    INFINITY_WORD,
    RADIX,
    exp2,
    fixed_point_exponent,
    magnitude_word,
    padded,
    power_of_two,
    rint_int,
    store_digits,
    sum_of_squares,
    to_double,
)
from .products import parts_of

EXP2_FLOOR = tl.constexpr(-float(ar.EXP2_FLOOR))
SQUARE_SCALE = tl.constexpr(2.0**-ar.SQUARE_SHIFT)
ENTROPY_SCALE = tl.constexpr(2.0**ar.ENTROPY_SHIFT)
LOG2E = tl.constexpr(ar.LOG2E)
HALF_LOG2E = tl.constexpr(0.5 * ar.LOG2E)
NEGATIVE = tl.constexpr(-1.0)  # Triton's minus subtracts from zero, which loses the sign of zero
LOST_SCALE = tl.constexpr(2.0**ar.LOST_SHIFT)


@triton.jit
def quantize(p_x, p_q, p_step, d, L: tl.constexpr, BD: tl.constexpr):
    """Stage 1.

    Input     x float32 or float64 [B, d]
    Output    q int8 [B, L, d padded to 128], zero in the padding; step float64 [B]
    Math      q = rint(x / step), step = 2^e the smallest with max_j |x_j| <= step lim(L)
    Presumes  nothing: a row that is not finite has q = 0 and step = NaN
    Tiles     one row, BD values at a time, twice
    """
    i_row = tl.program_id(0).to(tl.int64)
    width = padded(d)
    largest = tl.zeros((BD,), tl.int64)
    for j in range(0, d, BD):
        o_j = j + tl.arange(0, BD)
        x = tl.load(p_x + i_row * d + o_j, mask=o_j < d, other=0.0)
        largest = tl.maximum(largest, magnitude_word(x))
    word = tl.max(largest, 0)
    finite = word < INFINITY_WORD
    exponent = fixed_point_exponent(tl.where(finite, word, 0), L)
    seen = tl.where(finite, d, 0)
    for j in range(0, width, BD):
        o_j = j + tl.arange(0, BD)
        x = tl.load(p_x + i_row * d + o_j, mask=o_j < seen, other=0.0)
        q = rint_int(to_double(x) * power_of_two(-exponent)).to(tl.int32)
        store_digits(p_q + i_row * L * width + o_j, width, q, o_j < width, L)
    tl.store(p_step + i_row, tl.where(finite, power_of_two(exponent), float("nan")))


@triton.jit(do_not_specialize=["B"])
def coefficients(
    p_sigma,
    p_alpha,
    p_D,
    p_first,
    p_second,
    p_affine,
    p_q,
    p_step,
    p_numbers,
    B,
    d,
    KIND: tl.constexpr,
    DISTANCES: tl.constexpr,
    L: tl.constexpr,
    BD: tl.constexpr,
):
    """What the rows are multiplied by in stages 2 and 5.

    Input     sigma, alpha float64 [B]; D of Student-t noise or None; first, second: the parameters
              of the target's KIND or None; affine float64 [2]: a, b; q and step as `quantize`
              leaves them
    Output    numbers float64 [4, 5 or 7, B]: A step, C, c_D, c_x; with DISTANCES S; with D G and K
    Math      the formulas of MATH.md, sections 1 and 4, in their order
    Presumes  DISTANCES with D
    Tiles     one row; of its digits BD at a time
    """
    i_row = tl.program_id(0).to(tl.int64)
    sigma = tl.load(p_sigma + i_row)
    alpha = tl.load(p_alpha + i_row)
    step = tl.load(p_step + i_row)
    variance = sigma * sigma
    if KIND == "score":
        c_D = alpha / variance
        c_x = -1.0 / variance
    elif KIND == "epsilon":
        c_D = alpha * NEGATIVE / sigma
        c_x = 1.0 / sigma
    elif KIND == "v":
        c_D = (alpha * alpha / sigma + sigma) * NEGATIVE
        c_x = alpha / sigma
    elif KIND == "velocity":
        c_x = tl.load(p_second + i_row) / sigma
        c_D = tl.load(p_first + i_row) - c_x * alpha
    elif KIND == "edm":
        data = tl.load(p_first + i_row)
        total = variance + data * data
        c_out = sigma * data / tl.sqrt(total)
        c_D = 1.0 / c_out
        c_x = data * data / total * NEGATIVE / c_out
    else:
        tl.static_assert(KIND == "denoised")
        c_D = tl.full((), 1.0, tl.float64)
        c_x = tl.full((), 0.0, tl.float64)
    p_row = p_numbers + i_row
    stride = tl.cast(B, tl.int64)
    tl.store(p_row + 2 * stride, c_D)
    tl.store(p_row + 3 * stride, c_x)

    variance = tl.where(sigma > 0, variance, float("nan"))
    slope = alpha * tl.load(p_affine)
    if DISTANCES:
        distance = squared_distance(
            p_q + i_row * L * padded(d), step, alpha * tl.load(p_affine + 1), d, L, BD
        )
        tl.store(p_row + 4 * stride, distance)
    if p_D is not None:
        freedom = tl.load(p_D + i_row)
        spread = variance * tl.where(freedom > 0, freedom, float("nan"))
        tl.store(p_row, 2.0 * slope / spread * step)
        tl.store(p_row + stride, slope * slope / spread)
        tl.store(p_row + 5 * stride, distance / spread)
        tl.store(p_row + 6 * stride, 0.5 * (d + freedom))
    else:
        tl.store(p_row, slope * LOG2E / variance * step)
        tl.store(p_row + stride, slope * HALF_LOG2E * slope / variance)


@triton.jit
def squared_distance(p_digits, step, offset, d, L: tl.constexpr, BD: tl.constexpr):
    """sum_j (step q_j - offset)^2 of one row of digits, from sums of 16-bit halves, exact."""
    width = padded(d)
    low_low = tl.zeros((BD,), tl.int64)
    high_low = tl.zeros((BD,), tl.int64)
    high_high = tl.zeros((BD,), tl.int64)
    linear = tl.zeros((BD,), tl.int64)
    for j in range(0, width, BD):
        o_j = j + tl.arange(0, BD)
        q = tl.zeros((BD,), tl.int64)
        for i in tl.static_range(L):
            p_limb = p_digits + (L - 1 - i) * width + o_j
            q = q * RADIX + tl.load(p_limb, mask=o_j < width, other=0)
        low = ((q + 32768) & 65535) - 32768
        high = (q - low) >> 16
        low_low += low * low
        high_low += high * low
        high_high += high * high
        linear += q
    square = sum_of_squares(low_low, high_low, high_high)
    mean = offset / step
    rest = d * (mean * mean)
    return step * step * (square - 2.0 * mean * tl.sum(linear, 0).to(tl.float64) + rest)


@triton.jit(do_not_specialize=["B"])
def clear(p_count, p_dense, p_sums, B, S: tl.constexpr, BB: tl.constexpr):
    """A clean slate for stage 3.

    Input     nothing
    Output    zeros in count int32 [B], dense int32 [1] and sums int64 [S, B]
    Math      none
    Presumes  nothing
    Tiles     BB rows
    """
    o_row = tl.program_id(0) * BB + tl.arange(0, BB)
    m_row = o_row < B
    tl.store(p_count + o_row, tl.zeros((BB,), tl.int32), mask=m_row)
    for s in tl.static_range(S):
        tl.store(p_sums + s * B + o_row, tl.zeros((BB,), tl.int64), mask=m_row)
    if tl.program_id(0) == 0:
        tl.store(p_dense, 0)


@triton.jit(do_not_specialize=["B", "n"])
def weights(
    p_relative,
    p_anchors,
    p_peak,
    p_count,
    p_index,
    p_weight,
    p_digits,
    p_dense,
    p_dense_rows,
    p_sums,
    B,
    n,
    o_relative,
    L: tl.constexpr,
    CAPACITY: tl.constexpr,
    STATISTICS: tl.constexpr,
    BK: tl.constexpr,
):
    """Stage 3.

    Input     relative float32 [B, n], rows `o_relative` apart; anchors float64 [B, blocks];
              peak float64 [B]
    Output    count int32 [B]: survivors; index, weight int32 [B, CAPACITY]: the first ones to come;
              digits int8 [B, L, n padded to 128], zero in the padding; dense int32 [1] and
              dense_rows int32 [B]: the rows with more than CAPACITY; sums int64 [S, B]: total and,
              with STATISTICS, square, bits, lost and n - argmax, 0 without an e = 0
    Math      e = relative + (anchor - peak), P = rint(2^e lim(L)), zero for e < -63
    Presumes  `clear` has run; a row whose peak is not finite has no weight
    Tiles     one row, BK references; the order of lists and of dense rows is chance, no sum is
    """
    LIMIT: tl.constexpr = 127 * ((RADIX**L - 1) // (RADIX - 1))
    chunks = tl.cdiv(n, BK)
    i_row = (tl.program_id(0) // chunks).to(tl.int64)
    o_k = tl.program_id(0) % chunks * BK + tl.arange(0, BK)
    m_k = o_k < n
    blocks = tl.cdiv(n, BLOCK)
    peak = tl.load(p_peak + i_row)
    relative = tl.load(p_relative + i_row * o_relative + o_k, mask=m_k, other=float("-inf"))
    anchor = tl.load(p_anchors + i_row * blocks + o_k // BLOCK, mask=m_k, other=float("-inf"))
    e = relative.to(tl.float64) + (anchor - peak)
    alive = (e >= EXP2_FLOOR) & (e < float("inf"))  # a peak that is not finite leaves none in e
    e = tl.where(alive, e, 0.0)
    p = tl.where(alive, exp2(e), 0.0)
    weight = rint_int(p * LIMIT)

    width = padded(n)
    p_row_digits = p_digits + i_row * L * width + o_k
    store_digits(p_row_digits, width, weight.to(tl.int32), o_k < width, L)
    tl.atomic_add(p_sums + i_row, tl.sum(weight, 0), sem="relaxed")

    survives = (weight > 0).to(tl.int32)
    found = tl.sum(survives, 0)
    before = tl.atomic_add(p_count + i_row, found, sem="relaxed")
    slot = before + tl.cumsum(survives, 0) - 1
    listed = (weight > 0) & (slot < CAPACITY)
    tl.store(p_index + i_row * CAPACITY + slot, o_k, mask=listed)
    tl.store(p_weight + i_row * CAPACITY + slot, weight.to(tl.int32), mask=listed)
    if (before <= CAPACITY) & (before + found > CAPACITY):
        tl.store(p_dense_rows + tl.atomic_add(p_dense, 1, sem="relaxed"), i_row.to(tl.int32))

    if STATISTICS:
        w = weight.to(tl.float64)
        square = tl.sum(rint_int(w * w * SQUARE_SCALE), 0)
        bits = tl.sum(rint_int(w * -e * ENTROPY_SCALE), 0)
        lost = tl.sum(tl.where(weight == 0, rint_int(p * LOST_SCALE), 0), 0)
        first = tl.max(tl.where(alive & (e == 0), n - o_k, 0), 0).to(tl.int64)
        tl.atomic_add(p_sums + B + i_row, square, sem="relaxed")
        tl.atomic_add(p_sums + 2 * B + i_row, bits, sem="relaxed")
        tl.atomic_add(p_sums + 3 * B + i_row, lost, sem="relaxed")
        tl.atomic_max(p_sums + 4 * B + i_row, first, sem="relaxed")


@triton.jit(do_not_specialize=["n", "pitch"])
def gather(
    p_count,
    p_index,
    p_weight,
    p_dense,
    p_values,
    p_num,
    n,
    d,
    pitch,
    R: tl.constexpr,
    CAPACITY: tl.constexpr,
    SLOTS: tl.constexpr,
    PART: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
):
    """Stage 4 for the rows with few survivors.

    Input     count int32 [B]; index, weight int32 [B, CAPACITY]; dense int32 [1];
              values int8 [R, n, d], limbs `pitch` references apart
    Output    num int64 [B, R, d]; zeros for a dense row if `multiply_dense` will add to it
    Math      num_ij = sum over the survivors k of P_ik v_kj
    Presumes  SLOTS, PART, BM and BN as for `multiply_dense`, which comes after
    Tiles     BD of the d values of one row and limb, BK survivors at a time
    """
    i_limb = tl.program_id(0) % R
    value_tiles = tl.cdiv(d, BD)
    i_row = (tl.program_id(0) // R // value_tiles).to(tl.int64)
    o_value = tl.program_id(0) // R % value_tiles * BD + tl.arange(0, BD)
    m_value = o_value < d
    p_out = p_num + (i_row * R + i_limb) * d + o_value
    count = tl.load(p_count + i_row)
    if count <= CAPACITY:
        num = tl.zeros((BK, BD), tl.int64)
        for s in range(0, count, BK):
            o_s = s + tl.arange(0, BK)
            k = tl.load(p_index + i_row * CAPACITY + o_s, mask=o_s < count, other=0).to(tl.int64)
            w = tl.load(p_weight + i_row * CAPACITY + o_s, mask=o_s < count, other=0)
            p_v = p_values + (i_limb * tl.cast(pitch, tl.int64) + k)[:, None] * d + o_value[None, :]
            v = tl.load(p_v, mask=m_value[None, :], other=0)
            num += w.to(tl.int64)[:, None] * v
        tl.store(p_out, tl.sum(num, 0), mask=m_value)
    else:
        tiles = tl.cdiv(tl.load(p_dense), BM) * tl.cdiv(d, BN) * R
        if parts_of(tiles, n, SLOTS, PART) > 1:
            tl.store(p_out, tl.zeros((BD,), tl.int64), mask=m_value)


@triton.jit
def finish(
    p_num, p_total, p_affine, p_c_D, p_c_x, p_x, p_out, d, R: tl.constexpr, BD: tl.constexpr
):
    """Stage 5.

    Input     num int64 [B, R, d]; total int64 [B]; affine float64 [2]: a, b; c_D, c_x float64 [B];
              x float32 or float64 [B, d]
    Output    out, like x
    Math      out = c_D (a num / total + b) + c_x x
    Presumes  nothing: total = 0 makes a NaN row
    Tiles     BD of the d values of one row
    """
    value_tiles = tl.cdiv(d, BD)
    i_row = (tl.program_id(0) // value_tiles).to(tl.int64)
    o_value = tl.program_id(0) % value_tiles * BD + tl.arange(0, BD)
    m_value = o_value < d
    num = tl.zeros((BD,), tl.float64)
    for i in tl.static_range(R):
        p_limb = p_num + (i_row * R + R - 1 - i) * d + o_value
        num = num * 256.0 + tl.load(p_limb, mask=m_value, other=0).to(tl.float64)
    total = tl.load(p_total + i_row).to(tl.float64)
    denoised = tl.load(p_affine) * (num / total) + tl.load(p_affine + 1)
    x = tl.load(p_x + i_row * d + o_value, mask=m_value, other=0.0).to(tl.float64)
    target = tl.load(p_c_D + i_row) * denoised + tl.load(p_c_x + i_row) * x
    tl.store(p_out + i_row * d + o_value, target.to(p_out.dtype.element_ty), mask=m_value)
