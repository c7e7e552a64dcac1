"""Noise levels, loss weight and preconditioning, by the properties the paper derives them from."""

import math

import pytest
import torch

from stf_train.process import EDM

SIGMA = torch.logspace(-3, 2, 41, dtype=torch.float64).reshape(-1, 1, 1, 1)
SD = 0.85
edm = EDM(sigma_data=SD)


def effective_target_variance(c_skip: torch.Tensor) -> torch.Tensor:
    """Var of y - c_skip (y + n) for y of variance SD^2 and n of variance SIGMA^2."""
    return (1 - c_skip) ** 2 * SD**2 + c_skip**2 * SIGMA**2


def assert_one(values: torch.Tensor) -> None:
    torch.testing.assert_close(values, torch.ones_like(values), rtol=1e-12, atol=0)


def test_input_has_unit_variance():
    assert_one(edm.c_in(SIGMA) ** 2 * (SIGMA**2 + SD**2))


def test_effective_target_has_unit_variance():
    assert_one(effective_target_variance(edm.c_skip(SIGMA)) / edm.c_out(SIGMA) ** 2)


@pytest.mark.parametrize("shift", [-1e-3, 1e-3])
def test_c_skip_amplifies_errors_least(shift):
    best = effective_target_variance(edm.c_skip(SIGMA))
    assert (effective_target_variance(edm.c_skip(SIGMA) + shift) > best).all()


def test_weighted_loss_is_even_over_noise_levels():
    assert_one(edm.weight(SIGMA) * edm.c_out(SIGMA) ** 2)


def test_c_noise_is_a_quarter_of_the_logarithm():
    torch.testing.assert_close((4 * edm.c_noise(SIGMA)).exp(), SIGMA, rtol=1e-12, atol=0)


def test_noise_levels_are_log_normal(generator):
    edm = EDM(SD, P_mean=-0.7, P_std=1.3)
    z = torch.randn(100_000, generator=generator, dtype=torch.float64)
    log_sigma = edm.sigma(z).log()
    standard_error = 1.3 / math.sqrt(len(z))
    assert abs(log_sigma.mean() + 0.7) < 4 * standard_error
    assert abs(log_sigma.std() - 1.3) < 4 * standard_error


def test_zero_network_is_the_posterior_mean_of_centred_gaussian_data():
    x = torch.randn(len(SIGMA), 1, 8, 8, dtype=torch.float64)
    D = edm.denoise(lambda x, c: torch.zeros_like(x), x, SIGMA)
    precision = 1 / SD**2 + 1 / SIGMA**2
    torch.testing.assert_close(D, x / SIGMA**2 / precision, rtol=1e-12, atol=0)


def test_a_network_that_knows_the_answer_gives_it():
    """Equation 8 of the paper solved for F: D is y whatever the noise."""
    y = torch.randn(len(SIGMA), 1, 8, 8, dtype=torch.float64)
    x = y + SIGMA * torch.randn_like(y)
    norm = (SIGMA**2 + SD**2).sqrt()

    def network(scaled, c_noise):
        assert c_noise.shape == (len(SIGMA),)
        torch.testing.assert_close(scaled * norm, x)
        sigma = (4 * c_noise).exp().reshape(-1, 1, 1, 1)
        return (y - SD**2 / norm**2 * x) * norm / (sigma * SD)

    torch.testing.assert_close(edm.denoise(network, x, SIGMA), y)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sigma_data": 0.0}, "sigma_data must be finite and above 0, got 0.0"),
        ({"sigma_data": math.nan}, "sigma_data must be finite"),
        ({"sigma_data": 1.0, "P_std": -1.0}, "P_std must be finite and above 0, got -1.0"),
        ({"sigma_data": 1.0, "P_mean": math.inf}, "P_mean must be finite, got inf"),
    ],
)
def test_errors(values, message):
    with pytest.raises(ValueError, match=message):
        EDM(**values)
