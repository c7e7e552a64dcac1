"""The measures against closed forms, brute force and SciPy."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from stf_train import quality
from stf_train.quality import Moments, frechet_distance, inception_score, moments, precision_recall


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(params=[2048, 7])
def rows(request, monkeypatch):
    """Everything at once, and blocks with a short last one."""
    monkeypatch.setattr(quality, "ROWS", request.param)


def covariance(rng, F, rank=None):
    factor = rng.normal(size=(F, rank or 2 * F))
    return torch.from_numpy(factor @ factor.T / factor.shape[1])


def gaussian(rng, F, rank=None):
    return Moments(torch.from_numpy(rng.normal(size=F)), covariance(rng, F, rank))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_are_those_of_numpy(rng, rows, dtype):
    # About a mean a thousand deviations away, as a float32 difference of sums would not bear.
    features = torch.from_numpy(rng.normal(1000, 1, size=(40, 5))).to(dtype)
    got = moments(features)
    exact = features.double().numpy()
    assert got.mean.dtype == got.covariance.dtype == torch.float64
    np.testing.assert_allclose(got.mean, exact.mean(0), rtol=1e-13)
    np.testing.assert_allclose(got.covariance, np.cov(exact.T), rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", [(1, 3), (3,), (2, 3, 4)])
def test_moments_errors(shape):
    with pytest.raises(ValueError, match=r"features must be \[m, F\] with m >= 2, got"):
        moments(torch.zeros(shape))


def test_distance_of_numbers():
    """N(0, 2^2) and N(3, 5^2): 3^2 + (2 - 5)^2."""
    a = Moments(torch.tensor([0.0]).double(), torch.tensor([[4.0]]).double())
    b = Moments(torch.tensor([3.0]).double(), torch.tensor([[25.0]]).double())
    assert frechet_distance(a, b) == pytest.approx(18, rel=1e-14)


def test_distance_of_commuting_covariances(rng):
    """||m_a - m_b||^2 + sum (sqrt lambda_a - sqrt lambda_b)^2 along common axes."""
    axes, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    a, b = rng.uniform(0.1, 3, (2, 6))
    means = rng.normal(size=(2, 6))
    got = frechet_distance(
        *(
            Moments(torch.from_numpy(m), torch.from_numpy(axes * values @ axes.T))
            for m, values in zip(means, (a, b), strict=True)
        )
    )
    expected = ((means[0] - means[1]) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert got == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("F", [1, 2, 40])
def test_distance_is_that_of_scipys_root(rng, F):
    a, b = gaussian(rng, F), gaussian(rng, F)
    root = scipy.linalg.sqrtm(a.covariance.numpy() @ b.covariance.numpy())
    expected = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace()
    expected = expected.item() - 2 * np.trace(root).real
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-11)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-11)


def test_distance_of_planar_covariances_has_a_closed_form(rng):
    """In two dimensions Tr (A B)^(1/2) = sqrt(Tr A B + 2 sqrt(det A det B))."""
    a, b = gaussian(rng, 2), gaussian(rng, 2)
    A, B = a.covariance, b.covariance
    trace = ((A @ B).trace() + 2 * (A.det() * B.det()).sqrt()).sqrt()
    expected = (a.mean - b.mean).square().sum() + A.trace() + B.trace() - 2 * trace
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-13)


@pytest.mark.parametrize("rank", [None, 1, 10])
def test_distance_to_itself_is_nothing(rng, rank):
    a = gaussian(rng, 50, rank)
    assert abs(frechet_distance(a, a)) < 1e-12 * a.covariance.trace() * 50


def test_distance_of_lines_has_a_closed_form(rng):
    """Rank one, where SciPy's root is complex: |u|^2 + |v|^2 - 2 |u . v|."""
    u, v = torch.from_numpy(rng.normal(size=(2, 50)))
    zero = torch.zeros(50, dtype=torch.float64)
    got = frechet_distance(Moments(zero, u.outer(u)), Moments(zero, v.outer(v)))
    assert got == pytest.approx((u @ u + v @ v - 2 * (u @ v).abs()).item(), rel=1e-6)


def test_distance_of_widths_that_differ(rng):
    with pytest.raises(ValueError, match="a and b must have one width, got 2 and 3"):
        frechet_distance(gaussian(rng, 2), gaussian(rng, 3))


def brute_force_score(logits, splits):
    scores = []
    for part in np.array_split(logits, splits):
        p = np.exp(part) / np.exp(part).sum(1, keepdims=True)
        mean = p.mean(0)
        scores.append(math.exp(np.mean([(row * np.log(row / mean)).sum() for row in p])))
    return np.mean(scores)


@pytest.mark.parametrize("splits", [1, 3, 10])
def test_inception_score(rng, splits):
    logits = rng.normal(size=(32, 5))
    expected = brute_force_score(logits, splits)
    assert inception_score(torch.from_numpy(logits), splits) == pytest.approx(expected, rel=1e-13)


