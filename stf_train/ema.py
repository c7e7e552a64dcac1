"""The moving average of the weights, the network one samples from."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import nn


class EMA:
    """theta_ema <- beta theta_ema + (1 - beta) theta, beta = .5^(B / min(halflife, rampup images)).

    The ramp-up keeps the average short while the run is: otherwise it would remember the
    initial weights.

    Args:
        network: the network to follow; the average starts at its weights.
        halflife: images after which a weight counts half.
        rampup: halflife as a fraction of the images seen so far, at most.

    Source: Karras et al. 2022, Appendix F.2 (half-life and ramp-up ratio 0.05).
    """

    def __init__(self, network: nn.Module, halflife: float, rampup: float = 0.05) -> None:
        self.network = deepcopy(network).eval().requires_grad_(False)
        self.halflife = halflife
        self.rampup = rampup

    @torch.no_grad()
    def update(self, network: nn.Module, batch: int, images: int) -> None:
        """Takes in the weights after a step of `batch` images, the last of `images` in all."""
        beta = 0.5 ** (batch / max(min(self.halflife, self.rampup * images), 1e-8))
        torch._foreach_lerp_(list(self.network.parameters()), list(network.parameters()), 1 - beta)
