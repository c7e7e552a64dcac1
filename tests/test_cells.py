"""`References.cells`: neighbours as references, without a bias."""

from __future__ import annotations

import copy
import sys

import helpers
import pytest
import torch
from helpers import assert_rows_within, byte_values, denoised_bound, noisy, row_norm
from sklearn.datasets import load_digits
from torch import Tensor

from stf_kernels import References, cells, oracle, stable_target
from stf_kernels.storage import Resident


def digits(labels: bool = False) -> References:
    images, classes = load_digits(return_X_y=True)
    data = torch.from_numpy(images).to(torch.uint8).view(-1, 1, 8, 8)
    classes = torch.from_numpy(classes) if labels else None
    return References(data, value_range=(-1, 1), levels=17, labels=classes)


def in_order(y: Tensor) -> list[list[float]]:
    return sorted(y.flatten(1).tolist())


# Unbiasedness by enumeration: given x, the source is s with probability w_s.

POINTS = helpers.random_bytes(40, 2, seed=1)
PLACES = torch.randn(6, 2, generator=helpers.generator(2), dtype=torch.float64)
SIGMA = 0.4


def mean_over_sources(
    refs: References, references_of: dict[int, Tensor], **options: str
) -> tuple[Tensor, Tensor]:
    """E[D | x] at the places if source s has these references, and a bound of its rounding."""
    y = byte_values_of(refs)
    _, w = oracle.posterior(PLACES, y, SIGMA)
    mean, bounds = torch.zeros_like(PLACES), []
    for s, members in references_of.items():
        d = stable_target(PLACES, refs.subset(members), SIGMA, target="denoised", **options)
        mean += w[:, s, None] * d
        bounds.append(denoised_bound(PLACES, y[members], SIGMA, precision=options["precision"]))
    return mean, torch.stack(bounds).amax(0)


def byte_values_of(refs: References) -> Tensor:
    return byte_values(((refs.decode() + 1) * 127.5).round())


@pytest.mark.parametrize("k", [1, 3, 8, 40])
def test_unbiased_with_the_references_of_the_sources_cell(k, precision, backend):
    refs = References(POINTS, value_range=(-1, 1)).cells(k)
    y = byte_values_of(refs)
    _, w = oracle.posterior(PLACES, y, SIGMA)
    options = {"precision": precision, "backend": backend}
    mean, exactly = torch.zeros_like(PLACES), torch.zeros_like(PLACES)
    bounds = []
    for label in refs.labels.unique():
        labels = label.expand(len(PLACES))
        d = stable_target(PLACES, refs, SIGMA, target="denoised", labels=labels, **options)
        cell = refs.labels == label
        mean += w[:, cell].sum(1, keepdim=True) * d
        truth = oracle.denoised(PLACES, y[cell], SIGMA)
        exactly += w[:, cell].sum(1, keepdim=True) * truth
        bounds.append(denoised_bound(PLACES, y[cell], SIGMA, precision=precision))
    full = oracle.denoised(PLACES, y, SIGMA)
    assert float(row_norm(exactly - full).max()) < 1e-14
    assert_rows_within(mean, full, torch.stack(bounds).amax(0) + 1e-14)
    assert float(torch.stack(bounds).max()) < 1e-4


def test_the_nearest_references_of_each_source_are_biased(precision, backend):
    refs = References(POINTS, value_range=(-1, 1)).cells(8)
    y = byte_values_of(refs)
    options = {"precision": precision, "backend": backend}
    full = oracle.denoised(PLACES, y, SIGMA)
    of_the_cell = {s: (refs.labels == refs.labels[s]).nonzero()[:, 0] for s in range(40)}
    mean, bound = mean_over_sources(refs, of_the_cell, **options)
    assert_rows_within(mean, full, bound + 1e-14)
    order = oracle.squared_distance(y, y).argsort(1)
    nearest = {s: order[s, : len(of_the_cell[s])] for s in range(40)}
    assert all(s in members for s, members in nearest.items())
    mean, _ = mean_over_sources(refs, nearest, **options)
    assert float(row_norm(mean - full).max()) > 0.02


# What comes back.


def test_a_set_in_memory_comes_cell_by_cell():
    refs = digits()
    found = refs.cells(16)
    assert in_order(found.decode()) == in_order(refs.decode())
    assert torch.equal(found.labels, found.labels.sort().values)
    assert found.labels.dtype == torch.int64
    assert set(found.labels.tolist()) <= set(range(16))
    assert len(found.classes) > 12
    assert refs.labels is None
    assert isinstance(found._values, Resident)


def test_cells_are_neighbourhoods():
    """The scatter within 16 cells is under 3/4 of that within 16 parts of the same sizes."""
    found = digits().cells(16)
    y = found.decode().double().flatten(1)
    size = torch.bincount(found.labels, minlength=16).double()[:, None].clamp_min(1)

    def scatter(labels: Tensor) -> float:
        means = torch.zeros(16, 64).double().index_add(0, labels, y) / size
        return float(((y - means[labels]) ** 2).sum())

    shuffled = found.labels[torch.randperm(len(y), generator=helpers.generator(0))]
    assert scatter(found.labels) < 0.75 * scatter(shuffled)


