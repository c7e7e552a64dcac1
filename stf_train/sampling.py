"""Which sampler, with which settings, on which process."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from stf_train.process import Denoiser, Process, SigmaTime
from stf_train.sample import (
    RHO,
    SIGMA_MAX,
    SIGMA_MIN,
    STEPS,
    Churn,
    Sample,
    ddim,
    euler_maruyama,
    even_steps,
    heun,
    predictor_corrector,
    rk45,
    sigma_steps,
)


@dataclass(frozen=True)
class Sampling:
    """A sampler and the settings of all of them, each of which asks for its own.

    Args:
        sampler: a name of SAMPLERS.
        steps: N; RK45 finds its own.
        sigma_min, sigma_max: the last and the first noise level of `heun`, for a process whose
            time is sigma of the others too; within what the process knows.
        rho: exponent of the noise levels between them.
        S_churn, S_min, S_max, S_noise: see `Churn`; an S_max of None is infinite.
        eta: of DDIM, amount of fresh noise.
        snr: of the corrector.
        tolerance: of RK45.
        last_denoise: whether RK45 ends with D.
    """

    sampler: str
    steps: int = STEPS
    sigma_min: float = SIGMA_MIN
    sigma_max: float = SIGMA_MAX
    rho: float = RHO
    S_churn: float = 0.0
    S_min: float = 0.0
    S_max: float | None = None
    S_noise: float = 1.0
    eta: float = 0.0
    snr: float = 0.16
    tolerance: float = 1e-5
    last_denoise: bool = True

    def __call__(
        self, process: Process, denoise: Denoiser, randn: Callable[[], Tensor]
    ) -> Iterator[Sample]:
        """Draws samples, see the sampler of this name in `stf_train.sample`."""
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {self.sampler!r}")
        return SAMPLERS[self.sampler](self, process, denoise, randn)

    def levels(self, process: Process) -> list[float]:
        """N noise levels sigma / alpha and then 0, within the span of the process."""
        start, end = (torch.tensor(t, dtype=torch.float64) for t in process.span)
        highest, lowest = (float(process.sigma(t) / process.alpha(t)) for t in (start, end))
        return sigma_steps(
            self.steps, max(self.sigma_min, lowest), min(self.sigma_max, highest), self.rho
        )

    def times(self, process: Process, steps: int) -> list[float]:
        """Even steps in the time of the process; noise levels where its time is sigma."""
        if isinstance(process, SigmaTime):
            return self.levels(process)
        return even_steps(steps, *process.span)


def _heun(
    how: Sampling, process: Process, denoise: Denoiser, randn: Callable[[], Tensor]
) -> Iterator[Sample]:
    limit = float("inf") if how.S_max is None else how.S_max
    churn = Churn(how.S_churn, how.S_min, limit, how.S_noise)
    if isinstance(process, SigmaTime):
        return heun(denoise, randn, how.levels(process), churn, process=process)
    return heun(process.in_sigma(denoise), randn, how.levels(process), churn)


def _ddim(
    how: Sampling, process: Process, denoise: Denoiser, randn: Callable[[], Tensor]
) -> Iterator[Sample]:
    times = how.times(process, how.steps)
    data = float(process.time(torch.zeros((), dtype=torch.float64)))
    if math.isfinite(data):  # VE has no such time
        times[-1] = data
    return ddim(denoise, randn, times, process=process, eta=how.eta)


def _rk45(
    how: Sampling, process: Process, denoise: Denoiser, randn: Callable[[], Tensor]
) -> Iterator[Sample]:
    return rk45(
        denoise,
        randn,
        process.span,
        process=process,
        tolerance=how.tolerance,
        last_denoise=how.last_denoise,
    )


def _noisy_times(how: Sampling, process: Process) -> list[float]:
    """N times, the last of them with noise left."""
    times = how.times(process, how.steps - 1)
    return times[:-1] if isinstance(process, SigmaTime) else times


def _pc(
    how: Sampling, process: Process, denoise: Denoiser, randn: Callable[[], Tensor]
) -> Iterator[Sample]:
    times = _noisy_times(how, process)
    return predictor_corrector(denoise, randn, times, process=process, snr=how.snr)


def _em(
    how: Sampling, process: Process, denoise: Denoiser, randn: Callable[[], Tensor]
) -> Iterator[Sample]:
    return euler_maruyama(denoise, randn, _noisy_times(how, process), process=process)


Sampler = Callable[[Sampling, Process, Denoiser, Callable[[], Tensor]], Iterator[Sample]]
SAMPLERS: dict[str, Sampler] = {"heun": _heun, "ddim": _ddim, "rk45": _rk45, "pc": _pc, "em": _em}

# Which settings each sampler asks for, besides those of `levels`.
OWN: dict[str, tuple[str, ...]] = {
    "heun": ("S_churn", "S_min", "S_max", "S_noise"),
    "ddim": ("eta",),
    "rk45": ("tolerance", "last_denoise"),
    "pc": ("snr",),
    "em": (),
}


def asked(sampler: str, process: Process) -> tuple[str, ...]:
    """The settings that make a difference to a sampler on a process."""
    steps = () if sampler == "rk45" else ("steps",)
    in_levels = sampler == "heun" or (isinstance(process, SigmaTime) and sampler != "rk45")
    return steps + OWN[sampler] + (("sigma_min", "sigma_max", "rho") if in_levels else ())
