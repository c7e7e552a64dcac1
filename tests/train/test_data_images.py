"""Image folders, EDM's zips and CelebA, against the arrays the files were written from."""

import json
import zipfile

import numpy as np
import PIL.Image
import pytest
import torch

from stf_train import data
from stf_train.data import images

NAMES = ["00000/img00000000.png", "00000/img00000001.png", "00001/img00000002.png"]


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (3, 6, 5, 3), dtype=np.uint8)


def write_folder(folder, pixels, names=NAMES):
    for array, name in zip(pixels, names, strict=True):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(array).save(path)
    return folder


def write_labels(folder, labels):
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))


def zipped(folder, path):
    with zipfile.ZipFile(path, "w") as file:
        for found in sorted(folder.rglob("*")):
            if found.is_file():
                file.write(found, found.relative_to(folder).as_posix())
    return path


def stored(found):
    """The bytes of a data set loaded with value_range=(0, 255), channels last."""
    return found.references.decode().permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("archive", [False, True])
def test_images_and_their_classes(tmp_path, pixels, archive):
    folder = write_folder(tmp_path / "set", pixels)
    write_labels(folder, [[NAMES[2], 0], [NAMES[0], 7], [NAMES[1], 3]])
    (folder / "README.txt").write_text("not an image")
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX" / "._img.png").write_bytes(b"not one either")
    spec = zipped(folder, tmp_path / "set.zip") if archive else folder
    found = data.load(spec, value_range=(0, 255))
    assert np.array_equal(stored(found), pixels)
    assert found.references.labels.tolist() == [7, 3, 0]
    assert (found.name, found.split, found.shape, found.classes) == ("set", "all", (3, 6, 5), 8)
    assert data.load(spec, labels="none").references.labels is None


def test_images_in_the_order_of_their_names(tmp_path, pixels):
    write_folder(tmp_path, pixels, ["b.png", "a/z.png", "a.png"])
    assert np.array_equal(stored(data.load(tmp_path, value_range=(0, 255))), pixels[[2, 1, 0]])


def test_grey_images(tmp_path, pixels):
    write_folder(tmp_path, pixels[..., 0])
    found = data.load(tmp_path, value_range=(0, 255))
    assert found.shape == (1, 6, 5)
    assert np.array_equal(stored(found)[..., 0], pixels[..., 0])


def test_chunks_make_no_difference(tmp_path, pixels, monkeypatch):
    write_folder(tmp_path, pixels)
    monkeypatch.setattr("stf_train.data.source.CHUNK_BYTES", 2 * 90)
    assert np.array_equal(stored(data.load(tmp_path, value_range=(0, 255))), pixels)


@pytest.mark.parametrize("archive", [False, True])
def test_folders_as_classes(tmp_path, pixels, archive):
    folder = write_folder(tmp_path / "set", pixels, ["cat/1.png", "cat/deep/2.png", "bat/1.png"])
    spec = zipped(folder, tmp_path / "set.zip") if archive else folder
    found = data.load(spec, labels="folders")
    assert found.references.labels.tolist() == [0, 1, 1]  # bat, cat, cat
    assert data.load(spec).references.labels is None
    write_folder(folder, pixels[:1], ["loose.png"])
    with pytest.raises(ValueError, match=r"loose\.png must lie in a folder, its class"):
        data.load(folder, labels="folders")


def test_null_labels_are_none(tmp_path, pixels):
    write_labels(write_folder(tmp_path, pixels), None)
    assert data.load(tmp_path).references.labels is None


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[NAMES[0], 1], [NAMES[2], 1]], f"class of every image, has none for {NAMES[1]}"),
        ([[n, 1] for n in [*NAMES, "x.png"]], r"gives a class to x\.png, which is not there"),
        ([[n, [0, 1]] for n in NAMES], rf"class 0, 1, \.\.\. to {NAMES[0]}, got \[0, 1\]"),
        ([[n, -1] for n in NAMES], rf"class 0, 1, \.\.\. to {NAMES[0]}, got -1"),
        ([[n, True] for n in NAMES], rf"class 0, 1, \.\.\. to {NAMES[0]}, got True"),
        ([1, 2], r'must hold \{"labels": \[\[name, class\], \.\.\.\]\}'),
    ],
)
def test_bad_labels(tmp_path, pixels, labels, message):
    write_labels(write_folder(tmp_path, pixels), labels)
    with pytest.raises(ValueError, match=rf"dataset\.json .*{message}"):
        data.load(tmp_path)
    data.load(tmp_path, labels="none")


