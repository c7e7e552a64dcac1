"""Where the digits of references are: on the device, on the host, in a file; and mirrored besides.

What is elsewhere than where it is computed with arrives in chunks, each made by a thread while the
one before is in use, so that about two of them are in memory however large the set.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

LOAD_BYTES = 32 << 20  # a chunk of a set that is brought in whole
MIRROR_BYTES = 1 << 20  # mirrored at a time on a CPU: what a cache holds

T = TypeVar("T")


class Values(Protocol):
    """The int8 digits [R, n, d] of references, wherever they are.

    Any number of threads may ask at the same time. On a GPU what is returned belongs to the stream
    that is current at the call; chunks, to the one that is current when the first is asked for.
    """

    device: torch.device  # where everything arrives
    placement: str  # "resident", "host" or "file"
    limbs: int  # R
    count: int  # n
    dim: int  # d

    def chunks(self, size: int) -> Iterator[Tensor]:
        """All of it in order, contiguous [R, <= size, d], each good until the next is asked for."""
        ...

    def staging(self, size: int) -> int:
        """Bytes of the device's memory that `chunks(size)` takes beside the set itself."""
        ...

    def gather(self, index: Tensor) -> Tensor:
        """The references at `index`, int64 [m] on the device: [R, m, d]."""
        ...

    def part(self, start: int, stop: int) -> Values:
        """The references from `start` up to `stop`, maybe none, where they are."""
        ...

    def load(self) -> Tensor:
        """All of it as one contiguous tensor on the device."""
        ...

    def to(self, device: torch.device) -> Values:
        """The same for another device; on a host or in a file they stay there."""
        ...


class Resident:
    """Digits on the device that computes: chunks are views, but for several limbs copies.

    Args:
        tensor: int8 [R, n, d]
    """

    placement = "resident"

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.device = tensor.device
        self.limbs, self.count, self.dim = tensor.shape

    def chunks(self, size: int) -> Iterator[Tensor]:
        buffer = empty(self.staging(size), self.device)
        for start, stop in cuts(self.count, size):
            chunk = self.tensor[:, start:stop]
            yield chunk if chunk.is_contiguous() else block(buffer, chunk).copy_(chunk)

    def staging(self, size: int) -> int:
        if self.limbs == 1 or (size >= self.count and self.tensor.is_contiguous()):
            return 0
        return self.limbs * min(size, self.count) * self.dim

    def gather(self, index: Tensor) -> Tensor:
        return self.tensor.index_select(1, index)

    def part(self, start: int, stop: int) -> Resident:
        return Resident(self.tensor[:, within(start, stop, self.count)])

    def load(self) -> Tensor:
        return self.tensor.contiguous()

    def to(self, device: torch.device) -> Resident:
        return Resident(self.tensor.to(device))


class Host:
    """Digits in the CPU's memory that pass over to a GPU.

    Args:
        tensor: int8 [R, n, d] in pinned memory
        device: the GPU
    """

    placement = "host"

    def __init__(self, tensor: Tensor, device: torch.device) -> None:
        self.tensor = tensor
        self.device = device
        self.limbs, self.count, self.dim = tensor.shape

    def chunks(self, size: int) -> Iterator[Tensor]:
        def fetch(start: int, stop: int, buffer: Tensor) -> Tensor:
            return self.tensor[:, start:stop]

        return sent(self, size, fetch, buffered=False)

    def staging(self, size: int) -> int:
        return slot_bytes(self, size) * len(cuts(self.count, size)[:2])

    def gather(self, index: Tensor) -> Tensor:
        return self.tensor.index_select(1, index.cpu()).to(self.device)

    def part(self, start: int, stop: int) -> Host:
        return Host(self.tensor[:, within(start, stop, self.count)], self.device)

    def load(self) -> Tensor:
        return self.tensor.contiguous().to(self.device)

    def to(self, device: torch.device) -> Values:
        return Resident(self.tensor) if device.type == "cpu" else Host(self.tensor, device)


