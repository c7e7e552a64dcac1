"""The denoising loss of EDM, for any target."""

from __future__ import annotations

import torch
from torch import Tensor

from stf_kernels import References
from stf_train.process import EDM, Network
from stf_train.targets import Target


class EDMLoss:
    """lambda(sigma) ||D(y + sigma n; sigma) - target||^2, averaged over samples and values.

    Args:
        process: noise levels, weight and preconditioning.
        data: the data set.
        target: the regression target, `DenoisingTarget` or `StableTarget`.

    Source: Karras et al. 2022, Equation 8; with a stable target Xu et al. 2023, Equation 6.
    """

    def __init__(self, process: EDM, data: References, target: Target) -> None:
        self.process = process
        self.data = data
        self.target = target

    def __call__(
        self, network: Network, order: Tensor, batch: int, generator: torch.Generator
    ) -> Tensor:
        """The loss of one minibatch, a scalar that is about 1 for F = 0.

        Args:
            network: F of `EDM.denoise`.
            order: the step's order of the data set (`data.draw`), [total] int64.
            batch: B, the sources being order[:B].
            generator: the run's generator, on the CPU, so that all devices see the same noise.
        """
        y = self.data.decode(order[:batch])  # [B, *shape]
        z = torch.randn(batch, *[1] * (y.ndim - 1), generator=generator).to(y.device)
        n = torch.randn(y.shape, generator=generator).to(y.device)
        sigma = self.process.sigma(z)  # [B, 1, ...]
        x_t = y + sigma * n
        target = self.target(x_t, sigma, order)
        D = self.process.denoise(network, x_t, sigma)
        return (self.process.weight(sigma) * (D - target) ** 2).mean()
