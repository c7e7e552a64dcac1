"""The moving average of the weights."""

import math

import pytest
from torch import nn

from stf_train.ema import EMA


def line(value: float) -> nn.Linear:
    layer = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(layer.weight, value)
    return layer


def follow(ema: EMA, network: nn.Module, batch: int, first: int, last: int) -> float:
    for images in range(first + batch, last + batch, batch):
        ema.update(network, batch, images)
    return ema.network.weight.item()


@pytest.mark.parametrize("batch", [10, 25, 100])
def test_half_the_distance_is_left_after_a_half_life(batch):
    ema = EMA(line(0.0), halflife=1000, rampup=float("inf"))
    assert follow(ema, line(1.0), batch, 0, 1000) == pytest.approx(0.5, rel=1e-12)
    assert follow(ema, line(1.0), batch, 1000, 2000) == pytest.approx(0.75, rel=1e-12)


def test_ramp_up_forgets_the_initial_weights():
    """With a half-life of r t, what was there at t0 counts (t0 / t)^(ln 2 / r) at t.

    Steps of one image sample the integral of dt / t at midpoints.
    """
    ema = EMA(line(0.0), halflife=1e12, rampup=0.05)
    follow(ema, line(1.0), 1, 0, 100)
    nn.init.zeros_(ema.network.weight)
    left = 1 - follow(ema, line(1.0), 1, 100, 110)
    assert left == pytest.approx((100.5 / 110.5) ** (math.log(2) / 0.05), rel=1e-4)


def test_no_half_life_is_the_network_itself():
    ema = EMA(line(0.0), halflife=0)
    assert follow(ema, line(3.0), 10, 0, 10) == 3.0


def test_average_is_another_network_without_gradients():
    network = line(1.0)
    ema = EMA(network, halflife=100)
    nn.init.constant_(network.weight, 2.0)
    assert ema.network.weight.item() == 1.0
    assert not ema.network.weight.requires_grad