class OnFile:
    """Digits in a file, which stays open: deleting or replacing it changes nothing here.

    Args:
        path: the file
        offset: where the digits begin in it, bytes
        limbs, count, dim: R, n, d; the file holds [R, n, d]
        device: where chunks go
        raw: the bytes are levels 0 to 255, and the digit of a level u is u - 128

    Raises:
        ValueError: the file ends before the digits do
    """

    placement = "file"

    def __init__(
        self,
        path: str | os.PathLike[str] | File,
        offset: int,
        limbs: int,
        count: int,
        dim: int,
        *,
        device: torch.device | str = "cpu",
        raw: bool = False,
    ) -> None:
        self._file = path if isinstance(path, File) else File(path)
        self._offset, self._plane, self._raw = offset, count * dim, raw
        self.device = torch.device(device)
        self.limbs, self.count, self.dim = limbs, count, dim
        missing = offset + limbs * count * dim - self._file.size()
        if missing > 0:
            raise ValueError(f"{self._file.path} is {missing} bytes too short")

    def chunks(self, size: int) -> Iterator[Tensor]:
        if self.device.type != "cpu":
            return sent(self, size, self._fill, buffered=True)
        return self._mapped(size) if self._maps(size) else filled(self, size, self._fill)

    def staging(self, size: int) -> int:
        return slot_bytes(self, size) * len(cuts(self.count, size)[:2])

    def gather(self, index: Tensor) -> Tensor:
        out = empty(self.limbs * len(index) * self.dim, torch.device("cpu"))
        out = out.view(self.limbs, len(index), self.dim)
        positions = index.tolist()
        if positions and not 0 <= min(positions) <= max(positions) < self.count:
            raise IndexError(f"index must lie in 0..{self.count - 1}")
        for plane, rows in enumerate(out.numpy()):
            for row, position in zip(rows, positions, strict=True):
                self._read(plane, position, row)
        return self._digits(out).to(self.device)

    def part(self, start: int, stop: int) -> OnFile:
        rows = within(start, stop, self.count)
        part = OnFile.__new__(OnFile)
        part.__dict__.update(vars(self))
        part._offset, part.count = self._offset + rows.start * self.dim, rows.stop - rows.start
        return part

    def load(self) -> Tensor:
        return loaded(self)

    def to(self, device: torch.device) -> OnFile:
        moved = self.part(0, self.count)
        moved.device = device
        return moved

    def _maps(self, size: int) -> bool:
        """Whether a chunk is one piece of the file, digit for digit."""
        whole = size >= self.count and self._plane == self.count * self.dim
        return not self._raw and (self.limbs == 1 or whole)

    def _mapped(self, size: int) -> Iterator[Tensor]:
        def make(i: int, start: int, stop: int) -> tuple[mmap.mmap, Tensor]:
            length = self.limbs * (stop - start) * self.dim
            pages, digits = self._file.mapped(self._offset + start * self.dim, length)
            return pages, torch.from_numpy(digits).view(self.limbs, stop - start, self.dim)

        with closing(made_ahead(cuts(self.count, size), make)) as ahead:
            for pages, chunk in ahead:
                yield chunk
                # Before one more is brought in, and though the caller may still hold it: whoever
                # reads it nevertheless reads the file again.
                if hasattr(mmap, "MADV_DONTNEED"):
                    pages.madvise(mmap.MADV_DONTNEED)

    def _fill(self, start: int, stop: int, buffer: Tensor) -> Tensor:
        for plane, rows in enumerate(buffer.numpy()):
            self._read(plane, start, rows.reshape(-1))
        return self._digits(buffer)

    def _read(self, plane: int, start: int, out: np.ndarray) -> None:
        """Bytes of one plane from reference `start` on."""
        self._file.read(self._offset + plane * self._plane + start * self.dim, out)

    def _digits(self, read: Tensor) -> Tensor:
        """Digits of what was read, in place."""
        if self._raw:
            levels = read.numpy().view(np.uint8)
            np.bitwise_xor(levels, np.uint8(0x80), out=levels)
        return read


class Flipped:
    """Twice as many: references 0..n-1 as they are, and n..2n-1 their mirror images.

    Nothing is stored twice; mirror images are made as they are asked for.

    Args:
        values: the references
        width: values in a row of an image: d is any number of rows, each of which is reversed
    """

    def __init__(self, values: Values, width: int) -> None:
        self._values, self._width, self._first = values, width, 0
        self.device, self.placement = values.device, values.placement
        self.limbs, self.count, self.dim = values.limbs, 2 * values.count, values.dim

    def chunks(self, size: int) -> Iterator[Tensor]:
        plain, mirrored = self._halves()
        # A chunk that holds some of both begins where the last full one of the first half ends.
        full = plain.count if mirrored.count == 0 else plain.count // size * size
        yield from plain.part(0, full).chunks(size)
        buffer = empty(slot_bytes(self, size) if mirrored.count else 0, self.device)
        rest, begun = plain.count - full, 0
        if rest > 0:
            begun = min(size - rest, mirrored.count)
            both = buffer[: self.limbs * (rest + begun) * self.dim]
            both = both.view(self.limbs, rest + begun, self.dim)
            for chunk in plain.part(full, plain.count).chunks(size):
                both[:, :rest] = chunk
            for chunk in mirrored.part(0, begun).chunks(size):
                mirror(chunk, self._width, both[:, rest:])
            del chunk  # its pages, before the next ones come
            yield both
        for chunk in mirrored.part(begun, mirrored.count).chunks(size):
            yield mirror(chunk, self._width, block(buffer, chunk))

    def staging(self, size: int) -> int:
        chunk = slot_bytes(self, size)
        # Beside the mirrored chunk: on a CPU the C library may keep an earlier walk's, on a GPU
        # there is a copy.
        return self._values.staging(size) + 2 * chunk

    def gather(self, index: Tensor) -> Tensor:
        n, position = self._values.count, self._first + index
        plain = position < n
        rows = self._values.gather(torch.where(plain, position, position - n))
        mirrored = mirror(rows, self._width, torch.empty_like(rows))
        return torch.where(plain[:, None], rows, mirrored)

    def part(self, start: int, stop: int) -> Flipped:
        rows = within(start, stop, self.count)
        return self._from(self._values, self._first + rows.start, rows.stop - rows.start)

    def load(self) -> Tensor:
        return loaded(self)

    def to(self, device: torch.device) -> Flipped:
        return self._from(self._values.to(device), self._first, self.count)

    def _from(self, values: Values, first: int, count: int) -> Flipped:
        part = Flipped(values, self._width)
        part._first, part.count = first, count
        return part

    def _halves(self) -> tuple[Values, Values]:
        """What is handed on as it is, and what mirrored."""
        n, first, last = self._values.count, self._first, self._first + self.count
        plain = self._values.part(min(first, n), min(last, n))
        return plain, self._values.part(max(first - n, 0), max(last - n, 0))


