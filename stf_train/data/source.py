"""What every format gives: a data set before it is in memory."""

from __future__ import annotations

import math
import os
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


def check_memory(name: str, needed: int) -> None:
    """Refuses what is larger than the memory."""
    have = physical_memory()
    if needed > have:
        raise MemoryError(
            f"{name} takes {needed / 2**30:.1f} GB to be read into the memory of "
            f"{have / 2**30:.1f} GB: load a .stf file, or the .npy file of bytes that "
            "stf_train.data.convert makes of it, with resident=False (--cache 0)"
        )


def physical_memory() -> float:
    """Of this machine, bytes; infinite where it cannot be asked for."""
    names = ("SC_PAGE_SIZE", "SC_PHYS_PAGES")
    if not set(names) <= getattr(os, "sysconf_names", {}).keys():
        return float("inf")
    return float(os.sysconf(names[0]) * os.sysconf(names[1]))
