"""Wherever the digits are, they arrive the same, a few at a time, and nothing is left over."""

from __future__ import annotations

import copy
import os
import pickle
import random
import subprocess
import sys
import textwrap
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import helpers
import pytest
import torch
from torch import Tensor

from stf_kernels import storage
from stf_kernels.storage import Flipped, Host, OnFile, Resident, Values

ROOT = Path(__file__).parents[1]
N, WIDTH, DIM = 301, 5, 15
SIZES = [1, 7, 100, 128, 150, N - 1, N, N + 1, 2 * N - 1, 10**9]


def random_digits(limbs: int = 1, n: int = N, dim: int = DIM, seed: int = 0) -> Tensor:
    shape = (limbs, n, dim)
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=helpers.generator(seed))


def on_file(digits: Tensor, folder: Path, offset: int = 1003, **options) -> OnFile:
    path = folder / "digits"
    path.write_bytes(b"\x55" * offset + digits.numpy().tobytes() + b"\x55" * 9)
    return OnFile(path, offset, *digits.shape, **options)


def raw_file(digits: Tensor, folder: Path) -> OnFile:
    return on_file((digits.int() + 128).byte(), folder, raw=True)


def with_mirror_images(digits: Tensor) -> Tensor:
    order = [row + j for row in range(0, DIM, WIDTH) for j in reversed(range(WIDTH))]
    return torch.cat([digits, digits[:, :, order]], 1)


class Case(NamedTuple):
    values: Values
    digits: Tensor  # what it holds


def resident(limbs: int, folder: Path) -> Case:
    digits = random_digits(limbs)
    return Case(Resident(digits), digits)


def file(limbs: int, folder: Path) -> Case:
    digits = random_digits(limbs)
    return Case(on_file(digits, folder), digits)


def raw(limbs: int, folder: Path) -> Case:
    digits = random_digits(limbs)
    return Case(raw_file(digits, folder), digits)


def flipped(build: Callable[[int, Path], Case]) -> Callable[[int, Path], Case]:
    def case(limbs: int, folder: Path) -> Case:
        values, digits = build(limbs, folder)
        return Case(Flipped(values, WIDTH), with_mirror_images(digits))

    return case


BUILDERS = {
    "resident": resident,
    "file": file,
    "raw": raw,
    "flipped resident": flipped(resident),
    "flipped file": flipped(file),
    "flipped raw": flipped(raw),
}


@pytest.fixture(params=BUILDERS)
def build(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[int], Case]:
    return lambda limbs: BUILDERS[request.param](limbs, tmp_path)


@pytest.fixture(params=[1, 2, 4])
def case(request: pytest.FixtureRequest, build: Callable[[int], Case]) -> Case:
    return build(request.param)


def assert_arrives(values: Values, digits: Tensor, size: int) -> None:
    """The chunks are the digits, all but the last of them full."""
    chunks = [chunk.clone() for chunk in map(checked, values.chunks(size))]
    n = digits.shape[1]
    assert [c.shape[1] for c in chunks] == [min(size, n - s) for s in range(0, n, size)]
    assert torch.equal(torch.cat([digits[:, :0], *chunks], 1), digits)


def checked(chunk: Tensor) -> Tensor:
    assert chunk.dtype == torch.int8
    assert chunk.is_contiguous()
    return chunk


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("stf-chunks")]


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert threads() == []


def test_chunks_are_the_digits(case):
    values, digits = case
    assert (values.limbs, values.count, values.dim) == digits.shape
    assert values.device == digits.device
    for size in SIZES:
        assert_arrives(values, digits, size)
    assert torch.equal(checked(values.load()), digits)


