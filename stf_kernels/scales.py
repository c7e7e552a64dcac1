"""The noise levels that suit a set: its largest pairwise distance and its standard deviation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import arithmetic as ar
from .backends import resolve
from .neighbours import ROUNDING, at_least
from .references import References
from .stages import Prepared, Samples
from .torch_backend import join_limbs, split_halves, sum_of_squares

SUMMED_AT_ONCE = 1 << 22  # values as int64
COMPARED_AT_ONCE = 1 << 25  # values as int8
QUERIES = 256  # references whose distances to the others are taken in one go
PAIRS = 1 << 6  # measured at a time


def sigma_max(refs: References) -> float:
    """The largest distance between two references: a largest noise level that mixes them all.

        sigma_max = max_kl ||y_k - y_l||

    It is exact. References are taken from the outside in, a few hundred at a time against all the
    others that may be farther away than the farthest pair so far (by the triangle inequality about
    the mean), so a set with a few outlying references takes about n d operations, one on a sphere
    n^2 d. Labels and log_weight have no part in it.

    Args:
        refs: the references, wherever their values are; not a shard

    Returns:
        the distance, data units; 0 for a single reference

    Raises:
        ValueError: refs are a shard

    Source: Song, Ermon, Improved Techniques for Training Score-Based Generative Models, 2020,
    technique 1.
    """
    _check_whole(refs)
    stages = resolve("auto", refs.device)
    values, n = refs._values, len(refs)
    limbs = max(ar.LIMBS["fast"], values.limbs)  # hold every v
    size = ar.BLOCK * max(1, COMPARED_AT_ONCE // (ar.BLOCK * values.limbs * values.dim))
    radius, square = _about_the_mean(refs)
    rounding = ROUNDING * values.limbs * 4 * square.amax()  # no term of stage 2 exceeds the rest
    waiting = torch.ones(n, dtype=torch.bool, device=refs.device)
    best = torch.zeros((), dtype=torch.float64, device=refs.device)
    for index in radius.argsort(descending=True).split(QUERIES):
        if 2 * radius[index[0]] <= best.sqrt():
            break  # for all that are waiting
        v = join_limbs(values.gather(index))
        q, step = stages.quantize(v.double(), limbs)
        one = torch.ones_like(step)
        # Stage 2 returns ||v_l||^2 - 2 v_k . v_l: the squared distance less ||v_k||^2.
        samples = Samples(v.double(), q, -2 * step, -one, one, one, None)
        first = 0
        for chunk in values.chunks(size):
            part = slice(first, first + chunk.shape[1])
            first = part.stop
            far = waiting[part] & (radius[part] + radius[index[0]] > best.sqrt())
            column = far.nonzero()[:, 0]
            if len(column) == 0:
                continue
            others = chunk if len(column) == chunk.shape[1] else chunk.index_select(1, column)
            prepared = Prepared(others, square[part][column], refs._affine, None, None)
            logits = stages.logits(samples, prepared)
            most = torch.maximum(best, (logits[1].amax(1) + square[index]).amax())
            for row, other in at_least(*logits, most - 2 * rounding - square[index]):
                for i, k in zip(row.split(PAIRS), other.split(PAIRS), strict=True):
                    difference = v[i] - join_limbs(others[:, k])
                    best = torch.maximum(best, sum_of_squares(*split_halves(difference)).amax())
        waiting[index] = False
    return float(refs._affine[0]) * math.sqrt(float(best))


def sigma_data(refs: References) -> float:
    """The standard deviation of all values about their mean, exact but for the last rounding.

        sigma_data = sqrt( mean_kj (y_kj - mean)^2 ),    mean = mean_kj y_kj

    Labels and log_weight have no part in it.

    Args:
        refs: the references, wherever their values are; not a shard

    Returns:
        the deviation, data units

    Raises:
        ValueError: refs are a shard

    Source: Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models, 2022,
    section 5.
    """
    _check_whole(refs)
    count = len(refs) * refs._values.dim
    total = square = 0
    for chunk in refs._values.chunks(_summed(refs)):
        low, high = split_halves(join_limbs(chunk))
        total += (int(high.sum()) << 16) + int(low.sum())
        square += (int((high * high).sum()) << 32) + (int((high * low).sum()) << 17)
        square += int((low * low).sum())
    return float(refs._affine[0]) * math.sqrt(count * square - total * total) / count


def _check_whole(refs: References) -> None:
    if not isinstance(refs, References):
        raise TypeError(f"refs must be References, got {type(refs).__name__}")
    if refs._shard is not None:
        raise ValueError(f"refs must be a whole set, got a shard, {refs}")


def _summed(refs: References) -> int:
    """References in a chunk of int64."""
    return ar.BLOCK * max(1, SUMMED_AT_ONCE // (ar.BLOCK * refs._values.dim))


def _about_the_mean(refs: References) -> tuple[Tensor, Tensor]:
    """At least the distance of each v_k from a point near the mean, and ||v_k||^2, float64 [n]."""
    size = _summed(refs)
    total = torch.zeros(refs._values.dim, dtype=torch.int64, device=refs.device)
    for chunk in refs._values.chunks(size):
        total += join_limbs(chunk).sum(0)
    mean = torch.round(total.double() / len(refs)).to(torch.int64)
    radius, square = [], []
    for chunk in refs._values.chunks(size):
        v = join_limbs(chunk)
        square.append(sum_of_squares(*split_halves(v)))
        radius.append(sum_of_squares(*split_halves(v - mean)).sqrt())
    # The square root is rounded, and the sum under it a few times.
    return torch.cat(radius) * (1 + 2.0**-48), torch.cat(square)
