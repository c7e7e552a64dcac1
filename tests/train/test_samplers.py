"""Every sampler on every process: normal data, whose flow is known, and a mixture."""

import math
from itertools import pairwise

import numpy as np
import pytest
import scipy.integrate
import torch

from stf_train.process import DDPM, VP, FlowToData, FlowToNoise, SigmaTime
from stf_train.sample import (
    Churn,
    ddim,
    euler_maruyama,
    euler_maruyama_step,
    even_steps,
    heun,
    predictor_corrector,
    reverse_diffusion,
    rk45,
    seeded,
    sigma_steps,
)

from .toys import GAUSSIAN, PROCESSES, last, mixture

MU, S = 0.3, 0.7  # of normal data

each = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
each_gaussian = pytest.mark.parametrize("process", GAUSSIAN.values(), ids=GAUSSIAN.keys())


# alpha of DDPM has a kink at every step: its flow is smooth in sigma / alpha, but not in t.
SMOOTH = {name: process for name, process in GAUSSIAN.items() if name != "DDPM"}
each_smooth = pytest.mark.parametrize("process", SMOOTH.values(), ids=SMOOTH.keys())


def normal(process):
    """The denoiser of normal data."""
    return mixture(process, [MU], [S], [1.0])


def moments(process, t):
    """Mean and deviation of x_t."""
    t = torch.tensor(t, dtype=torch.float64)
    alpha, sigma = process.alpha(t).item(), process.sigma(t).item()
    return alpha * MU, math.hypot(alpha * S, sigma)


def flow(process, x, t, s):
    """The probability flow from x at t to s: a sample keeps its place among all."""
    (mean_t, deviation_t), (mean_s, deviation_s) = moments(process, t), moments(process, s)
    return mean_s + (x - mean_t) * deviation_s / deviation_t


def geometric(process, count, first=40.0, end=0.05):
    """Times at even ratios of the noise to the signal, from noise most of the way to the data."""
    ratios = torch.logspace(math.log10(first), math.log10(end), count, dtype=torch.float64)
    return process.time(ratios).tolist()


def orders(errors):
    return [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]


NOISE = seeded(range(20), (5,))()


@each_smooth
@pytest.mark.parametrize(("sampler", "order"), [(heun, 2), (ddim, 1)])
def test_order_of_the_ode_samplers(process, sampler, order):
    errors = []
    for steps in (50, 100, 200):
        t = geometric(process, steps + 1)
        x = process.sigma(torch.tensor(t[0], dtype=torch.float64)) * NOISE
        got = last(sampler(normal(process), lambda: NOISE, t, process=process)).x
        errors.append((got - flow(process, x, t[0], t[-1])).abs().max().item())
    assert errors[-1] < 0.05
    assert all(abs(o - order) < 0.15 for o in orders(errors)), (errors, orders(errors))


@each_gaussian
def test_heun_in_sigma_takes_any_process(process):
    """EDM's own steps to no noise at all, with the denoiser of another process."""
    denoise = process.in_sigma(normal(process))
    t = sigma_steps(100, 0.05, 15.0)
    got = last(heun(denoise, lambda: NOISE, t)).x
    expected = MU + (15 * NOISE - MU) * S / math.hypot(S, 15)
    # Heun's error, and the last step of Euler, which takes D for x at .05: .05^2 / S^2 of it.
    torch.testing.assert_close(got, expected, rtol=0, atol=3 * 0.05**2 / S**2)


def check_rk45(process, denoise):
    start, end = geometric(process, 2)
    x = process.sigma(torch.tensor(start, dtype=torch.float64)) * NOISE
    errors = []
    for tolerance in (1e-4, 1e-6, 1e-8):
        options = {"process": process, "tolerance": tolerance, "last_denoise": False}
        state = last(rk45(denoise, lambda: NOISE, (start, end), **options))
        assert state.t == pytest.approx(end)
        errors.append((state.x - flow(process, x, start, end)).abs().max().item())
    # The tolerance is that of a step, relative to an x of up to 60, and there are tens of steps.
    assert all(e < 1000 * t for e, t in zip(errors, (1e-4, 1e-6, 1e-8), strict=True)), errors
    assert errors[2] < errors[1] / 5 < errors[0] / 25, errors


@each_smooth
def test_rk45_meets_its_tolerance(process):
    check_rk45(process, normal(process))


@each_gaussian
def test_rk45_in_sigma_meets_its_tolerance(process):
    check_rk45(SigmaTime(), process.in_sigma(normal(process)))


