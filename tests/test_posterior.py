"""How weights, labels, rows and the order of references do and do not act on one another."""

from __future__ import annotations

import math

import helpers
import pytest
import torch
from helpers import HALF_ULP64, assert_rows_within, byte_values, denoised_bound, row_norm
from torch import Tensor

from stf_kernels import References, oracle, stable_target, stable_target_with_stats


def test_a_log_weight_of_log_two_is_a_reference_given_twice(precision, backend):
    data = helpers.random_bytes(20, 5)
    y = byte_values(data)
    x = helpers.noisy(y[:6], 0.8).double()
    prior = torch.zeros(20).double().index_fill(0, torch.tensor([3]), math.log(2))
    options = {"target": "denoised", "precision": precision, "backend": backend}
    once = stable_target(x, References(data, value_range=(-1, 1)), 0.8, log_weight=prior, **options)
    twice = torch.cat([data, data[3:4]])
    twice = stable_target(x, References(twice, value_range=(-1, 1)), 0.8, **options)
    bound = denoised_bound(x, y, 0.8, 1.0, prior, precision=precision)
    assert_rows_within(once, twice, 2 * bound)


def test_the_whole_set_twice_changes_nothing(precision, backend):
    data = helpers.random_bytes(20, 5)
    y = byte_values(data)
    x = helpers.noisy(y[:6], 0.8).double()
    once, twice = (
        stable_target(
            x,
            References(data.repeat(times, 1), value_range=(-1, 1)),
            0.8,
            target="denoised",
            precision=precision,
            backend=backend,
        )
        for times in (1, 2)
    )
    assert_rows_within(once, twice, 8 * HALF_ULP64 * row_norm(y).max())


def test_log_weight_minus_infinity_is_a_missing_reference(precision, backend):
    data = helpers.random_bytes(100, 3, 4, 4)
    x = torch.randn(4, 3, 4, 4, generator=helpers.generator(1))
    kept = torch.arange(100) % 3 == 0
    prior = torch.where(kept, 0.0, -torch.inf)
    options = {"precision": precision, "backend": backend}
    masked = stable_target(
        x, References(data, value_range=(-1, 1)), 2.0, log_weight=prior, **options
    )
    missing = stable_target(x, References(data[kept], value_range=(-1, 1)), 2.0, **options)
    assert torch.equal(masked, missing)


def test_log_weights_of_set_and_call_add(precision, backend):
    data = helpers.random_bytes(20, 5)
    y = byte_values(data)
    x = helpers.noisy(y[:6], 0.8).double()
    one, other = torch.randn(2, 20, generator=helpers.generator(1)).double()
    actual = stable_target(
        x,
        References(data, value_range=(-1, 1), log_weight=one),
        0.8,
        target="denoised",
        log_weight=other,
        precision=precision,
        backend=backend,
    )
    expected = oracle.denoised(x, y, 0.8, log_weight=one + other)
    bound = denoised_bound(x, y, 0.8, 1.0, one + other, precision=precision)
    assert_rows_within(actual, expected, bound)


@pytest.fixture
def labelled() -> tuple[Tensor, References, Tensor]:
    """Samples, references of three classes (fewer than share an anchor) and the classes."""
    data = helpers.random_bytes(96, 3, 4, 4)
    classes = torch.randint(0, 3, (96,), generator=helpers.generator(1))
    x = torch.randn(7, 3, 4, 4, generator=helpers.generator(2))
    return x, References(data, value_range=(-1, 1), labels=classes), classes


def test_a_label_sees_its_class_alone(labelled, precision, backend):
    x, refs, classes = labelled
    options = {"precision": precision, "backend": backend}
    labels = torch.tensor([0, 1, 2, 2, 1, 0, 1])
    together = stable_target(x, refs, 2.0, labels=labels, **options)
    for i, label in enumerate(labels):
        own = refs.subset((classes == label).nonzero().flatten())
        alone = stable_target(x[i : i + 1], own, 2.0, **options)
        assert torch.equal(together[i], alone[0])


def test_label_minus_one_sees_all(labelled, precision, backend):
    x, refs, _ = labelled
    options = {"precision": precision, "backend": backend}
    labels = torch.tensor([-1, 1, -1, 2, -1, 0, -1])
    actual = stable_target(x, refs, 2.0, labels=labels, **options)
    everything = stable_target(x, refs, 2.0, **options)
    assert torch.equal(actual[labels == -1], everything[labels == -1])
    assert not torch.equal(actual[labels != -1], everything[labels != -1])


def test_labels_and_log_weight_both_hold(labelled, precision, backend):
    x, refs, classes = labelled
    prior = torch.randn(96, generator=helpers.generator(3)).double()
    prior[::5] = -torch.inf
    actual = stable_target(
        x.double(),
        refs,
        2.0,
        target="denoised",
        log_weight=prior,
        labels=torch.full((7,), 1),
        precision=precision,
        backend=backend,
    )
    y = byte_values(helpers.random_bytes(96, 3, 4, 4))
    both = torch.where(classes == 1, prior, -torch.inf)
    expected = oracle.denoised(x, y, 2.0, log_weight=both).double()
    assert_rows_within(actual, expected, denoised_bound(x, y, 2.0, 1.0, both, precision=precision))


