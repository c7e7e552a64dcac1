"""What passes between the five stages, and the walk through them that all backends share."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Prepared(NamedTuple):
    """References in fixed point, y = a v + b, with v = sum_r 256^r values[r]."""

    values: Tensor  # [R, n, d] int8
    norms: Tensor  # [n] float64: N_k = sum_j v^2 + 2 (b/a) sum_j v
    affine: Tensor  # [2] float64: a, b
    bias: Tensor | None  # [n] float64: log2(e) * log_weight
    labels: Tensor | None  # [n] int64
    columns: Tensor | None = None  # [R, d, n padded to 128] int8, zero in the padding


class Samples(NamedTuple):
    """Noisy samples with what each row needs in every stage."""

    x: Tensor  # [B, d] float32 or float64
    q: Tensor  # the backend's digits of rint(x / step), rows first
    slope: Tensor  # [B] float64: A step, with A and C of arithmetic.logit_coefficients
    curvature: Tensor  # [B] float64: C
    c_D: Tensor  # [B] float64: target = c_D D + c_x x
    c_x: Tensor  # [B] float64
    labels: Tensor | None  # [B] int64; -1 sees every reference
    student: tuple[Tensor, Tensor] | None = None  # [B] float64 each, for Student-t noise:
    # ||x - alpha b||^2 / (sigma^2 D) and (d + D) / 2


class Weights(NamedTuple):
    """Integer weights, as the backend keeps them, and integer sums over the references."""

    weight: Any  # P_ik, in the backend's form
    total: Tensor  # [B] int64: sum P
    square: Tensor | None = None  # [B] int64: sum rint(P^2 / 2^24)
    bits: Tensor | None = None  # [B] int64: sum rint(-2^10 P e)
    lost: Tensor | None = None  # [B] int64: sum rint(2^62 p) over P = 0
    argmax: Tensor | None = None  # [B] int64: the first with e = 0, -1 if there is none


class Stages(Protocol):
    """The functions a backend module offers; torch_backend.py documents each."""

    NAME: str
    MAX_ROWS: int  # samples in one block of rows
    BLOCK_BYTES: int  # what one block is best to hold, where that does not cut the references

    def unavailable(self, device: torch.device) -> str | None: ...
    def workspace(self, rows: int, n: int, dim: int, ref_limbs: int, limbs: int) -> int: ...
    def prepare(self, data: Tensor, limbs: int) -> tuple[Tensor, Tensor, Tensor]: ...
    def norms(self, values: Tensor, twice_offset: float) -> Tensor: ...
    def transpose(self, values: Tensor) -> Tensor | None: ...
    def quantize(self, x: Tensor, limbs: int) -> tuple[Tensor, Tensor]: ...
    def logits(
        self, samples: Samples, refs: Prepared, floor: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...
    def weights(
        self,
        relative: Tensor,
        anchors: Tensor,
        peak: Tensor,
        precision: str,
        statistics: bool,
    ) -> Weights: ...
    def weighted_sum(
        self, weights: Weights, values: Tensor, columns: Tensor | None = None
    ) -> Tensor: ...
    def finish(
        self, num: Tensor, total: Tensor, affine: Tensor, samples: Samples, out: Tensor
    ) -> None: ...


class Sums(NamedTuple):
    """The rows' integer sums, from which statistics.py makes the statistics."""

    total: Tensor
    peak: Tensor
    square: Tensor
    bits: Tensor
    lost: Tensor
    argmax: Tensor
    norm: Tensor  # [B, 6] int64: sum_k P_ik times each digit of N_k
