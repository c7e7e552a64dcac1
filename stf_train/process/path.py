"""The way of a sample from data to noise, x_t = alpha(t) y + sigma(t) eps: all a sampler knows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stf_train.process.noise import GAUSSIAN, Noise

# D(x; t) ([B, *shape], [B, 1, ...]) -> [B, *shape], an estimate of the posterior mean E[y | x]
Denoiser = Callable[[Tensor, Tensor], Tensor]


class Path(ABC):
    """x_t = alpha(t) y + sigma(t) eps, with sigma / alpha monotonic in t.

    Every method maps times [B, 1, ...] to values of that shape and type.
    """

    @property
    def noise(self) -> Noise:
        """The distribution of eps."""
        return GAUSSIAN

    @property
    @abstractmethod
    def span(self) -> tuple[float, float]:
        """The times from which and to which samplers go, from noise to (next to) no noise."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Signal scale."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Noise level, in the units of the data."""

    @abstractmethod
    def alpha_dot(self, t: Tensor) -> Tensor:
        """d alpha / dt."""

    @abstractmethod
    def sigma_dot(self, t: Tensor) -> Tensor:
        """d sigma / dt."""

    @abstractmethod
    def time(self, ratio: Tensor) -> Tensor:
        """The time t at which sigma / alpha has this value."""

    def velocity(self, D: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """dx/dt = alpha' D + sigma' (x - alpha D) / sigma, the probability flow.

        Source: Song et al. 2021, Equation 13; Lipman et al. 2023, Equation 15.
        """
        epsilon = (x - self.alpha(t) * D) / self.sigma(t)
        return self.alpha_dot(t) * D + self.sigma_dot(t) * epsilon

    def score(self, D: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """grad log p_t(x) = (alpha D - x) / sigma^2, for Gaussian noise."""
        return (self.alpha(t) * D - x) / self.sigma(t) ** 2

    def diffusion(self, t: Tensor) -> Tensor:
        """g^2 = |2 sigma sigma' - 2 sigma^2 alpha' / alpha|, of dx = f x dt + g dw.

        Source: Kingma et al., "Variational Diffusion Models", NeurIPS 2021.
        """
        sigma = self.sigma(t)
        return (2 * sigma * (self.sigma_dot(t) - sigma * self.alpha_dot(t) / self.alpha(t))).abs()

    def transition(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """a, v of p(x_t | x_s) = N(a x_s, v), t being the noisier of the two times.

        a = alpha_t / alpha_s,    v = sigma_t^2 - a^2 sigma_s^2
        """
        a = self.alpha(t) / self.alpha(s)
        return a, self.sigma(t) ** 2 - a**2 * self.sigma(s) ** 2

    def in_sigma(self, denoise: Denoiser) -> Denoiser:
        """The same denoiser at x / alpha and sigma / alpha, so with alpha = 1 and t = sigma.

        With it EDM's sampler, churn and all, draws from a network of any process.

        Source: Karras et al. 2022, Section 2 and Table 1.
        """

        def denoise_in_sigma(x: Tensor, sigma: Tensor) -> Tensor:
            t = self.time(sigma)
            return denoise(self.alpha(t) * x, t)

        return denoise_in_sigma


class VarianceExploding(Path):
    """alpha = 1."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def alpha_dot(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)


@dataclass(frozen=True)
class SigmaTime(VarianceExploding):
    """alpha = 1, sigma = t, from the highest noise level of EDM for 32x32 images to its lowest."""

    span = (80.0, 0.002)

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def sigma_dot(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def time(self, ratio: Tensor) -> Tensor:
        return ratio
