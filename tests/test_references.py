"""`References`: what is prepared is what was given, and stays so."""

from __future__ import annotations

import copy
import io
import pickle

import helpers
import pytest
import torch
from helpers import HALF_ULP32, HALF_ULP64, LIMIT, byte_values
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import Tensor

from stf_kernels import References, stable_target, stable_target_with_stats, validate


def assert_same_targets(one: References | Tensor, other: References | Tensor, **options) -> None:
    """Equal bits of targets and statistics, for noise of every size."""
    shape = one.shape if isinstance(one, References) else one.shape[1:]
    x = torch.randn(6, *shape, generator=helpers.generator(9))
    sigma = torch.logspace(-2, 2, 6)
    (a, a_stats), (b, b_stats) = (
        stable_target_with_stats(x, ref, sigma, **options) for ref in (one, other)
    )
    assert torch.equal(a, b)
    assert all(torch.equal(s, t) for s, t in zip(a_stats, b_stats, strict=True))


RANGES = [(-1.0, 1.0), (0.0, 1.0), (0.0, 255.0), (-3.0, 7.0), (0.1, 0.3)]


@pytest.mark.parametrize("lo_hi", RANGES)
def test_bytes_decode_to_their_values(lo_hi):
    data = torch.arange(256, dtype=torch.uint8).view(2, 8, 16)
    decoded = References(data, value_range=lo_hi).decode()
    expected = byte_values(data, *lo_hi)
    assert decoded.dtype == torch.float32
    slack = HALF_ULP32 * expected.abs() + 8 * HALF_ULP64 * max(map(abs, lo_hi))
    assert bool(((decoded - expected).abs() <= slack).all())
    assert decoded[0, 0, 0] == torch.tensor(lo_hi[0])
    assert decoded[1, -1, -1] == torch.tensor(lo_hi[1])


@pytest.mark.parametrize("limbs", [1, 2, 3, 4])
def test_floats_decode_to_within_half_a_step(limbs):
    """The step is a power of two, below twice max|y| / lim."""
    y = torch.randn(5, 3, 4, 4, generator=helpers.generator(0))
    decoded = References(y, limbs=limbs).decode().double()
    half_step = float(y.abs().max()) / LIMIT[limbs]
    assert bool(((decoded - y.double()).abs() <= half_step + HALF_ULP32 * y.abs()).all())


