"""What the network learns to predict: the clean sample, or the mean of those it may have been.

Both targets are called alike, so that handing the loss one or the other is the whole difference
between denoising score matching and the stable target field.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from stf_kernels import References, stable_target


class Target(Protocol):
    """The regression target of the denoiser D(x_t; sigma)."""

    def __call__(self, x_t: Tensor, sigma: Tensor, order: Tensor) -> Tensor:
        """The target for each noisy sample.

        Args:
            x_t: noisy samples, [B, *shape].
            sigma: noise levels, [B, 1, ...].
            order: indices into the data set; x_t[i] was made from entry order[i], and the entries
                after the first B are further ones to refer to, [>= B] int64.

        Returns:
            Targets, [B, *shape].
        """


class DenoisingTarget:
    """Denoising score matching: the clean source itself (Vincent 2011)."""

    def __init__(self, data: References) -> None:
        self.data = data

    def __call__(self, x_t: Tensor, sigma: Tensor, order: Tensor) -> Tensor:
        return self.data.decode(order[: len(x_t)])


class StableTarget:
    """Stable target field: the posterior mean of the source among n references.

        D_i = sum_k w_ik y_k,  w_i = softmax_k(-||x_i - y_k||^2 / (2 sigma_i^2)),  k = 1..n

    The references are the first n entries of the step's order, the B sources among them.

    Args:
        data: the data set.
        n: references per step, at most the size of the data set.
        precision: "exact" or "fast", see `stf_kernels.stable_target`.
        backend: "auto" or a backend's name, see `stf_kernels.stable_target`.

    Raises:
        ValueError: n is below 1 or above the size of the data set.

    Source: Xu, Tong, Jaakkola, "Stable Target Field for Reduced Variance Score Estimation in
    Diffusion Models", ICLR 2023, Algorithm 1.
    """

    def __init__(
        self, data: References, n: int, precision: str = "exact", backend: str = "auto"
    ) -> None:
        if not 1 <= n <= len(data):
            raise ValueError(f"n must lie in 1..{len(data)}, the size of the data set, got {n}")
        self.data = data
        self.n = n
        self.precision = precision
        self.backend = backend

    def __call__(self, x_t: Tensor, sigma: Tensor, order: Tensor) -> Tensor:
        if self.n < len(x_t):
            raise ValueError(f"n must be at least the minibatch of {len(x_t)}, got {self.n}")
        # The whole data set needs no gather, and a set has no order.
        ref = self.data if self.n == len(self.data) else self.data.subset(order[: self.n])
        return stable_target(
            x_t, ref, sigma, target="denoised", precision=self.precision, backend=self.backend
        )
