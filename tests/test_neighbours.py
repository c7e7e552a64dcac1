"""`nearest` against float64 brute force, wherever the references are."""

from __future__ import annotations

import helpers
import pytest
import torch
from helpers import HALF_ULP64, byte_values, near_duplicates, photograph_patches
from torch import Tensor

from stf_kernels import (
    Nearest,
    References,
    nearest,
    neighbours,
    oracle,
    stable_target_with_stats,
)
from stf_kernels.pipeline import Plan


def decoded(refs: References) -> Tensor:
    """The references' values, float64 [n, *shape], not rounded to float32."""
    scale, offset = refs._affine
    digits = refs._values.load().double()
    v = sum(256.0**limb * plane for limb, plane in enumerate(digits))
    return (scale * v + offset).view(len(refs), *refs.shape)


def assert_nearest(found: Nearest, x: Tensor, y: Tensor, allowed: Tensor | None = None) -> None:
    """The first of the nearest, at its distance, up to the rounding of float64 sums."""
    square = oracle.squared_distance(x, y)
    if allowed is not None:
        square = torch.where(allowed, square, torch.inf)
    least = square.amin(1)
    # Both sum d squares of values once rounded.
    slack = 1 + 4 * (x[0].numel() ** 0.5 + 4) * HALF_ULP64
    chosen = square.gather(1, found.index[:, None])[:, 0]
    assert bool((chosen <= least * slack).all())
    assert torch.allclose(found.distance, chosen.sqrt(), rtol=slack - 1, atol=0)
    same = (y.flatten(1)[None] == y[found.index].flatten(1)[:, None]).all(2)
    if allowed is not None:
        same &= allowed
    assert torch.equal(found.index, same.int().argmax(1))  # of equals the first


SIGMAS = torch.logspace(-5, 2, 30, dtype=torch.float64)


