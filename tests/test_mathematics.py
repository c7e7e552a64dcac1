"""What the theory says of the target, by enumeration, closed forms and limits."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import helpers
import numpy as np
import pytest
import torch
from helpers import (
    HALF_ULP32,
    HALF_ULP64,
    assert_rows_within,
    byte_values,
    denoised_bound,
    per_row,
    row_norm,
)
from scipy import integrate
from torch import Tensor

from stf_kernels import EDM, References, Velocity, oracle, stable_target, stable_target_with_stats

# Four data points in the plane and places to look from, sigma about their distance.
POINTS = torch.tensor([[10, 40], [220, 90], [90, 250], [130, 30]], dtype=torch.uint8)
PLACES = torch.tensor([[-0.9, -0.5], [0.0, 0.0], [0.4, -0.6], [1.2, 1.1]]).double()
SIGMA = 0.6


def density(x: Tensor, y: Tensor, sigma: float) -> Tensor:
    """exp(-||x - y||^2 / (2 sigma^2)) of every place x [B, d] from every point y [n, d]."""
    return torch.exp(-((x[:, None] - y[None]) ** 2).sum(2) / (2 * sigma**2))


def reference_sets(n: int, replacement: bool) -> dict[tuple[int, ...], float]:
    """Every set of n of the four points, with its probability when n are drawn one by one."""
    if not replacement:
        sets = list(itertools.combinations(range(4), n))
        return dict.fromkeys(sets, 1 / len(sets))
    sets = itertools.combinations_with_replacement(range(4), n)
    orders = {s: math.factorial(n) / math.prod(math.factorial(s.count(k)) for k in s) for s in sets}
    return {s: count / 4**n for s, count in orders.items()}


class Enumeration:
    """D of every reference set at every place, and the sets' probabilities given the place."""

    def __init__(self, n: int, replacement: bool, source_in: bool, **options: str) -> None:
        y = byte_values(POINTS)
        near = density(PLACES, y, SIGMA)
        self.full = oracle.denoised(PLACES, y, SIGMA)
        d, second_moment, probability, bounds = [], [], [], []
        for members, prior in reference_sets(n, replacement).items():
            members = list(members)
            refs = References(POINTS[members], value_range=(-1, 1))
            target, stats = stable_target_with_stats(
                PLACES, refs, SIGMA, target="denoised", **options
            )
            d.append(target)
            second_moment.append(stats.second_moment)
            # The source: one of the set with equal probability, or any of the four.
            probability.append(prior * near[:, members if source_in else range(4)].mean(1))
            bounds.append(denoised_bound(PLACES, y[members], SIGMA, precision=options["precision"]))
        self.d, self.second_moment = torch.stack(d), torch.stack(second_moment)
        self.probability = torch.stack(probability) / torch.stack(probability).sum(0)  # [sets, B]
        # What the enumeration itself rounds: exponents below 32, and a few operations.
        self.bound = torch.stack(bounds).amax(0) + 64 * HALF_ULP64 * row_norm(y).max()

    def mean(self, values: Tensor) -> Tensor:
        """The expectation over the sets of values [sets, B, ...] at every place."""
        return torch.einsum("sb,sb...->b...", self.probability, values)


@pytest.mark.parametrize("replacement", [True, False], ids=["with", "without"])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_unbiased_at_every_n_if_the_source_is_a_reference(n, replacement, precision, backend):
    sets = Enumeration(n, replacement, source_in=True, precision=precision, backend=backend)
    assert_rows_within(sets.mean(sets.d), sets.full, sets.bound)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_biased_if_the_source_is_left_out(n, precision, backend):
    sets = Enumeration(n, True, source_in=False, precision=precision, backend=backend)
    bias = row_norm(sets.mean(sets.d) - sets.full)
    assert bool((bias > 1e4 * sets.bound).all())


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_law_of_total_variance(n, precision, backend):
    """V_DSM = V_STF + E[m2 - ||D||^2], so V_STF <= V_DSM; at every place, not only on average."""
    sets = Enumeration(n, True, source_in=True, precision=precision, backend=backend)
    y = byte_values(POINTS)
    posterior = density(PLACES, y, SIGMA)
    posterior = posterior / posterior.sum(1, keepdim=True)
    v_dsm = (posterior * ((y[None] - sets.full[:, None]) ** 2).sum(2)).sum(1)
    v_stf = sets.mean(((sets.d - sets.full) ** 2).sum(2))
    within = sets.mean(sets.second_moment - (sets.d**2).sum(2))
    # An error b of D is one of at most 2 b ||y|| in m2, in ||D||^2 and in ||D - D_full||^2 each.
    tolerance = 3 * 2 * sets.bound * 2 * float(row_norm(y).max())
    assert bool(((v_stf + within - v_dsm).abs() <= tolerance).all())
    assert bool((v_stf <= v_dsm + tolerance).all())
    assert n == 1 or bool((v_stf < 0.9 * v_dsm).any())


