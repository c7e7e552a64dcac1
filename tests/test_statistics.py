"""What `stable_target_with_stats` says of the weights, against closed forms and the oracle."""

from __future__ import annotations

import math
import pydoc
import re

import helpers
import pytest
import torch
from helpers import HALF_ULP32, HALF_ULP64, LIMBS, LIMIT, byte_values, row_norm
from torch import Tensor

from stf_kernels import (
    References,
    TargetStats,
    oracle,
    stable_target,
    stable_target_with_stats,
)
from stf_kernels.parameterization import KINDS


def log_density(x: Tensor, y: Tensor, sigma: float, alpha: float) -> Tensor:
    """log of the mean over k of the normal densities N(x; alpha y_k, sigma^2)."""
    normal = torch.distributions.Normal(alpha * y, sigma, validate_args=False)
    components = torch.distributions.Independent(normal, 1)
    uniform = torch.distributions.Categorical(torch.ones(len(y)).double())
    return torch.distributions.MixtureSameFamily(uniform, components).log_prob(x)


def logit_error(x: Tensor, y: Tensor, sigma: float, alpha: float, precision: str) -> Tensor:
    """How far logits may be from the truth, nats [B]: the sample's rounding, and float64's."""
    width, limit = x.shape[1] ** 0.5, LIMIT[LIMBS[precision]]
    distance = row_norm(x) + abs(alpha) * row_norm(y).max()
    rounded = distance * width * x.abs().amax(1) / limit
    return (rounded + (32 + x.shape[1]) * HALF_ULP64 * distance**2) / sigma**2


@pytest.mark.parametrize(("sigma", "alpha"), [(0.3, 1.0), (1.0, 0.5), (40.0, 1.0)])
def test_lse_gives_the_log_density_of_the_mixture(sigma, alpha, precision, backend):
    """log p_t(x) = lse - log n - d/2 log(2 pi sigma^2)."""
    data = helpers.random_bytes(200, 24)
    y = byte_values(data)
    x = helpers.noisy(y[:8], sigma, alpha).double()
    refs = References(data, value_range=(-1, 1))
    _, stats = stable_target_with_stats(
        x, refs, sigma, alpha=alpha, precision=precision, backend=backend
    )
    actual = stats.lse - math.log(200) - 24 / 2 * math.log(2 * math.pi * sigma**2)
    # The weights kept are rounded by half of 1 / lim each; logits to float32 below the largest.
    logit, w = oracle.posterior(x, y, sigma, alpha)
    gap = (w * (logit.amax(1, keepdim=True) - logit)).sum(1)
    bound = logit_error(x, y, sigma, alpha, precision) + HALF_ULP32 * gap + helpers.EXP2_ERROR
    bound = bound + 200 / (2 * LIMIT[LIMBS[precision]])
    assert bool(((actual - log_density(x, y, sigma, alpha)).abs() <= bound).all())


def test_two_references_have_the_statistics_of_a_coin(precision, backend):
    """w = sigmoid(logit difference): every statistic in closed form."""
    data = torch.tensor([[0, 128, 255], [255, 100, 0]], dtype=torch.uint8)
    y = byte_values(data)
    x = torch.tensor([[0.5, 0.0, -0.5], [0.1, 0.2, 0.3], [-1.0, 0.5, 1.0], [3.0, 3.0, 3.0]])
    sigma, prior = 0.9, torch.tensor([0.3, -0.4]).double()
    target, stats = stable_target_with_stats(
        x,
        References(data, value_range=(-1, 1), log_weight=prior),
        sigma,
        target="denoised",
        precision=precision,
        backend=backend,
    )
    logit = -((x.double()[:, None] - y) ** 2).sum(2) / (2 * sigma**2) + prior
    w = torch.sigmoid(logit[:, 0] - logit[:, 1])
    surprise = -(w * w.log() + (1 - w) * (1 - w).log())
    moment = w * (y[0] ** 2).sum() + (1 - w) * (y[1] ** 2).sum()
    expected = {
        "lse": torch.logaddexp(logit[:, 0], logit[:, 1]),
        "ess": 1 / (w**2 + (1 - w) ** 2),
        "entropy": surprise,
        "max_weight": torch.maximum(w, 1 - w),
        "second_moment": moment,
        "lost_mass": torch.zeros(4),
    }
    # Logits move by eta, weights by at most as much relatively; ess is at most 2 and its slope in
    # w 4, entropy has slope log(w / (1 - w)), the sum of squares is kept to 2^24 / lim^2.
    gap = (logit[:, 0] - logit[:, 1]).abs()
    eta = 2 * logit_error(x, y, sigma, 1.0, precision) + HALF_ULP32 * gap + helpers.EXP2_ERROR
    eta = eta + 1 / LIMIT[LIMBS[precision]]
    tolerance = (4 + gap) * eta + 2 * 2.0**24 / LIMIT[LIMBS[precision]] ** 2
    for name, value in expected.items():
        assert bool(((getattr(stats, name) - value).abs() <= tolerance).all()), name
    assert torch.equal(stats.argmax, logit.argmax(1))
    assert target.dtype == torch.float32
    assert all(s.dtype == (torch.int64 if s is stats.argmax else torch.float64) for s in stats)


