"""Student-t noise (PFGM++): against differences, the exact density and the Gaussian limit."""

from __future__ import annotations

import itertools
import math
from decimal import Decimal, localcontext
from typing import NamedTuple

import helpers
import numpy as np
import plain_spec
import pytest
import torch
from helpers import (
    HALF_ULP32,
    HALF_ULP64,
    assert_rows_within,
    byte_values,
    denoised_bound,
    near_duplicates,
    per_row,
    photograph_patches,
    row_norm,
)
from scipy import stats
from torch import Tensor

from stf_kernels import (
    EDM,
    References,
    Velocity,
    arithmetic,
    oracle,
    stable_target,
    stable_target_with_stats,
    validate,
)

FREEDOMS = [1.0, 2.5, 64.0, 2048.0, 2.0**20]


def student_noise(shape: tuple[int, ...], D: Tensor | float, seed: int = 0) -> Tensor:
    """Standard multivariate Student-t noise, float64: a Gaussian row over sqrt(chi^2_D / D)."""
    rng = np.random.default_rng(seed)
    D = np.broadcast_to(np.asarray(D, dtype=np.float64), shape[:1])
    scale = torch.from_numpy(np.sqrt(rng.chisquare(D) / D))
    return torch.from_numpy(rng.standard_normal(shape)) / scale.view(-1, *[1] * (len(shape) - 1))


def log_density(x: Tensor, y: Tensor, sigma: float, D: float, alpha: float = 1.0) -> Tensor:
    """ln p(x_i | y_k) by scipy, float64 [B, n]."""
    x, y = x.double().flatten(1), y.double().flatten(1)
    kernel = stats.multivariate_t(np.zeros(x.shape[1]), sigma**2 * np.eye(x.shape[1]), df=D)
    difference = x[:, None] - alpha * y[None]
    return torch.from_numpy(np.asarray(kernel.logpdf(difference.numpy()))).view(len(x), len(y))


@pytest.mark.parametrize("D", [0.5, 1.0, 3.0, 100.0, 2.0**20])
def test_the_oracle_weighs_by_the_density_of_scipy(D):
    x = student_noise((5, 2, 3), D, seed=1)
    y = torch.randn(7, 2, 3, generator=helpers.generator(2), dtype=torch.float64)
    _, w = oracle.posterior(x, y, 0.7, 0.9, D=D)
    expected = torch.softmax(log_density(x, y, 0.7, D, 0.9), 1)
    # scipy's logarithm of 1 + u keeps 2^-53 of 1: times (d + D) / 2.
    assert torch.allclose(w, expected, rtol=(6 + D) * 8 * HALF_ULP64, atol=1e-14)


class Problem(NamedTuple):
    x: Tensor
    refs: References
    y: Tensor  # what the references are, float64
    sigma: Tensor
    D: Tensor | float


def problem(D: Tensor | float, size: int = 8, alpha: float = 1.0) -> Problem:
    """Photograph patches with near-duplicates, noise of every size."""
    data = near_duplicates(photograph_patches(40, size), 5)
    y = byte_values(data)
    sigma = torch.logspace(math.log10(0.02), math.log10(80), 24, dtype=torch.float64)
    clean = y[torch.arange(24) * 7]
    noise = student_noise(tuple(clean.shape), D, seed=3)
    x = (alpha * clean + per_row(sigma, clean) * noise).float()
    return Problem(x, References(data, value_range=(-1, 1)), y, sigma, D)


@pytest.mark.parametrize("D", FREEDOMS)
def test_posterior_mean_of_photographs(D, precision, backend):
    p = problem(D)
    actual = stable_target(
        p.x.double(),
        p.refs,
        p.sigma,
        target="denoised",
        noise="student_t",
        D=D,
        precision=precision,
        backend=backend,
    )
    bound = denoised_bound(p.x, p.y, p.sigma, D=D, precision=precision)
    assert float(bound.median()) < (1e-3 if precision == "exact" else 0.1)  # it says something
    assert_rows_within(actual, oracle.denoised(p.x, p.y, p.sigma, D=D), bound)
    gaussian = oracle.denoised(p.x, p.y, p.sigma)
    if D <= 64:
        assert bool((row_norm(actual - gaussian) > 10 * bound).any())


