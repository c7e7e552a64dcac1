"""References in a file: the safetensors library reads it, and whatever is wrong with it is said."""

from __future__ import annotations

import ast
import ctypes
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from stf_kernels import References, file_format, stable_target
from stf_kernels.storage import Flipped, OnFile, Resident, Values

N, SHAPE = 20, (3, 2, 4)
METADATA = {"format": "stf-kernels references", "version": "1"}


def contents(limbs: int = 2, n: int = N) -> dict[str, Tensor]:
    """All that a file may hold."""
    g = helpers.generator(limbs)
    return {
        "values": torch.randint(-128, 128, (limbs, n, *SHAPE), dtype=torch.int8, generator=g),
        "norms": torch.randn(n, dtype=torch.float64, generator=g),
        "affine": torch.tensor([0.5, -1.0], dtype=torch.float64),
        "labels": torch.randint(0, 10, (n,), generator=g),
        "log_weight": torch.randn(n, dtype=torch.float64, generator=g),
    }


def write(path: Path, tensors: dict[str, Tensor], values: Values | None = None) -> None:
    digits = tensors["values"].flatten(2)
    rest = (tensors.get(name) for name in ("norms", "affine", "labels", "log_weight"))
    file_format.write(path, torch.Size(SHAPE), values or Resident(digits), *rest)