def test_equal_weights(precision, backend):
    """alpha = 0: no reference is nearer than another, and all of it is exact but the logarithm."""
    data = helpers.random_bytes(1000, 6)
    y = byte_values(data)
    x = torch.tensor([[0.5, -1.0, 0.25, 2.0, 0.0, 1.0]])
    _, stats = stable_target_with_stats(
        x,
        References(data, value_range=(-1, 1)),
        2.0,
        alpha=0.0,
        precision=precision,
        backend=backend,
    )
    few = 8 * HALF_ULP64
    # The sum of squares is kept in steps of 2^24 / lim^2, each rounded.
    step = 2.0**23 / LIMIT[LIMBS[precision]] ** 2
    assert float(stats.ess) == pytest.approx(1000, rel=step + few)
    assert float(stats.entropy) == pytest.approx(math.log(1000), rel=few)
    assert float(stats.max_weight) == pytest.approx(1e-3, rel=few)
    assert float(stats.lse) == pytest.approx(math.log(1000) - float((x**2).sum()) / 8, rel=few)
    assert float(stats.second_moment) == pytest.approx(float((y**2).sum(1).mean()), rel=64 * few)
    assert float(stats.lost_mass) == 0.0
    assert int(stats.argmax) == 0


def test_one_weight(precision, backend):
    data = helpers.random_bytes(300, 3, 4, 4)
    y = byte_values(data)
    x = y[[250, 7]].float()
    _, stats = stable_target_with_stats(
        x, References(data, value_range=(-1, 1)), 1e-3, precision=precision, backend=backend
    )
    assert stats.argmax.tolist() == [250, 7]
    assert stats.max_weight.tolist() == [1.0, 1.0]
    assert stats.entropy.tolist() == [0.0, 0.0]
    assert stats.lost_mass.tolist() == [0.0, 0.0]
    # The weight's square is kept in steps of 2^24 / lim^2.
    step = 2.0**23 / LIMIT[LIMBS[precision]] ** 2
    assert stats.ess.tolist() == pytest.approx([1.0, 1.0], rel=step)
    moment = (y[[250, 7]] ** 2).flatten(1).sum(1).tolist()
    assert stats.second_moment.tolist() == pytest.approx(moment, rel=64 * HALF_ULP64)


@pytest.mark.parametrize("place", [(0, 1), (127, 128), (5, 300)])
def test_argmax_is_the_first_of_equals(place, precision, backend):
    data = helpers.random_bytes(400, 8)
    data[list(place)] = 77
    refs = References(data, value_range=(-1, 1))
    x = byte_values(data[place[:1],]).float()
    _, stats = stable_target_with_stats(x, refs, 0.05, precision=precision, backend=backend)
    assert int(stats.argmax) == place[0]
    assert float(stats.max_weight) == pytest.approx(0.5, rel=1e-6)


def test_photographs(precision, backend):
    """Every statistic of real posteriors of one, some and many references."""
    patches = helpers.photograph_patches(200, size=16)
    data = torch.cat([patches, helpers.near_duplicates(patches[:4], 50)])
    y = byte_values(data)
    sigma = torch.logspace(-2.5, 1.9, 12).double()
    source = 15 * torch.arange(12) + torch.tensor([0, 200]).repeat(6)
    x = helpers.noisy(y[source], sigma)
    _, stats = stable_target_with_stats(
        x, References(data, value_range=(-1, 1)), sigma, precision=precision, backend=backend
    )
    truth = helpers.posterior(x, y, sigma, precision=precision)
    w, wrong = truth.w, truth.wrong
    square = (w**2).sum(1)
    assert 1 / square.max() < 1.01
    assert 1 / square.min() > 100

    log_w = torch.log_softmax(truth.logit, 1).clamp_min(-700)
    norm2 = (y.flatten(1) ** 2).sum(1)
    limit = LIMIT[LIMBS[precision]]
    # Squares are kept in steps of 2^24, P log P in steps of 2^-10, of weights counted from lim on.
    square_error = 2 * (w * wrong).sum(1) + 400 * 2.0**23 / limit**2
    expected = {
        "max_weight": (w.amax(1), wrong.sum(1)),
        "ess": (1 / square, square_error / square**2),
        "entropy": (-(w * log_w).sum(1), (wrong * (1 - log_w)).sum(1) + 400 * 2.0**-11 / limit),
        "second_moment": (w @ norm2, wrong @ norm2 + 64 * HALF_ULP64 * norm2.max()),
        "lost_mass": (torch.zeros(12).double(), 400 * w.amax(1) / (2 * limit)),
    }
    for name, (value, bound) in expected.items():
        error = (getattr(stats, name) - value).abs()
        assert bool((error <= bound).all()), f"{name} is off by {error.max():.1e}"
    assert torch.equal(stats.argmax, w.argmax(1))


