"""The U-Net."""

import pytest
import torch

from stf_train.networks import UNet


@pytest.fixture
def network():
    torch.manual_seed(0)
    network = UNet(16)
    for parameter in network.parameters():  # away from the zeros it starts with
        parameter.data += 0.1 * torch.randn_like(parameter)
    return network


def test_starts_as_zero():
    x, c_noise = torch.randn(3, 1, 8, 8), torch.randn(3)
    assert torch.equal(UNet(16)(x, c_noise), torch.zeros(3, 1, 8, 8))


def test_every_parameter_takes_part(network):
    network(torch.randn(3, 1, 8, 8), torch.randn(3)).square().sum().backward()
    idle = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


def test_samples_do_not_see_each_other(network):
    x, c_noise = torch.randn(4, 1, 8, 8), torch.randn(4)
    together = network(x, c_noise)
    apart = torch.cat([network(x[i : i + 1], c_noise[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)


def test_every_pixel_sees_all_others_and_the_noise_level(network):
    x = torch.randn(1, 1, 8, 8, requires_grad=True)
    c_noise = torch.zeros(1, requires_grad=True)
    network(x, c_noise)[0, 0, 0, 0].backward()
    assert (x.grad != 0).all()
    assert c_noise.grad != 0


@pytest.mark.parametrize("channels", [0, 8, 40])
def test_channels_must_split_into_groups(channels):
    with pytest.raises(ValueError, match=f"channels must be a multiple of 16, got {channels}"):
        UNet(channels)
