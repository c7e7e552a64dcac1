"""The CPU backend: limb products through oneDNN, everything around them in fused C++ (csrc/).

Where the processor has VNNI or AMX instructions `torch._int_mm` multiplies int8 digits exactly.
Elsewhere oneDNN may saturate in int16 or has no kernel at all, and pairs of digits are multiplied
in float64 instead, which is exact too: 2^15 * 2^7 a term, and sums stay below 2^53.
"""

from __future__ import annotations

import importlib
import itertools
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import arithmetic as ar
from .stages import Prepared, Samples, Weights

NAME = "cpu"

_C: Any
try:
    _C = importlib.import_module("stf_kernels._C")
except ImportError as error:
    _C, _import_error = None, str(error)

# A row in which more than one reference in ten survives goes through the matrix product: there a
# reference costs a tenth of what gathering it does (.27 against .03 us at d = 3072, one core).
SPARSE_SHARE = 10
MAX_SURVIVORS = 1 << 15  # so that float64 sums of P v, below 2^38 each, are exact
MAX_ROWS = 256
PRODUCT_BYTES = 8 << 20  # of the limb products held at a time, and of a float64 copy of one side
ROW_SUMS = 64  # bytes of a row's step, total, count and statistics
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


def extension() -> Any:
    """The compiled module, or None."""
    return _C


def unavailable(device: torch.device) -> str | None:
    """Why this backend cannot run on `device`, or None."""
    if device.type != "cpu":
        return "it computes on the CPU"
    return None if _C else f"the extension stf_kernels._C is not importable ({_import_error})"


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


def workspace(rows: int, n: int, dim: int, ref_limbs: int, limbs: int) -> int:
    """Bytes the stages allocate at most for `rows` samples with `n` references."""
    wide = not (has_int8_products() and dim > 1)
    blocks, spans = -(-n // ar.BLOCK), -(-dim // ar.MAX_INT32_TERMS)
    lists = 8 * max(1, min(n // SPARSE_SHARE, MAX_SURVIVORS))
    row = (limbs + 8 * ref_limbs) * dim + (4 + limbs) * n + 8 * blocks + lists + ROW_SUMS
    if wide:
        row += 16 * max(dim, n)  # the digits in pairs
    elif max(dim, n) > ar.MAX_INT32_TERMS:
        row += limbs * max(dim, n)  # the digits cut into spans
    sums = 8 * ref_limbs * spans * rows * limbs
    copy = 8 * min(dim, ar.MAX_INT32_TERMS) if wide else 0
    return rows * row + 2 * max(PRODUCT_BYTES, ar.BLOCK * max(sums, copy))


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


def _factor(digits: Tensor) -> Tensor:
    """The left side of limb products: int8 digits as they are, or pairs of them in float64.

    `torch._int_mm` is wrong for a single term (it misreads the strides: torch 2.13), and int32
    sums have a largest number of terms.
    """
    if has_int8_products() and 1 < digits.shape[2] <= ar.MAX_INT32_TERMS:
        return digits
    pairs = digits[:, ::2].double()
    pairs[:, : digits.shape[1] // 2] += digits[:, 1::2].double() * ar.LIMB_RADIX
    return pairs


def _multiply(left: Tensor, right: Tensor, out: Tensor) -> None:
    """out[m, c] = left [m, k] @ right [k, c], exact; right is int8."""
    if left.dtype == torch.int8:
        torch._int_mm(left, right, out=out)
    else:
        torch.matmul(left, right.double(), out=out)


def _sums_dtype(left: Tensor) -> torch.dtype:
    return torch.int32 if left.dtype == torch.int8 else torch.float64


def _copy(sums: torch.dtype) -> int:
    """Bytes for each value of a right side that `_multiply` has to copy."""
    return 8 if sums == torch.float64 else 0


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def logits(samples: Samples, refs: Prepared, floor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Stage 2: r float32 [B, n] relative to anchors m float64 [B, ceil(n / 128)]."""
    ref_limbs, n, dim = refs.values.shape
    rows = samples.q.shape[0]
    relative = torch.empty((rows, n), dtype=torch.float32, device="cpu")
    anchors = torch.empty((rows, -(-n // ar.BLOCK)), dtype=torch.float64, device="cpu")
    terms = -(-dim // -(-dim // ar.MAX_INT32_TERMS))  # of a span of a sum too long for int32
    lefts = [_factor(q) for q in samples.q.split(terms, 2)]
    spans, count, dtype = len(lefts), lefts[0].shape[1], _sums_dtype(lefts[0])
    lefts = [left.reshape(rows * count, -1) for left in lefts]
    sums_per_column = ref_limbs * spans * rows * count
    columns = ar.BLOCK * max(
        1, PRODUCT_BYTES // (ar.BLOCK * max(sums_per_column * dtype.itemsize, _copy(dtype) * terms))
    )
    buffer = torch.empty(sums_per_column * min(columns, n), dtype=dtype, device="cpu")
    of_samples = (samples.slope, samples.curvature, *(samples.student or (None, None)))
    for first in range(0, n, columns):
        part = refs.values[:, first : first + columns]
        width = part.shape[1]
        dots = buffer[: sums_per_column * width].view(ref_limbs, spans, rows * count, width)
        for limb, span in itertools.product(range(ref_limbs), range(spans)):
            right = part[limb, :, span * terms : (span + 1) * terms]
            _multiply(lefts[span], right.t(), dots[limb, span])
        _C.logits(
            (dots.data_ptr(), spans, count, width, dtype == torch.float64),
            rows,
            ref_limbs,
            tuple(map(_address, (*of_samples, samples.labels))),
            tuple(map(_address, (refs.norms, refs.bias, refs.labels))),
            first,
            n,
            relative.data_ptr(),
            anchors.data_ptr(),
            torch.get_num_threads(),
        )
    return relative, anchors


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
        left = _factor(survivors.digits[:dense, :, first : first + terms])
        count = left.shape[1]
        left = left.reshape(dense * count, -1)
        dtype = _sums_dtype(left)
        held = max(dense * count * dtype.itemsize, _copy(dtype) * left.shape[1])
        width = max(1, PRODUCT_BYTES // held)
        for limb, j in itertools.product(range(ref_limbs), range(0, dim, width)):
            right = values[limb, first : first + terms, j : j + width]
            sums = torch.empty((dense * count, right.shape[1]), dtype=dtype, device="cpu")
            _multiply(left, right, sums)
            _C.add_dense(
                (sums.data_ptr(), 1, count, right.shape[1], dtype == torch.float64),
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
