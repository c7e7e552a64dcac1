"""The data set, resident in memory, and the draw of minibatches and references from it."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from stf_kernels import References

TOTAL = 1797  # samples
SHAPE = (1, 8, 8)  # of one sample
LEVELS = 17  # a pixel is a count 0..16 and stands for -1..1: multiples of 1/8, exact in any float


def digits(device: torch.device | str = "cpu") -> References:
    """The handwritten digits inside scikit-learn, [1797, 1, 8, 8] in [-1, 1], with their classes.

    Args:
        device: where the bytes live.

    Returns:
        References of sample shape [1, 8, 8]; `labels` holds the classes 0..9, [1797] int64.

    Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998; the
    test part, as shipped inside scikit-learn.
    """
    images, labels = load_digits(return_X_y=True)
    data = torch.from_numpy(images).to(torch.uint8).reshape(TOTAL, *SHAPE)
    labels = torch.from_numpy(labels)
    return References(data, value_range=(-1, 1), levels=LEVELS, labels=labels).to(device)


def sigma_data(data: References) -> float:
    """sqrt(mean y^2) over all values of the data set.

    The preconditioning assumes centred data, whose deviation this is. For data about another mean,
    like ink on an empty page, the same formulas need the deviation about zero: with it the
    network's input and its target have mean square 1 at every noise level.
    """
    return data.decode().double().square().mean().sqrt().item()


def draw(total: int, generator: torch.Generator) -> Tensor:
    """A uniformly random order of the data set, one per training step.

    Its first B entries are the sources of the minibatch, its first n >= B entries the references.
    So every source is a reference, all references are distinct, and given the *set* of references
    each source is uniform in it. The softmax weight of reference k is then the posterior
    P(source of x_t = k | x_t, set), and by the tower rule the expectation of the stable target is
    that of the denoising target, E[y | x_t], at every n. Without the sources it would be biased.

    Args:
        total: size of the data set.
        generator: the run's generator, on the CPU.

    Returns:
        A permutation of 0..total-1, [total] int64.
    """
    return torch.randperm(total, generator=generator)
