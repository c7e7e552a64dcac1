"""Arrays of samples in .npy, .npz and .safetensors files; images as bytes, or floats as latents."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stf_train.data.source import Source, chunk_rows

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def labels_path(path: Path) -> Path:
    """Where the classes of the samples in a .npy file are kept: NAME.labels.npy."""
    return path.with_name(f"{path.stem}.labels.npy")


def new(path: str | Path) -> Path:
    """The path of a .npy file to be made.

    Raises:
        ValueError: it does not end so.
        FileExistsError: there is one.
    """
    path = Path(path)
    if path.suffix != ".npy":
        raise ValueError(f"path must end in .npy, got {path}")
    if path.exists():
        raise FileExistsError(f"path must be a new file, there is {path}")
    return path


def write(
    path: Path,
    shape: tuple[int, ...],
    dtype: str,
    chunks: Iterator[tuple[int, Tensor]],
    labels: Tensor | None,
) -> None:
    """Makes a .npy file and that of its classes from a few samples at a time.

    Args:
        path: of the file, which appears when it is whole.
        shape: [n, *shape].
        dtype: of numpy.
        chunks: the first index and the samples of each chunk, [m, *shape].
        labels: classes, [n] int64, or None.
    """
    part, beside = path.with_name(f"{path.stem}.part.npy"), labels_path(path)
    try:
        out = np.lib.format.open_memmap(part, "w+", np.dtype(dtype), shape)
        for start, chunk in chunks:
            out[start : start + len(chunk)] = chunk.cpu().numpy()
        out.flush()
        beside.unlink(missing_ok=True)
        if labels is not None:
            np.save(beside, labels.cpu().numpy())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def source(path: Path) -> Source:
    """The samples of one array, [n, *shape], channels first.

    Bytes [n, H, W, 1 or 3] with H neither 1 nor 3 are taken for images with their channels last,
    and brought to [n, C, H, W]. Classes are the integers [n] of NAME.labels.npy beside a .npy file,
    or of the one other array in the same .npz or .safetensors file.

    Raises:
        ValueError: the file is damaged, or holds no such array, or more than one.
    """
    tensors = READERS[path.suffix.lower()](path)
    data = [key for key, t in tensors.items() if t.ndim >= 2 and t.dtype in (torch.uint8, *FLOATS)]
    labels = [key for key in tensors if key not in data]
    if len(data) != 1 or len(labels) > 1:
        found = ", ".join(f"{key} {describe(t)}" for key, t in tensors.items()) or "nothing"
        raise ValueError(
            f"{path} must hold one array of samples, uint8 or float [n, *shape], "
            f"and at most one of classes besides, got {found}"
        )
    samples = tensors[data[0]]
    if samples.numel() == 0:
        raise ValueError(f"{path} must hold samples [n, *shape], got {describe(samples)}")
    if channels_last(samples):
        samples = samples.permute(0, 3, 1, 2)
    shape = tuple(samples.shape[1:])
    is_bytes = samples.dtype == torch.uint8
    as_written = samples.is_contiguous() and path.suffix.lower() == ".npy"

    def chunks() -> Iterator[Tensor]:
        return iter(samples.split(chunk_rows(shape, samples.element_size())))

    return Source(
        path.stem,
        "all",
        len(samples),
        shape,
        classes(path, tensors[labels[0]], len(samples)) if labels else None,
        chunks,
        samples.dtype,
        256 if is_bytes else None,
        path if is_bytes and as_written else None,
    )


def channels_last(samples: Tensor) -> bool:
    """Whether these are images [n, H, W, C]."""
    if samples.dtype != torch.uint8 or samples.ndim != 4:
        return False
    return samples.shape[3] in (1, 3) and samples.shape[1] not in (1, 3)


def classes(path: Path, labels: Tensor, n: int) -> Tensor:
    """The classes, [n] int64."""
    if labels.dtype not in INTEGERS or labels.shape != (n,) or bool((labels < 0).any()):
        raise ValueError(
            f"{path} must give classes as integers >= 0, [{n}] like its samples, "
            f"got {describe(labels)}"
        )
    return labels.to(torch.int64)


def npy(path: Path) -> dict[str, Tensor]:
    """The array of a .npy file, mapped and not read yet, and that of its labels."""
    beside = labels_path(path)
    found = {path.name: mapped(path)}
    return found | ({beside.name: mapped(beside)} if beside.is_file() else {})


def mapped(path: Path) -> Tensor:
    """A .npy file as a tensor; what is written to it stays in memory."""
    try:
        return torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))
    except (ValueError, TypeError, EOFError) as error:
        raise ValueError(f"{path} must be a whole .npy file of numbers: {error}") from error


def npz(path: Path) -> dict[str, Tensor]:
    """The arrays of a .npz file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: torch.from_numpy(file[key]) for key in file.files}
    except (ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} must be a whole .npz file of numbers: {error}") from error


def safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file."""
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} must be a whole .safetensors file: {error}") from error


READERS: Mapping[str, Callable[[Path], dict[str, Tensor]]] = {
    ".npy": npy,
    ".npz": npz,
    ".safetensors": safetensors,
}


def describe(tensor: Tensor) -> str:
    """Type and shape for an error message."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
