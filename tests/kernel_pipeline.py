"""What a backend made of kernels must pass without a GPU: whole targets, bit for bit.

Run in a process that can run the kernels, which names the backend: see test_cuda.py and
test_triton.py.
"""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bits import assert_same_bits, assert_same_coefficients, problem

from stf_kernels import (
    References,
    Velocity,
    golden,
    parameterization,
    pipeline,
    stable_target,
    stable_target_with_stats,
)
from stf_kernels.backends import BACKENDS
from stf_kernels.pipeline import Plan

BACKEND = os.environ["STF_TESTED_BACKEND"]
SHAPES = [(1, 1, 1), (3, 2, 1), (1, 127, 5), (2, 129, 64), (18, 300, 130), (9, 1025, 33)]
PRECISIONS = ["exact", "fast"]


def assert_equals_specification(*args: object, **options: object) -> None:
    expected = stable_target_with_stats(*args, backend="torch", **options)
    found = stable_target_with_stats(*args, backend=BACKEND, **options)
    assert_same_bits(found[0], expected[0])
    for name, a, b in zip(expected[1]._fields, found[1], expected[1], strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num()), name


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", [*SHAPES, (70, 140, 48)], ids=str)
def test_bytes(shape, precision):
    torch.manual_seed(0)
    x, u, sigma = problem(shape, torch.float32)
    assert_equals_specification(x, References(u, value_range=(-1, 1)), sigma, precision=precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("limbs", [None, 1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_floats(dtype, limbs, precision):
    torch.manual_seed(1)
    x, u, sigma = problem((6, 150, 40), torch.float64)
    y = ((u.double() - 90) / 70).to(dtype)
    ref = y if limbs is None else References(y, limbs=limbs)
    expected = stable_target(x.to(dtype), ref, sigma, precision=precision, backend="torch")
    found = stable_target(x.to(dtype), ref, sigma, precision=precision, backend=BACKEND)
    assert_same_bits(found, expected)


@pytest.mark.parametrize("target", ["score", "denoised", "epsilon", "v", "edm", Velocity(1, -1)])
def test_every_argument(target):
    torch.manual_seed(2)
    x, u, sigma = problem((12, 300, 40), torch.float32)
    weight = torch.where(torch.rand(300) < 0.2, -torch.inf, torch.randn(300))
    refs = References(u, value_range=(0, 3), labels=torch.arange(300) % 4, log_weight=weight)
    assert_equals_specification(
        x,
        refs,
        sigma,
        alpha=torch.linspace(-1, 1, 12),
        target=target,
        labels=torch.randint(-1, 4, (24,))[::2],
        log_weight=torch.randn(300),
    )


@pytest.mark.parametrize("distances", [False, True])
@pytest.mark.parametrize("student", [False, True])
@pytest.mark.parametrize("kind", parameterization.KINDS)
def test_coefficients(kind, student, distances):
    stages = BACKENDS[BACKEND]
    assert_same_coefficients(stages, kind, torch.float32, student, distances)


@pytest.mark.parametrize("D", [0.5, 1e9, torch.linspace(0.1, 60, 9)], ids=["few", "many", "by row"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_student_t_noise(precision, D):
    torch.manual_seed(3)
    x, u, sigma = problem((9, 140, 33), torch.float32)
    refs = References(u, value_range=(-1, 2), labels=torch.arange(140) % 3)
    noise = {"noise": "student_t", "D": D, "precision": precision}
    assert_equals_specification(x, refs, sigma, **noise)
    conditions = {"labels": torch.arange(9) % 4 - 1, "log_weight": torch.randn(140)}
    alpha = torch.linspace(-1, 1, 9)
    assert_equals_specification(x, refs, sigma, alpha=alpha, **conditions, **noise)


@pytest.mark.parametrize(
    ("shape", "limbs"), list(zip(SHAPES, [4, 3, 2, 4, 3, 2], strict=True)), ids=str
)
def test_student_t_noise_with_float_references(shape, limbs):
    torch.manual_seed(10)
    x, u, sigma = problem(shape, torch.float64)
    refs = References((u.float() - 90) / 70, limbs=limbs)
    assert_equals_specification(x, refs, sigma, noise="student_t", D=shape[2] / 2)


@pytest.mark.parametrize("noise", [{}, {"noise": "student_t", "D": 64}], ids=["gaussian", "t"])
@pytest.mark.parametrize("limbs", [1, 3])
def test_references_in_chunks(monkeypatch, limbs, noise):
    torch.manual_seed(4)
    x, u, sigma = problem((3, 300, 30), torch.float32)
    refs = References(u.float() / 99, limbs=limbs)
    expected = stable_target_with_stats(x, refs, sigma, backend="torch", **noise)
    stages = BACKENDS[BACKEND]
    logits, sizes = stages.logits, []

    def watched(samples, chunk, floor):
        sizes.append(chunk.values.shape[1])
        return logits(samples, chunk, floor)

    monkeypatch.setattr(stages, "logits", watched)
    for again in (False, True):  # whether the logits of the first sweep are made again
        monkeypatch.setattr(pipeline, "plan", lambda *_, keep=not again: Plan(3, 128, keep))
        found = stable_target_with_stats(x, refs, sigma, backend=BACKEND, **noise)
        assert sizes == [128, 128, 44] * (1 + again)
        sizes.clear()
        assert_same_bits(found[0], expected[0])
        for name, a, b in zip(expected[1]._fields, found[1], expected[1], strict=True):
            assert torch.equal(a, b), name


def test_one_label_for_all_samples_need_not_lie_in_memory_for_each():
    torch.manual_seed(5)
    x, u, sigma = problem((7, 90, 10), torch.float32)
    refs = References(u, value_range=(0, 3), labels=(torch.arange(180) % 4)[::2])
    label = torch.tensor([2]).expand(7)
    expected = stable_target(x, refs, sigma, labels=label, backend="torch")
    assert_same_bits(stable_target(x, refs, sigma, labels=label, backend=BACKEND), expected)


def test_rows_without_a_target_are_nan_and_alone():
    torch.manual_seed(6)
    x, u, sigma = problem((8, 150, 30), torch.float32)
    refs = References(u, value_range=(-1, 1), labels=torch.zeros(150, dtype=torch.int64))
    clean = stable_target(x, refs, sigma, backend=BACKEND)
    x[0, 3], x[1, 0], x[2, 29] = torch.nan, torch.inf, -torch.inf
    sigma[3], sigma[4], sigma[5] = 0.0, -1.0, torch.nan
    assert_equals_specification(x, refs, sigma)
    out = stable_target(x, refs, sigma, backend=BACKEND)
    assert out[:6].isnan().all()
    assert_same_bits(out[6:], clean[6:])
    assert_equals_specification(x, refs, sigma, log_weight=torch.full((150,), -torch.inf))
    partly = torch.where(torch.arange(150) < 128, -torch.inf, 0.0)  # a block without a reference
    assert_equals_specification(x, refs, sigma, log_weight=partly)


@pytest.mark.parametrize("case", golden.CASES)
def test_golden_hashes(case):
    target = golden.CASES[case]("cpu").compute(backend=BACKEND)
    assert golden.digest(target) == golden.RECORDED[case]


@settings(max_examples=12, deadline=None)
@given(
    B=st.integers(1, 5),
    n=st.integers(1, 200),
    d=st.integers(1, 40),
    seed=st.integers(0, 2**31),
    exponent=st.integers(-30, 30),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    precision=st.sampled_from(PRECISIONS),
    limbs=st.sampled_from([0, 1, 2, 3, 4]),
)
def test_any_input(B, n, d, seed, exponent, dtype, precision, limbs):
    generator = torch.Generator().manual_seed(seed)
    scale = 2.0**exponent
    x = (torch.randn(B, d, generator=generator, dtype=torch.float64) * scale).to(dtype)
    sigma = torch.rand(B, generator=generator, dtype=torch.float64) * scale
    if limbs:
        y = torch.randn(n, d, generator=generator, dtype=torch.float64) * scale
        refs = References(y, limbs=limbs)
    else:
        u = torch.randint(0, 256, (n, d), generator=generator, dtype=torch.uint8)
        refs = References(u, value_range=(-scale, 2 * scale))
    alpha = torch.rand(B, generator=generator)
    assert_equals_specification(x, refs, sigma, alpha=alpha, precision=precision)


def test_bits_do_not_depend_on_the_batch(monkeypatch):
    torch.manual_seed(7)
    x, u, sigma = problem((17, 200, 30), torch.float32)
    refs = References(u, value_range=(-1, 1))
    whole = stable_target(x, refs, sigma, backend=BACKEND)
    order = torch.randperm(17)
    assert_same_bits(stable_target(x[order], refs, sigma[order], backend=BACKEND), whole[order])
    monkeypatch.setattr(BACKENDS[BACKEND], "MAX_ROWS", 5)
    assert_same_bits(stable_target(x, refs, sigma, backend=BACKEND), whole)


def test_the_transposed_copy_is_made_once_for_a_set(monkeypatch):
    torch.manual_seed(8)
    x, u, sigma = problem((3, 150, 20), torch.float32)
    refs = References(u, value_range=(-1, 1))
    stages, made = BACKENDS[BACKEND], []
    transpose = stages.transpose
    monkeypatch.setattr(stages, "transpose", lambda v: made.append(v.shape) or transpose(v))
    for _ in range(2):
        stable_target(x, refs, sigma, backend=BACKEND)
    subset = refs.subset(torch.arange(140))
    for _ in range(2):
        stable_target(x, subset, sigma, backend=BACKEND)
    assert made == [(1, 150, 20), (1, 140, 20)]
    stable_target(x, refs, sigma, backend="torch")
    assert len(made) == 2


def test_compiled_into_one_graph():
    torch.manual_seed(9)
    x, u, sigma = problem((3, 150, 20), torch.float32)
    refs = References(u, value_range=(-1, 1))
    call = torch.compile(
        lambda x, sigma: 2 * stable_target(x, refs, sigma, backend=BACKEND),
        fullgraph=True,
        backend="aot_eager",
    )
    assert_same_bits(call(x, sigma), 2 * stable_target(x, refs, sigma, backend="torch"))
