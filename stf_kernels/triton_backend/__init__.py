"""The Triton backend: int8 products on tensor cores, every stage a kernel, no host in between.

Row lists and counts stay on the device: grids have their largest size, and programs without work
leave at once. So a call can be captured in a CUDA graph; the kernels must have been compiled by a
call before. With TRITON_INTERPRET=1 in the environment before the first use the kernels run in
Triton's interpreter, on tensors of any device: slow, and bit for bit the same.
"""

from __future__ import annotations

import os
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from .. import arithmetic as ar
from .. import gpu_layout
from ..gpu_layout import (
    Survivors,
    before_weights,
    ceil_div,
    current,
    dotted,
    padded,
    pitched,
)
from ..stages import Prepared, Queries, Samples, Weights
from . import tiles

NAME = "triton"
OLDEST_TRITON = (3, 6)
MAX_ROWS, BLOCK_BYTES = gpu_layout.MAX_ROWS, gpu_layout.BLOCK_BYTES
workspace = gpu_layout.workspace

PART_TERMS = 512  # stage 4 cuts n into parts no shorter
EXACT = {"enable_fp_fusion": False}  # every launch: products and sums round apart


@cache
def _kernels() -> ModuleType:
    """The module of kernels; importing it imports Triton."""
    from . import kernels

    return kernels


def unavailable(device: torch.device) -> str | None:
    """Why this backend cannot run on `device`, or None."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type == "cpu" and not interpreted:
        return "it needs an NVIDIA GPU, or TRITON_INTERPRET=1 in the environment to be interpreted"
    if device.type not in ("cpu", "cuda"):
        return "it needs an NVIDIA GPU"
    try:
        kernels = _kernels()
    except ImportError as error:
        return f"triton is not importable ({error})"
    if kernels.VERSION < OLDEST_TRITON:
        return f"it needs triton {dotted(OLDEST_TRITON)} or later, got {dotted(kernels.VERSION)}"
    if interpreted != kernels.INTERPRETED:
        return "TRITON_INTERPRET changed after the kernels were imported"
    if device.type == "cpu" or interpreted:
        return None
    return gpu_layout.unfit(device)


def _width(size: int, most: int) -> int:
    """A power of two for row kernels: `size` in one go, or `most` at a time."""
    return min(most, max(128, 1 << (size - 1).bit_length()))


def prepare(data: Tensor, limbs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Float references [n, d] in fixed point: values int8 [R, n, d], norms [n], scale a []."""
    values = torch.empty((limbs, *data.shape), dtype=torch.int8, device=data.device)
    largest = torch.zeros(1, dtype=torch.int64, device=data.device)
    scale = torch.empty((), dtype=torch.float64, device=data.device)
    size = data.numel()
    with current(data):
        _kernels().magnitude[(ceil_div(size, 16 * 2048),)](
            data, largest, size, STEPS=16, BD=2048, **EXACT
        )
        _kernels().fix[(ceil_div(size, 1024),)](
            data, largest, values, scale, size, R=limbs, BD=1024, **EXACT
        )
    return values, norms(values, 0.0), scale


def norms(values: Tensor, twice_offset: float) -> Tensor:
    """N_k = sum_j v_kj^2 + 2 (b/a) sum_j v_kj in float64 [n]."""
    ref_limbs, n, dim = values.shape
    values = values.contiguous()
    ratio = torch.full((1,), twice_offset, dtype=torch.float64, device=values.device)
    out = torch.empty(n, dtype=torch.float64, device=values.device)
    with current(values):
        _kernels().norms[(n,)](
            values, ratio, out, n, dim, R=ref_limbs, BD=_width(dim, 1024), **EXACT
        )
    return out


def transpose(values: Tensor) -> Tensor:
    """The copy [R, d, n padded to 128] of the references that stage 4 multiplies."""
    ref_limbs, n, dim = values.shape
    values, pitch = pitched(values)
    out = torch.empty((ref_limbs, dim, padded(n)), dtype=torch.int8, device=values.device)
    with current(values):
        grid = (ref_limbs * ceil_div(n, 128) * ceil_div(dim, 64),)
        _kernels().transpose[grid](values, out, n, dim, pitch, R=ref_limbs, BN=128, BD=64, **EXACT)
    return out


def quantize(x: Tensor, limbs: int) -> tuple[Tensor, Tensor]:
    """Stage 1: the digits of rint(x / step), int8 [B, L, d padded to 128], and step [B]."""
    rows, dim = x.shape
    digits = torch.empty((rows, limbs, padded(dim)), dtype=torch.int8, device=x.device)
    step = torch.empty(rows, dtype=torch.float64, device=x.device)
    with current(x):
        _kernels().quantize[(rows,)](x, digits, step, dim, L=limbs, BD=_width(dim, 1024), **EXACT)
    return digits, step


def coefficients(
    queries: Queries, q: Tensor, step: Tensor, affine: Tensor, distances: bool
) -> Samples:
    """What each row is multiplied by in stages 2 and 5."""
    rows, limbs, _ = q.shape
    dim = queries.x.shape[1]
    numbers = Samples.numbers(queries, distances)
    with current(q):
        _kernels().coefficients[(rows,)](
            queries.sigma,
            queries.alpha,
            queries.D,
            *queries.pair,
            affine,
            q,
            step,
            numbers,
            rows,
            dim,
            KIND=queries.kind,
            DISTANCES=len(numbers) > 4,
            L=limbs,
            BD=_width(dim, 1024),
            **EXACT,
        )
    return Samples.of(queries, q, numbers)