def test_labels_that_are_no_json(tmp_path, pixels):
    write_folder(tmp_path, pixels)
    (tmp_path / "dataset.json").write_text('{"labels": [')
    with pytest.raises(ValueError, match=r"dataset\.json must hold"):
        data.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "picture", "message"),
    [
        ("wide", PIL.Image.new("RGB", (6, 6)), "5x6 pixels RGB like .*, got 6x6 pixels RGB"),
        ("grey", PIL.Image.new("L", (5, 6)), "5x6 pixels RGB like .*, got 5x6 pixels L"),
        ("alpha", PIL.Image.new("RGBA", (5, 6)), "8 bits a value, got mode 'RGBA'"),
        ("palette", PIL.Image.new("P", (5, 6)), "8 bits a value, got mode 'P'"),
        ("deep", PIL.Image.new("I;16", (5, 6)), "8 bits a value, got mode 'I;16'"),
    ],
)
def test_images_of_another_kind(tmp_path, pixels, name, picture, message):
    write_folder(tmp_path, pixels)
    picture.save(tmp_path / f"{name}.png")
    with pytest.raises(ValueError, match=rf"{name}\.png must be .*{message}"):
        data.load(tmp_path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp"])
@pytest.mark.parametrize("kept", [0, 40, 0.5, 0.9])
def test_truncated_images(tmp_path, suffix, kept):
    picture = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    path = tmp_path / f"a.{suffix}"
    picture.save(path)
    content = path.read_bytes()
    path.write_bytes(content[: kept if isinstance(kept, int) else int(len(content) * kept)])
    with pytest.raises(ValueError, match=rf"a\.{suffix} must be a whole image"):
        data.load(tmp_path)


def test_empty_folders(tmp_path):
    with pytest.raises(ValueError, match=r"must hold images \(\.png, .*found none"):
        data.load(tmp_path)
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    with pytest.raises(ValueError, match=r"empty\.zip must hold images"):
        data.load(tmp_path / "empty.zip")


def test_damaged_zips(tmp_path, pixels):
    path = zipped(write_folder(tmp_path / "set", pixels), tmp_path / "set.zip")
    content = bytearray(path.read_bytes())
    (tmp_path / "short.zip").write_bytes(content[:-30])
    with pytest.raises(ValueError, match=r"short\.zip must be a whole zip archive"):
        data.load(tmp_path / "short.zip")
    content[120] ^= 255  # inside the first image
    (tmp_path / "flipped.zip").write_bytes(content)
    with pytest.raises(ValueError, match=rf"flipped\.zip/{NAMES[0]} cannot be read: Bad CRC-32"):
        data.load(tmp_path / "flipped.zip")


def triangle(length, size):
    """The matrix of the antialiased bilinear filter, [size, length], from its formula."""
    s = length / size
    centre = (np.arange(size) + 0.5)[:, None]
    weights = np.maximum(0, 1 - np.abs((np.arange(length) + 0.5) / s - centre))
    return weights / weights.sum(1, keepdims=True)


def assert_rounded(got, expected):
    """A byte differs from the exact value by rounding alone, except where that is a tie."""
    assert np.abs(got.astype(float) - expected).max() <= 0.5 + 1e-9


@pytest.mark.parametrize(("height", "width", "size"), [(20, 31, 7), (64, 48, 24), (9, 9, 9)])
def test_size_takes_the_centre_and_resizes_it(tmp_path, height, width, size):
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "a.png")
    found = data.load(tmp_path, size=size, value_range=(0, 255))
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = pixels[top : top + side, left : left + side].astype(float)
    matrix = triangle(side, size)
    assert_rounded(stored(found)[0], np.einsum("ih,jw,hwc->ijc", matrix, matrix, square))


