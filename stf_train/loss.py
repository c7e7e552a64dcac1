"""The losses, for any process and any target."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from stf_kernels import References
from stf_train.guidance import class_logits
from stf_train.process import DDPM, Network, Process
from stf_train.targets import DenoisingTarget, Origin, Target


@dataclass(frozen=True)
class Minibatch:
    """All that is random in a step but the network's own dropout."""

    sources: Tensor  # indices into the data set, [B] int64
    t: Tensor  # training times, [B]
    labels: Tensor | None  # classes, -1 for dropped ones, [B] int64
    eps: Tensor  # noise of unit scale, [K, B, *shape], K points for each source

    def part(self, start: int, stop: int) -> Minibatch:
        """Some of its samples."""
        labels = None if self.labels is None else self.labels[start:stop]
        return Minibatch(
            self.sources[start:stop], self.t[start:stop], labels, self.eps[:, start:stop]
        )


class DenoisingLoss:
    """lambda(t) ||D(x_t; t) - target||^2 for x_t = alpha y + sigma eps.

    Averaged over samples and values.

    Args:
        process: path, noise, training times, preconditioning and weight.
        data: the data set.
        target: the regression target, `DenoisingTarget` or `StableTarget`.
        label_dropout: the probability that a sample's class is hidden from network and target (-1
            in its place), in [0, 1]; None for an unconditional network.

    Raises:
        ValueError: label_dropout is not a probability, or the data set has no labels.

    Source: Vincent 2011; in this form Karras et al. 2022, Equation 8; with a stable target Xu et
    al. 2023, Equation 6; label dropping Ho and Salimans 2022, Algorithm 1.
    """

    K = 1  # noisy points of each source

    def __init__(
        self,
        process: Process,
        data: References,
        target: Target,
        label_dropout: float | None = None,
    ) -> None:
        if label_dropout is not None:
            if not 0 <= label_dropout <= 1:
                raise ValueError(f"label_dropout must lie in [0, 1], got {label_dropout}")
            if data.labels is None:
                raise ValueError("label_dropout needs data with labels, got data without")
        self.process = process
        self.data = data
        self.target = target
        self.label_dropout = label_dropout

    def __call__(
        self, network: Network, order: Tensor, batch: int, generator: torch.Generator
    ) -> Tensor:
        """The loss of one minibatch, a scalar: `of` what was drawn.

        Args:
            network: F of `Process.denoise`.
            order: the step's order of the data set (`data.draw`), [total] int64.
            batch: B, the sources being order[:B].
            generator: the run's generator, on the CPU, so that all devices see the same noise.
        """
        return self.of(network, self.draw(order, batch, generator), order)

    def draw(self, order: Tensor, batch: int, generator: torch.Generator) -> Minibatch:
        """Draws a minibatch, arguments as above."""
        sources = order[:batch]
        t = self._times(batch, generator)
        labels = self._labels(sources, generator)
        shape = (self.K * batch, *self.data.shape)
        eps = self.process.noise.draw(shape, generator).unflatten(0, (self.K, batch))
        return Minibatch(sources, t, labels, eps)

    def _times(self, batch: int, generator: torch.Generator) -> Tensor:
        """Training times [B]."""
        return self.process.times(batch, generator)

    def of(self, network: Network, minibatch: Minibatch, order: Tensor) -> Tensor:
        """The mean loss of a minibatch or a part of one, a scalar.

        Args:
            network: F of `Process.denoise`.
            minibatch: what was drawn.
            order: the step's whole order of the data set: a part has the references of the whole.
        """
        m = minibatch
        error, t = self._error(network, m.t, m.sources, m.labels, m.eps[0], order)
        return (self.process.weight(t) * error**2).mean()

    def _labels(self, sources: Tensor, generator: torch.Generator) -> Tensor | None:
        """The classes of the sources, some of them dropped, [B]."""
        if self.label_dropout is None:
            return None
        labels = self.data.labels
        assert labels is not None  # see __init__
        dropped = torch.rand(len(sources), generator=generator) < self.label_dropout
        return labels[sources.to(labels.device)].masked_fill(dropped.to(labels.device), -1)

    def _error(
        self,
        network: Network,
        t: Tensor,
        sources: Tensor,
        labels: Tensor | None,
        eps: Tensor,
        order: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """D(x_t; t) - target of freshly noised sources [B, *shape], and t as [B, 1, ...]."""
        process = self.process
        x_t, t = self._noisy(t, sources, eps)
        origin = Origin(sources, process.alpha(t), process.sigma(t), process.noise, labels)
        target = self.target(x_t, origin, order)
        return process.denoise(network, x_t, t, labels) - target, t

    def _noisy(self, t: Tensor, sources: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """x_t of sources [B, *shape], and t as [B, 1, ...]."""
        y = self.data.decode(sources)  # [B, *shape]
        t = t.to(y.device).reshape(-1, *[1] * (y.ndim - 1))
        return self.process.alpha(t) * y + self.process.sigma(t) * eps.to(y.device), t


class ClassLoss(DenoisingLoss):
    """-log p(c | x_t), the class c being that of the source; averaged over samples.

    At times for which ln(sigma / alpha) is uniform, from much noise to little: guidance asks at all
    of them, and goes astray where the classifier has not learnt that it cannot know.

    Args:
        process: path and noise.
        data: the data set, with labels.

    Raises:
        ValueError: the data set has no labels.

    Source: Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis", NeurIPS 2021,
    Section 4.
    """

    RATIOS = 0.01, 100.0  # sigma / alpha, the least and the most

    def __init__(self, process: Process, data: References) -> None:
        super().__init__(process, data, DenoisingTarget(data), label_dropout=0.0)

    def _times(self, batch: int, generator: torch.Generator) -> Tensor:
        low, high = map(math.log, self.RATIOS)
        return self.process.time(
            (low + (high - low) * torch.rand(batch, generator=generator)).exp()
        )

    def of(self, network: Network, minibatch: Minibatch, order: Tensor) -> Tensor:
        """The mean loss of a minibatch or a part of one, see `DenoisingLoss`; F gives logits."""
        m = minibatch
        assert m.labels is not None  # label_dropout is not None
        x_t, t = self._noisy(m.t, m.sources, m.eps[0])
        return cross_entropy(class_logits(network, self.process, x_t, t), m.labels)


class SequenceLoss(DenoisingLoss):
    """The sequence-aware loss over K successive steps t, t - 1, .. t - K + 1 of the same source.

        r_k = 1[t >= k] sqrt(lambda(t - k)) (D(x_{t-k}; t - k) - target_k)
        L = ||r_0||^2 + strength / K^2 ||r_0 + .. + r_{K-1}||^2

    averaged over samples and values, the noises of the K points being independent. For networks
    that predict epsilon, r_k is its error; strength = 0 is the loss of DDPM.

    With a stable target each of the K targets is averaged over the references by itself. Inside
    the square of the sum this is not merely the removal of avoidable variance that it is in
    `DenoisingLoss`: the points share their source, so that the exact conditional mean of the
    square would need the weights of all K points together. The first term's minimiser is the same
    with either target, the second term is another loss.

    Args:
        process, data, target, label_dropout: as for `DenoisingLoss`; the process one of steps.
        K: points of a sequence, each an evaluation of the network; 2 in the paper.
        strength: lambda of the paper: .1 (CelebA-HQ), .2 (AFHQ), .5 (FFHQ) or 1 (CelebA 64).

    Raises:
        TypeError: the process has no steps.
        ValueError: K is below 1 or strength below 0.

    Source: "On Inference Stability for Diffusion Models", AAAI 2024.
    """

    def __init__(
        self,
        process: DDPM,
        data: References,
        target: Target,
        label_dropout: float | None = None,
        *,
        K: int = 2,
        strength: float,
    ) -> None:
        super().__init__(process, data, target, label_dropout)
        if not isinstance(process, DDPM):
            raise TypeError(f"process must be one of steps, DDPM, got {type(process).__name__}")
        if K < 1:
            raise ValueError(f"K must be at least 1, got {K}")
        if not strength >= 0:
            raise ValueError(f"strength must be at least 0, got {strength}")
        self.K = K
        self.strength = strength

    def of(self, network: Network, minibatch: Minibatch, order: Tensor) -> Tensor:
        """The mean loss of a minibatch or a part of one, see `DenoisingLoss`."""
        K, batch, labels = self.K, len(minibatch.sources), minibatch.labels
        # All K points of all sources in one batch, the k-th points in the k-th of K parts.
        t = minibatch.t.repeat(K) - torch.arange(K).repeat_interleave(batch)
        error, step = self._error(
            network,
            t.clamp(min=0),
            minibatch.sources.repeat(K),
            None if labels is None else labels.repeat(K),
            minibatch.eps.flatten(0, 1),
            order,
        )
        inside = (t >= 0).to(step.device).reshape(step.shape)
        r = (inside * self.process.weight(step).sqrt() * error).unflatten(0, (K, batch))
        return (r[0] ** 2).mean() + self.strength / K**2 * (r.sum(0) ** 2).mean()
