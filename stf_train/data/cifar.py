"""CIFAR-10 as its authors ship it for Python: pickled batches, read without trusting them."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from stf_train.data.files import Files, base
from stf_train.data.source import Source, in_memory

SHAPE = (3, 32, 32)
CLASSES = 10
SPLITS = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}


def recognised(files: Files) -> bool:
    """Whether these are the batches, by their names."""
    batches = {batch for names in SPLITS.values() for batch in names}
    return any(base(name) in batches for name in files.names)


def source(files: Files, split: str | None = None) -> Source:
    """CIFAR-10, [n, 3, 32, 32] with classes 0..9.

    Args:
        files: the folder cifar-10-batches-py, or the archive cifar-10-python.tar.gz.
        split: "train" (the default, 50 000 images) or "test" (10 000).

    Raises:
        ValueError: split is unknown, a batch is missing or is not one.

    Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
    """
    split = "train" if split is None else split
    if split not in SPLITS:
        raise ValueError(f"split must be {' or '.join(SPLITS)}, got {split!r}")
    samples, labels = zip(*batches(files, SPLITS[split]), strict=True)
    return in_memory("CIFAR-10", torch.cat(samples), torch.cat(labels), split)


def batches(files: Files, names: list[str]) -> Iterator[tuple[Tensor, Tensor]]:
    """Images [m, 3, 32, 32] uint8 and classes [m] int64 of each of these batches."""
    places = {base(name): name for name in files.names}
    for name in names:
        if name not in places:
            raise ValueError(f"{files.path} must hold the batches {', '.join(names)}, not {name}")
        yield batch(f"{files.path}/{places[name]}", files.read(places[name]))


def batch(path: str, content: bytes) -> tuple[Tensor, Tensor]:
    """Images [m, 3, 32, 32] uint8 and classes [m] int64 of one batch.

    Raises:
        ValueError: it is none; `path` is named.
    """
    expected = f"{path} must be a batch of CIFAR-10's Python version"
    try:
        # Keys and names were written by Python 2, as bytes.
        found = Reader(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"{expected}: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{expected}, a dictionary, got {type(found).__name__}")
    data, labels = (found.get(key.encode(), found.get(key)) for key in ("data", "labels"))
    if not isinstance(data, Array) or not isinstance(labels, list):
        raise ValueError(f"{expected}, with an array 'data' and a list 'labels'")
    pixels = data.values
    if pixels.shape != (len(labels), 3 * 32 * 32):
        raise ValueError(
            f"{expected}, with data [{len(labels)}, 3072] for its {len(labels)} labels, "
            f"got {list(pixels.shape)}"
        )
    for label in labels:
        if type(label) is not int or not 0 <= label < CLASSES:
            raise ValueError(f"{expected}, with classes 0 to {CLASSES - 1}, got {label!r}")
    return torch.from_numpy(pixels).reshape(-1, *SHAPE), torch.tensor(labels, dtype=torch.int64)


class Array:
    """What a pickled array of bytes becomes."""

    def __init__(self, *_: Any) -> None:
        self.values = np.empty(0, np.uint8)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, raw = state
        if not isinstance(dtype, DType) or dtype.code not in ("u1", b"u1"):
            raise pickle.UnpicklingError("its array must hold bytes")
        order: Literal["F", "C"] = "F" if fortran else "C"
        self.values = np.frombuffer(bytearray(raw), np.uint8).reshape(shape, order=order).copy()


class DType:
    """What a pickled type of array entries becomes."""

    def __init__(self, code: str | bytes, *_: Any) -> None:
        self.code = code

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Byte order and the like mean nothing for bytes."""


def latin1(text: str, _: str) -> bytes:
    """How Python 3 writes bytes in the old protocols."""
    return text.encode("latin1")


class Reader(pickle.Unpickler):
    """Reads nothing but numbers, text, lists, dictionaries and arrays of bytes.

    A pickle is a program: it names functions and calls them. This one may name those below and
    gets inert stand-ins, so a file from anywhere cannot run anything.
    """

    STAND_INS: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy.core.multiarray", "_reconstruct"): Array,
        ("numpy._core.multiarray", "_reconstruct"): Array,
        ("numpy", "ndarray"): Array,
        ("numpy", "dtype"): DType,
        ("_codecs", "encode"): latin1,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.STAND_INS:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which a batch does not need")
        return self.STAND_INS[module, name]
