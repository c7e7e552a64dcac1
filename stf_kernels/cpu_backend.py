"""The CPU backend: limb products through oneDNN or our own, the rest in fused C++ (csrc/).

Stage 2 is in cpu_logits.py, the products in cpu_products.py.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from . import arithmetic as ar
from . import cpu_logits, cpu_products
from .cpu_logits import logits as logits
from .cpu_products import PRODUCT_BYTES
from .cpu_products import has_int8_products as has_int8_products
from .extension import _C, absence, levels
from .extension import extension as extension
from .stages import Queries, Samples, Weights

NAME = "cpu"

# A row in which more than one reference in ten survives goes through the matrix product: there a
# reference costs a tenth of what gathering it does (.27 against .03 us at d = 3072, one core).
SPARSE_SHARE = 10
MAX_SURVIVORS = 1 << 15  # so that float64 sums of P v, below 2^38 each, are exact
MAX_ROWS = 256
ROW_SUMS = 128  # bytes of what is one number a row
BLOCK_BYTES = (32 << 20) + 2 * PRODUCT_BYTES


class _Survivors(NamedTuple):
    """csrc/cpu_stages.h: the short lists of sparse rows, the digits of dense ones."""

    capacity: int
    counts: Tensor  # [B] int64
    indices: Tensor  # [B, capacity] int32
    weights: Tensor  # [B, capacity] int32
    digits: Tensor  # [B, L, n] int8, of which the first `slots` are used
    slots: Tensor  # [1] int64

    def addresses(self) -> tuple[int, ...]:
        return (self.capacity, *(t.data_ptr() for t in self[1:]))


def unavailable(device: torch.device) -> str | None:
    """Why this backend cannot run on `device`, or None."""
    if device.type != "cpu":
        return "it computes on the CPU"
    return (
        None if absence is None else f"the extension stf_kernels._C is not importable ({absence})"
    )


def workspace(rows: int, n: int, dim: int, ref_limbs: int, limbs: int) -> int:
    """Bytes the stages allocate at most for `rows` samples with `n` references."""
    blocks, spans = -(-n // ar.BLOCK), -(-dim // ar.MAX_INT32_TERMS)
    lists = 8 * max(1, min(n // SPARSE_SHARE, MAX_SURVIVORS))
    row = (limbs + 8 * ref_limbs) * dim + (4 + limbs) * n + 12 * blocks + lists + ROW_SUMS
    row += limbs * n if n > ar.MAX_INT32_TERMS else 0  # the digits of weights in spans
    if cpu_products.in_int8(min(dim, ar.MAX_INT32_TERMS)):
        row += (2 * limbs + 4) * dim  # the digits of some rows; halves
    else:
        row += (limbs + 12) * dim + 4 * n  # likewise, and halves of all; halves of weights
    sums = 8 * ref_limbs * spans * rows * limbs
    tried = 2 * cpu_logits.TRIED * (dim + 8 * rows + 24)
    return rows * row + tried + max(PRODUCT_BYTES, ar.BLOCK * sums)


def prepare(data: Tensor, limbs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Float references [n, d] in fixed point: values int8 [R, n, d], norms [n], scale a []."""
    data = data if data.dtype == torch.float64 else data.float()
    n, dim = data.shape
    values = torch.empty((limbs, n, dim), dtype=torch.int8, device="cpu")
    low, high = torch.aminmax(data)
    largest = torch.maximum(low.abs(), high.abs()).double()
    if not torch.isfinite(largest):
        values.zero_()
        return values, norms(values, 0.0), largest * torch.nan
    exponent = ar.fixed_point_exponent(largest, limbs)
    _C.quantize(
        data.data_ptr(),
        data.dtype == torch.float64,
        n,
        dim,
        limbs,
        values.data_ptr(),
        dim,
        n * dim,
        0,
        exponent.data_ptr(),
        torch.get_num_threads(),
    )
    return values, norms(values, 0.0), ar.power_of_two(exponent)


def norms(values: Tensor, twice_offset: float) -> Tensor:
    """N_k = sum_j v_kj^2 + 2 (b/a) sum_j v_kj in float64 [n]."""
    limbs, n, dim = values.shape
    out = torch.empty(n, dtype=torch.float64, device="cpu")
    _C.norms(
        values.data_ptr(), limbs, n, dim, twice_offset, out.data_ptr(), torch.get_num_threads()
    )
    return out


def transpose(values: Tensor) -> Tensor | None:
    """The copy [R, d, n padded to 128] of the references that stage 4 multiplies, if it does."""
    return None


