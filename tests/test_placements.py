"""References on the device, in a file, mirrored: the same bits from everywhere."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from stf_kernels import (
    References,
    TargetStats,
    file_format,
    handles,
    pipeline,
    stable_target,
    stable_target_with_stats,
)
from stf_kernels.pipeline import Plan

N, ROWS, SHAPE = 300, 11, (3, 5, 4)
LABELS = torch.arange(N) % 3
LOG_WEIGHT = torch.where(torch.arange(N) % 5 == 0, -torch.inf, (torch.arange(N) % 4) / 3).double()


def resident(levels: bool = True) -> References:
    u = helpers.random_bytes(N, *SHAPE, seed=3)
    u[150:] = u[:150]
    u[150:, 0, 0, 0] ^= 1
    if levels:
        return References(u, value_range=(-1, 1), labels=LABELS, log_weight=LOG_WEIGHT)
    return References(helpers.byte_values(u) / 3, limbs=3, labels=LABELS, log_weight=LOG_WEIGHT)


def mirrored_twin(refs: References) -> References:
    """Both halves written out, prepared anew."""
    y = refs.decode()
    data = ((torch.cat([y, y.flip(-1)]) + 1) * 127.5).round().to(torch.uint8)
    both = torch.cat([LABELS, LABELS]), torch.cat([LOG_WEIGHT, LOG_WEIGHT])
    return References(data, value_range=(-1, 1), labels=both[0], log_weight=both[1])


def saved(refs: References, folder: Path) -> References:
    refs.save(folder / "set.stf")
    return References.from_file(folder / "set.stf")


def levels_in_npy(folder: Path, **options: object) -> References:
    y = resident().decode()
    np.save(folder / "u.npy", ((y + 1) * 127.5).round().to(torch.uint8).numpy())
    return References.from_file(folder / "u.npy", value_range=(-1, 1), **options)


# What a case is made from in a folder, and the resident set of the same references.
Case = tuple[Callable[[Path], References], Callable[[], References], str]
CASES: dict[str, Case] = {
    "file": (lambda f: saved(resident(), f), resident, "file"),
    "file of floats": (lambda f: saved(resident(False), f), lambda: resident(False), "file"),
    ".npy": (
        lambda f: levels_in_npy(f, labels=LABELS, log_weight=LOG_WEIGHT),
        resident,
        "file",
    ),
    "loaded": (lambda f: saved(resident(), f).load(), resident, "resident"),
    "flips": (lambda f: resident().with_flips(), lambda: mirrored_twin(resident()), "resident"),
    "flips of a file": (
        lambda f: saved(resident(), f).with_flips(),
        lambda: mirrored_twin(resident()),
        "file",
    ),
    "a file of flips": (
        lambda f: saved(resident().with_flips(), f),
        lambda: mirrored_twin(resident()),
        "file",
    ),
    "pickled file": (
        lambda f: pickle.loads(pickle.dumps(saved(resident(), f))),
        resident,
        "file",
    ),
    "a file on its device": (lambda f: saved(resident(), f).to("cpu"), resident, "file"),
}


@pytest.fixture(params=CASES)
def placed(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[References, References]:
    """References somewhere, and the same ones resident."""
    make, plain, placement = CASES[request.param]
    refs = make(tmp_path)
    assert refs.placement == placement
    return refs, plain()


def samples(refs: References) -> tuple[Tensor, Tensor]:
    sigma = torch.logspace(-2.7, 1.5, ROWS, dtype=torch.float64)
    clean = refs.decode(torch.arange(ROWS) * 53 % len(refs)).double()
    return helpers.noisy(clean, sigma, seed=4), sigma


def assert_equal(
    refs: References, plain: References, backend: str = "auto", **options: object
) -> None:
    x, sigma = samples(plain)
    found = stable_target_with_stats(x, refs, sigma, backend=backend, **options)
    expected = stable_target_with_stats(x, plain, sigma, backend="torch", **options)
    names = ("target", *TargetStats._fields)
    for name, a, b in zip(names, (found[0], *found[1]), (expected[0], *expected[1]), strict=True):
        assert torch.equal(a, b), name
    assert torch.isfinite(found[0]).all()


@pytest.mark.parametrize("plan", [None, Plan(4, 128, True), Plan(ROWS, 256, False)])
def test_bits(
    placed: tuple[References, References],
    backend: str,
    plan: Plan | None,
    monkeypatch: pytest.MonkeyPatch,
):
    if plan is not None:
        monkeypatch.setattr(pipeline, "plan", lambda *_: plan)
    assert_equal(*placed, backend)


@pytest.mark.parametrize(
    "options",
    [
        {"labels": torch.arange(ROWS) % 4 - 1, "precision": "fast"},
        {"noise": "student_t", "D": 7.0, "alpha": 0.6, "target": "epsilon"},
    ],
)
def test_options(placed: tuple[References, References], options: dict[str, object]):
    assert_equal(*placed, **options)


def test_log_weight_of_the_call(placed: tuple[References, References]):
    refs, plain = placed
    more = torch.linspace(-1, 1, len(plain), dtype=torch.float64)
    assert_equal(refs, plain, log_weight=more)


def test_the_set_itself(placed: tuple[References, References]):
    refs, plain = placed
    index = torch.tensor([0, N - 1, len(plain) - 1, 7, 7])
    assert len(refs) == len(plain) == refs.total
    assert refs.shape == plain.shape
    assert refs.nbytes == plain.nbytes
    assert torch.equal(refs.decode(), plain.decode())
    assert torch.equal(refs.decode(index), plain.decode(index))
    assert torch.equal(refs.labels, plain.labels)
    assert torch.equal(refs.log_weight, plain.log_weight)
    assert torch.equal(refs.classes, plain.classes)
    assert refs.subset(index).placement == "resident"
    assert torch.equal(refs.subset(index).decode(), plain.decode(index))
    x, sigma = samples(plain)
    few = torch.arange(40)
    assert torch.equal(
        stable_target(x, refs.subset(few), sigma), stable_target(x, plain.subset(few), sigma)
    )
    assert torch.equal(
        torch.compile(lambda x: stable_target(x, refs, sigma), fullgraph=True, backend="eager")(x),
        stable_target(x, plain, sigma),
    )


def test_repr_says_where(tmp_path: Path):
    assert repr(saved(resident(), tmp_path)).endswith("MB in a file for cpu)")
    assert repr(resident()).endswith("MB on cpu)")


def test_offload_on_the_cpu_changes_nothing():
    refs = resident()
    assert refs.offload() is refs
    assert refs.load() is refs


def test_flips_take_no_second_copy_of_the_values():
    refs = References(torch.zeros(2000, 3, 32, 32, dtype=torch.uint8), value_range=(-1, 1))
    twice = refs.with_flips()
    own = [t for t in vars(twice).values() if isinstance(t, Tensor)]
    assert sum(t.nbytes for t in own) < refs.nbytes / 100


def test_levels_of_a_file_are_checked(tmp_path: Path):
    np.save(tmp_path / "u.npy", np.full((200, 4), 17, np.uint8))
    refs = References.from_file(tmp_path / "u.npy", value_range=(0, 1), levels=18)
    assert torch.equal(refs.decode(), torch.ones(200, 4))
    with pytest.raises(ValueError, match="data must be below levels=17, got 17"):
        References.from_file(tmp_path / "u.npy", value_range=(0, 1), levels=17)


def test_what_a_file_knows_cannot_be_given(tmp_path: Path):
    resident().save(tmp_path / "set.stf")
    with pytest.raises(ValueError, match=r"value_range and levels are those in .*set\.stf"):
        References.from_file(tmp_path / "set.stf", value_range=(0, 1))
    levels_in_npy(tmp_path)
    with pytest.raises(ValueError, match=r"value_range=\(lo, hi\) must say what"):
        References.from_file(tmp_path / "u.npy")
    with pytest.raises(ValueError, match=r"labels must be \[300\] like data, got \[2\]"):
        References.from_file(tmp_path / "set.stf", labels=torch.tensor([0, 1]))


def test_a_file_cut_in_use_is_an_error(tmp_path: Path):
    refs = saved(resident(), tmp_path)
    x, sigma = samples(refs)
    with open(tmp_path / "set.stf", "r+b") as file:
        file.truncate(9000)
    with pytest.raises(OSError, match=r"set\.stf was cut while in use: [0-9]+ bytes are missing"):
        stable_target(x, refs, sigma)


def test_a_file_replaced_between_its_readings_is_an_error(tmp_path: Path):
    resident().save(tmp_path / "set.stf")
    found = file_format.read(tmp_path / "set.stf")
    resident(False).save(tmp_path / "set.stf")
    with pytest.raises(ValueError, match="has changed since its references were read"):
        found.values("cpu")


@pytest.mark.skipif(sys.platform == "win32", reason="files of POSIX")
def test_save_keeps_links_and_modes_and_replaces_files_only(tmp_path: Path):
    target, link = tmp_path / "set.stf", tmp_path / "link"
    resident().save(target)
    target.chmod(0o600)
    link.symlink_to(target)
    resident(False).save(link)
    assert link.is_symlink()
    assert target.stat().st_mode & 0o777 == 0o600
    assert References.from_file(target).limbs == 3
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="path must name a file, new or to be replaced"):
        resident().save(tmp_path / "pipe")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe", "set.stf"]


@pytest.mark.parametrize(
    ("path", "error", "words"),
    [
        (".", ValueError, "path must name a file, new or to be replaced, got '.'"),
        ("", ValueError, "path must name a file, new or to be replaced, got ''"),
        ("no/x", FileNotFoundError, "path must be in a folder that exists, got 'no/x'"),
        ("x.npy", ValueError, "path must not end in .npy, which is another format, got 'x.npy'"),
    ],
)
def test_save_says_what_is_wrong_with_a_path(path, error, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=f"^{re.escape(words)}$"):
        resident().save(path)
    assert list(tmp_path.iterdir()) == []


def test_two_that_save_one_file_leave_a_whole_one(tmp_path: Path):
    sets, path = (resident(), resident(False)), tmp_path / "set.stf"
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(sets[i % 2].save, path) for i in range(40)]:
            done.result()
    assert References.from_file(path).limbs in (1, 3)
    assert [found.name for found in tmp_path.iterdir()] == ["set.stf"]


def test_a_compiled_call_whose_references_are_gone_says_so(tmp_path: Path):
    refs = saved(resident(), tmp_path)
    number = refs._stored
    assert handles.STORED[number] is refs._values
    del refs
    with pytest.raises(RuntimeError, match="what this compiled call used is gone"):
        handles.STORED[number]


# 400 MB of references within 64 MB, the file itself generated a chunk at a time.
LARGER_THAN_THE_LIMIT = """
import re, sys
import torch
from stf_kernels import References, stable_target
from stf_kernels.storage import Flipped, Resident

