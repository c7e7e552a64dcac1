"""Guidance, where the classes and their probabilities are known."""

import pytest
import torch

from stf_train.guidance import classifier_guidance, extrapolated
from stf_train.process import OUTPUTS, VP
from stf_train.sample import ddim, even_steps, heun, seeded, sigma_steps

from .toys import GAUSSIAN, inside, last, mixture

MEANS, DEVIATIONS, WEIGHTS = [-1.0, 1.5], [0.2, 0.3], [0.3, 0.7]

each = pytest.mark.parametrize("process", GAUSSIAN.values(), ids=GAUSSIAN.keys())


def both(process):
    return mixture(process, MEANS, DEVIATIONS, WEIGHTS)


def of_class(process, c):
    """The denoiser of one component alone."""
    return mixture(process, [MEANS[c]], [DEVIATIONS[c]], [1.0])


def log_posterior(process, c):
    """log p(c | x_t): one-dimensional data, so that a sample is its only coordinate."""
    m, s, w = (torch.tensor(v, dtype=torch.float64) for v in (MEANS, DEVIATIONS, WEIGHTS))

    def log_p(x, t):
        variance = (process.alpha(t) * s) ** 2 + process.sigma(t) ** 2  # [B, 2]
        joint = w.log() - variance.log() / 2 - (x - process.alpha(t) * m) ** 2 / (2 * variance)
        return joint.log_softmax(1)[:, c]

    return log_p


def points(process):
    t = inside(process)
    scale = process.sigma(t) + process.alpha(t)
    return torch.linspace(-2, 2, len(t), dtype=torch.float64)[:, None] * scale, t


@each
@pytest.mark.parametrize("c", [0, 1])
@torch.no_grad()
def test_the_true_classifier_makes_the_conditional_denoiser(process, c):
    """Under no_grad, as samplers run."""
    x, t = points(process)
    guided = classifier_guidance(both(process), log_posterior(process, c), process)
    got, expected = guided(x, t), of_class(process, c)(x, t)
    # x / alpha cancels where alpha is small.
    ratio = (process.sigma(t) / process.alpha(t)).max().item()
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11 * max(1, ratio**2))
    assert (expected - both(process)(x, t)).abs().max() > 0.5
    assert not got.requires_grad


@each
def test_classifier_guidance_adds_to_the_score(process):
    """score + scale grad log p(c | x_t), whatever the scale."""
    x, t = points(process)
    log_p = log_posterior(process, 1)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(log_p(leaf, t).sum(), leaf)
    guided = classifier_guidance(both(process), log_p, process, scale=2.5)
    got = process.score(guided(x, t), x, t)
    expected = process.score(both(process)(x, t), x, t) + 2.5 * gradient
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-9)


def test_classifier_guidance_draws_from_the_class():
    process = VP()
    guided = classifier_guidance(both(process), log_posterior(process, 0), process)
    x = last(ddim(guided, seeded(range(64), (1,)), even_steps(60, *process.span), process=process))
    assert (abs(x.x - MEANS[0]) < 5 * DEVIATIONS[0]).all()


@each
def test_extrapolation_at_its_landmarks(process):
    x, t = points(process)
    conditional, unconditional = of_class(process, 1), both(process)
    good, bad = conditional(x, t), unconditional(x, t)
    for w, expected in {0.0: good, -1.0: bad, 1.0: 2 * good - bad}.items():
        got = extrapolated(conditional, unconditional, w)(x, t)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert (good - bad).abs().max() > 0.5


@each
@pytest.mark.parametrize("name", OUTPUTS)
def test_extrapolating_denoisers_extrapolates_any_output(process, name):
    """(1 + w) F_c - w F_u, as the papers have it for epsilon, score or velocity."""
    x, t = points(process)
    output, w = OUTPUTS[name], 1.7
    conditional, unconditional = of_class(process, 1), both(process)

    def says(D):
        return (D - output.c_skip(process, t) * x) / output.c_out(process, t)

    expected = (1 + w) * says(conditional(x, t)) - w * says(unconditional(x, t))
    got = says(extrapolated(conditional, unconditional, w)(x, t))
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


def test_autoguidance_undoes_what_is_worse_on_a_line():
    """A network that errs by e and one that errs by 3 e, led away from: no error at w = 1/2."""
    truth = of_class(GAUSSIAN["EDM"], 0)

    def error(x, t):
        return torch.sin(3 * x) / (1 + t)

    guided = extrapolated(
        lambda x, t: truth(x, t) + error(x, t), lambda x, t: truth(x, t) + 3 * error(x, t), w=0.5
    )
    x, t = points(GAUSSIAN["EDM"])
    torch.testing.assert_close(guided(x, t), truth(x, t), rtol=1e-12, atol=1e-12)


def test_samplers_count_a_guided_denoiser_once():
    process = GAUSSIAN["EDM"]
    guided = extrapolated(of_class(process, 1), both(process), 1.0)
    assert last(heun(guided, seeded([0], (1,)), sigma_steps(5))).evaluations == 9
