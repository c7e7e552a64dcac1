"""Heun's method for the probability flow ODE, with the churn of EDM."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# D(x [B, *shape] float64, sigma [B, 1, ...] float64) -> [B, *shape]
Denoiser = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Churn:
    """How much noise is added before a step: none for S_churn = 0, the deterministic ODE."""

    S_churn: float = 0.0
    S_min: float = 0.0
    S_max: float = math.inf
    S_noise: float = 1.0

    def __post_init__(self) -> None:
        for name in ("S_churn", "S_min", "S_max", "S_noise"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")

    def gamma(self, sigma: float, steps: int) -> float:
        """gamma = min(S_churn / N, sqrt(2) - 1) for sigma in [S_min, S_max], else 0."""
        inside = self.S_min <= sigma <= self.S_max
        return min(self.S_churn / steps, math.sqrt(2) - 1) if inside else 0.0


ODE = Churn()
STEPS, SIGMA_MIN, SIGMA_MAX, RHO = 18, 0.002, 80.0, 7.0  # what EDM takes for 32x32 images


@dataclass(frozen=True)
class Sample:
    """The state after a step of the sampler."""

    step: int  # steps done, 0..N
    sigma: float  # noise level of x
    x: Tensor  # [B, *shape] float64
    evaluations: int  # network evaluations so far


def sigma_steps(
    steps: int = STEPS,
    sigma_min: float = SIGMA_MIN,
    sigma_max: float = SIGMA_MAX,
    rho: float = RHO,
) -> list[float]:
    """t_i = (sigma_max^(1/rho) + i/(N-1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho, and t_N = 0.

    Returns:
        N + 1 falling noise levels.

    Source: Karras et al. 2022, Equation 5.
    """
    if steps < 2:
        raise ValueError(f"steps must be at least 2, got {steps}")
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"sigma_min must lie in (0, sigma_max = {sigma_max}), got {sigma_min}")
    top, bottom = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return [(top + i / (steps - 1) * (bottom - top)) ** rho for i in range(steps)] + [0.0]


def seeded(seeds: Sequence[int], shape: Sequence[int], device: str = "cpu") -> Callable[[], Tensor]:
    """A source of standard normal noise, [len(seeds), *shape] float64, one generator per sample.

    A sample depends on its own seed alone, not on the others that are drawn beside it, nor on the
    device, for the generators are on the CPU.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def randn() -> Tensor:
        noise = [torch.randn(*shape, generator=g, dtype=torch.float64) for g in generators]
        return torch.stack(noise).to(device)

    return randn


@torch.no_grad()
def heun(
    denoise: Denoiser, randn: Callable[[], Tensor], t: Sequence[float], churn: Churn = ODE
) -> Iterator[Sample]:
    """Integrates dx/dsigma = (x - D(x; sigma)) / sigma from t[0] to t[N] with Heun's method.

    Args:
        denoise: D(x; sigma), the denoiser.
        randn: a source of standard normal noise, [B, *shape] float64 on the denoiser's device:
            called once for the start, and once for each step with churn.
        t: N + 1 falling noise levels, see `sigma_steps`; t[N] may be 0.
        churn: the noise added and removed again; none by default.

    Yields:
        The state before the first step and after each of the N steps.

    Source: Karras et al. 2022, Algorithm 2; without churn, Algorithm 1.
    """
    N = len(t) - 1
    evaluations = 0

    def slope(x: Tensor, sigma: float) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        level = x.new_full([len(x)] + [1] * (x.ndim - 1), sigma)
        return (x - denoise(x, level).double()) / sigma

    x = t[0] * randn().double()
    yield Sample(0, t[0], x, evaluations)
    for i in range(N):
        # Raise the noise from t_i to t_hat.
        t_hat = t[i] * (1 + churn.gamma(t[i], N))
        if t_hat > t[i]:
            x = x + math.sqrt(t_hat**2 - t[i] ** 2) * churn.S_noise * randn().double()
        # Euler step from t_hat to t_{i+1}.
        d = slope(x, t_hat)
        x_next = x + (t[i + 1] - t_hat) * d
        # Second-order correction, where there is a slope at t_{i+1}.
        if t[i + 1] > 0:
            x_next = x + (t[i + 1] - t_hat) * (d + slope(x_next, t[i + 1])) / 2
        x = x_next
        yield Sample(i + 1, t[i + 1], x, evaluations)
