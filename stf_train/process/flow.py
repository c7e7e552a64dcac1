"""Flow matching along straight lines, in both conventions of time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stf_train.process.base import Process
from stf_train.process.output import OUTPUTS, Output


@dataclass(frozen=True)
class Flow(Process):
    """What both conventions share: t uniform in (0, 1), c_noise = t, the velocity as output.

    Args:
        coupling: of y and eps. With "independent", each drawn for itself, the posterior of the
            source given x_t factors into one term for each reference, and its mean is a target.

    Source: Lipman et al., "Flow Matching for Generative Modeling", and Liu et al., "Flow Straight
    and Fast", both ICLR 2023.
    """

    coupling: str = "independent"
    output: Output = OUTPUTS["velocity"]

    def __post_init__(self) -> None:
        if self.coupling != "independent":
            raise ValueError(
                "coupling must be 'independent', the only one for which the weight of a reference "
                "depends on that reference alone; under optimal transport and other couplings of "
                "samples with noise, or rectified pairs, the posterior does not factor and the "
                f"stable target would be wrong; got {self.coupling!r}"
            )

    def c_noise(self, t: Tensor) -> Tensor:
        return t

    def diffusion(self, t: Tensor) -> Tensor:
        """g^2 = 2 sigma |sigma'|, the noise that is put in and taken out again on the way.

        Every g has the flow's own marginals, its drift being the velocity + g^2 score / 2. That of
        the forward process (`Path.diffusion`) is infinite where alpha = 0, at the very start; this
        is it without the term in alpha'.

        Source: Albergo, Boffi, Vanden-Eijnden, "Stochastic Interpolants", 2023; Ma et al., "SiT",
        ECCV 2024.
        """
        return 2 * self.sigma(t) * self.sigma_dot(t).abs()


@dataclass(frozen=True)
class FlowToNoise(Flow):
    """alpha = 1 - t, sigma = t: data at t = 0, noise at t = 1 (as in Stable Diffusion 3)."""

    span = (1.0, 1e-3)

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def alpha_dot(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def time(self, ratio: Tensor) -> Tensor:
        return ratio / (1 + ratio)


@dataclass(frozen=True)
class FlowToData(Flow):
    """alpha = t, sigma = 1 - t: noise at t = 0, data at t = 1 (as in the two papers)."""

    span = (0.0, 1 - 1e-3)
    trained = (0.0, 1 - 1e-5)

    def alpha(self, t: Tensor) -> Tensor:
        return t

    def sigma(self, t: Tensor) -> Tensor:
        return 1 - t

    def alpha_dot(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def time(self, ratio: Tensor) -> Tensor:
        return 1 / (1 + ratio)
