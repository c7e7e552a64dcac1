"""Paths, training times and the errors of the processes."""

import math

import pytest
import torch

from stf_train.process import DDPM, EDM, VE, VP, FlowToData, FlowToNoise, Path, PFGMpp

from .toys import GAUSSIAN, PROCESSES, inside, mixture

each = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
each_gaussian = pytest.mark.parametrize("process", GAUSSIAN.values(), ids=GAUSSIAN.keys())


def close(got, expected, rtol=1e-11):
    torch.testing.assert_close(got, expected, rtol=rtol, atol=0)


@each
@pytest.mark.parametrize("name", ["alpha", "sigma"])
def test_derivatives(process, name):
    t = inside(process).requires_grad_()
    value = getattr(process, name)(t)
    # A constant has no graph of its own.
    (derivative,) = torch.autograd.grad((value + 0 * t).sum(), t)
    got = getattr(process, f"{name}_dot")(t.detach())
    assert got.shape == t.shape
    torch.testing.assert_close(got, derivative, rtol=1e-9, atol=1e-12)


@each
def test_noise_rises_towards_the_start_of_the_span(process):
    t = inside(process)
    assert (torch.atan2(process.sigma(t), process.alpha(t)).diff(dim=0) < 0).all()


@each
def test_time_is_the_inverse_of_the_noise_to_signal_ratio(process):
    t = inside(process)
    torch.testing.assert_close(
        process.time(process.sigma(t) / process.alpha(t)), t, rtol=1e-9, atol=1e-9
    )


@each
def test_float32_is_kept_and_accurate(process):
    """Near the data above all, where 1 - alpha^2 would cancel."""
    exact = inside(process)
    t = exact.float()
    for name in ("alpha", "sigma", "alpha_dot", "sigma_dot", "c_noise"):
        got = getattr(process, name)(t)
        assert got.dtype == torch.float32
        expected = getattr(process, name)(t.double())
        # t is rounded to 2^-24 of itself; exponents are below 10, and 999 of DDPM's steps.
        torch.testing.assert_close(got.double(), expected, rtol=2**-24 * 100, atol=1e-7)


@each
def test_marginal_by_its_moments(process, generator):
    """Mean alpha y and deviation sigma of what the loss hands to the target, by many draws."""
    y, m = 0.6, 40_000
    t = inside(process, 3)[1].float()
    noise = process.noise.draw((m, 1), generator)
    x = process.alpha(t) * y + process.sigma(t) * noise
    D = process.noise.D
    spread = 1.0 if D is None else D / (D - 2)  # variance of Student-t noise
    kurtosis = 3.0 if D is None else 3 + 6 / (D - 4)
    sigma = process.sigma(t).item() * math.sqrt(spread)
    assert abs(x.mean() - process.alpha(t) * y) < 5 * sigma / math.sqrt(m)
    assert abs(x.var() / sigma**2 - 1) < 5 * math.sqrt((kurtosis - 1) / m)


@each_gaussian
def test_transitions_compose(process):
    """From s to t and on to u is from s to u."""
    times = inside(process, 9)
    s, t, u = times[6:], times[3:6], times[:3]
    (a, v), (b, w), (c, z) = (process.transition(*pair) for pair in ((s, t), (t, u), (s, u)))
    close(a * b, c)
    close(b**2 * v + w, z, rtol=1e-9)
    assert (v > 0).all()


@each_gaussian
def test_diffusion_is_the_variance_of_a_short_transition(process):
    t = inside(process)
    start, end = process.span
    h = (end - start) * 1e-6
    _, v = process.transition(t + h, t)
    close(Path.diffusion(process, t), v / abs(h), rtol=1e-3)  # flows have one of their own


