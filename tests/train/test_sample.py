"""Heun's sampler on Gaussian data, whose denoiser and ODE have closed forms."""

import math
from itertools import pairwise

import pytest
import torch

from stf_train.sample import Churn, heun, seeded, sigma_steps

MU, S = 0.3, 0.7  # of the data


def denoise(x, sigma):
    """E[y | x] for y ~ N(MU, S^2)."""
    return MU + S**2 / (S**2 + sigma**2) * (x - MU)


def solution(start, sigma_start, sigma):
    """x(sigma) of dx/dsigma = (x - D)/sigma = sigma (x - MU) / (S^2 + sigma^2)."""
    return MU + (start - MU) * math.sqrt((S**2 + sigma**2) / (S**2 + sigma_start**2))


def last(states):
    for state in states:
        result = state
    return result


def error(steps):
    t = sigma_steps(steps + 1, 0.01, 10.0, 3.0)[:-1]  # ends at 0.01, second order to the end
    randn = seeded(range(20), (5,))
    x = last(heun(denoise, randn, t)).x
    start = 10.0 * seeded(range(20), (5,))()
    return (x - solution(start, 10.0, 0.01)).abs().max().item()


def test_converges_to_the_solution_with_order_two():
    errors = [error(steps) for steps in (40, 80, 160, 320)]
    orders = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert errors[-1] < 1e-3
    assert all(1.9 < order < 2.1 for order in orders), orders


def test_reaches_the_data_at_zero_noise():
    x = last(heun(denoise, seeded(range(50), (4,)), sigma_steps(200, 0.002, 80.0, 7.0))).x
    start = 80.0 * seeded(range(50), (4,))()
    # The step from 0.002 to 0 is Euler's: D is taken for x there, 0.002^2 / S^2 too much of it.
    torch.testing.assert_close(x, solution(start, 80.0, 0.0), rtol=0, atol=1e-3)


@pytest.mark.parametrize("steps", [2, 18, 40])
def test_counts_the_evaluations_there_really_are(steps):
    calls = []

    def counting(x, sigma):
        calls.append(sigma)
        return denoise(x, sigma)

    states = list(heun(counting, seeded([0, 1], (3,)), sigma_steps(steps, 0.002, 80.0, 7.0)))
    assert [state.step for state in states] == list(range(steps + 1))
    assert states[0].evaluations == 0
    assert states[-1].evaluations == len(calls) == 2 * steps - 1
    assert all(sigma.shape == (2, 1) for sigma in calls)


def test_state_stays_in_float64_around_a_float32_denoiser():
    seen = []

    def rounding(x, sigma):
        seen.append(x.dtype)
        return denoise(x, sigma).float()

    for state in heun(rounding, seeded([0], (3,)), sigma_steps(5, 0.002, 80.0, 7.0)):
        assert state.x.dtype == torch.float64
    assert set(seen) == {torch.float64}


def test_is_lazy():
    calls = []

    def counting(x, sigma):
        calls.append(sigma)
        return x

    states = heun(counting, seeded([0], (3,)), sigma_steps(5, 0.002, 80.0, 7.0))
    next(states)
    next(states)
    assert len(calls) == 2


def test_noise_levels():
    t = sigma_steps(9, 0.002, 80.0, 7.0)
    assert len(t) == 10
    assert t[0] == pytest.approx(80.0, rel=1e-12)
    assert t[-2] == pytest.approx(0.002, rel=1e-12)
    assert t[-1] == 0
    gaps = [a ** (1 / 7) - b ** (1 / 7) for a, b in pairwise(t[:-1])]
    assert gaps == pytest.approx([gaps[0]] * 8, rel=1e-9)
    assert gaps[0] > 0


@pytest.mark.parametrize("churn", [Churn(), Churn(S_churn=30), Churn(S_churn=30, S_max=1.0)])
def test_samples_have_the_distribution_of_the_data(churn):
    m = 20_000
    generator = torch.Generator().manual_seed(0)

    def randn():
        return torch.randn(m, 1, generator=generator, dtype=torch.float64)

    x = last(heun(denoise, randn, sigma_steps(80, 0.002, 80.0, 7.0), churn)).x
    # Five standard errors; the start at 80 instead of infinity adds MU S / 80 to the mean.
    assert abs(x.mean() - MU) < 5 * S / math.sqrt(m) + MU * S / 80
    assert abs(x.std() - S) < 5 * S / math.sqrt(2 * m) + 0.002


def test_churn_draws_noise_between_its_limits_alone():
    t = sigma_steps(18, 0.002, 80.0, 7.0)
    inside = sum(0.05 <= sigma <= 50 for sigma in t)
    draws = []

    def randn():
        draws.append(1)
        return torch.zeros(1, 1, dtype=torch.float64)

    last(heun(denoise, randn, t, Churn(S_churn=40, S_min=0.05, S_max=50)))
    assert 0 < inside < 18
    assert len(draws) == 1 + inside


def test_churn_raises_the_noise_by_its_formula():
    """One step from t to 0 with D = 0 leaves nothing but the fresh noise, seen by D at t_hat."""
    seen = []

    def spy(x, sigma):
        seen.append((x.clone(), sigma))
        return torch.zeros_like(x)

    ones = torch.ones(1, 1, dtype=torch.float64)
    for S_churn, gamma in ((0.1, 0.1), (100.0, math.sqrt(2) - 1)):
        last(heun(spy, lambda: ones, [2.0, 0.0], Churn(S_churn, S_noise=1.5)))
        x, sigma = seen.pop()
        t_hat = 2 * (1 + gamma)
        assert sigma.item() == pytest.approx(t_hat, rel=1e-12)
        assert x.item() == pytest.approx(2 + 1.5 * math.sqrt(t_hat**2 - 4), rel=1e-12)


def test_a_sample_depends_on_its_own_seed_alone():
    t, churn = sigma_steps(6, 0.002, 80.0, 7.0), Churn(S_churn=10)
    together = last(heun(denoise, seeded([3, 5, 8], (4,)), t, churn)).x
    alone = last(heun(denoise, seeded([5], (4,)), t, churn)).x
    assert torch.equal(together[1:2], alone)
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 0.002, 80.0, 7.0), "steps must be at least 2, got 1"),
        ((18, 0.0, 80.0, 7.0), r"sigma_min must lie in \(0, sigma_max = 80.0\), got 0.0"),
        ((18, 90.0, 80.0, 7.0), "sigma_min must lie in .* got 90.0"),
    ],
)
def test_sigma_steps_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        sigma_steps(*arguments)


@pytest.mark.parametrize("name", ["S_churn", "S_min", "S_max", "S_noise"])
@pytest.mark.parametrize("value", [-1.0, math.nan])
def test_churn_errors(name, value):
    with pytest.raises(ValueError, match=f"{name} must be at least 0, got {value}"):
        Churn(**{name: value})
