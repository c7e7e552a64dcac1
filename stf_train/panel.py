"""How much variance the training target has at which noise, watched during a run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from stf_kernels import References, stable_target_with_stats
from stf_train.data import draw
from stf_train.loss import DenoisingLoss

SAMPLES = 256  # noisy samples looked at, at most


@dataclass(frozen=True)
class Bin:
    """Means over the noisy samples of one octave of noise.

    The variances are those of the score target, alpha^2 / sigma^4 times those of the denoiser's,
    summed over the values of a sample. V_STF = V_DSM - removed.
    """

    octave: int  # 2^octave <= sigma / alpha < 2^(octave + 1)
    samples: int
    V_DSM: float  # alpha^2 / sigma^4 Tr Cov(y | x_t) over the whole data set
    removed: float  # the same over the n references: what their mean takes away
    ess: float  # effective number of the n references
    entropy: float  # of their weights, nats


def measure(loss: DenoisingLoss, n: int, batch: int, entropy: tuple[int, ...]) -> list[Bin]:
    """Looks at a minibatch of its own, drawn like those of the training.

        V_DSM = V_STF + E[alpha^2 / sigma^4 (sum_k w_k ||y_k||^2 - ||D||^2)]

    Args:
        loss: for its data and process.
        n: references of the stable target; a run with the denoising target shows what they would
            take away.
        batch: noisy samples, cut to SAMPLES.
        entropy: seeds of the draw, which leaves the run's own generator alone.

    Source: the law of total variance; stf_kernels/MATH.md, section 7.
    """
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    generator = torch.Generator().manual_seed(seed)
    data, process = loss.data, loss.process
    order = draw(len(data), generator)
    m = loss.draw(order, min(batch, SAMPLES), generator)
    y = data.decode(m.sources)
    t = m.t.to(y.device).reshape(-1, *[1] * (y.ndim - 1))
    alpha, sigma = process.alpha(t), process.sigma(t)
    x_t = alpha * y + sigma * m.eps[0].to(y.device)

    def posterior(references: References) -> tuple[Tensor, Tensor, Tensor]:
        D, stats = stable_target_with_stats(
            x_t,
            references,
            sigma,
            alpha=alpha,
            target="denoised",
            labels=m.labels,
            noise=process.noise.name,
            D=process.noise.D,
        )
        trace = stats.second_moment - D.flatten(1).double().square().sum(1)
        scale = (alpha.double() ** 2 / sigma.double() ** 4).flatten()
        return scale * trace.clamp(min=0), stats.ess, stats.entropy

    V_DSM, _, _ = posterior(data)
    removed, ess, entropies = posterior(data if n == len(data) else data.subset(order[:n]))
    values = torch.stack([V_DSM, removed, ess, entropies]).cpu()  # [4, B]
    octaves = (sigma / alpha).flatten().double().log2().floor().cpu()
    octaves = torch.where(values.isfinite().all(0), octaves, torch.nan)
    return [
        Bin(int(octave), int(inside.sum()), *values[:, inside].mean(1).tolist())
        for octave in octaves[octaves.isfinite()].unique().tolist()
        for inside in [octaves == octave]
    ]


def together(bins: Iterable[Bin]) -> list[Bin]:
    """The bins of several measurements as those of one, by rising noise."""
    names = [field.name for field in fields(Bin)][2:]
    found: dict[int, list[Bin]] = {}
    for one in bins:
        found.setdefault(one.octave, []).append(one)
    merged = []
    for octave, parts in sorted(found.items()):
        samples = sum(part.samples for part in parts)
        means = (math.fsum(getattr(p, name) * p.samples for p in parts) / samples for name in names)
        merged.append(Bin(octave, samples, *means))
    return merged
