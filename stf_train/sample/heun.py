"""Heun's method for the probability flow ODE, with the churn of EDM."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stf_train.process import Denoiser, Path, SigmaTime
from stf_train.sample.state import Counted, Sample, at, check_gaussian, check_times


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
        """gamma = min(S_churn / N, sqrt(2) - 1) for finite sigma in [S_min, S_max], else 0."""
        inside = self.S_min <= sigma <= self.S_max and sigma < math.inf
        return min(self.S_churn / steps, math.sqrt(2) - 1) if inside else 0.0


ODE = Churn()
SIGMA = SigmaTime()


@torch.no_grad()
def heun(
    denoise: Denoiser,
    randn: Callable[[], Tensor],
    t: Sequence[float],
    churn: Churn = ODE,
    *,
    process: Path = SIGMA,
) -> Iterator[Sample]:
    """Integrates dx/dt = alpha' D + sigma' (x - alpha D) / sigma from t[0] to t[N].

    With the process of EDM, alpha = 1 and sigma = t, this is dx/dsigma = (x - D) / sigma. Another
    process is integrated in its own time; to take EDM's steps with it, hand over its denoiser as
    `process.in_sigma(denoise)` and leave `process` alone.

    Args:
        denoise: D(x; t), the denoiser.
        randn: a source of noise of unit scale, [B, *shape] float64 on the denoiser's device:
            called once for the start, and once for each step with churn.
        t: N + 1 times from noise to data, see `sigma_steps`; at t[N] there may be no noise left.
        churn: the noise added and removed again; none by default.
        process: alpha and sigma.

    Yields:
        The state before the first step and after each of the N steps.

    Raises:
        ValueError: the times do not run from noise to data; churn with noise that is not Gaussian.

    Source: Karras et al. 2022, Algorithm 2; without churn, Algorithm 1.
    """
    check_times(process, t)
    if churn.S_churn > 0:
        check_gaussian(process, "churn")
    N = len(t) - 1
    D = Counted(denoise)

    def slope(x: Tensor, time: float) -> Tensor:
        return process.velocity(D(x, time), x, at(x, time))

    x = randn().double()
    x = process.sigma(at(x, t[0])) * x
    yield Sample(0, t[0], x, D.evaluations)
    for i in range(N):
        # Raise the noise from t_i to t_hat.
        now, t_hat = at(x, t[i]), t[i]
        ratio = process.sigma(now) / process.alpha(now)
        gamma = churn.gamma(ratio.flatten()[0].item(), N)
        if gamma > 0:
            raised = process.time((1 + gamma) * ratio)
            a, v = process.transition(now, raised)
            x = a * x + v.sqrt() * churn.S_noise * randn().double()
            t_hat = raised.flatten()[0].item()
        # Euler step from t_hat to t_{i+1}.
        d = slope(x, t_hat)
        x_next = x + (t[i + 1] - t_hat) * d
        # Second-order correction, where there is a slope at t_{i+1}.
        if process.sigma(at(x, t[i + 1])).flatten()[0] > 0:
            x_next = x + (t[i + 1] - t_hat) * (d + slope(x_next, t[i + 1])) / 2
        x = x_next
        yield Sample(i + 1, t[i + 1], x, D.evaluations)
