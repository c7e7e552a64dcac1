"""Hopper's kernels on the host: tests/cuda_hopper_on_host.py, in a process that has them."""

from __future__ import annotations

import re

import pytest
from host_cuda import build

FILE, PASSED = "tests/cuda_hopper_on_host.py", 37


@pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))
def test_hopper_s_kernels_compute_the_specification_s_bits():
    done = build.run_pytest(FILE)
    last = done.stdout.splitlines()[-1]
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-20_000:]
    assert re.findall(r"(\d+) (passed|skipped|failed|error)", last) == [(str(PASSED), "passed")]