def test_degrees_of_freedom_go_by_row(precision, backend):
    D = torch.tensor(FREEDOMS).repeat(5)[:24]
    p = problem(D)
    options = {"target": "denoised", "noise": "student_t", "precision": precision}
    x = p.x.double()
    actual = stable_target(x, p.refs, p.sigma, D=D.view(-1, 1, 1, 1), backend=backend, **options)
    bound = denoised_bound(p.x, p.y, p.sigma, D=D, precision=precision)
    assert_rows_within(actual, oracle.denoised(p.x, p.y, p.sigma, D=D), bound)
    alone = [
        stable_target(x[i : i + 1], p.refs, p.sigma[i], D=D[i], backend=backend, **options)
        for i in range(24)
    ]
    assert torch.equal(actual, torch.cat(alone))


@pytest.mark.parametrize("target", ["score", "epsilon", "v", EDM(0.5), Velocity(-1.0, 1.0)])
def test_every_target_is_made_from_the_same_posterior_mean(target, precision, backend):
    p = problem(64.0, alpha=0.6)
    x = p.x.double()
    options = {"alpha": 0.6, "noise": "student_t", "D": 64, "precision": precision}
    options["backend"] = backend
    d = stable_target(x, p.refs, p.sigma, target="denoised", **options)
    actual = stable_target(x, p.refs, p.sigma, target=target, **options)
    sigma = per_row(p.sigma, x)
    noise = (x - 0.6 * d) / sigma
    size = (sigma**2 + 0.25).sqrt()
    expected = {
        "score": -noise / sigma,
        "epsilon": noise,
        "v": 0.6 * noise - sigma * d,
        EDM(0.5): (d - 0.25 / size**2 * x) / (sigma * 0.5 / size),
        Velocity(-1.0, 1.0): -d + noise,
    }[target]
    operands = (row_norm(x) + row_norm(d)) / p.sigma.clamp(max=1) ** 2 + row_norm(d) * p.sigma
    assert_rows_within(actual, expected, 16 * HALF_ULP64 * operands)


def test_alpha_labels_and_log_weight_all_hold(precision, backend):
    p = problem(16.0, alpha=0.7)
    n = len(p.refs)
    ref_labels = torch.arange(n) % 3
    weight = torch.randn(n, generator=helpers.generator(4), dtype=torch.float64)
    weight[::11] = -torch.inf
    labels = torch.arange(24) % 4 - 1
    refs = References(p.y.float(), limbs=4, labels=ref_labels, log_weight=weight)
    y = refs.decode().double()
    seen = (labels[:, None] == ref_labels) | (labels[:, None] == -1)
    total = torch.where(seen, weight, -torch.inf)
    actual = stable_target(
        p.x.double(),
        refs,
        p.sigma,
        alpha=0.7,
        target="denoised",
        labels=labels,
        noise="student_t",
        D=16,
        precision=precision,
        backend=backend,
    )
    bound = denoised_bound(
        p.x, y, p.sigma, 0.7, total, D=16.0, precision=precision, grid=2 / helpers.LIMIT[4]
    )
    assert_rows_within(actual, oracle.denoised(p.x, y, p.sigma, 0.7, total, D=16.0), bound)


