"""The Triton backend: int8 products on tensor cores, every stage a kernel, no host in between.

Row lists and counts stay on the device: grids have their largest size, and programs without work
leave at once. So a call can be captured in a CUDA graph; the kernels must have been compiled by a
call before. With TRITON_INTERPRET=1 in the environment before the first use the kernels run in
Triton's interpreter, on tensors of any device: slow, and bit for bit the same.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .. import arithmetic as ar
from ..stages import Prepared, Samples, Weights
from . import tiles

NAME = "triton"
OLDEST_TRITON = (3, 6)
OLDEST_CAPABILITY = (8, 0)

SPARSE_SURVIVORS = 128  # a row with more goes through the matrix product
MAX_ROWS = 1024
BLOCK_BYTES = 2 << 30  # a GPU is best filled by the whole batch
PART_TERMS = 512  # stage 4 cuts n into parts no shorter
STATISTICS_SUMS = 5  # total, square, bits, lost, n - argmax
ROUNDED_UP = 32 * 512  # bytes torch's allocator may add to all tensors of the stages
EXACT = {"enable_fp_fusion": False}  # every launch: products and sums round apart


class _Survivors(NamedTuple):
    """What stage 3 leaves on the device for stage 4 (kernels' docstrings)."""

    counts: Tensor  # [B] int32
    indices: Tensor  # [B, SPARSE_SURVIVORS] int32
    weights: Tensor  # [B, SPARSE_SURVIVORS] int32
    digits: Tensor  # [B, L, n padded to 128] int8
    dense: Tensor  # [1] int32: rows with more survivors
    dense_rows: Tensor  # [B] int32, of which the first `dense`


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
        return f"it needs triton {_dotted(OLDEST_TRITON)} or later, got {_dotted(kernels.VERSION)}"
    if interpreted != kernels.INTERPRETED:
        return "TRITON_INTERPRET changed after the kernels were imported"
    if device.type == "cpu" or interpreted:
        return None
    if torch.version.hip:
        return "it needs an NVIDIA GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        return (
            f"it needs compute capability {_dotted(OLDEST_CAPABILITY)} or later, "
            f"got {_dotted(capability)}"
        )
    return None


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def workspace(rows: int, n: int, dim: int, ref_limbs: int, limbs: int) -> int:
    """Bytes the stages allocate at most for `rows` samples with `n` references."""
    quantized = limbs * _padded(dim) + 8
    logit = 4 * _padded(n) + 8 * _ceil(n, ar.BLOCK)
    weight = limbs * _padded(n) + 8 * SPARSE_SURVIVORS + 8 * STATISTICS_SUMS + 8 + 32  # argmax
    num = 8 * (ref_limbs * dim + ar.NORM_LIMBS)
    columns = (ref_limbs * dim + ar.NORM_LIMBS) * _padded(n)
    return rows * (quantized + logit + weight + num) + columns + ROUNDED_UP


def _padded(size: int) -> int:
    return _ceil(size, ar.BLOCK) * ar.BLOCK