@each_gaussian
def test_velocity_is_that_of_the_probability_flow(process):
    """Of normal data, whose flow is x = alpha m + sqrt(alpha^2 s^2 + sigma^2) z with z fixed."""
    m, s = 0.3, 0.7
    t = inside(process).requires_grad_()
    z = torch.linspace(-2, 2, len(t), dtype=torch.float64)[:, None]
    x = process.alpha(t) * m + (process.alpha(t) ** 2 * s**2 + process.sigma(t) ** 2).sqrt() * z
    (expected,) = torch.autograd.grad(x.sum(), t)
    t, x = t.detach(), x.detach()
    D = mixture(process, [m], [s], [1.0])(x, t)
    torch.testing.assert_close(process.velocity(D, x, t), expected, rtol=1e-8, atol=1e-10)


@each_gaussian
def test_score_is_the_gradient_of_the_log_density(process):
    m, s = 0.3, 0.7
    t = inside(process)
    x = torch.linspace(-2, 2, len(t), dtype=torch.float64)[:, None]
    variance = process.alpha(t) ** 2 * s**2 + process.sigma(t) ** 2
    D = mixture(process, [m], [s], [1.0])(x, t)
    torch.testing.assert_close(
        process.score(D, x, t), (process.alpha(t) * m - x) / variance, rtol=1e-7, atol=1e-9
    )


@each_gaussian
def test_in_sigma_is_the_denoiser_of_edm(process):
    data = [-1.0, 0.8], [0.3, 0.2], [0.4, 0.6]
    sigma = torch.logspace(-1.3, 1.2, 20, dtype=torch.float64)[:, None]
    x = torch.linspace(-3, 3, 20, dtype=torch.float64)[:, None] * (1 + sigma)
    got = process.in_sigma(mixture(process, *data))(x, sigma)
    torch.testing.assert_close(got, mixture(EDM(1.0), *data)(x, sigma), rtol=1e-8, atol=1e-10)


def test_ve_in_numbers():
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    close(VE().sigma(t), torch.tensor([0.01, math.sqrt(0.5), 50.0], dtype=torch.float64))
    close(VE(0.02, 180.0).sigma(t)[2], torch.tensor(180.0, dtype=torch.float64))


def test_vp_in_numbers():
    """beta(t) = .1 + 19.9 t, and EDM's sigma / alpha of it."""
    t = inside(VP())
    close(-2 * VP().log_alpha_dot(t), 0.1 + 19.9 * t)
    close(VP().diffusion(t), 0.1 + 19.9 * t, rtol=1e-9)
    ratio = VP().sigma(t) / VP().alpha(t)
    close(ratio, ((9.95 * t**2 + 0.1 * t).exp() - 1).sqrt(), rtol=1e-9)
    close(VP().alpha(t) ** 2 + VP().sigma(t) ** 2, torch.ones_like(t))


def test_ddpm_in_numbers():
    process, product, expected = DDPM(), 1.0, []
    for step in range(1000):
        product *= 1 - (1e-4 + (2e-2 - 1e-4) * step / 999)
        expected.append(product)
    alpha = process.alpha(torch.arange(1000, dtype=torch.float64))
    close(alpha**2, torch.tensor(expected, dtype=torch.float64), rtol=1e-10)
    data = torch.tensor([-1.0], dtype=torch.float64)
    assert process.alpha(data) == 1
    assert process.sigma(data) == 0


def test_ddpm_is_close_to_vp():
    """beta_i is beta / 1000 half a step off, and -log(1 - beta_i) by beta_i^2 / 2 <= .01 beta_i."""
    step = torch.arange(1000, dtype=torch.float64)
    ratio = DDPM().log_alpha(step) / VP().log_alpha((step + 1) / 1000)
    assert ((ratio - 1).abs() < 1 / (step + 1) + 0.01).all()


def test_both_flows_are_one_in_opposite_directions():
    t = inside(FlowToNoise())
    forward, backward = FlowToData(), FlowToNoise()
    for name, sign in {"alpha": 1, "sigma": 1, "alpha_dot": -1, "sigma_dot": -1}.items():
        close(getattr(forward, name)(1 - t), sign * getattr(backward, name)(t))


