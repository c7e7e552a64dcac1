"""EDM, and PFGM++, which is EDM with another noise.

Symbols and formulas are those of Karras et al., "Elucidating the Design Space of Diffusion-Based
Generative Models", NeurIPS 2022, Table 1 (rightmost column) and Section 5.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from stf_train.process.base import Process
from stf_train.process.noise import Noise, StudentT
from stf_train.process.output import F, Output
from stf_train.process.path import SigmaTime


@dataclass(frozen=True)
class EDM(SigmaTime, Process):
    """x = y + sigma eps with ln sigma ~ N(P_mean, P_std^2), for data of deviation sigma_data.

    The network's output is `F`, c_noise = ln(sigma) / 4.
    """

    sigma_data: float
    P_mean: float = -1.2
    P_std: float = 1.2

    def __post_init__(self) -> None:
        for name in ("sigma_data", "P_std"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be finite and above 0, got {value}")
        if not math.isfinite(self.P_mean):
            raise ValueError(f"P_mean must be finite, got {self.P_mean}")

    @property
    def output(self) -> Output:
        return F(self.sigma_data)

    def c_noise(self, t: Tensor) -> Tensor:
        return t.log() / 4

    def times(self, batch: int, generator: torch.Generator) -> Tensor:
        return (self.P_mean + self.P_std * torch.randn(batch, generator=generator)).exp()


@dataclass(frozen=True)
class PFGMpp(EDM):
    """EDM with Student-t noise of D degrees of freedom, in PFGM++'s symbols r = sigma sqrt(D).

    The posterior mean is that under the Student-t kernel; as a function of it the flow is EDM's,
    dx/dsigma = (x - E[y | x]) / sigma, and so are preconditioning and loss weight. A sampler starts
    from Student-t noise, which `seeded(..., noise=process.noise)` draws.

    Source: Xu et al., "PFGM++: Unlocking the Potential of Physics-Inspired Generative Models",
    ICML 2023, Sections 3 and 4.
    """

    _: KW_ONLY
    D: float

    def __post_init__(self) -> None:
        super().__post_init__()
        StudentT(self.D)  # refuses a D out of range

    @property
    def noise(self) -> Noise:
        return StudentT(self.D)
