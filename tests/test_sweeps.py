"""References in chunks: the same bits whatever the workspace, the length of a row or of the set."""

from __future__ import annotations

from collections.abc import Callable

import helpers
import pytest
import torch
from torch import Tensor

from stf_kernels import (
    References,
    TargetStats,
    arithmetic,
    nearest,
    pipeline,
    stable_target,
    stable_target_with_stats,
    validate,
)
from stf_kernels.arguments import check_samples
from stf_kernels.pipeline import Plan

MB = 1 << 20


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """What `pipeline.plan` returned, call by call."""
    made: list[Plan] = []
    plan = pipeline.plan

    def noting(*arguments: object) -> Plan:
        made.append(plan(*arguments))
        return made[-1]

    monkeypatch.setattr(pipeline, "plan", noting)
    return made


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Callable[[Plan], None]:
    """Makes every call be cut in one way."""
    return lambda plan: monkeypatch.setattr(pipeline, "plan", lambda *_: plan)


def problem(n: int = 700, size: int = 6) -> tuple[Tensor, References, Tensor]:
    u = helpers.photograph_patches(n - 40, size)
    u = torch.cat([u, helpers.near_duplicates(u[:20], 2)])
    labels = torch.randint(3, (n,), generator=helpers.generator(1))
    refs = References(u, value_range=(-1, 1), labels=labels)
    sigma = torch.logspace(-2.7, 1.9, 23, dtype=torch.float64)
    x = helpers.noisy(refs.decode(torch.arange(23) * 29 % n).double(), sigma, seed=2)
    return x, refs, sigma


CASES = {
    "plain": {},
    "fast": {"precision": "fast"},
    "student_t": {"noise": "student_t", "D": 64.0, "target": "denoised"},
    "labels": {"labels": torch.arange(23) % 4 - 1},
    "weights": {
        "log_weight": torch.linspace(-3, 2, 700).where(torch.arange(700) > 300, -torch.inf)
    },
}
CUTS = [
    Plan(rows, columns, keep)
    for rows, columns in ((23, 128), (23, 384), (5, 256), (1, 640), (23, 700))
    for keep in (True, False)
]


def assert_equal(left: tuple[Tensor, TargetStats], right: tuple[Tensor, TargetStats]) -> None:
    for name, a, b in zip(
        ("target", *TargetStats._fields), (left[0], *left[1]), (right[0], *right[1]), strict=True
    ):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("case", CASES)
def test_bits_do_not_depend_on_the_cut(case: str, backend: str, cut: Callable[[Plan], None]):
    x, refs, sigma = problem()
    cut(Plan(23, 700, True))
    whole = stable_target_with_stats(x, refs, sigma, backend="torch", **CASES[case])
    for plan in CUTS:
        cut(plan)
        assert_equal(
            stable_target_with_stats(x, refs, sigma, backend=backend, **CASES[case]), whole
        )


@pytest.mark.parametrize("limbs", [1, 2, 3, 4])
def test_floats_in_chunks(limbs: int, backend: str, cut: Callable[[Plan], None]):
    x, refs, sigma = problem()
    floats = References(refs.decode() * 1.37, limbs=limbs)
    cut(Plan(23, 700, True))
    whole = stable_target_with_stats(x, floats, sigma, backend="torch")
    cut(Plan(7, 256, False))
    assert_equal(stable_target_with_stats(x, floats, sigma, backend=backend), whole)


def test_the_workspace_decides_the_cut_and_not_the_bits(backend: str, plans: list[Plan]):
    x, refs, sigma = problem()
    whole = stable_target(x, refs, sigma, backend=backend)
    assert plans[-1] == Plan(23, 700, True)
    with pytest.raises(ValueError, match=r"workspace must be at least [0-9]+ bytes"):
        stable_target(x, refs, sigma, backend=backend, workspace=1)
    least = smallest_workspace(x, refs, sigma, backend)
    for share in (1, 1.05, 1.3, 2, 3):
        workspace = int(least * share)
        assert torch.equal(
            stable_target(x, refs, sigma, backend=backend, workspace=workspace), whole
        )
    stable_target(x, refs, sigma, backend=backend, workspace=least)
    assert plans[-1].rows == 1
    assert plans[-1].columns < 700


