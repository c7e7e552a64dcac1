"""What every network keeps to, whatever is inside."""

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from stf_train.networks import ADM, SETTINGS, ADMSettings, NCSNpp, UNet

SHAPE = (2, 8, 8)
CLASSES, AUGMENTATION = 3, 4


def tiny_ncsnpp(name, **conditions):
    """One of the networks of SETTINGS, 8x8 -> 4x4 (-> 2x2)."""
    settings = SETTINGS[name]
    levels = settings.multipliers[-3:]
    tiny = replace(settings, channels=8, multipliers=levels, blocks=1, attention=(4,))
    return NCSNpp(tiny, SHAPE[1], SHAPE[0], **conditions)


def tiny_adm(**conditions):
    tiny = ADMSettings(channels=32, multipliers=(1, 2), blocks=1, attention=(4,), head=16)
    return ADM(tiny, SHAPE[1], SHAPE[0], **conditions)


BUILD = {
    "unet": lambda **conditions: UNet(16, SHAPE[0], **conditions),
    "adm": tiny_adm,
    "ncsnpp-ve": lambda **conditions: tiny_ncsnpp("ncsnpp-ve", **conditions),
    "ncsnpp-ve-celeba": lambda **conditions: tiny_ncsnpp("ncsnpp-ve-celeba", **conditions),
    "ddpmpp-vp": lambda **conditions: tiny_ncsnpp("ddpmpp-vp", **conditions),
    "ncsnpp-edm": lambda **conditions: tiny_ncsnpp("ncsnpp-edm", **conditions),
    "ddpmpp-edm": lambda **conditions: tiny_ncsnpp("ddpmpp-edm", **conditions),
}
needs_diffusers = pytest.mark.skipif(not find_spec("diffusers"), reason="diffusers is missing")


def perturb(network):
    """Away from the zeros it starts with."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return network


@pytest.fixture(
    params=[pytest.param(n, marks=needs_diffusers if n == "adm" else ()) for n in BUILD]
)
def build(request):
    torch.manual_seed(0)
    return BUILD[request.param]


@pytest.fixture
def network(build):
    return perturb(build()).eval()


@pytest.fixture
def conditional(build):
    return perturb(build(classes=CLASSES, augmentation=AUGMENTATION)).eval()


def images(B):
    return torch.randn(B, *SHAPE)


def test_every_setting_is_here():
    assert set(SETTINGS) < set(BUILD)


def test_starts_as_zero(build):
    network = build(classes=CLASSES, augmentation=AUGMENTATION)
    F = network(images(3), torch.randn(3), torch.tensor([0, -1, 2]), torch.randn(3, AUGMENTATION))
    assert torch.equal(F, torch.zeros(3, *SHAPE))


def test_every_parameter_takes_part(conditional):
    conditional.train()
    labels, augment = torch.tensor([0, 1, 2, -1]), torch.randn(4, AUGMENTATION)
    conditional(images(4), torch.randn(4), labels, augment).square().sum().backward()
    named = conditional.named_parameters()
    assert [name for name, p in named if p.grad is None or not p.grad.any()] == []


def test_samples_do_not_see_each_other(network):
    x, c_noise = images(4), torch.randn(4)
    together = network(x, c_noise)
    apart = torch.cat([network(x[i : i + 1], c_noise[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)


def test_every_pixel_sees_all_others_and_the_noise_level(network):
    x, c_noise = images(1).requires_grad_(), torch.full((1,), 0.3, requires_grad=True)
    network(x, c_noise)[0, 0, 0, 0].backward()
    assert (x.grad != 0).all()
    assert c_noise.grad != 0


def test_noise_levels_below_zero_and_far_out(network):
    """ln(sigma)/4 is below zero for sigma < 1; the index of a noise level goes to 999."""
    c_noise = torch.tensor([-1.6, -4.6, 0.0, 4.5, 999.0])
    F = network(images(5), c_noise)
    assert F.isfinite().all()


def test_another_size_of_image(network):
    assert network(torch.randn(2, SHAPE[0], 16, 8), torch.randn(2)).shape == (2, SHAPE[0], 16, 8)


def test_a_dropped_label_is_no_label(conditional):
    x, c_noise = images(3), torch.randn(3)
    mixed = conditional(x, c_noise, torch.tensor([0, -1, 2]))
    without = conditional(x, c_noise)
    assert torch.equal(mixed[1], without[1])
    assert not torch.equal(mixed[0], without[0])
    assert not torch.equal(mixed[2], without[2])


def test_no_condition_is_the_unconditional_network(build, conditional):
    """The weights that both have give the same function."""
    extra = "conditions."
    shared = {k: v for k, v in conditional.state_dict().items() if extra not in k}
    network = build().eval()
    network.load_state_dict(shared)
    x, c_noise = images(3), torch.randn(3)
    dropped, unaugmented = torch.full((3,), -1), torch.zeros(3, AUGMENTATION)
    assert torch.equal(network(x, c_noise), conditional(x, c_noise, dropped, unaugmented))


def test_augmentation_labels_matter(conditional):
    x, c_noise = images(2), torch.randn(2)
    augmented = conditional(x, c_noise, augment=torch.eye(2, AUGMENTATION))
    assert not torch.equal(augmented, conditional(x, c_noise))


@pytest.mark.parametrize("label", [CLASSES, -2])
def test_labels_out_of_range(conditional, label):
    with pytest.raises(IndexError):
        conditional(images(1), torch.zeros(1), torch.tensor([label]))


def test_conditions_that_the_network_was_not_built_for(network):
    with pytest.raises(ValueError, match="labels must be None for a network built with classes=0"):
        network(images(1), torch.zeros(1), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"augment must be None for .* built with augmentation=0"):
        network(images(1), torch.zeros(1), augment=torch.zeros(1, AUGMENTATION))


@pytest.mark.parametrize("name", ["classes", "augmentation"])
def test_counts_of_conditions(build, name):
    with pytest.raises(ValueError, match=f"{name} must be 0 or more, got -1"):
        build(**{name: -1})


def test_weights_survive_their_state_dict(build, network):
    """The random frequencies among them."""
    torch.manual_seed(1)
    other = build().eval()
    other.load_state_dict(network.state_dict())
    x, c_noise = images(2), torch.randn(2)
    assert torch.equal(other(x, c_noise), network(x, c_noise))


def test_channels_last(network):
    x, c_noise = images(2), torch.randn(2)
    want = network(x, c_noise)
    network.to(memory_format=torch.channels_last)
    got = network(x.to(memory_format=torch.channels_last), c_noise)
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_bfloat16_by_autocast(network):
    """The result is float32 again, and within the roundings of so many layers."""
    x, c_noise = images(4), torch.randn(4)
    want = network(x, c_noise)
    with torch.autocast("cpu", torch.bfloat16):
        got = network(x, c_noise)
    assert got.dtype == torch.float32
    assert not torch.equal(got, want)
    layers = sum(isinstance(m, torch.nn.Conv2d | torch.nn.Linear) for m in network.modules())
    assert (got - want).norm() < layers * 2**-8 * want.norm()


@pytest.mark.parametrize("channels", [0, 8, 40])
def test_channels_must_split_into_groups(channels):
    with pytest.raises(ValueError, match=f"channels must be a multiple of 16, got {channels}"):
        UNet(channels)