def problem(size: int = 16) -> tuple[Tensor, Tensor]:
    """Photograph patches, six near-duplicates and one exact copy of each, and samples [30]."""
    data = near_duplicates(photograph_patches(50, size), 6)
    data = torch.cat([data, data[::6]])
    clean = byte_values(data)[torch.arange(30) * 11 % 300]
    return data, helpers.noisy(clean, SIGMAS, seed=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nearest_of_photographs(dtype, backend):
    data, x = problem()
    refs = References(data, value_range=(-1, 1))
    found = nearest(x.to(dtype), refs, backend=backend)
    assert found.index.dtype == torch.int64
    assert found.distance.dtype == torch.float64
    assert_nearest(found, x, decoded(refs))


@pytest.mark.parametrize("limbs", [1, 2, 3, 4])
def test_nearest_of_floats(limbs, backend):
    data, x = problem()
    refs = References(data.double() / 77 + torch.rand(data.shape).double() / 1000, limbs=limbs)
    assert_nearest(nearest(x, refs, backend=backend), x, decoded(refs))
    if limbs == 4:
        y = refs.decode()
        assert torch.equal(nearest(x, y, backend=backend).index, nearest(x, refs).index)


def test_a_reference_is_its_own_nearest(backend):
    data, _ = problem()
    refs = References(data, value_range=(0, 1), levels=256)
    found = nearest(decoded(refs), refs, backend=backend)
    assert bool((found.distance == 0).all())
    assert torch.equal(found.index, torch.cat([torch.arange(300), torch.arange(0, 300, 6)]))
    narrow = nearest(refs.decode(), refs, backend=backend)
    assert torch.equal(narrow.index, found.index)
    assert float(narrow.distance.max()) < data[0].numel() ** 0.5 * helpers.HALF_ULP32


def test_exact_where_the_rounded_sample_is_nearer_to_another(backend):
    """One large value makes the step of the others so coarse that most of them round to zero."""
    y = torch.randn(64, generator=helpers.generator(2), dtype=torch.float64)
    y[0] = 0
    x = 0.45 * 2.0**-21 * torch.sign(y)
    x[0], x[1] = 1000.0, -2 * 2.0**-21 * torch.sign(y[1])
    refs = References(torch.stack([y, -y]))
    for sample, index in ((x, 0), (x * torch.where(x > 100, 1, -1), 1)):
        _, stats = stable_target_with_stats(sample[None], refs, 1e-3, backend=backend)
        assert stats.argmax.tolist() == [1 - index]
        found = nearest(sample[None], refs, backend=backend)
        assert found.index.tolist() == [index]


def test_far_away_and_huge_samples(backend):
    data, x = problem()
    refs = References(data, value_range=(-1, 1))
    for scale in (1e4, 1e-4, 0.0):
        scaled = x.double() * scale
        assert_nearest(nearest(scaled, refs, backend=backend), scaled, decoded(refs))


def test_one_reference_many_times(backend):
    data, x = problem(8)
    refs = References(data[:1].expand(700, -1, -1, -1), value_range=(-1, 1))
    found = nearest(x, refs, backend=backend)
    assert found.index.tolist() == [0] * 30
    assert_nearest(found, x, decoded(refs))


def test_labels(backend):
    data, x = problem(8)
    ref_labels = torch.arange(len(data)) % 4
    refs = References(data, value_range=(-1, 1), labels=ref_labels)
    labels = torch.arange(30) % 5 - 1
    allowed = (labels[:, None] == ref_labels) | (labels[:, None] == -1)
    found = nearest(x, refs, labels=labels, backend=backend)
    assert_nearest(found, x, decoded(refs), allowed)
    assert not torch.equal(found.index, nearest(x, refs, backend=backend).index)


def test_log_weight_does_not_move_it_but_leaves_out(backend):
    data, x = problem(8)
    weight = 100 * torch.randn(len(data), generator=helpers.generator(3))
    plain = References(data, value_range=(-1, 1))
    weighted = References(data, value_range=(-1, 1), log_weight=weight)
    expected = nearest(x, plain, backend=backend)
    found = nearest(x, weighted, backend=backend)
    assert torch.equal(found.index, expected.index)
    assert torch.equal(found.distance, expected.distance)
    weight[expected.index] = -torch.inf
    without = References(data, value_range=(-1, 1), log_weight=weight)
    allowed = (weight > -torch.inf).expand(30, -1)
    assert_nearest(nearest(x, without, backend=backend), x, decoded(without), allowed)


@pytest.mark.parametrize("limbs", [0, 3])
@pytest.mark.parametrize("place", helpers.ELSEWHERE)
def test_chunks_from_everywhere(place, limbs, backend, tmp_path, monkeypatch):
    data, x = problem(8)
    data = data[torch.randperm(len(data), generator=helpers.generator(4))]
    refs = References(data.float(), limbs=3) if limbs else References(data, value_range=(-1, 1))
    refs = helpers.ELSEWHERE[place](refs, tmp_path)
    x = 127.5 * (x + 1) if limbs else x
    x[3] = x[3].flip(-1)
    whole = nearest(x, refs, backend=backend)
    assert_nearest(whole, x, decoded(refs))
    if "flips" in place:
        assert int(whole.index.max()) >= len(data)
    cuts = []

    def plan(stages: object, rows: int, n: int, *rest: object) -> Plan:
        cuts.append(n)
        return Plan(7, 128, False)

    monkeypatch.setattr(neighbours, "plan", plan)
    found = nearest(x, refs, backend=backend)
    assert cuts == [len(refs)]
    assert torch.equal(found.index, whole.index)
    assert torch.equal(found.distance, whole.distance)


def test_a_row_does_not_know_the_others(backend):
    data, x = problem(8)
    refs = References(data, value_range=(-1, 1))
    whole = nearest(x, refs, backend=backend)
    alone = [nearest(row[None], refs, backend=backend) for row in x]
    assert torch.equal(torch.cat([a.index for a in alone]), whole.index)
    assert torch.equal(torch.cat([a.distance for a in alone]), whole.distance)


def test_rows_without_an_answer_are_minus_one_and_alone(backend):
    data, x = problem(8)
    refs = References(data, value_range=(-1, 1), labels=torch.arange(350) % 2)
    clean = nearest(x, refs, backend=backend)
    x[2, 0, 0, 0], x[5, 1, 1, 1], x[7] = torch.nan, torch.inf, -torch.inf
    found = nearest(x, refs, backend=backend)
    bad = torch.zeros(30, dtype=torch.bool)
    bad[[2, 5, 7]] = True
    assert found.index[bad].tolist() == [-1] * 3
    assert bool(found.distance[bad].isnan().all())
    assert torch.equal(found.index[~bad], clean.index[~bad])
    assert torch.equal(found.distance[~bad], clean.distance[~bad])
    nothing = References(data, value_range=(-1, 1), log_weight=torch.full((350,), -torch.inf))
    found = nearest(x, nothing, backend=backend)
    assert found.index.tolist() == [-1] * 30
    assert bool(found.distance.isnan().all())


def test_no_samples(backend):
    data, x = problem(8)
    found = nearest(x[:0], References(data, value_range=(-1, 1)), backend=backend)
    assert found.index.shape == found.distance.shape == (0,)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 100])
def test_ordered_sum_is_the_sum_in_any_batch(size):
    t = torch.randn(9, size, generator=helpers.generator(5), dtype=torch.float64) ** 2
    out = neighbours.ordered_sum(t)
    assert torch.allclose(out, t.sum(1), rtol=8 * HALF_ULP64, atol=0)
    assert torch.equal(torch.cat([neighbours.ordered_sum(row[None]) for row in t]), out)


def test_bad_arguments_are_named():
    data, x = problem(8)
    refs = References(data, value_range=(-1, 1), labels=torch.zeros(350, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"ref must be \[n, 3, 8, 7\] like x_t"):
        nearest(x[..., :7], refs)
    with pytest.raises(TypeError, match="x_t must be one of"):
        nearest(data, refs)
    with pytest.raises(ValueError, match=r"labels\[0\] must be a class of ref"):
        nearest(x, refs, labels=torch.ones(30, dtype=torch.int64))
    with pytest.raises(ValueError, match="workspace must be at least"):
        nearest(x, refs, workspace=1)
    with pytest.raises(ValueError, match="backend must be one of"):
        nearest(x, refs, backend="abacus")
