"""The variance of the training target at a time t, with one source and with n references.

    V_DSM(t)    = alpha^2 / sigma^4  E ||y - E[y | x_t]||^2
    V_STF(t, n) = alpha^2 / sigma^4  E ||D_n(x_t) - E[y | x_t]||^2

y is the source, D_n the mean under the posterior over n references of which y is one. Both are in
units of the score squared (1 / data units^2), summed over the d values of a sample. How far the
posterior is from the prior, between 0 for all noise and its largest value for none, is

    D(t) = E D_f(p_0 || p_0(. | x_t)),  f(r) = (1/r - 1)^2 for r < 3/2, else 8 r / 27 - 1/3

Source: Xu, Tong, Jaakkola, "Stable Target Field for Reduced Variance Score Estimation in Diffusion
Models", ICLR 2023, Sections 3 and 4, Figures 2 and 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from scipy.stats import binom
from torch import Tensor

from stf_kernels import References, stable_target, stable_target_with_stats
from stf_train.data.shipped import PATCH, patches_source
from stf_train.process import Path

ROWS = 256  # noisy samples in one call
SET_SOURCES = 16  # noisy samples that share a set of references, at most
TOGETHER = 1024  # references in one call, of as many sets as that makes


class Estimate(tuple[float, float]):
    """A mean and its standard error."""

    @classmethod
    def of(cls, values: Tensor) -> Estimate:
        """Of independent values [m], m >= 2."""
        return cls((values.mean().item(), values.std().item() / math.sqrt(len(values))))


class Problem(Protocol):
    """A distribution of clean samples, and a finite set from it."""

    name: str
    whole: Tensor  # the set, [N, *shape], bytes or float64

    def sets(self, count: int, n: int, generator: torch.Generator) -> Tensor:
        """`count` independent sets of n exchangeable samples, one after the other."""

    def references(self, data: Tensor, labels: Tensor | None = None) -> References:
        """Samples of the problem, as it holds them, as references."""

    def score(self, x: Tensor, t: float, process: Path) -> Tensor:
        """(alpha E[y | x_t] - x_t) / sigma^2, the target without variance."""


class Patches:
    """N of the patches of scikit-learn's two photographs, in [0, 1]: the distribution is the set.

    Args:
        N: how many, drawn without replacement.
        seed: of the draw.
        size: of a patch, pixels.

    Raises:
        ValueError: there are fewer than N.
    """

    def __init__(self, N: int, seed: int = 0, size: int = PATCH) -> None:
        every = torch.cat(list(patches_source(size).chunks()))
        if not 1 <= N <= len(every):
            raise ValueError(f"N must lie in 1..{len(every)}, the patches there are, got {N}")
        generator = torch.Generator().manual_seed(seed)
        self.name = f"{N} photograph patches, 3x{size}x{size}"
        self.whole = every[torch.randperm(len(every), generator=generator)[:N]]
        self._references = self.references(self.whole)

    def sets(self, count: int, n: int, generator: torch.Generator) -> Tensor:
        if not 1 <= n <= len(self.whole):
            raise ValueError(f"n must lie in 1..{len(self.whole)}, the patches, got {n}")
        draws = [torch.randperm(len(self.whole), generator=generator)[:n] for _ in range(count)]
        return self.whole[torch.cat(draws)]

    def references(self, data: Tensor, labels: Tensor | None = None) -> References:
        return References(data, value_range=(0, 1), labels=labels)

    def score(self, x: Tensor, t: float, process: Path) -> Tensor:
        alpha, sigma = scales(process, t)
        return stable_target(x, self._references, sigma, alpha=alpha)


class TwoGaussians:
    """Half N(mu 1, s^2 I), half N(-mu 1, s^2 I) in d dimensions, and N samples of it.

    Its closed forms are for alpha = 1.
    """

    def __init__(
        self, N: int = 1000, seed: int = 0, d: int = 64, mu: float = 0.1, s: float = 1e-4
    ) -> None:
        self.d, self.mu, self.s = d, mu, s
        self.name = f"two Gaussians at +-{mu:g} in {d} dimensions, deviation {s:g}"
        self.whole = self.sets(1, N, torch.Generator().manual_seed(seed))

    def sets(self, count: int, n: int, generator: torch.Generator) -> Tensor:
        m = count * n
        sign = 2.0 * torch.randint(2, (m, 1), generator=generator) - 1
        z = torch.randn(m, self.d, generator=generator, dtype=torch.float64)
        return self.mu * sign + self.s * z

    def references(self, data: Tensor, labels: Tensor | None = None) -> References:
        return References(data, labels=labels)

    def score(self, x: Tensor, t: float, process: Path) -> Tensor:
        _, sigma = scales(process, t)
        v = sigma**2 + self.s**2
        middle = self.mu * torch.tanh(self.mu * x.sum(1, keepdim=True) / v)
        return (middle - x) / v

    def _odds(self, sigma: float) -> tuple[np.ndarray, np.ndarray]:
        """ln(a / (1 - a)) of a = P(source is of the first half | x), and the measure of x.

        Given a source of the first half it is normal: 2 q + 2 sqrt(q) z with q = d mu^2 / v. On an
        even grid of z the trapezoidal sum converges faster than any power of the step.
        """
        z = np.linspace(-12, 12, 1601)
        q = self.d * self.mu**2 / (sigma**2 + self.s**2)
        measure = np.exp(-(z**2) / 2) * (z[1] - z[0]) / math.sqrt(2 * math.pi)
        return 2 * q + 2 * math.sqrt(q) * z, measure

    def closed_dsm(self, sigma: float) -> float:
        """V_DSM = d s^2 / (sigma^2 v) + E 4 a (1 - a) ||mu||^2 / v^2, v = sigma^2 + s^2.

        What Appendix C of the paper prints lacks d in the first term and the square of ||mu||.
        """
        odds, measure = self._odds(sigma)
        v = sigma**2 + self.s**2
        between = measure @ (4 * logistic(odds) * logistic(-odds)) * self.d * self.mu**2 / v**2
        return float(self.d * self.s**2 / (sigma**2 * v) + between)

    def closed_stf(self, sigma: float, n: int) -> float:
        """V_STF to leading order in s / sigma, exact for s = 0.

        With k of the n references in the first half, the source's, k - 1 being binomial:

            a_k / (1 - a_k) = k / (n - k)  a / (1 - a)
            V_STF = E[4 ||mu||^2 (a_k - a)^2 + d s^2 (a_k^2 / k + (1 - a_k)^2 / (n - k))] / sigma^4
        """
        odds, measure = self._odds(sigma)
        k = np.arange(1, n)
        odds_k = odds[:, None] + np.log(k / (n - k))
        # For k = n there is no other half.
        a = np.concatenate([logistic(odds_k), np.ones((len(odds), 1))], axis=1)
        b = np.concatenate([logistic(-odds_k), np.zeros((len(odds), 1))], axis=1)
        k = np.arange(1, n + 1)
        # b - (1 - a), for a near 1 loses the digits of a.
        between = 4 * self.d * self.mu**2 * (b - logistic(-odds)[:, None]) ** 2
        within = self.d * self.s**2 * (a**2 / k + b**2 / np.maximum(n - k, 1))
        return float(measure @ (between + within) @ binom.pmf(k - 1, n - 1, 0.5)) / sigma**4

    def closed_divergence(self, sigma: float) -> float:
        """D(t) to leading order in s / sigma: the two halves are two points."""
        odds, measure = self._odds(sigma)
        w = torch.from_numpy(np.stack([logistic(odds), logistic(-odds)], axis=1))
        return float(measure @ divergence(w).numpy())


def logistic(odds: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-odds))."""
    return np.exp(-np.logaddexp(0, -odds))