@pytest.mark.parametrize("last_denoise", [False, True])
def test_rk45_is_solve_ivp(last_denoise):
    process = VP()
    denoise = normal(process)

    def slope(t, flat):
        x = torch.from_numpy(flat).reshape(20, 5)
        at = torch.full((20, 1), t, dtype=torch.float64)
        return process.velocity(denoise(x, at), x, at).numpy().ravel()

    start = process.sigma(torch.tensor(1.0, dtype=torch.float64)) * NOISE
    solution = scipy.integrate.solve_ivp(
        slope, process.span, start.numpy().ravel(), method="RK45", rtol=1e-5, atol=1e-5
    )
    states = list(
        rk45(denoise, lambda: NOISE, process.span, process=process, last_denoise=last_denoise)
    )
    steps = states[:-1] if last_denoise else states
    assert [state.t for state in steps] == solution.t.tolist()
    for state, y in zip(steps, solution.y.T, strict=True):
        assert np.array_equal(state.x.numpy().ravel(), y)
    assert steps[-1].evaluations == solution.nfev
    if last_denoise:
        assert states[-1].evaluations == solution.nfev + 1
        end = torch.full((20, 1), 1e-3, dtype=torch.float64)
        assert torch.equal(states[-1].x, denoise(steps[-1].x, end))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x, t: x * math.nan, r"a velocity that is not finite at t = 1\.0"),
        (lambda x, t: 1e30 * torch.randn_like(x), r"stopped at t = 1\.0 after 0 steps: .*step"),
    ],
)
def test_rk45_says_when_it_cannot(answer, message):
    with pytest.raises(ArithmeticError, match=message):
        last(rk45(answer, lambda: NOISE, (1.0, 1e-3), process=FlowToNoise()))


def pulses(sampler, draws, process, t):
    """Mean and deviation of what a sampler that is affine in its noise returns, without chance.

    Row 0 gets no noise at all, row j a one at its j-th draw: the differences to row 0 are the
    coefficients of the draws, whose squares add up to the variance. The first draw has the moments
    of x_t itself, not those of noise alone.
    """
    count = 0
    mean, deviation = moments(process, t)
    sigma = process.sigma(torch.tensor(t, dtype=torch.float64)).item()

    def randn():
        nonlocal count
        count += 1
        noise = torch.zeros(draws + 1, 1, dtype=torch.float64)
        noise[count] = 1
        return (mean + deviation * noise) / sigma if count == 1 else noise

    x = last(sampler(randn)).x
    assert count == draws
    return x[0].item(), (x[1:] - x[0]).norm().item()


@each_smooth
@pytest.mark.parametrize("name", ["euler_maruyama", "reverse_diffusion", "ancestral"])
def test_weak_order_of_the_sde_samplers(process, name):
    """Mean and deviation of the samples of normal data go to the true ones, order 1 at least."""

    def sampler(randn):
        if name == "ancestral":
            return ddim(normal(process), randn, t, process=process, eta=1.0)
        predictor = {"euler_maruyama": euler_maruyama_step, "reverse_diffusion": reverse_diffusion}
        return predictor_corrector(
            normal(process), randn, t, process=process, predictor=predictor[name], snr=None
        )

    errors = []
    for steps in (200, 400):
        t = geometric(process, steps)
        mean, deviation = pulses(sampler, steps, process, t[0])
        end = torch.tensor(t[-1], dtype=torch.float64)
        true_mean, true_deviation = moments(process, t[-1])
        if name != "ancestral":  # the last step is D, affine in x
            gain = (process.alpha(end) * S**2 / true_deviation**2).item()
            true_mean, true_deviation = MU, gain * true_deviation
        errors.append(math.hypot(mean - true_mean, deviation - true_deviation))
    assert errors[-1] < 0.01
    assert orders(errors)[0] > 0.8, errors


@each_smooth
def test_churn_keeps_the_distribution(process):
    """However often the noise is raised, the moments converge."""
    errors = []
    for steps in (100, 200):
        t = geometric(process, steps + 1)
        times = torch.tensor(t[:-1], dtype=torch.float64)
        inside = process.sigma(times) / process.alpha(times) <= 15
        mean, deviation = pulses(
            lambda randn, t=t: heun(
                normal(process), randn, t, Churn(S_churn=8, S_max=15), process=process
            ),
            1 + int(inside.sum()),
            process,
            t[0],
        )
        true_mean, true_deviation = moments(process, t[-1])
        errors.append(math.hypot(mean - true_mean, deviation - true_deviation))
    assert errors[-1] < 1e-3
    assert errors[1] < errors[0] / 2, errors


MEANS, DEVIATIONS, WEIGHTS = [-1.0, 1.5], [0.2, 0.3], [0.3, 0.7]  # of a mixture
M = 4000  # samples of it


def churned(denoise, randn, t, *, process):
    return heun(denoise, randn, t, Churn(S_churn=20, S_max=10), process=process)


def ancestral(denoise, randn, t, *, process):
    return ddim(denoise, randn, t, process=process, eta=1.0)