@pytest.mark.parametrize("D", [2.0**30, 2.0**45, 2.0**60])
def test_many_degrees_of_freedom_are_the_gaussian_within_the_analytic_difference(D, backend):
    """(d + D)/2 ln(1 + q / D) is q/2 + d q / (2 D) - (d + D) q^2 / (4 D^2) + ..., q = |x-y|^2/s^2.

    The terms left out alternate and fall, so neither of the two named is exceeded by the sum.
    """
    p = problem(D)
    x = p.x.double()
    options = {"target": "denoised", "backend": backend}
    gaussian = stable_target(x, p.refs, p.sigma, **options)
    actual = stable_target(x, p.refs, p.sigma, noise="student_t", D=D, **options)
    logit, w = oracle.posterior(x, p.y, p.sigma)
    q, dim = -2 * logit, x[0].numel()
    moved = torch.expm1(torch.maximum(dim * q / (2 * D), (dim + D) * q**2 / (4 * D**2)))
    flat = p.y.flatten(1)
    spread = torch.cdist(w @ flat, flat, compute_mode="donot_use_mm_for_euclid_dist")
    analytic = 2 * (w * moved * spread).sum(1)
    rounding = denoised_bound(p.x, p.y, p.sigma, precision="exact")
    rounding += denoised_bound(p.x, p.y, p.sigma, D=D, precision="exact")
    assert_rows_within(actual, gaussian, analytic + rounding)


POINTS = torch.tensor([[10, 40], [220, 90], [90, 250], [130, 30]], dtype=torch.uint8)
PLACES = torch.tensor([[-0.9, -0.5], [0.0, 0.0], [0.4, -0.6], [1.2, 1.1]]).double()


@pytest.mark.parametrize("D", [1.0, 3.0, 200.0])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_unbiased_at_every_n_if_the_source_is_a_reference(n, D, precision, backend):
    """Every ordered draw of n of four points, the source uniform among them; p by scipy."""
    y = byte_values(POINTS)
    likelihood = torch.exp(log_density(PLACES, y, 0.6, D))
    full = likelihood @ y / likelihood.sum(1, keepdim=True)
    total, mass, bounds = torch.zeros(4, 2).double(), torch.zeros(4).double(), []
    for members in map(list, itertools.product(range(4), repeat=n)):
        target = stable_target(
            PLACES,
            References(POINTS[members], value_range=(-1, 1)),
            0.6,
            target="denoised",
            noise="student_t",
            D=D,
            precision=precision,
            backend=backend,
        )
        probability = likelihood[:, members].mean(1)
        total += probability[:, None] * target
        mass += probability
        bounds.append(denoised_bound(PLACES, y[members], 0.6, D=D, precision=precision))
    bound = torch.stack(bounds).amax(0) + 64 * (2 + D) * HALF_ULP64  # the last: scipy's logarithm
    assert_rows_within(total / mass[:, None], full, bound)
    gaussian = oracle.denoised(PLACES, y, 0.6)
    assert D > 100 or bool((row_norm(full - gaussian) > 1e4 * bound).all())


@pytest.mark.parametrize("D", [1.0, 8.0, 2.0**14])
@pytest.mark.parametrize("sigma", [0.05, 1.0, 30.0])
def test_lse_gives_the_log_density_of_the_mixture(sigma, D, precision, backend):
    """ln p(x) = lse - ln n + ln of the normaliser of the multivariate t."""
    dim, n, alpha = 6, 9, 0.8
    y = torch.randn(n, dim, generator=helpers.generator(5), dtype=torch.float64)
    x = alpha * y[:4] + sigma * student_noise((4, dim), D, seed=6)
    refs = References(y)
    _, found = stable_target_with_stats(
        x, refs, sigma, alpha=alpha, noise="student_t", D=D, precision=precision, backend=backend
    )
    normaliser = (
        math.lgamma((D + dim) / 2)
        - math.lgamma(D / 2)
        - dim / 2 * math.log(D * math.pi)
        - dim * math.log(sigma)
    )
    expected = torch.logsumexp(log_density(x, y, sigma, D, alpha), 1) - math.log(n)
    truth = helpers.posterior(
        x, y, sigma, alpha, D=D, precision=precision, reach=4.0, grid=4 / helpers.LIMIT[4]
    )
    wrong = truth.moved.sum(1) + 16 * HALF_ULP64 * math.lgamma(D) + 8 * (dim + D) * HALF_ULP64
    assert bool(((found.lse - math.log(n) + normaliser - expected).abs() <= wrong).all())


