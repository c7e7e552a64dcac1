"""The samplers against the schedulers of diffusers, on the same denoiser and the same noise."""

import pytest
import torch

from stf_train.process import DDPM, EDM, VE, FlowToNoise, SigmaTime
from stf_train.sample import ddim, even_steps, heun, predictor_corrector, sigma_steps

from .toys import last, mixture

diffusers = pytest.importorskip("diffusers", reason="compares with diffusers, not installed here")

DATA = [-1.0, 0.8], [0.3, 0.2], [0.4, 0.6]
SHAPE = (8, 3)
# Both sides compute in float64, from tables and times made equal: what is left is rounding.
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


class Draws:
    """The same noises, once for us and once for them."""

    def __init__(self, count):
        generator = torch.Generator().manual_seed(0)
        shape = (count, *SHAPE)
        self.noises = torch.randn(shape, generator=generator, dtype=torch.float64)
        self.used = 0

    def __call__(self, *_, **__):
        self.used += 1
        return self.noises[self.used - 1]


def at(t):
    return torch.full((SHAPE[0], 1), float(t), dtype=torch.float64)


def epsilon(process, denoise, x, t):
    return (x - process.alpha(at(t)) * denoise(x, at(t))) / process.sigma(at(t))


def with_steps_of_ddpm(kind, **options):
    """A scheduler with the linear betas of DDPM; its table is ours, but in float32."""
    scheduler = kind(beta_start=1e-4, beta_end=2e-2, clip_sample=False, **options)
    ours = DDPM().alpha(torch.arange(1000, dtype=torch.float64)) ** 2
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), ours, rtol=1e-4, atol=0)
    scheduler.alphas_cumprod = ours
    return scheduler


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim(eta):
    process, draws = DDPM(), Draws(101)
    denoise = mixture(process, *DATA)
    scheduler = with_steps_of_ddpm(diffusers.DDIMScheduler)
    scheduler.set_timesteps(100)

    x = process.sigma(at(scheduler.timesteps[0])) * draws()
    for t in scheduler.timesteps:
        options = {"eta": eta, "variance_noise": draws() if eta else None}
        x = scheduler.step(epsilon(process, denoise, x, t), t, x, **options).prev_sample

    draws.used = 0
    times = [*scheduler.timesteps.tolist(), -1.0]
    ours = last(ddim(denoise, draws, times, process=process, eta=eta))
    torch.testing.assert_close(ours.x, x, **CLOSE)
    assert ours.evaluations == 100


def test_ancestral_sampling(monkeypatch):
    process, draws = DDPM(), Draws(51)
    denoise = mixture(process, *DATA)
    scheduler = with_steps_of_ddpm(diffusers.DDPMScheduler, variance_type="fixed_small")
    scheduler.one = scheduler.one.double()
    scheduler.set_timesteps(50)
    monkeypatch.setattr(diffusers.schedulers.scheduling_ddpm, "randn_tensor", draws)

    x = process.sigma(at(scheduler.timesteps[0])) * draws()
    for t in scheduler.timesteps:
        x = scheduler.step(epsilon(process, denoise, x, t), t, x).prev_sample
    assert draws.used == 50

    draws.used = 0
    times = [*scheduler.timesteps.tolist(), -1.0]
    ours = last(ddim(denoise, draws, times, process=process, eta=1.0))
    torch.testing.assert_close(ours.x, x, **CLOSE)


@pytest.mark.filterwarnings("ignore:__array__ implementation")
def test_heun_of_edm():
    process, draws = SigmaTime(), Draws(1)
    denoise = mixture(process, *DATA)
    scheduler = diffusers.HeunDiscreteScheduler(prediction_type="sample")
    scheduler.set_timesteps(18)
    times = sigma_steps()
    doubled = [times[0], *(t for t in times[1:-1] for _ in range(2)), 0.0]
    assert len(scheduler.sigmas) == len(doubled)
    scheduler.sigmas = torch.tensor(doubled, dtype=torch.float64)

    x = 80 * draws()
    for step, index in enumerate(scheduler.timesteps):
        # The second evaluation of a step is at its end.
        x = scheduler.step(denoise(x, at(doubled[step])), index, x).prev_sample

    draws.used = 0
    ours = last(heun(denoise, draws, times))
    torch.testing.assert_close(ours.x, x, **CLOSE)
    assert ours.evaluations == len(scheduler.timesteps) == 35


