"""What every format gives: a data set before it is in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class Source:
    """Samples that are yet to be read, and what is known of them before."""

    name: str
    split: str  # "train", "test", ..., or "all" where the format knows no splits
    count: int
    shape: tuple[int, ...]  # of one sample, channels first
    labels: Tensor | None  # classes, [count] int64
    chunks: Callable[[], Iterator[Tensor]]  # all samples in order, a few at a time, [m, *shape]
    dtype: torch.dtype = torch.uint8
    levels: int | None = 256  # equidistant values of a byte; None for floats
    in_place: Path | None = None  # a .npy file that holds exactly these bytes

    @property
    def values(self) -> int:
        """Numbers in the whole set."""
        return self.count * math.prod(self.shape)


def chunk_rows(shape: tuple[int, ...], itemsize: int = 1) -> int:
    """How many samples to read at a time."""
    return max(1, CHUNK_BYTES // (itemsize * math.prod(shape)))


def in_memory(
    name: str, samples: Tensor, labels: Tensor | None, split: str = "all", levels: int = 256
) -> Source:
    """The source of bytes that are in memory already, [n, *shape] uint8."""
    shape = tuple(samples.shape[1:])
    return Source(
        name,
        split,
        len(samples),
        shape,
        labels,
        lambda: iter(samples.split(chunk_rows(shape))),
        levels=levels,
    )
