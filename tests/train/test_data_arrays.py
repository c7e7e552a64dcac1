"""Arrays in .npy, .npz and .safetensors files, and files of bytes that stay on the disk."""

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import save_file

from stf_kernels import stable_target
from stf_train import data
from stf_train.data import arrays


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (7, 3, 4, 5), dtype=np.uint8)


@pytest.fixture
def latents():
    return np.random.default_rng(0).normal(size=(7, 4, 2, 2)).astype(np.float32)


LABELS = np.array([3, 0, 1, 1, 0, 3, 2])


def write(path, samples, labels=None, names=("x", "y")):
    named = {names[0]: samples} | ({} if labels is None else {names[1]: labels})
    if path.suffix == ".npz":
        np.savez(path, **named)
    elif path.suffix == ".npy":
        np.save(path, samples)
        if labels is not None:
            np.save(path.with_name(f"{path.stem}.labels.npy"), labels)
    else:
        save_file({k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in named.items()}, path)
    return path


SUFFIXES = pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors"])


@SUFFIXES
@pytest.mark.parametrize("labelled", [False, True])
def test_bytes(tmp_path, pixels, suffix, labelled):
    path = write(tmp_path / f"set{suffix}", pixels, LABELS if labelled else None)
    found = data.load(path, value_range=(0, 255))
    assert np.array_equal(found.references.decode().numpy(), pixels)
    assert found.references.limbs == 1
    assert (found.name, found.split, found.levels) == ("set", "all", 256)
    if labelled:
        assert found.references.labels.tolist() == LABELS.tolist()
        assert data.load(path, labels="none").references.labels is None
    else:
        assert found.references.labels is None


@SUFFIXES
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats(tmp_path, latents, suffix, dtype):
    path = write(tmp_path / f"set{suffix}", latents.astype(dtype), LABELS)
    found = data.load(path)
    assert (found.value_range, found.levels, found.shape) == (None, None, (4, 2, 2))
    # Four int8 digits: steps of the largest value / (127 * 256^3), up to a power of two.
    step = 2 * np.abs(latents).max() / (127 * 256**3)
    expected = torch.from_numpy(latents.astype(dtype).astype(np.float32))
    torch.testing.assert_close(found.references.decode(), expected, rtol=2**-23, atol=step)
    assert found.references.labels.tolist() == LABELS.tolist()
    assert torch.equal(found.rounded(expected), expected)
    assert data.load(path, limbs=2).references.limbs == 2


def test_bfloat16(tmp_path, latents):
    values = torch.from_numpy(latents).bfloat16()
    save_file({"latents": values}, tmp_path / "set.safetensors")
    found = data.load(tmp_path / "set.safetensors")
    torch.testing.assert_close(found.references.decode(), values.float(), rtol=0, atol=1e-8)


@SUFFIXES
def test_channels_last(tmp_path, pixels, suffix):
    path = write(tmp_path / f"set{suffix}", pixels.transpose(0, 2, 3, 1))
    found = data.load(path, value_range=(0, 255))
    assert np.array_equal(found.references.decode().numpy(), pixels)


def test_vectors(tmp_path, latents):
    path = write(tmp_path / "set.npy", latents.reshape(7, 16))
    assert data.load(path).shape == (16,)


def test_chunks_make_no_difference(tmp_path, pixels, monkeypatch):
    path = write(tmp_path / "set.npy", pixels)
    monkeypatch.setattr("stf_train.data.source.CHUNK_BYTES", 2 * 60)
    found = data.load(path, value_range=(0, 255))
    assert np.array_equal(found.references.decode().numpy(), pixels)


@SUFFIXES
@pytest.mark.parametrize("kept", [0, 5, 100, 0.6, 0.99])
def test_truncated_files(tmp_path, pixels, suffix, kept):
    path = write(tmp_path / f"set{suffix}", pixels)
    content = path.read_bytes()
    path.write_bytes(content[: kept if isinstance(kept, int) else int(len(content) * kept)])
    with pytest.raises(ValueError, match=rf"set\{suffix} must be a whole \{suffix} file"):
        data.load(path)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_pickled_objects_are_refused(tmp_path, suffix):
    path = write(tmp_path / f"set{suffix}", np.array([[{}, []]], dtype=object))
    with pytest.raises(
        ValueError, match=rf"set\{suffix} must be a whole \{suffix} file of numbers"
    ):
        data.load(path)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({}, "got nothing"),
        ({"a": np.zeros((2, 3, 3, 3), np.int32)}, r"got a int32 \[2, 3, 3, 3\]"),
        (
            {"a": np.zeros((2, 3), np.uint8), "b": np.zeros((2, 4), np.uint8)},
            r"one array of samples, .* got a uint8 \[2, 3\], b uint8 \[2, 4\]",
        ),
        (
            {"a": np.zeros((2, 3), np.uint8), "b": np.zeros(2, int), "c": np.zeros(2, int)},
            "at most one of classes besides",
        ),
        (
            {"a": np.zeros((0, 3), np.uint8)},
            r"must hold samples \[n, \*shape\], got uint8 \[0, 3\]",
        ),
        (
            {"a": np.zeros((2, 3), np.uint8), "b": np.zeros(3, int)},
            r"classes as integers >= 0, \[2\] like its samples, got int64 \[3\]",
        ),
        ({"a": np.zeros((2, 3), np.uint8), "b": np.array([0, -1])}, "classes as integers >= 0"),
        ({"a": np.zeros((2, 3), np.uint8), "b": np.zeros(2)}, r"got float64 \[2\]"),
        ({"a": np.array([[0.0, np.nan]])}, ": data must be finite"),
    ],
)
def test_arrays_that_are_none(tmp_path, named, message):
    np.savez(tmp_path / "set.npz", **named)
    with pytest.raises(ValueError, match=rf"set\.npz.*{message}"):
        data.load(tmp_path / "set.npz")


