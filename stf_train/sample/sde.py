"""Samplers of the reverse-time SDE: predictor-corrector and Euler-Maruyama."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from stf_train.process import Denoiser, Path
from stf_train.sample.state import Counted, Sample, at, check_gaussian, check_times

# (process, x, D, t, s) -> mean and deviation of the step from t to s
Predictor = Callable[[Path, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def reverse_diffusion(
    process: Path, x: Tensor, D: Tensor, t: Tensor, s: Tensor
) -> tuple[Tensor, Tensor]:
    """x_s = x - ((a - 1) x - v score) + sqrt(v) z, with p(x_t | x_s) = N(a x_s, v).

    Source: Song et al. 2021, Equation 46 and Algorithms 2 and 3.
    """
    a, v = process.transition(s, t)
    return (2 - a) * x + v * process.score(D, x, t), v.sqrt()


def euler_maruyama_step(
    process: Path, x: Tensor, D: Tensor, t: Tensor, s: Tensor
) -> tuple[Tensor, Tensor]:
    """x_s = x + (s - t) (f x - g^2 score) + g sqrt(|s - t|) z.

    Written with the velocity of the probability flow, f x - g^2 score = velocity - g^2 score / 2,
    which holds whichever way time runs.

    Source: Song et al. 2021, Equation 6.
    """
    g2 = process.diffusion(t) * (s - t).abs()
    flow = (s - t) * process.velocity(D, x, t)
    return x + flow + g2 / 2 * process.score(D, x, t), g2.sqrt()


@torch.no_grad()
def predictor_corrector(
    denoise: Denoiser,
    randn: Callable[[], Tensor],
    t: Sequence[float],
    *,
    process: Path,
    predictor: Predictor = reverse_diffusion,
    snr: float | None = 0.16,
) -> Iterator[Sample]:
    """At each time a step of Langevin dynamics, then a step of the predictor to the next time.

        x <- x + h score + sqrt(2 h) z
        h = 2 (alpha_t / alpha_s)^2 (snr mean ||z|| / mean ||score||)^2

    s being the next time. At the last time the predictor gives way to D, the mean of the data, so
    that no noise is left in the samples. The norms are means over the batch: a sample depends on
    those beside it.

    Args:
        denoise: D(x; t), the denoiser.
        randn: a source of noise of unit scale, [B, *shape] float64 on the denoiser's device,
            called once for the start and for each step of either kind.
        t: N times from noise to data, with noise left at the last, such as
            `even_steps(N - 1, *process.span)`.
        process: alpha and sigma.
        predictor: `reverse_diffusion` or `euler_maruyama_step`.
        snr: of the corrector: .16 for the published CIFAR-10 figures, .17 for CelebA; None for no
            corrector.

    Yields:
        The state before the first step and after each of N steps, the last of which is D. All N
        take 2 N evaluations, or N without a corrector.

    Raises:
        ValueError: the times do not run from noise to data, the noise is not Gaussian, or snr is
            not above 0.

    Source: Song et al. 2021, Algorithms 1 to 5, the corrector before the predictor.
    """
    check_times(process, t, noise_left=True)
    check_gaussian(process, "a sampler of the SDE")
    if snr is not None and not snr > 0:
        raise ValueError(f"snr must be above 0, got {snr}")
    D = Counted(denoise)
    x = randn().double()
    x = process.sigma(at(x, t[0])) * x
    yield Sample(0, t[0], x, D.evaluations)
    for i, now in enumerate(t):
        here = at(x, now)
        there = at(x, t[i + 1]) if i + 1 < len(t) else None
        if snr is not None:
            a = process.alpha(here) if there is None else process.transition(there, here)[0]
            z, score = randn().double(), process.score(D(x, now), x, here)
            h = 2 * a**2 * (snr * norm(z) / norm(score)) ** 2
            x = x + h * score + (2 * h).sqrt() * z
        y = D(x, now)
        if there is None:
            x = y
        else:
            mean, deviation = predictor(process, x, y, here, there)
            x = mean + deviation * randn().double()
        yield Sample(i + 1, now if there is None else t[i + 1], x, D.evaluations)


def norm(x: Tensor) -> Tensor:
    """The mean over the batch of ||x||."""
    return x.flatten(1).norm(dim=1).mean()


def euler_maruyama(
    denoise: Denoiser, randn: Callable[[], Tensor], t: Sequence[float], *, process: Path
) -> Iterator[Sample]:
    """The reverse-time SDE by the Euler-Maruyama method: a predictor without a corrector.

    Args, yields and errors as for `predictor_corrector`; N times take N evaluations.
    """
    return predictor_corrector(
        denoise, randn, t, process=process, predictor=euler_maruyama_step, snr=None
    )