def test_c_noise():
    t = torch.tensor([0.25], dtype=torch.float64)
    close(4 * EDM(1.0).c_noise(t), t.log())
    close(VE().c_noise(t), VE().sigma(t).log())
    close(VP().c_noise(t), 999 * t)
    for process in (DDPM(), FlowToNoise(), FlowToData()):
        assert torch.equal(process.c_noise(t), t)


@pytest.mark.parametrize("process", [EDM(1.0, -0.7, 1.3), PFGMpp(1.0, -0.7, 1.3, D=8)])
def test_noise_levels_of_edm_are_log_normal(process, generator):
    log_sigma = process.times(100_000, generator).log().double()
    standard_error = 1.3 / math.sqrt(len(log_sigma))
    assert abs(log_sigma.mean() + 0.7) < 4 * standard_error
    assert abs(log_sigma.std() - 1.3) < 4 * standard_error


@pytest.mark.parametrize("process", [VE(), VP(), FlowToNoise(), FlowToData()])
def test_other_times_are_uniform(process, generator):
    t = process.times(100_000, generator)
    assert abs(t.mean() - 0.5) < 5 / math.sqrt(12 * len(t))
    assert abs(t.var() - 1 / 12) < 5 / math.sqrt(180 * len(t))


@pytest.mark.parametrize("process", [VE(), VP(), FlowToNoise(), FlowToData()])
@pytest.mark.parametrize("draw", [0.0, 1 - 2**-24])
def test_no_draw_is_without_noise(process, draw, generator, monkeypatch):
    """The least and the largest of torch.rand, which do come in a long run."""
    monkeypatch.setattr(torch, "rand", lambda *size, generator: torch.full(size, draw))
    t = process.times(3, generator)
    assert (process.sigma(t) > 5e-6).all()
    assert (process.sigma(t) <= 50).all()
    assert process.weight(t).isfinite().all()


@pytest.mark.parametrize("batch", [1, 6, 7])
def test_times_of_ddpm_are_steps_and_antithetic(generator, batch):
    process = DDPM(T=10)
    for _ in range(20):
        t = process.times(batch, generator)
        assert t.shape == (batch,)
        assert torch.equal(t, t.round())
        half = batch // 2 + 1
        assert torch.equal(t[half:], 9 - t[: batch - half])
    many = process.times(20_000, generator)
    counts = torch.bincount(many.long(), minlength=10)
    assert len(counts) == 10
    # Pairs fall together: the counts have at most twice the variance of independent ones.
    assert (counts - 2000).abs().max() < 5 * math.sqrt(2 * 20_000 * 0.1 * 0.9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EDM(0.0), "sigma_data must be finite and above 0, got 0.0"),
        (lambda: EDM(math.nan), "sigma_data must be finite"),
        (lambda: EDM(1.0, P_std=-1.0), "P_std must be finite and above 0, got -1.0"),
        (lambda: EDM(1.0, P_mean=math.inf), "P_mean must be finite, got inf"),
        (lambda: PFGMpp(1.0, D=0.0), "D must be finite and above 0, got 0.0"),
        (lambda: PFGMpp(-1.0, D=8.0), "sigma_data must be finite and above 0, got -1.0"),
        (lambda: VE(50.0, 0.01), r"sigma_min must lie in \(0, sigma_max = 0.01\), got 50.0"),
        (lambda: VP(0.0), r"beta_min must lie in \(0, beta_max = 20.0\), got 0.0"),
        (lambda: DDPM(T=1), "T must be at least 2, got 1"),
        (lambda: DDPM(beta_max=1.0), "beta_max below 1, got 0.0001"),
        (lambda: FlowToNoise("ot"), "coupling must be 'independent'.*optimal transport.*got 'ot'"),
        (lambda: FlowToData("reflow"), "does not factor.*got 'reflow'"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
