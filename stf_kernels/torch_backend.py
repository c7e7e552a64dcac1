"""The specification (MATH.md) spelled in PyTorch integer and float64 operations, on any device.

Written to be read beside MATH.md, not to be fast: every other backend is held to these bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import arithmetic as ar
from . import parameterization
from .stages import Prepared, Queries, Samples, Weights

NAME = "torch"
PREPARE_ELEMENTS = 1 << 22  # references fixed at a time: int64 and float64 copies stay under 256 MB
MAX_ROWS = 1 << 16
BLOCK_BYTES = 256 << 20


def unavailable(device: torch.device) -> str | None:
    """Why this backend cannot run on `device`, or None."""
    return "MPS has no float64" if device.type == "mps" else None


def workspace(rows: int, n: int, dim: int, ref_limbs: int, limbs: int) -> int:
    """Bytes the stages allocate at most for `rows` samples with `n` references."""
    logit, value, reference = 96 + 8 * ref_limbs, 64 + 24 * ref_limbs, 16 * dim
    return rows * (logit * n + value * dim) + reference * n


def prepare(data: Tensor, limbs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Float references [n, d] in fixed point: values int8 [R, n, d], norms [n], scale a []."""
    low, high = torch.aminmax(data)  # NaN and infinity pass through
    largest = torch.maximum(low.abs(), high.abs()).double()
    finite = torch.isfinite(largest)
    exponent = ar.fixed_point_exponent(torch.where(finite, largest, 0.0), limbs)
    values = torch.empty((limbs, *data.shape), dtype=torch.int8, device=data.device)
    for part in _parts(*data.shape):
        v = torch.round(data[part].double() * ar.power_of_two(-exponent))
        v = torch.where(finite, v, 0.0).to(torch.int64)
        values[:, part] = ar.split_limbs(v, limbs)
    scale = torch.where(finite, ar.power_of_two(exponent), torch.nan)
    return values, norms(values, 0.0), scale


def norms(values: Tensor, twice_offset: float) -> Tensor:
    """N_k = sum_j v_kj^2 + 2 (b/a) sum_j v_kj in float64 [n].

    Args:
        values: int8 [R, n, d]
        twice_offset: 2 b / a
    """
    out = torch.empty(values.shape[1], dtype=torch.float64, device=values.device)
    for part in _parts(*values.shape[1:]):
        halves = [join_limbs(half) for half in values[:, part].split(2)]
        square = sum_of_squares(*halves)
        total = halves[0].sum(1).double()
        if len(halves) == 2:
            total = halves[1].sum(1).double() * 2.0**16 + total
        out[part] = square + twice_offset * total
    return out


