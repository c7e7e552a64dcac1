"""The numbers of the specification (MATH.md), written once; every backend takes them from here."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

LIMB_BITS = 8
LIMB_RADIX = 1 << LIMB_BITS
LIMBS = {"exact": 4, "fast": 3}  # digits of a sample and of a weight, by precision
MAX_LIMBS = 4

# References are anchored in blocks of this many, counted by their index in the whole set.
BLOCK = 128

# An int8 x int8 product summed this often stays inside int32: 128 * 128 * 131071 < 2^31.
MAX_INT32_TERMS = 131071

# So that int64 sums cannot overflow: 2^38 a reference in num, 2^40.1 in the entropy's sum, 2^38 a
# value in dot.
MAX_REFERENCES = 1 << 24
MAX_REFERENCES_WITH_STATS = 1 << 22
MAX_VALUES = 1 << 25

LOG2E = float.fromhex("0x1.71547652b82fep+0")
LN2 = float.fromhex("0x1.62e42fefa39efp-1")

# 2^f on [-1/2, 1/2], ascending powers: Chebyshev interpolation, relative error 1.1e-12.
EXP2_COEFFICIENTS = tuple(
    float.fromhex(c)
    for c in (
        "0x1.0p+0",
        "0x1.62e42fef84cdep-1",
        "0x1.ebfbdff823d3dp-3",
        "0x1.c6b08dd6ff15bp-5",
        "0x1.3b2ab71811a68p-7",
        "0x1.5d8745a56b832p-10",
        "0x1.4308ac96142bep-13",
        "0x1.00dc4b47df585p-16",
        "0x1.63d12d5a78103p-20",
    )
)

# log2(1 + f) / t as a polynomial in t^2, t = f / (2 + f), for 1 + f in [sqrt(1/2), sqrt(2)],
# ascending powers: Chebyshev interpolation, relative error 1.5e-17.
LOG2_COEFFICIENTS = tuple(
    float.fromhex(c)
    for c in (
        "0x1.71547652b82fep+1",
        "0x1.ec709dc3a047dp-1",
        "0x1.2776c50ee39dcp-1",
        "0x1.a61762d693934p-2",
        "0x1.484afb7a67652p-2",
        "0x1.0ca160627dbfcp-2",
        "0x1.c46e1440404d7p-3",
        "0x1.b592d3c48c41cp-3",
    )
)
SQRT_HALF_WORD = 0x3FE6A09E667F3BCD  # the bits of the float64 nearest to sqrt(1/2)
ONE_WORD = 0x3FF0000000000000

# Below 2^-EXP2_FLOOR of its row's largest a weight is zero in every precision.
EXP2_FLOOR = 63

# Fixed-point positions of the statistics (MATH.md, section 7).
SQUARE_SHIFT = 24
ENTROPY_SHIFT = 10
LOST_SHIFT = 62
NORM_LIMBS = 6


def limit(limbs: int) -> int:
    """The largest magnitude that `limbs` balanced base-256 digits hold on both sides of zero."""
    return 127 * ((LIMB_RADIX**limbs - 1) // (LIMB_RADIX - 1))


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in float64, exact for integer exponents in [-1022, 1023]."""
    return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)


def fixed_point_exponent(largest: Tensor, limbs: int) -> Tensor:
    """The smallest e with largest <= 2^e * limit(limbs), at least -1022; 0 for largest = 0.

    Args:
        largest: magnitudes to be covered, float64, finite and >= 0, any shape
    """
    mantissa, exponent = torch.frexp(largest)  # largest = mantissa * 2^exponent, in [1/2, 1)
    bits = LIMB_BITS * limbs - 1
    e = exponent.to(torch.int64) - bits + (mantissa * 2.0**bits > limit(limbs)).to(torch.int64)
    return torch.where(largest > 0, e.clamp_min(-1022), 0)


def sqrt(x: Tensor) -> Tensor:
    """The float64 nearest to the square root, which torch.sqrt on a CPU may miss.

    MKL's is another one in one case of a hundred; NumPy's, and that of a GPU, are IEEE's.
    """
    if x.device.type != "cpu":
        return torch.sqrt(x)
    with np.errstate(invalid="ignore"):
        return torch.as_tensor(np.sqrt(x.numpy()))


def split_limbs(q: Tensor, limbs: int) -> Tensor:
    """Balanced base-256 digits of int64 `q`, least significant first, int8 [limbs, *q.shape].

    They are the bytes of q + 128 (1 + 256 + ...), each less 128.
    """
    half = LIMB_RADIX // 2
    raised = q.contiguous() + half * ((LIMB_RADIX**limbs - 1) // (LIMB_RADIX - 1))
    digits = raised[..., None].view(torch.uint8)[..., :limbs]  # of a little-endian machine
    return (digits ^ half).view(torch.int8).movedim(-1, 0).contiguous()


def log2_1p(u: Tensor) -> Tensor:
    """log2(1 + u) in float64 for u >= 0: k + t P(t^2) with 1 + u = 2^k (1 + f), t = f / (2 + f).

    The relative error is a few 2^-53 for u below 2^1022; NaN for NaN and for infinity.
    """
    word = (1.0 + u).view(torch.int64)
    k = ((word + (ONE_WORD - SQRT_HALF_WORD)) >> 52) - 1023
    f = (u - (power_of_two(k) - 1.0)) * power_of_two(-k)
    t = f / (2.0 + f)
    z = t * t
    p = torch.full_like(z, LOG2_COEFFICIENTS[-1])
    for c in LOG2_COEFFICIENTS[-2::-1]:
        p = p * z
        p = p + c
    return k.double() + t * p


def spread(sigma: Tensor, D: Tensor | None = None) -> Tensor:
    """sigma^2, or sigma^2 D of Student-t noise; NaN where sigma (or D) is not positive."""
    sigma = torch.where(sigma > 0, sigma, torch.nan)
    variance = sigma * sigma
    return variance if D is None else variance * torch.where(D > 0, D, torch.nan)


def logit_coefficients(
    sigma: Tensor, alpha: Tensor, scale: Tensor, D: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A_i and C_i of (A_i step_i) dot_ik - C_i N_k; NaN where sigma (or D) is not positive.

    For Gaussian noise that is the logit in log2 units; for Student-t noise it is what the
    reference takes off ||x - alpha b||^2 / (sigma^2 D).

    Args:
        sigma, alpha: float64 [B]
        scale: a, the references' step, float64 []
        D: of Student-t noise, float64 [B]; None for Gaussian noise
    """
    width = spread(sigma, D)
    slope = alpha * scale
    if D is None:
        return LOG2E * slope / width, 0.5 * LOG2E * slope * slope / width
    return 2.0 * slope / width, slope * slope / width
