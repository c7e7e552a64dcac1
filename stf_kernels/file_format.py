"""References in one file, in the safetensors format.

The file is what every safetensors library reads and writes: eight bytes with the length of the
header, the header in JSON, and the tensors, little-endian, one after the other. It holds

    values      I8   [R, n, *shape]   digits v^(r) of the references, least significant plane first
    norms       F64  [n]              N_k = sum_j v_kj^2 + 2 (b/a) sum_j v_kj
    affine      F64  [2]              a, b of y = a v + b
    labels      I64  [n]              classes >= 0; may be missing
    log_weight  F64  [n]              added to the logits; may be missing

with v = sum_r 256^r v^(r), and in the header `"__metadata__": {"format": "stf-kernels references",
"version": "1"}`. Nothing else may be in it. MATH.md, section 3, defines v, a, b and N_k; the norms
are taken as they are, so a wrong one makes wrong targets. `write` puts the values last and at a
multiple of 4096 bytes; a reader does not count on either.

`References.save` writes such a file. Without this package, one of bytes from -1 to 1 is made by

    import numpy as np
    from safetensors.numpy import save_file

    v = (images ^ 128).view(np.int8)                     # images: uint8 [n, 3, 32, 32]
    flat = v.reshape(len(v), -1).astype(np.int64)
    a = 2 / 255
    b = 128 * a - 1
    two_b_over_a = 256 - 2 * 255 / 2                     # 256 + 2 lo 255 / (hi - lo)
    tensors = {
        "values": v[None],
        "norms": (flat**2).sum(1) + two_b_over_a * flat.sum(1),
        "affine": np.array([a, b]),
    }
    save_file(tensors, "images.stf", {"format": "stf-kernels references", "version": "1"})

A .npy file of uint8 [n, *shape] in C order is read as well, as levels that mean what the caller
says.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import tokenize
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

import numpy as np
import torch
from torch import Tensor

from . import arithmetic as ar
from .storage import File, OnFile, Values, version_of

METADATA = {"format": "stf-kernels references", "version": "1"}
DTYPES = {"values": "I8", "norms": "F64", "affine": "F64", "labels": "I64", "log_weight": "F64"}
NUMPY: dict[str, np.dtype[Any]] = {
    "I8": np.dtype("i1"),
    "F64": np.dtype("<f8"),
    "I64": np.dtype("<i8"),
}
OPTIONAL = ("labels", "log_weight")
MAX_HEADER = 100_000_000  # of the safetensors library
ALIGNMENT = 4096
WRITE_BYTES = 32 << 20


@dataclass(frozen=True)
class Found:
    """What a file holds; the digits stay in it."""

    path: str
    version: tuple[int, int]  # of the file, as `storage.File` knows it
    offset: int  # of the digits, bytes
    limbs: int
    count: int
    shape: torch.Size
    raw: bool  # levels, of which nothing else is known
    norms: Tensor  # [n] float64; of levels [0]
    affine: Tensor  # [2] float64; of levels [0]
    labels: Tensor | None = None  # [n] int64
    log_weight: Tensor | None = None  # [n] float64

    def values(self, device: torch.device | str) -> OnFile:
        """The digits, for targets computed on `device`."""
        dim = self.shape.numel()
        file = File(self.path, self.version)
        return OnFile(file, self.offset, self.limbs, self.count, dim, device=device, raw=self.raw)


def read(path: str | os.PathLike[str]) -> Found:
    """Finds the references in a file, all checked but the digits.

    Raises:
        FileNotFoundError: there is none
        ValueError: it is not such a file, or not whole; the message names it and says what is wrong
        RuntimeError: this machine is not little-endian
    """
    _check_machine()
    path = os.path.abspath(path)
    with open(path, "rb") as file:
        numpy = file.read(6) == b"\x93NUMPY"
        file.seek(0)
        return _read_levels(path, file) if numpy else _read_references(path, file)


def write(
    path: str | os.PathLike[str],
    shape: torch.Size,
    values: Values,
    norms: Tensor,
    affine: Tensor,
    labels: Tensor | None,
    log_weight: Tensor | None,
) -> None:
    """Writes references, a few at a time, and puts the file in place once it is whole.

    Args:
        path: of the file; one that is there is replaced
        shape: of a reference
        values: their digits
        norms, affine, labels, log_weight: as in the file
    """
    _check_machine()
    given = {"norms": norms, "affine": affine, "labels": labels, "log_weight": log_weight}
    small = {name: t.cpu().contiguous() for name, t in given.items() if t is not None}
    entries: dict[str, object] = {"__metadata__": METADATA}
    end = 0
    for name, tensor in small.items():
        entries[name] = _entry(name, list(tensor.shape), end)
        end += tensor.nbytes
    entries["values"] = _entry("values", [values.limbs, values.count, *shape], end)
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-(8 + len(header) + end) % ALIGNMENT)
    with _replacing(path) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for tensor in small.values():
            file.write(tensor.numpy().data)
        _write_values(file, values)


def _write_values(file: BinaryIO, values: Values) -> None:
    """Every plane's part of a chunk goes to its place in the file."""
    begin, start, plane = file.tell(), 0, values.count * values.dim
    for chunk in values.chunks(max(1, WRITE_BYTES // (values.limbs * values.dim))):
        for r, digits in enumerate(chunk.cpu().numpy()):
            file.seek(begin + r * plane + start * values.dim)
            file.write(digits.data)
        start += chunk.shape[1]


def _entry(name: str, shape: list[int], begin: int) -> dict[str, object]:
    size = math.prod(shape) * NUMPY[DTYPES[name]].itemsize
    return {"dtype": DTYPES[name], "shape": shape, "data_offsets": [begin, begin + size]}


@contextmanager
def _replacing(given: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file that takes the name once it is on the disk: a kill leaves the old one or the new."""
    path = Path(given).resolve()  # what a link names, not the link
    got = f"got {os.fspath(given)!r}"
    if path.exists() and not path.is_file():
        raise ValueError(f"path must name a file, new or to be replaced, {got}")
    if path.suffix == ".npy":
        raise ValueError(f"path must not end in .npy, which is another format, {got}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path must be in a folder that exists, {got}")
    mode = path.stat().st_mode & 0o777 if path.exists() else None
    number, name = tempfile.mkstemp(".tmp", f"{path.name}.", path.parent)
    temporary = Path(name)
    try:
        with open(number, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if os.name == "posix":
            temporary.chmod(0o666 & ~_umask() if mode is None else mode)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    if os.name == "posix":  # the directory entry, too; other systems cannot open a directory
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _read_references(path: str, file: BinaryIO) -> Found:
    header, begin = _header(path, file)
    _check_metadata(path, header.pop("__metadata__", None))
    names = set(header)
    if names - set(DTYPES) or set(DTYPES) - names - set(OPTIONAL):
        raise ValueError(
            f"{path} must hold values, norms, affine and maybe labels and log_weight, "
            f"got {', '.join(sorted(names)) or 'nothing'}"
        )
    shapes = {name: _checked_shape(path, name, header[name]) for name in names}
    limbs, count, *shape = shapes["values"]
    if len(shapes["values"]) < 3 or not 1 <= limbs <= ar.MAX_LIMBS or 0 in shapes["values"]:
        raise ValueError(
            f"{path}: values must be [1 to {ar.MAX_LIMBS}, n, *shape] with n >= 1, "
            f"got {shapes['values']}"
        )
    for name in names - {"values"}:
        expected = [2] if name == "affine" else [count]
        if shapes[name] != expected:
            raise ValueError(
                f"{path}: {name} must be {expected} with values {shapes['values']}, "
                f"got {shapes[name]}"
            )
    offsets = {name: header[name]["data_offsets"] for name in names}
    _check_places(path, offsets, os.fstat(file.fileno()).st_size - begin)
    tensors = {
        name: _tensor(file, begin + offsets[name][0], shapes[name], DTYPES[name])
        for name in names - {"values"}
    }
    _check_numbers(path, tensors)
    return Found(
        path,
        version_of(file.fileno()),
        begin + offsets["values"][0],
        limbs,
        count,
        torch.Size(shape),
        False,
        **tensors,
    )


def _header(path: str, file: BinaryIO) -> tuple[dict[str, Any], int]:
    """The header's entries, and where the tensors begin in the file."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, MAX_HEADER):
        raise ValueError(
            f"{path} must be what References.save wrote, or a .npy file: as safetensors its header "
            f"would have {length} bytes, the file has {size}"
        )

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key occurs twice")
        return dict(pairs)

    try:
        header = json.loads(file.read(length), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: the header must be JSON: {error}") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path}: the header must be a JSON object, got {type(header).__name__}")
    return header, 8 + length


def _check_metadata(path: str, metadata: object) -> None:
    found = metadata if isinstance(metadata, dict) else {}
    for key, expected in METADATA.items():
        if found.get(key) != expected:
            raise ValueError(f"{path}: {key} must be {expected!r}, got {found.get(key)!r}")


def _checked_shape(path: str, name: str, entry: Any) -> list[int]:
    """The shape of an entry that is sound in itself."""
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape = fields.get("dtype"), fields.get("shape")
    if dtype != DTYPES[name]:
        raise ValueError(f"{path}: {name} must have dtype {DTYPES[name]}, got {dtype!r}")
    if not _are_counts(shape):
        raise ValueError(f"{path}: the shape of {name} must be a list of sizes, got {shape!r}")
    offsets = fields.get("data_offsets")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{path}: data_offsets of {name} must be [begin, end], got {offsets!r}")
    size = math.prod(shape) * NUMPY[dtype].itemsize
    if offsets[1] - offsets[0] != size:
        raise ValueError(
            f"{path}: {name} {shape} must take {size} bytes, got {offsets[1] - offsets[0]}"
        )
    return shape


def _are_counts(numbers: object) -> TypeGuard[list[int]]:
    return isinstance(numbers, list) and all(type(x) is int and x >= 0 for x in numbers)


def _check_places(path: str, offsets: dict[str, list[int]], size: int) -> None:
    """Tensors lie one behind the other from the header's end to the file's."""
    end, before = 0, "the header"
    for name, (start, stop) in sorted(offsets.items(), key=lambda item: item[1]):
        if start != end:
            how = "overlaps" if start < end else "leaves a gap behind"
            raise ValueError(f"{path}: {name} {how} {before}: it begins at {start}, not {end}")
        end, before = stop, name
    if end > size:
        raise ValueError(f"{path} is truncated: {end - size} bytes are missing")
    if end < size:
        raise ValueError(f"{path} has {size - end} bytes too many at its end")


def _tensor(file: BinaryIO, offset: int, shape: list[int], dtype: str) -> Tensor:
    file.seek(offset)
    numbers = np.fromfile(file, NUMPY[dtype], math.prod(shape))
    return torch.from_numpy(numbers).view(shape)


def _check_numbers(path: str, tensors: dict[str, Tensor]) -> None:
    for name in ("norms", "affine"):
        if not bool(tensors[name].isfinite().all()):
            raise ValueError(f"{path}: {name} must be finite")
    if float(tensors["affine"][0]) <= 0:
        raise ValueError(f"{path}: a of affine must be > 0, got {float(tensors['affine'][0]):g}")
    if "labels" in tensors and int(tensors["labels"].min()) < 0:
        raise ValueError(f"{path}: labels must be >= 0, got {int(tensors['labels'].min())}")


def _read_levels(path: str, file: BinaryIO) -> Found:
    formats = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    try:
        version = np.lib.format.read_magic(file)
        if version not in formats:
            raise ValueError(f"version {version[0]}.{version[1]}; save it again with numpy.save")
        shape, fortran, dtype = formats[version](file)
    except (ValueError, SyntaxError, tokenize.TokenError) as error:  # as numpy happens to raise
        raise ValueError(f"{path} is a .npy file that cannot be read: {error}") from None
    if dtype != np.uint8:
        raise ValueError(
            f"{path} must hold uint8 levels, got {dtype}; other data is for References(data), "
            "whose save() writes a file to read"
        )
    if fortran:
        raise ValueError(
            f"{path} must be in C order, got Fortran order; save it again with "
            "numpy.save(path, numpy.ascontiguousarray(array))"
        )
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(f"{path} must be [n, *shape] with n >= 1, got {list(shape)}")
    missing = file.tell() + math.prod(shape) - os.fstat(file.fileno()).st_size
    if missing > 0:
        raise ValueError(f"{path} is truncated: {missing} bytes are missing; save it again")
    if missing < 0:
        raise ValueError(f"{path} has {-missing} bytes behind its array; save one array in a file")
    nothing = torch.empty(0, dtype=torch.float64)
    count, *rest = shape
    version = version_of(file.fileno())
    return Found(path, version, file.tell(), 1, count, torch.Size(rest), True, nothing, nothing)


def _check_machine() -> None:
    if sys.byteorder != "little":
        raise RuntimeError("a file of references is little-endian, which this machine is not")
