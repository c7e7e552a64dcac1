"""Mistakes seen in public code for the same mathematics; none of them may be made here."""

from __future__ import annotations

from pathlib import Path

import helpers
import pytest
import torch
from helpers import HALF_ULP32, assert_rows_within, byte_values, denoised_bound, row_norm
from torch import Tensor

from stf_kernels import References, oracle, stable_target, stable_target_with_stats

PEAK_MEMORY = Path("/proc/self/clear_refs")
needs_peak_memory = pytest.mark.skipif(
    not PEAK_MEMORY.exists(), reason="the largest memory of a process is read as Linux offers it"
)


def peak_memory() -> int:
    """The most memory this process held since PEAK_MEMORY was written to, bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def gram_logits(x: Tensor, y: Tensor, sigma: float) -> Tensor:
    """The usual float32 form, ||x||^2 - 2 x.y + ||y||^2 in one matrix product."""
    x, y = x.flatten(1), y.flatten(1)
    return -((x**2).sum(1)[:, None] - 2 * x @ y.T + (y**2).sum(1)) / (2 * sigma**2)


def check_denoised(
    x: Tensor, data: Tensor, sigma: float | Tensor, alpha: float | Tensor = 1.0, **options: str
) -> Tensor:
    """D of bytes in [-1, 1], after comparing it with the oracle."""
    y = byte_values(data)
    refs = References(data, value_range=(-1, 1))
    d = stable_target(x, refs, sigma, alpha=alpha, target="denoised", **options)
    expected = oracle.denoised(x, y, sigma, alpha=alpha)
    bound = denoised_bound(x, y, sigma, alpha, precision=options["precision"])
    assert_rows_within(d, expected, bound + HALF_ULP32 * row_norm(expected))
    return d


@pytest.mark.parametrize("n", [4, 8, 15, 16, 17])
def test_no_number_of_references_is_special(n, precision, backend):
    """A fixed n = 2 B repeated the minibatch silently, any other n raised."""
    data = helpers.random_bytes(n, 3, 4, 4)
    x = helpers.noisy(byte_values(data).repeat(2, 1, 1, 1)[:8], 2.0)
    d = check_denoised(x, data, 2.0, precision=precision, backend=backend)
    assert len(d.unique(dim=0)) == len(x)


def test_one_sample_is_averaged_like_any_other(precision, backend):
    """A batch of one became denoising score matching, its [1] sigma a number."""
    data = helpers.random_bytes(12, 3, 4, 4)
    y = byte_values(data)
    x = helpers.noisy(y[:1], 5.0)
    d = check_denoised(x, data, torch.tensor([5.0]), precision=precision, backend=backend)
    assert row_norm(d - y[:1]) > 1  # the source's own, which it must not be


def test_scaled_samples_are_averaged(precision, backend):
    """Variance-preserving noise crashed or fell back to the single-sample target."""
    data = helpers.random_bytes(12, 3, 4, 4)
    y = byte_values(data)
    alpha = torch.tensor([0.9, 0.5, 0.1]).double()
    sigma = (1 - alpha**2).sqrt()
    x = helpers.noisy(y[:3], sigma, alpha)
    d = check_denoised(x, data, sigma, alpha, precision=precision, backend=backend)
    assert row_norm(d - y[:3])[2] > 1


def test_samples_can_be_of_other_classes_than_most_references(precision, backend):
    """Labels were ignored: the posterior went over images of every class."""
    data = helpers.random_bytes(50, 3, 4, 4)
    labels = torch.zeros(50, dtype=torch.int64)
    labels[[7, 30]] = 1
    x = torch.randn(3, 3, 4, 4, generator=helpers.generator(1))
    y = byte_values(data)[[7, 30]]
    refs = References(data, value_range=(-1, 1), labels=labels)
    d = stable_target(
        x.double(),
        refs,
        5.0,
        target="denoised",
        labels=torch.ones(3, dtype=torch.int64),
        precision=precision,
        backend=backend,
    )
    expected = oracle.denoised(x.double(), y, 5.0)
    assert_rows_within(d, expected, denoised_bound(x, y, 5.0, precision=precision))


def test_an_unlabelled_row_sees_more_than_a_bank_of_256(precision, backend):
    """The only reference near the sample is the last of 1000."""
    data = torch.full((1000, 3, 4, 4), 255, dtype=torch.uint8)
    data[999] = 0
    refs = References(data, value_range=(-1, 1), labels=torch.zeros(1000, dtype=torch.int64))
    d = stable_target(
        torch.full((1, 3, 4, 4), -1.0),
        refs,
        0.1,
        target="denoised",
        labels=torch.tensor([-1]),
        precision=precision,
        backend=backend,
    )
    assert torch.equal(d, torch.full_like(d, -1.0))


def test_logits_may_be_as_low_as_they_are(precision, backend):
    """A clamp at -10^4 turned weights uniform above 2 * 10^4 values a sample."""
    data = helpers.random_bytes(6, 3, 96, 96)
    y = byte_values(data)
    x = helpers.noisy(torch.cat([y[:2], -y[:2]]), 0.5)  # near a reference, and far from all
    logit, w = oracle.posterior(x, y, 0.5)
    assert logit.max() < -1e4  # all of them
    assert w.max(1).values.min() > 0.999
    check_denoised(x, data, 0.5, precision=precision, backend=backend)


@pytest.mark.parametrize("byte", [0, 255])
def test_sums_of_many_large_products_do_not_overflow(byte, precision, backend):
    """150 000 products of a byte's -128 or 127 with a sample's digits of 127 leave int32."""
    data = torch.full((3, 150_000), byte, dtype=torch.uint8)
    data[1, ::2] = 7
    data[2, ::3] = 90
    x = torch.full((2, 150_000), 127 / 128 + 127 / 128 / 256)  # 127 in its leading digits
    x[1, ::5] = 0.3
    check_denoised(x, data, 150.0, precision=precision, backend=backend)


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_samples_of_very_few_values(dim, precision, backend):
    """Matrix products of one or two terms take their own path in some libraries."""
    data = helpers.random_bytes(40, dim)
    x = torch.randn(5, dim, generator=helpers.generator(1))
    check_denoised(x, data, 0.5, precision=precision, backend=backend)


def test_every_row_has_its_own_maximum(precision, backend):
    """One maximum for the batch made rows of small sigma 0 / 0 at 3072 values a sample."""
    data = helpers.random_bytes(16, 3, 32, 32)
    sigma = torch.logspace(-2.7, 1.9, 16).double()
    x = helpers.noisy(byte_values(helpers.random_bytes(16, 3, 32, 32, seed=1)), sigma)
    logit, _ = oracle.posterior(x, byte_values(data), sigma)
    shared = (logit - logit.max()).exp().sum(1)
    assert bool((shared == 0).any())  # the trap is set
    check_denoised(x, data, sigma, precision=precision, backend=backend)


@pytest.mark.parametrize("n", [127, 128, 129, 255, 257, 641])
def test_a_short_last_block_has_its_own_weight(n, precision, backend):
    """Means of chunk means over-weighted a last chunk that was not full."""
    data = helpers.random_bytes(n, 3, 4, 4)
    data[128:] = 255 - data[128:] // 16
    x = torch.randn(3, 3, 4, 4, generator=helpers.generator(1))
    check_denoised(x, data, 30.0, precision=precision, backend=backend)


@pytest.mark.parametrize("n", [200_000, 130_945])
def test_very_many_equal_weights_do_not_vanish(n, precision, backend):
    """Weights truncated before they were normalised summed to zero. 130 945 is 128 * 1023 + 1."""
    data = helpers.random_bytes(n, 4)
    data[:, 0] = 0  # the largest sums there are: n times -128 times the weight
    y = byte_values(data)
    x = helpers.noisy(y[:3], 80.0)
    d = check_denoised(x, data, 80.0, precision=precision, backend=backend)
    assert float((d - y.mean(0)).norm(dim=1).max()) < 0.2  # sanity of the expectation itself


@pytest.mark.parametrize("sigma", [0.002, 0.02])
def test_distances_do_not_cancel(sigma, precision, backend):
    """||x||^2 - 2 x.y + ||y||^2 in float32 is wrong by nats where sigma is small."""
    patches = helpers.photograph_patches(8)
    data = torch.cat([patches, helpers.near_duplicates(patches[:2], 16)])
    y = byte_values(data)
    x = helpers.noisy(y[8:16], sigma)
    _, w = oracle.posterior(x, y, sigma)
    gram = torch.softmax(gram_logits(x, y.float(), sigma).double(), 1)
    naive = row_norm((gram - w) @ y.flatten(1)).max()
    d = check_denoised(x.double(), data, sigma, precision=precision, backend=backend)
    error = row_norm(d - oracle.denoised(x, y, sigma)).max()
    assert error < naive / 1000, f"off by {error:.1e}, the Gram form by {naive:.1e}"


@needs_peak_memory
def test_a_batch_of_distances_is_never_materialised(backend):
    """The largest memory of the process grows by less than one float32 tensor [B, n, d]."""
    rows, n, dim = 128, 1024, 3072
    refs = References(torch.zeros(n, dim, dtype=torch.uint8), value_range=(-1, 1))
    x = torch.zeros(rows, dim)
    PEAK_MEMORY.write_text("5")  # start from the present
    before = peak_memory()
    stable_target(x, refs, 1.0, backend=backend)
    assert peak_memory() - before < 4 * rows * n * dim


@needs_peak_memory
def test_the_peak_of_memory_sees_a_quarter_of_such_a_batch():
    PEAK_MEMORY.write_text("5")
    before = peak_memory()
    torch.zeros(128, 1024, 768).add_(1.0)  # written, or it takes no memory
    assert peak_memory() - before > 3 * 128 * 1024 * 768  # the kernel counts in lots


def test_a_vanishing_weight_is_counted_as_lost(precision, backend):
    """Weights below 2^-32 (2^-24) of the largest go, and the statistics say how much that was."""
    below = {"exact": 40, "fast": 30}[precision]
    data = torch.zeros(1001, 4, dtype=torch.uint8)
    prior = torch.full((1001,), -below).double() * torch.tensor(2.0).double().log()
    prior[500] = 0.0
    _, stats = stable_target_with_stats(
        torch.zeros(1, 4),
        References(data, value_range=(-1, 1)),
        1.0,
        log_weight=prior,
        precision=precision,
        backend=backend,
    )
    expected = 1000 * 2.0**-below
    # The polynomial, and the float32 logit: relative to the logit itself.
    relative = helpers.EXP2_ERROR + 2 * HALF_ULP32 * below
    assert float(stats.lost_mass) == pytest.approx(expected / (1 + expected), rel=relative)
    assert float(stats.lse) == pytest.approx(
        float(torch.logsumexp(prior, 0)) - 4 / 2, abs=relative * expected + 1e-14
    )