def test_size_makes_images_of_one_size(tmp_path):
    for i, shape in enumerate([(20, 31, 3), (40, 12, 3)]):
        PIL.Image.fromarray(np.zeros(shape, np.uint8)).save(tmp_path / f"{i}.png")
    assert data.load(tmp_path, size=8).shape == (3, 8, 8)
    with pytest.raises(
        ValueError, match=r"1\.png must be 31x20 pixels RGB like 0\.png, got 12x40.*; give a size"
    ):
        data.load(tmp_path)
    with pytest.raises(ValueError, match="size must be at least 1 pixel, got 0"):
        data.load(tmp_path, size=0)


@pytest.fixture
def celeba(tmp_path):
    """Four aligned pictures with the partition beside them, and their pixels as decoded."""
    folder = tmp_path / "celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    pictures = []
    for i in range(4):
        # Smooth, so that the crop, not noise, decides; different in each corner.
        y, x = np.mgrid[:218, :178]
        array = np.stack([y, x + 30 * i, (x + y) // 2], axis=2).astype(np.uint8)
        path = folder / "img_align_celeba" / f"00000{i + 1}.jpg"
        PIL.Image.fromarray(array).save(path, quality=95)
        pictures.append(np.array(PIL.Image.open(path)))
    lines = [f"00000{i + 1}.jpg {part}" for i, part in enumerate((0, 1, 0, 2))]
    (folder / "list_eval_partition.txt").write_text("\n".join(lines) + "\n")
    return folder, pictures


@pytest.mark.parametrize(
    ("split", "members"),
    [(None, [0, 2]), ("train", [0, 2]), ("validation", [1]), ("test", [3]), ("all", [0, 1, 2, 3])],
)
def test_celeba_is_the_papers_crop(celeba, split, members):
    folder, pictures = celeba
    found = data.load(folder, split=split, value_range=(0, 255))
    assert (found.name, found.split, found.shape) == ("CelebA", split or "train", (3, 64, 64))
    matrix = triangle(140, 64)
    for got, i in zip(stored(found), members, strict=True):
        square = pictures[i][39:179, 19:159].astype(float)
        assert_rounded(got, np.einsum("ih,jw,hwc->ijc", matrix, matrix, square))


def test_celeba_in_its_own_folder_and_zip(celeba, tmp_path):
    folder, _ = celeba
    whole = data.load(folder, size=32)
    assert whole.shape == (3, 32, 32)
    for spec in (
        folder / "img_align_celeba",
        zipped(folder / "img_align_celeba", folder / "img_align_celeba.zip"),
        zipped(folder, tmp_path / "other.zip"),
    ):
        found = data.load(spec, size=32)
        assert (found.name, found.split) == ("CelebA", "train")
        assert torch.equal(found.references.decode(), whole.references.decode())


def test_celeba_errors(celeba):
    folder, _ = celeba
    with pytest.raises(ValueError, match="split must be train, validation, test or all, got 'val'"):
        data.load(folder, split="val")
    picture = folder / "img_align_celeba" / "000003.jpg"
    PIL.Image.new("RGB", (178, 200)).save(picture)
    with pytest.raises(ValueError, match=r"000003\.jpg must be 178x218 pixels, got 178x200"):
        data.load(folder)
    picture.unlink()
    with pytest.raises(ValueError, match=r"must hold the image 000003\.jpg of split 'train'"):
        data.load(folder)
    partition = folder / "list_eval_partition.txt"
    partition.write_text("000001.jpg 0\n000002.jpg 5\n")
    with pytest.raises(
        ValueError, match=r"lines of an image's name and 0, 1 or 2, got '000002\.jpg 5"
    ):
        data.load(folder)
    partition.unlink()
    with pytest.raises(FileNotFoundError, match=r"list_eval_partition\.txt .*split='all' does"):
        data.load(folder)
    assert len(data.load(folder, split="all")) == 3


def test_a_set_of_images_has_no_splits(tmp_path, pixels):
    write_folder(tmp_path, pixels)
    with pytest.raises(ValueError, match=r"split: .* is one set, 'all', got 'train'"):
        data.load(tmp_path, split="train")


def test_shrinking_weighs_as_the_formula_says():
    """A single lit pixel spreads by the filter's weights."""
    image = torch.zeros(1, 12, 12, dtype=torch.uint8)
    image[0, 5, 6] = 255
    matrix = triangle(12, 4)
    assert_rounded(
        images.shrink(image, 12, 4)[0].numpy(), 255 * np.outer(matrix[:, 5], matrix[:, 6])
    )