def test_four_limbs_hold_float32_exactly_down_to_a_hundredth_of_the_largest():
    """24 bits of mantissa, 31 of the grid: nothing is rounded within 2^6 of the largest."""
    y = torch.rand(50, 30, generator=helpers.generator(0)) + 2.0**-6
    assert torch.equal(References(y).decode(), y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_float_types_of_the_same_values_are_the_same_references(dtype, precision, backend):
    y = torch.randn(40, 3, 4, 4, generator=helpers.generator(0)).bfloat16().half()
    y = y.bfloat16().float()  # values that every type holds
    options = {"precision": precision, "backend": backend}
    assert torch.equal(y.to(dtype).float(), y)
    assert_same_targets(References(y.to(dtype)), References(y), **options)
    assert_same_targets(y.to(dtype), y, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("lo_hi", RANGES[:3])
def test_floats_that_came_from_bytes_are_those_bytes(lo_hi, dtype, precision, backend):
    data = helpers.random_bytes(150, 3, 4, 4)
    floats = byte_values(data, *lo_hi).to(dtype)
    assert_same_targets(
        References(floats, value_range=lo_hi, levels=256),
        References(data, value_range=lo_hi),
        precision=precision,
        backend=backend,
    )


def test_the_usual_arithmetic_of_images_lands_on_the_byte_grid():
    data = torch.arange(256, dtype=torch.uint8).view(1, 256)
    for floats in (data / 127.5 - 1, (data / 255 - 0.5) / 0.5, data.float() / 255 * 2 - 1):
        decoded = References(floats, value_range=(-1, 1), levels=256).decode()
        assert torch.equal(decoded, References(data, value_range=(-1, 1)).decode())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_digits_have_seventeen_levels(dtype, precision, backend):
    """scikit-learn's digits count ink from 0 to 16."""
    ink = torch.from_numpy(load_digits().images[:200])
    y = byte_values(ink, levels=17)
    data = ink.to(dtype) if dtype == torch.uint8 else y.to(dtype)
    refs = References(data, value_range=(-1, 1), levels=17)
    assert torch.equal(refs.decode().double(), y)  # sixteenths of 2
    x = helpers.noisy(y[:4], 0.7).double()
    options = {"target": "denoised", "precision": precision, "backend": backend}
    bound = helpers.denoised_bound(x, y, 0.7, precision=precision, reach=16.0)
    _, w = helpers.oracle.posterior(x, y, 0.7)
    expected = (w @ y.flatten(1)).view_as(x)
    helpers.assert_rows_within(stable_target(x, refs, 0.7, **options), expected, bound)


@given(levels=st.integers(2, 256), lo=st.floats(-100, 100), width=st.floats(0.01, 100))
def test_any_grid_takes_its_own_values(levels, lo, width):
    index = torch.arange(levels, dtype=torch.uint8)[None]
    y = byte_values(index, lo, lo + width, levels)
    refs = References(y, value_range=(lo, lo + width), levels=levels)
    same = References(index, value_range=(lo, lo + width), levels=levels)
    assert torch.equal(refs.decode(), same.decode())
    slack = HALF_ULP32 * y.abs() + 16 * HALF_ULP64 * (abs(lo) + width) * 256
    assert bool(((refs.decode() - y).abs() <= slack).all())


@pytest.mark.parametrize("kind", ["plain", "prepared"])
def test_a_plain_tensor_is_references_of_as_many_limbs(kind, precision, backend):
    y = torch.randn(140, 3, 4, 4, generator=helpers.generator(0))
    limbs = helpers.LIMBS[precision] if kind == "plain" else 4
    given = y if kind == "plain" else References(y)
    assert_same_targets(References(y, limbs=limbs), given, precision=precision, backend=backend)


@pytest.fixture
def labelled() -> References:
    return References(
        helpers.random_bytes(300, 3, 4, 4),
        value_range=(-1, 1),
        labels=torch.randint(0, 5, (300,), generator=helpers.generator(1)),
        log_weight=torch.randn(300, generator=helpers.generator(2)),
    )


def test_a_subset_is_its_direct_construction(labelled, precision, backend):
    index = torch.randint(0, 300, (170,), generator=helpers.generator(3))
    part = labelled.subset(index)
    direct = References(
        helpers.random_bytes(300, 3, 4, 4)[index],
        value_range=(-1, 1),
        labels=labelled.labels[index],
        log_weight=labelled.log_weight[index],
    )
    options = {"precision": precision, "backend": backend}
    assert_same_targets(part, direct, **options)
    assert_same_targets(part, direct, labels=direct.labels[:6], **options)
    assert len(part) == 170
    assert part.shape == labelled.shape
    assert torch.equal(part.labels, direct.labels)
    assert torch.equal(part.log_weight, direct.log_weight)
    assert torch.equal(part.decode(), labelled.decode()[index])


def test_a_subset_of_floats_with_the_largest_is_its_direct_construction(precision, backend):
    """The grid belongs to the set it was prepared from."""
    y = torch.randn(100, 12, generator=helpers.generator(0))
    largest = int(y.abs().amax(1).argmax())
    index = torch.tensor([3, largest, 50, 51])
    options = {"precision": precision, "backend": backend}
    assert_same_targets(References(y).subset(index), References(y[index]), **options)


def test_a_subset_of_a_subset(labelled, backend):
    outer, inner = torch.arange(0, 300, 3), torch.arange(99, 0, -7)
    assert_same_targets(
        labelled.subset(outer).subset(inner), labelled.subset(outer[inner]), backend=backend
    )


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_an_index_may_be_any_integer_type(labelled, dtype):
    index = torch.tensor([4, 4, 0, 120])
    assert torch.equal(labelled.subset(index.to(dtype)).decode(), labelled.decode(index.to(dtype)))
    assert torch.equal(labelled.decode(index.to(dtype)), labelled.decode()[index])


def test_decode_of_nothing_is_empty(labelled):
    assert labelled.decode(torch.tensor([], dtype=torch.int64)).shape == (0, 3, 4, 4)


def test_attributes(labelled):
    assert len(labelled) == 300
    assert labelled.shape == (3, 4, 4)
    assert labelled.device == torch.device("cpu")
    assert labelled.limbs == 1
    assert References(torch.randn(2, 3)).limbs == 4
    assert labelled.labels.dtype == torch.int64
    assert labelled.log_weight.dtype == torch.float64
    assert labelled.nbytes >= 300 * 48  # a byte for each value, at least
    assert labelled.classes.tolist() == [0, 1, 2, 3, 4]
    assert References(torch.randn(2, 3)).labels is None
    assert "300" in repr(labelled)
    assert "(3, 4, 4)" in repr(labelled)


def test_to_the_device_they_are_on(labelled, backend):
    there = labelled.to("cpu")
    assert_same_targets(there, labelled, backend=backend)
    assert torch.equal(there.labels, labelled.labels)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_give_the_same_bits(labelled, way, backend):
    """They are tensors and nothing else, so every way to copy or store an object works."""
    if way == "deepcopy":
        again = copy.deepcopy(labelled)
    elif way == "pickle":
        again = pickle.loads(pickle.dumps(labelled))
    else:
        torch.save(labelled, file := io.BytesIO())
        file.seek(0)
        again = torch.load(file, weights_only=False)
    assert_same_targets(again, labelled, backend=backend)
    assert torch.equal(again.labels, labelled.labels)
    assert len(again) == len(labelled)


def test_later_changes_of_what_was_given_do_not_reach_the_references():
    given = {
        "data": helpers.random_bytes(5, 4),
        "labels": torch.arange(5),
        "log_weight": torch.zeros(5).double(),
    }
    refs = References(value_range=(-1, 1), **given)
    before = refs.decode(), refs.labels.clone(), refs.log_weight.clone()
    for tensor in given.values():
        tensor += 1
    after = refs.decode(), refs.labels, refs.log_weight
    for name, old, new in zip(given, before, after, strict=True):
        assert torch.equal(old, new), f"{name} changed"


LAYOUTS = {
    "channels last": lambda y: y.contiguous(memory_format=torch.channels_last),
    "transposed": lambda y: y.transpose(0, 2).contiguous().transpose(0, 2),
    "strided": lambda y: y.repeat_interleave(2, 0)[::2],
    "offset": lambda y: torch.cat([y[:1], y])[1:],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["bytes", "levels", "floats", "plain"])
def test_the_layout_of_data_does_not_matter(kind, layout, backend):
    data = helpers.random_bytes(40, 3, 4, 5)
    make = {
        "bytes": lambda d: References(d, value_range=(-1, 1)),
        "levels": lambda d: References(d, value_range=(0, 255), levels=256),
        "floats": References,
        "plain": lambda d: d,
    }[kind]
    data = data if kind == "bytes" else data.float()
    other = LAYOUTS[layout](data)
    assert torch.equal(other, data)
    assert_same_targets(make(other), make(data), backend=backend)


def test_an_expanded_image_is_one_reference(precision, backend):
    one = helpers.random_bytes(1, 3, 4, 4)
    x = torch.randn(2, 3, 4, 4, generator=helpers.generator(1))
    many, alone = (
        stable_target(
            x, References(d, value_range=(-1, 1)), 1.0, precision=precision, backend=backend
        )
        for d in (one.expand(9, -1, -1, -1), one)
    )
    assert torch.equal(many, alone)


@pytest.mark.parametrize("largest", [2.0**-140, 1e-30, 1.0, 1e30])
def test_the_grid_covers_data_of_any_size(largest, backend):
    """Subnormal numbers included."""
    y = torch.rand(10, 6, generator=helpers.generator(0)).double() * largest
    refs = References(y.float())
    decoded = refs.decode().double()
    step = 2 * largest / LIMIT[4]
    assert bool(((decoded - y.float().double()).abs() <= step).all())


def test_all_zeros_are_references_like_any_other(precision, backend):
    x = torch.tensor([[3.0, -4.0]])
    zeros = torch.zeros(5, 2)
    for refs in (zeros, References(zeros)):
        target, stats = stable_target_with_stats(x, refs, 2.0, precision=precision, backend=backend)
        assert torch.equal(target, -x / 4)
        assert float(stats.ess) == pytest.approx(5.0, rel=1e-6)


@pytest.mark.parametrize("order", [(3, 0, 1, 2), (3, 2, 1, 0)])
def test_bytes_stored_with_the_images_last_mean_what_they_show(order):
    data = torch.randint(0, 256, (3, 8, 8, 40), dtype=torch.uint8).permute(order)
    refs = References(data, value_range=(-1, 1))
    plain = References(data.contiguous(), value_range=(-1, 1))
    x = plain.decode()[:5] + 0.5 * torch.randn(5, *plain.shape)
    assert torch.equal(refs.decode(), plain.decode())
    assert torch.equal(stable_target(x, refs, 0.5), stable_target(x, plain, 0.5))


def test_another_default_device_changes_nothing_on_the_cpu():
    data = torch.randint(0, 256, (30, 8), dtype=torch.uint8)
    x = torch.randn(3, 8)
    expected = stable_target(x, References(data, value_range=(-1, 1)), 0.5)
    torch.set_default_device("meta")
    try:
        out = stable_target(x, References(data, value_range=(-1, 1)), 0.5)
    finally:
        torch.set_default_device(None)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("value_range", [(-1e308, 1e308), (0.0, 5e-324)])
def test_a_value_range_without_a_finite_step_is_refused(value_range):
    data = torch.randint(0, 256, (30, 8), dtype=torch.uint8)
    with pytest.raises(ValueError, match="value_range must be finite with lo < hi"):
        References(data, value_range=value_range)


@pytest.mark.parametrize(("sigma", "alpha"), [(1e-154, 1.0), (1e-3, 1e155), (1e20, 1e300)])
def test_validation_sees_logits_that_overflow(sigma, alpha):
    refs = References(torch.randint(0, 256, (30, 8), dtype=torch.uint8), value_range=(-1, 1))
    x = torch.randn(3, 8)
    assert stable_target(x, refs, sigma, alpha=alpha).isnan().all()
    with pytest.raises(ValueError, match=r"sigma\[0\] must be "):
        validate(x, refs, sigma, alpha=alpha)


def test_the_face_is_what_the_readme_speaks_of():
    """What other modules need of a set has an underscore, so that help() is about using one."""
    face = {name for name in dir(References) if not name.startswith("_")}
    assert face == {
        *("device", "placement", "limbs", "total", "nbytes", "classes"),
        *("from_file", "save", "load", "offload", "to"),
        *("subset", "decode", "with_flips", "cells", "shard"),
    }
