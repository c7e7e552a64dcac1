# mypy: disable-error-code="assignment,var-annotated"
"""Stages 2 and 4 as products of int8 digits on tensor cores: exact in int32, joined in int64."""

from __future__ import annotations

import triton
import triton.language as tl

from .. import arithmetic as ar
from .numerics import BLOCK, RADIX, log2_1p, padded

# Terms of one int32 sum: the most that are safe, in whole steps of any tile.
SAFE_TERMS = tl.constexpr(ar.MAX_INT32_TERMS // 256 * 256)


@triton.jit
def digit_product(
    p_left,
    o_limb,
    m_left,
    p_right,
    m_right,
    begin,
    end,
    L: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """The main loop of both products.

    Input     p_left [BM, 1]: rows of digits, `o_limb` apart, zero where padded; p_right [BN, 1]
    Output    int64 [BM, BN]
    Math      sum over begin <= k < end of (sum_l 256^l left_mkl) right_nk
    Presumes  end - begin <= SAFE_TERMS; begin a multiple of BK, and end too unless RAGGED
    Tiles     L accumulators [BM, BN] of int32: a tile of `right` serves all digits of `left`
    """
    sums = ()
    for _ in tl.static_range(L):
        sums += (tl.zeros((BM, BN), tl.int32),)
    for k in range(begin, end, BK):
        o_k = k + tl.arange(0, BK)[None, :]
        m_k = m_right & (o_k < end) if RAGGED else m_right
        right = tl.load(p_right + o_k, mask=m_k, other=0).T
        new = ()
        for limb in tl.static_range(L):
            left = tl.load(p_left + limb * o_limb + o_k, mask=m_left, other=0)
            new += (tl.dot(left, right, sums[limb], out_dtype=tl.int32),)
        sums = new
    total = sums[L - 1].to(tl.int64)
    for i in tl.static_range(1, L):
        total = total * RADIX + sums[L - 1 - i]
    return total


@triton.jit(do_not_specialize=["B", "n", "pitch"])
def logits(
    p_q,
    p_values,
    p_norms,
    p_slope,
    p_curvature,
    p_offset,
    p_exponent,
    p_bias,
    p_labels,
    p_ref_labels,
    p_relative,
    p_anchors,
    B,
    n,
    d,
    pitch,
    L: tl.constexpr,
    R: tl.constexpr,
    SPANS: tl.constexpr,
    RAGGED: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """Stage 2.

    Input     q int8 [B, L, d padded to 128]; values int8 [R, n, d], limbs `pitch` references
              apart; norms, bias float64 [n]; slope, curvature, offset, exponent float64 [B];
              labels int64 [B], ref_labels int64 [n]
    Output    relative float32 [B, n padded to 128], only columns below n; anchors float64
              [B, blocks]
    Math      g = slope dot - curvature norm; logit = g + bias, for Student-t noise
              logit = -exponent log2(1 + max(offset - g, 0)) + bias; anchor = max over the block,
              relative = float32(logit - anchor)
    Presumes  SPANS = ceil(d / SAFE_TERMS); RAGGED unless BK divides d; bias, labels, and offset
              with exponent may be None
    Tiles     BM samples by one block of 128 references; samples fastest, to share the block in L2
    """
    row_tiles = tl.cdiv(B, BM)
    i_block = tl.program_id(0) // row_tiles
    o_row = tl.program_id(0) % row_tiles * BM + tl.arange(0, BM)
    o_ref = i_block * BLOCK + tl.arange(0, BLOCK)
    m_row = o_row < B
    m_ref = o_ref < n
    o_limb = padded(d)
    p_left = p_q + o_row.to(tl.int64)[:, None] * (L * o_limb)
    dot = tl.zeros((BM, BLOCK), tl.float64)
    for i in range(R):
        limb = R - 1 - i
        o_value = (limb * tl.cast(pitch, tl.int64) + o_ref) * d
        total = tl.zeros((BM, BLOCK), tl.int64)
        for span in range(SPANS):
            total += digit_product(
                p_left,
                o_limb,
                m_row[:, None],
                p_values + o_value[:, None],
                m_ref[:, None],
                span * SAFE_TERMS,
                tl.minimum(d, (span + 1) * SAFE_TERMS),
                L,
                BM,
                BLOCK,
                BK,
                RAGGED,
            )
        dot = dot * 256.0 + total.to(tl.float64)

    b_slope = tl.load(p_slope + o_row, mask=m_row, other=0.0)
    b_curvature = tl.load(p_curvature + o_row, mask=m_row, other=0.0)
    b_norm = tl.load(p_norms + o_ref, mask=m_ref, other=0.0)
    logit = b_slope[:, None] * dot - b_curvature[:, None] * b_norm[None, :]
    if p_offset is not None:
        b_offset = tl.load(p_offset + o_row, mask=m_row, other=0.0)
        b_exponent = tl.load(p_exponent + o_row, mask=m_row, other=0.0)
        u = b_offset[:, None] - logit
        logit = -b_exponent[:, None] * log2_1p(tl.where(u < 0, 0.0, u))
    if p_bias is not None:
        logit = logit + tl.load(p_bias + o_ref, mask=m_ref, other=0.0)[None, :]
    m_seen = m_ref[None, :]
    if p_labels is not None:
        b_label = tl.load(p_labels + o_row, mask=m_row, other=-1)[:, None]
        b_ref_label = tl.load(p_ref_labels + o_ref, mask=m_ref, other=-1)[None, :]
        m_seen = m_seen & ((b_label == b_ref_label) | (b_label == -1))
    logit = tl.where(m_seen, logit, float("-inf"))

    unknown = tl.max((logit != logit).to(tl.int32), 1) > 0
    anchor = tl.max(tl.where(logit != logit, float("-inf"), logit), 1)
    anchor = tl.where(unknown, float("nan"), anchor)
    anchored = tl.where(anchor == float("-inf"), 0.0, anchor)  # -inf - 0, not -inf - -inf
    relative = (logit - anchored[:, None]).to(tl.float32)
    o_out = o_row.to(tl.int64)[:, None] * padded(n) + o_ref[None, :]
    tl.store(p_relative + o_out, relative, mask=m_row[:, None] & m_ref[None, :])
    tl.store(p_anchors + o_row.to(tl.int64) * tl.cdiv(n, BLOCK) + i_block, anchor, mask=m_row)


@triton.jit
def parts_of(tiles, n, SLOTS: tl.constexpr, PART: tl.constexpr):
    """Into how many parts of n the second product is cut, for `tiles` output tiles.

    As many as int32 sums need; beyond that enough to occupy SLOTS programs, but no part below
    PART terms.
    """
    wanted = tl.minimum(SLOTS // tl.maximum(tiles, 1), n // PART)
    return tl.maximum(wanted, tl.cdiv(n, SAFE_TERMS))


@triton.jit(do_not_specialize=["n"])
def multiply_dense(
    p_digits,
    p_dense,
    p_dense_rows,
    p_columns,
    p_num,
    n,
    d,
    L: tl.constexpr,
    R: tl.constexpr,
    SLOTS: tl.constexpr,
    PART: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Stage 4 for the rows with many survivors.

    Input     digits int8 [B, L, n padded to 128]; columns int8 [R, d, n padded to 128], both zero
              in the padding; dense int32 [1], dense_rows int32 [B], of which the first `dense`
    Output    num int64 [B, R, d]: stored, or added to zeros if n is cut
    Math      num_ij = sum_k P_ik v_kj
    Presumes  BK divides 128; at least max(SLOTS, all tiles times the parts int32 asks for) programs
    Tiles     BM dense rows by BN of the d values of one limb, over one part of n; row tiles
              fastest; programs beyond the dense rows' tiles and parts leave at once
    """
    dense = tl.load(p_dense)
    row_tiles = tl.cdiv(dense, BM)
    value_tiles = tl.cdiv(d, BN)
    tiles = row_tiles * value_tiles * R
    parts = parts_of(tiles, n, SLOTS, PART)
    if tl.program_id(0) < tiles * parts:
        i_part = tl.program_id(0) // tiles
        i_tile = tl.program_id(0) % tiles
        i_limb = i_tile // (row_tiles * value_tiles)
        o_slot = i_tile % row_tiles * BM + tl.arange(0, BM)
        o_value = i_tile // row_tiles % value_tiles * BN + tl.arange(0, BN)
        m_row = o_slot < dense
        m_value = o_value < d
        o_row = tl.load(p_dense_rows + o_slot, mask=m_row, other=0).to(tl.int64)
        width = padded(n)
        terms = padded(tl.cdiv(width, parts))
        total = digit_product(
            p_digits + o_row[:, None] * (L * width),
            width,
            m_row[:, None],
            p_columns + (i_limb * d + o_value.to(tl.int64))[:, None] * width,
            m_value[:, None],
            i_part * terms,
            tl.minimum(width, (i_part + 1) * terms),
            L,
            BM,
            BN,
            BK,
            False,
        )
        p_out = p_num + (o_row[:, None] * R + i_limb) * d + o_value[None, :]
        m_out = m_row[:, None] & m_value[None, :]
        if parts == 1:
            tl.store(p_out, total, mask=m_out)
        else:
            tl.atomic_add(p_out, total, mask=m_out, sem="relaxed")