def adaptive(denoise, randn, t, *, process):
    return rk45(denoise, randn, (t[0], t[-1]), process=process)


def corrected_euler_maruyama(denoise, randn, t, *, process):
    return predictor_corrector(denoise, randn, t, process=process, predictor=euler_maruyama_step)


NOISE_LEFT = [heun, churned, ddim, ancestral]
DENOISED = [adaptive, euler_maruyama, predictor_corrector, corrected_euler_maruyama]


def check_mixture(x):
    """Weights, means and deviations of the two modes, within five standard errors and a sixth.

    The sixth is for the steps, the end of the noise at .02 and its start at 40.
    """
    x = x.flatten()
    halves = x[x < 0.3], x[x > 0.3]
    for mode, mean, deviation, weight in zip(halves, MEANS, DEVIATIONS, WEIGHTS, strict=True):
        m = len(mode)
        assert abs(m / len(x) - weight) < 6 * math.sqrt(weight * (1 - weight) / len(x))
        assert abs(mode.mean() - mean) < 6 * deviation / math.sqrt(m)
        assert abs(mode.std() / deviation - 1) < 6 / math.sqrt(2 * m)


@each_smooth
@pytest.mark.parametrize("sampler", NOISE_LEFT + DENOISED)
def test_mixture(process, sampler):
    generator = torch.Generator().manual_seed(0)
    denoise = mixture(process, MEANS, DEVIATIONS, WEIGHTS)
    state = last(
        sampler(
            denoise,
            lambda: torch.randn(M, 1, generator=generator, dtype=torch.float64),
            geometric(process, 120, end=0.02),
            process=process,
        )
    )
    x = state.x
    if sampler in NOISE_LEFT:
        x = denoise(x, torch.full((M, 1), state.t, dtype=torch.float64))
    check_mixture(x)


ALL = [heun, churned, ddim, ancestral, adaptive, *DENOISED[1:]]
EVALUATIONS = {  # for 6 times
    heun: 2 * 5,
    churned: 2 * 5,
    ddim: 5,
    ancestral: 5,
    euler_maruyama: 6,
    predictor_corrector: 2 * 6,
    corrected_euler_maruyama: 2 * 6,
}


@each_smooth
@pytest.mark.parametrize("sampler", ALL)
def test_states(process, sampler):
    """Counted, timed, in float64, without gradients, and no sooner than asked for."""
    asked = []
    weight = torch.ones((), requires_grad=True)

    def denoise(x, t):
        assert x.dtype == t.dtype == torch.float64
        assert t.shape == (20, 1)
        asked.append(t[0].item())
        return (weight * normal(process)(x, t)).float()

    t = geometric(process, 6)
    states = sampler(denoise, lambda: NOISE, t, process=process)
    first = next(states)
    assert asked == []
    sigma = process.sigma(torch.tensor(t[0], dtype=torch.float64))
    assert torch.equal(first.x, sigma * NOISE)
    count = 0
    for state in [first, *states]:
        assert state.x.dtype == torch.float64
        assert state.x.shape == NOISE.shape
        assert not state.x.requires_grad
        assert state.step == count
        count += 1
    assert state.evaluations == len(asked)
    assert state.t == pytest.approx(t[-1])
    if sampler in EVALUATIONS:
        assert len(asked) == EVALUATIONS[sampler]
        assert count == (6 if sampler in NOISE_LEFT else 7)


@pytest.mark.parametrize("sampler", ALL)
@pytest.mark.parametrize(
    ("process", "t"),
    [
        (FlowToNoise(), [0.1, 0.9]),  # those of the other convention
        (VP(), [1e-3, 1.0]),
        (SigmaTime(), [80.0, 80.0]),
        (SigmaTime(), [80.0]),
        (SigmaTime(), [80.0, math.nan]),
    ],
)
def test_times_must_run_from_noise_to_data(sampler, process, t):
    with pytest.raises(ValueError, match=r"t must hold at least two times, each with less noise"):
        next(sampler(normal(process), lambda: NOISE, t, process=process))


@pytest.mark.parametrize("sampler", DENOISED)
def test_noise_must_be_left(sampler):
    with pytest.raises(ValueError, match=r"t must end where there is noise left .*, got 0\.0"):
        next(sampler(normal(VP()), lambda: NOISE, [1.0, 0.0], process=VP()))


@pytest.mark.parametrize("sampler", [heun, ddim])
def test_the_last_step_of_a_flow_goes_to_the_data(sampler):
    process = FlowToNoise()
    x = last(sampler(normal(process), lambda: NOISE, even_steps(200, 1.0, 0.0), process=process)).x
    expected = MU + S * NOISE
    assert (x - expected).abs().max() < (5e-2 if sampler is ddim else 2e-3)


