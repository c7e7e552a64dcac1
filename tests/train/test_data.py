"""The data sets that ship with scikit-learn, the facts about a data set, and the draw from it."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits, load_sample_image

from stf_train import data
from stf_train.data import dataset, source


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


def test_digits_by_name_are_the_same(bank):
    found = data.load("digits")
    assert torch.equal(found.references.decode(), bank.decode())
    assert torch.equal(found.references.labels, bank.labels)
    assert (found.name, found.split, len(found), found.shape) == ("digits", "all", 1797, (1, 8, 8))
    assert (found.classes, found.levels, found.value_range) == (10, 17, (-1, 1))
    assert found.sigma_data == data.sigma_data(bank)


def test_classes_can_be_left_out():
    found = data.load("digits", labels="none")
    assert found.references.labels is None
    assert found.classes == 0


def test_patches_are_cut_from_the_photographs():
    found = data.load("patches", size=32, value_range=(0, 255))
    assert found.shape == (3, 32, 32)
    across, down = (640 - 32) // 16 + 1, (427 - 32) // 16 + 1
    assert len(found) == 2 * across * down
    assert (found.classes, found.split) == (2, "all")
    values = found.references.decode()
    for photograph, name in enumerate(("china.jpg", "flower.jpg")):
        picture = load_sample_image(name)
        for row, column in ((0, 0), (1, 0), (3, 7), (down - 1, across - 1)):
            k = photograph * across * down + row * across + column
            window = picture[16 * row : 16 * row + 32, 16 * column : 16 * column + 32]
            assert np.array_equal(values[k].numpy(), window.transpose(2, 0, 1))
            assert found.references.labels[k] == photograph


def test_patches_are_16_pixels_by_default():
    found = data.load("patches")
    assert (len(found), found.shape) == (8216, (3, 16, 16))


@pytest.mark.parametrize("size", [2, 15, 428])
def test_patches_errors(size):
    with pytest.raises(
        ValueError, match=rf"size of a patch must be even .* in 4\.\.427, got {size}"
    ):
        data.load("patches", size=size)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, "split: digits is one set, 'all', got 'test'"),
        ({"size": 16}, "size: digits has the size it has, got 16"),
        ({"labels": "folders"}, "labels: digits holds no folders of images"),
        ({"labels": "yes"}, "labels must be auto, folders, none, got 'yes'"),
        ({"limbs": 2}, "limbs is for float data, digits holds bytes, got limbs=2"),
        ({"resident": False}, r"digits cannot stay .* \.npy of uint8 .*convert\('digits', "),
    ],
)
def test_what_digits_do_not_have(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.load("digits", **arguments)


def test_no_such_data():
    with pytest.raises(FileNotFoundError, match="'digits', 'patches' or a path, there is no moon"):
        data.load("moon")


def test_unknown_ending(tmp_path):
    path = tmp_path / "data.hdf5"
    path.touch()
    with pytest.raises(ValueError, match=r"data.hdf5 must be a folder or end in .*\.npz"):
        data.load(path)


def test_too_large_for_the_memory(monkeypatch):
    monkeypatch.setattr(source, "physical_memory", lambda: 2 * 1797 * 64 - 1)
    with pytest.raises(MemoryError, match=r"digits takes 0\.0 GB .* resident=False"):
        data.load("digits")
    monkeypatch.setattr(source, "physical_memory", lambda: 2 * 1797 * 64)
    data.load("digits")


def test_sigma_data_makes_the_data_of_mean_square_one(bank):
    scaled = bank.decode().double() / data.sigma_data(bank)
    assert abs(scaled.square().mean() - 1) < 1e-12


def test_sigma_data_sums_parts(bank, monkeypatch):
    whole = data.sigma_data(bank)
    monkeypatch.setattr(dataset, "ELEMENTS", 1000)  # 15 of 1797 samples at a time
    assert data.sigma_data(bank) == whole  # sums of multiples of 1/64, exact in any order


def test_rounding_leaves_the_data_as_they_are():
    for value_range in ((-1, 1), (0, 1)):
        patches = data.load("patches", size=128, value_range=value_range)
        lo, hi = value_range
        values = patches.references.decode()
        got = patches.rounded(values)
        torch.testing.assert_close(got, 2 * (values - lo) / (hi - lo) - 1, rtol=0, atol=3e-7)
        assert torch.equal(
            (got * 127.5 + 127.5).round(), (values - lo).mul(255 / (hi - lo)).round()
        )


def test_moving_keeps_the_facts():
    found = data.load("digits", labels="none")
    moved = found.to("meta")
    assert moved.references.device.type == "meta"
    assert (moved.name, moved.levels, moved.value_range) == ("digits", 17, (-1, 1))
    assert found.references.device.type == "cpu"


def test_rounding_clips_to_the_levels():
    digits = data.load("digits")
    samples = torch.tensor([-7.0, -0.93, -0.95, 0.0, 0.06, 0.07, 1.2])
    assert digits.rounded(samples).tolist() == [-1, -0.875, -1, 0, 0, 0.125, 1]


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