def test_times_and_preconditioning_of_edm(generator):
    scheduler = diffusers.EDMEulerScheduler()
    scheduler.set_timesteps(18)
    ours = torch.tensor(sigma_steps())
    torch.testing.assert_close(scheduler.sigmas, ours, rtol=1e-6, atol=0)

    process = EDM(0.5)
    x, raw = torch.randn(2, *SHAPE, generator=generator, dtype=torch.float64)
    for sigma in (0.002, 0.5, 80.0):
        expected = scheduler.precondition_outputs(x, raw, sigma)
        asked = []

        def network(*inputs, asked=asked):
            asked.extend(inputs)
            return raw

        torch.testing.assert_close(process.denoise(network, x, at(sigma)), expected)
        torch.testing.assert_close(asked[0], scheduler.precondition_inputs(x, sigma))
        torch.testing.assert_close(asked[1].float(), scheduler.precondition_noise(sigma).expand(8))


@pytest.mark.parametrize("sampler", [ddim, heun])
def test_flow_matching(sampler):
    process, draws = FlowToNoise(), Draws(1)
    denoise = mixture(process, *DATA)
    second_order = sampler is heun
    scheduler = (
        diffusers.FlowMatchHeunDiscreteScheduler()
        if second_order
        else diffusers.FlowMatchEulerDiscreteScheduler()
    )
    scheduler.set_timesteps(28)
    times = scheduler.sigmas.tolist()
    kept = [times[0], *times[1:-1:2], times[-1]] if second_order else times

    x = draws().float()  # the scheduler computes in float32
    for index, t in zip(scheduler.timesteps, times, strict=False):
        velocity = process.velocity(denoise(x.double(), at(t)), x.double(), at(t))
        x = scheduler.step(velocity.float(), index, x).prev_sample

    draws.used = 0
    ours = last(sampler(denoise, draws, kept, process=process))
    assert ours.evaluations == len(scheduler.timesteps)
    # Some tens of roundings of values of about 1, at most doubled by the flow's spread.
    torch.testing.assert_close(ours.x.float(), x, rtol=0, atol=2**-24 * 28 * 4)


def test_predictor_corrector(monkeypatch):
    N = 60
    process, draws = VE(0.01, 50.0), Draws(2 * N + 1)
    denoise = mixture(process, *DATA)
    scheduler = diffusers.ScoreSdeVeScheduler(snr=0.16, sigma_max=50.0)
    scheduler.set_timesteps(N)
    scheduler.set_sigmas(N)
    times = even_steps(N - 1, 1.0, 0.0)
    levels = process.sigma(torch.tensor(times, dtype=torch.float64)).flip(0)
    torch.testing.assert_close(scheduler.discrete_sigmas.double(), levels, rtol=1e-5, atol=0)
    scheduler.discrete_sigmas = levels
    monkeypatch.setattr(diffusers.schedulers.scheduling_sde_ve, "randn_tensor", draws)

    x = 50 * draws()
    for t, theirs in zip(times, scheduler.timesteps, strict=True):
        x = scheduler.step_correct(process.score(denoise(x, at(t)), x, at(t)), x).prev_sample
        step = scheduler.step_pred(process.score(denoise(x, at(t)), x, at(t)), theirs, x)
        x = step.prev_sample

    draws.used = 0
    ours = last(predictor_corrector(denoise, draws, times, process=process, snr=0.16))
    # The scheduler rounds the corrector's steps to float32.
    torch.testing.assert_close(ours.x, step.prev_sample_mean, rtol=1e-6, atol=1e-7)
    assert ours.evaluations == 2 * N
