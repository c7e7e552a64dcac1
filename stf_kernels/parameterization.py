"""What a network is asked to predict: target_i = c_D D_i + c_x x_i, two numbers for each row."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import arithmetic as ar

Coefficients = tuple[Tensor, Tensor]  # c_D [B], c_x [B], float64


@dataclass(frozen=True)
class Velocity:
    """alpha_dot D + sigma_dot / sigma (x - alpha D), the velocity of x = alpha y + sigma eps.

    Velocity(-1, 1), the default, is rectified flow with noise at t = 1 (alpha = 1 - t, sigma = t);
    Velocity(1, -1) has the data at t = 1 (alpha = t, sigma = 1 - t). A path of variance
    (1 - t)^2 + s^2 with alpha = t takes Velocity(1, -(1 - t) / sigma).

    Attributes:
        alpha_dot, sigma_dot: d alpha / dt and d sigma / dt, number or tensor [B], 1 / time

    Source: Lipman et al., Flow Matching, ICLR 2023; Liu et al., Rectified Flow, ICLR 2023.
    """

    alpha_dot: float | Tensor = -1.0
    sigma_dot: float | Tensor = 1.0


@dataclass(frozen=True)
class EDM:
    """(D - c_skip x) / c_out, the raw network's target under EDM's preconditioning (alpha = 1).

    Attributes:
        sigma_data: standard deviation of the data, > 0, in the data's units

    Source: Karras et al., Elucidating the Design Space of Diffusion Models, 2022, Table 1.
    """

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        if not isinstance(self.sigma_data, numbers.Real) or not 0 < self.sigma_data < math.inf:
            raise ValueError(f"sigma_data must be > 0 and finite, got {self.sigma_data!r}")


Parameterization = str | Velocity | EDM


def _score(sigma: Tensor, alpha: Tensor) -> Coefficients:
    variance = sigma * sigma
    return alpha / variance, -1.0 / variance


def _denoised(sigma: Tensor, alpha: Tensor) -> Coefficients:
    return torch.ones_like(sigma), torch.zeros_like(sigma)


def _epsilon(sigma: Tensor, alpha: Tensor) -> Coefficients:
    return -alpha / sigma, 1.0 / sigma


def _v(sigma: Tensor, alpha: Tensor) -> Coefficients:
    return -(alpha * alpha / sigma + sigma), alpha / sigma


def _velocity(sigma: Tensor, alpha: Tensor, alpha_dot: Tensor, sigma_dot: Tensor) -> Coefficients:
    rate = sigma_dot / sigma
    return alpha_dot - rate * alpha, rate


def _edm(sigma: Tensor, alpha: Tensor, sigma_data: Tensor) -> Coefficients:
    total = sigma * sigma + sigma_data * sigma_data
    c_skip = sigma_data * sigma_data / total
    c_out = sigma * sigma_data / ar.sqrt(total)
    return 1.0 / c_out, -c_skip / c_out


KINDS: dict[str, Callable[..., Coefficients]] = {
    "score": _score,
    "denoised": _denoised,
    "epsilon": _epsilon,
    "v": _v,
    "velocity": _velocity,
    "edm": _edm,
}


def parse(target: Parameterization) -> tuple[str, tuple[float | Tensor, ...]]:
    """The kind's name and its own parameters.

    Raises:
        ValueError: target is not one of KINDS, Velocity or EDM
    """
    if isinstance(target, str) and target == "velocity":
        target = Velocity()
    elif isinstance(target, str) and target == "edm":
        target = EDM()
    if isinstance(target, Velocity):
        return "velocity", (target.alpha_dot, target.sigma_dot)
    if isinstance(target, EDM):
        return "edm", (target.sigma_data,)
    if isinstance(target, str) and target in KINDS:
        return target, ()
    names = ", ".join(map(repr, KINDS))
    got = "a tensor" if isinstance(target, Tensor) else repr(target)
    raise ValueError(f"target must be one of {names}, a Velocity or an EDM, got {got}")


def coefficients(
    kind: str, sigma: Tensor, alpha: Tensor, parameters: Iterable[Tensor]
) -> Coefficients:
    """c_D and c_x of each row for a kind named by `parse`; all tensors float64 [B]."""
    return KINDS[kind](sigma, alpha, *parameters)