@pytest.mark.parametrize(
    "sampler", [churned, ancestral, euler_maruyama, predictor_corrector, corrected_euler_maruyama]
)
def test_student_t_noise_is_not_added_up(sampler):
    process = PROCESSES["PFGM++"]
    with pytest.raises(ValueError, match=r"needs Gaussian noise, got .*StudentT\(D=16\)"):
        next(sampler(normal(process), lambda: NOISE, [80.0, 1.0], process=process))


def test_corrector_on_the_steps_of_ddpm():
    """Its step has the factor 1 - beta_t, as the algorithm for VP has it; .3 makes it tell."""
    process = DDPM(T=3, beta_min=0.1, beta_max=0.3)
    asked = []

    def denoise(x, t):
        asked.append(x)
        return normal(process)(x, t)

    source = seeded(range(20), (5,))
    last(predictor_corrector(denoise, source, [2.0, 1.0], process=process, snr=0.2))
    again = seeded(range(20), (5,))
    before, z = process.sigma(torch.tensor(2.0).double()) * again(), again()
    t = torch.full((20, 1), 2.0, dtype=torch.float64)
    score = process.score(normal(process)(before, t), before, t)
    norms = [v.square().sum(1).sqrt().mean() for v in (z, score)]
    h = 2 * (1 - 0.3) * (0.2 * norms[0] / norms[1]) ** 2
    assert torch.equal(asked[0], before)
    torch.testing.assert_close(asked[1], before + h * score + (2 * h).sqrt() * z)


@pytest.mark.parametrize("process", [FlowToNoise(), FlowToData()])
def test_euler_maruyama_starts_from_pure_noise(process):
    """Where the forward SDE has an infinite g: moments of order 1 towards those of the data."""
    start, end = process.span
    errors = []
    for steps in (100, 200, 400):
        t = even_steps(steps - 1, start, end)
        mean, deviation = pulses(
            lambda randn, t=t: euler_maruyama(normal(process), randn, t, process=process),
            steps,
            process,
            start,
        )
        left = process.sigma(torch.tensor(end)).item()  # the last step is D, affine in x
        gain = S**2 / math.hypot(S, left / (1 - left)) ** 2
        errors.append(math.hypot(mean - MU, deviation - S * math.sqrt(gain)))
    assert errors[-1] < 0.01, errors
    assert all(order > 0.8 for order in orders(errors)), errors


@pytest.mark.parametrize("process", [FlowToNoise(), FlowToData()])
def test_the_diffusion_of_a_flow_keeps_its_marginals(process):
    """With g^2 > 0, other paths than the flow's and the same moments on the way; not with half."""
    assert process.diffusion(torch.tensor([process.span[0]])).item() == pytest.approx(2)
    middle = float(process.time(torch.tensor(0.7)))
    t = even_steps(399, process.span[0], middle)

    def state(randn):  # before the last step, D
        *_, before, _ = euler_maruyama(normal(process), randn, t, process=process)
        return [before]

    mean, deviation = pulses(state, 400, process, t[0])
    true_mean, true_deviation = moments(process, middle)
    assert mean == pytest.approx(true_mean, abs=2e-3)
    assert deviation == pytest.approx(true_deviation, abs=2e-3)


def test_churn_leaves_pure_noise_alone():
    process = FlowToNoise()
    t = even_steps(5, 1.0, 0.0)
    states = heun(normal(process), lambda: NOISE, t, Churn(S_churn=2), process=process)
    assert last(states).x.isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda *a: ddim(*a, process=SigmaTime(), eta=1.1), r"eta must lie in \[0, 1\], got 1.1"),
        (lambda *a: ddim(*a, process=SigmaTime(), eta=math.nan), "eta must lie in .* got nan"),
        (lambda *a: predictor_corrector(*a, process=SigmaTime(), snr=0.0), "snr must be above 0"),
        (lambda d, n, t: rk45(d, n, [*t, 0.5], process=SigmaTime()), "the last time, got 3 times"),
        (lambda d, n, t: even_steps(0, *t), "steps must be at least 1, got 0"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        next(call(normal(SigmaTime()), lambda: NOISE, [80.0, 1.0]))


def test_even_steps():
    assert even_steps(4, 1.0, 0.0) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert even_steps(1, 0.0, 0.999) == [0.0, 0.999]


def test_seeded_student_noise_depends_on_its_own_seed_alone():
    noise = PROCESSES["PFGM++"].noise
    together = seeded([3, 5, 8], (2, 4), noise=noise)()
    alone = seeded([5], (2, 4), noise=noise)()
    assert torch.equal(together[1:2], alone)
    ratio = together / seeded([3, 5, 8], (2, 4))()
    torch.testing.assert_close(ratio, ratio[:, :1, :1].expand_as(ratio))
    assert len(ratio[:, 0, 0].unique()) == 3
