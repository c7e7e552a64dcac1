"""CIFAR-10's batches, as Python 2 pickled them, and pickles that mean harm."""

import io
import pickle
import struct
import tarfile

import numpy as np
import pytest
import torch

from stf_train import data

M = 4  # images a batch


def text(value: bytes) -> bytes:
    """Python 2's str as its pickler wrote it, SHORT_BINSTRING or BINSTRING."""
    if len(value) < 256:
        return b"U" + bytes([len(value)]) + value
    return b"T" + struct.pack("<i", len(value)) + value


def python2_batch(pixels, labels) -> bytes:
    """The opcodes of Python 2, protocol 2, for {'batch_label': str, 'labels': list, 'data': array}.

    Its text comes as byte strings, which the pickler of Python 3 cannot be made to write.
    """
    count, width = pixels.shape
    dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R"  # dtype('u1', 0, 1)
    dtype += b"(K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b")
    array += b"\x87R(K\x01" + b"K" + bytes([count]) + b"M" + struct.pack("<H", width) + b"\x86"
    array += dtype + b"\x89" + text(pixels.tobytes()) + b"tb"
    entries = text(b"batch_label") + text(b"testing batch 1 of 1")
    entries += text(b"labels") + b"](" + b"".join(b"K" + bytes([v]) for v in labels) + b"e"
    entries += text(b"data") + array
    return b"\x80\x02}(" + entries + b"u."


