"""What the backends for NVIDIA GPUs share: how digits lie in memory, and what that takes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from . import arithmetic as ar

OLDEST_CAPABILITY = (8, 0)
SPARSE_SURVIVORS = 128  # a row with more goes through the matrix product
STATISTICS_SUMS = 5  # total, square, bits, lost and what argmax comes from
MAX_ROWS = 1024
BLOCK_BYTES = 2 << 30  # a GPU is best filled by the whole batch
ROUNDED_UP = 32 * 512  # bytes torch's allocator may add to all tensors of the stages


class Survivors(NamedTuple):
    """What stage 3 leaves on the device for stage 4: short rows as lists, dense ones as digits.

    The kernels that write it say what a dense row has as its count, and where its digits are.
    """

    counts: Tensor  # [B] int32
    indices: Tensor  # [B, SPARSE_SURVIVORS] int32
    weights: Tensor  # [B, SPARSE_SURVIVORS] int32
    digits: Tensor  # [B, L, n padded to 128] int8
    dense: Tensor  # [1] int32: rows with more survivors
    dense_rows: Tensor  # [B] int32, of which the first `dense`


def before_weights(
    rows: int, n: int, limbs: int, statistics: bool, device: torch.device
) -> tuple[Survivors, Tensor]:
    """What stage 3 writes, nothing of it cleared.

    Returns:
        survivors, and sums int64 [S, B]: the total or, with statistics, STATISTICS_SUMS of them
    """

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    survivors = Survivors(
        empty(rows),
        empty(rows, SPARSE_SURVIVORS),
        empty(rows, SPARSE_SURVIVORS),
        empty(rows, limbs, padded(n), dtype=torch.int8),
        empty(1),
        empty(rows),
    )
    return survivors, empty(STATISTICS_SUMS if statistics else 1, rows, dtype=torch.int64)


def workspace(rows: int, n: int, dim: int, ref_limbs: int, limbs: int) -> int:
    """Bytes the stages allocate at most for `rows` samples with `n` references."""
    quantized = limbs * padded(dim) + 64  # step and what each row is multiplied by
    logit = 4 * padded(n) + 8 * ceil_div(n, ar.BLOCK)
    weight = limbs * padded(n) + 8 * SPARSE_SURVIVORS + 8 * STATISTICS_SUMS + 8 + 32  # argmax
    num = 8 * (ref_limbs * dim + ar.NORM_LIMBS)
    columns = (ref_limbs * dim + ar.NORM_LIMBS) * padded(n)
    return rows * (quantized + logit + weight + num) + columns + ROUNDED_UP


def padded(size: int) -> int:
    """The smallest multiple of 128 that is not below `size`."""
    return ceil_div(size, ar.BLOCK) * ar.BLOCK


def ceil_div(size: int, part: int) -> int:
    return -(-size // part)


def pitched(values: Tensor) -> tuple[Tensor, int]:
    """References int8 [R, n, d] whose rows lie side by side, and the rows from limb to limb."""
    _, n, dim = values.shape
    limb, row, value = values.stride()
    if values.is_contiguous():
        return values, n
    if (row, value) == (dim, 1) and limb % dim == 0:
        return values, limb // dim  # a part of a set
    return values.contiguous(), n


def current(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's device, on which a backend launches, the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def unfit(device: torch.device) -> str | None:
    """Why a "cuda" device cannot run the int8 products, or None."""
    if torch.version.hip:
        return "it needs an NVIDIA GPU"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability >= OLDEST_CAPABILITY:
        return None
    oldest = dotted(OLDEST_CAPABILITY)
    return f"it needs compute capability {oldest} or later, got {dotted(capability)}"


def dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
