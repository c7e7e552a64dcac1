"""Loading: from what a path is to a data set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from stf_kernels import References
from stf_train.data import arrays, celeba, cifar, images, prepared, shipped
from stf_train.data.dataset import DataSet
from stf_train.data.files import Files, Folder, Tar, Zip
from stf_train.data.source import Source, check_memory
from stf_train.progress import Progress

TARS = (".tar", ".tar.gz", ".tgz")
LABELS = ("auto", "folders", "none")


def load(
    spec: str | Path,
    *,
    split: str | None = None,
    value_range: tuple[float, float] = (-1, 1),
    labels: str = "auto",
    size: int | None = None,
    limbs: int | None = None,
    resident: bool = True,
) -> DataSet:
    """Reads a data set, whatever it is, into references.

    | spec | is |
    |---|---|
    | `digits` | 1797 digits of 8x8 pixels that ship with scikit-learn |
    | `patches` | half overlapping patches of the two photographs that ship with scikit-learn |
    | a folder or .zip | CelebA if it is named so; else images, with EDM's dataset.json if any |
    | a folder or .tar.gz | CIFAR-10's batches for Python |
    | .npy, .npz, .safetensors | one array [n, *shape]: bytes, or floats such as latents |
    | .stf | what `References.save` wrote |

    Args:
        spec: a name or a path.
        split: "train" or "test" of CIFAR-10; "train", "validation", "test" or "all" of CelebA;
            the others are one set, "all". None is "train" where there is one.
        value_range: the values of the lowest and the highest byte, data units: (-1, 1) for EDM
            and VP, (0, 1) for VE. Floats stand for themselves.
        labels: "auto" takes the classes that are there, "folders" a folder's or a zip's own first
            folders, "none" none.
        size: brings images to size x size pixels: the centre square of an image, of CelebA the
            crop of the paper (64 by default); of patches the size (16 by default).
        limbs: of float data, as for `stf_kernels.References`.
        resident: False leaves the bytes of a .npy file, or a .stf file, on the disk, of which a
            few are read at a time; `convert` makes such a .npy file of any images.

    Returns:
        The data set, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not what its name says, is damaged, or has no such split or size; the
            file is named.
        MemoryError: the data set is larger than the memory.
    """
    if Path(spec).suffix.lower() == prepared.SUFFIX:
        refuse(spec, split=split, size=size, labels=labels)
        return prepared.load(Path(spec), value_range, labels != "none", resident)
    source = find(spec, split, labels, size)
    is_bytes = source.levels is not None
    if is_bytes and limbs is not None:
        raise ValueError(f"limbs is for float data, {spec} holds bytes, got limbs={limbs}")
    if not resident and source.in_place is None:
        raise ValueError(
            f"resident: {spec} cannot stay on the disk: of another file than a .npy of uint8 "
            "[n, C, H, W], channels first, no few samples can be read; in Python, "
            f"stf_train.data.convert({str(spec)!r}, 'images.npy') makes such a one of images"
        )
    samples = gather(source) if resident else None
    byte_range = value_range if is_bytes else None
    try:
        if samples is None:
            assert source.in_place is not None
            references = References.from_file(
                source.in_place, value_range=byte_range, labels=source.labels
            )
        else:
            references = References(
                samples,
                value_range=byte_range,
                levels=source.levels,
                labels=source.labels,
                limbs=limbs,
            )
    except (ValueError, TypeError) as error:
        raise ValueError(f"{spec}: {error}") from error
    return DataSet(source.name, source.split, references, byte_range, source.levels)


def convert(
    spec: str | Path,
    path: str | Path,
    *,
    split: str | None = None,
    labels: str = "auto",
    size: int | None = None,
) -> None:
    """Decodes a data set into a .npy file of bytes that `load` can leave on the disk.

    It needs memory for a few samples only. The classes go into NAME.labels.npy beside it.

    Args:
        spec, split, labels, size: as for `load`.
        path: of the new file, [n, C, H, W] uint8; it appears when it is whole.

    Raises:
        FileExistsError: there is such a file.
        ValueError: path does not end in .npy, the data are not bytes, or as for `load`.
    """
    path = arrays.new(path)
    source = find(spec, split, labels, size)
    if source.levels != 256:
        kind = source.dtype if source.levels is None else f"{source.levels} levels"
        raise ValueError(f"{spec} must hold bytes of 256 levels to be converted, got {kind}")
    shape = (source.count, *source.shape)
    arrays.write(path, shape, "uint8", progress(source), source.labels)


def find(spec: str | Path, split: str | None, labels: str, size: int | None) -> Source:
    """What a spec means."""
    if labels not in LABELS:
        raise ValueError(f"labels must be {', '.join(LABELS)}, got {labels!r}")
    path, name = Path(spec), str(spec).lower()
    source: Source
    if name == "digits":
        refuse(spec, split=split, size=size, labels=labels)
        source = shipped.digits_source()
    elif name == "patches":
        refuse(spec, split=split, labels=labels)
        source = shipped.patches_source(shipped.PATCH if size is None else size)
    elif not path.exists():
        raise FileNotFoundError(f"data must be 'digits', 'patches' or a path, there is no {spec}")
    elif path.is_dir():
        source = among(Folder(path), split, labels, size)
    elif name.endswith(".zip"):
        source = among(Zip(path), split, labels, size)
    elif name.endswith(TARS):
        source = among(Tar(path), split, labels, size)
    elif path.suffix.lower() in arrays.READERS:
        refuse(spec, split=split, size=size, labels=labels)
        source = arrays.source(path)
    else:
        known = ", ".join((".zip", *TARS, *arrays.READERS, prepared.SUFFIX))
        raise ValueError(f"{spec} must be a folder or end in {known}")
    return replace(source, labels=None) if labels == "none" else source


def among(files: Files, split: str | None, labels: str, size: int | None) -> Source:
    """What files are, by their names."""
    if cifar.recognised(files):
        refuse(files.path, size=size, labels=labels)
        return cifar.source(files, split)
    if celeba.recognised(files):
        refuse(files.path, labels=labels)
        return celeba.source(files, split, celeba.SIZE if size is None else size)
    refuse(files.path, split=split)
    return images.source(files, labels, None if size is None else images.Fit(size))


def refuse(
    spec: str | Path, *, split: str | None = None, size: int | None = None, labels: str = "auto"
) -> None:
    """Raises for what a data set of this kind does not have."""
    if split not in (None, "all"):
        raise ValueError(f"split: {spec} is one set, 'all', got {split!r}")
    if size is not None:
        raise ValueError(f"size: {spec} has the size it has, got {size}")
    if labels == "folders":
        raise ValueError(f"labels: {spec} holds no folders of images, got {labels!r}")


def gather(source: Source) -> Tensor:
    """All samples in memory, [n, *shape]."""
    # The samples, and the int8 digits that References makes of them.
    needed = source.values * (source.dtype.itemsize + (4 if source.levels is None else 1))
    check_memory(source.name, needed)
    out = torch.empty(source.count, *source.shape, dtype=source.dtype)
    for start, chunk in progress(source):
        out[start : start + len(chunk)] = chunk
    return out


def progress(source: Source) -> Iterator[tuple[int, Tensor]]:
    """The first index and the samples of each chunk."""
    start = 0
    with Progress(source.count, "sample", source.name) as progress:
        for chunk in source.chunks():
            yield start, chunk
            start += len(chunk)
            progress.update(len(chunk))