def test_the_order_of_references_does_not_matter(precision, backend):
    """To the bit within a block of 128, which has one anchor; otherwise to the logits' rounding."""
    options = {"target": "denoised", "precision": precision, "backend": backend}
    for n in (128, 400):
        data = helpers.random_bytes(n, 3, 4, 4)
        y = byte_values(data)
        x = helpers.noisy(y[:5], 1.5).double()
        order = torch.randperm(n, generator=helpers.generator(1))
        given, permuted = (
            stable_target(x, References(d, value_range=(-1, 1)), 1.5, **options)
            for d in (data, data[order])
        )
        if n == 128:
            assert torch.equal(given, permuted)
        assert_rows_within(given, permuted, 2 * denoised_bound(x, y, 1.5, precision=precision))


@pytest.mark.parametrize("kind", ["bytes", "floats"])
def test_a_row_does_not_know_the_others(kind, precision, backend):
    """Permuted, alone or in another batch, target and statistics have the same bits."""
    data = helpers.random_bytes(700, 3, 32, 32)
    ref = References(data, value_range=(-1, 1)) if kind == "bytes" else data[:70] / 99.0
    sigma = torch.logspace(-1, 2, 24)
    x = helpers.noisy(byte_values(data[:24]), sigma)
    options = {"precision": precision, "backend": backend}
    target, stats = stable_target_with_stats(x, ref, sigma, **options)
    for rows in ([5], [23, 0], list(range(23, -1, -1))):
        part, part_stats = stable_target_with_stats(x[rows], ref, sigma[rows], **options)
        assert torch.equal(part, target[rows])
        for name in stats._fields:
            own, theirs = getattr(part_stats, name), getattr(stats, name)[rows]
            assert torch.equal(own, theirs), f"{name} of rows {rows}"


BROKEN_ROWS = {
    "x_t nan": ("x", math.nan),
    "x_t inf": ("x", math.inf),
    "x_t -inf": ("x", -math.inf),
    "sigma 0": ("sigma", 0.0),
    "sigma < 0": ("sigma", -1.0),
    "sigma nan": ("sigma", math.nan),
    "alpha nan": ("alpha", math.nan),
    "alpha inf": ("alpha", math.inf),
}


@pytest.mark.parametrize("broken", BROKEN_ROWS)
def test_a_nan_row_stays_alone(broken, precision, backend):
    refs = References(helpers.random_bytes(200, 3, 4, 4), value_range=(-1, 1))
    values = {
        "x": torch.randn(5, 3, 4, 4, generator=helpers.generator(1)),
        "sigma": torch.full((5,), 2.0),
        "alpha": torch.ones(5),
    }

    def call():
        return stable_target_with_stats(
            values["x"],
            refs,
            values["sigma"],
            alpha=values["alpha"],
            precision=precision,
            backend=backend,
        )

    whole, whole_stats = call()
    name, value = BROKEN_ROWS[broken]
    values[name] = values[name].clone()
    values[name][2].view(-1)[-1] = value
    target, stats = call()
    others = [0, 1, 3, 4]
    assert bool(target[2].isnan().all())
    assert torch.equal(target[others], whole[others])
    for name in stats._fields:
        own = getattr(stats, name)
        assert torch.equal(own[others], getattr(whole_stats, name)[others])
        assert own[2] == -1 if name == "argmax" else bool(own[2].isnan())


def test_no_reference_left_is_a_nan_row(precision, backend):
    labels = torch.tensor([0, 0, 1])
    refs = References(helpers.random_bytes(3, 5), value_range=(-1, 1), labels=labels)
    x = torch.randn(2, 5, generator=helpers.generator(1))
    prior = torch.tensor([0.0, 0.0, -torch.inf])
    options = {"precision": precision, "backend": backend}
    target = stable_target(x, refs, 1.0, labels=torch.tensor([1, 0]), log_weight=prior, **options)
    assert bool(target[0].isnan().all())
    assert bool(target[1].isfinite().all())
    target = stable_target(x, refs, 1.0, log_weight=torch.full((3,), -torch.inf), **options)
    assert bool(target.isnan().all())


def test_a_plain_reference_that_is_not_finite_makes_no_numbers(precision, backend):
    y = torch.randn(6, 5, generator=helpers.generator(1))
    y[4, 2] = math.nan
    x = torch.randn(2, 5, generator=helpers.generator(2))
    assert bool(stable_target(x, y, 1.0, precision=precision, backend=backend).isnan().all())


@pytest.mark.parametrize("unit", [2.0**-20, 8.0])
def test_a_power_of_two_as_unit_changes_no_digit(unit, precision, backend):
    data = helpers.random_bytes(150, 3, 4, 4)
    x = torch.randn(4, 3, 4, 4, generator=helpers.generator(1))
    options = {"target": "denoised", "precision": precision, "backend": backend}
    plain = stable_target(x, References(data, value_range=(-1, 1)), 1.5, **options)
    scaled = References(data, value_range=(-unit, unit))
    assert torch.equal(stable_target(x * unit, scaled, 1.5 * unit, **options), plain * unit)