def test_log_weight_corrects_references_drawn_unevenly(precision, backend):
    """Sources uniform, other references drawn with q: pi(k | set) is proportional to 1 / q_k."""
    q = torch.tensor([0.1, 0.2, 0.3, 0.4]).double()
    y = byte_values(POINTS)
    near = density(PLACES, y, SIGMA)
    sums = {corrected: torch.zeros(4, 2).double() for corrected in (True, False)}
    mass, bounds = torch.zeros(4).double(), []
    for source, others in itertools.product(range(4), itertools.product(range(4), repeat=2)):
        members = [source, *others]
        probability = float(q[list(others)].prod()) / 4 * near[:, source]
        mass += probability
        for corrected, total in sums.items():
            weight = -q[members].log() if corrected else None
            d = stable_target(
                PLACES,
                References(POINTS[members], value_range=(-1, 1)),
                SIGMA,
                target="denoised",
                log_weight=weight,
                precision=precision,
                backend=backend,
            )
            total += probability[:, None] * d
            bounds.append(
                denoised_bound(PLACES, y[members], SIGMA, 1.0, weight, precision=precision)
            )
    full = oracle.denoised(PLACES, y, SIGMA)
    bound = torch.stack(bounds).amax(0)
    assert_rows_within(sums[True] / mass[:, None], full, bound)
    assert bool((row_norm(sums[False] / mass[:, None] - full) > 1e4 * bound).any())


def test_unbiased_with_the_references_of_the_sources_class(precision, backend):
    """sum over classes of P(class | x) D(x, class) is D(x): conditioning on a partition is free."""
    labels = torch.tensor([0, 1, 0, 1])
    y = byte_values(POINTS)
    near = density(PLACES, y, SIGMA)
    total = torch.zeros_like(PLACES)
    for label in (0, 1):
        d = stable_target(
            PLACES,
            References(POINTS, value_range=(-1, 1), labels=labels),
            SIGMA,
            target="denoised",
            labels=torch.full((4,), label),
            precision=precision,
            backend=backend,
        )
        total += near[:, labels == label].sum(1, keepdim=True) / near.sum(1, keepdim=True) * d
    bounds = [denoised_bound(PLACES, y[labels == k], SIGMA, precision=precision) for k in (0, 1)]
    full = oracle.denoised(PLACES, y, SIGMA)
    assert_rows_within(total, full, torch.stack(bounds).amax(0))


# Two Gaussians at +mu and -mu of deviation SPREAD, seen at t = 1/2 of the VE path .01 .. 50.
MU = torch.full((64,), 0.1)
SPREAD = 1e-4
MIDDLE = 0.01 * 5000**0.5


def closed_form_variance(x_mu: Tensor) -> Tensor:
    """V_DSM at places with x.mu = `x_mu`, the corrected closed form of the paper's appendix C."""
    total = SPREAD**2 + MIDDLE**2
    a = torch.sigmoid(2 * x_mu / total)
    mu2 = float((MU.double() ** 2).sum())
    return 64 * SPREAD**2 / (MIDDLE**2 * total) + 4 * a * (1 - a) * mu2 / total**2


class Places(NamedTuple):
    """Nodes of the distribution of x.mu given a source at +mu."""

    x_mu: Tensor
    probability: Tensor


