"""Image files, in a folder or in a zip such as EDM's data sets are kept in."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from stf_train.data.files import Files
from stf_train.data.source import Source, chunk_rows

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
MODES = {"RGB": 3, "L": 1}  # of Pillow, and their channels
JSON = "dataset.json"


@dataclass(frozen=True)
class Fit:
    """How images are brought to one size: their centre is cut out, and resized by `shrink`."""

    size: int  # height and width then, pixels
    crop: int | None = None  # height and width of what is cut out; None is the shorter side
    original: tuple[int, int] | None = None  # width and height before, if all must have the same

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be at least 1 pixel, got {self.size}")


def source(files: Files, labels: str = "auto", fit: Fit | None = None) -> Source:
    """The images among some files, in the order of their names.

    Args:
        files: a folder or an archive.
        labels: "auto" takes the classes of dataset.json where there is one,
            {"labels": [[name, class], ...]} as in EDM's data sets; "folders" numbers the first
            folders of the names in alphabetical order; "none" has no classes.
        fit: how to bring them to one size; None takes them as they are, all of one size.

    Raises:
        ValueError: there is no image, classes are missing, or, once they are read, an image is
            damaged, or of another size or kind than the first.
    """
    names = [name for name in files.names if name.lower().endswith(SUFFIXES)]
    if not names:
        raise ValueError(f"{files.path} must hold images ({', '.join(SUFFIXES)}), found none")
    shape = tuple(read(files, names[0], fit).shape)
    return Source(
        files.path.stem,
        "all",
        len(names),
        shape,
        classes(files, names, labels),
        lambda: chunks(files, names, shape, fit),
    )


def chunks(
    files: Files, names: Sequence[str], shape: tuple[int, ...], fit: Fit | None
) -> Iterator[Tensor]:
    """The images of these names, [m, *shape] uint8 at a time."""
    rows = chunk_rows(shape)
    for start in range(0, len(names), rows):
        part = names[start : start + rows]
        out = torch.empty(len(part), *shape, dtype=torch.uint8)
        for place, name in zip(out, part, strict=True):
            image = read(files, name, fit)
            if image.shape != shape:
                remedy = "" if image.shape[1:] == shape[1:] else "; give a size for all"
                raise ValueError(
                    f"{files.path}/{name} must be {describe(shape)} like {names[0]}, "
                    f"got {describe(tuple(image.shape))}{remedy}"
                )
            place.copy_(image)
        yield out


def read(files: Files, name: str, fit: Fit | None = None) -> Tensor:
    """One image, [C, H, W] uint8 with C = 3 or 1.

    Raises:
        ValueError: it is damaged, neither RGB nor grey with 8 bits, or of another size than `fit`
            asks for.
    """
    path = f"{files.path}/{name}"
    content = files.read(name)
    try:
        with PIL.Image.open(io.BytesIO(content)) as picture:
            mode = picture.mode
            pixels = np.array(picture) if mode in MODES else None
    # Pillow tells of damage by all of these.
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise ValueError(f"{path} must be a whole image: {error}") from error
    if pixels is None:
        raise ValueError(f"{path} must be RGB or grey with 8 bits a value, got mode {mode!r}")
    image = torch.from_numpy(pixels).reshape(*pixels.shape[:2], MODES[mode]).permute(2, 0, 1)
    if fit is None:
        return image
    height, width = image.shape[1:]
    if fit.original is not None and fit.original != (width, height):
        raise ValueError(
            f"{path} must be {fit.original[0]}x{fit.original[1]} pixels, got {width}x{height}"
        )
    crop = fit.crop or min(height, width)
    if min(height, width) < crop:
        raise ValueError(f"{path} must be at least {crop}x{crop} pixels, got {width}x{height}")
    return shrink(image, crop, fit.size)


def shrink(image: Tensor, crop: int, size: int) -> Tensor:
    """The centre crop x crop pixels, resized with the antialiased bilinear (triangle) filter.

        out_i = sum_j t((j + 1/2) / s - (i + 1/2)) in_j / sum_j t(...),  t(u) = max(0, 1 - |u|),

    s = crop / size along each axis for s > 1, the rows and columns of the crop beginning at
    (H - crop) // 2 and (W - crop) // 2. Computed in float64 and rounded to a byte once.

    Args:
        image: [C, H, W] uint8, H and W at least crop.
        crop: pixels.
        size: pixels.

    Returns:
        [C, size, size] uint8.
    """
    top, left = ((length - crop) // 2 for length in image.shape[1:])
    square = image[:, top : top + crop, left : left + crop]
    if crop == size:
        return square
    values = interpolate(square[None].double(), (size, size), mode="bilinear", antialias=True)
    return values[0].round().to(torch.uint8)


def classes(files: Files, names: Sequence[str], labels: str) -> Tensor | None:
    """The classes of the images, [n] int64, or None."""
    if labels == "folders":
        firsts = [name.partition("/")[0] if "/" in name else None for name in names]
        if None in firsts:
            loose = names[firsts.index(None)]
            raise ValueError(f"{files.path}/{loose} must lie in a folder, its class")
        number = {folder: i for i, folder in enumerate(sorted(set(map(str, firsts))))}
        return torch.tensor([number[str(first)] for first in firsts])
    if labels == "none" or JSON not in files.names:
        return None
    path = f"{files.path}/{JSON}"
    pairs = listed(path, files.read(JSON))
    if pairs is None:
        return None
    for name in names:
        if name not in pairs:
            raise ValueError(f"{path} must give the class of every image, has none for {name}")
    for name in pairs.keys() - set(names):
        raise ValueError(f"{path} gives a class to {name}, which is not there")
    return torch.tensor([pairs[name] for name in names])


def listed(path: str, content: bytes) -> dict[str, int] | None:
    """The classes by name of a dataset.json; None where its labels are null."""
    try:
        pairs = json.loads(content)["labels"]
        if pairs is None:
            return None
        result = {str(name): label for name, label in pairs}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f'{path} must hold {{"labels": [[name, class], ...]}}, got {error!r}'
        ) from error
    for name, label in result.items():
        if type(label) is not int or label < 0:
            raise ValueError(f"{path} must give a class 0, 1, ... to {name}, got {label!r}")
    return result


def describe(shape: tuple[int, ...]) -> str:
    """A shape for people."""
    kinds = {channels: mode for mode, channels in MODES.items()}
    return f"{shape[2]}x{shape[1]} pixels {kinds[shape[0]]}"
