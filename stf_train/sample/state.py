"""What all samplers share: their noise, their steps in time and the states they yield."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stf_train.process import GAUSSIAN, Denoiser, Noise, Path, SigmaTime

# What EDM takes for 32x32 images.
SIGMA_MAX, SIGMA_MIN = SigmaTime().span
STEPS, RHO = 18, 7.0


@dataclass(frozen=True)
class Sample:
    """The state after a step of a sampler."""

    step: int  # steps done
    t: float  # time of x
    x: Tensor  # [B, *shape] float64
    evaluations: int  # of the denoiser so far


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


def even_steps(steps: int, start: float, end: float) -> list[float]:
    """t_i = start + i/N (end - start): N + 1 times."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    return [start + i / steps * (end - start) for i in range(steps)] + [end]


def seeded(
    seeds: Sequence[int],
    shape: Sequence[int],
    device: torch.device | str = "cpu",
    noise: Noise = GAUSSIAN,
) -> Callable[[], Tensor]:
    """A source of noise of unit scale, [len(seeds), *shape] float64, one generator per sample.

    A sample depends on its own seed alone, not on the others that are drawn beside it, nor on the
    device, for the generators are on the CPU.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def draw() -> Tensor:
        drawn = [noise.draw((1, *shape), g, torch.float64) for g in generators]
        return torch.cat(drawn).to(device)

    return draw


def at(x: Tensor, t: float) -> Tensor:
    """The time t for every sample of x, [B, 1, ...] float64."""
    return x.new_full([len(x)] + [1] * (x.ndim - 1), t)


class Counted:
    """D(x; t) in float64, its evaluations counted."""

    def __init__(self, denoise: Denoiser) -> None:
        self.denoise = denoise
        self.evaluations = 0

    def __call__(self, x: Tensor, t: float) -> Tensor:
        self.evaluations += 1
        return self.denoise(x, at(x, t)).double()


def check_times(process: Path, t: Sequence[float], *, noise_left: bool = False) -> None:
    """Refuses times that do not run from noise to data, or to the data where noise has to stay."""
    times = torch.tensor(t, dtype=torch.float64)
    # sigma / alpha as an angle, for alpha may be 0.
    angle = torch.atan2(process.sigma(times), process.alpha(times))
    if len(t) < 2 or not bool((angle.diff() < 0).all()):
        raise ValueError(
            f"t must hold at least two times, each with less noise than the one before under "
            f"{process}, got {list(t)}"
        )
    if noise_left and not angle[-1] > 0:
        raise ValueError(f"t must end where there is noise left under {process}, got {t[-1]}")


def check_gaussian(process: Path, what: str) -> None:
    """Refuses noise that does not add up: only for Gaussian noise is x_s + noise again an x_t."""
    if process.noise != GAUSSIAN:
        raise ValueError(f"{what} needs Gaussian noise, got a process with {process.noise}")