def _ceil(size: int, part: int) -> int:
    return -(-size // part)


def _pitched(values: Tensor) -> tuple[Tensor, int]:
    """References int8 [R, n, d] whose rows lie side by side, and the rows from limb to limb."""
    _, n, dim = values.shape
    limb, row, value = values.stride()
    if values.is_contiguous():
        return values, n
    if (row, value) == (dim, 1) and limb % dim == 0:
        return values, limb // dim  # a part of a set
    return values.contiguous(), n


def _width(size: int, most: int) -> int:
    """A power of two for row kernels: `size` in one go, or `most` at a time."""
    return min(most, max(128, 1 << (size - 1).bit_length()))


def _on(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def prepare(data: Tensor, limbs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Float references [n, d] in fixed point: values int8 [R, n, d], norms [n], scale a []."""
    values = torch.empty((limbs, *data.shape), dtype=torch.int8, device=data.device)
    largest = torch.zeros(1, dtype=torch.int64, device=data.device)
    scale = torch.empty((), dtype=torch.float64, device=data.device)
    size = data.numel()
    with _on(data):
        _kernels().magnitude[(_ceil(size, 16 * 2048),)](
            data, largest, size, STEPS=16, BD=2048, **EXACT
        )
        _kernels().fix[(_ceil(size, 1024),)](
            data, largest, values, scale, size, R=limbs, BD=1024, **EXACT
        )
    return values, norms(values, 0.0), scale


def norms(values: Tensor, twice_offset: float) -> Tensor:
    """N_k = sum_j v_kj^2 + 2 (b/a) sum_j v_kj in float64 [n]."""
    ref_limbs, n, dim = values.shape
    values = values.contiguous()
    ratio = torch.full((1,), twice_offset, dtype=torch.float64, device=values.device)
    out = torch.empty(n, dtype=torch.float64, device=values.device)
    with _on(values):
        _kernels().norms[(n,)](
            values, ratio, out, n, dim, R=ref_limbs, BD=_width(dim, 1024), **EXACT
        )
    return out


def transpose(values: Tensor) -> Tensor:
    """The copy [R, d, n padded to 128] of the references that stage 4 multiplies."""
    ref_limbs, n, dim = values.shape
    values, pitch = _pitched(values)
    out = torch.empty((ref_limbs, dim, _padded(n)), dtype=torch.int8, device=values.device)
    with _on(values):
        grid = (ref_limbs * _ceil(n, 128) * _ceil(dim, 64),)
        _kernels().transpose[grid](values, out, n, dim, pitch, R=ref_limbs, BN=128, BD=64, **EXACT)
    return out


def quantize(x: Tensor, limbs: int) -> tuple[Tensor, Tensor]:
    """Stage 1: the digits of rint(x / step), int8 [B, L, d padded to 128], and step [B]."""
    rows, dim = x.shape
    digits = torch.empty((rows, limbs, _padded(dim)), dtype=torch.int8, device=x.device)
    step = torch.empty(rows, dtype=torch.float64, device=x.device)
    with _on(x):
        _kernels().quantize[(rows,)](x, digits, step, dim, L=limbs, BD=_width(dim, 1024), **EXACT)
    return digits, step


def logits(samples: Samples, refs: Prepared, floor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Stage 2: r float32 [B, n] relative to anchors m float64 [B, ceil(n / 128)].

    No block is left out, whatever `floor`.
    """
    ref_limbs, n, dim = refs.values.shape
    values, pitch = _pitched(refs.values)
    offset, exponent = samples.student or (None, None)
    rows, limbs, _ = samples.q.shape
    device = samples.q.device
    tile = tiles.logits(device, rows, n)
    blocks = _ceil(n, ar.BLOCK)
    relative = torch.empty((rows, _padded(n)), dtype=torch.float32, device=device)
    anchors = torch.empty((rows, blocks), dtype=torch.float64, device=device)
    with _on(samples.q):
        _kernels().logits[(_ceil(rows, tile.BM) * blocks,)](
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
            SPANS=_ceil(dim, _kernels().SAFE_TERMS),
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

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=relative.device)

    survivors = _Survivors(
        empty(rows),
        empty(rows, SPARSE_SURVIVORS),
        empty(rows, SPARSE_SURVIVORS),
        empty(rows, limbs, _padded(n), dtype=torch.int8),
        empty(1),
        empty(rows),
    )
    sums = empty(STATISTICS_SUMS if statistics else 1, rows, dtype=torch.int64)
    width = _width(n, 1024)
    with _on(relative):
        _kernels().clear[(_ceil(rows, 128),)](
            survivors.counts, survivors.dense, sums, rows, S=sums.shape[0], BB=128, **EXACT
        )
        _kernels().weights[(rows * _ceil(n, width),)](
            relative,
            anchors,
            peak,
            *survivors,
            sums,
            rows,
            n,
            relative.stride(0),
            L=limbs,
            CAPACITY=SPARSE_SURVIVORS,
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
    survivors: _Survivors = weights.weight
    ref_limbs, n, dim = values.shape
    rows, limbs, _ = survivors.digits.shape
    values, pitch = _pitched(values)
    if columns is None:
        columns = transpose(values)
    num = torch.empty((rows, ref_limbs, dim), dtype=torch.int64, device=values.device)
    tile = tiles.dense(values.device, rows, dim)
    slots = tiles.slots(values.device, tile.warps)
    width = _width(dim, 512)
    with _on(values):
        _kernels().gather[(rows * _ceil(dim, width) * ref_limbs,)](
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
            CAPACITY=SPARSE_SURVIVORS,
            SLOTS=slots,
            PART=PART_TERMS,
            BM=tile.BM,
            BN=tile.BN,
            BK=4,
            BD=width,
            **EXACT,
        )
        most = _ceil(rows, tile.BM) * _ceil(dim, tile.BN) * ref_limbs
        _kernels().multiply_dense[(max(slots, most * _ceil(n, _kernels().SAFE_TERMS)),)](
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
    with _on(num):
        _kernels().finish[(rows * _ceil(dim, width),)](
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