def test_what_arrays_do_not_have(tmp_path, pixels, latents):
    path = write(tmp_path / "set.npz", pixels)
    for arguments, message in (
        ({"split": "train"}, "split: .* is one set"),
        ({"size": 2}, "size: .* has the size it has"),
        ({"labels": "folders"}, "labels: .* holds no folders"),
        ({"resident": False}, "cannot stay on the disk"),
    ):
        with pytest.raises(ValueError, match=message):
            data.load(path, **arguments)
    with pytest.raises(ValueError, match="cannot stay on the disk"):
        data.load(write(tmp_path / "floats.npy", latents), resident=False)


@pytest.mark.parametrize("value_range", [(-1, 1), (0, 1)])
def test_bytes_that_stay_on_the_disk(tmp_path, pixels, value_range):
    path = write(tmp_path / "set.npy", pixels, LABELS)
    there = data.load(path, value_range=value_range, resident=False)
    here = data.load(path, value_range=value_range)
    assert (there.references.placement, here.references.placement) == ("file", "resident")
    assert torch.equal(there.references.decode(), here.references.decode())
    assert torch.equal(there.references.labels, here.references.labels)
    assert there.sigma_data == here.sigma_data
    x = here.references.decode(torch.tensor([1, 5])) + 0.3
    targets = [stable_target(x, found.references, 0.5) for found in (there, here)]
    assert torch.equal(*targets)


@pytest.mark.parametrize("layout", ["channels last", "Fortran"])
def test_other_layouts_cannot_stay_on_the_disk(tmp_path, pixels, layout):
    other = pixels.transpose(0, 2, 3, 1) if layout == "channels last" else np.asfortranarray(pixels)
    path = write(tmp_path / "set.npy", other)
    with pytest.raises(ValueError, match="cannot stay on the disk"):
        data.load(path, resident=False)
    found = data.load(path, value_range=(0, 255))
    assert np.array_equal(found.references.decode().numpy(), pixels)


@pytest.fixture
def pictures(tmp_path, pixels):
    for i, array in enumerate(pixels):
        path = tmp_path / "set" / str(LABELS[i]) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(array.transpose(1, 2, 0)).save(path)
    return tmp_path / "set"


def test_convert_is_what_load_reads(tmp_path, pictures, monkeypatch):
    monkeypatch.setattr("stf_train.data.source.CHUNK_BYTES", 2 * 60)
    path = tmp_path / "made.npy"
    data.convert(pictures, path, labels="folders")
    whole, made = data.load(pictures, labels="folders"), data.load(path)
    assert torch.equal(made.references.decode(), whole.references.decode())
    assert torch.equal(made.references.labels, whole.references.labels)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["made.labels.npy", "made.npy", "set"]


def test_convert_without_classes_leaves_none_of_an_older_file(tmp_path, pictures):
    path = tmp_path / "made.npy"
    np.save(arrays.labels_path(path), LABELS)
    data.convert(pictures, path)
    assert data.load(path).references.labels is None


def test_a_failed_convert_leaves_nothing(tmp_path, pictures):
    (pictures / "9.png").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"9\.png must be a whole image"):
        data.convert(pictures, tmp_path / "made.npy")
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_convert_errors(tmp_path, pictures, latents):
    with pytest.raises(ValueError, match=r"path must end in \.npy, got .*made\.npz"):
        data.convert(pictures, tmp_path / "made.npz")
    floats = write(tmp_path / "floats.npy", latents)
    with pytest.raises(FileExistsError, match="path must be a new file"):
        data.convert(pictures, floats)
    with pytest.raises(ValueError, match=r"bytes of 256 levels .* got torch\.float32"):
        data.convert(floats, tmp_path / "made.npy")
    with pytest.raises(ValueError, match=r"digits must hold bytes .* got 17 levels"):
        data.convert("digits", tmp_path / "made.npy")