def along_mu(nodes: int) -> Places:
    """Gauss-Hermite quadrature; with 100 nodes V_DSM is right to 1e-8."""
    z, weight = np.polynomial.hermite_e.hermegauss(nodes)
    mu2 = float((MU.double() ** 2).sum())
    x_mu = mu2 + math.sqrt(mu2 * (SPREAD**2 + MIDDLE**2)) * torch.from_numpy(z)
    return Places(x_mu, torch.from_numpy(weight / weight.sum()))


def closed_form_mean() -> float:
    """E of `closed_form_variance`, by adaptive quadrature: 0.94854."""
    mu2 = float((MU.double() ** 2).sum())

    def integrand(z: float) -> float:
        x_mu = mu2 + math.sqrt(mu2 * (SPREAD**2 + MIDDLE**2)) * torch.tensor(z).double()
        return float(closed_form_variance(x_mu)) * math.exp(-z * z / 2) / math.sqrt(2 * math.pi)

    return integrate.quad(integrand, -10, 10)[0]


def test_two_gaussians_have_the_variance_of_the_closed_form(precision, backend):
    """V_DSM = E[m2 - ||D||^2] / sigma^4 over 1000 references, at every place and on average.

    The references are a sample of the two Gaussians. Their deviations move the log odds by at most
    2 (||x|| + ||mu||) max||deviation|| / sigma^2, and a (1 - a) is no steeper than 1 / 4 in them;
    within a Gaussian they add at most their own square.
    """
    deviation = SPREAD * torch.randn(1000, 64, generator=helpers.generator(0))
    sign = torch.ones(1000).index_fill(0, torch.arange(500), -1.0)
    mu, largest = MU.double(), float(row_norm(deviation).max())
    mu2, places = float((mu**2).sum()), along_mu(100)
    x = places.x_mu[:, None] * mu / mu2
    d, stats = stable_target_with_stats(
        x,
        References(sign[:, None] * MU + deviation),
        MIDDLE,
        target="denoised",
        precision=precision,
        backend=backend,
    )
    variance = (stats.second_moment - (d**2).sum(1)) / MIDDLE**4
    log_odds = 2 * (row_norm(x) + mu2**0.5) * largest / MIDDLE**2
    moved = mu2 * log_odds + 4 * mu2**0.5 * largest + largest**2
    expected = closed_form_variance(places.x_mu)
    assert bool(((variance - expected).abs() <= moved / MIDDLE**4).all())
    mean = float(places.probability @ variance)
    tolerance = float(places.probability @ moved) / MIDDLE**4
    assert mean == pytest.approx(closed_form_mean(), abs=tolerance)


def test_two_gaussians_lose_variance_with_n(precision, backend):
    """V_STF at n references, from every count k of them at +mu, against the binomial sum."""
    mu = MU.double()
    mu2, places = float((mu**2).sum()), along_mu(100)
    x = places.x_mu[:, None] * mu / mu2
    half_odds = places.x_mu / MIDDLE**2  # log odds of +mu over -mu are twice this
    full = torch.tanh(half_odds)[:, None] * mu
    refs = References(torch.stack([MU, -MU]))
    bound = denoised_bound(x, torch.stack([mu, -mu]), MIDDLE, precision=precision).max()
    variances = []
    for n in (1, 2, 10, 100):
        variance, expected = (torch.zeros_like(places.x_mu) for _ in range(2))
        for k in range(1, n + 1):  # the source is at +mu, so one of the n at least
            draws = math.comb(n - 1, k - 1) / 2 ** (n - 1)
            counts = torch.tensor([k, n - k]).double()
            d = stable_target(
                x,
                refs,
                MIDDLE,
                target="denoised",
                log_weight=counts.log(),
                precision=precision,
                backend=backend,
            )
            own = torch.tanh(half_odds + (counts[0] / counts[1]).log() / 2)[:, None] * mu
            variance += draws * ((d - full) ** 2).sum(1)
            expected += draws * ((own - full) ** 2).sum(1)
        tolerance = 2 * bound * 2 * mu2**0.5 + bound**2
        assert bool(((variance - expected).abs() <= tolerance).all())
        variances.append(float(places.probability @ variance) / MIDDLE**4)
    assert variances == sorted(variances, reverse=True)
    within = 64 * SPREAD**2 / MIDDLE**4  # what points in place of Gaussians leave out, nearly
    assert variances[0] == pytest.approx(closed_form_mean(), abs=2 * within)