limit, path, flips = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "flips"
torch.set_num_threads(1)
refs = References.from_file(path)
refs = refs.with_flips() if flips else refs
x = refs.decode(torch.arange(8) * 1000)
sigma = torch.logspace(-2, 1, 8)
x += sigma[:, None] * torch.randn_like(x)
few = refs.subset(torch.arange(256))
stable_target(x, few, sigma)  # loads the libraries

def peak(name="VmHWM"):
    return 1024 * int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])

open("/proc/self/clear_refs", "w").write("5")
before = peak()
stable_target(x, refs, sigma, workspace=limit)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("how", ["plain", "flips"])
def test_a_file_larger_than_the_limit(how: str, tmp_path: Path):
    limit, n, dim = 64 << 20, 130_000, 3072
    path = tmp_path / "large.npy"
    data = np.lib.format.open_memmap(path, "w+", np.uint8, (n, dim))
    rng = np.random.default_rng(0)
    for start in range(0, n, 10_000):
        data[start : start + 10_000] = rng.integers(0, 256, dim, np.uint8)
        data[start : start + 10_000, ::7] = rng.integers(0, 256, (10_000, 439), np.uint8)
    data.flush()
    References.from_file(path, value_range=(-1, 1)).save(tmp_path / "large.stf")
    path.unlink()
    command = [sys.executable, "-c", LARGER_THAN_THE_LIMIT, str(limit), str(tmp_path / "large.stf")]
    # The C library keeps by chance up to some 12 MB of what was freed; with these it keeps nothing.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        [*command, how], stdout=subprocess.PIPE, text=True, check=True, env=environment
    )
    grown = int(done.stdout)
    assert grown < limit
    assert n * dim > 5 * limit
    print(f"{how}: {grown / 2**20:.0f} MB for {n * dim / 2**20:.0f} MB of references")


def test_a_device_without_an_index_is_the_current_one(tmp_path, monkeypatch):
    """Or no sample would be on the references' device: a tensor's has its index."""
    refs = saved(References(torch.rand(5, *SHAPE)), tmp_path)
    found = file_format.read(tmp_path / "set.stf")
    monkeypatch.setattr(file_format, "read", lambda path: found)
    with FakeTensorMode(allow_non_fake_inputs=True):  # as if there were a GPU
        there = torch.empty(1, device="cuda").device
        assert refs.to("cuda").device == there
        assert References.from_file(tmp_path / "set.stf", device="cuda").device == there
