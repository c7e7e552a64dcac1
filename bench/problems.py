"""The inputs of every row: patches of real photographs, noised as in training."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from stf_kernels import References, oracle

P_MEAN, P_STD = -1.2, 1.2  # ln sigma ~ N(-1.2, 1.2^2), Karras et al. 2022, Table 1
VALUE_RANGE = (-1.0, 1.0)
CHECKED_ROWS = 8
VE_RANGE = (0.02, 100.0)  # Song et al. 2021 for data in [0, 1], .01 to 50: twice that in [-1, 1]
T_RANGE = (1e-4, 1 - 1e-4)
LEVELS = (0.002, 80.0)  # the noise levels of EDM's sampler, Karras et al. 2022, Table 1


def edm(B: int, generator: torch.Generator) -> Tensor:
    """ln sigma ~ N(P_MEAN, P_STD^2)."""
    return (P_MEAN + P_STD * torch.randn(B, generator=generator)).exp()


def ve(B: int, generator: torch.Generator) -> Tensor:
    """ln sigma uniform over VE_RANGE."""
    lo, hi = map(math.log, VE_RANGE)
    return (lo + (hi - lo) * torch.rand(B, generator=generator)).exp()


def flow(B: int, generator: torch.Generator) -> Tensor:
    """t uniform, for the linear flow x_t = (1 - t) y + t eps: x_t / (1 - t) has sigma t / (1 - t),
    and the same posterior.
    """
    t = torch.rand(B, generator=generator).clamp(*T_RANGE)
    return t / (1 - t)


def levels(B: int, generator: torch.Generator) -> Tensor:
    """LEVELS in equal ratios, not drawn."""
    lo, hi = map(math.log10, LEVELS)
    return torch.logspace(lo, hi, B)


NOISE: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "edm": edm,
    "ve": ve,
    "flow": flow,
    "levels": levels,
}
# Of the values, and into how many int8 planes float ones are put.
REFERENCES: dict[str, tuple[torch.dtype, int | None]] = {
    "uint8": (torch.uint8, None),
    "float16": (torch.float16, 2),
    "bfloat16": (torch.bfloat16, 2),
    "float32, 2 limbs": (torch.float32, 2),
    "float32, 3 limbs": (torch.float32, 3),
    "float32": (torch.float32, None),
}


@dataclass(frozen=True)
class Problem:
    """Noisy samples x = y[source] + sigma * noise, whose sources are among the n references."""

    x: Tensor  # [B, 3, s, s] float32
    sigma: Tensor  # [B] float32
    source: Tensor  # [B] int64
    data: Tensor  # [n, 3, s, s] uint8, or floats
    refs: References  # the same n, prepared

    @property
    def device(self) -> torch.device:
        return self.x.device

    @cached_property
    def checked(self) -> Tensor:
        """The rows compared with the truth: the noise levels' extremes and even ranks between."""
        ranks = torch.linspace(0, len(self.sigma) - 1, min(CHECKED_ROWS, len(self.sigma)))
        return self.sigma.argsort()[ranks.round().long().to(self.device)]

    @cached_property
    def truth(self) -> Tensor:
        """The score of the checked rows from float64 direct differences, on the CPU."""
        return self.exactly(self.checked)

    def exactly(self, rows: Tensor) -> Tensor:
        """The score of some rows from float64 direct differences, on the CPU."""
        y = self.data.cpu().double()
        if self.data.dtype == torch.uint8:  # decode() would round it to float32
            lo, hi = VALUE_RANGE
            y.mul_((hi - lo) / 255).add_(lo)
        return oracle.stable_target(self.x[rows].cpu(), y, self.sigma[rows].cpu())

    def worst_error(self, score: Tensor) -> float:
        """max_i ||score_i - s_i|| / ||s_i|| over the checked rows i, s the float64 truth.

        Args:
            score: [B, 3, s, s] or [B, d]
        """
        return relative_error(score[self.checked], self.truth).amax().item()


def relative_error(found: Tensor, truth: Tensor) -> Tensor:
    """||found_i - t_i|| / ||t_i||, float64 [m] on the CPU.

    Args:
        found: [m, *shape], of any shape
        truth: t, float64 [m, *shape] on the CPU
    """
    truth = truth.flatten(1)
    error = found.cpu().double().flatten(1) - truth
    return error.norm(dim=1) / truth.norm(dim=1)


@lru_cache(maxsize=1)
def photographs(
    B: int,
    n: int,
    size: int = 32,
    *,
    device: str = "cpu",
    seed: int = 0,
    noise: str = "edm",
    refs: str = "uint8",
) -> Problem:
    """B noisy samples of n patches of scikit-learn's two sample photographs, 427x640 each.

    Neighbouring positions overlap: beyond some thousands the patches hold near-duplicates, as
    photographs of one scene do.

    Args:
        B: noisy samples
        n: references
        size: s, height and width of a patch, pixels
        device: where the problem lives; drawn on the CPU, it is the same on every device
        seed: of positions, sources, noise levels and noise
        noise: how the levels are distributed, of NOISE
        refs: type of the references' values, of REFERENCES
    """
    from sklearn.datasets import load_sample_images  # two seconds that a kept problem does not take

    generator = torch.Generator().manual_seed(seed)
    pixels = torch.stack([torch.tensor(image) for image in load_sample_images().images])
    windows = pixels.unfold(1, size, 1).unfold(2, size, 1)  # [2, H', W', 3, s, s], a view
    image, top, left = (
        torch.randint(count, (n,), generator=generator) for count in windows.shape[:3]
    )
    data = windows[image, top, left].contiguous()
    found = References(data, value_range=VALUE_RANGE)
    dtype, limbs = REFERENCES[refs]
    if dtype != torch.uint8:
        data = found.decode().to(dtype)
        found = References(data, limbs=limbs)
    source = torch.randint(n, (B,), generator=generator)
    sigma = NOISE[noise](B, generator)
    eps = torch.randn((B, *data.shape[1:]), generator=generator)
    x = found.decode(source) + sigma[:, None, None, None] * eps
    return Problem(
        x.to(device), sigma.to(device), source.to(device), data.to(device), found.to(device)
    )