def test_labels_are_refined_and_log_weight_stays():
    images, classes = load_digits(return_X_y=True)
    data = torch.from_numpy(images).to(torch.uint8)
    data[:, 0] = torch.arange(1797) % 17  # so that no two are equal
    weight = torch.randn(1797, generator=helpers.generator(1), dtype=torch.float64)
    classes = torch.from_numpy(classes)
    refs = References(data, value_range=(0, 16), levels=17, labels=classes, log_weight=weight)
    found = refs.cells(4)
    place = {tuple(row): i for i, row in enumerate(data.tolist())}
    assert len(place) == 1797
    origin = torch.tensor([place[tuple(row)] for row in found.decode().int().tolist()])
    assert torch.equal(found.labels // 4, classes[origin])
    assert torch.equal(found.log_weight, weight[origin])
    assert torch.equal(refs.labels, classes)
    plain = References(data, value_range=(0, 16), levels=17).cells(4)
    cell = torch.empty(1797, dtype=torch.int64)
    cell[torch.tensor([place[tuple(row)] for row in plain.decode().int().tolist()])] = plain.labels
    assert torch.equal(found.labels % 4, cell[origin])


@pytest.mark.parametrize("place", helpers.ELSEWHERE)
def test_values_elsewhere_stay_in_order(place, tmp_path):
    refs = helpers.ELSEWHERE[place](digits(), tmp_path)
    found = refs.cells(8)
    assert found.placement == refs.placement
    assert found._values is refs._values
    assert torch.equal(found.decode(), refs.decode())
    # The same partition as of a tensor of the same references.
    whole = References(refs.decode(), value_range=(-1, 1), levels=17).cells(8)
    order = found.labels.argsort(stable=True)
    assert torch.equal(found.labels[order], whole.labels)
    assert torch.equal(found.decode(order), whole.decode())
    x, labels, y = (
        noisy(found.decode(torch.arange(5)).double(), 0.5),
        found.labels[:5],
        found.decode(),
    )
    weight = torch.where(labels[:, None] == found.labels, 0.0, -torch.inf)
    bound = denoised_bound(x, y, 0.5, 1.0, weight, precision="exact")
    expected = oracle.denoised(x, y, 0.5, 1.0, weight)
    for same in (found, whole):
        d = stable_target(x.double(), same, 0.5, target="denoised", labels=labels)
        assert_rows_within(d, expected, bound)


def test_a_seed_gives_the_same_cells():
    refs = digits()
    one, other = refs.cells(8, seed=3), refs.cells(8, seed=3)
    assert torch.equal(one.decode(), other.decode())
    assert torch.equal(one.labels, other.labels)
    assert not torch.equal(one.labels, refs.cells(8, seed=4).labels)


@pytest.mark.parametrize("k", [8, 1500])
def test_no_more_than_a_chunk_is_in_floats(k, monkeypatch):
    rows, floats = [], cells._floats

    def watched(values: Tensor) -> object:
        rows.append(values.shape[1])
        return floats(values)

    monkeypatch.setattr(cells, "_floats", watched)
    monkeypatch.setattr(cells, "STEPS", 5)
    refs = digits()
    refs.cells(k)
    assert max(rows) == max(cells.BATCH, k) < len(refs)
    assert len(rows) == 5 + 2


# Variance: how far the target is from the posterior mean over the whole set.


def variances(k: int, sigma: float) -> tuple[float, float]:
    """E ||T - D_full||^2 with the source's cell, and with as many uniform references."""
    refs = digits().cells(k)
    n, rows = len(refs), 512
    g = helpers.generator(5)
    source = torch.randint(n, (rows,), generator=g)
    x = noisy(refs.decode(source).double(), sigma, seed=6).double()
    full = stable_target(x, refs, sigma, target="denoised")
    near = stable_target(x, refs, sigma, target="denoised", labels=refs.labels[source])
    # A source's cell has this many references on average.
    size = round(float((torch.bincount(refs.labels).double() ** 2).sum()) / n)
    uniform = torch.empty_like(x)
    for i, s in enumerate(source):
        others = torch.randperm(n - 1, generator=g)[: size - 1]
        members = torch.cat([s[None], others + (others >= s)])
        subset = refs.subset(members)
        uniform[i] = stable_target(x[i : i + 1], subset, sigma, target="denoised")[0]
    return tuple(float(((t - full) ** 2).sum((1, 2, 3)).mean()) for t in (near, uniform))


def test_less_variance_than_uniform_references_at_small_noise_and_more_at_large():
    """Measured over 2048 samples at k = 16: .048 against .297 at sigma .5, 9.1 against .24 at 5."""
    near, uniform = variances(16, 0.5)
    assert near < uniform / 3
    near, uniform = variances(16, 5.0)
    assert near > 10 * uniform


# Arguments.


@pytest.mark.parametrize("k", [0, -1, 41, True, 2.0, "8", None])
def test_a_bad_number_of_cells_is_named(k):
    with pytest.raises(ValueError, match=f"k must be 1 to 40, got {k!r}"):
        References(POINTS, value_range=(-1, 1)).cells(k)


def test_a_shard_is_refused():
    shard = copy.copy(References(POINTS, value_range=(-1, 1)))
    shard._shard = (0, 128)
    with pytest.raises(ValueError, match="cells of a shard"):
        shard.cells(2)


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(ImportError, match=r'pip install "stf-kernels\[train\]"'):
        References(POINTS, value_range=(-1, 1)).cells(2)


def test_cells_keep_classes_apart_however_large_their_labels():
    u = torch.full((256, 4), 7, dtype=torch.uint8)
    labels = torch.where(torch.arange(256) % 2 == 0, 0, 1 << 61)
    cells = References(u, value_range=(-1, 1), labels=labels).cells(8)
    assert len(cells.classes) == 2
    assert bool((cells.labels >= 0).all())


@pytest.mark.parametrize("seed", [-1, 1.5, "a", None, True, 1 << 32])
def test_a_seed_that_is_none(seed: object):
    refs = References(torch.zeros(9, 4, dtype=torch.uint8), value_range=(-1, 1))
    with pytest.raises(ValueError, match="seed must be an integer in"):
        refs.cells(2, seed=seed)