def logits(
    samples: Samples, refs: Prepared, floor: Tensor | float | None = None
) -> tuple[Tensor, Tensor]:
    """Stage 2: r float32 [B, n] relative to anchors m float64 [B, ceil(n / 128)].

    No block is left out, whatever `floor`.
    """
    ref_limbs, n, dim = refs.values.shape
    values, pitch = pitched(refs.values)
    offset, exponent = samples.student or (None, None)
    rows, limbs, _ = samples.q.shape
    device = samples.q.device
    tile = tiles.logits(device, rows, n)
    blocks = ceil_div(n, ar.BLOCK)
    relative = torch.empty((rows, padded(n)), dtype=torch.float32, device=device)
    anchors = torch.empty((rows, blocks), dtype=torch.float64, device=device)
    with current(samples.q):
        _kernels().logits[(ceil_div(rows, tile.BM) * blocks,)](
            samples.q,
            values,
            refs.norms,
            samples.slope,
            samples.curvature,
            offset,
            exponent,
            refs.bias,
            samples.labels,
            refs.labels if samples.labels is not None else None,
            relative,
            anchors,
            rows,
            n,
            dim,
            pitch,
            L=limbs,
            R=ref_limbs,
            SPANS=ceil_div(dim, _kernels().SAFE_TERMS),
            RAGGED=dim % tile.BK != 0,
            BM=tile.BM,
            BK=tile.BK,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **EXACT,
        )
    return relative[:, :n], anchors


def weights(
    relative: Tensor, anchors: Tensor, peak: Tensor, precision: str, statistics: bool
) -> Weights:
    """Stage 3: integer weights P = rint(2^e lim) as lists and digits, and their sums.

    Args:
        relative, anchors: as `logits` returns them
        peak: the largest logit of the row over all references, float64 [B]
    """
    rows, n = relative.shape
    limbs = ar.LIMBS[precision]

    survivors, sums = before_weights(rows, n, limbs, statistics, relative.device)
    width = _width(n, 1024)
    with current(relative):
        _kernels().clear[(ceil_div(rows, 128),)](
            survivors.counts, survivors.dense, sums, rows, S=sums.shape[0], BB=128, **EXACT
        )
        _kernels().weights[(rows * ceil_div(n, width),)](
            relative,
            anchors,
            peak,
            *survivors,
            sums,
            rows,
            n,
            relative.stride(0),
            L=limbs,
            CAPACITY=survivors.indices.shape[1],
            STATISTICS=statistics,
            BK=width,
            **EXACT,
        )
    if not statistics:
        return Weights(survivors, sums[0])
    total, square, bits, lost, from_end = sums
    argmax = torch.where(from_end > 0, n - from_end, -1)
    return Weights(survivors, total, square, bits, lost, argmax)


def weighted_sum(weights: Weights, values: Tensor, columns: Tensor | None = None) -> Tensor:
    """Stage 4: sum_k P_ik v_kj for each reference limb, exact int64 [B, R, d].

    Args:
        weights: as `weights` leaves them
        values: int8 [R, n, d]
        columns: `transpose(values)`, where it is at hand
    """
    survivors: Survivors = weights.weight
    ref_limbs, n, dim = values.shape
    rows, limbs, _ = survivors.digits.shape
    values, pitch = pitched(values)
    if columns is None:
        columns = transpose(values)
    num = torch.empty((rows, ref_limbs, dim), dtype=torch.int64, device=values.device)
    tile = tiles.dense(values.device, rows, dim)
    slots = tiles.slots(values.device, tile.warps)
    width = _width(dim, 512)
    with current(values):
        _kernels().gather[(rows * ceil_div(dim, width) * ref_limbs,)](
            survivors.counts,
            survivors.indices,
            survivors.weights,
            survivors.dense,
            values,
            num,
            n,
            dim,
            pitch,
            R=ref_limbs,
            CAPACITY=survivors.indices.shape[1],
            SLOTS=slots,
            PART=PART_TERMS,
            BM=tile.BM,
            BN=tile.BN,
            BK=4,
            BD=width,
            **EXACT,
        )
        most = ceil_div(rows, tile.BM) * ceil_div(dim, tile.BN) * ref_limbs
        _kernels().multiply_dense[(max(slots, most * ceil_div(n, _kernels().SAFE_TERMS)),)](
            survivors.digits,
            survivors.dense,
            survivors.dense_rows,
            columns,
            num,
            n,
            dim,
            L=limbs,
            R=ref_limbs,
            SLOTS=slots,
            PART=PART_TERMS,
            BM=tile.BM,
            BN=tile.BN,
            BK=tile.BK,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **EXACT,
        )
    return num


def finish(num: Tensor, total: Tensor, affine: Tensor, samples: Samples, out: Tensor) -> None:
    """Stage 5: out = c_D D + c_x x with D = a num / total + b, rounded once to out's type."""
    rows, ref_limbs, dim = num.shape
    width = _width(dim, 1024)
    with current(num):
        _kernels().finish[(rows * ceil_div(dim, width),)](
            num,
            total,
            affine,
            samples.c_D,
            samples.c_x,
            samples.x,
            out,
            dim,
            R=ref_limbs,
            BD=width,
            **EXACT,
        )