def test_inception_score_of_certain_and_of_uncertain_samples():
    """All K classes alike and certain, K; one class, or none preferred, 1."""
    certain = torch.full((12, 4), -math.inf).scatter_(1, (torch.arange(12) % 4)[:, None], 0.0)
    assert inception_score(certain, 1) == pytest.approx(4, rel=1e-14)
    assert inception_score(certain, 3) == pytest.approx(4, rel=1e-14)
    assert inception_score(certain[:1].expand(12, 4), 2) == 1
    assert inception_score(torch.zeros(12, 4), 2) == 1
    assert inception_score(certain.clamp(min=-2000), 1) == pytest.approx(4, rel=1e-14)


@pytest.mark.parametrize("splits", [0, 5])
def test_inception_score_errors(splits):
    with pytest.raises(ValueError, match=rf"splits must lie in 1\.\.4, the samples, got {splits}"):
        inception_score(torch.zeros(4, 2), splits)


def brute_force_among(points, others, k):
    inside = 0
    for point in points:
        for j, other in enumerate(others):
            own = sorted(math.dist(other, third) for i, third in enumerate(others) if i != j)
            if math.dist(point, other) <= own[k - 1]:
                inside += 1
                break
    return inside / len(points)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("F", [1, 2, 6])
def test_precision_and_recall(rng, rows, k, F):
    real = torch.from_numpy(rng.normal(size=(23, F)))
    fake = torch.from_numpy(rng.normal(0.5, 0.7, size=(30, F)))
    expected = brute_force_among(fake, real, k), brute_force_among(real, fake, k)
    assert precision_recall(real, fake, k) == expected
    assert 0 < min(expected) < 1


def test_precision_and_recall_far_from_zero(rng, rows):
    """Distances of 1e-2 at 1e6, which products about zero lose even in float64."""
    real = torch.from_numpy(1e6 + 1e-2 * rng.normal(size=(23, 3)))
    fake = torch.from_numpy(1e6 + 1e-2 * rng.normal(0.5, 0.7, size=(30, 3)))
    expected = brute_force_among(fake, real, 3), brute_force_among(real, fake, 3)
    assert precision_recall(real, fake) == expected


def test_precision_and_recall_in_a_line():
    """Data 0, 1, 2, 3, 10 with k = 1 reach 1, 1, 1, 1, 7; samples 3.5, 4.5, 30, 31."""
    real = torch.tensor([[0.0], [1], [2], [3], [10]])
    fake = torch.tensor([[3.5], [4.5], [30], [31]])
    # 10 reaches as far as 3, so 3.5 and 4.5 are among the data; 3.5 reaches 2.5..4.5.
    assert precision_recall(real, fake, 1) == (0.5, 0.2)


def test_equal_distances_count(rng, rows):
    """Pairs a, a + u in whole numbers, far from each other: a - u is just as far from a."""
    a = torch.from_numpy(rng.integers(-1000, 1000, (40, 16))).double()
    u = torch.from_numpy(rng.integers(-5, 6, (40, 16))).double()
    real = torch.cat([a, a + u])
    assert precision_recall(real, a - u, 1)[0] == 1
    assert precision_recall(real, a - 1.0001 * u, 1)[0] == 0


def test_points_lie_among_themselves(rng, rows):
    """Even where the reach of all of them is zero."""
    points = torch.from_numpy(rng.normal(size=(10, 64)))
    assert precision_recall(points, points) == (1, 1)
    assert precision_recall(points.repeat(4, 1), points, 3)[0] == 1


@pytest.mark.parametrize(
    ("real", "fake", "k", "message"),
    [
        ((5, 2), (5, 3), 1, r"\[N, F\] and \[m, F\], got \[5, 2\] and \[5, 3\]"),
        ((5,), (5, 3), 1, r"\[N, F\] and \[m, F\], got \[5\]"),
        ((5, 2), (4, 2), 4, r"neighbours must lie in 1\.\.3, got 4"),
        ((5, 2), (4, 2), 0, r"neighbours must lie in 1\.\.3, got 0"),
    ],
)
def test_precision_and_recall_errors(real, fake, k, message):
    with pytest.raises(ValueError, match=message):
        precision_recall(torch.zeros(real), torch.zeros(fake), k)


def test_memory_is_bounded(monkeypatch):
    """No tensor of distances is larger than a block."""
    sizes = []
    whole = quality.squared_distances

    def spy(a, b, centre):
        sizes.append(whole(a, b, centre).shape)
        return whole(a, b, centre)

    monkeypatch.setattr(quality, "ROWS", 16)
    monkeypatch.setattr(quality, "squared_distances", spy)
    precision_recall(torch.randn(100, 2), torch.randn(50, 2))
    assert max(max(size) for size in sizes) == 16
