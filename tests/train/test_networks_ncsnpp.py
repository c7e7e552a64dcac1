"""NCSN++ and DDPM++ at their true sizes, and their settings."""

import re
from dataclasses import replace

import pytest
import torch

from stf_train.networks import SETTINGS, NCSNpp
from stf_train.networks.layers import Attention

TINY = replace(SETTINGS["ncsnpp-ve"], channels=8, multipliers=(1, 2, 2), blocks=2, attention=(8, 2))


def parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


def count(name, resolution, **conditions):
    with torch.device("meta"):  # nothing is allocated
        return parameters(NCSNpp(SETTINGS[name], resolution, **conditions))


# The first three: the published networks, built and counted; NCSN++'s 128 random frequencies are
# a buffer here. The others: the published counts of the networks with 9 augmentation labels.
@pytest.mark.parametrize(
    ("name", "resolution", "augmentation", "millions", "digits"),
    [
        ("ncsnpp-ve", 32, 0, 62.759, 3),
        ("ddpmpp-vp", 32, 0, 61.804, 3),
        ("ncsnpp-ve-celeba", 64, 0, 62.693, 3),
        ("ncsnpp-edm", 32, 9, 56.40, 2),
        ("ddpmpp-edm", 32, 9, 55.73, 2),
    ],
)
def test_parameters_of_the_published_networks(name, resolution, augmentation, millions, digits):
    assert round(count(name, resolution, augmentation=augmentation) / 1e6, digits) == millions


def test_conditions_cost_a_vector_each():
    features = 2 * 128  # sines and cosines of 128 random frequencies
    plain = count("ncsnpp-edm", 32)
    assert count("ncsnpp-edm", 32, classes=10, augmentation=9) == plain + (10 + 9) * features


def attended(network, resolution):
    """The sides of the images that attention was called with, in order."""
    sides = []
    for layer in network.modules():
        if isinstance(layer, Attention):
            layer.register_forward_hook(lambda _, inputs, __: sides.append(inputs[0].shape[-1]))
    network(torch.randn(1, 3, resolution, resolution), torch.zeros(1))
    return sides


@pytest.mark.parametrize(
    ("attention", "sides"),
    [
        # Each block on the way down, the middle, the last block on the way up.
        ((8, 2), [8, 8, 2, 2, 2, 2, 8]),
        ((4,), [4, 4, 2, 4]),
        ((), [2]),
    ],
)
def test_attention_is_where_it_was_asked_for(attention, sides):
    assert attended(NCSNpp(replace(TINY, attention=attention), 8), 8) == sides


def test_attention_of_the_published_networks_is_at_16():
    for name, settings in SETTINGS.items():
        small = replace(settings, channels=4)
        coarsest = 32 // small.divisor
        sides = attended(NCSNpp(small, 32), 32)
        assert sides == [16] * 4 + [coarsest, 16], name


def test_random_frequencies_have_deviation_16():
    torch.manual_seed(0)
    cycles = replace(TINY, channels=1024).frequencies() / (2 * torch.pi)
    assert len(cycles) == 1024
    # The deviation of n normal values is known to 1/sqrt(2 n): four times that.
    assert abs(cycles.std() / 16 - 1) < 4 / 2048**0.5


def test_sines_of_the_transformer():
    frequencies = NCSNpp(replace(TINY, embedding="positional"), 8).embed.frequencies
    want = torch.tensor([10000 ** (-i / 3) for i in range(4)])
    torch.testing.assert_close(frequencies, want)


def test_variance_at_the_start():
    torch.manual_seed(0)
    network = NCSNpp(replace(TINY, channels=64), 8)
    block = network.encoder[0]
    want = 2 / (9 * 64 + 9 * 64)  # 2 / (fan in + fan out)
    assert block.conv0.weight.var().item() == pytest.approx(want, rel=0.05)
    C = block.attention.norm.num_channels
    assert block.attention.qkv.weight.var().item() == pytest.approx(0.1 / C, rel=0.05)
    assert not block.conv0.bias.any()


def test_sums_keep_their_variance():
    """The branches start at zero: what is left is sqrt(1/2) for each sum."""
    network = NCSNpp(TINY, 8)
    x, embedding = torch.randn(2, 8, 8, 8), torch.randn(2, 32)
    with_attention, *_ = network.encoder
    torch.testing.assert_close(with_attention(x, embedding), x / 2)
    x = torch.randn(2, 16, 2, 2)
    torch.testing.assert_close(network.middle[1](x, embedding), x / 2**0.5)


def test_dropout_is_of_training_alone():
    network = NCSNpp(replace(TINY, dropout=0.5), 8)
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    x, c_noise = torch.randn(2, 3, 8, 8), torch.zeros(2)
    assert not torch.equal(network(x, c_noise), network(x, c_noise))
    network.eval()
    assert torch.equal(network(x, c_noise), network(x, c_noise))


def test_the_image_enters_at_each_resolution():
    assert len(NCSNpp(TINY, 8).images) == 2
    assert len(NCSNpp(replace(TINY, residual_input=False), 8).images) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": 6}, "channels must be a multiple of 4, got 6"),
        ({"channels": 0}, "channels must be a multiple of 4, got 0"),
        ({"multipliers": ()}, "multipliers must be 1 or more each, got ()"),
        ({"multipliers": (1, 0)}, "multipliers must be 1 or more each, got (1, 0)"),
        ({"blocks": 0}, "blocks must be 1 or more, got 0"),
        ({"dropout": 1.0}, "dropout must be in [0, 1), got 1.0"),
        ({"embedding": "sines"}, 'embedding must be "positional" or "fourier", got \'sines\''),
    ],
)
def test_settings_out_of_range(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(TINY, **change)


def test_resolutions():
    with pytest.raises(ValueError, match="resolution must be a multiple of 4, got 10"):
        NCSNpp(TINY, 10)
    with pytest.raises(ValueError, match=r"attention must be among \[16, 8, 4\], got \(8, 2\)"):
        NCSNpp(TINY, 16)
    with pytest.raises(ValueError, match=r"sides that are multiples of 4, got \[1, 3, 8, 6\]"):
        NCSNpp(TINY, 8)(torch.zeros(1, 3, 8, 6), torch.zeros(1))


@pytest.mark.parametrize("channels", [4, 12, 36, 44, 148])
def test_any_multiple_of_four_splits_into_groups(channels):
    """The channels that meet in the decoder, too."""
    small = replace(TINY, channels=channels, multipliers=(1, 3), blocks=1, attention=())
    with torch.device("meta"):
        assert parameters(NCSNpp(small, 8)) > 0
