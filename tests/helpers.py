"""What tests share: data, float64 expectations, tolerances derived from the arithmetic."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import plain_spec
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stf_kernels import References, oracle

BACKENDS = ("torch", "cpu")
PRECISIONS = ("exact", "fast")

# Digits of a sample and of a weight, and the magnitude that many balanced bytes hold.
LIMBS = {"exact": 4, "fast": 3}
LIMIT = {limbs: 127 * sum(256**i for i in range(limbs)) for limbs in range(1, 5)}

# Relative rounding of one operation, to nearest.
HALF_ULP32 = 2.0**-24
HALF_ULP64 = 2.0**-53
# The specification's 2^f: its polynomial's relative error, and the roundings of Horner's rule.
EXP2_ERROR = 1.1e-12 + 18 * HALF_ULP64


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def byte_values(data: Tensor, lo: float = -1.0, hi: float = 1.0, levels: int = 256) -> Tensor:
    """What the levels `data` stand for, float64."""
    return lo + (hi - lo) * data.double() / (levels - 1)


def random_bytes(n: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (n, *shape), dtype=torch.uint8, generator=generator(seed))


def photograph_patches(n: int, size: int = 32, seed: int = 0) -> Tensor:
    """Patches uint8 [n, 3, size, size] of scikit-learn's two sample photographs."""
    rng = np.random.default_rng(seed)
    images = _photographs()
    patches = []
    for k in range(n):
        image = images[k % len(images)]
        top, left = (rng.integers(0, side - size + 1) for side in image.shape[:2])
        patches.append(image[top : top + size, left : left + size])
    return torch.from_numpy(np.stack(patches)).permute(0, 3, 1, 2).contiguous()


@functools.cache
def _photographs() -> list[np.ndarray]:
    return load_sample_images().images


def near_duplicates(images: Tensor, copies: int, seed: int = 0) -> Tensor:
    """`copies` of each image with one to three of its bytes moved by one level, uint8."""
    rng = np.random.default_rng(seed)
    out = images.repeat_interleave(copies, 0).flatten(1)
    for image in out:
        for j in rng.choice(image.numel(), rng.integers(1, 4), replace=False):
            image[j] += 1 if image[j] == 0 or (image[j] < 255 and rng.random() < 0.5) else -1
    return out.view(-1, *images.shape[1:])


def saved(refs: References, folder: Path) -> References:
    """The same references in a file."""
    refs.save(folder / "refs.stf")
    return References.from_file(folder / "refs.stf")


# Sets that are not one tensor, made from one that is.
ELSEWHERE: dict[str, Callable[[References, Path], References]] = {
    "file": saved,
    "flips": lambda refs, folder: refs.with_flips(),
    "flips of a file": lambda refs, folder: saved(refs, folder).with_flips(),
}


def noisy(clean: Tensor, sigma: Tensor, alpha: Tensor | float = 1.0, seed: int = 0) -> Tensor:
    """alpha clean + sigma eps, float32 of float64 clean [B, *shape]; sigma, alpha [B] or number."""
    eps = torch.randn(clean.shape, dtype=torch.float64, generator=generator(seed))
    return (per_row(alpha, clean) * clean + per_row(sigma, clean) * eps).float()


def per_row(value: Tensor | float, x: Tensor) -> Tensor:
    """A number or [B] as float64 [B, 1, ...], to be broadcast over x."""
    value = torch.as_tensor(value, dtype=torch.float64).reshape(-1).expand(len(x))
    return value.view(-1, *[1] * (x.dim() - 1))


def row_norm(x: Tensor) -> Tensor:
    return x.double().flatten(1).norm(dim=1)


class Posterior(NamedTuple):
    """The weights by the oracle, and how wrong the arithmetic allows them to be."""

    logit: Tensor  # float64 [B, n]
    w: Tensor  # [B, n]
    moved: Tensor  # [B, n]: how far a weight may move while the others stay
    spread: Tensor  # [B, n]: ||y_k - D||

    @property
    def wrong(self) -> Tensor:
        """A bound of each weight's error, [B, n]: its own, and that of what it is divided by."""
        return self.moved + self.w * self.moved.sum(1, keepdim=True)