def entry(dtype: str, shape: object, begin: object, end: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def raw_bytes(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def small_header() -> tuple[dict[str, object], bytes]:
    """One limb of four references [2, 3], values first."""
    header = {
        "__metadata__": METADATA,
        "values": entry("I8", [1, 4, 2, 3], 0, 24),
        "norms": entry("F64", [4], 24, 56),
        "affine": entry("F64", [2], 56, 72),
        "labels": entry("I64", [4], 72, 104),
    }
    numbers = [np.arange(24, dtype=np.int8), np.arange(4.0), np.array([0.5, 1]), np.arange(4)]
    return header, b"".join(x.tobytes() for x in numbers)


@pytest.mark.parametrize("limbs", [1, 2, 4])
@pytest.mark.parametrize("without", [(), ("labels",), ("labels", "log_weight")])
def test_the_safetensors_library_reads_what_is_written(limbs, without, tmp_path):
    tensors = {name: t for name, t in contents(limbs).items() if name not in without}
    write(tmp_path / "refs", tensors)
    with safe_open(tmp_path / "refs", "pt") as file:
        assert file.metadata() == METADATA
        assert set(file.keys()) == set(tensors)
        for name, expected in tensors.items():
            found = file.get_tensor(name)
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected)
    assert os.listdir(tmp_path) == ["refs"]


@pytest.mark.parametrize("limbs", [1, 2, 4])
@pytest.mark.parametrize("without", [(), ("labels",), ("labels", "log_weight")])
@pytest.mark.parametrize("by", ["this package", "the safetensors library"])
def test_what_is_written_is_read(by, limbs, without, tmp_path):
    tensors = {name: t for name, t in contents(limbs).items() if name not in without}
    if by == "this package":
        write(tmp_path / "refs", tensors)
    else:
        save_file(tensors, tmp_path / "refs", METADATA)
    found = file_format.read(tmp_path / "refs")
    assert (found.limbs, found.count, found.shape, found.raw) == (limbs, N, SHAPE, False)
    for name in ("norms", "affine", "labels", "log_weight"):
        actual, expected = getattr(found, name), tensors.get(name)
        assert (actual is None) == (expected is None)
        if expected is not None:
            assert actual.dtype == expected.dtype
            assert torch.equal(actual, expected)
    values = found.values("cpu")
    assert values.placement == "file"
    assert torch.equal(values.load(), tensors["values"].flatten(2))


def test_written_values_begin_on_a_page(tmp_path):
    for n in (1, 2, 3, 50):
        write(tmp_path / "refs", contents(n=n))
        assert file_format.read(tmp_path / "refs").offset % 4096 == 0


@pytest.mark.parametrize("limbs", [1, 3])
@pytest.mark.parametrize("rows", [1, 7, N, N + 1])
def test_values_are_written_in_chunks_of_any_size(rows, limbs, tmp_path, monkeypatch):
    tensors = contents(limbs)
    dim = torch.Size(SHAPE).numel()
    monkeypatch.setattr(file_format, "WRITE_BYTES", rows * limbs * dim)
    flipped = Flipped(Resident(tensors["values"].flatten(2)), SHAPE[-1])
    for values, expected in (
        (None, tensors["values"]),
        (flipped, torch.cat([tensors["values"], tensors["values"].flip(-1)], 1)),
    ):
        n = expected.shape[1]
        write(tmp_path / "refs", contents(limbs, n) | {"values": tensors["values"]}, values)
        with safe_open(tmp_path / "refs", "pt") as file:
            assert torch.equal(file.get_tensor("values"), expected)


def test_a_file_may_be_written_over_while_it_is_read(tmp_path):
    tensors = contents()
    write(tmp_path / "refs", tensors)
    values = file_format.read(tmp_path / "refs").values("cpu")
    write(tmp_path / "refs", contents(n=2 * N), Flipped(values, SHAPE[-1]))
    digits = tensors["values"]
    assert torch.equal(values.load(), digits.flatten(2))
    found = file_format.read(tmp_path / "refs").values("cpu").load()
    assert torch.equal(found, torch.cat([digits, digits.flip(-1)], 1).flatten(2))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_writing_does_not_hold_the_set(tmp_path):
    def peak() -> int:
        return 1024 * int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0])

    n, dim = 60_000, 4096
    with open(tmp_path / "large", "wb") as sparse:
        sparse.truncate(n * dim)
    values = OnFile(tmp_path / "large", 0, 1, n, dim)
    norms, affine = torch.zeros(n, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    file_format.write(tmp_path / "refs", torch.Size([dim]), values, norms, affine, None, None)
    grown = peak() - before
    assert file_format.read(tmp_path / "refs").count == n
    assert grown < 2 * file_format.WRITE_BYTES + (8 << 20) < n * dim // 3


class Failing(Resident):
    """Whose second chunk does not come."""

    def chunks(self, size):
        yield next(super().chunks(size))
        raise KeyboardInterrupt


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("step", ["chunks", "fsync", "replace"])
def test_a_failure_leaves_what_was_there(step, old, tmp_path, monkeypatch):
    tensors = contents()
    if old:
        write(tmp_path / "refs", tensors)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    values = None
    if step == "chunks":
        values = Failing(tensors["values"].flatten(2))
    else:
        monkeypatch.setattr(os, step, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "refs", contents() | {"affine": torch.ones(2).double()}, values)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_the_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    steps, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (steps.append("sync"), sync(fd)))
    monkeypatch.setattr(os, "replace", lambda *names: (steps.append("name"), replace(*names)))
    write(tmp_path / "refs", contents())
    assert steps == ["sync", "name", "sync"]  # the file, its name, the directory


def test_the_example_makes_the_same_references(tmp_path, monkeypatch):
    """The lines in the module's docstring, run as they stand."""
    text = ast.get_docstring(ast.parse(Path(file_format.__file__).read_text()))
    example = [line for line in text.splitlines() if line.startswith("    ")]
    begin = next(i for i, line in enumerate(example) if "import numpy" in line)
    images = helpers.photograph_patches(300)
    monkeypatch.chdir(tmp_path)
    exec("\n".join(line[4:] for line in example[begin:]), {"images": images.numpy()})
    expected = References(images, value_range=(-1, 1))
    found = References.from_file("images.stf")
    x = torch.randn(4, 3, 32, 32, generator=helpers.generator(0))
    for sigma in (0.01, 1.0):
        assert torch.equal(stable_target(x, found, sigma), stable_target(x, expected, sigma))
    expected.save("saved.stf")
    with safe_open("images.stf", "pt") as one, safe_open("saved.stf", "pt") as other:
        for name in ("values", "norms", "affine"):
            assert torch.equal(one.get_tensor(name), other.get_tensor(name))


def test_no_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        file_format.read(tmp_path / "nowhere")


