"""What is built from a config and from a checkpoint."""

import torch

from stf_train import build, checkpoint, loop, run
from stf_train.targets import DenoisingTarget, StableTarget


def test_denoiser_is_that_of_the_averaged_weights(tmp_path, tiny):
    config = tiny()
    state = run.initial_state(config)
    list(loop.train(state, build.loss(config), steps=3, batch=16, lr=1e-2, rampup=0))
    checkpoint.write(tmp_path / "c", checkpoint.pack(state, config, 0))
    denoise = run.denoiser(config, run.Averaged(checkpoint.read(tmp_path / "c"), "cpu"))

    x = torch.randn(5, 1, 8, 8, dtype=torch.float64)
    sigma = torch.logspace(-2, 1, 5, dtype=torch.float64).reshape(5, 1, 1, 1)
    edm = build.process(config)
    with torch.no_grad():
        averaged, raw = (
            edm.denoise(network, x.float(), sigma.float())
            for network in (state.ema.network, state.network)
        )
    got = denoise(x, sigma, None)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got.float(), averaged, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(got.float(), raw, rtol=1e-4, atol=1e-5)


def test_the_target_is_the_one_that_is_named(tiny):
    dsm = build.loss(tiny(target="dsm")).target
    stf = build.loss(tiny(target="stf", references=123)).target
    assert isinstance(dsm, DenoisingTarget)
    assert isinstance(stf, StableTarget)
    assert stf.n == 123


def test_the_seed_decides_weights_and_noise(tiny):
    def start(seed):
        state = run.initial_state(tiny(seed=seed))
        return state.network.enter.weight, state.generator.get_state()

    for one, again, other in zip(start(0), start(0), start(1), strict=True):
        assert torch.equal(one, again)
        assert not torch.equal(one, other)


def test_weights_and_noise_do_not_share_random_numbers(tiny):
    """The generator has moved on from the seed when the training begins."""
    fresh = torch.Generator().manual_seed(3).get_state()
    assert not torch.equal(run.initial_state(tiny(seed=3)).generator.get_state(), fresh)
