"""`sigma_max` and `sigma_data` against direct computation."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import helpers
import pytest
import torch
from helpers import HALF_ULP64
from sklearn.datasets import load_digits
from torch import Tensor

from stf_kernels import References, scales, sigma_data, sigma_max


def integers(refs: References) -> Tensor:
    """v of the references, int64 [n, d]."""
    return sum(256**limb * plane.long() for limb, plane in enumerate(refs._values.load()))


def farthest(refs: References) -> float:
    """The largest distance by direct differences, of integers where int64 holds their squares."""
    v = integers(refs)
    v = v if refs.limbs < 3 else v.double()
    square = max((((row - v) ** 2).sum(1)).max().item() for row in v)
    return float(refs._affine[0]) * math.sqrt(square)


def deviation(refs: References) -> float:
    """The standard deviation by rational numbers."""
    v = [int(value) for value in integers(refs).flatten()]
    variance = Fraction(sum(value**2 for value in v), len(v)) - Fraction(sum(v), len(v)) ** 2
    return float(refs._affine[0]) * math.sqrt(variance)


def digits() -> References:
    data = torch.from_numpy(load_digits().data).to(torch.uint8)
    return References(data, value_range=(-1, 1), levels=17)


def patches() -> References:
    return References(helpers.photograph_patches(200, 16), value_range=(0, 1))


def floats(limbs: int) -> References:
    return References(helpers.photograph_patches(150, 8).double() / 77 + math.pi, limbs=limbs)


SETS: dict[str, Callable[[], References]] = {
    "digits": digits,
    "patches": patches,
    "a sphere": lambda: References(
        torch.nn.functional.normalize(torch.randn(300, 20, generator=helpers.generator(0)))
    ),
    # The outermost has no part in the farthest pair, whose distance is all but the sum of radii.
    "a cross": lambda: References(
        torch.tensor([[0, 10], [0, -8.7], [9.5, 0], [-9.5, 0]], dtype=torch.float64)
    ),
    "one value": lambda: References(torch.randn(77, 1, generator=helpers.generator(1))),
    "equal": lambda: References(torch.full((9, 5), 200, dtype=torch.uint8), value_range=(-1, 1)),
    "one": lambda: References(torch.full((1, 5), 200, dtype=torch.uint8), value_range=(-1, 1)),
    "corners": lambda: References(
        255 * torch.randint(0, 2, (200, 8), dtype=torch.uint8, generator=helpers.generator(3)),
        value_range=(0, 1),
    ),
} | {f"{limbs} limbs": lambda limbs=limbs: floats(limbs) for limbs in (1, 2, 3, 4)}


@pytest.mark.parametrize("queries", [1, 256])
@pytest.mark.parametrize("name", SETS)
def test_sigma_max(name, queries, monkeypatch):
    monkeypatch.setattr(scales, "QUERIES", queries)
    refs = SETS[name]()
    expected, actual = farthest(refs), sigma_max(refs)
    if refs.limbs < 3:
        assert actual == expected
    else:
        assert abs(actual - expected) <= (refs._values.dim**0.5 + 8) * HALF_ULP64 * expected


@pytest.mark.parametrize("name", SETS)
def test_sigma_data(name):
    refs = SETS[name]()
    assert abs(sigma_data(refs) - deviation(refs)) <= 4 * HALF_ULP64 * deviation(refs)


def test_both_are_in_the_units_of_the_value_range():
    data = helpers.random_bytes(50, 3, 4, 4)
    y = helpers.byte_values(data, -3, 7).flatten(1)
    refs = References(data, value_range=(-3, 7))
    assert sigma_data(refs) == pytest.approx(float(y.std(correction=0)), rel=1e-13)
    largest = torch.cdist(y, y, compute_mode="donot_use_mm_for_euclid_dist").max()
    assert sigma_max(refs) == pytest.approx(float(largest), rel=1e-13)


@pytest.mark.parametrize("limbs", [0, 2, 4])
@pytest.mark.parametrize("place", helpers.ELSEWHERE)
def test_chunks_from_everywhere(place, limbs, tmp_path, monkeypatch):
    monkeypatch.setattr(scales, "SUMMED_AT_ONCE", 1)
    monkeypatch.setattr(scales, "COMPARED_AT_ONCE", 1)
    monkeypatch.setattr(scales, "QUERIES", 50)
    y = helpers.photograph_patches(300, 8)
    refs = References(y.double() / 3, limbs=limbs) if limbs else References(y, value_range=(-1, 1))
    refs = helpers.ELSEWHERE[place](refs, tmp_path)
    assert sigma_max(refs) == pytest.approx(farthest(refs), rel=1e-13)
    assert sigma_data(refs) == pytest.approx(deviation(refs), rel=1e-13)


def test_labels_and_log_weight_have_no_part():
    data = helpers.random_bytes(50, 12)
    plain = References(data, value_range=(-1, 1))
    weight = torch.full((50,), -torch.inf)
    other = References(data, value_range=(-1, 1), labels=torch.arange(50), log_weight=weight)
    assert sigma_max(plain) == sigma_max(other)
    assert sigma_data(plain) == sigma_data(other)


@pytest.mark.parametrize("outliers", [True, False])
def test_what_cannot_be_farther_is_not_compared(outliers, monkeypatch):
    """With a few outlying references two rounds do; on a sphere everything is compared."""
    monkeypatch.setattr(scales, "QUERIES", 20)
    y = torch.nn.functional.normalize(torch.randn(1000, 30, generator=helpers.generator(2)))
    if outliers:
        y[::100] *= 5
    refs, stages = References(y), scales.resolve("auto", torch.device("cpu"))
    compared, logits = [], stages.logits

    def watched(samples, prepared, floor=None):
        compared.append(len(samples.q) * len(prepared.norms))
        return logits(samples, prepared, floor)

    monkeypatch.setattr(stages, "logits", watched)
    assert sigma_max(refs) == pytest.approx(farthest(refs), rel=1e-13)
    if outliers:
        assert sum(compared) <= 2 * 20 * 1000
    else:
        # Each pair once, but for those in the same round.
        assert 1000**2 / 2 < sum(compared) < 1000 * (1000 + 20) / 2 + 1


def test_a_shard_and_a_tensor_are_refused():
    refs = References(helpers.random_bytes(5, 3), value_range=(-1, 1))
    refs._shard = (0, 10)
    for measure in (sigma_max, sigma_data):
        with pytest.raises(ValueError, match="refs must be a whole set, got a shard"):
            measure(refs)
        with pytest.raises(TypeError, match="refs must be References, got Tensor"):
            measure(torch.zeros(5, 3))