def test_the_machine_must_be_little_endian(tmp_path, monkeypatch):
    write(tmp_path / "refs", contents())
    monkeypatch.setattr(sys, "byteorder", "big")
    with pytest.raises(RuntimeError, match="little-endian"):
        file_format.read(tmp_path / "refs")
    with pytest.raises(RuntimeError, match="little-endian"):
        write(tmp_path / "other", contents())
    assert os.listdir(tmp_path) == ["refs"]


# What is wrong with a file: a change of a good one, and what must be said.

Change = Callable[[dict], object]


def replaced(**entries: object) -> Change:
    return lambda header: header | entries


def without(*names: str) -> Change:
    return lambda header: {key: value for key, value in header.items() if key not in names}


WRONG: dict[str, tuple[Change, str]] = {
    "no metadata": (without("__metadata__"), "format must be 'stf-kernels references', got None"),
    "metadata of no kind": (replaced(__metadata__=[1]), "format must be .*, got None"),
    "another format": (
        replaced(__metadata__={"format": "pt"}),
        "format must be 'stf-kernels references', got 'pt'",
    ),
    "a later version": (
        replaced(__metadata__=METADATA | {"version": "2"}),
        "version must be '1', got '2'",
    ),
    "no norms": (without("norms"), "must hold values, norms, affine .*got affine, labels, values"),
    "no values": (without("values"), "must hold values, norms, affine"),
    "nothing": (lambda header: {"__metadata__": METADATA}, "must hold .*got nothing"),
    "one more": (replaced(label=entry("I64", [4], 104, 136)), "must hold .*label, labels"),
    "values of bytes": (
        replaced(values=entry("U8", [1, 4, 2, 3], 0, 24)),
        "values must have dtype I8, got 'U8'",
    ),
    "norms of float32": (
        replaced(norms=entry("F32", [8], 24, 56)),
        "norms must have dtype F64, got 'F32'",
    ),
    "labels of int32": (
        replaced(labels=entry("I32", [8], 72, 104)),
        "labels must have dtype I64, got 'I32'",
    ),
    "no dtype": (replaced(values={}), "values must have dtype I8, got None"),
    "an entry that is none": (replaced(norms=7), "norms must have dtype F64, got None"),
    "no shape": (
        replaced(norms={"dtype": "F64"}),
        "the shape of norms must be a list of sizes, got None",
    ),
    "a shape of floats": (
        replaced(norms=entry("F64", [4.0], 24, 56)),
        r"the shape of norms must be a list of sizes, got \[4.0\]",
    ),
    "a negative shape": (
        replaced(values=entry("I8", [1, -4, -2, 3], 0, 24)),
        "the shape of values must be a list of sizes",
    ),
    "no data": (
        replaced(norms={"dtype": "F64", "shape": [4]}),
        "data_offsets of norms must be .*, got None",
    ),
    "negative data": (replaced(norms=entry("F64", [4], -8, 24)), "data_offsets of norms must be"),
    "data backwards": (replaced(norms=entry("F64", [4], 56, 24)), "data_offsets of norms must be"),
    "data in three": (
        replaced(norms={"dtype": "F64", "shape": [4], "data_offsets": [24, 56, 72]}),
        "data_offsets of norms must be",
    ),
    "too little data": (
        replaced(norms=entry("F64", [4], 24, 48)),
        r"norms \[4\] must take 32 bytes, got 24",
    ),
    "no limb": (replaced(values=entry("I8", [0, 4, 2, 3], 0, 0)), "values must be .*got"),
    "five limbs": (replaced(values=entry("I8", [5, 4, 6], 0, 120)), r"values must be \[1 to 4, n"),
    "no reference": (replaced(values=entry("I8", [1, 0, 6], 0, 0)), "values must be .*n >= 1"),
    "no shape of a reference": (replaced(values=entry("I8", [1, 4], 0, 4)), "values must be"),
    "fewer norms": (
        replaced(norms=entry("F64", [3], 24, 48)),
        r"norms must be \[4\] with values \[1, 4, 2, 3\], got \[3\]",
    ),
    "norms in a table": (replaced(norms=entry("F64", [4, 1], 24, 56)), r"norms must be \[4\]"),
    "more labels": (replaced(labels=entry("I64", [5], 72, 112)), r"labels must be \[4\]"),
    "a longer affine": (replaced(affine=entry("F64", [3], 56, 80)), r"affine must be \[2\]"),
    "an overlap": (
        replaced(norms=entry("F64", [4], 16, 48)),
        "norms overlaps values: it begins at 16, not 24",
    ),
    "two in one place": (
        replaced(labels=entry("I64", [4], 24, 56)),
        "(labels|norms) overlaps (norms|labels): it begins at 24, not 56",
    ),
    "a gap": (
        replaced(labels=entry("I64", [4], 80, 112)),
        "labels leaves a gap behind affine: it begins at 80, not 72",
    ),
    "a gap behind the header": (
        replaced(values=entry("I8", [1, 4, 2, 3], 104, 128)),
        "norms leaves a gap behind the header: it begins at 24, not 0",
    ),
    "data of nothing": (without("labels"), "has 32 bytes too many at its end"),
    "far outside": (
        replaced(labels=entry("I64", [4], 10**30, 10**30 + 32)),
        "labels leaves a gap behind affine",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_with_the_header_is_said(what, tmp_path):
    change, message = WRONG[what]
    header, data = small_header()
    path = tmp_path / "wrong.stf"
    path.write_bytes(raw_bytes(header, data))
    assert file_format.read(path).count == 4
    path.write_bytes(raw_bytes(change(header), data))
    with pytest.raises(ValueError, match=rf"wrong\.stf.*{message}"):
        file_format.read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must be what References.save wrote.* the file has 0"),
        (b"\x10\0\0", "the file has 3"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "must be what References.save wrote, or a .npy file"),
        ((100).to_bytes(8, "little") + b"{}", "would have 100 bytes, the file has 10"),
        (raw_bytes(b"{", b""), "the header must be JSON"),
        (raw_bytes(b"\xff\xfe\xfd", b""), "the header must be JSON"),
        (raw_bytes(b"[" * 100_000, b""), "the header must be JSON"),
        (raw_bytes(b'{"a": 1, "a": 2}', b""), "a key occurs twice"),
        (raw_bytes([1, 2], b""), "the header must be a JSON object, got list"),
        (raw_bytes({}, b""), "format must be"),
    ],
)
def test_a_foreign_file_is_an_error(content, message, tmp_path):
    path = tmp_path / "foreign"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"foreign.*{message}"):
        file_format.read(path)