# target -> the same of D, x, sigma, alpha, from its definition with eps = (x - alpha D) / sigma.
DEFINITIONS = {
    "score": ("score", lambda d, x, s, a: -(x - a * d) / s**2),
    "denoised": ("denoised", lambda d, x, s, a: d),
    "epsilon": ("epsilon", lambda d, x, s, a: (x - a * d) / s),
    "v": ("v", lambda d, x, s, a: a * (x - a * d) / s - s * d),
    "rectified flow": ("velocity", lambda d, x, s, a: (x - a * d) / s - d),
    "rectified flow, data last": (Velocity(1.0, -1.0), lambda d, x, s, a: d - (x - a * d) / s),
    "any path": (Velocity(-0.7, 1.9), lambda d, x, s, a: -0.7 * d + 1.9 * (x - a * d) / s),
    "edm": (
        "edm",
        lambda d, x, s, a: (d - 0.25 / (s**2 + 0.25) * x) * (s**2 + 0.25) ** 0.5 / (s * 0.5),
    ),
    "edm of other data": (
        EDM(sigma_data=2.0),
        lambda d, x, s, a: (d - 4 / (s**2 + 4) * x) * (s**2 + 4) ** 0.5 / (s * 2),
    ),
}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_every_target_is_its_definition(name, precision, backend):
    target, define = DEFINITIONS[name]
    data = helpers.random_bytes(40, 3, 4, 4)
    y = byte_values(data)
    sigma = torch.tensor([0.05, 0.4, 0.9, 3.0]).double()
    alpha = torch.tensor([0.95, 0.6, 0.1, -0.3]).double()
    x = helpers.noisy(y[:4], sigma, alpha)
    refs = References(data, value_range=(-1, 1))
    options = {"alpha": alpha, "target": target, "precision": precision, "backend": backend}
    d = oracle.denoised(x, y, sigma, alpha=alpha)
    s, a = per_row(sigma, x), per_row(alpha, x)
    expected = define(d, x.double(), s, a)

    zero, one = torch.zeros(4, 1, 1, 1).double(), torch.ones(4, 1, 1, 1).double()
    of_d, of_x = (row_norm(define(*pair, s, a)) for pair in ((one, zero), (zero, one)))
    # Both coefficients take a handful of operations, each relative to the larger term.
    rounding = (
        8 * HALF_ULP64 * (of_d + of_x) * (1 + (a / s).abs().flatten()) * (row_norm(d) + row_norm(x))
    )
    bound = of_d * denoised_bound(x, y, sigma, alpha, precision=precision) + rounding
    assert_rows_within(stable_target(x.double(), refs, sigma, **options), expected, bound)
    bound = bound + HALF_ULP32 * row_norm(expected)
    assert_rows_within(stable_target(x, refs, sigma, **options), expected, bound)


def test_parameters_of_a_path_go_by_row(backend):
    data = helpers.random_bytes(9, 5)
    refs = References(data, value_range=(-1, 1))
    x = torch.randn(3, 5, generator=helpers.generator(1))
    dots = torch.tensor([0.3, -1.0, 2.0])
    together = stable_target(x, refs, 0.7, target=Velocity(dots, dots[:, None]), backend=backend)
    for i, dot in enumerate(dots.tolist()):
        alone = stable_target(x[i : i + 1], refs, 0.7, target=Velocity(dot, dot), backend=backend)
        assert torch.equal(together[i], alone[0])


