"""The walk through the five stages, the same for every backend."""

from __future__ import annotations

import torch
from torch import Tensor

from . import arithmetic as ar
from .parameterization import coefficients
from .stages import Prepared, Samples, Stages, Sums


def run(
    stages: Stages,
    x: Tensor,
    sigma: Tensor,
    alpha: Tensor,
    refs: Prepared,
    labels: Tensor | None,
    kind: str,
    parameters: list[Tensor],
    precision: str,
    statistics: bool,
) -> tuple[Tensor, Sums | None]:
    """Targets [B, d] and, if asked for, the integer sums behind the statistics.

    Args:
        stages: a backend module
        x: samples, float32 or float64 [B, d], contiguous
        sigma, alpha: float64 [B]
        refs: prepared references
        labels: int64 [B] or None
        kind, parameters: the parameterization, as `parameterization.coefficients` takes them
        precision: a key of arithmetic.LIMBS
        statistics: whether to gather the sums
    """
    rows = x.shape[0]
    out = torch.empty_like(x)
    limbs = ar.LIMBS[precision]
    slope, curvature = ar.logit_coefficients(sigma, alpha, refs.affine[0])
    c_D, c_x = coefficients(kind, sigma, alpha, parameters)
    norm_digits = digits_of_norms(refs.norms)[0][:, :, None] if statistics else None
    columns = refs.columns
    if columns is None:
        columns = stages.transpose(refs.values)
    sums = []
    block = stages.rows_per_block(refs, limbs)
    for start in range(0, rows, block):
        part = slice(start, min(start + block, rows))
        q, step = stages.quantize(x[part], limbs)
        samples = Samples(
            x[part],
            q,
            slope[part] * step,
            curvature[part],
            c_D[part],
            c_x[part],
            None if labels is None else labels[part],
        )
        relative, anchors = stages.logits(samples, refs)
        weights = stages.weights(relative, anchors, precision, statistics)
        num = stages.weighted_sum(weights, refs.values, columns)
        stages.finish(num, weights.total, refs.affine, samples, out[part])
        if norm_digits is not None:
            norm = stages.weighted_sum(weights, norm_digits)[:, :, 0]
            sums.append(Sums(*weights[1:], norm))  # type: ignore[arg-type]  # all there
    return out, Sums(*map(torch.cat, zip(*sums, strict=True))) if statistics else None


def digits_of_norms(norms: Tensor) -> tuple[Tensor, Tensor]:
    """N_k as fixed-point digits int8 [6, n] and their power-of-two step; integers stay exact."""
    largest = norms.abs().amax()
    exponent = ar.fixed_point_exponent(largest, ar.NORM_LIMBS)
    z = torch.round(norms * ar.power_of_two(-exponent)).to(torch.int64)
    return torch.stack(ar.split_limbs(z, ar.NORM_LIMBS)), ar.power_of_two(exponent)