@pytest.fixture
def batches():
    """Pixels [6, M, 3072] and classes [6, M]; the last batch is the test set."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (6, M, 3072), np.uint8), rng.integers(0, 10, (6, M))


NAMES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


@pytest.fixture
def folder(tmp_path, batches):
    path = tmp_path / "cifar-10-batches-py"
    path.mkdir()
    for name, pixels, labels in zip(NAMES, *batches, strict=True):
        (path / name).write_bytes(python2_batch(pixels, labels.tolist()))
    (path / "batches.meta").write_bytes(b"of no use here")
    return path


def check(found, pixels, labels, split):
    assert (found.name, found.split, found.shape) == ("CIFAR-10", split, (3, 32, 32))
    # The published layout: 1024 red values row by row, then green, then blue.
    assert np.array_equal(found.references.decode().flatten(1).numpy(), pixels.reshape(-1, 3072))
    assert found.references.labels.tolist() == labels.ravel().tolist()


def test_the_pickles_are_what_python_reads(batches):
    """The opcodes above, read by Python itself."""
    pixels, labels = batches[0][0], batches[1][0].tolist()
    found = pickle.loads(python2_batch(pixels, labels), encoding="bytes")
    assert np.array_equal(found[b"data"], pixels)
    assert found[b"labels"] == labels


def test_both_splits(folder, batches):
    pixels, labels = batches
    for split in (None, "train"):
        found = data.load(folder, split=split, value_range=(0, 255))
        check(found, pixels[:5], labels[:5], "train")
    check(data.load(folder, split="test", value_range=(0, 255)), pixels[5], labels[5], "test")
    assert data.load(folder, labels="none").references.labels is None


def test_the_archive(folder, batches, tmp_path):
    path = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as file:
        file.add(folder, folder.name)
    check(data.load(path, value_range=(0, 255)), batches[0][:5], batches[1][:5], "train")
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"cifar-10-python\.tar\.gz must be a whole tar archive"):
        data.load(path)


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("order", ["C", "F"])
def test_batches_pickled_again_by_python_3(folder, batches, protocol, order):
    pixels, labels = batches[0][5], batches[1][5]
    again = {b"data": np.array(pixels, order=order), b"labels": labels.tolist()}
    (folder / "test_batch").write_bytes(pickle.dumps(again, protocol))
    check(data.load(folder, split="test", value_range=(0, 255)), pixels, labels, "test")


class Harm:
    """Unpickled by Python itself, it would call `function`."""

    def __init__(self, function, *arguments):
        self.made = function, arguments

    def __reduce__(self):
        return self.made


RAN = []


@pytest.mark.parametrize(
    ("function", "named"),
    [
        (eval, r"builtins\.eval"),
        (RAN.append, r"builtins\.getattr"),
        (np.load, r"numpy\.load"),
        (pickle.loads, r"_pickle\.loads"),
    ],
)
def test_a_pickle_runs_nothing(folder, function, named):
    argument = "__import__('test_data_cifar').RAN.append(1)"
    content = pickle.dumps({b"data": Harm(function, argument), b"labels": []})
    (folder / "test_batch").write_bytes(content)
    with pytest.raises(ValueError, match=rf"test_batch must be a batch .* it names {named}"):
        data.load(folder, split="test")
    assert not RAN


def test_the_harm_is_real():
    assert pickle.loads(pickle.dumps(Harm(RAN.append.__self__.__class__, (1, 2)))) == [1, 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({b"data": [1, 2], b"labels": [1]}, "with an array 'data' and a list 'labels'"),
        ({b"fine_labels": [1]}, "with an array 'data' and a list 'labels'"),
        ([1], "a dictionary, got list"),
        (
            {b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]},
            r"data \[1, 3072\] for its 1 labels, got \[2, 3072\]",
        ),
        (
            {b"data": np.zeros((1, 3000), np.uint8), b"labels": [1]},
            r"data \[1, 3072\] .* got \[1, 3000\]",
        ),
        ({b"data": np.zeros((1, 3072)), b"labels": [1]}, "its array must hold bytes"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]}, "classes 0 to 9, got 10"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"labels": [b"a"]}, "classes 0 to 9, got b'a'"),
    ],
)
def test_batches_that_are_none(folder, content, message):
    (folder / "test_batch").write_bytes(pickle.dumps(content, 2))
    with pytest.raises(ValueError, match=rf"test_batch must be a batch of CIFAR-10.*{message}"):
        data.load(folder, split="test")


@pytest.mark.parametrize("kept", [0, 1, 50, 0.3, 0.999])
def test_truncated_batches(folder, kept):
    path = folder / "test_batch"
    content = path.read_bytes()
    path.write_bytes(content[: kept if isinstance(kept, int) else int(len(content) * kept)])
    with pytest.raises(ValueError, match="test_batch must be a batch of CIFAR-10's Python version"):
        data.load(folder, split="test")


def complaint(folder) -> str:
    """What loading says, nothing if it succeeds; any other exception is not caught."""
    try:
        data.load(folder, split="test")
    except ValueError as error:
        return str(error)
    return ""


def test_damaged_batches_are_errors_that_name_them(folder):
    """A bit turned over anywhere but in the pixels gives another batch, or that error."""
    path = folder / "test_batch"
    content = path.read_bytes()
    pixels = range(300, len(content) - 10)
    complaints = []
    for i in set(range(len(content))) - set(pixels):
        for bit in (1, 128):
            path.write_bytes(content[:i] + bytes([content[i] ^ bit]) + content[i + 1 :])
            complaints.append(complaint(folder))
    assert all("test_batch must be a batch of CIFAR-10" in text for text in complaints if text)
    assert sum(map(bool, complaints)) > 100


def test_missing_batches_and_splits(folder):
    with pytest.raises(ValueError, match="split must be train or test, got 'validation'"):
        data.load(folder, split="validation")
    with pytest.raises(ValueError, match=r"size: .* has the size it has, got 64"):
        data.load(folder, size=64)
    (folder / "data_batch_3").unlink()
    with pytest.raises(ValueError, match=r"must hold the batches data_batch_1, .*not data_batch_3"):
        data.load(folder)


def test_the_reader_makes_no_arrays_of_numpys_own(batches):
    """It never lets numpy unpickle anything."""
    from stf_train.data.cifar import Array, Reader

    content = python2_batch(batches[0][0], batches[1][0].tolist())
    found = Reader(io.BytesIO(content), encoding="bytes").load()
    assert type(found[b"data"]) is Array
    assert torch.equal(
        torch.from_numpy(found[b"data"].values), torch.from_numpy(np.array(batches[0][0]))
    )