def test_trace_of_the_posterior_covariance(backend):
    """m2 - ||D||^2 is the trace of sum_k w_k (y_k - D)(y_k - D)^T."""
    data = helpers.random_bytes(50, 5)
    y = byte_values(data)
    x = helpers.noisy(y[:6], 0.8).double()
    d, stats = stable_target_with_stats(
        x, References(data, value_range=(-1, 1)), 0.8, target="denoised", backend=backend
    )
    _, w = oracle.posterior(x, y, 0.8)
    centre = w @ y
    trace = torch.einsum("bk,bkj->b", w, (y - centre[:, None]) ** 2)
    bound = helpers.denoised_bound(x, y, 0.8, precision="exact") * 2 * row_norm(y).max() * 2
    assert bool((stats.second_moment - (d**2).sum(1) - trace).abs().le(bound).all())


@pytest.mark.parametrize("lo_hi", [(-1.0, 1.0), (0.0, 1.0), (-3.0, 7.0), (0.0, 255.0)])
def test_second_moment_is_in_the_units_of_the_value_range(lo_hi, backend):
    data = helpers.random_bytes(20, 9)
    y = byte_values(data, *lo_hi)
    x = torch.zeros(1, 9)
    _, stats = stable_target_with_stats(
        x, References(data, value_range=lo_hi), 1.0, alpha=0.0, backend=backend
    )
    expected = float((y**2).sum(1).mean())
    # a^2 N and d b^2 are of the size of the largest value squared.
    slack = 64 * HALF_ULP64 * 9 * max(map(abs, lo_hi)) ** 2
    assert float(stats.second_moment) == pytest.approx(expected, abs=slack)


def test_log_weight_enters_lse(precision, backend):
    data = helpers.random_bytes(20, 5)
    x = torch.randn(3, 5, generator=helpers.generator(1))
    refs = References(data, value_range=(-1, 1))
    options = {"precision": precision, "backend": backend}
    plain, plain_stats = stable_target_with_stats(x, refs, 1.0, **options)
    shift = torch.full((20,), 2.5).double()
    moved, stats = stable_target_with_stats(x, refs, 1.0, log_weight=shift, **options)
    slack = 64 * HALF_ULP64 * float(plain_stats.lse.abs().max() + 2.5)
    assert stats.lse.tolist() == pytest.approx((plain_stats.lse + 2.5).tolist(), abs=slack)
    assert row_norm(moved - plain).max() <= 2 * HALF_ULP32 * row_norm(plain).max()


@pytest.mark.parametrize("target", KINDS)
def test_statistics_change_no_bit_of_the_target(target, precision, backend):
    refs = References(helpers.random_bytes(600, 3, 4, 4), value_range=(-1, 1))
    sigma = torch.logspace(-1, 2, 6)
    x = torch.randn(6, 3, 4, 4, generator=helpers.generator(1))
    options = {"target": target, "precision": precision, "backend": backend}
    with_stats, stats = stable_target_with_stats(x, refs, sigma, **options)
    assert torch.equal(with_stats, stable_target(x, refs, sigma, **options))
    _, of_score = stable_target_with_stats(x, refs, sigma, precision=precision, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(stats, of_score, strict=True))


@pytest.mark.parametrize("threads", [1, 4])
def test_a_wide_row_does_not_know_the_others(threads, backend, num_threads):
    """Sums over many values do not depend on how many rows there are."""
    num_threads(threads)
    data = helpers.random_bytes(6, 3, 128, 128)
    refs = References(data, value_range=(-1, 1))
    x = torch.randn(64, 3, 128, 128, generator=helpers.generator(1))
    _, together = stable_target_with_stats(x, refs, 30.0, backend=backend)
    for i in range(0, 64, 9):
        _, alone = stable_target_with_stats(x[i : i + 1], refs, 30.0, backend=backend)
        for name in alone._fields:
            own, theirs = (float(getattr(s, name)[k]) for s, k in ((alone, 0), (together, i)))
            assert own == theirs, f"{name} of row {i}: {own!r} alone, {theirs!r} among 64"


def test_help_says_what_each_statistic_is():
    text = pydoc.render_doc(TargetStats, renderer=pydoc.plaintext)
    fields = text.split("Attributes:")[1].split("Method resolution order")[0]
    for name in TargetStats._fields:
        assert re.search(rf"{name}: .*(float|int)64 \[B\]", fields), name