def version_of(number: int) -> tuple[int, int]:
    """What tells an open file from what it becomes: its size and when it was written."""
    status = os.fstat(number)
    return status.st_size, status.st_mtime_ns


class File:
    """A file open for reading, by any number of threads.

    Args:
        path: of the file
        version: what `version` of this file was, if another process has opened it before

    Raises:
        ValueError: the file has changed since
    """

    def __init__(
        self, path: str | os.PathLike[str], version: tuple[int, int] | None = None
    ) -> None:
        self.path = os.path.abspath(path)
        self._number = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self._number)
        self.version = version_of(self._number)
        if version is not None and self.version != version:
            raise ValueError(f"{self.path} has changed since its references were read")

    def __reduce__(self) -> tuple[type[File], tuple[str, tuple[int, int]]]:
        return File, (self.path, self.version)

    def __deepcopy__(self, memo: object) -> File:
        return self

    def size(self) -> int:
        """Bytes it has now."""
        return os.fstat(self._number).st_size

    def read(self, offset: int, out: np.ndarray) -> None:
        """Fills `out`, contiguous [bytes] int8 or uint8, from `offset` on."""
        if not hasattr(os, "preadv"):  # Windows
            out[:] = self.mapped(offset, out.size)[1].view(out.dtype)
            return
        view, got = out.data, 0
        while got < out.size:
            more = os.preadv(self._number, [view[got:]], offset + got)
            if more == 0:
                self._check(offset + out.size)
            got += more

    def mapped(self, offset: int, size: int) -> tuple[mmap.mmap, np.ndarray]:
        """A mapping of its own for the bytes from `offset` on, and these, int8 [size].

        They are brought into memory, not copied, and go when the array does. What is written to
        them does not reach the file.
        """
        self._check(offset + size)  # pages that are not there would end the process
        begin = offset - offset % mmap.ALLOCATIONGRANULARITY
        pages = mmap.mmap(
            self._number, offset + size - begin, access=mmap.ACCESS_COPY, offset=begin
        )
        digits = np.frombuffer(pages, np.int8, size, offset - begin)
        digits[:: mmap.PAGESIZE].max()  # reads every page, here and not where they are used
        return pages, digits

    def _check(self, stop: int) -> None:
        missing = stop - self.size()
        if missing > 0:
            raise OSError(f"{self.path} was cut while in use: {missing} bytes are missing")


def made_ahead(
    parts: list[tuple[int, int]], make: Callable[[int, int, int], T]
) -> Generator[T, None, None]:
    """make(i, start, stop) for every part, made by a thread while the one before is in use.

    Two are never made at a time, and make(i) begins when what make(i - 2) gave is used no more. An
    error of the thread is raised where its part is asked for. The thread ends with the generator.
    """
    if not parts:
        return
    with ThreadPoolExecutor(1, thread_name_prefix="stf-chunks") as worker:
        coming = worker.submit(make, 0, *parts[0])
        for following, part in enumerate(parts[1:], 1):
            made = coming.result()
            coming = worker.submit(make, following, *part)
            yield made
        made = coming.result()
        yield made


Fetch = Callable[[int, int, Tensor], Tensor]  # start, stop, a buffer to fill: where the digits are


