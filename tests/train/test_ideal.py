"""Samplers on the digits, with the exact posterior mean for a network: they find the digits."""

import pytest
import torch
from scipy import stats

from stf_kernels import IdealDenoiser, stable_target
from stf_train.guidance import extrapolated
from stf_train.process import PFGMpp
from stf_train.sample import (
    ddim,
    euler_maruyama,
    heun,
    predictor_corrector,
    rk45,
    seeded,
    sigma_steps,
)

from .toys import GAUSSIAN, PROCESSES, last

SEEDS = range(12)


@pytest.fixture(scope="module")
def refs(bank):
    return bank.subset(torch.arange(300))


def ideal(process, refs, labels=None):
    """E[y | x_t] for y uniform over the references."""

    def denoise(x, t):
        return stable_target(
            x,
            refs,
            process.sigma(t),
            alpha=process.alpha(t),
            target="denoised",
            labels=labels,
            noise=process.noise.name,
            D=process.noise.D,
        )

    return denoise


def indices(x, refs):
    """Which of the references the samples are."""
    distance = torch.cdist(x.flatten(1), refs.decode().double().flatten(1))
    nearest = distance.min(1)
    # A reference is multiples of 1/8; what is left of others' weights or of the noise is less.
    assert (nearest.values < 0.1).all()
    return nearest.indices


def times(process, count=40):
    """From much noise to next to none, however the process counts its time."""
    ratios = torch.logspace(1.7, -2, count, dtype=torch.float64)
    return process.time(ratios).tolist()


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
@pytest.mark.parametrize("sampler", [heun, ddim])
def test_ode_samplers_find_digits(refs, process, sampler):
    randn = seeded(SEEDS, refs.shape, noise=process.noise)
    state = last(sampler(ideal(process, refs), randn, times(process), process=process))
    found = indices(ideal(process, refs)(state.x, torch.full((12, 1, 1, 1), state.t)), refs)
    assert len(found.unique()) > 6


@pytest.mark.parametrize("process", GAUSSIAN.values(), ids=GAUSSIAN.keys())
@pytest.mark.parametrize("sampler", [euler_maruyama, predictor_corrector])
def test_sde_samplers_find_digits(refs, process, sampler):
    randn = seeded(SEEDS, refs.shape)
    state = last(sampler(ideal(process, refs), randn, times(process, 80), process=process))
    assert len(indices(state.x, refs).unique()) > 6


@pytest.mark.parametrize("name", ["VE", "VP"])
def test_rk45_finds_digits_over_the_published_span(refs, name):
    process = PROCESSES[name]
    state = last(
        rk45(ideal(process, refs), seeded(SEEDS, refs.shape), process.span, process=process)
    )
    assert len(indices(state.x, refs).unique()) > 6


def test_the_kernels_own_ideal_denoiser_drives_a_sampler(refs):
    state = last(heun(IdealDenoiser(refs), seeded(SEEDS, refs.shape), sigma_steps(30)))
    assert len(indices(state.x, refs).unique()) > 6
    for process in GAUSSIAN.values():
        sigma = torch.logspace(-1, 1, 12, dtype=torch.float64).reshape(12, 1, 1, 1)
        x = refs.decode()[:12].double() + sigma * seeded(SEEDS, refs.shape)()
        got = process.in_sigma(ideal(process, refs))(x, sigma)
        torch.testing.assert_close(got, IdealDenoiser(refs)(x, sigma), rtol=0, atol=1e-5)


def test_one_flow_for_all_processes(refs):
    """Scaled to the same noise, they are the same ODE: the same start ends at the same digits."""
    ends = []
    for process in GAUSSIAN.values():
        t = times(process, 60)
        first = torch.tensor(t[0], dtype=torch.float64)
        # sigma / alpha is 50 at the start of all; the signal is not worth mentioning beside it.
        noise = seeded(SEEDS, refs.shape)()
        state = last(ddim(ideal(process, refs), lambda n=noise: n, t, process=process))
        assert process.sigma(first) / process.alpha(first) == pytest.approx(10**1.7, rel=1e-6)
        ends.append(indices(state.x / process.alpha(torch.tensor(t[-1])), refs))
    assert all(torch.equal(end, ends[0]) for end in ends)


def test_classes(refs):
    """With labels each sample is of its class; led away from no class it stays there."""
    process = PROCESSES["EDM"]
    labels = torch.arange(10).repeat(2)
    conditional = ideal(process, refs, labels)
    unconditional = ideal(process, refs, torch.full((20,), -1))
    for w in (0.0, 0.5):
        guided = extrapolated(conditional, unconditional, w)
        x = last(heun(guided, seeded(range(20), refs.shape), sigma_steps(30))).x
        distance = torch.cdist(x.flatten(1), refs.decode().double().flatten(1))
        assert torch.equal(refs.labels[distance.argmin(1)], labels), w
    dropped = last(heun(unconditional, seeded(range(20), refs.shape), sigma_steps(30))).x
    plain = last(heun(ideal(process, refs), seeded(range(20), refs.shape), sigma_steps(30))).x
    torch.testing.assert_close(dropped, plain)
    assert not torch.equal(refs.labels[indices(dropped, refs)], labels)


@pytest.mark.parametrize("D", [2.0, 30.0])
def test_flow_of_pfgmpp_keeps_the_quantiles_of_its_marginals(D):
    """In one dimension a flow from marginal to marginal keeps each sample's quantile.

    The marginals of two points under Student-t noise are mixtures of scaled t distributions.
    """
    points = torch.tensor([[-0.7], [0.9]])
    process = PFGMpp(0.8, D=D)
    starts = torch.linspace(-3, 3, 25, dtype=torch.float64)[:, None]

    def quantile(x, sigma):
        each = [stats.t(D).cdf((x - y).numpy() / sigma) for y in points.double()]
        return torch.from_numpy(sum(each) / 2)

    def posterior_mean(x, t):
        return stable_target(
            x, points.double(), t, target="denoised", noise="student_t", D=D, backend="torch"
        )

    t = torch.logspace(1.5, -0.5, 150, dtype=torch.float64).tolist()
    first, *_, end = heun(posterior_mean, lambda: starts, t, process=process)
    gap = quantile(end.x, t[-1]) - quantile(first.x, t[0])
    assert gap.abs().max() < 1e-4
    # The same flow does not keep those of Gaussian noise.
    normal = sum(stats.norm.cdf((end.x - y).numpy() / t[-1]) for y in points.double()) / 2
    assert abs(normal - quantile(first.x, t[0]).numpy()).max() > 1e-3