def test_a_header_too_long_is_not_read(tmp_path):
    path = tmp_path / "long"
    with open(path, "wb") as sparse:
        sparse.write((100_000_001).to_bytes(8, "little"))
        sparse.truncate(200_000_000)
    with pytest.raises(ValueError, match="its header would have 100000001 bytes"):
        file_format.read(path)


@pytest.mark.parametrize(
    ("name", "number", "message"),
    [
        ("norms", float("nan"), "norms must be finite"),
        ("norms", float("-inf"), "norms must be finite"),
        ("affine", float("inf"), "affine must be finite"),
        ("affine", 0.0, "a of affine must be > 0, got 0"),
        ("affine", -0.5, "a of affine must be > 0, got -0.5"),
        ("labels", -1, "labels must be >= 0, got -1"),
    ],
)
def test_numbers_that_cannot_be(name, number, message, tmp_path):
    tensors = contents()
    tensors[name][0] = number
    save_file(tensors, tmp_path / "refs.stf", METADATA)
    with pytest.raises(ValueError, match=rf"refs\.stf: {message}"):
        file_format.read(tmp_path / "refs.stf")


def test_a_truncated_file_is_an_error_that_says_how_much_is_missing(tmp_path):
    header, data = small_header()
    whole = raw_bytes(header, data)
    path = tmp_path / "short"
    for missing in range(1, len(whole) + 1):
        path.write_bytes(whole[:-missing])
        message = f"short is truncated: {missing} bytes are missing"
        if missing > len(data):
            message = "its header would have|the file has"
        with pytest.raises(ValueError, match=message):
            file_format.read(path)
    path.write_bytes(whole + b"\0\0\0")
    with pytest.raises(ValueError, match="short has 3 bytes too many at its end"):
        file_format.read(path)


