"""The two targets, against each other, the oracle and their limits."""

import math

import pytest
import torch

import stf_kernels
from stf_kernels import References, oracle
from stf_train import data, targets
from stf_train.targets import DenoisingTarget, StableTarget


def tolerance(n: int) -> float:
    """One rounding of a result of magnitude 1 to float32, and the logits' own rounding.

    A logit of -h bits is rounded by h 2^-24; the mean of h under the weights is their entropy, at
    most log2(n) bits. Values differ by at most 2.
    """
    return 2**-24 * (2 + 2 * math.log2(max(n, 2)))


def noisy(bank, B, generator, sigma=None):
    order = data.draw(len(bank), generator)
    y = bank.decode(order[:B])
    if sigma is None:
        sigma = torch.logspace(-2, 1.5, B).reshape(B, 1, 1, 1)
    return order, y, y + sigma * torch.randn(y.shape, generator=generator), sigma


def test_denoising_target_is_the_source(bank, generator):
    order, y, x_t, sigma = noisy(bank, 8, generator)
    assert torch.equal(DenoisingTarget(bank)(x_t, sigma, order), y)


@pytest.mark.parametrize("n", [32, 100, 1797])
def test_stable_target_is_the_posterior_mean_of_its_references(bank, generator, n):
    order, _, x_t, sigma = noisy(bank, 32, generator)
    got = StableTarget(bank, n)(x_t, sigma, order)
    expected = oracle.denoised(x_t, bank.decode(order[:n]), sigma.flatten())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=tolerance(n))


def test_one_sample_and_one_reference_is_denoising_score_matching(bank, generator):
    order, y, x_t, _ = noisy(bank, 1, generator, torch.full((1, 1, 1, 1), 3.0))
    sigma = torch.full((1, 1, 1, 1), 3.0)
    stable, denoising = StableTarget(bank, 1), DenoisingTarget(bank)
    assert not torch.equal(x_t, y)
    assert torch.equal(stable(x_t, sigma, order), denoising(x_t, sigma, order))


def test_little_noise_gives_the_source(bank, generator):
    order, y, x_t, sigma = noisy(bank, 64, generator, torch.full((64, 1, 1, 1), 1e-2))
    assert torch.equal(StableTarget(bank, 1797)(x_t, sigma, order), y)


def test_much_noise_gives_the_mean_of_the_references(bank, generator):
    order, _, x_t, sigma = noisy(bank, 64, generator, torch.full((64, 1, 1, 1), 1e6))
    mean = bank.decode(order[:500]).double().mean(0)
    got = StableTarget(bank, 500)(x_t, sigma, order).double()
    # Logits differ by ||x|| ||y_k - y_l|| / sigma^2 < 8 * 10 / 1e6 here.
    torch.testing.assert_close(got, mean.expand_as(got), rtol=0, atol=2e-4)


def test_options_reach_the_kernel(bank, generator, monkeypatch):
    calls = []

    def spy(x_t, ref, sigma, *, target, precision, backend):
        calls.append((target, precision, backend, len(ref)))
        return torch.zeros_like(x_t)

    monkeypatch.setattr(targets, "stable_target", spy)
    order, _, x_t, sigma = noisy(bank, 4, generator)
    StableTarget(bank, 50, precision="fast", backend="torch")(x_t, sigma, order)
    StableTarget(bank, 1797)(x_t, sigma, order)
    assert calls == [("denoised", "fast", "torch", 50), ("denoised", "exact", "auto", 1797)]


@pytest.mark.parametrize("without_source", [False, True])
def test_stable_target_is_unbiased_because_it_knows_the_source(without_source):
    """E[(T_stf - T_dsm) x_t] = 0: no function of x_t tells the two targets apart.

    Leaving the sources out makes the same statistic large, so the test would notice.
    """
    points = torch.tensor([[-1.0], [-0.6], [0.1], [0.3], [1.0]])
    bank = References(points)
    generator = torch.Generator().manual_seed(0)
    stable, denoising = StableTarget(bank, 3), DenoisingTarget(bank)
    sigma = torch.full((2, 1), 0.5)
    differences = []
    for _ in range(1500):
        order = data.draw(5, generator)
        x_t = bank.decode(order[:2]) + sigma * torch.randn(2, 1, generator=generator)
        seen = order[2:] if without_source else order
        difference = stable(x_t, sigma, seen) - denoising(x_t, sigma, order)
        differences.append((difference * x_t).mean())
    values = torch.stack(differences).double()
    z = values.mean() / (values.std() / math.sqrt(len(values)))
    assert abs(z) > 10 if without_source else abs(z) < 4


@pytest.mark.parametrize("n", [0, -1, 1798])
def test_n_must_fit_the_data(bank, n):
    with pytest.raises(ValueError, match=rf"n must lie in 1\.\.1797, .* got {n}"):
        StableTarget(bank, n)


def test_n_must_hold_the_minibatch(bank, generator):
    order, _, x_t, sigma = noisy(bank, 8, generator)
    with pytest.raises(ValueError, match="n must be at least the minibatch of 8, got 7"):
        StableTarget(bank, 7)(x_t, sigma, order)


def test_the_kernel_is_the_public_one():
    assert targets.stable_target is stf_kernels.stable_target
