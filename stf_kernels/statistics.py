"""Statistics of the weights, made from integer sums by the same few lines for every backend."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import arithmetic as ar
from .pipeline import digits_of_norms
from .stages import Prepared, Sums
from .torch_backend import quantize, split_halves, sum_of_squares, to_double


class TargetStats(NamedTuple):
    """What the posterior over the references looks like, a number for each sample.

    With logit_ik = -||x_i - alpha_i y_k||^2 / (2 sigma_i^2) + log_weight_k and w = softmax(logit).
    Rows that have no target (NaN) have NaN here, and argmax -1.
    """

    lse: Tensor  # [B] float64, nats: log sum_k exp logit_k
    ess: Tensor  # [B] float64, references: 1 / sum_k w_k^2
    entropy: Tensor  # [B] float64, nats: -sum_k w_k log w_k
    max_weight: Tensor  # [B] float64
    argmax: Tensor  # [B] int64: the first reference of the largest weight
    second_moment: Tensor  # [B] float64, data units squared: sum_k w_k ||y_k||^2
    lost_mass: Tensor  # [B] float64: share of the softmax in weights too small for the precision


def from_sums(
    sums: Sums, x: Tensor, sigma: Tensor, alpha: Tensor, refs: Prepared, precision: str
) -> TargetStats:
    """The statistics of rows whose integer sums are `sums` (MATH.md, section 7)."""
    scale = float(ar.limit(ar.LIMBS[precision]))
    a, b = refs.affine
    dim = x.shape[1]
    valid = sums.total > 0
    total = torch.where(valid, sums.total.double(), torch.nan)

    kept = total / scale  # sum of 2^e over the weights kept, at least 1
    lost = sums.lost.double() * 2.0**-ar.LOST_SHIFT
    distance = squared_distance(x, alpha * b, precision)
    lse = ar.LN2 * (sums.peak + torch.log2(kept + lost)) - distance / (2 * sigma * sigma)
    entropy = ar.LN2 * (torch.log2(kept) + sums.bits.double() * 2.0**-ar.ENTROPY_SHIFT / total)
    ess = total * total / (sums.square.double() * 2.0**ar.SQUARE_SHIFT)
    norm = to_double(sums.norm) * digits_of_norms(refs.norms)[1] / total
    return TargetStats(
        lse,
        ess,
        entropy,
        1.0 / kept,
        sums.argmax,
        a * a * norm + dim * (b * b),
        lost / (kept + lost),
    )


def squared_distance(x: Tensor, offset: Tensor, precision: str) -> Tensor:
    """sum_j (step_i q_ij - offset_i)^2 in float64 [B], from sums of integers, which have no order.

    Args:
        x: samples [B, d]
        offset: float64 [B]
        precision: which digits q has
    """
    q, step = quantize(x, ar.LIMBS[precision])
    square = sum_of_squares(*split_halves(q))
    linear = q.sum(1).double()
    mean = offset / step
    return step * step * (square - 2 * mean * linear + x.shape[1] * (mean * mean))
