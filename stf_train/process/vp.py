"""The variance preserving process, in continuous time and in the steps of DDPM."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from stf_train.process.base import Process
from stf_train.process.output import OUTPUTS, Output


class VariancePreserving(Process):
    """alpha^2 + sigma^2 = 1, so that log alpha and its derivative say everything."""

    @abstractmethod
    def log_alpha(self, t: Tensor) -> Tensor:
        """ln alpha, falling from 0."""

    @abstractmethod
    def log_alpha_dot(self, t: Tensor) -> Tensor:
        """d ln alpha / dt."""

    @abstractmethod
    def time_of_log_alpha(self, log_alpha: Tensor) -> Tensor:
        """The time t at which ln alpha has this value."""

    def alpha(self, t: Tensor) -> Tensor:
        return self.log_alpha(t).exp()

    def sigma(self, t: Tensor) -> Tensor:
        # sqrt(1 - alpha^2) without the cancellation at little noise.
        return (-torch.expm1(2 * self.log_alpha(t))).sqrt()

    def alpha_dot(self, t: Tensor) -> Tensor:
        return self.log_alpha_dot(t) * self.alpha(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        return -self.log_alpha_dot(t) * self.alpha(t) ** 2 / self.sigma(t)

    def time(self, ratio: Tensor) -> Tensor:
        return self.time_of_log_alpha(-torch.log1p(ratio**2) / 2)


@dataclass(frozen=True)
class VP(VariancePreserving):
    """ln alpha(t) = -t^2 (beta_max - beta_min) / 4 - t beta_min / 2, t uniform in (0, 1].

    c_noise = 999 t, the step of a network that knows 1000 of them.

    Args:
        beta_min, beta_max: beta(t) = -2 d ln alpha / dt at t = 0 and t = 1.
        output: what the network says.

    Source: Song et al., "Score-Based Generative Modeling through Stochastic Differential
    Equations", ICLR 2021, Equation 33; for data in [-1, 1].
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    output: Output = OUTPUTS["epsilon"]
    span = (1.0, 1e-3)

    def __post_init__(self) -> None:
        if not 0 < self.beta_min < self.beta_max < math.inf:
            raise ValueError(
                f"beta_min must lie in (0, beta_max = {self.beta_max}), got {self.beta_min}"
            )

    def log_alpha(self, t: Tensor) -> Tensor:
        return -(t**2) * (self.beta_max - self.beta_min) / 4 - t * self.beta_min / 2

    def log_alpha_dot(self, t: Tensor) -> Tensor:
        return -t * (self.beta_max - self.beta_min) / 2 - self.beta_min / 2

    def time_of_log_alpha(self, log_alpha: Tensor) -> Tensor:
        # The root of the quadratic that does not cancel at small t.
        slope, curvature = self.beta_min, self.beta_max - self.beta_min
        return -4 * log_alpha / (slope + (slope**2 - 4 * curvature * log_alpha).sqrt())

    def c_noise(self, t: Tensor) -> Tensor:
        return 999 * t


@dataclass(frozen=True)
class DDPM(VariancePreserving):
    """alpha(t)^2 = (1 - beta_0) ... (1 - beta_t) at the steps t = 0..T-1, beta_t linear in t.

    t = -1 is the data. Between the steps ln alpha is linear, so that every sampler has the
    derivatives and inverses it asks for. Training times are antithetic: t beside T - 1 - t.
    c_noise = t.

    Args:
        T: steps.
        beta_min, beta_max: beta_0 and beta_{T-1}.
        output: what the network says.

    Source: Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", NeurIPS 2020, Section 4.
    """

    T: int = 1000
    beta_min: float = 1e-4
    beta_max: float = 2e-2
    output: Output = OUTPUTS["epsilon"]

    def __post_init__(self) -> None:
        if self.T < 2:
            raise ValueError(f"T must be at least 2, got {self.T}")
        if not 0 < self.beta_min <= self.beta_max < 1:
            raise ValueError(
                f"beta_min must lie in (0, beta_max = {self.beta_max}], beta_max below 1, "
                f"got {self.beta_min}"
            )

    @property
    def span(self) -> tuple[float, float]:
        return float(self.T - 1), 0.0

    @cached_property
    def _table(self) -> Tensor:
        """ln alpha at t = -1..T-1, float64."""
        beta = torch.linspace(self.beta_min, self.beta_max, self.T, dtype=torch.float64)
        return torch.cat([beta.new_zeros(1), torch.log1p(-beta).cumsum(0) / 2])

    def _piece(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The step before t, and ln alpha at it and at the next, in t's type and place."""
        step = t.ceil().long().clamp(0, self.T - 1) - 1
        table = self._table.to(t.device)
        return step, table[step + 1].to(t.dtype), table[step + 2].to(t.dtype)

    def log_alpha(self, t: Tensor) -> Tensor:
        step, before, after = self._piece(t)
        return torch.lerp(before, after, t - step)

    def log_alpha_dot(self, t: Tensor) -> Tensor:
        _, before, after = self._piece(t)
        return after - before

    def time_of_log_alpha(self, log_alpha: Tensor) -> Tensor:
        table = self._table.to(log_alpha.device)
        right = torch.searchsorted(-table, -log_alpha.double()).clamp(1, self.T)
        before, after = table[right - 1], table[right]
        return (right - 2 + (log_alpha - before) / (after - before)).to(log_alpha.dtype)

    def c_noise(self, t: Tensor) -> Tensor:
        return t

    def times(self, batch: int, generator: torch.Generator) -> Tensor:
        half = torch.randint(self.T, (batch // 2 + 1,), generator=generator)
        return torch.cat([half, self.T - 1 - half])[:batch].float()
