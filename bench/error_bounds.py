"""The bounds of docs/method.md beside the errors they bound: `python -m bench.error_bounds`.

Every rounding of the specification is taken alone, from its own intermediate results, and compared
with its bound for noise levels from .002 to 80; so is the whole. References are photograph patches
and near-duplicates of some of them, samples lie about either. The exit status is 1 where an error
exceeds its bound. `--write` puts the tables into docs/method.md.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench.problems import photographs
from bench.provenance import ROOT
from stf_kernels import References, oracle, stable_target
from stf_kernels import arithmetic as ar
from stf_kernels import torch_backend as spec
from stf_kernels.stages import Prepared, Samples

NOTE = ROOT / "docs" / "method.md"
LO, HI = -1.0, 1.0
SIGMAS = torch.logspace(np.log10(0.002), np.log10(80.0), 12, dtype=torch.float64)
ROWS = 6  # at each noise level
FAMILIES, COPIES = 8, 32

U32, U64 = 2.0**-24, 2.0**-53
FLOAT64_OPERATIONS = 16  # at most so many roundings of each term of a logit
FINISH_OPERATIONS = 8
EXP2_ERROR = 1.1e-12 + (18 + 2 * ar.EXP2_FLOOR) * U64  # polynomial, Horner's rule, the exponent
ROUNDINGS = ("sample", "float64", "float32", "weights")
TINY = 1e-15  # what the tables show as 0
wide = np.longdouble  # 64 bits of mantissa on x86-64


class Problem(NamedTuple):
    """Samples about half of the references, and about near-duplicates of the others."""

    x: Tensor  # float32 [B, d]
    sigma: Tensor  # float64 [B]
    data: Tensor  # uint8 [n, d]

    @property
    def y(self) -> Tensor:
        return LO + (HI - LO) * self.data.double() / 255


class Error(NamedTuple):
    """Relative errors of the score, max over the rows of a noise level, and their bounds."""

    measured: Tensor  # [levels]
    bound: Tensor  # [levels]


def problem(size: int = 32, rows: int = ROWS, seed: int = 0) -> Problem:
    """256 patches and 256 near-duplicates, one to three of whose bytes are one level off.

    The duplicated patches are those with most values about 0, which a sample's grid rounds.

    Args:
        size: height and width of a patch
        rows: samples at each noise level
    """
    generator = torch.Generator().manual_seed(seed)
    patches = photographs(1, FAMILIES * COPIES, size).data.flatten(1)
    grey = ((2 * patches.int() - 255).abs() == 1).sum(1)  # nearest 0, where the grid is coarsest
    families = patches[grey.argsort(descending=True, stable=True)[:FAMILIES]]
    copies = families.repeat_interleave(COPIES, 0).int()
    count = torch.randint(1, 4, (len(copies), 1), generator=generator)
    place = torch.rand(copies.shape, generator=generator).argsort(1).argsort(1) < count
    sign = 2 * torch.randint(0, 2, copies.shape, generator=generator) - 1
    copies = (copies + place * sign).clamp(0, 255).to(torch.uint8)
    data = torch.cat([patches, copies])
    sigma = SIGMAS.repeat_interleave(rows)
    source = torch.randint(0, len(patches), (len(sigma),), generator=generator)
    source[::2] += len(patches)
    noise = torch.randn(len(sigma), data.shape[1], dtype=torch.float64, generator=generator)
    clean = LO + (HI - LO) * data[source].double() / 255
    return Problem((clean + sigma[:, None] * noise).float(), sigma, data)


def errors(given: Problem, precision: str) -> dict[str, Error]:
    """Each rounding's error and bound by name; then all before the last, the last, and the whole.

    What is moved is the logit (in nats) by eta_k, or the weight e^(logit - largest) by rho_k; D
    moves by sum_k p_k (e^eta_k - 1) (y_k - D) / sum_k p_k e^eta_k, or sum_k rho_k (y_k - D) / ...
    """
    x, sigma, y = given.x.double(), given.sigma, given.y
    variance, width = (sigma**2)[:, None], x.shape[1] ** 0.5
    logit, w = oracle.posterior(x, y, sigma)
    denoised = w @ y
    spread = torch.cdist(denoised, y, compute_mode="donot_use_mm_for_euclid_dist")
    p = torch.exp(logit - logit.amax(1, keepdim=True))
    score_norm = (denoised - x).norm(dim=1)  # times 1 / sigma^2

    refs = References(given.data, value_range=(LO, HI))
    values, limbs = refs._values.load(), ar.LIMBS[precision]
    scale = refs._affine[0]
    q, step = spec.quantize(given.x, limbs)
    slope, curvature = ar.logit_coefficients(sigma, torch.ones_like(sigma), scale)
    samples = Samples(given.x, q, slope * step, curvature, sigma, sigma, None)
    relative, anchors = spec.logits(
        samples, Prepared(values, refs._norms, refs._affine, None, None)
    )
    peak = anchors.amax(1)
    weight = spec.weights(relative, anchors, peak, precision, False).weight
    dot = spec.exact_product(q, values[0].T)
    logit64 = samples.slope[:, None] * dot.double() - curvature[:, None] * refs._norms
    terms = (samples.slope[:, None] * dot.double()).abs() + curvature[:, None] * refs._norms.abs()
    anchor = anchors.repeat_interleave(ar.BLOCK, 1)[:, : len(y)]

    # 1: x becomes step q. What is the same for all references does not count.
    lost = x - step[:, None] * q.double()
    eta = {"sample": -(lost @ y.T - (lost * denoised).sum(1, keepdim=True)) / variance}
    inexact = (given.x.abs() < 2.0**23 * step[:, None]).sum(1, keepdim=True)  # float32 is finer
    most = {"sample": 0.5 * step[:, None] * inexact.sqrt() * spread / variance}
    # 2: the logit, in float64.
    eta["float64"] = ar.LN2 * _narrow(_wide(logit64) - _logit(given, step, dot))
    most["float64"] = ar.LN2 * FLOAT64_OPERATIONS * U64 * terms
    # 3: its distance from the block's anchor, in float32.
    distance = _wide(logit64) - _wide(anchor)
    eta["float32"] = ar.LN2 * _narrow(_wide(relative.double()) - distance)
    most["float32"] = ar.LN2 * U32 * (peak[:, None] - logit64)
    # 4: 2^e by a polynomial, times lim(L), to an integer; the smallest become 0.
    e = _wide(relative.double()) + (_wide(anchor) - _wide(peak[:, None]))
    grain = 0.5 / ar.limit(limbs)
    rho = _narrow(_wide(weight.double()) / ar.limit(limbs) - np.exp2(e))
    kept = torch.exp2(_narrow(e))
    most_rho = EXP2_ERROR * kept + torch.minimum(kept, torch.full_like(kept, grain))

    rows = len(sigma) // len(SIGMAS)

    def levels(error: Tensor) -> Tensor:
        return (error / score_norm).view(-1, rows).amax(1)

    def moved(change: Tensor, total: Tensor) -> Tensor:
        """How far D moves: the norm of sum_k change_k (y_k - D) / total."""
        centre = change.sum(1, keepdim=True) * denoised
        return levels((change @ y - centre).norm(dim=1) / total.sum(1))

    def at_most(change: Tensor, total: Tensor) -> Tensor:
        within = (change * spread).sum(1) / total.sum(1).clamp_min(0)
        return levels(torch.minimum(within, spread.amax(1)))

    found = {}
    for name in ("sample", "float64", "float32"):
        factor = torch.expm1(eta[name])
        bound = torch.expm1(most[name])
        found[name] = Error(
            moved(p * factor, p * (1 + factor)), at_most(p * bound, p / (1 + bound))
        )
    found["weights"] = Error(moved(rho, kept + rho), at_most(most_rho, kept - most_rho))

    together = sum(most.values(), torch.zeros_like(p)) + 32 * U64 * spread**2 / variance
    raised = p * torch.exp(together)
    small = torch.minimum(raised, torch.full_like(raised, grain))
    change = p * torch.expm1(together) + EXP2_ERROR * raised + small
    finish = FINISH_OPERATIONS * U64 * (x.norm(dim=1) + denoised.norm(dim=1) + 2 * width)
    truth = (denoised - x) / variance
    before = stable_target(x, refs, sigma, precision=precision, backend="torch")
    after = stable_target(given.x, refs, sigma, precision=precision, backend="torch").double()
    found["before"] = Error(
        levels((before - truth).norm(dim=1) * sigma**2),
        at_most(change, p - change) + levels(finish),
    )
    rounding = levels((after - before).norm(dim=1) * sigma**2)
    found["result"] = Error(rounding, levels(U32 * before.norm(dim=1) * sigma**2))
    found["whole"] = Error(
        levels((after - truth).norm(dim=1) * sigma**2),
        found["before"].bound + found["result"].bound * (1 + found["before"].bound),
    )
    return found


def _logit(given: Problem, step: Tensor, dot: Tensor) -> np.ndarray:
    """What stage 2 rounds, log2 units [B, n], from its integers, to 64 bits of mantissa."""
    v = given.data.to(torch.int64) - 128
    norm = (v * v + v).sum(1)  # 2 b / a is 1 for values from -1 to 1
    scale = wide(HI - LO) / 255
    slope = scale / np.log(wide(2)) / _wide(given.sigma) ** 2
    linear = (slope * _wide(step))[:, None] * dot.numpy().astype(wide)
    return linear - (slope * scale / 2)[:, None] * norm.numpy().astype(wide)


def _wide(tensor: Tensor) -> np.ndarray:
    return tensor.numpy().astype(wide)


def _narrow(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.float64))


def normal_rounding(deviation: float) -> float:
    """Root mean square of float32's rounding of normal numbers, relative to their deviation.

    Between 2^k and 2^(k + 1) it is uniform in a unit of the last place, 2^(k - 23).
    """
    octaves = range(-40, 10)
    within = [math.erf(2.0**k / deviation / math.sqrt(2)) for k in (*octaves, octaves.stop)]
    share = [after - before for before, after in pairwise(within)]
    unit = [2.0 ** (k - 23) for k in octaves]
    return math.sqrt(sum(p * u * u / 12 for p, u in zip(share, unit, strict=True))) / deviation


def table(found: dict[str, Error], names: tuple[str, ...], levels: int) -> list[str]:
    """Markdown: `measured / bound` for each name, a line for each of the smallest noise levels."""
    head = ["sigma", *names]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for i, sigma in enumerate(SIGMAS[:levels].tolist()):
        cells = [" / ".join(_number(float(values[i])) for values in found[k]) for k in names]
        lines.append(f"| {' | '.join([f'{sigma:.3g}', *cells])} |")
    return lines


def _number(value: float) -> str:
    """Two digits, 0 below TINY."""
    return "0" if value < TINY else re.sub("e-0", "e-", f"{value:.1e}")


def write(name: str, lines: list[str]) -> None:
    """Puts a table between its marks in the note."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    text, count = re.subn(
        f"{begin}.*?{end}", "\n".join([begin, *lines, end]), NOTE.read_text(), flags=re.DOTALL
    )
    if count != 1:
        raise ValueError(f"{NOTE} must have one {begin} ... {end}, got {count}")
    NOTE.write_text(text)


def main() -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.error_bounds",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--write", action="store_true", help="put the tables into docs/method.md")
    options = parser.parse_args()
    failed = False
    for precision, size, levels in (("exact", 32, 12), ("fast", 32, 12), ("exact", 64, 4)):
        found = errors(problem(size), precision)
        failed |= any(bool((e.measured > e.bound).any()) for e in found.values())
        name = f"{precision}, d = {3 * size * size}"
        lines = table(found, COLUMNS[precision], levels)
        print(f"\n{name}: relative error of the score, measured / bound\n")
        print("\n".join(lines))
        if options.write:
            write(name, lines)
    return int(failed)


COLUMNS = {
    "exact": (*ROUNDINGS, "before", "result"),
    "fast": ("sample", "weights", "before", "whole"),
}

if __name__ == "__main__":
    sys.exit(main())