def test_rectified_flow_is_one_field_in_both_conventions(backend):
    """Running time backwards swaps the conventions and turns the sign of the velocity."""
    refs = References(helpers.random_bytes(9, 5), value_range=(-1, 1))
    x = torch.randn(3, 5, generator=helpers.generator(1))
    t = torch.tensor([0.125, 0.5, 0.75])
    noise_last = stable_target(x, refs, t, alpha=1 - t, target="velocity", backend=backend)
    data_last = stable_target(x, refs, t, alpha=1 - t, target=Velocity(1, -1), backend=backend)
    assert torch.equal(noise_last, -data_last)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_one_reference_gives_the_single_sample_target(name, precision, backend):
    """n = 1 is denoising score matching: -eps / sigma, eps, alpha' y + sigma' eps, ..."""
    target, define = DEFINITIONS[name]
    data = helpers.random_bytes(1, 3, 8, 8)
    y = byte_values(data)
    sigma = torch.tensor([0.002, 0.5, 80.0]).double()
    alpha = torch.tensor([1.0, 0.8, 0.0]).double()
    x = helpers.noisy(y.expand(3, -1, -1, -1), sigma, alpha)
    refs = References(data, value_range=(-1, 1))
    actual = stable_target(
        x, refs, sigma, alpha=alpha, target=target, precision=precision, backend=backend
    )
    s, a = per_row(sigma, x), per_row(alpha, x)
    expected = define(y, x.double(), s, a)
    # D is y to a few float64 operations; the definition may cancel as much as 1 / sigma^2.
    slack = HALF_ULP32 * expected.abs() + 32 * HALF_ULP64 * (1 + x.double().abs()) * (1 + s**-2 + s)
    assert bool(((actual - expected).abs() <= slack).all())


def test_score_is_the_gradient_of_the_log_density(precision, backend):
    data = helpers.random_bytes(30, 6)
    y = byte_values(data)
    alpha = 0.8
    x = helpers.noisy(y[:5], 0.5, alpha).double().requires_grad_()
    log_density = torch.logsumexp(-((x[:, None] - alpha * y) ** 2).sum(2) / (2 * 0.5**2), 1)
    (gradient,) = torch.autograd.grad(log_density.sum(), x)
    refs = References(data, value_range=(-1, 1))
    actual = stable_target(x, refs, 0.5, alpha=alpha, precision=precision, backend=backend)
    bound = alpha / 0.5**2 * denoised_bound(x.detach(), y, 0.5, alpha, precision=precision)
    assert_rows_within(actual, gradient, bound)


def test_large_sigma_gives_the_mean(precision, backend):
    """Logits differ by at most ||y_k - y_l|| (||x|| + ||y||) / sigma^2, here below 1e-11."""
    data = helpers.random_bytes(300, 3, 4, 4)
    y = byte_values(data)
    x = torch.randn(3, 3, 4, 4, generator=helpers.generator(1)).double()
    refs = References(data, value_range=(-1, 1))
    actual = stable_target(x, refs, 1e7, target="denoised", precision=precision, backend=backend)
    bound = denoised_bound(x, y, 1e7, precision=precision) + 1e-11 * float(row_norm(y).max())
    assert_rows_within(actual, y.mean(0).expand_as(x), bound)


def test_small_sigma_gives_the_nearest(precision, backend):
    data = helpers.random_bytes(300, 3, 4, 4)
    y = byte_values(data)
    x = helpers.noisy(y[:3], 0.3)
    refs = References(data, value_range=(-1, 1))
    actual = stable_target(x, refs, 1e-6, target="denoised", precision=precision, backend=backend)
    nearest = ((x.double()[:, None] - y) ** 2).flatten(2).sum(2).argmin(1)
    assert_rows_within(actual, y[nearest], HALF_ULP32 * row_norm(y[nearest]) + 1e-14)


def test_alpha_zero_gives_the_mean_under_log_weight(precision, backend):
    """Samples of pure noise say nothing: w is softmax(log_weight), and nothing divides by alpha."""
    data = helpers.random_bytes(50, 7)
    y = byte_values(data)
    x = torch.randn(4, 7, generator=helpers.generator(1)).double()
    prior = torch.randn(50, generator=helpers.generator(2)).double()
    options = {"alpha": 0.0, "log_weight": prior, "precision": precision, "backend": backend}
    refs = References(data, value_range=(-1, 1))
    actual = stable_target(x, refs, 1.0, target="denoised", **options)
    bound = denoised_bound(x, y, 1.0, 0.0, prior, precision=precision)
    assert_rows_within(actual, (torch.softmax(prior, 0) @ y).expand(4, -1), bound)
    assert torch.equal(stable_target(x, refs, 1.0, target="epsilon", **options), x)