def posterior(
    x: Tensor,
    y: Tensor,
    sigma: Tensor | float,
    alpha: Tensor | float = 1.0,
    log_weight: Tensor | None = None,
    *,
    precision: str,
    reach: float = 1.0,
    grid: float = 0.0,
    D: Tensor | float | None = None,
) -> Posterior:
    """The truth about the weights with the errors that the specification's roundings allow.

    Logits wrong by at most eta_k move weights by at most w_k (exp(eta_k) - 1) over
    sum_k w_k exp(-eta_k). What makes eta: the sample's rounding, at most max|x| / lim in each
    value; the references' likewise; the float32 logit, relative to its distance from the largest;
    the float64 operations; the polynomial. The integer weight adds half of 1 / lim of the largest.
    A Student-t logit changes with the squared distance as a Gaussian one of variance
    (sigma^2 D + distance^2) / (d + D) does; a rounding of the sample that is the same for all
    references does not cancel there.

    Args:
        x, y, sigma, alpha, log_weight, D: as `oracle.posterior` takes them
        precision: "exact" or "fast"
        reach: largest magnitude of the references' value range
        grid: how far a reference's value may be from the one computed with
    """
    logit, _ = oracle.posterior(x, y, sigma, alpha, D=D)
    distance = oracle.squared_distance(x, y, alpha).sqrt()
    x, y = x.double().flatten(1), y.double().flatten(1)
    variance, alpha = per_row(sigma, x) ** 2, per_row(alpha, x)
    limit, width = LIMIT[LIMBS[precision]], x.shape[1] ** 0.5
    if log_weight is not None:
        logit = logit + log_weight.double()
    w = torch.softmax(logit, 1)
    spread = torch.cdist(w @ y, y, compute_mode="donot_use_mm_for_euclid_dist")

    sample = width * x.abs().amax(1, keepdim=True) / limit
    size, norm = alpha.abs() * width * reach, x.norm(dim=1, keepdim=True)
    moves, operands = alpha.abs() * spread, size * norm + 2 * size**2
    if D is not None:
        freedom = per_row(D, x)
        variance = (variance * freedom + distance**2) / (x.shape[1] + freedom)
        moves, operands = distance, 4 * (norm + size) ** 2
    eta = (sample * moves + alpha.abs() * width * grid * distance) / variance
    eta = eta + 16 * HALF_ULP64 * (logit.abs().nan_to_num(posinf=0.0) if D is not None else 0)
    gap = (logit.amax(1, keepdim=True) - logit).nan_to_num(posinf=0.0)
    eta = eta + 4 * HALF_ULP64 * operands / variance + HALF_ULP32 * gap + EXP2_ERROR
    eta = eta + 32 * HALF_ULP64 * distance**2 / variance  # the oracle's own sums

    log_w = torch.log_softmax(logit, 1)
    upper, lower = torch.exp(log_w + eta), torch.exp(log_w - eta)
    vanishing = upper.amax(1, keepdim=True) / (2 * limit)
    smallest = (lower - vanishing).sum(1, keepdim=True).clamp_min(0)
    return Posterior(logit, w, (upper - w + vanishing) / smallest, spread)


def denoised_bound(x: Tensor, y: Tensor, *args: object, **options: object) -> Tensor:
    """How far from the truth D may be, Euclidean norm, float64 [B]; arguments as `posterior`.

    D moves by sum_k moved_k (y_k - D), and is never further off than one of the references.
    """
    truth = posterior(x, y, *args, **options)
    moved = torch.minimum((truth.moved * truth.spread).sum(1), truth.spread.amax(1))
    width, reach = x[0].numel() ** 0.5, options.get("reach", 1.0)
    return moved + width * options.get("grid", 0.0) + 8 * HALF_ULP64 * width * reach


def assert_rows_within(actual: Tensor, expected: Tensor, bound: Tensor | float) -> None:
    """||actual_i - expected_i|| <= bound_i for every row i."""
    assert actual.shape == expected.shape
    error = row_norm(actual.double() - expected)
    bound = torch.as_tensor(bound, dtype=torch.float64).expand(error.shape)
    i = int((error / bound).nan_to_num(nan=torch.inf).argmax())
    assert bool((error <= bound).all()), (
        f"row {i} is {error[i]:.3e} from the expectation, allowed are {bound[i]:.3e}"
    )


def references_and_plain(
    u: Tensor, limbs: int, labels: Tensor, log_weight: Tensor
) -> tuple[References, list[list[int]], tuple[float, float], float]:
    """References of bytes u (limbs 0) or of floats made from them, and what plain_spec takes.

    Returns:
        the references; v, (a, b) and 2 b / a as MATH.md defines them, in plain numbers
    """
    if limbs:
        y = u.double() / 77
        refs = References(y, limbs=limbs, labels=labels, log_weight=log_weight)
        v, a, ratio = plain_spec.float_references(y.tolist(), limbs)
        return refs, v, (a, 0.0), ratio
    refs = References(u, value_range=(-1, 2), labels=labels, log_weight=log_weight)
    a = 3 / 255
    return refs, (u.int() - 128).tolist(), (a, 128 * a - 1), 256 + (2 * -1.0 * 255) / 3


class Allocated(TorchDispatchMode):
    """Counts the bytes of all tensors made."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.seen: list[torch.Tensor] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and not any(
                tensor.untyped_storage().data_ptr() == t.untyped_storage().data_ptr()
                for t in self.seen
            ):
                self.seen.append(tensor)
                self.bytes += tensor.untyped_storage().nbytes()
        return out
