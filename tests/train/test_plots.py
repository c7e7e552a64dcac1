"""The pictures."""

import math

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from stf_train import plots
from stf_train.loop import Step
from stf_train.panel import Bin


def test_grid_places_the_samples_in_rows():
    images = torch.full((5, 1, 8, 8), -1.0)
    images[[0, 4]] = 1.0
    page = plots.grid(images, gap=2)
    cell = 8 * (8 + 2)  # 64 pixels for the sample
    assert page.shape == (2 * cell, 3 * cell, 3)
    assert (page == page[:, :, :1]).all()
    page = page[:, :, 0]
    centres = page[cell // 2 :: cell, cell // 2 :: cell]
    assert centres.tolist() == [[0, 255, 255], [255, 0, 255]]  # ink is dark
    edges = np.concatenate([page[::cell].ravel(), page[:, ::cell].ravel()])
    assert (edges > 250).all()  # paper between the samples


def test_grid_clips():
    loud = torch.randn(4, 1, 8, 8).sign() * torch.tensor([1.0, 5.0]).repeat(2).reshape(4, 1, 1, 1)
    page = plots.grid(loud)
    assert np.array_equal(page, plots.grid(loud.clamp(-1, 1)))


def test_grid_of_colours_is_light():
    images = torch.full((1, 3, 64, 64), -1.0)
    images[:, 1] = 0.5
    page = plots.grid(images, ink=False, gap=0)
    assert page.shape == (64, 64, 3)
    assert (page == np.array([0, 191, 0])).all()
    assert (plots.grid(images, ink=True, gap=0) == np.array([255, 64, 255])).all()


def test_samples_png_is_the_grid(bank, tmp_path):
    images = bank.decode(torch.arange(9))
    plots.save_samples(tmp_path / "s.png", images)
    picture = imread(tmp_path / "s.png")
    assert np.array_equal((picture[:, :, :3] * 255).round(), plots.grid(images))


def test_smooth_is_a_running_mean():
    values = np.random.default_rng(0).normal(size=50)
    for width in (1, 7, 8, 80):
        reach = width // 2
        expected = [values[max(0, i - reach) : i + reach + 1].mean() for i in range(50)]
        np.testing.assert_allclose(plots.smooth(values, width), expected, atol=1e-13)


def test_loss_png_shows_the_loss(tmp_path):
    def picture(losses):
        steps = [Step(i + 1, 16 * (i + 1), v, 1.0, 1e-3) for i, v in enumerate(losses)]
        plots.save_loss(tmp_path / "l.png", steps, "a title")
        return imread(tmp_path / "l.png")

    flat, falling = picture([1.0] * 40), picture([2.0 / (i + 1) for i in range(40)])
    assert flat.shape == falling.shape
    assert (flat != falling).mean() > 0.001


@pytest.mark.parametrize("loss", [math.nan, 0.0])
def test_a_run_that_learnt_nothing_has_pictures(tmp_path, loss):
    """Losses that are not finite, or data without variance: nothing to see, and no error."""
    plots.save_loss(tmp_path / "loss.png", [Step(i, i, loss, 1.0, 1.0) for i in (1, 2)], "x")
    nothing = [Bin(o, 4, loss, loss, 1.0, 0.0) for o in (-2, 3)]
    plots.save_variance(tmp_path / "variance.png", nothing, "x")
    plots.save_variance(tmp_path / "none.png", [], "x")
    assert len(list(tmp_path.iterdir())) == 3