def test_statistics_are_those_of_the_weights(precision, backend):
    p = problem(4.0)
    target, found = stable_target_with_stats(
        p.x,
        p.refs,
        p.sigma,
        target="denoised",
        noise="student_t",
        D=4,
        precision=precision,
        backend=backend,
    )
    _, w = oracle.posterior(p.x, p.y, p.sigma, D=4.0)
    wrong = helpers.posterior(p.x, p.y, p.sigma, D=4.0, precision=precision).wrong.sum(1)
    assert bool(((found.max_weight - w.amax(1)).abs() <= wrong + HALF_ULP64).all())
    assert bool(((1 / found.ess - (w**2).sum(1)).abs() <= 2 * wrong + 2.0**-24).all())
    assert bool((w.gather(1, found.argmax[:, None])[:, 0] >= w.amax(1) - wrong).all())
    options = {"target": "denoised", "noise": "student_t", "D": 4, "precision": precision}
    assert torch.equal(target, stable_target(p.x, p.refs, p.sigma, backend=backend, **options))


def test_bits_do_not_depend_on_the_workspace(precision, backend):
    p = problem(4.0)
    options = {"noise": "student_t", "D": 4, "precision": precision, "backend": backend}
    many = References(torch.cat([p.refs.decode()] * 7), limbs=3)
    least = 0
    try:
        stable_target_with_stats(p.x, many, p.sigma, workspace=1, **options)
    except ValueError as error:
        least = int(str(error).split("at least ")[1].split()[0])
    assert least > 0
    whole = stable_target_with_stats(p.x, many, p.sigma, **options)
    cut = stable_target_with_stats(p.x, many, p.sigma, workspace=least, **options)
    assert torch.equal(whole[0], cut[0])
    assert all(torch.equal(a, b) for a, b in zip(whole[1], cut[1], strict=True))


# What log2_1p promises.


def test_log2_1p_has_a_relative_error_of_a_few_2_to_the_minus_53():
    rng = np.random.default_rng(0)
    u = np.concatenate(
        [
            10.0 ** rng.uniform(-300, 300, 400),
            10.0 ** rng.uniform(-20, 3, 400),
            math.sqrt(2) * 2.0 ** np.arange(-3, 60) - 1,  # where k changes
            2.0 ** np.arange(-60, 60) - 1 + 2.0**-60,
        ]
    )
    u = u[u > 0]
    u = np.unique(np.concatenate([u, np.nextafter(u, np.inf), np.nextafter(u, 0)]))
    actual = arithmetic.log2_1p(torch.from_numpy(u)).tolist()
    with localcontext() as context:
        context.prec = 60
        worst = Decimal(0)
        for value, found in zip(map(Decimal, u.tolist()), actual, strict=True):
            # The series to u^3: the next term is 1e-48 of it.
            small = value - value**2 / 2 + value**3 / 3
            truth = (small if value < 1e-16 else (1 + value).ln()) / Decimal(2).ln()
            worst = max(worst, abs(Decimal(found) / truth - 1))
    assert 0 < worst < 4 * Decimal(HALF_ULP64)


def test_log2_1p_at_the_ends():
    u = torch.tensor([0.0, -0.0, torch.inf, torch.nan], dtype=torch.float64)
    out = arithmetic.log2_1p(u)
    assert out[:2].tolist() == [0.0, 0.0]
    assert out[2:].isnan().all()


def test_log2_1p_is_the_text():
    u = 10.0 ** torch.linspace(-300, 300, 2001, dtype=torch.float64)
    expected = [plain_spec.log2_1p(value) for value in u.tolist()]
    assert arithmetic.log2_1p(u).tolist() == expected


