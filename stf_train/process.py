"""The EDM process: noise levels, loss weight and preconditioning.

Symbols and formulas are those of Karras et al., "Elucidating the Design Space of Diffusion-Based
Generative Models", NeurIPS 2022, Table 1 (rightmost column) and Section 5.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Network = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class EDM:
    """Noise x = y + sigma n with ln sigma ~ N(P_mean, P_std^2), for data of deviation sigma_data.

    Every coefficient maps noise levels [B, 1, 1, 1] to values of the same shape.
    """

    sigma_data: float
    P_mean: float = -1.2
    P_std: float = 1.2

    def __post_init__(self) -> None:
        for name in ("sigma_data", "P_std"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be finite and above 0, got {value}")
        if not math.isfinite(self.P_mean):
            raise ValueError(f"P_mean must be finite, got {self.P_mean}")

    def sigma(self, z: Tensor) -> Tensor:
        """sigma = exp(P_mean + P_std z), the noise level of a standard normal z."""
        return (self.P_mean + self.P_std * z).exp()

    def weight(self, sigma: Tensor) -> Tensor:
        """lambda(sigma) = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 = 1 / c_out(sigma)^2."""
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2

    def c_skip(self, sigma: Tensor) -> Tensor:
        """c_skip = sigma_data^2 / (sigma^2 + sigma_data^2)."""
        return self.sigma_data**2 / (sigma**2 + self.sigma_data**2)

    def c_out(self, sigma: Tensor) -> Tensor:
        """c_out = sigma sigma_data / sqrt(sigma^2 + sigma_data^2)."""
        return sigma * self.sigma_data / (sigma**2 + self.sigma_data**2).sqrt()

    def c_in(self, sigma: Tensor) -> Tensor:
        """c_in = 1 / sqrt(sigma^2 + sigma_data^2)."""
        return 1 / (sigma**2 + self.sigma_data**2).sqrt()

    def c_noise(self, sigma: Tensor) -> Tensor:
        """c_noise = ln(sigma) / 4."""
        return sigma.log() / 4

    def denoise(self, network: Network, x: Tensor, sigma: Tensor) -> Tensor:
        """The denoiser around a network F, an estimate of the posterior mean E[y | x].

            D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)

        Args:
            network: F, takes ([B, C, H, W], [B]), returns [B, C, H, W].
            x: noisy samples, [B, C, H, W].
            sigma: noise levels, [B, 1, 1, 1].

        Returns:
            The denoised samples, [B, C, H, W].

        Source: Karras et al. 2022, Equation 7.
        """
        F = network(self.c_in(sigma) * x, self.c_noise(sigma).flatten())
        return self.c_skip(sigma) * x + self.c_out(sigma) * F
