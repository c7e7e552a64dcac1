"""The two real data sets that ship with scikit-learn: digits, and patches of photographs."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor

from stf_kernels import References
from stf_train.data.source import Source, in_memory

SHIPPED = ("digits", "patches")
TOTAL = 1797  # digits
SHAPE = (1, 8, 8)  # of one digit
LEVELS = 17  # a pixel is a count 0..16 and stands for -1..1: multiples of 1/8, exact in any float

PATCH = 16  # pixels


def digits(device: torch.device | str = "cpu") -> References:
    """The handwritten digits inside scikit-learn, [1797, 1, 8, 8] in [-1, 1], with their classes.

    Args:
        device: where the bytes live.

    Returns:
        References of sample shape [1, 8, 8]; `labels` holds the classes 0..9, [1797] int64.

    Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998; the
    test part, as shipped inside scikit-learn.
    """
    data, labels = digit_levels()
    return References(data, value_range=(-1, 1), levels=LEVELS, labels=labels).to(device)


def digit_levels() -> tuple[Tensor, Tensor]:
    """Counts 0..16 of ink, [1797, 1, 8, 8] uint8, and classes, [1797] int64."""
    images, labels = load_digits(return_X_y=True)
    data = torch.from_numpy(images).to(torch.uint8).reshape(TOTAL, *SHAPE)
    return data, torch.from_numpy(labels)


def digits_source() -> Source:
    """The digits as a source."""
    return in_memory("digits", *digit_levels(), levels=LEVELS)


def patches_source(size: int = PATCH) -> Source:
    """Square patches of scikit-learn's two photographs, 427x640 pixels each, half overlapping.

    The class of a patch is its photograph: 0 a Chinese temple, 1 a flower. Patches of one
    photograph share half their pixels with each neighbour and much of their texture: no large
    set, but a real one of colour images, of 16x16 pixels 8216 of them.

    Args:
        size: height and width of a patch, even, 4..426 pixels.

    Raises:
        ValueError: size is odd or outside.
    """
    photographs = torch.stack([torch.tensor(image) for image in load_sample_images().images])
    height = photographs.shape[1]
    if not 4 <= size <= height or size % 2:
        raise ValueError(f"size of a patch must be even and lie in 4..{height}, got {size}")
    stride = size // 2
    windows = photographs.unfold(1, size, stride).unfold(2, size, stride)  # [2, h, w, 3, s, s]
    samples = windows.flatten(0, 2).contiguous()
    labels = torch.arange(2).repeat_interleave(len(samples) // 2)
    return in_memory(f"patches {size}x{size}", samples, labels)
