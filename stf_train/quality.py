"""How far samples are from data, by features of both: Frechet distance, inception score,
precision and recall, all in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ROWS = 2048  # features or distances in float64 at a time, along each axis


class Moments(NamedTuple):
    """Mean and covariance of features."""

    mean: Tensor  # [F] float64
    covariance: Tensor  # [F, F] float64


def moments(features: Tensor) -> Moments:
    """Their mean and their covariance, the sum of products over m - 1.

    Args:
        features: [m, F], m >= 2, any float type.

    Raises:
        ValueError: features are not [m, F] with m >= 2.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features must be [m, F] with m >= 2, got {list(features.shape)}")
    m, F = features.shape
    mean = torch.zeros(F, dtype=torch.float64, device=features.device)
    for block in features.split(ROWS):
        mean += block.double().sum(0) / m
    covariance = torch.zeros(F, F, dtype=torch.float64, device=features.device)
    for block in features.split(ROWS):
        # About the mean, not as a difference of large sums.
        centred = block.double() - mean
        covariance.addmm_(centred.T, centred, alpha=1 / (m - 1))
    return Moments(mean, covariance)


def frechet_distance(a: Moments, b: Moments) -> float:
    """The squared Wasserstein-2 distance of two Gaussians with these moments.

        ||m_a - m_b||^2 + Tr C_a + Tr C_b - 2 Tr (C_a^(1/2) C_b C_a^(1/2))^(1/2)

    The last trace is the sum of the singular values of C_a^(1/2) C_b^(1/2), whose squares are the
    eigenvalues of the symmetric product. So nothing is complex, and a covariance without full rank,
    as of fewer samples than features, is as good as any other.

    On the features of Inception-v3 this is the FID. It is biased upwards, the more the fewer
    samples there are: only distances at the same number of samples can be compared.

    Raises:
        ValueError: the moments have different widths.

    Source: D. Dowson and B. Landau, "The Frechet Distance between Multivariate Normal
    Distributions", 1982; M. Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge
    to a Local Nash Equilibrium", NeurIPS 2017, Equation 6.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"a and b must have one width, got {len(a.mean)} and {len(b.mean)}")
    between = root(a.covariance).T @ root(b.covariance)
    traces = a.covariance.trace() + b.covariance.trace()
    distance = (a.mean - b.mean).square().sum() + traces - 2 * torch.linalg.svdvals(between).sum()
    return distance.item()


def root(covariance: Tensor) -> Tensor:
    """R with R R^T = C, [F, F]; eigenvalues below zero are rounding, and become zero."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt()


def inception_score(logits: Tensor, splits: int = 10) -> float:
    """exp E_x KL(p(y | x) || p(y)), the mean over consecutive splits of the samples.

    p(y) is the mean of p(y | x) over the split, so that the score depends on how many samples a
    split has; ten splits are the custom.

    Args:
        logits: of p(y | x), [m, K].
        splits: 1..m.

    Raises:
        ValueError: splits is outside.

    Source: T. Salimans et al., "Improved Techniques for Training GANs", NeurIPS 2016, Section 4.
    """
    if not 1 <= splits <= len(logits):
        raise ValueError(f"splits must lie in 1..{len(logits)}, the samples, got {splits}")
    scores = []
    for part in logits.tensor_split(splits):
        log_p = part.double().log_softmax(1)  # [m, K]
        log_mean = log_p.logsumexp(0) - torch.tensor(len(part), dtype=torch.float64).log()
        # exp(log p) (log p - log mean) is 0 where p is, even for p = exp(-inf).
        terms = torch.where(log_p.exp() > 0, log_p.exp() * (log_p - log_mean), 0.0)
        scores.append(terms.sum(1).mean().exp())
    return torch.stack(scores).mean().item()


def precision_recall(real: Tensor, fake: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """The part of the samples that lies among the data, and of the data among the samples.

    A point lies among others if it is within the distance of one of them to its k-th nearest
    neighbour among themselves; equal distances count.

    Args:
        real: features of data, [N, F].
        fake: features of samples, [m, F].
        neighbours: k, below N and m.

    Returns:
        Precision and recall.

    Raises:
        ValueError: the widths differ, or there are too few of either.

    Source: T. Kynkaanniemi et al., "Improved Precision and Recall Metric for Assessing Generative
    Models", NeurIPS 2019, Equations 1 and 2.
    """
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise ValueError(
            f"real and fake must be [N, F] and [m, F], got {list(real.shape)} "
            f"and {list(fake.shape)}"
        )
    fewest = min(len(real), len(fake))
    if not 1 <= neighbours < fewest:
        raise ValueError(f"neighbours must lie in 1..{fewest - 1}, got {neighbours}")
    centre = moments(real).mean
    return (
        among(fake, real, radii(real, neighbours, centre), centre),
        among(real, fake, radii(fake, neighbours, centre), centre),
    )


def radii(points: Tensor, neighbours: int, centre: Tensor) -> Tensor:
    """Squared distance of each point to its k-th nearest other one, [N] float64."""
    blocks = points.split(ROWS)
    found = []
    for i, rows in enumerate(blocks):
        nearest = centre.new_full((len(rows), neighbours), torch.inf)
        for j, columns in enumerate(blocks):
            distances = squared_distances(rows, columns, centre)
            if i == j:
                distances.fill_diagonal_(torch.inf)
            candidates = torch.cat([nearest, distances], dim=1)
            nearest = candidates.topk(neighbours, largest=False).values
        found.append(nearest[:, -1])
    return torch.cat(found)


def among(points: Tensor, others: Tensor, reach: Tensor, centre: Tensor) -> float:
    """The part of the points that lies within the reach of any of the others."""
    # Rounding must not part equal distances: what it can do to a sum of F products.
    largest = max(
        (block.double() - centre).square().sum(1).max().item()
        for part in (points, others)
        for block in part.split(ROWS)
    )
    slack = 8 * points.shape[1] * torch.finfo(torch.float64).eps * largest
    inside = 0
    for rows in points.split(ROWS):
        covered = torch.zeros(len(rows), dtype=torch.bool, device=points.device)
        for columns, limit in zip(others.split(ROWS), reach.split(ROWS), strict=True):
            distances = squared_distances(rows, columns, centre)
            covered |= (distances <= limit + slack).any(1)
        inside += int(covered.sum())
    return inside / len(points)


def squared_distances(a: Tensor, b: Tensor, centre: Tensor) -> Tensor:
    """||a_i - b_j||^2 of features [m, F] and [n, F], [m, n] float64.

    By a matrix product, about the centre, where the cancellation is smallest.
    """
    a, b = a.double() - centre, b.double() - centre
    return torch.addmm(a.square().sum(1)[:, None] + b.square().sum(1), a, b.T, alpha=-2).clamp_(
        min=0
    )
