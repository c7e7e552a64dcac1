"""DDIM, and between it and DDPM."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from stf_train.process import Denoiser, Path
from stf_train.sample.state import Counted, Sample, at, check_gaussian, check_times


@torch.no_grad()
def ddim(
    denoise: Denoiser,
    randn: Callable[[], Tensor],
    t: Sequence[float],
    *,
    process: Path,
    eta: float = 0.0,
) -> Iterator[Sample]:
    """Steps from t to s by the posterior of x_s given x_t and y = D, its deviation times eta.

        x_s = alpha_s D + sqrt(sigma_s^2 - c^2) (x_t - alpha_t D) / sigma_t + c z
        c = eta sigma_s / sigma_t sqrt(v),    v = sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2

    eta = 0 is Euler's method for the probability flow in the time sigma / alpha, eta = 1 ancestral
    sampling (DDPM). On the straight lines of flow matching eta = 0 is Euler's method in t.

    Args:
        denoise: D(x; t), the denoiser.
        randn: a source of noise of unit scale, [B, *shape] float64 on the denoiser's device:
            called once for the start, and for eta > 0 once for each step.
        t: N + 1 times from noise to data; at t[N] there may be no noise left.
        process: alpha and sigma.
        eta: amount of fresh noise, in [0, 1].

    Yields:
        The state before the first step and after each of the N steps.

    Raises:
        ValueError: the times do not run from noise to data; eta is not in [0, 1], or above 0 with
            noise that is not Gaussian.

    Source: Song, Meng, Ermon, "Denoising Diffusion Implicit Models", ICLR 2021, Equations 12, 16.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1], got {eta}")
    check_times(process, t)
    if eta > 0:
        check_gaussian(process, "eta above 0")
    D = Counted(denoise)
    x = randn().double()
    x = process.sigma(at(x, t[0])) * x
    yield Sample(0, t[0], x, D.evaluations)
    for i, (now, then) in enumerate(pairwise(t)):
        y, here, there = D(x, now), at(x, now), at(x, then)
        sigma_t, sigma_s = process.sigma(here), process.sigma(there)
        epsilon = (x - process.alpha(here) * y) / sigma_t
        _, v = process.transition(there, here)
        c = eta * sigma_s / sigma_t * v.sqrt()
        x = process.alpha(there) * y + (sigma_s**2 - c**2).sqrt() * epsilon
        if eta > 0:
            x = x + c * randn().double()
        yield Sample(i + 1, then, x, D.evaluations)
