"""Statistics of the weights, made from integer sums by the same few lines for every backend."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import arithmetic as ar
from .stages import Queries, Sums
from .torch_backend import to_double


class TargetStats(NamedTuple):
    """What the posterior over the references looks like, a number for each sample.

    With logit_ik = -||x_i - alpha_i y_k||^2 / (2 sigma_i^2) + log_weight_k, or for Student-t noise
    -(d + D)/2 log(1 + ||x_i - alpha_i y_k||^2 / (sigma_i^2 D)) + log_weight_k; w = softmax(logit).
    Rows that have no target (NaN) have NaN here, and argmax -1.

    Attributes:
        lse: log sum_k exp logit_k, float64 [B], nats
        ess: effective number of references, 1 / sum_k w_k^2, float64 [B], 1 to n
        entropy: -sum_k w_k log w_k, float64 [B], nats, 0 to log n
        max_weight: the largest w_k, float64 [B], 1 / n to 1
        argmax: the first reference of the largest weight, int64 [B], index into the references
        second_moment: sum_k w_k ||y_k||^2, float64 [B], data units squared
        lost_mass: share of the softmax in weights too small for the precision, float64 [B], 0 to 1
    """

    lse: Tensor
    ess: Tensor
    entropy: Tensor
    max_weight: Tensor
    argmax: Tensor
    second_moment: Tensor
    lost_mass: Tensor


def from_sums(
    sums: Sums,
    distance: Tensor,
    queries: Queries,
    affine: Tensor,
    exponent: Tensor,
    precision: str,
) -> TargetStats:
    """The statistics of rows whose integer sums are `sums` (MATH.md, section 7).

    Args:
        distance: of the rows, as in `Samples`
        exponent: the power of two of the norms' digits, as `norms_exponent` gives it
    """
    scale = float(ar.limit(ar.LIMBS[precision]))
    a, b = affine
    dim = queries.x.shape[1]
    square, bits, lost_sum, norm_sum, argmax = (t for t in sums[2:] if t is not None)
    valid = sums.total > 0
    total = torch.where(valid, sums.total.double(), torch.nan)

    kept = total / scale  # sum of 2^e over the weights kept, at least 1
    lost = lost_sum.double() * 2.0**-ar.LOST_SHIFT
    lse = ar.LN2 * (sums.peak + torch.log2(kept + lost))
    if queries.D is None:  # the logits went without what is the same for all references
        lse = lse - distance / (2 * queries.sigma * queries.sigma)
    entropy = ar.LN2 * (torch.log2(kept) + bits.double() * 2.0**-ar.ENTROPY_SHIFT / total)
    ess = total * total / (square.double() * 2.0**ar.SQUARE_SHIFT)
    norm = to_double(norm_sum) * ar.power_of_two(exponent) / total
    return TargetStats(
        lse,
        ess,
        entropy,
        1.0 / kept,
        torch.where(valid, argmax, -1),
        a * a * norm + dim * (b * b),
        lost / (kept + lost),
    )


def largest_norm(norms: Tensor) -> Tensor:
    """max |N_k|, [1] float64; 0 of none."""
    return norms.abs().amax(0, keepdim=True) if len(norms) else norms.new_zeros(1)


def norms_exponent(largest: Tensor) -> Tensor:
    """The power of two that N_k are counted in, int64 [1]; integers stay exact."""
    return ar.fixed_point_exponent(largest, ar.NORM_LIMBS)


def digits_of_norms(norms: Tensor, exponent: Tensor) -> Tensor:
    """N_k / 2^exponent as digits int8 [6, n]."""
    z = torch.round(norms * ar.power_of_two(-exponent)).to(torch.int64)
    return ar.split_limbs(z, ar.NORM_LIMBS)
