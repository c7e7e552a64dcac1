"""Presets: each describes a run that can be built, and refuses what it has no use for."""

import math

import pytest
import torch

from stf_train import build, presets
from stf_train.data import Facts
from stf_train.networks import SETTINGS
from stf_train.presets import PRESETS, Inapplicable, halflife, settle
from stf_train.sampling import Sampling, asked

SHIPPED = [name for name in PRESETS if PRESETS[name]["data"] is not None]


@pytest.mark.parametrize("name", PRESETS)
def test_holds_every_option(name):
    assert PRESETS[name].keys() == PRESETS[presets.DEFAULT].keys()


@pytest.mark.parametrize("name", PRESETS)
def test_has_what_its_process_and_network_ask_for_and_nothing_else(name):
    options = PRESETS[name]
    wanted = presets.PROCESS[options["process"]]
    for option in {o for p in presets.PROCESS.values() for o in p}:
        if option not in wanted:
            assert options[option] is None, option
        elif option not in ("sigma_data", "strength", "points"):
            assert options[option] is not None, option
    for size in presets.SIZES:
        assert (options[size] is None) == (options["arch"] == "unet"), size


# Parameters in millions: 62.76 and 61.80 are score_sde's, 56.40 and 55.73 EDM's.
SIZES = {
    "cifar10-edm-ncsnpp": 56.40,
    "cifar10-edm-ddpmpp": 55.73,
    "cifar10-ve": 62.76,
    "cifar10-vp": 61.80,
    "celeba64-ve": 62.69,
}


@pytest.mark.parametrize("name", SIZES)
def test_published_networks_have_their_size(tiny, name):
    side = 64 if "64" in name else 32
    facts = Facts("none", 1, (3, side, side), 0, "")
    config = tiny(preset=name, cbase=PRESETS[name]["cbase"], facts=facts)
    with torch.device("meta"):
        network = build.network(config)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(
        SIZES[name], abs=0.02
    )


def test_an_average_halves_in_its_halflife():
    images = halflife(0.999, 128) * 1e6
    assert 0.999 ** (images / 128) == pytest.approx(0.5)
    assert images == pytest.approx(128 * 692.8005, abs=0.1)
    # (1 + i) / (10 + i) after many steps i: half of it goes in i ln 2 / 9 steps.
    i = 1e6
    assert ((1 + i) / (10 + i)) ** (presets.EARLY * i) == pytest.approx(0.5, rel=1e-4)


def test_another_process_brings_what_it_asks_for():
    options = settle("digits-edm", {"process": "ve", "noise_max": 20.0})
    assert (options["output"], options["noise_min"], options["noise_max"]) == ("epsilon", 0.01, 20)
    assert options["P_mean"] is None
    assert options["sampling"] == Sampling("heun")


def test_another_network_brings_its_sizes():
    options = settle("digits-edm", {"arch": "ddpmpp-vp", "blocks": 2})
    assert options["cres"] == SETTINGS["ddpmpp-vp"].multipliers
    assert options["blocks"] == 2
    assert settle("digits-vp", {"arch": "unet"})["cres"] is None


def test_classes_and_sequences_bring_what_they_ask_for():
    assert settle("digits-edm", {"cond": True})["label_dropout"] == 0.1
    assert settle("digits-edm-cond", {"cond": False})["label_dropout"] is None
    ddpm = settle("digits-vp", {"process": "ddpm", "strength": 0.5})
    assert (ddpm["points"], ddpm["beta_max"]) == (2, 2e-2)


@pytest.mark.parametrize(
    ("preset", "given", "message"),
    [
        ("digits-ve", {"P_mean": 0.0}, "P_mean: is for --process edm or pfgmpp, got ve"),
        ("digits-edm", {"noise_max": 9.0}, "noise_max: is for --process ve, got edm"),
        ("digits-edm", {"D": 9.0}, "D: is for --process pfgmpp, got edm"),
        ("digits-edm", {"output": "v"}, "output: is for --process ve or vp or .*, got edm"),
        ("digits-vp", {"strength": 1.0}, "strength: is for --process ddpm, got vp"),
        ("digits-seq", {"strength": None, "points": 3}, "points: is for the sequence-aware loss"),
        ("digits-edm", {"blocks": 2}, "blocks: --arch unet has a structure of its own"),
        ("digits-edm", {"dropout": 0.1}, "dropout: --arch unet has"),
        ("digits-edm", {"label_dropout": 0.1}, "label_dropout: is for --cond 1"),
        ("digits-edm", {"target": "dsm", "references": 9}, "references: --target dsm has no"),
    ],
)
def test_what_makes_no_difference_is_refused(preset, given, message):
    with pytest.raises(Inapplicable, match=message):
        settle(preset, given)


@pytest.mark.parametrize("name", SHIPPED)
def test_its_sampler_goes_with_its_process(tiny, name):
    """It ends near the mean of the data if every D is the mean."""
    config = tiny(preset=name)
    process = build.process(config)
    mean = 0.25
    randn = lambda: process.noise.draw((50, 3), generator, torch.float64)  # noqa: E731
    generator = torch.Generator().manual_seed(0)
    *_, end = config.sampling(process, lambda x, t: torch.full_like(x, mean), randn)
    assert (end.x - mean).abs().max() < 0.05
    assert math.isfinite(end.evaluations)


@pytest.mark.parametrize("sampler", ["heun", "ddim", "rk45", "pc", "em"])
@pytest.mark.parametrize("name", ["digits-edm", "digits-ve", "digits-vp", "digits-seq"])
def test_settings_that_are_asked_for_make_a_difference_and_others_none(tiny, name, sampler):
    config = tiny(preset=name)
    process = build.process(config)
    changes = {
        "steps": 7,
        "sigma_min": 0.1,
        "sigma_max": 5.0,
        "rho": 3.0,
        "S_churn": 3.0,
        "eta": 1.0,
        "snr": 0.1,
        "tolerance": 1e-2,
        "last_denoise": False,
    }

    def end(**settings):
        generator = torch.Generator().manual_seed(0)
        randn = lambda: torch.randn(4, 3, generator=generator, dtype=torch.float64)  # noqa: E731
        how = Sampling(sampler, **({"steps": 5} | settings))
        *_, state = how(process, lambda x, t: 0.3 * x, randn)
        return state.x

    plain = end()
    for setting, value in changes.items():
        differs = not torch.equal(plain, end(**{setting: value}))
        assert differs == (setting in asked(sampler, process)), setting