def test_gather_takes_any_order(case):
    values, digits = case
    n = digits.shape[1]
    for index in ([], [n - 1], [0, n - 1, 0, n // 2], torch.randperm(n).tolist()):
        index = torch.tensor(index, dtype=torch.int64)
        assert torch.equal(checked(values.gather(index)), digits[:, index])


@pytest.mark.parametrize("index", [[-1], [N], [0, N + 7]])
@pytest.mark.parametrize("kind", ["file", "raw"])
def test_gather_outside_is_an_error(kind, index, tmp_path):
    values = BUILDERS[kind](2, tmp_path).values
    with pytest.raises(IndexError):
        values.gather(torch.tensor(index))


def test_a_part_is_a_part(case):
    values, digits = case
    n = digits.shape[1]
    cuts = [0, 1, 128, 150, N - 1, N, N + 1, 400, n]
    for start in cuts:
        for stop in (c for c in cuts if start <= c <= n):
            part, expected = values.part(start, stop), digits[:, start:stop]
            assert part.count == stop - start
            assert torch.equal(part.load(), expected)
            assert_arrives(part, expected, 100)
            index = torch.randint(0, max(1, stop - start), (9 if stop > start else 0,))
            assert torch.equal(part.gather(index), expected[:, index])


def test_a_part_of_a_part(case):
    values, digits = case
    assert_arrives(values.part(40, 250).part(30, 200), digits[:, 70:240], 64)
    assert torch.equal(values.part(40, 250).part(5, 6).load(), digits[:, 45:46])


@pytest.mark.parametrize(("start", "stop"), [(-1, 5), (5, 4), (0, 2 * N + 1)])
def test_a_part_outside_is_an_error(case, start, stop):
    with pytest.raises(IndexError, match=rf"0\.\.{case.values.count}, got {start}\.\.{stop}"):
        case.values.part(start, stop)


@pytest.mark.parametrize("kind", BUILDERS)
def test_what_it_is_called(kind, tmp_path):
    values = BUILDERS[kind](1, tmp_path).values
    expected = "resident" if "resident" in kind else "file"
    assert values.placement == expected
    assert values.part(3, 9).placement == expected


def test_whole_chunks_of_memory_and_file_are_not_copied(tmp_path):
    digits = random_digits()
    (chunk,) = Resident(digits).part(7, 90).chunks(100)
    assert chunk.data_ptr() == digits[:, 7].data_ptr()
    several = random_digits(limbs=3)
    assert next(Resident(several).chunks(N)).data_ptr() == several.data_ptr()
    assert Resident(several).staging(N) == 0
    # A mapping of the file begins on a page; memory of this process begins on 16 bytes.
    chunk = next(on_file(several, tmp_path, offset=1003).chunks(N))
    assert chunk.data_ptr() % 4096 == 1003


def test_writing_to_a_chunk_does_not_reach_the_file(case):
    values, digits = case
    if values.placement == "file":
        for chunk in values.chunks(50):
            chunk.zero_()
        assert_arrives(values, digits, 60)


def test_pickles_and_copies_read_the_same_file(case):
    values, digits = case
    for again in (pickle.loads(pickle.dumps(values)), copy.deepcopy(values)):
        assert_arrives(again.part(20, 280), digits[:, 20:280], 100)


def test_to_the_device_it_is_on(case):
    values, digits = case
    moved = values.to(torch.device("cpu"))
    assert moved.placement == values.placement
    assert_arrives(moved, digits, 100)


def test_host_memory_for_the_cpu_is_resident():
    digits = random_digits()
    moved = Host(digits, torch.device("cuda:0")).to(torch.device("cpu"))
    assert moved.placement == "resident"
    assert moved.load().data_ptr() == digits.data_ptr()


def test_modes_of_the_caller_do_not_matter(case):
    """The thread has none of them."""
    values, digits = case
    with torch.inference_mode():
        assert_arrives(values, digits, 100)
    with torch.device("meta"):
        assert next(values.chunks(N)).shape[1] == N
        assert torch.equal(values.load(), digits)
        assert torch.equal(values.gather(torch.tensor([3, 1], device="cpu")), digits[:, [3, 1]])


def test_several_at_the_same_time(case):
    values, digits = case
    failures = []

    def walk(size: int) -> None:
        try:
            for _ in range(3):
                assert_arrives(values, digits, size)
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=walk, args=(size,)) for size in (3, 50, 128, N)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert failures == []


def test_two_by_turns(case):
    values, digits = case
    first, second = values.chunks(100), values.chunks(100)
    for start in range(0, digits.shape[1], 100):
        a, b = next(first), next(second)
        assert torch.equal(a, digits[:, start : start + 100])
        assert torch.equal(b, a)
    assert (next(first, None), next(second, None)) == (None, None)


# The thread.


def test_the_next_is_made_while_one_is_in_use_and_no_more():
    parts = [(10 * i, 10 * i + 10) for i in range(6)]
    begun = [threading.Event() for _ in parts]
    taken = 0

    def make(i: int, start: int, stop: int) -> tuple[int, int]:
        begun[i].set()
        assert i <= taken + 1, f"{i} is made while {taken} are taken"
        assert threading.current_thread().name.startswith("stf-chunks")
        return start, stop

    for i, made in enumerate(storage.made_ahead(parts, make)):
        assert made == parts[i]
        taken = i
        assert i + 1 == len(parts) or begun[i + 1].wait(30)
        taken = i + 1
    assert list(storage.made_ahead([], make)) == []


@pytest.mark.parametrize("bad", [0, 1, 3])
def test_an_error_of_the_thread_is_raised_where_its_chunk_is_asked_for(bad):
    def make(i: int, start: int, stop: int) -> int:
        if i == bad:
            raise OSError("the disk is gone")
        return i

    walk = storage.made_ahead([(0, 1)] * 4, make)
    assert [next(walk) for _ in range(bad)] == list(range(bad))
    with pytest.raises(OSError, match="the disk is gone"):
        next(walk)
    assert threads() == []


@pytest.mark.parametrize("kind", ["file", "raw", "flipped file"])
def test_an_abandoned_walk_leaves_no_thread(kind, tmp_path):
    values = BUILDERS[kind](1, tmp_path).values

    def fail() -> None:
        for _ in values.chunks(50):
            assert threads()
            raise KeyError("the user's")

    with pytest.raises(KeyError):
        fail()
    assert threads() == []
    for _ in values.chunks(50):
        break
    assert threads() == []
    walk = values.chunks(50)
    next(walk)
    walk.close()
    assert threads() == []
    values.chunks(50)  # never begun
    assert threads() == []


# The file.


def test_no_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        OnFile(tmp_path / "nowhere", 0, 1, 1, 1)


def test_a_short_file_is_an_error_that_says_how_short(tmp_path):
    path = tmp_path / "short"
    path.write_bytes(bytes(100))
    assert OnFile(path, 10, 2, 9, 5).load().shape == (2, 9, 5)
    with pytest.raises(ValueError, match=r"short is 7 bytes too short"):
        OnFile(path, 17, 2, 9, 5)


@pytest.mark.parametrize("kind", ["file", "raw"])
@pytest.mark.parametrize("limbs", [1, 2])
def test_a_file_cut_while_in_use_is_an_error(kind, limbs, tmp_path):
    """And not the signal that reading a mapping behind the end is."""
    n, dim = 4000, 64  # many pages
    digits = random_digits(limbs, n, dim)
    values = (raw_file if kind == "raw" else on_file)(digits, tmp_path)
    walk = values.chunks(1000)
    assert torch.equal(next(walk), digits[:, :1000])
    keep = (tmp_path / "digits").stat().st_size - 9 - dim * n // 2
    os.truncate(tmp_path / "digits", keep)
    cut = "digits was cut while in use: [0-9]+ bytes are missing"
    with pytest.raises(OSError, match=cut):
        list(walk)
    with pytest.raises(OSError, match=cut):
        values.load()
    with pytest.raises(OSError, match=f"{cut}$"):
        values.gather(torch.tensor([0, n - 1]))
    kept = values.part(0, n // 2 - 1)
    if limbs == 1:
        assert torch.equal(kept.load(), digits[:, : n // 2 - 1])


def test_a_file_replaced_or_deleted_is_still_read(tmp_path):
    digits, other = random_digits(seed=1), random_digits(seed=2)
    values = on_file(digits, tmp_path)
    (tmp_path / "digits").rename(tmp_path / "moved")
    new = on_file(other, tmp_path)
    (tmp_path / "moved").unlink()
    assert_arrives(values, digits, 100)
    assert_arrives(copy.deepcopy(values), digits, 100)
    assert_arrives(new, other, 100)


def test_another_process_does_not_take_another_file_for_this_one(tmp_path):
    pickled = pickle.dumps(on_file(random_digits(seed=1), tmp_path))
    on_file(random_digits(seed=2), tmp_path)
    os.utime(tmp_path / "digits", ns=(0, 0))
    with pytest.raises(ValueError, match="digits has changed since its references were read"):
        pickle.loads(pickled)


def test_chunks_that_are_kept_are_read_again(tmp_path):
    digits = random_digits(n=3000)
    chunks = list(on_file(digits, tmp_path).chunks(1000))
    assert torch.equal(torch.cat(chunks, 1), digits)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux")
def test_the_file_is_closed_with_the_last_that_reads_it(tmp_path):
    def open_files() -> int:
        links = (os.path.realpath(link) for link in Path("/proc/self/fd").iterdir())
        return sum(link == str((tmp_path / "digits").resolve()) for link in links)

    values = on_file(random_digits(), tmp_path)
    part, walk = values.part(10, 20), values.chunks(100)
    next(walk)
    assert open_files() >= 1
    del values
    assert part.load().shape[1] == 10
    del part
    walk.close()
    del walk
    assert open_files() == 0


def test_where_there_is_no_preadv(build, monkeypatch):
    monkeypatch.delattr(os, "preadv", raising=False)
    values, digits = build(2)
    assert_arrives(values, digits, 100)
    assert torch.equal(values.gather(torch.tensor([5, 3])), digits[:, [5, 3]])


# Memory.

WALKS = """
    import ctypes, json, re, sys
    from pathlib import Path
    import torch
    from stf_kernels.storage import Flipped, OnFile

    def peak():
        return 1024 * int(re.findall(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[0])

    def walk(values):
        size = (16 << 20) // (4096 * values.limbs)
        rows = 0
        for chunk in values.chunks(size):
            rows += chunk.shape[1]
            chunk.max()
        assert rows == values.count
        return values.staging(size)

    def gather(values):
        return values.gather(torch.arange(0, values.count, 40)).nbytes

    path, rows = sys.argv[1], int(sys.argv[2])
    one = OnFile(path, 1000, 1, rows, 4096)
    cases = {
        "file": (walk, one),
        "raw": (walk, OnFile(path, 1000, 1, rows, 4096, raw=True)),
        "limbs": (walk, OnFile(path, 1000, 2, rows // 2, 4096)),
        "flipped": (walk, Flipped(one, 32)),
        "gather": (gather, one),
    }
    for name, (use, values) in cases.items():
        use(values.part(0, 5000))  # loads what the libraries load at the first call
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = peak()
        expected = use(values)
        print(name, expected, peak() - before)
"""


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, int]]:
    """What walks in a fresh process should and do take, bytes; the file has 640 MB."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux")
    path, rows = tmp_path_factory.mktemp("large") / "sparse", 160_000
    with open(path, "wb") as sparse:
        sparse.truncate(1000 + rows * 4096)
    command = [sys.executable, "-c", textwrap.dedent(WALKS), str(path), str(rows)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    lines = map(str.split, done.stdout.splitlines())
    return {name: (int(expected), int(measured)) for name, expected, measured in lines}


@pytest.mark.parametrize("kind", ["file", "raw", "limbs", "flipped", "gather"])
def test_memory_does_not_grow_with_the_file(kind, grown):
    """What is resident beside the set is what `staging` says, or what `gather` returns."""
    expected, measured = grown[kind]
    assert expected <= 64 << 20
    assert 0.7 * expected < measured < expected + (8 << 20)


# A GPU's streams, simulated: what is queued runs when it must, in any order that events allow.


class Stream:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.queue = gpu, deque()
        gpu.streams.append(self)

    def wait_event(self, event: Event) -> None:
        happened = event.last
        self.gpu.put(self, lambda: happened.is_set())

    def wait_stream(self, other: Stream) -> None:
        event = Event(self.gpu)
        event.record(other)
        self.wait_event(event)
        self.gpu.joined = True


class Event:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.last = gpu, threading.Event()
        self.last.set()

    def record(self, stream: Stream) -> None:
        happened = self.last = threading.Event()
        self.gpu.put(stream, lambda: happened.set() or True)

    def synchronize(self) -> None:
        self.gpu.run_until(self.last.is_set)


class Gpu:
    """Queues of operations, run as late as possible; each returns whether it could run."""

    def __init__(self, pick: Callable[[list[Stream]], Stream]) -> None:
        self.pick, self.streams, self.lock = pick, [], threading.RLock()
        self.main = Stream(self)
        self.current = threading.local()
        self.bytes = self.pinned = 0
        self.joined = False

    def put(self, stream: Stream, operation: Callable[[], bool]) -> None:
        with self.lock:
            stream.queue.append(operation)

    def run_until(self, done: Callable[[], bool]) -> None:
        with self.lock:
            waiting = list(self.streams)
            while not done():
                assert waiting, "the streams wait for each other"
                stream = self.pick(waiting)
                if stream.queue and stream.queue[0]():
                    stream.queue.popleft()
                    waiting = list(self.streams)
                else:
                    waiting.remove(stream)

    def finish(self) -> None:
        self.run_until(lambda: not any(stream.queue for stream in self.streams))

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self.current.stream = stream
        yield
        self.current.stream = self.main

    def copy(self, to: Tensor, digits: Tensor) -> None:
        assert to.is_contiguous()
        assert digits.is_contiguous()
        self.put(self.current.stream, lambda: to.copy_(digits) is to)

    def empty(self, size: int, device: torch.device, *, pinned: bool = False) -> Tensor:
        buffer = torch.zeros(size, dtype=torch.int8)
        if device.type == "cuda":
            self.bytes += size
            # The tensor that had this memory before is still being written.
            self.put(self.main, lambda: buffer.fill_(77) is buffer)
        self.pinned += size * pinned
        return buffer


PICKS = {
    "caller first": lambda streams: streams[0],
    "copies first": lambda streams: streams[-1],
    "shuffled": random.Random(0).choice,
}


@pytest.fixture(params=PICKS)
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu(PICKS[request.param])
    monkeypatch.setattr(storage, "empty", gpu.empty)
    monkeypatch.setattr(storage, "copy_ahead", gpu.copy)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(gpu))
    monkeypatch.setattr(torch.cuda, "Event", lambda blocking=False: Event(gpu))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: gpu.main)
    monkeypatch.setattr(torch.cuda, "stream", gpu.stream)
    return gpu


def for_gpu(kind: str, digits: Tensor, folder: Path) -> Values:
    device = torch.device("cuda:0")
    if kind == "host":
        return Host(digits, device)
    return (raw_file if kind == "raw" else on_file)(digits, folder).to(device)


@pytest.mark.parametrize("kind", ["host", "file", "raw"])
@pytest.mark.parametrize("limbs", [1, 3])
@pytest.mark.parametrize("size", [10, 50, N - 1, N])
def test_a_gpu_gets_the_digits_whatever_runs_first(kind, limbs, size, gpu, tmp_path):
    digits = random_digits(limbs)
    values = for_gpu(kind, digits, tmp_path)
    seen: list[Tensor] = []

    def use(chunk: Tensor) -> bool:
        seen.append(chunk.clone())
        return True

    for chunk in map(checked, values.chunks(size)):
        gpu.put(gpu.main, partial(use, chunk))
    assert gpu.bytes == values.staging(size) == limbs * size * DIM * (1 if size == N else 2)
    assert gpu.pinned == (0 if kind == "host" else gpu.bytes)
    gpu.finish()
    assert torch.equal(torch.cat(seen, 1), digits)


@pytest.mark.parametrize("kind", ["host", "raw"])
def test_a_gpu_is_waited_for_when_a_walk_is_abandoned(kind, gpu, tmp_path):
    """What is copied into memory that another tensor gets would spoil that tensor."""
    walk = for_gpu(kind, random_digits(), tmp_path).chunks(50)
    next(walk)
    walk.close()
    assert gpu.joined
    assert threads() == []
    copies = gpu.streams[-1]
    gpu.run_until(lambda: not gpu.main.queue)
    assert not copies.queue


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("limbs", [1, 3])
@pytest.mark.parametrize("kind", ["host", "file", "raw", "flipped"])
def test_on_a_gpu(kind, limbs, tmp_path):
    n, dim = 20_000, 5 * 64
    digits = random_digits(limbs, n, dim)
    values = for_gpu("file" if kind == "flipped" else kind, digits, tmp_path)
    if kind == "host":
        values = Host(digits.pin_memory(), values.device)
    if kind == "flipped":
        values = Flipped(values, 5)
        digits = torch.cat([digits, digits.view(-1, 5).flip(1).view(digits.shape)], 1)
    expected = digits.to(values.device)
    for size in (128, 5000, 15_000, 10**9):
        out, start = torch.zeros_like(expected), 0
        for chunk in values.chunks(size):
            torch.cuda._sleep(1_000_000)  # the copies overtake if they can
            out[:, start : start + chunk.shape[1]] = checked(chunk)
            start += chunk.shape[1]
        assert torch.equal(out, expected)
    index = torch.tensor([5, 0, n - 1], device=values.device)
    assert torch.equal(values.gather(index), expected[:, index])
    assert torch.equal(values.part(100, 900).load(), expected[:, 100:900])
