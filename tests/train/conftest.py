"""What the tests of the training half share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from stf_kernels import References
from stf_train import data
from stf_train.config import Config

TINY = Config(
    target="stf",
    references=data.TOTAL,
    batch=16,
    duration=16 * 12 / 1e6,  # 12 steps
    lr=2e-3,
    rampup=1e-4,
    ema=1e-4,
    P_mean=-0.8,
    P_std=1.2,
    sigma_data=0.85,
    cbase=16,
    seed=1,
    tick=16 * 4 / 1e3,  # a checkpoint every 4 steps
    device="cpu",
    threads=1,
)


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


@pytest.fixture
def tiny() -> Callable[..., Config]:
    """Configs of a run of 12 steps and 3 checkpoints, some fields changed."""

    def make(**changes) -> Config:
        return replace(TINY, **changes)

    return make


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)
