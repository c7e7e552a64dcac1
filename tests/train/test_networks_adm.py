"""The adapter around diffusers' UNet2DModel."""

import re
import sys

import pytest
import torch

from stf_train.networks import ADM, ADMSettings

TINY = ADMSettings(channels=32, multipliers=(1, 2, 2), blocks=1, attention=(4,), head=16)


@pytest.fixture
def diffusers():
    return pytest.importorskip("diffusers", reason="diffusers is missing")


def test_without_diffusers(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r'ADM needs diffusers: pip install "stf-kernels\[adm\]"'):
        ADM(TINY, 8)


@pytest.mark.usefixtures("diffusers")
def test_parameters_of_the_published_network():
    """ImageNet at 64x64 with its 1000 classes."""
    with torch.device("meta"):
        network = ADM(ADMSettings(), 64, classes=1000)
    count = sum(parameter.numel() for parameter in network.parameters())
    assert round(count / 1e6, 2) == 295.90


def test_attention_is_where_it_was_asked_for(diffusers):
    from diffusers.models.attention_processor import Attention

    network, sides = ADM(TINY, 8), []
    for layer in network.modules():
        if isinstance(layer, Attention):
            assert layer.group_norm is not None
            layer.register_forward_hook(lambda _, inputs, __: sides.append(inputs[0].shape[-1]))
    network(torch.randn(1, 3, 8, 8), torch.zeros(1))
    # The block on the way down, the middle, both blocks on the way up.
    assert sides == [4, 2, 4, 4]


@pytest.mark.usefixtures("diffusers")
def test_branches_start_at_zero():
    level = ADM(TINY, 8).unet.down_blocks[1]
    x, embedding = torch.randn(2, 64, 4, 4), torch.randn(2, 128)
    assert torch.equal(level.attentions[0](x), x)
    halved = torch.nn.functional.avg_pool2d(x, 2)
    torch.testing.assert_close(level.downsamplers[0](x, embedding), halved)


@pytest.mark.usefixtures("diffusers")
def test_the_noise_level_scales_the_features():
    """Adaptive group normalisation: scale and shift, two values for each feature."""
    block = ADM(TINY, 8).unet.down_blocks[0].resnets[0]
    assert block.time_emb_proj.out_features == 2 * block.conv1.out_channels


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": 48}, "channels must be a multiple of 32, got 48"),
        ({"head": 128}, "head must divide the features [192, 384, 576, 768], got 128"),
    ],
)
def test_settings_out_of_range(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ADMSettings(**change)
