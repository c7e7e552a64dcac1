"""The CUDA kernels on the host: tests/host_cuda runs them, and is seen to notice faults."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable

import own_process
import pytest
from host_cuda import build

pytestmark = pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))
FILES = ["tests/cuda_on_host.py", "tests/cuda_rows_on_host.py", "tests/kernel_pipeline.py"]
PASSED = 464

Run = Callable[..., subprocess.CompletedProcess[str]]

# Runs a kernel on numbers 0, 1, ... with and without its fault, in many orders of its threads.
HARNESS = """
import ctypes, sys
import _cuda_on_host as host

def run(name, fault, seed=0):
    given, found = ((ctypes.c_int32 * 768)(*range(768)) for _ in range(2))
    host.seed(seed)
    host.faulty[name](ctypes.addressof(given), ctypes.addressof(found), fault)
    return list(found)
"""


@pytest.fixture(scope="module")
def python() -> Run:
    """Runs code in a process that has the host's module."""
    path = str(build.build(build.CSRC.parent / "build" / "host_cuda").parent)

    def run(code: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", HARNESS + code],
            env=build.environment() | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
        )

    return run


@pytest.mark.parametrize("name", ["barrier", "warp_barrier", "copy", "copy_again", "never_written"])
def test_what_depends_on_the_order_is_seen(python, name):
    done = python(f"""
for fault in (False, True):
    print(len({{str(run({name!r}, fault, seed)) for seed in range(8)}}))
""")
    without, with_fault = map(int, done.stdout.split())
    assert without == 1, done.stderr
    assert with_fault > 1


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("deadlock", "deadlock:.*thread 0 waits at __syncthreads.*thread 40 has ended"),
        ("other_collective", "while other lanes of its warp are at"),
        ("lane_outside_mask", "from a lane that its mask leaves out"),
        ("unaligned_rows", "block 0, thread [0-9]+: ldmatrix of an unaligned row"),
        ("overflow", "mma: int32 overflows"),
    ],
)
def test_misuse_is_an_error(python, name, words):
    done = python(f"""
run({name!r}, False)
try:
    run({name!r}, True)
except RuntimeError as error:
    print(error)
run({name!r}, False)
""")
    assert done.returncode == 0, done.stderr
    assert re.search(words, done.stdout, re.DOTALL)


@pytest.mark.parametrize("name", ["shared_bounds", "dynamic_bounds", "global_bounds"])
def test_memory_that_is_not_the_kernel_s_ends_the_process(python, name):
    done = python(f"run({name!r}, False); print('alive', flush=True); run({name!r}, True)")
    assert done.stdout == "alive\n", done.stderr
    assert "AddressSanitizer" in done.stderr
    assert name in done.stderr


def test_the_kernels_compute_the_specification_s_bits():
    assert own_process.passed(build.run_pytest(*FILES)) == PASSED
