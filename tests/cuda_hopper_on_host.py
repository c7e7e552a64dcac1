"""Hopper's products on the host: wgmma, the TMA, mbarriers and clusters as documented.

tests/host_cuda/cuda_hopper_on_host.h runs them as late, early and piecemeal as it may, by a seed.
"""

from __future__ import annotations

import pytest
import torch
from cuda_on_host import (
    _on_the_host,  # noqa: F401
    assert_same_logits,
    dense_weights,
    host,
    operands,
)
from host_cuda.build import SAFE_TERMS
from kernel_pipeline import assert_same_bits, problem

from stf_kernels import References, stable_target
from stf_kernels import cuda_backend as mine
from stf_kernels import torch_backend as spec


@pytest.fixture(autouse=True)
def _hopper(_on_the_host, monkeypatch):  # noqa: F811
    for product in mine.PRODUCTS:
        monkeypatch.setitem(mine.PRODUCTS, product, "hopper")
    host.set_device(4, 9, 0)


@pytest.mark.parametrize("limbs", [3, 4])
@pytest.mark.parametrize(
    ("shape", "ref_limbs"),
    [
        ((1, 1, 16), 1),
        ((3, 130, 144), 3),
        ((70, 260, 400), 1),  # more tiles than clusters, an odd block, 4 stages
        ((65, 129, 1168), 1),  # more stages than the ring has, in three sums of int32
        ((2, 129, 496), 2),
    ],
    ids=str,
)
def test_logits(shape, ref_limbs, limbs):
    torch.manual_seed(0)
    for processors, pitch in ((2, 0), (7, shape[1] + 3)):
        host.set_device(processors, 9, 0)
        samples, refs = operands(*shape, ref_limbs, limbs, pitch=pitch)
        assert_same_logits(samples, refs, limbs)


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("processors", [2, 12, 40])
@pytest.mark.parametrize(
    ("shape", "ref_limbs"), [((1, 129, 1), 6), ((70, 300, 130), 1), ((5, 2100, 150), 3)], ids=str
)
def test_weighted_sums_of_dense_rows(shape, ref_limbs, processors, precision):
    torch.manual_seed(1)
    B, n, dim = shape
    values = torch.randint(-128, 128, (ref_limbs, n, dim), dtype=torch.int8)
    found, expected = dense_weights(B, n, precision)
    host.set_device(processors, 9, 0)
    assert torch.equal(mine.weighted_sum(found, values), spec.weighted_sum(expected, values))


def test_no_row_is_dense():
    relative = torch.full((3, 129), -1000.0)
    relative[:, 5] = 0
    anchors = torch.zeros(3, 2, dtype=torch.float64)
    values = torch.randint(-128, 128, (1, 129, 16), dtype=torch.int8)
    found, expected = (
        s.weights(relative, anchors, anchors[:, 0], "exact", False) for s in (mine, spec)
    )
    assert found.weight.dense.item() == 0
    assert torch.equal(mine.weighted_sum(found, values), spec.weighted_sum(expected, values))


def test_whole_targets():
    torch.manual_seed(3)
    x, u, sigma = problem((66, 300, 48), torch.float32)
    labels = torch.arange(300) % 4
    refs = References(u, value_range=(0, 3), labels=labels, log_weight=torch.randn(300))
    options = {"labels": torch.randint(-1, 4, (66,)), "noise": "student_t", "D": 20.0}
    for some in ({}, options):
        expected = stable_target(x, refs, sigma, backend="torch", **some)
        assert_same_bits(stable_target(x, refs, sigma, backend="cuda", **some), expected)


def test_the_order_of_everything_changes_nothing():
    torch.manual_seed(4)
    x, u, sigma = problem((66, 300, 272), torch.float32)
    sigma[:40] = 50  # dense rows
    refs = References(u, value_range=(-1, 1))
    expected = stable_target(x, refs, sigma, backend="torch")
    for seed in range(4):
        host.seed(seed)
        host.set_device(2 + 2 * (seed % 3), 9, 0)
        assert_same_bits(stable_target(x, refs, sigma, backend="cuda"), expected)


def test_launches():
    torch.manual_seed(5)
    x, u, sigma = problem((5, 300, 32), torch.float32)
    host.set_device(7, 9, 0)
    host.take_launches()
    stable_target(x, References(u, value_range=(-1, 1)), sigma, backend="cuda")
    clusters = [launch for launch in host.take_launches() if launch[3] == 2]
    assert len(clusters) == 2
    for blocks, threads, shared, *_ in clusters:
        assert (blocks, threads) == (6, 384)  # pairs of processors
        assert shared <= 227 << 10


@pytest.mark.parametrize(
    ("shape", "ref_limbs", "offset", "taken"),
    [
        ((2, 3, 32), 2, 0, True),
        ((2, 3, 40), 2, 0, False),  # rows are not multiples of 16 bytes
        ((2, 3, 32), 2, 8, False),  # nor are addresses
        ((1, 1, SAFE_TERMS + 16), 1, 0, True),
        ((1, 1, SAFE_TERMS + 16), 2, 0, False),  # several limbs of several sums each
    ],
)
def test_what_it_takes(shape, ref_limbs, offset, taken):
    samples, refs = operands(*shape, ref_limbs, 4, offset=offset)
    if taken:
        assert_same_logits(samples, refs, 4)
    q = mine.address(samples.q), shape[0], 4
    references = mine.address(refs.values), ref_limbs, *shape[1:], shape[1]
    assert host.hopper_takes_logits(q, references) == taken