def smallest_workspace(x: Tensor, refs: References, sigma: Tensor, backend: str) -> int:
    with pytest.raises(ValueError, match="workspace") as refused:
        stable_target(x, refs, sigma, backend=backend, workspace=1)
    return int(str(refused.value).split("at least ")[1].split()[0])


@pytest.mark.parametrize("workspace", [0, -1, 1.5, "256 MB", True, None, 10**30])
def test_a_workspace_that_is_none(workspace: object):
    x, refs, sigma = problem()
    with pytest.raises(ValueError, match="workspace must be a number of bytes >= 1, got"):
        stable_target(x, refs, sigma, workspace=workspace)


@pytest.mark.parametrize("dim", [131_071, 131_072, 300_000])
def test_rows_longer_than_int32_sums(dim: int, backend: str):
    # Every product at its largest magnitude: one sum in int32 would overflow beyond 131 071.
    u = torch.zeros(3, dim, dtype=torch.uint8)
    u[1], u[2, ::2] = 255, 255
    refs = References(u, value_range=(-1, 1))
    x = torch.full((2, dim), -1.0, dtype=torch.float64)
    x[1] = refs.decode(torch.tensor([2]))[0].double()
    sigma = 0.3 * dim**0.5
    target, stats = stable_target_with_stats(x, refs, sigma, target="denoised", backend=backend)
    y = helpers.byte_values(u)
    logit = -(torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist") ** 2) / (2 * sigma**2)
    expected = torch.softmax(logit, 1) @ y
    torch.testing.assert_close(target, expected, rtol=0, atol=1e-8)
    assert stats.argmax.tolist() == [0, 2]


def test_more_references_than_int32_sums(backend: str):
    # All alike and all in the sum: 140 000 weights of the largest size times bytes of -128 and 127.
    n = 140_000
    u = torch.zeros(n, 2, dtype=torch.uint8)
    u[:, 1] = 255
    u[0, 0] = 255
    refs = References(u, value_range=(0, 255))
    x = torch.tensor([[0.0, 255.0]], dtype=torch.float64)
    target = stable_target(x, refs, 1e6, target="denoised", backend=backend)
    far = torch.tensor(-(255.0**2) / 2e12, dtype=torch.float64).exp().item()
    expected = torch.tensor([[255 * far / (n - 1 + far), 255.0]], dtype=torch.float64)
    torch.testing.assert_close(target, expected, rtol=1e-9, atol=0)


def test_more_references_than_the_sums_hold(monkeypatch: pytest.MonkeyPatch):
    x, refs, sigma = problem()
    monkeypatch.setattr(arithmetic, "MAX_REFERENCES_WITH_STATS", 699)
    stable_target(x, refs, sigma)
    with pytest.raises(ValueError, match="ref must have at most 699 references for statistics"):
        stable_target_with_stats(x, refs, sigma)
    monkeypatch.setattr(arithmetic, "MAX_REFERENCES", 699)
    with pytest.raises(ValueError, match="ref must have at most 699 references, got 700"):
        stable_target(x, refs, sigma)


def test_more_values_than_the_sums_hold():
    most = arithmetic.MAX_VALUES
    largest = 128 * arithmetic.limit(arithmetic.LIMBS["exact"])
    assert largest * most < 2**63 <= largest * (most + (most >> 7))
    check_samples(torch.zeros(1).expand(2, most))
    for shape in [(2, most + 1), (0, 5, 8_000_000)]:
        with pytest.raises(ValueError, match=f"x_t must have at most {most} values a sample, got"):
            check_samples(torch.zeros(1).expand(shape))
    x, refs = torch.zeros(1).expand(1, most + 1), torch.zeros(1, 2)
    for call in (stable_target, validate):
        with pytest.raises(ValueError, match="values a sample"):
            call(x, refs, 1.0)
    with pytest.raises(ValueError, match="values a sample"):
        nearest(x, refs)
