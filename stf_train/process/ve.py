"""The variance exploding process."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from stf_train.process.base import Process
from stf_train.process.output import OUTPUTS, Output
from stf_train.process.path import VarianceExploding


@dataclass(frozen=True)
class VE(VarianceExploding, Process):
    """sigma(t) = sigma_min (sigma_max / sigma_min)^t, t uniform in (0, 1], c_noise = ln(sigma).

    Noise levels are in the units of the data. The published .01 and 50 (CIFAR-10) or 90 (CelebA)
    are for data in [0, 1]: for data in [-1, 1], which is twice as wide, take .02 and 100 or 180.

    Args:
        sigma_min, sigma_max: noise levels at t = 0 and t = 1.
        output: what the network says; score_sde's networks, which divide by sigma inside and so
            say the score, are of kind `Score`, without that division of kind `Epsilon` but for
            the sign.

    Source: Song et al., "Score-Based Generative Modeling through Stochastic Differential
    Equations", ICLR 2021, Appendix C.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    output: Output = OUTPUTS["epsilon"]
    span = (1.0, 1e-5)

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(
                f"sigma_min must lie in (0, sigma_max = {self.sigma_max}), got {self.sigma_min}"
            )

    @property
    def _log_range(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min * (self._log_range * t).exp()

    def sigma_dot(self, t: Tensor) -> Tensor:
        return self._log_range * self.sigma(t)

    def time(self, ratio: Tensor) -> Tensor:
        return (ratio / self.sigma_min).log() / self._log_range

    def c_noise(self, t: Tensor) -> Tensor:
        return self.sigma(t).log()
