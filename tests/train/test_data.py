"""The data set and the draw from it."""

import numpy as np
import torch
from sklearn.datasets import load_digits

from stf_train import data


def test_digits_are_the_real_ones(bank):
    images = load_digits().images
    values = bank.decode()
    assert values.shape == (1797, 1, 8, 8)
    assert np.array_equal((values[:, 0].numpy() + 1) * 8, images)  # 0..16, without any rounding
    assert bank.decode().min() == -1
    assert bank.decode().max() == 1


def test_digits_take_one_byte_per_pixel(bank):
    assert bank.limbs == 1


def test_classes_are_kept(bank):
    assert np.array_equal(bank.labels.numpy(), load_digits().target)


def test_sigma_data_makes_the_data_of_mean_square_one(bank):
    scaled = bank.decode().double() / data.sigma_data(bank)
    assert abs(scaled.square().mean() - 1) < 1e-12


def test_draw_is_a_permutation(generator):
    order = data.draw(1797, generator)
    assert torch.equal(order.sort().values, torch.arange(1797))


def test_draw_is_uniform(generator):
    """Every entry comes first as often as the others: chi^2 with 9 degrees of freedom."""
    draws = 5000
    first = torch.tensor([data.draw(10, generator)[0] for _ in range(draws)])
    counts = torch.bincount(first, minlength=10).double()
    chi2 = ((counts - draws / 10) ** 2 / (draws / 10)).sum()
    assert 0.5 < chi2 < 33.7  # both tails at about 1e-4


def test_draw_follows_the_generator_alone():
    torch.manual_seed(0)
    first = data.draw(100, torch.Generator().manual_seed(3))
    torch.manual_seed(1)
    second = data.draw(100, torch.Generator().manual_seed(3))
    assert torch.equal(first, second)
    assert not torch.equal(first, data.draw(100, torch.Generator().manual_seed(4)))
