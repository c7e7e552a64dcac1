"""Hopper's kernels on the host: tests/cuda_hopper_on_host.py, in a process that has them."""

from __future__ import annotations

import own_process
import pytest
from host_cuda import build

FILE, PASSED = "tests/cuda_hopper_on_host.py", 37


@pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))
def test_hopper_s_kernels_compute_the_specification_s_bits():
    assert own_process.passed(build.run_pytest(FILE)) == PASSED