def quantize(x: Tensor, limbs: int) -> tuple[Tensor, Tensor]:
    """Stage 1: the digits of rint(x / step), int8 [B, L, d], and step [B]."""
    rows, dim = x.shape
    digits = torch.empty((rows, limbs, dim), dtype=torch.int8, device="cpu")
    step = torch.empty(rows, dtype=torch.float64, device="cpu")
    _C.quantize(
        x.data_ptr(),
        x.dtype == torch.float64,
        rows,
        dim,
        limbs,
        digits.data_ptr(),
        limbs * dim,
        dim,
        step.data_ptr(),
        0,
        torch.get_num_threads(),
    )
    return digits, step


def coefficients(
    queries: Queries, q: Tensor, step: Tensor, affine: Tensor, distances: bool
) -> Samples:
    """What each row is multiplied by in stages 2 and 5."""
    rows, limbs, dim = q.shape
    numbers = Samples.numbers(queries, distances)
    of = levels(queries, step, affine, numbers)
    _C.coefficients(of, rows, (q.data_ptr(), dim, limbs), torch.get_num_threads())
    return Samples.of(queries, q, numbers)


def weights(
    relative: Tensor, anchors: Tensor, peak: Tensor, precision: str, statistics: bool
) -> Weights:
    """Stage 3: integer weights P = rint(2^e scale) of the survivors, and their sums."""
    rows, n = relative.shape
    limbs = ar.LIMBS[precision]
    capacity = max(1, min(n // SPARSE_SHARE, MAX_SURVIVORS))
    survivors = _Survivors(
        capacity,
        torch.empty(rows, dtype=torch.int64, device="cpu"),
        torch.empty((rows, capacity), dtype=torch.int32, device="cpu"),
        torch.empty((rows, capacity), dtype=torch.int32, device="cpu"),
        torch.empty((rows, limbs, n), dtype=torch.int8, device="cpu"),
        torch.zeros(1, dtype=torch.int64, device="cpu"),
    )
    total = torch.empty(rows, dtype=torch.int64, device="cpu")
    sums = (
        [torch.empty(rows, dtype=torch.int64, device="cpu") for _ in range(4)] if statistics else []
    )
    _C.weights(
        relative.data_ptr(),
        anchors.data_ptr(),
        rows,
        n,
        limbs,
        float(ar.limit(limbs)),
        peak.data_ptr(),
        total.data_ptr(),
        survivors.addresses(),
        tuple(t.data_ptr() for t in sums) or (0, 0, 0, 0),
        torch.get_num_threads(),
    )
    return Weights(survivors, total, *sums)


def weighted_sum(weights: Weights, values: Tensor, columns: Tensor | None = None) -> Tensor:
    """Stage 4: sum_k P_ik v_kj for each reference limb, exact int64 [B, R, d]."""
    survivors: _Survivors = weights.weight
    ref_limbs, n, dim = values.shape
    rows = survivors.counts.shape[0]
    threads = torch.get_num_threads()
    num = torch.empty((rows, ref_limbs, dim), dtype=torch.int64, device="cpu")
    _C.gather(
        survivors.addresses(), rows, values.data_ptr(), ref_limbs, n, dim, num.data_ptr(), threads
    )
    dense = int(survivors.slots)
    if dense == 0:
        return num
    terms = ar.MAX_INT32_TERMS // ar.BLOCK * ar.BLOCK
    for first in range(0, n, terms):
        left = cpu_products.factor(survivors.digits[:dense, :, first : first + terms])
        dtype = cpu_products.sums_dtype(left)
        width = max(1, PRODUCT_BYTES // (len(left) * dtype.itemsize))
        for limb, j in itertools.product(range(ref_limbs), range(0, dim, width)):
            right = values[limb, first : first + terms, j : j + width]
            sums = torch.empty((len(left), right.shape[1]), dtype=dtype, device="cpu")
            cpu_products.multiply(left, right, sums)
            _C.add_dense(
                (sums.data_ptr(), 1, len(left) // dense, right.shape[1], dtype == torch.int64),
                survivors.addresses(),
                rows,
                ref_limbs,
                limb,
                j,
                dim,
                num.data_ptr(),
                threads,
            )
    return num


def finish(num: Tensor, total: Tensor, affine: Tensor, samples: Samples, out: Tensor) -> None:
    """Stage 5: out = c_D D + c_x x with D = a num / total + b, rounded once to out's type."""
    rows, ref_limbs, dim = num.shape
    _C.finish(
        num.data_ptr(),
        total.data_ptr(),
        affine.data_ptr(),
        samples.c_D.data_ptr(),
        samples.c_x.data_ptr(),
        samples.x.data_ptr(),
        samples.x.dtype == torch.float64,
        rows,
        ref_limbs,
        dim,
        out.data_ptr(),
        torch.get_num_threads(),
    )
