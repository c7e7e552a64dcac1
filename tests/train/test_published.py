"""Every preset trains, resumes and samples; the published ones as they are but for their size."""

import math
from dataclasses import replace

import pytest
import torch

from stf_train import build, checkpoint, run
from stf_train.config import Config
from stf_train.networks import SETTINGS
from stf_train.presets import PRESETS, settle
from stf_train.targets import StableTarget

PUBLISHED = [name for name in PRESETS if name.startswith(("cifar10-", "celeba64-"))]
SMALL = {
    "data": "patches",
    "cbase": 4,
    "batch": 4,
    "references": 16,
    "duration": 4 * 2 / 1e6,  # 2 steps
    "tick": 4 / 1e3,  # a checkpoint after each
}
OTHER = {"edm": (), "ve": ("pc",), "vp": ("rk45",)}


@pytest.fixture
def small():
    """The config of a preset, made small."""

    def make(name):
        options = settle(name, SMALL | {"size": PRESETS[name]["size"] or 32})
        # Coarse, in few steps.
        options["sampling"] = replace(options["sampling"], steps=3, tolerance=0.5)
        return Config(**options, preset=name, device="cpu", threads=1, processes=1)

    return make


def test_there_are_five():
    assert len(PUBLISHED) == 5
    assert {PRESETS[name]["arch"] for name in PUBLISHED} == SETTINGS.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_trains_resumes_and_samples(tmp_path, small, name):
    config = small(name)
    found = build.dataset(config)
    assert found.shape == (3, config.size, config.size)
    assert isinstance(build.loss(config).target, StableTarget)
    run.create(tmp_path / "whole", config)
    run.create(tmp_path / "resumed", config)
    start = checkpoint.read(tmp_path / "whole" / run.CHECKPOINT)

    steps = list(run.advance(tmp_path / "whole"))
    assert [step.step for step in steps] == [1, 2]
    assert all(math.isfinite(step.loss) and step.grad_norm > 0 for step in steps)
    assert steps[-1].skipped == 0
    kept = checkpoint.read(tmp_path / "whole" / run.CHECKPOINT)
    for part in ("network", "ema"):
        before, after = start.part(part), kept.part(part)
        assert any(not torch.equal(before[key], after[key]) for key in before)
        assert all(tensor.isfinite().all() for tensor in after.values())

    first = run.advance(tmp_path / "resumed")
    assert next(first) == steps[0]
    first.close()
    assert list(run.advance(tmp_path / "resumed")) == steps[1:]
    for file in (run.CHECKPOINT, run.METRICS, run.CONFIG):
        one, other = (tmp_path / folder / file for folder in ("whole", "resumed"))
        assert one.read_bytes() == other.read_bytes()

    # The sampler of the preset, and the other one in the paper's tables.
    conditioned = run.conditioned(config, run.denoiser(config, run.Averaged(kept, "cpu")))
    for sampler in (config.sampling.sampler, *OTHER[config.process]):
        how = replace(config.sampling, sampler=sampler)
        x = run.sampler(config, how, conditioned)([0, 1]).x
        assert x.shape == (2, *found.shape)
        assert x.isfinite().all()
        assert not torch.equal(x[0], x[1])


PRECISIONS = {"stf": {"bf16": True}, "dsm": {"fp16": True, "ls": 8.0}}


@pytest.mark.parametrize("target", PRECISIONS)
@pytest.mark.parametrize("name", PRESETS)
def test_half_precision(tmp_path, name, target):
    """Two steps in two parts each, while the learning rate rises; stopped between them."""
    options = PRESETS[name] | SMALL | PRECISIONS[target] | {"target": target}
    options |= {"batch_gpu": 2, "rampup": 8 / 1e6, "sigma_data": 0.5}
    if PRESETS[name]["data"] == "digits":
        options["data"] = "digits"
    else:
        options["size"] = 16
    if options["arch"] == "unet":
        options["cbase"] = 16
    options["sampling"] = replace(options["sampling"], steps=2, tolerance=0.5)
    config = Config(**options, preset=name, device="cpu", threads=1, processes=1)
    for folder in "ab":
        run.create(tmp_path / folder, config)

    steps = list(run.advance(tmp_path / "a"))
    assert [step.lr for step in steps] == [config.lr / 2, config.lr]
    assert all(math.isfinite(step.loss) and step.grad_norm > 0 for step in steps)
    assert steps[-1].skipped == 0
    first = run.advance(tmp_path / "b")
    assert next(first) == steps[0]
    first.close()
    assert list(run.advance(tmp_path / "b")) == steps[1:]
    a, b = ((tmp_path / folder / run.CHECKPOINT).read_bytes() for folder in "ab")
    assert a == b

    averaged = run.Averaged(checkpoint.read(tmp_path / "a" / run.CHECKPOINT), "cpu")
    conditioned = run.conditioned(config, run.denoiser(config, averaged))
    x = run.sampler(config, config.sampling, conditioned)([0, 1]).x
    assert x.shape == (2, *build.dataset(config).shape)
    assert x.isfinite().all()