def filled(values: Values, size: int, fetch: Fetch) -> Iterator[Tensor]:
    """Chunks on the CPU, in two buffers by turns."""
    parts = cuts(values.count, size)
    buffers = [empty(slot_bytes(values, size), torch.device("cpu")) for _ in parts[:2]]

    def make(i: int, start: int, stop: int) -> Tensor:
        return fetch(start, stop, rows_of(buffers[i % 2], values, stop - start))

    return made_ahead(parts, make)


class Slot:
    """One of two places on a GPU where chunks arrive, and the events to wait for."""

    def __init__(self, size: int, device: torch.device, buffered: bool) -> None:
        self.place = empty(size, device)
        self.buffer = empty(size if buffered else 0, torch.device("cpu"), pinned=True)
        self.arrived = torch.cuda.Event(blocking=True)  # the place is written, the buffer read
        self.left = torch.cuda.Event()  # the place is read


def sent(values: Values, size: int, fetch: Fetch, *, buffered: bool) -> Iterator[Tensor]:
    """Chunks on a GPU, copied on a stream of their own while the one before is computed with.

    Args:
        values: whose chunks
        size: references in a chunk
        fetch: gives the digits in pinned memory
        buffered: whether it needs a buffer to fill
    """
    parts = cuts(values.count, size)
    stream, side = torch.cuda.current_stream(values.device), torch.cuda.Stream(values.device)
    slots = [Slot(slot_bytes(values, size), values.device, buffered) for _ in parts[:2]]
    for slot in slots:
        slot.left.record(stream)  # by whatever had this memory before

    def make(i: int, start: int, stop: int) -> tuple[Slot, Tensor]:
        slot = slots[i % 2]
        slot.arrived.synchronize()
        digits = fetch(start, stop, rows_of(slot.buffer, values, stop - start if buffered else 0))
        chunk = rows_of(slot.place, values, stop - start)
        with torch.cuda.stream(side):
            side.wait_event(slot.left)
            for to, plane in zip(chunk, digits, strict=True):
                copy_ahead(to, plane)
            slot.arrived.record(side)
        return slot, chunk

    try:
        with closing(made_ahead(parts, make)) as ahead:
            for slot, chunk in ahead:
                stream.wait_event(slot.arrived)
                yield chunk
                slot.left.record(stream)
    finally:
        stream.wait_stream(side)  # before the places are another tensor's


def copy_ahead(to: Tensor, digits: Tensor) -> None:
    """A copy from pinned memory, on the current stream."""
    to.copy_(digits, non_blocking=True)


def mirror(values: Tensor, width: int, out: Tensor) -> Tensor:
    """Every `width` values of [R, m, d] reversed, into `out`, whose planes are contiguous."""
    for plane, to in zip(values, out, strict=True):
        lines, mirrored = plane.view(-1, width), to.view(-1, width)
        # With a little at a time what `flip` allocates stays in the cache.
        step = max(1, MIRROR_BYTES // width) if plane.device.type == "cpu" else len(lines)
        for start in range(0, len(lines), max(step, 1)):
            mirrored[start : start + step].copy_(lines[start : start + step].flip(1))
    return out


def loaded(values: Values) -> Tensor:
    """All digits as one tensor, brought in chunk by chunk."""
    out = empty(values.limbs * values.count * values.dim, values.device)
    out = out.view(values.limbs, values.count, values.dim)
    start = 0
    for chunk in values.chunks(max(1, LOAD_BYTES // (values.limbs * values.dim))):
        out[:, start : start + chunk.shape[1]] = chunk
        start += chunk.shape[1]
    return out


def cuts(count: int, size: int) -> list[tuple[int, int]]:
    """Where each chunk begins and ends."""
    return [(start, min(start + size, count)) for start in range(0, count, size)]


def within(start: int, stop: int, count: int) -> slice:
    if not 0 <= start <= stop <= count:
        raise IndexError(f"a part must lie in 0..{count}, got {start}..{stop}")
    return slice(start, stop)


def slot_bytes(values: Values, size: int) -> int:
    """Bytes of the largest chunk."""
    return values.limbs * min(size, values.count) * values.dim


def rows_of(buffer: Tensor, values: Values, rows: int) -> Tensor:
    """The beginning of a buffer as [R, rows, d]."""
    return buffer[: values.limbs * rows * values.dim].view(values.limbs, rows, values.dim)


def block(buffer: Tensor, chunk: Tensor) -> Tensor:
    """The beginning of a buffer, shaped like `chunk`."""
    return buffer[: chunk.numel()].view(chunk.shape)


def empty(size: int, device: torch.device, *, pinned: bool = False) -> Tensor:
    """int8 [size] that any thread may write, inference mode or not."""
    if device.type == "cpu" and not pinned:
        return torch.from_numpy(np.empty(size, np.int8))  # on huge pages, which come quicker
    with torch.inference_mode(False):
        return torch.empty(size, dtype=torch.int8, device=device, pin_memory=pinned)
