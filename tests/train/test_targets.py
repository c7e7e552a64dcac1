"""The two targets, against each other, the oracle and their limits."""

import itertools
import math

import pytest
import torch

import stf_kernels
from stf_kernels import References, oracle
from stf_train import data, targets
from stf_train.process import GAUSSIAN, StudentT
from stf_train.targets import DenoisingTarget, Origin, StableTarget


def tolerance(n: int) -> float:
    """One rounding of a result of magnitude 1 to float32, and the logits' own rounding.

    A logit of -h bits is rounded by h 2^-24; the mean of h under the weights is their entropy, at
    most log2(n) bits. Values differ by at most 2.
    """
    return 2**-24 * (2 + 2 * math.log2(max(n, 2)))


def noisy(bank, B, generator, sigma=None):
    """An order, its first B entries, these with noise, and how that was made."""
    order = data.draw(len(bank), generator)
    y = bank.decode(order[:B])
    if sigma is None:
        sigma = torch.logspace(-2, 1.5, B).reshape(B, 1, 1, 1)
    origin = Origin(order[:B], torch.ones_like(sigma), sigma)
    return order, y, y + sigma * torch.randn(y.shape, generator=generator), origin


def test_denoising_target_is_the_source(bank, generator):
    order, y, x_t, origin = noisy(bank, 8, generator)
    assert torch.equal(DenoisingTarget(bank)(x_t, origin, order), y)


@pytest.mark.parametrize("n", [32, 100, 1797])
def test_stable_target_is_the_posterior_mean_of_its_references(bank, generator, n):
    order, _, x_t, origin = noisy(bank, 32, generator)
    got = StableTarget(bank, n)(x_t, origin, order)
    expected = oracle.denoised(x_t, bank.decode(order[:n]), origin.sigma.flatten())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=tolerance(n))


def test_one_sample_and_one_reference_is_denoising_score_matching(bank, generator):
    order, y, x_t, origin = noisy(bank, 1, generator, torch.full((1, 1, 1, 1), 3.0))
    stable, denoising = StableTarget(bank, 1), DenoisingTarget(bank)
    assert not torch.equal(x_t, y)
    assert torch.equal(stable(x_t, origin, order), denoising(x_t, origin, order))


def test_little_noise_gives_the_source(bank, generator):
    order, y, x_t, origin = noisy(bank, 64, generator, torch.full((64, 1, 1, 1), 1e-2))
    assert torch.equal(StableTarget(bank, 1797)(x_t, origin, order), y)


def test_much_noise_gives_the_mean_of_the_references(bank, generator):
    order, _, x_t, origin = noisy(bank, 64, generator, torch.full((64, 1, 1, 1), 1e6))
    mean = bank.decode(order[:500]).double().mean(0)
    got = StableTarget(bank, 500)(x_t, origin, order).double()
    # Logits differ by ||x|| ||y_k - y_l|| / sigma^2 < 8 * 10 / 1e6 here.
    torch.testing.assert_close(got, mean.expand_as(got), rtol=0, atol=2e-4)


def test_options_reach_the_kernel(bank, generator, monkeypatch):
    calls = []

    def spy(x_t, ref, sigma, **options):
        calls.append((len(ref), sigma, options))
        return torch.zeros_like(x_t)

    monkeypatch.setattr(targets, "stable_target", spy)
    order, _, x_t, plain = noisy(bank, 4, generator)
    labels = torch.tensor([1, 2, -1, 3])
    rich = Origin(order[:4], plain.sigma / 2, plain.sigma, StudentT(8), labels)
    StableTarget(bank, 50, precision="fast", backend="torch")(x_t, rich, order)
    StableTarget(bank, 50, same_class=False)(x_t, rich, order)
    StableTarget(bank, 1797)(x_t, plain, order)
    default = {"target": "denoised", "precision": "exact", "backend": "auto"}
    gaussian = {"noise": "gaussian", "D": None, "labels": None, "alpha": plain.alpha}
    student = {"noise": "student_t", "D": 8, "labels": labels, "alpha": rich.alpha}
    assert [options for _, _, options in calls] == [
        default | student | {"precision": "fast", "backend": "torch"},
        default | student | {"labels": None},
        default | gaussian,
    ]
    assert [n for n, _, _ in calls] == [50, 50, 1797]
    assert all(sigma is plain.sigma for _, sigma, _ in calls)


