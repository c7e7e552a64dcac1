"""Accuracy: the targets against float64 direct differences."""

from __future__ import annotations

from decimal import Decimal, localcontext
from typing import NamedTuple

import helpers
import hypothesis.extra.numpy as hnp
import pytest
import torch
from helpers import HALF_ULP32, LIMIT, assert_rows_within, denoised_bound, per_row, row_norm
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stf_kernels import References, oracle, stable_target

# Relative error per row. The promise of "exact" is little more than the rounding of a float32;
# "fast" has one byte less in samples and weights.
PROMISE = {"score": 4e-8, "denoised": 1e-7}
LOSS = {"exact": 1, "fast": 256}

SIGMAS = torch.logspace(torch.tensor(0.002).log10(), torch.tensor(80.0).log10(), 12).double()


class Photographs(NamedTuple):
    """Noisy photograph patches with their references, and the truth about them."""

    x: Tensor  # float32 [B, 3, 32, 32]
    sigma: Tensor  # [B]
    data: Tensor  # references as they are given
    y: Tensor  # references, float64
    weights: Tensor  # [B, n]
    expected: dict[str, Tensor]


def photographs(data: Tensor, y: Tensor, rows: int) -> Photographs:
    """`rows` samples at each of SIGMAS; every second source is among the near-duplicates."""
    sigma = SIGMAS.repeat_interleave(rows)
    pick = torch.randint(0, len(y) // 2, (len(sigma),), generator=helpers.generator(1))
    pick[::2] += len(y) // 2
    x = helpers.noisy(y[pick], sigma, seed=2)
    _, w = oracle.posterior(x, y, sigma)
    d = (w @ y.flatten(1)).view_as(x)
    score = (d - x.double()) / per_row(sigma, x) ** 2
    return Photographs(x, sigma, data, y, w, {"score": score, "denoised": d})


@pytest.fixture(scope="session")
def byte_images() -> Photographs:
    """512 patches, half of them from 8 families of 32 that differ in one to three bytes by one."""
    patches = helpers.photograph_patches(256)
    data = torch.cat([patches, helpers.near_duplicates(patches[:8], 32)])
    return photographs(data, helpers.byte_values(data), rows=6)


@pytest.fixture(scope="session")
def float_images() -> Photographs:
    """The same kind of images normalised by mean and deviation, which lie on no grid."""
    patches = helpers.photograph_patches(64, seed=5)
    data = torch.cat([patches, helpers.near_duplicates(patches[:4], 16, seed=6)]).float()
    data = (data - data.mean()) / data.std()
    return photographs(data, data.double(), rows=4)


def test_the_oracle_is_right_to_fifty_digits():
    """Decimal arithmetic on values that float64 holds exactly."""
    x = torch.randn(3, 2, 2, generator=helpers.generator(0)).double()
    y = torch.randn(4, 2, 2, generator=helpers.generator(1)).double()
    sigma, alpha = (
        torch.tensor([0.25, 1.0, 30.0]).double(),
        torch.tensor([1.0, 0.5, -0.75]).double(),
    )
    prior = torch.tensor([0.5, -2.0, 0.0, 1.25]).double()
    actual = oracle.stable_target(x, y, sigma, alpha=alpha, log_weight=prior)
    with localcontext() as context:
        context.prec = 50
        for i in range(3):
            s, a = Decimal(float(sigma[i])), Decimal(float(alpha[i]))
            row = [Decimal(v) for v in x[i].flatten().tolist()]
            refs = [[Decimal(v) for v in image.flatten().tolist()] for image in y]
            distances = [sum((v - a * u) ** 2 for v, u in zip(row, r, strict=True)) for r in refs]
            w = [
                (Decimal(float(p)) - d / (2 * s * s)).exp()
                for p, d in zip(prior, distances, strict=True)
            ]
            for j, v in enumerate(row):
                mean = sum(p * r[j] for p, r in zip(w, refs, strict=True)) / sum(w)
                expected = float((a * mean - v) / (s * s))
                # Logits below 512 from sums of four, times differences of y below 8.
                slack = 512 * 4 * 8 * helpers.HALF_ULP64 * float(1 + abs(v)) / float(s * s)
                assert actual[i].flatten()[j].item() == pytest.approx(expected, abs=slack)


def worst_relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((row_norm(actual.double() - expected) / row_norm(expected)).max())


def test_photographs_have_posteriors_of_one_and_of_many_at_small_sigma(byte_images):
    ess = 1 / (byte_images.weights**2).sum(1)
    small = ess[(byte_images.sigma > 0.003) & (byte_images.sigma < 0.1)]
    assert small.min() < 1.01
    assert small.max() > 16


@pytest.mark.parametrize("target", PROMISE)
def test_bytes_are_as_accurate_as_promised_at_every_sigma(byte_images, target, precision, backend):
    x, sigma, data, _, _, expected = byte_images
    refs = References(data, value_range=(-1, 1))
    actual = stable_target(x, refs, sigma, target=target, precision=precision, backend=backend)
    error = worst_relative_error(actual, expected[target])
    promise = PROMISE[target] * LOSS[precision]
    assert error <= promise, f"{target} is off by {error:.2e}, promised is {promise:.2e}"


@pytest.mark.parametrize("target", PROMISE)
def test_floats_are_as_accurate_as_promised_at_every_sigma(
    float_images, target, precision, backend
):
    """In "fast" the references themselves are rounded to 23 bits, which a small sigma magnifies."""
    x, sigma, data, _, _, expected = float_images
    actual = stable_target(x, data, sigma, target=target, precision=precision, backend=backend)
    bound = PROMISE[target] * LOSS[precision] * row_norm(expected[target])
    if precision == "fast":
        grid = data.abs().max() / LIMIT[helpers.LIMBS["fast"]] * data[0].numel() ** 0.5
        bound += grid / sigma**2 if target == "score" else grid
    assert_rows_within(actual, expected[target], bound)


def test_float64_samples_are_accurate_to_the_integers(byte_images, precision, backend):
    x, sigma, data, y, _, expected = byte_images
    x, sigma = x[::5], sigma[::5]
    refs = References(data, value_range=(-1, 1))
    actual = stable_target(
        x.double(), refs, sigma, target="denoised", precision=precision, backend=backend
    )
    assert actual.dtype == torch.float64
    bound = denoised_bound(x, y, sigma, precision=precision)
    assert_rows_within(actual, expected["denoised"][::5], bound)


@pytest.mark.parametrize("limbs", [1, 2, 3, 4])
def test_reference_limbs_are_worth_a_byte_each(limbs, backend):
    y = torch.randn(20, 3, 4, 4, generator=helpers.generator(0))
    sigma = torch.tensor([0.3, 1.0, 5.0]).double()
    x = helpers.noisy(y[:3].double(), sigma).double()
    refs = References(y, limbs=limbs)
    actual = stable_target(x, refs, sigma, target="denoised", backend=backend)
    reach = float(y.abs().max())
    bound = denoised_bound(x, y, sigma, precision="exact", reach=reach, grid=reach / LIMIT[limbs])
    assert_rows_within(actual, oracle.denoised(x, y, sigma), bound)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_samples_stand_for_the_values_they_have(dtype, precision, backend):
    data = helpers.random_bytes(30, 3, 4, 4)
    y = helpers.byte_values(data)
    sigma = torch.tensor([0.5, 2.0, 40.0]).double()
    x = helpers.noisy(y[:3], sigma).to(dtype)
    refs = References(data, value_range=(-1, 1))
    actual = stable_target(x, refs, sigma, target="denoised", precision=precision, backend=backend)
    assert actual.dtype == torch.float32
    expected = oracle.denoised(x, y, sigma)
    bound = denoised_bound(x, y, sigma, precision=precision) + HALF_ULP32 * row_norm(expected)
    assert_rows_within(actual, expected, bound)


shapes = hnp.array_shapes(min_dims=1, max_dims=3, max_side=4)
sigmas = st.floats(0.05, 50)
alphas = st.floats(-1, 1)
log_weights = st.floats(-30, 30)


@given(data=st.data(), shape=shapes, rows=st.integers(1, 4), n=st.integers(1, 6))
def test_any_shape_and_any_bytes(data, shape, rows, n, precision, backend):
    images = torch.from_numpy(data.draw(hnp.arrays("uint8", (n, *shape))))
    x = torch.from_numpy(
        data.draw(hnp.arrays("float32", (rows, *shape), elements=st.floats(-50, 50, width=32)))
    ).double()
    sigma, alpha = (
        torch.tensor(data.draw(st.lists(kind, min_size=rows, max_size=rows))).double()
        for kind in (sigmas, alphas)
    )
    prior = torch.tensor(data.draw(st.lists(log_weights, min_size=n, max_size=n))).double()
    y = helpers.byte_values(images)
    actual = stable_target(
        x,
        References(images, value_range=(-1, 1)),
        sigma,
        alpha=alpha,
        target="denoised",
        log_weight=prior,
        precision=precision,
        backend=backend,
    )
    bound = denoised_bound(x, y, sigma, alpha, prior, precision=precision)
    assert_rows_within(actual, oracle.denoised(x, y, sigma, alpha=alpha, log_weight=prior), bound)


@given(data=st.data(), shape=shapes, n=st.integers(1, 6), exponent=st.integers(-60, 60))
def test_any_shape_and_any_floats(data, shape, n, exponent, precision, backend):
    """Whatever the unit the data are measured in."""
    unit = 2.0**exponent
    elements = st.floats(-4, 4, width=32)
    y = torch.from_numpy(data.draw(hnp.arrays("float32", (n, *shape), elements=elements))) * unit
    x = torch.from_numpy(data.draw(hnp.arrays("float32", (2, *shape), elements=elements))) * unit
    sigma = data.draw(sigmas) * unit
    actual = stable_target(
        x.double(), y, sigma, target="denoised", precision=precision, backend=backend
    )
    reach = float(y.abs().max())
    grid = reach / LIMIT[helpers.LIMBS[precision]]
    bound = denoised_bound(x, y, sigma, precision=precision, reach=reach, grid=grid)
    assert_rows_within(actual, oracle.denoised(x, y, sigma).double(), bound)
