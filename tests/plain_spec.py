"""MATH.md, read again and written down in plain Python numbers, one value at a time.

Python's int is exact and its float is IEEE float64 with every operation rounded on its own, so this
owes nothing to PyTorch or to the package. Slow: for shapes of a few thousand products.
"""

from __future__ import annotations

import math
import struct

INF, NAN = math.inf, math.nan
LOG2E = float.fromhex("0x1.71547652b82fep+0")
POLYNOMIAL = [
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
]
LOG2_POLYNOMIAL = [
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
]
SQRT_HALF = struct.unpack("<d", (0x3FE6A09E667F3BCD).to_bytes(8, "little"))[0]


def float32(x: float) -> float:
    if abs(x) == INF or x != x:
        return x
    return struct.unpack("f", struct.pack("f", x))[0]


def lim(limbs: int) -> int:
    return 127 * sum(256**i for i in range(limbs))


def step_of(largest: float, limbs: int) -> float:
    """The smallest power of two with largest <= step lim(limbs), by search."""
    if largest == 0:
        return 1.0
    step = 1.0
    while largest > step * lim(limbs):
        step *= 2
    while largest <= step / 2 * lim(limbs):
        step /= 2
    return step


def limbs_of(q: int, count: int) -> list[int]:
    digits = []
    for _ in range(count):
        digit = (q + 128) % 256 - 128
        digits.append(digit)
        q = (q - digit) // 256
    assert q == 0
    return digits


def float_references(y: list[list[float]], limbs: int) -> tuple[list[list[int]], float, float]:
    """v, a and 2 b / a of float references."""
    step = step_of(max(abs(v) for row in y for v in row), limbs)
    return [[round(v / step) for v in row] for row in y], step, 0.0


def norm(v: list[int], ratio: float, limbs: int) -> float:
    halves = [(q := limbs_of(x, limbs) + [0] * 4)[0] + 256 * q[1] for x in v]
    tops = [(x - low) // 65536 for x, low in zip(v, halves, strict=True)]
    square, total = float(sum(x * x for x in halves)), float(sum(halves))
    if limbs > 2:
        upper = float(sum(x * x for x in tops)) * 2.0**32
        cross = float(sum(x * y for x, y in zip(tops, halves, strict=True))) * 2.0**17
        square = (upper + cross) + square
        total = float(sum(tops)) * 2.0**16 + total
    return square + ratio * total


def horner(parts: list[int]) -> float:
    out = float(parts[-1])
    for part in parts[-2::-1]:
        out = out * 256.0 + float(part)
    return out


def log2_1p(u: float) -> float:
    mantissa, k = math.frexp(1.0 + u)  # in [1/2, 1)
    if mantissa < SQRT_HALF:
        k -= 1
    f = (u - (2.0**k - 1.0)) * 2.0**-k
    t = f / (2.0 + f)
    z = t * t
    p = LOG2_POLYNOMIAL[-1]
    for c in LOG2_POLYNOMIAL[-2::-1]:
        p = p * z + c
    return float(k) + t * p


def squared_distance(q: list[int], step: float, offset: float) -> float:
    """S: ||step q - offset||^2 from sums of integers."""
    q2, q1 = norm(q, 0.0, 4), float(sum(q))
    z = offset / step
    return (step * step) * ((q2 - (2.0 * z) * q1) + len(q) * (z * z))


def target_row(
    x: list[float],
    v: list[list[int]],
    ref_limbs: int,
    affine: tuple[float, float],
    ratio: float,
    sigma: float,
    alpha: float,
    coefficients: tuple[float, float],
    limbs: int,
    bias: list[float] | None = None,
    allowed: list[bool] | None = None,
    freedom: float | None = None,
) -> list[float]:
    """The target of one sample before the rounding to the output's type.

    `freedom` is D of Student-t noise, None for Gaussian noise.
    """
    dim, n = len(x), len(v)
    a, b = affine
    if not all(map(math.isfinite, x)) or not sigma > 0:
        return [NAN] * dim
    step = step_of(max(map(abs, x)), limbs)
    q = [round(value / step) for value in x]
    digits = [[limbs_of(value, ref_limbs) for value in row] for row in v]
    slope = alpha * a
    if freedom is None:
        big_a = LOG2E * slope / (sigma * sigma) * step
        big_c = LOG2E / 2 * slope * slope / (sigma * sigma)
        big_g = 0.0
    else:
        big_a = (2.0 * slope) / ((sigma * sigma) * freedom) * step
        big_c = (slope * slope) / ((sigma * sigma) * freedom)
        big_g = squared_distance(q, step, alpha * b) / ((sigma * sigma) * freedom)
    logits = []
    for k in range(n):
        dots = [sum(q[j] * digits[k][j][r] for j in range(dim)) for r in range(ref_limbs)]
        logit = big_a * horner(dots) - big_c * norm(v[k], ratio, ref_limbs)
        if freedom is not None:
            u = big_g - logit
            logit = -(0.5 * (dim + freedom)) * log2_1p(0.0 if u < 0 else u)
        if bias is not None:
            logit = logit + LOG2E * bias[k]
        logits.append(logit if allowed is None or allowed[k] else -INF)
    anchors = [max(logits[k : k + 128]) for k in range(0, n, 128)]
    peak = max(anchors)
    if not math.isfinite(peak):
        return [NAN] * dim
    weights = []
    for k, logit in enumerate(logits):
        anchor = anchors[k // 128]
        e = -INF if anchor == -INF else float32(logit - anchor) + (anchor - peak)
        if e < -63:
            weights.append(0)
            continue
        f = e - round(e)
        p = POLYNOMIAL[-1]
        for c in POLYNOMIAL[-2::-1]:
            p = p * f + c
        weights.append(round(p * 2.0 ** round(e) * lim(limbs)))
    total = float(sum(weights))
    out = []
    for j in range(dim):
        num = [sum(w * digits[k][j][r] for k, w in enumerate(weights)) for r in range(ref_limbs)]
        denoised = a * (horner(num) / total) + b
        out.append(coefficients[0] * denoised + coefficients[1] * x[j])
    return out
