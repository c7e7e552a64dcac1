"""What the tests of the training half share."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.context import BaseContext

import pytest
import torch
import torch.multiprocessing

from stf_kernels import References
from stf_train import data
from stf_train.config import Config
from stf_train.presets import PRESETS

MACHINE = {"device": "cpu", "threads": 1, "processes": 1}
TINY: dict[str, object] = {
    "references": data.TOTAL,
    "batch": 16,
    "duration": 16 * 12 / 1e6,  # 12 steps
    "lr": 2e-3,
    "rampup": 1e-4,
    "ema": 1e-4,
    "cbase": 16,
    "seed": 1,
    "tick": 16 * 4 / 1e3,  # a checkpoint every 4 steps
}


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors gain nothing from more, and lose much where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def bank() -> References:
    return data.digits()


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Config]:
    """Configs of a run of 12 steps and 3 checkpoints, some fields changed."""

    def make(preset: str = "digits-edm", **changes) -> Config:
        options = PRESETS[preset] | TINY | MACHINE | {"preset": preset}
        if PRESETS[preset]["sigma_data"] is None and PRESETS[preset]["P_mean"] is not None:
            options |= {"sigma_data": 0.85}
        return Config(**(options | changes))

    return make


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


@pytest.fixture(scope="session")
def processes() -> BaseContext:
    """Children that start from a server which has imported what they need."""
    context = torch.multiprocessing.get_context("forkserver")
    # torch.optim imports torch._dynamo when it is first used.
    context.set_forkserver_preload(["pytest", "torch._dynamo", "accelerate", "stf_train.run"])
    return context
