"""The inputs of every row: patches of real photographs, noised as EDM noises them in training."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from sklearn.datasets import load_sample_images
from torch import Tensor

from stf_kernels import References, oracle

P_MEAN, P_STD = -1.2, 1.2  # ln sigma ~ N(-1.2, 1.2^2), Karras et al. 2022, Table 1
VALUE_RANGE = (-1.0, 1.0)
CHECKED_ROWS = 8


@dataclass(frozen=True)
class Problem:
    """Noisy samples x = y[source] + sigma * noise, whose sources are among the n references."""

    x: Tensor  # [B, 3, s, s] float32
    sigma: Tensor  # [B] float32
    source: Tensor  # [B] int64
    data: Tensor  # [n, 3, s, s] uint8
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
        lo, hi = VALUE_RANGE
        y = lo + self.data.cpu().double() * ((hi - lo) / 255)  # decode() would round it to float32
        return oracle.stable_target(self.x[self.checked].cpu(), y, self.sigma[self.checked].cpu())

    def worst_error(self, score: Tensor) -> float:
        """max_i ||score_i - s_i|| / ||s_i|| over the checked rows i, s the float64 truth.

        Args:
            score: [B, 3, s, s] or [B, d]
        """
        truth = self.truth.flatten(1)
        error = score[self.checked].cpu().double().flatten(1) - truth
        return (error.norm(dim=1) / truth.norm(dim=1)).amax().item()


@lru_cache(maxsize=1)
def photographs(B: int, n: int, size: int = 32, device: str = "cpu", seed: int = 0) -> Problem:
    """B noisy samples of n patches of scikit-learn's two sample photographs, 427x640 each.

    Neighbouring positions overlap: beyond some thousands the patches hold near-duplicates, as
    photographs of one scene do.

    Args:
        B: noisy samples
        n: references
        size: s, height and width of a patch, pixels
        device: where the problem lives; drawn on the CPU, it is the same on every device
        seed: of positions, sources, noise levels and noise
    """
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.stack([torch.tensor(image) for image in load_sample_images().images])
    windows = pixels.unfold(1, size, 1).unfold(2, size, 1)  # [2, H', W', 3, s, s], a view
    image, top, left = (
        torch.randint(count, (n,), generator=generator) for count in windows.shape[:3]
    )
    data = windows[image, top, left].contiguous()
    refs = References(data, value_range=VALUE_RANGE)
    source = torch.randint(n, (B,), generator=generator)
    sigma = (P_MEAN + P_STD * torch.randn(B, generator=generator)).exp()
    noise = torch.randn((B, *data.shape[1:]), generator=generator)
    x = refs.decode(source) + sigma[:, None, None, None] * noise
    return Problem(
        x.to(device), sigma.to(device), source.to(device), data.to(device), refs.to(device)
    )