def divergence(w: Tensor) -> Tensor:
    """D_f of the uniform distribution and the weights of N references.

        sum_k of w_k (N w_k - 1)^2 where N w_k > 2/3, else 8 / (27 N) - w_k / 3

    Args:
        w: [B, N], rows of sum 1.

    Returns:
        [B], 0 for equal weights, (N - 1)^2 + 8 (N - 1) / (27 N) for a single one.
    """
    N = w.shape[1]
    return torch.where(N * w > 2 / 3, w * (N * w - 1) ** 2, 8 / (27 * N) - w / 3).sum(1)


def scales(process: Path, t: float) -> tuple[float, float]:
    """alpha and sigma at t."""
    time = torch.tensor(t, dtype=torch.float64)
    return process.alpha(time).item(), process.sigma(time).item()


def noisy(y: Tensor, t: float, process: Path, generator: torch.Generator) -> Tensor:
    """x_t = alpha y + sigma eps of each row of y, float64."""
    alpha, sigma = scales(process, t)
    return alpha * y.double() + sigma * process.noise.draw(y.shape, generator, torch.float64)


class WholeSet:
    """The posterior over all N samples of a problem's set."""

    def __init__(self, problem: Problem, process: Path) -> None:
        self.process = process
        self._references = problem.references(problem.whole)
        # A coordinate for each sample, 1 for that one and 0 for all others: in them every sample is
        # as far from x = 0, which leaves the weights as they are, and in them the posterior mean
        # *is* the weights.
        data = problem.whole.flatten(1)
        one = 255 if data.dtype == torch.uint8 else 1
        marks = one * torch.eye(len(data), dtype=data.dtype)
        self._marked = problem.references(torch.cat([data, marks], dim=1))

    def _noisy(self, t: float, samples: int, generator: torch.Generator) -> Sequence[Tensor]:
        """Samples of p_t: each of the set is their source equally often, as far as that goes."""
        N = len(self._references)
        rounds = [torch.randperm(N, generator=generator) for _ in range(-(-samples // N))]
        y = self._references.decode(torch.cat(rounds)[:samples])
        return noisy(y, t, self.process, generator).split(ROWS)

    def dsm(self, t: float, samples: int, generator: torch.Generator) -> Estimate:
        """V_DSM(t) = alpha^2 / sigma^4 E[second moment - ||D||^2], the trace of the covariance."""
        alpha, sigma = scales(self.process, t)
        traces = []
        for x in self._noisy(t, samples, generator):
            D, stats = stable_target_with_stats(
                x, self._references, sigma, alpha=alpha, target="denoised"
            )
            traces.append(stats.second_moment - D.flatten(1).square().sum(1))
        return Estimate.of(torch.cat(traces).clamp(min=0) * (alpha**2 / sigma**4))

    def weights(self, x: Tensor, t: float) -> Tensor:
        """w_k of noisy samples [B, *shape], [B, N] float64."""
        alpha, sigma = scales(self.process, t)
        padded = torch.cat([x.flatten(1), x.new_zeros(len(x), len(self._references))], dim=1)
        D = stable_target(padded, self._marked, sigma, alpha=alpha, target="denoised")
        # A weight of zero comes back as the rounding of a sum that cancels.
        return D[:, -len(self._references) :].clamp(min=0)

    def divergence(self, t: float, samples: int, generator: torch.Generator) -> Estimate:
        """D(t) of the set."""
        parts = self._noisy(t, samples, generator)
        return Estimate.of(torch.cat([divergence(self.weights(x, t)) for x in parts]))


def stable_variance(
    problem: Problem,
    process: Path,
    t: float,
    n: int,
    samples: int,
    generator: torch.Generator,
) -> Estimate:
    """V_STF(t, n), from the targets that training would take.

    The references are drawn anew for every few noisy samples, whose sources are among them; the
    error is that over these independent sets. Several sets go to one call, told apart by labels.

    Args:
        problem: what samples are drawn from.
        process: alpha and sigma.
        t: time.
        n: references of a sample, its source included.
        samples: noisy samples, at least this many.
        generator: on the CPU.
    """
    alpha, sigma = scales(process, t)
    share = min(n, SET_SOURCES)
    at_once = max(1, TOGETHER // n)
    calls = -(-max(samples, 2 * share) // (share * at_once))
    if at_once == 1:
        calls = max(calls, 2)
    of_sets = []
    for _ in range(calls):
        labels = torch.arange(at_once).repeat_interleave(n)
        references = problem.references(problem.sets(at_once, n, generator), labels)
        sources = (n * torch.arange(at_once)[:, None] + torch.arange(share)).flatten()
        x = noisy(references.decode(sources), t, process, generator)
        target = stable_target(x, references, sigma, alpha=alpha, labels=labels[sources])
        error = (target - problem.score(x, t, process)).flatten(1).square().sum(1)
        of_sets.append(error.view(at_once, share).mean(1))
    return Estimate.of(torch.cat(of_sets))


@dataclass(frozen=True)
class Curve:
    """One quantity over time."""

    quantity: str  # "V_DSM", "V_STF" or "D"
    n: int | None  # references, of V_STF
    t: tuple[float, ...]
    values: tuple[float, ...]
    errors: tuple[float, ...] | None  # standard errors; None for a closed form


@dataclass(frozen=True)
class Budget:
    """How much is drawn at each time."""

    points: int  # times
    samples: int  # noisy samples for each variance
    divergence_samples: int  # for D(t)


def times(points: int) -> list[float]:
    """Even from 0 to 1."""
    return np.linspace(0, 1, points).tolist()


def measured(
    problem: Problem,
    process: Path,
    ns: Sequence[int],
    budget: Budget,
    seed: int,
    tick: Callable[[], None] = lambda: None,
) -> list[Curve]:
    """V_DSM and D(t) of the problem's set, and V_STF for each n.

    Args:
        problem, process: of what, and under which noise.
        ns: references.
        budget: how much is drawn.
        seed: of the draws; every curve and time has a generator of its own.
        tick: called after each of the budget's times for each of the 2 + len(ns) curves.
    """
    whole = WholeSet(problem, process)
    grid = times(budget.points)

    def curve(
        quantity: str, n: int | None, estimate: Callable[[float, torch.Generator], Estimate]
    ) -> Curve:
        found = []
        for i, t in enumerate(grid):
            # SeedSequence keeps streams apart, however near their numbers.
            mixed = np.random.SeedSequence([seed, len(problem.whole), number(quantity, n), i])
            generator = torch.Generator().manual_seed(int(mixed.generate_state(1)[0]))
            found.append(estimate(t, generator))
            tick()
        values, errors = zip(*found, strict=True)
        return Curve(quantity, n, tuple(grid), values, errors)

    def stf(n: int) -> Callable[[float, torch.Generator], Estimate]:
        return lambda t, g: stable_variance(problem, process, t, n, budget.samples, g)

    return [
        curve("V_DSM", None, lambda t, g: whole.dsm(t, budget.samples, g)),
        curve("D", None, lambda t, g: whole.divergence(t, budget.divergence_samples, g)),
        *(curve("V_STF", n, stf(n)) for n in ns),
    ]


def number(quantity: str, n: int | None) -> int:
    """A number for each curve, the same everywhere."""
    return ("V_DSM", "D", "V_STF").index(quantity) + 3 * (n or 0)


def closed_forms(
    problem: TwoGaussians, process: Path, ns: Sequence[int], points: int = 201
) -> list[Curve]:
    """The same curves without chance."""
    grid = times(points)

    def curve(quantity: str, n: int | None, value: Callable[[float], float]) -> Curve:
        values = tuple(value(scales(process, t)[1]) for t in grid)
        return Curve(quantity, n, tuple(grid), values, None)

    return [
        curve("V_DSM", None, problem.closed_dsm),
        curve("D", None, problem.closed_divergence),
        *(curve("V_STF", n, partial(problem.closed_stf, n=n)) for n in ns),
    ]