def _parts(rows: int, dim: int) -> Iterator[slice]:
    """Slices that cover the rows, of at most PREPARE_ELEMENTS values each."""
    size = max(1, PREPARE_ELEMENTS // dim)
    return (slice(start, start + size) for start in range(0, rows, size))


def transpose(values: Tensor) -> Tensor | None:
    """The copy [R, d, n padded to 128] of the references that stage 4 multiplies, if it does."""
    return None


def join_limbs(digits: Tensor) -> Tensor:
    """int64 values [...] of balanced base-256 digits [L, ...], least significant first."""
    out = digits[-1].to(torch.int64)
    for digit in digits.flip(0)[1:]:
        out = out * ar.LIMB_RADIX + digit
    return out


def split_halves(q: Tensor) -> tuple[Tensor, Tensor]:
    """l and h of int64 q = 2^16 h + l, |q| < 2^31: 16 bits each, balanced."""
    low = ((q + 2**15) & (2**16 - 1)) - 2**15
    return low, (q - low) >> 16


def sum_of_squares(low: Tensor, high: Tensor | None = None) -> Tensor:
    """sum_j (2^16 h_ij + l_ij)^2 in float64 [m], from three sums that are exact in int64."""
    square = (low * low).sum(1).double()
    if high is None:
        return square
    upper = (high * high).sum(1).double() * 2.0**32
    return (upper + (high * low).sum(1).double() * 2.0**17) + square


def exact_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for int64 a [m, k], |a| < 2^31, and int8 b [k, n]: exact int64 [m, n].

    float64 adds integers exactly, in any order, below 2^53: a 16-bit half of a times an int8
    stays below 2^22, so up to 2^31 terms are safe.
    """
    low, high = split_halves(a)
    b = b.double()
    return (high.double() @ b).to(torch.int64) * 2**16 + (low.double() @ b).to(torch.int64)


def to_double(parts: Tensor) -> Tensor:
    """Sums over reference limbs, int64 [m, R, ...], as float64 [m, ...], by Horner from the top."""
    out = parts[:, -1].double()
    for limb in range(parts.shape[1] - 2, -1, -1):
        out = out * float(ar.LIMB_RADIX) + parts[:, limb].double()
    return out


def quantize(x: Tensor, limbs: int) -> tuple[Tensor, Tensor]:
    """Stage 1: q = rint(x / step), int64 [B, d], and step [B], NaN for a row that is not finite."""
    largest = x.abs().amax(1).double()
    finite = torch.isfinite(largest)
    exponent = ar.fixed_point_exponent(torch.where(finite, largest, 0.0), limbs)
    q = torch.round(x.double() * ar.power_of_two(-exponent)[:, None])
    q = torch.where(finite[:, None], q, 0.0).to(torch.int64)
    return q, torch.where(finite, ar.power_of_two(exponent), torch.nan)


def coefficients(
    queries: Queries, q: Tensor, step: Tensor, affine: Tensor, distances: bool
) -> Samples:
    """What each row is multiplied by in stages 2 and 5.

    Args:
        q, step: as `quantize` returns them
        affine: a, b of the references
        distances: whether ||x - alpha b||^2 is asked for; Student-t noise always needs it
    """
    x, sigma, alpha, D, labels, kind, parameters = queries
    scale, offset = affine
    slope, curvature = ar.logit_coefficients(sigma, alpha, scale, D)
    c_D, c_x = parameterization.coefficients(kind, sigma, alpha, parameters)
    samples = Samples(x, q, slope * step, curvature, c_D, c_x, labels)
    if D is None and not distances:
        return samples
    distance = squared_distance(q, step, alpha * offset)
    if D is None:
        return samples._replace(distance=distance)
    student = distance / ar.spread(sigma, D), 0.5 * (x.shape[1] + D)
    return samples._replace(distance=distance, student=student)


def logits(
    samples: Samples, refs: Prepared, floor: Tensor | float | None = None
) -> tuple[Tensor, Tensor]:
    """Stage 2: r float32 [B, n] relative to anchors m float64 [B, ceil(n / 128)], in log2 units.

    Args:
        floor: a lower bound of the row's largest logit over all references, float64 [B], or -inf
            if nothing is known; None for all logits, exact. With it a backend may leave a block
            out, as one of anchor -inf, if no logit in it comes within EXP2_FLOOR + 1 of `floor`.
            No bit of a target depends on it.
    """
    dot = to_double(torch.stack([exact_product(samples.q, v.T) for v in refs.values], 1))
    logit = samples.slope[:, None] * dot - samples.curvature[:, None] * refs.norms
    if samples.student is not None:
        offset, exponent = samples.student
        u = offset[:, None] - logit
        logit = -exponent[:, None] * ar.log2_1p(torch.where(u < 0, 0.0, u))
    if refs.bias is not None:
        logit = logit + refs.bias
    if samples.labels is not None:
        seen = (samples.labels[:, None] == refs.labels) | (samples.labels[:, None] == -1)
        logit = torch.where(seen, logit, -torch.inf)
    rows, n = logit.shape
    blocks = -(-n // ar.BLOCK)
    logit = torch.nn.functional.pad(logit, (0, blocks * ar.BLOCK - n), value=-torch.inf)
    logit = logit.view(rows, blocks, ar.BLOCK)
    anchors = logit.amax(2)
    anchored = torch.where(anchors == -torch.inf, 0.0, anchors)  # -inf - 0, not -inf - -inf
    relative = (logit - anchored[:, :, None]).float()
    return relative.view(rows, -1)[:, :n], anchors


def weights(
    relative: Tensor, anchors: Tensor, peak: Tensor, precision: str, statistics: bool
) -> Weights:
    """Stage 3: integer weights P [B, n] = rint(2^e S) and their sum; the statistics' sums.

    Args:
        relative, anchors: as `logits` returns them
        peak: the largest logit of the row over all references, float64 [B]
    """
    shift = (anchors - peak[:, None]).repeat_interleave(ar.BLOCK, 1)[:, : relative.shape[1]]
    e = relative.double() + shift
    alive = (e >= -ar.EXP2_FLOOR) & torch.isfinite(peak)[:, None]
    e = torch.where(alive, e, 0.0)
    k = torch.round(e)
    f = e - k
    p = torch.full_like(f, ar.EXP2_COEFFICIENTS[-1])
    for c in ar.EXP2_COEFFICIENTS[-2::-1]:
        p = p * f
        p = p + c
    p = torch.where(alive, p * ar.power_of_two(k), 0.0)
    weight = torch.round(p * float(ar.limit(ar.LIMBS[precision])))
    total = weight.to(torch.int64).sum(1)
    if not statistics:
        return Weights(weight.to(torch.int64), total)
    square = torch.round(weight * weight * 2.0**-ar.SQUARE_SHIFT).to(torch.int64).sum(1)
    bits = torch.round(weight * -e * 2.0**ar.ENTROPY_SHIFT).to(torch.int64).sum(1)
    lost = torch.where(weight == 0, torch.round(p * 2.0**ar.LOST_SHIFT), 0.0)
    largest = alive & (e == 0)
    argmax = torch.where(largest.any(1), largest.int().argmax(1), -1)
    return Weights(weight.to(torch.int64), total, square, bits, lost.to(torch.int64).sum(1), argmax)


def weighted_sum(weights: Weights, values: Tensor, columns: Tensor | None = None) -> Tensor:
    """Stage 4: sum_k P_ik v_kj for each reference limb, exact int64 [B, R, d]."""
    return torch.stack([exact_product(weights.weight, v) for v in values], 1)


def finish(num: Tensor, total: Tensor, affine: Tensor, samples: Samples, out: Tensor) -> None:
    """Stage 5: out = c_D D + c_x x with D = a num / total + b, rounded once to out's type."""
    scale, offset = affine
    denoised = scale * (to_double(num) / total.double()[:, None]) + offset
    target = samples.c_D[:, None] * denoised + samples.c_x[:, None] * samples.x.double()
    out.copy_(target)


def squared_distance(q: Tensor, step: Tensor, offset: Tensor) -> Tensor:
    """sum_j (step_i q_ij - offset_i)^2 in float64 [B], from sums of integers, which have no order.

    Args:
        q, step: as `quantize` returns them
        offset: float64 [B]
    """
    dim = q.shape[1]
    square = sum_of_squares(*split_halves(q))
    mean = offset / step
    return step * step * (square - 2 * mean * q.sum(1).double() + dim * (mean * mean))
