"""The pictures of a run folder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.image import imsave
from torch import Tensor
from torch.nn.functional import interpolate, pad

from stf_train.loop import Step
from stf_train.panel import Bin


def grid(images: Tensor, *, ink: bool = True, gap: int = 2) -> np.ndarray:
    """Samples side by side, small ones enlarged smoothly.

    Args:
        images: [m, C, H, W] in [-1, 1], what lies outside is clipped; one channel is grey, of more
            the first three are colours.
        ink: whether the values are ink on white paper, or light.
        gap: empty pixels of the sample around each sample.

    Returns:
        ceil(sqrt(m)) samples in a row, [height, width, 3] uint8.
    """
    clipped = images[:, :3].double().cpu().clamp(-1, 1)
    light = -clipped if ink else clipped
    paper = pad(light, [gap // 2] * 4, value=1)
    zoom = max(1, 64 // images.shape[-1])
    tiles = interpolate(paper, scale_factor=zoom, mode="bicubic") if zoom > 1 else paper
    m, _, height, width = tiles.shape
    columns = math.ceil(math.sqrt(m))
    rows = math.ceil(m / columns)
    page = torch.ones(rows * columns, 3, height, width, dtype=torch.float64)
    page[:m] = tiles  # grey is all three
    page = page.unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2)
    page = page.reshape(rows * height, columns * width, 3)
    return ((1 + page) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()


def save_samples(path: Path, images: Tensor, *, ink: bool = True) -> np.ndarray:
    """Writes the grid of the samples, [m, C, H, W] in [-1, 1], as a PNG, and returns it."""
    page = grid(images, ink=ink)
    imsave(path, page, format="png")
    return page


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """The mean of the values up to `width` // 2 places away, of fewer at both ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    starts = np.maximum(places - width // 2, 0)
    ends = np.minimum(places + width // 2 + 1, len(values))
    return (sums[ends] - sums[starts]) / (ends - starts)


def scale(values: np.ndarray) -> str:
    """Of an axis for values above 0; matplotlib has no logarithmic one for none."""
    return "log" if (values > 0).any() else "linear"


def save_loss(path: Path, steps: Sequence[Step], title: str) -> None:
    """Writes the loss of every step and its running mean against the images seen, as a PNG."""
    images = np.array([step.images for step in steps])
    loss = np.array([step.loss for step in steps])
    width = max(1, len(steps) // 25)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(images, loss, color="0.8", linewidth=0.8, label="each step")
    axes.plot(images, smooth(loss, width), color="C0", label=f"mean of {width // 2 * 2 + 1} steps")
    axes.set(title=title, xlabel="training images", ylabel="loss", yscale=scale(loss))
    if axes.get_yscale() == "log":
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(which="both", alpha=0.2)
    axes.legend()
    figure.savefig(path, dpi=120)


def save_variance(path: Path, bins: Sequence[Bin], title: str) -> None:
    """Writes the target's variance, and how many references it averages, by noise, as a PNG."""
    sigma = np.array([2.0 ** (one.octave + 0.5) for one in bins])
    V_DSM = np.array([one.V_DSM for one in bins])
    V_STF = V_DSM - np.array([one.removed for one in bins])
    figure = Figure(figsize=(7, 7), layout="constrained")
    top, bottom = figure.subplots(2, sharex=True)
    top.plot(sigma, np.where(V_DSM > 0, V_DSM, np.nan), "o-", label="denoising score matching")
    # An estimate of what is nearly nothing may fall below it.
    top.plot(sigma, np.where(V_STF > 0, V_STF, np.nan), "o-", label="stable target")
    top.set(title=title, ylabel="variance of the score target", yscale=scale(V_DSM))
    top.set(xscale=scale(sigma))
    bottom.plot(sigma, [one.ess for one in bins], "o-", color="C2", label="effective references")
    bottom.plot(
        sigma, np.exp([one.entropy for one in bins]), "o-", color="C3", label="exp(entropy)"
    )
    bottom.set(xlabel="sigma / alpha", ylabel="references", yscale=scale(sigma))
    for axes in (top, bottom):
        axes.grid(which="both", alpha=0.2)
        axes.legend()
    figure.savefig(path, dpi=120)
