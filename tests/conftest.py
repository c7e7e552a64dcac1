"""Fixtures: every backend, skipped with its reason where it cannot run, and both precisions."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import helpers
import hypothesis
import pytest
import torch

from stf_kernels import BackendUnavailable, cpu_backend, stable_target

# The same examples on every run; a backend's first call may take longer than the rest.
hypothesis.settings.register_profile(
    "fixed",
    max_examples=40,
    derandomize=True,
    deadline=None,
    phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
)
hypothesis.settings.load_profile("fixed")

# Most problems here are so small that waking a second thread costs more than it computes;
# test_torch_integration.py asks that threads change nothing.
torch.set_num_threads(1)


@pytest.fixture(scope="session", params=helpers.BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    x = torch.zeros(1, 1)
    try:
        stable_target(x, x, 1.0, backend=request.param)
    except BackendUnavailable as reason:
        pytest.skip(str(reason))
    return request.param


@pytest.fixture
def use_isa() -> Iterator[Callable[[str], None]]:
    """Takes the CPU backend to an instruction set, for one test."""
    extension = cpu_backend.extension()
    best = extension.isa()
    yield extension.use_isa
    extension.use_isa(best)


@pytest.fixture(scope="session", params=helpers.PRECISIONS)
def precision(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def num_threads() -> Iterator[Callable[[int], None]]:
    """`torch.set_num_threads` for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
