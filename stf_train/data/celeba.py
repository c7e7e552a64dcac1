"""CelebA: the aligned and cropped images, cut and scaled as the stable-target paper has them."""

from __future__ import annotations

from stf_train.data import images
from stf_train.data.files import Files, base
from stf_train.data.source import Source

FOLDER = "img_align_celeba"
PARTITION = "list_eval_partition.txt"
SPLITS = {"train": "0", "validation": "1", "test": "2"}
WIDTH, HEIGHT = 178, 218  # of the aligned images
CROP, SIZE = 140, 64  # pixels


def recognised(files: Files) -> bool:
    """Whether these are CelebA's files, by their names."""
    return (
        FOLDER in (files.path.name, files.path.stem)
        or PARTITION in map(base, files.names)
        or any(f"{FOLDER}/" in name for name in files.names)
    )


def source(files: Files, split: str | None = None, size: int = SIZE) -> Source:
    """The aligned images, 178x218 pixels: their centre 140x140, resized to size x size.

    The crop begins at row 39 and column 19, and the filter is the antialiased bilinear one
    (`images.shrink`). It is the preparation of the paper's experiments, but for one thing: there
    the resized floats are used as they come, here they are rounded to bytes.

    Args:
        files: the folder or zip of the images; list_eval_partition.txt among them or beside it.
        split: "train" (the default), "validation", "test", or "all", which needs no partition.
        size: pixels.

    Raises:
        ValueError: split is unknown, an image is missing, or, once read, of another size.
        FileNotFoundError: there is no partition.

    Source: Xu, Tong, Jaakkola 2023, Section 6.2, on the preparation of Y. Song et al.,
    "Score-Based Generative Modeling through Stochastic Differential Equations", ICLR 2021:
    `central_crop` and `resize_small` in datasets.py of yang-song/score_sde_pytorch.
    """
    split = "train" if split is None else split
    if split not in (*SPLITS, "all"):
        raise ValueError(f"split must be {', '.join(SPLITS)} or all, got {split!r}")
    pictures = {base(name): name for name in files.names if name.lower().endswith(".jpg")}
    wanted = sorted(pictures) if split == "all" else members(files, SPLITS[split])
    for name in wanted:
        if name not in pictures:
            raise ValueError(f"{files.path} must hold the image {name} of split {split!r}")
    if not wanted:
        raise ValueError(f"{files.path} must hold images of split {split!r}, found none")
    names = [pictures[name] for name in wanted]

    fit = images.Fit(size, CROP, (WIDTH, HEIGHT))
    shape = (3, size, size)
    return Source(
        "CelebA", split, len(names), shape, None, lambda: images.chunks(files, names, shape, fit)
    )


def members(files: Files, part: str) -> list[str]:
    """The images of one part, by the partition file: lines of an image's name and 0, 1 or 2."""
    among = [name for name in files.names if base(name) == PARTITION]
    beside = files.path.parent / PARTITION
    if among:
        content = files.read(among[0])
    elif beside.is_file():
        content = beside.read_bytes()
    else:
        raise FileNotFoundError(
            f"{files.path} must have {PARTITION} in it or beside it for its splits; "
            "split='all' does without"
        )
    rows = [line.split() for line in content.decode("ascii", "replace").splitlines() if line]
    for row in rows:
        if len(row) != 2 or row[1] not in SPLITS.values():
            raise ValueError(
                f"{PARTITION} of {files.path} must hold lines of an image's name and 0, 1 or 2, "
                f"got {' '.join(row)!r}"
            )
    return [name for name, number in rows if number == part]
