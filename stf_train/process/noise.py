"""The distributions of the noise eps in x_t = alpha y + sigma eps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from scipy.special import gammainccinv
from torch import Tensor


class Noise(Protocol):
    """Noise of unit scale, and what `stf_kernels.stable_target` calls it."""

    @property
    def name(self) -> str:
        """The argument `noise` of `stable_target`."""

    @property
    def D(self) -> float | None:
        """The argument `D` of `stable_target`: degrees of freedom, None for Gaussian noise."""

    def draw(
        self, shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Noise [B, *shape] on the CPU, so that all devices see the same."""


@dataclass(frozen=True)
class Gaussian:
    """eps = z, standard normal."""

    name = "gaussian"
    D = None

    def draw(
        self, shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)


@dataclass(frozen=True)
class StudentT:
    """eps = z sqrt(D / chi2_D), one chi2_D for each sample: multivariate Student-t.

    It is what PFGM++ perturbs with, p(x | y) prop. to (||x - y||^2 + r^2)^(-(N + D)/2), with
    r = sigma sqrt(D) and in any number N of data dimensions. D -> infinity is Gaussian.

    Source: Xu et al., "PFGM++: Unlocking the Potential of Physics-Inspired Generative Models",
    ICML 2023, Section 3; there drawn as a direction and a radius by way of a Beta distribution.
    """

    D: float
    name = "student_t"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.D) and self.D > 0):
            raise ValueError(f"D must be finite and above 0, got {self.D}")

    def draw(
        self, shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        z = torch.randn(*shape, generator=generator, dtype=dtype)
        # By its distribution function: one number of the generator each, whatever D. u is in
        # [0, 1), where the largest values give the smallest chi2, which stays above 0.
        u = torch.rand(shape[0], generator=generator, dtype=torch.float64)
        chi2 = torch.from_numpy(2 * gammainccinv(self.D / 2, u.numpy()))
        scale = (self.D / chi2).sqrt().to(dtype)
        return z * scale.reshape(-1, *[1] * (z.ndim - 1))


GAUSSIAN = Gaussian()
