"""What a network's raw output F stands for, and how it makes a denoiser.

    D(x; t) = c_skip(t) x + c_out(t) F(c_in(t) x; c_noise(t))

The loss is written on D, ||D - target||^2. An error of F is c_out times as large in D, so an
unweighted loss on F is one of weight 1 / c_out^2 on D: that is each kind's weight, but for the
score, which is weighted with sigma^2.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from stf_train.process.path import Path


class Output(ABC):
    """A kind of output. All methods map times [B, 1, ...] of a path to values of that shape."""

    @abstractmethod
    def c_skip(self, path: Path, t: Tensor) -> Tensor:
        """The part of x in D."""

    @abstractmethod
    def c_out(self, path: Path, t: Tensor) -> Tensor:
        """The part of F in D."""

    def c_in(self, path: Path, t: Tensor) -> Tensor:
        """The scale of the network's input."""
        return torch.ones_like(t)

    def weight(self, path: Path, t: Tensor) -> Tensor:
        """The weight of ||D - target||^2."""
        return 1 / self.c_out(path, t) ** 2


@dataclass(frozen=True)
class Denoised(Output):
    """F = D."""

    def c_skip(self, path: Path, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def c_out(self, path: Path, t: Tensor) -> Tensor:
        return torch.ones_like(t)


@dataclass(frozen=True)
class Epsilon(Output):
    """F = (x - alpha D) / sigma, an estimate of the noise eps (Ho et al. 2020)."""

    def c_skip(self, path: Path, t: Tensor) -> Tensor:
        return 1 / path.alpha(t)

    def c_out(self, path: Path, t: Tensor) -> Tensor:
        return -path.sigma(t) / path.alpha(t)


@dataclass(frozen=True)
class Score(Output):
    """F = (alpha D - x) / sigma^2, the score, its error weighted with sigma^2 (Song et al. 2021).

    So weighted it is the same loss as that of `Epsilon`.
    """

    def c_skip(self, path: Path, t: Tensor) -> Tensor:
        return 1 / path.alpha(t)

    def c_out(self, path: Path, t: Tensor) -> Tensor:
        return path.sigma(t) ** 2 / path.alpha(t)

    def weight(self, path: Path, t: Tensor) -> Tensor:
        return (path.alpha(t) / path.sigma(t)) ** 2


@dataclass(frozen=True)
class V(Output):
    """F = alpha eps - sigma D (Salimans and Ho 2022)."""

    def c_skip(self, path: Path, t: Tensor) -> Tensor:
        alpha, sigma = path.alpha(t), path.sigma(t)
        return alpha / (alpha**2 + sigma**2)

    def c_out(self, path: Path, t: Tensor) -> Tensor:
        alpha, sigma = path.alpha(t), path.sigma(t)
        return -sigma / (alpha**2 + sigma**2)


@dataclass(frozen=True)
class Velocity(Output):
    """F = alpha' D + sigma' eps, what flow matching learns (Lipman et al. 2023)."""

    def c_skip(self, path: Path, t: Tensor) -> Tensor:
        return -path.sigma_dot(t) / self._wronskian(path, t)

    def c_out(self, path: Path, t: Tensor) -> Tensor:
        return path.sigma(t) / self._wronskian(path, t)

    def _wronskian(self, path: Path, t: Tensor) -> Tensor:
        return path.alpha_dot(t) * path.sigma(t) - path.sigma_dot(t) * path.alpha(t)


@dataclass(frozen=True)
class F(Output):
    """F = (D - c_skip x) / c_out, with input and output of unit variance at every noise level.

    With N = sigma^2 + alpha^2 sigma_data^2, the variance of x:

        c_skip = alpha sigma_data^2 / N,  c_out = sigma sigma_data / sqrt(N),  c_in = 1 / sqrt(N)

    Args:
        sigma_data: deviation of the data.

    Source: Karras et al. 2022, Table 1 (rightmost column), where alpha = 1.
    """

    sigma_data: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.sigma_data) and self.sigma_data > 0):
            raise ValueError(f"sigma_data must be finite and above 0, got {self.sigma_data}")

    def _variance(self, path: Path, t: Tensor) -> Tensor:
        return path.sigma(t) ** 2 + path.alpha(t) ** 2 * self.sigma_data**2

    def c_skip(self, path: Path, t: Tensor) -> Tensor:
        return path.alpha(t) * (self.sigma_data**2 / self._variance(path, t))

    def c_out(self, path: Path, t: Tensor) -> Tensor:
        return path.sigma(t) * self.sigma_data / self._variance(path, t).sqrt()

    def c_in(self, path: Path, t: Tensor) -> Tensor:
        return 1 / self._variance(path, t).sqrt()

    def weight(self, path: Path, t: Tensor) -> Tensor:
        return self._variance(path, t) / (path.sigma(t) * self.sigma_data) ** 2


# The kinds without a parameter of their own, by name.
OUTPUTS: dict[str, Output] = {
    "score": Score(),
    "epsilon": Epsilon(),
    "denoised": Denoised(),
    "v": V(),
    "velocity": Velocity(),
}