@pytest.mark.parametrize("ref_limbs", [0, 1, 2, 3, 4])
def test_backends_equal_the_text_in_plain_python(ref_limbs, precision, backend):
    """sigma and D from where the kernel is a needle to where it is flat."""
    rows, n, dim = 12, 140, 6
    g = helpers.generator(7)
    u = torch.randint(0, 256, (n, dim), dtype=torch.uint8, generator=g)
    sigma = torch.logspace(-2.5, 2, rows, dtype=torch.float64)
    D = torch.tensor([0.3, 1, 7, 1e3, 2.0**20, 1e9]).double().repeat_interleave(2)
    clean = u.double()[:rows] / 127.5 - 1
    x = (clean + sigma[:, None] * student_noise((rows, dim), D, seed=8)).float()
    x[3] = clean[3].float()  # u may come out below 0 here
    labels, ref_labels = torch.arange(rows) % 3 - 1, torch.arange(n) % 2
    bias = torch.randn(n, dtype=torch.float64, generator=g)
    bias[5] = -torch.inf
    refs, v, affine, ratio = helpers.references_and_plain(u, ref_limbs, ref_labels, bias)
    alpha = 0.875
    out = stable_target(
        x,
        refs,
        sigma,
        alpha=alpha,
        labels=labels,
        noise="student_t",
        D=D,
        precision=precision,
        backend=backend,
    )
    for i in range(rows):
        s = sigma[i].item()
        row = plain_spec.target_row(
            x[i].tolist(),
            v,
            ref_limbs or 1,
            affine,
            ratio,
            s,
            alpha,
            (alpha / (s * s), -1.0 / (s * s)),
            helpers.LIMBS[precision],
            bias.tolist(),
            [bool(labels[i] in (-1, k % 2)) for k in range(n)],
            D[i].item(),
        )
        assert out[i].tolist() == [plain_spec.float32(value) for value in row]


# Arguments.


def call(**options: object) -> Tensor:
    x = torch.zeros(3, 4)
    return stable_target(x, torch.ones(2, 4), 1.0, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"D": 3}, "D is for noise='student_t', got noise='gaussian'"),
        ({"noise": "student_t"}, "D, the degrees of freedom, must be given"),
        ({"noise": "cauchy", "D": 1}, "noise must be 'gaussian' or 'student_t', got 'cauchy'"),
        ({"noise": None}, "noise must be 'gaussian' or 'student_t', got None"),
        ({"noise": "student_t", "D": torch.ones(2)}, r"D must be a number, \[3\] or .* got \[2\]"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        call(**options)


@pytest.mark.parametrize("D", ["8", True, 1j])
def test_freedom_of_the_wrong_type_is_named(D):
    with pytest.raises(TypeError, match="D must be"):
        call(noise="student_t", D=D)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf, -math.inf])
def test_freedom_that_is_not_positive_makes_its_row_nan(bad, precision, backend):
    p = problem(4.0)
    D = torch.full((24,), 4.0, dtype=torch.float64)
    D[5] = bad
    options = {"noise": "student_t", "precision": precision, "backend": backend}
    out = stable_target(p.x, p.refs, p.sigma, D=D, **options)
    assert out[5].isnan().all()
    others = torch.arange(24) != 5
    clean = stable_target(p.x, p.refs, p.sigma, D=4, **options)
    assert torch.equal(out[others], clean[others])
    with pytest.raises(ValueError, match=r"D\[5\] must be > 0 and finite"):
        validate(p.x, p.refs, p.sigma, noise="student_t", D=D)
    with pytest.raises(ValueError, match=r"D\[5\] must be > 0 and finite"):
        stable_target(p.x, p.refs, p.sigma, D=D, validate=True, **options)
    validate(p.x, p.refs, p.sigma, noise="student_t", D=4)


def test_float32_is_the_float64_result_rounded(precision, backend):
    p = problem(64.0)
    options = {"noise": "student_t", "D": 64, "precision": precision, "backend": backend}
    narrow = stable_target(p.x, p.refs, p.sigma, **options)
    wide = stable_target(p.x.double(), p.refs, p.sigma, **options)
    assert narrow.dtype == torch.float32
    assert torch.equal(narrow, wide.float())
    assert bool(((narrow - wide).abs() <= HALF_ULP32 * wide.abs() + 1e-45).all())