@given(st.data())
def test_damage_is_a_value_error_or_harmless(tmp_path_factory, data):
    """No other exception, whatever byte of the header is changed."""
    header, body = small_header()
    content = bytearray(raw_bytes(header, body))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - len(body) - 1))] = data.draw(
            st.integers(0, 255)
        )
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(content)
    found, message = None, "damaged"
    try:
        found = file_format.read(path)
    except ValueError as error:
        message = str(error)
    assert "damaged" in message
    assert found is None or found.values("cpu").load().shape == (1, 4, 6)


# Levels in a .npy file.


def save_npy(path: Path, array: np.ndarray) -> bytes:
    np.save(path, array)
    return path.read_bytes()


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_levels_of_a_npy_file_are_read(version, tmp_path):
    levels = helpers.random_bytes(N, *SHAPE)
    with open(tmp_path / "levels", "wb") as file:  # what it is says its content, not its name
        np.lib.format.write_array(file, levels.numpy(), version)
    found = file_format.read(tmp_path / "levels")
    assert (found.limbs, found.count, found.shape, found.raw) == (1, N, SHAPE, True)
    assert (found.labels, found.log_weight) == (None, None)
    expected = (levels.int() - 128).to(torch.int8).flatten(1)[None]
    assert torch.equal(found.values("cpu").load(), expected)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 3), np.int8), "must hold uint8 levels, got int8"),
        (np.zeros((4, 3), np.float32), r"got float32; other data is for References\(data\)"),
        (np.zeros((4, 3), ">u2"), "must hold uint8 levels, got >u2"),
        (np.zeros((4, 3), [("a", "u1")]), "must hold uint8 levels"),
        (np.asfortranarray(np.zeros((4, 3), np.uint8)), "C order.*numpy.ascontiguousarray"),
        (np.zeros(5, np.uint8), r"must be \[n, \*shape\] with n >= 1, got \[5\]"),
        (np.zeros((), np.uint8), r"must be \[n, \*shape\]"),
        (np.zeros((0, 3), np.uint8), r"got \[0, 3\]"),
        (np.zeros((3, 0), np.uint8), r"got \[3, 0\]"),
    ],
)
def test_an_array_that_holds_no_levels_is_an_error(array, message, tmp_path):
    save_npy(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match=rf"a\.npy.*{message}"):
        file_format.read(tmp_path / "a.npy")


def test_a_truncated_npy_file_is_an_error(tmp_path):
    path = tmp_path / "a.npy"
    whole = save_npy(path, np.zeros((4, 3, 5), np.uint8))
    for missing in range(1, len(whole) - 6):
        path.write_bytes(whole[:-missing])
        says = f"is truncated: {missing} bytes are missing" if missing <= 60 else "cannot be read"
        with pytest.raises(ValueError, match=rf"a\.npy {says}|a\.npy is a .npy file that {says}"):
            file_format.read(path)
    path.write_bytes(whole + whole)
    with pytest.raises(ValueError, match=f"has {len(whole)} bytes behind its array"):
        file_format.read(path)


def npy(header: str, version: bytes = b"\x01\x00") -> bytes:
    text = header.encode()
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    "content",
    [
        npy("{'descr': '|u1', 'fortran_order': False, 'shape': (4, 3)}", b"\x03\x00"),
        npy("{'descr': '|u1', 'fortran_order': False, 'shape': (-4, 3)}"),
        npy("{'descr': '|u1', 'fortran_order': False, 'shape': (4.0, 3)}"),
        npy("{'descr': '|u1', 'fortran_order': False}"),
        npy("{'descr': 'nothing', 'fortran_order': False, 'shape': (4, 3)}"),
        npy("{(((("),
        npy("'"),
        npy('"""'),
        npy("1L if"),
        npy("{'a': 1}" * 2000),
    ],
)
def test_a_damaged_npy_header_is_an_error(content, tmp_path):
    (tmp_path / "a.npy").write_bytes(content + bytes(12))
    with pytest.raises(ValueError, match=r"a\.npy"):
        file_format.read(tmp_path / "a.npy")