def test_repeated_sources_count_once(bank, generator):
    """Several noisy samples of a source, as the sequence-aware loss has them."""
    order, y, _, _ = noisy(bank, 8, generator)
    y, sources = y.repeat(3, 1, 1, 1), order[:8].repeat(3)
    sigma = torch.logspace(-2, 1, 24).reshape(24, 1, 1, 1)
    x_t = y + sigma * torch.randn(y.shape, generator=generator)
    origin = Origin(sources, torch.ones_like(sigma), sigma)
    got = StableTarget(bank, 8)(x_t, origin, order)
    expected = oracle.denoised(x_t, bank.decode(order[:8]), sigma.flatten())
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=tolerance(8))
    assert torch.equal(DenoisingTarget(bank)(x_t, origin, order), y)


POINTS = torch.tensor([[-1.0], [-0.6], [0.1], [0.3], [1.0]])
CLASSES = torch.tensor([0, 1, 0, 1, 0])


def kernel(noise, x_t, y, alpha, sigma):
    """p(x_t | y) in one dimension, up to a factor, [G, n]."""
    square = ((x_t - alpha * y.T) / sigma) ** 2
    if noise.D is None:
        return (-square / 2).exp()
    return (1 + square / noise.D) ** (-(1 + noise.D) / 2)


def expectation(n, told, noise=GAUSSIAN, alpha=1.0, same_class=True, without_source=False):
    """E[stable target | x_t] and E[y | x_t] on a grid of x_t, by going through all draws.

    A draw is a source and a set of references with it; all are equally likely. `told` is the
    class that network and target are told of, which the source then has; -1 for none.
    """
    bank = References(POINTS, labels=CLASSES)
    x_t = torch.linspace(-2, 2, 21)[:, None]
    sigma, scale = torch.full((21, 1), 0.5), torch.full((21, 1), alpha)
    labels = torch.full((21,), told)
    stable = StableTarget(bank, n - without_source, backend="torch", same_class=same_class)
    density = kernel(noise, x_t, POINTS, alpha, sigma).double()
    of_class = [k for k in range(5) if told in (-1, CLASSES[k])]
    mass, total = 0.0, 0.0
    for source in of_class:
        others = [k for k in range(5) if k != source]
        for rest in itertools.combinations(others, n - 1):
            order = torch.tensor(rest if without_source else [source, *rest])
            origin = Origin(torch.full((21,), source), scale, sigma, noise, labels)
            p = density[:, source, None]
            mass, total = mass + p, total + p * stable(x_t, origin, order).double()
    p = density[:, of_class]
    return total / mass, p @ POINTS[of_class].double() / p.sum(1, keepdim=True)


# Densities and targets are rounded to float32, with values and weights of at most 1.
ROUNDING = 1e-6


@pytest.mark.parametrize("noise", [GAUSSIAN, StudentT(3.0)], ids=["gaussian", "student_t"])
@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("told", [-1, 0, 1])
@pytest.mark.parametrize("alpha", [1.0, 0.4])
def test_unbiased_at_every_n(n, told, noise, alpha):
    """Without a class, with one, with Student-t noise, with the signal scaled."""
    got, exact = expectation(n, told, noise, alpha)
    torch.testing.assert_close(got, exact, rtol=0, atol=ROUNDING)


def test_references_of_other_classes_bias_the_target_of_a_class():
    got, exact = expectation(3, told=1, same_class=False)
    assert (got - exact).abs().max() > 0.1


def test_leaving_the_source_out_biases_the_target():
    got, exact = expectation(3, told=-1, without_source=True)
    assert (got - exact).abs().max() > 0.1


def test_the_wrong_noise_biases_the_target():
    heavy, _ = expectation(5, told=-1, noise=StudentT(3.0))
    light, _ = expectation(5, told=-1, noise=GAUSSIAN)
    assert (heavy - light).abs().max() > 0.01


@pytest.mark.parametrize("n", [0, -1, 1798])
def test_n_must_fit_the_data(bank, n):
    with pytest.raises(ValueError, match=rf"n must lie in 1\.\.1797, .* got {n}"):
        StableTarget(bank, n)


def test_n_must_hold_the_minibatch(bank, generator):
    order, _, x_t, origin = noisy(bank, 8, generator)
    with pytest.raises(ValueError, match="n must be at least the minibatch of 8, got 7"):
        StableTarget(bank, 7)(x_t, origin, order)


def test_the_kernel_is_the_public_one():
    assert targets.stable_target is stf_kernels.stable_target
