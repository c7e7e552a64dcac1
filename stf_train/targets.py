"""What the network learns to predict: the clean sample, or the mean of those it may have been.

Both targets are called alike, so that handing the loss one or the other is the whole difference
between denoising score matching and the stable target field.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from stf_kernels import References, stable_target
from stf_train.process import GAUSSIAN, Noise


@dataclass(frozen=True)
class Origin:
    """How noisy samples x_t = alpha y + sigma eps were made."""

    sources: Tensor  # y by its index in the data set, [B] int64
    alpha: Tensor  # [B, 1, ...]
    sigma: Tensor  # [B, 1, ...]
    noise: Noise = GAUSSIAN  # distribution of eps
    labels: Tensor | None = None  # class as the network is told it, -1 for none, [B] int64


class Target(Protocol):
    """The regression target of the denoiser D(x_t; t)."""

    def __call__(self, x_t: Tensor, origin: Origin, order: Tensor) -> Tensor:
        """The target for each noisy sample.

        Args:
            x_t: noisy samples, [B, *shape].
            origin: how they were made.
            order: indices into the data set, those of all sources first and then further ones to
                refer to, int64.

        Returns:
            Targets, [B, *shape].
        """


class DenoisingTarget:
    """Denoising score matching: the clean source itself (Vincent 2011)."""

    def __init__(self, data: References) -> None:
        self.data = data

    def __call__(self, x_t: Tensor, origin: Origin, order: Tensor) -> Tensor:
        return self.data.decode(origin.sources)


class StableTarget:
    """Stable target field: the posterior mean of the source among n references.

        D_i = sum_k w_ik y_k,  w_ik = softmax_k(log p(x_i | y_k)),  k = 1..n

    The references are the first n entries of the step's order, the sources among them. For samples
    with a class they are those of that class among the n, so that the target of a conditional
    network is E[y | x_t, class]; a sample whose class is dropped sees all n.

    Args:
        data: the data set.
        n: references per step, at most the size of the data set.
        precision: "exact" or "fast", see `stf_kernels.stable_target`.
        backend: "auto" or a backend's name, see `stf_kernels.stable_target`.
        same_class: False lets samples with a class see references of all classes. The target is
            then that of an unconditional network: for a conditional one it is biased.

    Raises:
        ValueError: n is below 1 or above the size of the data set.

    Source: Xu, Tong, Jaakkola, "Stable Target Field for Reduced Variance Score Estimation in
    Diffusion Models", ICLR 2023, Algorithm 1.
    """

    def __init__(
        self,
        data: References,
        n: int,
        precision: str = "exact",
        backend: str = "auto",
        same_class: bool = True,
    ) -> None:
        if not 1 <= n <= len(data):
            raise ValueError(f"n must lie in 1..{len(data)}, the size of the data set, got {n}")
        self.data = data
        self.n = n
        self.precision = precision
        self.backend = backend
        self.same_class = same_class

    def __call__(self, x_t: Tensor, origin: Origin, order: Tensor) -> Tensor:
        sources = len(origin.sources.unique())
        if self.n < sources:
            raise ValueError(f"n must be at least the minibatch of {sources}, got {self.n}")
        # The whole data set needs no gather, and a set has no order.
        ref = self.data if self.n == len(self.data) else self.data.subset(order[: self.n])
        return stable_target(
            x_t,
            ref,
            origin.sigma,
            alpha=origin.alpha,
            target="denoised",
            labels=origin.labels if self.same_class else None,
            noise=origin.noise.name,
            D=origin.noise.D,
            precision=self.precision,
            backend=self.backend,
        )
