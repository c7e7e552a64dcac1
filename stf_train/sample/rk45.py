"""The probability flow ODE by an adaptive Runge-Kutta method."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import scipy.integrate
import torch
from torch import Tensor

from stf_train.process import Denoiser, Path
from stf_train.sample.state import Counted, Sample, at, check_times


@torch.no_grad()
def rk45(
    denoise: Denoiser,
    randn: Callable[[], Tensor],
    t: Sequence[float],
    *,
    process: Path,
    tolerance: float = 1e-5,
    last_denoise: bool = True,
) -> Iterator[Sample]:
    """Integrates dx/dt = alpha' D + sigma' (x - alpha D) / sigma by the Dormand-Prince method.

    It is the integrator behind `scipy.integrate.solve_ivp(method="RK45")`, step by step. Its steps
    follow the error over the whole batch, so that a sample depends, within the tolerance, on those
    beside it.

    Args:
        denoise: D(x; t), the denoiser.
        randn: a source of noise of unit scale, [B, *shape] float64 on the denoiser's device,
            called once.
        t: the times from which and to which to integrate, such as `process.span`. There has to be
            noise left at the second: 1e-5 for VE, 1e-3 for VP in the published runs.
        process: alpha and sigma.
        tolerance: relative and absolute, of one step: 1e-5 for the published CIFAR-10 figures,
            1e-4 for CelebA.
        last_denoise: whether to end with D(x; t[1]), one more evaluation. Without it the noise
            left at t[1] stays in the samples; FID sees it.

    Yields:
        The state before the first step, after each accepted step and after the last denoising.

    Raises:
        ValueError: t does not hold two times from noise to less noise.
        ArithmeticError: a velocity is not finite, or no step small enough.

    Source: Song et al. 2021, Section 4.3; Dormand and Prince 1980.
    """
    check_times(process, t, noise_left=True)
    if len(t) != 2:
        raise ValueError(f"t must be the first and the last time, got {len(t)} times")
    start, end = t
    D = Counted(denoise)
    x = randn().double()
    x = process.sigma(at(x, start)) * x
    yield Sample(0, start, x, D.evaluations)

    def tensor(flat: np.ndarray) -> Tensor:
        return torch.from_numpy(flat).to(x.device).reshape(x.shape)

    def slope(time: float, flat: np.ndarray) -> np.ndarray:
        state = tensor(flat)
        velocity = process.velocity(D(state, time), state, at(state, time)).cpu().numpy().ravel()
        if not np.isfinite(velocity).all():  # the integrator would try ever again
            raise ArithmeticError(f"RK45 met a velocity that is not finite at t = {time}")
        return velocity

    flat = x.cpu().numpy().ravel()
    solver = scipy.integrate.RK45(slope, start, flat, end, rtol=tolerance, atol=tolerance)
    step = 0
    while solver.status == "running":
        message = solver.step()
        if solver.status == "failed":
            raise ArithmeticError(f"RK45 stopped at t = {solver.t} after {step} steps: {message}")
        step += 1
        yield Sample(step, float(solver.t), tensor(solver.y), D.evaluations)
    if last_denoise:
        yield Sample(step + 1, end, D(tensor(solver.y), end), D.evaluations)
