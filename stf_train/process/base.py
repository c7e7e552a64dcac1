"""What every process is to the loss: a path, the times to train at, and what the network says."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from stf_train.process.output import Output
from stf_train.process.path import Path

Network = Callable[..., Tensor]  # F(x [B, *shape], c_noise [B], labels [B] if conditional)


class Process(Path):
    """A path and how a network is trained on it."""

    @property
    @abstractmethod
    def output(self) -> Output:
        """What the network's output stands for."""

    @abstractmethod
    def c_noise(self, t: Tensor) -> Tensor:
        """What the network is told of the time."""

    @property
    def trained(self) -> tuple[float, float]:
        """The times trained at: short of the data, where no weight is finite."""
        return 1e-5, 1.0

    def times(self, batch: int, generator: torch.Generator) -> Tensor:
        """Training times [B] on the CPU, uniform unless a process says otherwise."""
        low, high = self.trained
        return low + (high - low) * torch.rand(batch, generator=generator)

    def weight(self, t: Tensor) -> Tensor:
        """lambda(t), the weight of ||D - target||^2."""
        return self.output.weight(self, t)

    def denoise(
        self, network: Network, x: Tensor, t: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        """The denoiser around a network F, an estimate of the posterior mean E[y | x].

            D(x; t) = c_skip x + c_out F(c_in x; c_noise)

        Args:
            network: F, takes ([B, *shape], [B]) and, if it is conditional, labels; returns
                [B, *shape].
            x: noisy samples, [B, *shape].
            t: their times, [B, 1, ...].
            labels: their classes, -1 for none, [B] int64; None for an unconditional network.

        Returns:
            The denoised samples, [B, *shape].

        Source: Karras et al. 2022, Equation 7.
        """
        condition = () if labels is None else (labels,)
        F = network(self.output.c_in(self, t) * x, self.c_noise(t).flatten(), *condition)
        return self.output.c_skip(self, t) * x + self.output.c_out(self, t) * F
