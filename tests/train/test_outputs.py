"""What networks say, and the preconditioning and loss weight that follow from it."""

import itertools

import pytest
import torch

import stf_kernels
from stf_train.process import EDM, OUTPUTS, VE, VP, F, FlowToData, PFGMpp, Velocity

from .toys import GAUSSIAN, OUTPUT_KINDS, PROCESSES, inside

each_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
each_output = pytest.mark.parametrize("name", OUTPUT_KINDS)

SIGMA = torch.logspace(-3, 2, 41, dtype=torch.float64).reshape(-1, 1, 1, 1)
SD = 0.85
edm = EDM(sigma_data=SD)


def says(name, process, D, x, t):
    """The output of a network that knows D, by the definition of its kind."""
    alpha, sigma = process.alpha(t), process.sigma(t)
    eps = (x - alpha * D) / sigma
    scale = (sigma**2 + (0.7 * alpha) ** 2).sqrt()
    return {
        "score": -eps / sigma,
        "epsilon": eps,
        "denoised": D,
        "v": alpha * eps - sigma * D,
        "velocity": process.alpha_dot(t) * D + process.sigma_dot(t) * eps,
        "F": (D - alpha * (0.7 / scale) ** 2 * x) * scale / (0.7 * sigma),
    }[name]


def setting(process, generator):
    t = inside(process)
    D, noise = (torch.randn(41, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    return t, D, process.alpha(t) * D + process.sigma(t) * noise


@each_process
@each_output
def test_a_network_that_knows_the_answer_gives_it(process, name, generator):
    output = OUTPUT_KINDS[name]
    t, D, x = setting(process, generator)
    got = output.c_skip(process, t) * x + output.c_out(process, t) * says(name, process, D, x, t)
    # At the noisiest times x / alpha and sigma F / alpha cancel.
    ratio = (process.sigma(t) / process.alpha(t)).max().item()
    torch.testing.assert_close(got, D, rtol=0, atol=1e-13 * max(1.0, ratio))


@each_process
@each_output
def test_the_weight_is_that_of_the_plain_loss_on_the_output(process, name, generator):
    """lambda ||D - D'||^2 = ||F - F'||^2, with sigma^2 before it for the score."""
    t, D, x = setting(process, generator)
    other = D + torch.randn(D.shape, generator=generator, dtype=torch.float64)
    on_output = says(name, process, D, x, t) - says(name, process, other, x, t)
    if name == "score":
        on_output = on_output * process.sigma(t)
    got = OUTPUT_KINDS[name].weight(process, t) * (D - other) ** 2
    torch.testing.assert_close(got, on_output**2, rtol=1e-6, atol=1e-9)


@each_process
def test_score_and_epsilon_have_the_same_loss(process):
    t = inside(process)
    weights = [OUTPUTS[name].weight(process, t) for name in ("score", "epsilon")]
    torch.testing.assert_close(*weights, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("process", "name"),
    [
        *itertools.product(GAUSSIAN.values(), ["score", "epsilon", "v", "velocity"]),
        *itertools.product([EDM(0.7), VE()], ["edm"]),  # which presumes alpha = 1
    ],
)
def test_kinds_are_those_of_the_kernels(process, name, generator):
    """stable_target's own parameterisations, solved for D, give its "denoised"."""
    t, _, x = setting(process, generator)
    refs = torch.randn(30, 3, generator=generator, dtype=torch.float64)
    output = OUTPUT_KINDS["F" if name == "edm" else name]
    target = {
        "velocity": stf_kernels.Velocity(process.alpha_dot(t), process.sigma_dot(t)),
        "edm": stf_kernels.EDM(0.7),
    }.get(name, name)
    raw, denoised = (
        stf_kernels.stable_target(
            x, refs, process.sigma(t), alpha=process.alpha(t), target=kind, backend="torch"
        )
        for kind in (target, "denoised")
    )
    got = output.c_skip(process, t) * x + output.c_out(process, t) * raw
    ratio = (process.sigma(t) / process.alpha(t)).max().item()
    torch.testing.assert_close(got, denoised, rtol=0, atol=1e-13 * max(1.0, ratio))


def test_denoise_puts_it_together(generator):
    for process in PROCESSES.values():
        t, D, x = setting(process, generator)
        name = next(n for n, kind in OUTPUT_KINDS.items() if kind == process.output)
        asked = []

        def network(scaled, c_noise, name=name, process=process, D=D, x=x, t=t, asked=asked):
            asked.append((scaled, c_noise))
            return says(name, process, D, x, t)

        ratio = (process.sigma(t) / process.alpha(t)).max().item()
        torch.testing.assert_close(
            process.denoise(network, x, t), D, rtol=0, atol=1e-13 * max(1.0, ratio)
        )
        ((scaled, c_noise),) = asked
        assert torch.equal(scaled, process.output.c_in(process, t) * x)
        assert torch.equal(c_noise, process.c_noise(t).flatten())


def test_labels_reach_a_conditional_network_alone():
    x, t, labels = torch.ones(2, 3), torch.ones(2, 1), torch.tensor([4, -1])
    asked = []

    def network(*arguments):
        asked.append(arguments[2:])
        return arguments[0]

    edm.denoise(network, x, t)
    edm.denoise(network, x, t, labels)
    assert asked[0] == ()
    assert asked[1][0] is labels


def test_the_output_of_a_process_is_a_choice(generator):
    process = VP(output=F(0.7))
    t, D, x = setting(process, generator)
    got = process.denoise(lambda *_: says("F", process, D, x, t), x, t)
    torch.testing.assert_close(got, D, rtol=0, atol=1e-12)
    assert not torch.equal(process.weight(t), VP().weight(t))


def test_velocity_in_the_words_of_flow_matching():
    """D = x + (1 - t) F with the data at t = 1; the weight is that of ||F - (y - eps)||^2."""
    process, t = FlowToData(), torch.tensor([[0.25]], dtype=torch.float64)
    assert isinstance(process.output, Velocity)
    assert process.output.c_skip(process, t) == 1
    assert process.output.c_out(process, t) == 0.75
    assert process.weight(t) == 1 / 0.75**2


def test_preconditioning_of_pfgmpp_is_that_of_edm():
    ours = PFGMpp(SD, D=64)
    for name in ("c_skip", "c_out", "c_in", "weight"):
        got, expected = (getattr(p.output, name)(p, SIGMA) for p in (ours, edm))
        assert torch.equal(got, expected)


def effective_target_variance(c_skip: torch.Tensor) -> torch.Tensor:
    """Var of y - c_skip (y + n) for y of variance SD^2 and n of variance SIGMA^2."""
    return (1 - c_skip) ** 2 * SD**2 + c_skip**2 * SIGMA**2


def assert_one(values: torch.Tensor) -> None:
    torch.testing.assert_close(values, torch.ones_like(values), rtol=1e-12, atol=0)


def test_input_of_edm_has_unit_variance():
    assert_one(edm.output.c_in(edm, SIGMA) ** 2 * (SIGMA**2 + SD**2))


def test_effective_target_of_edm_has_unit_variance():
    c_skip, c_out = edm.output.c_skip(edm, SIGMA), edm.output.c_out(edm, SIGMA)
    assert_one(effective_target_variance(c_skip) / c_out**2)


@pytest.mark.parametrize("shift", [-1e-3, 1e-3])
def test_c_skip_of_edm_amplifies_errors_least(shift):
    c_skip = edm.output.c_skip(edm, SIGMA)
    best = effective_target_variance(c_skip)
    assert (effective_target_variance(c_skip + shift) > best).all()


def test_weighted_loss_of_edm_is_even_over_noise_levels():
    assert_one(edm.weight(SIGMA) * edm.output.c_out(edm, SIGMA) ** 2)


@pytest.mark.parametrize("process", GAUSSIAN.values(), ids=GAUSSIAN.keys())
def test_a_silent_F_is_the_posterior_mean_of_centred_normal_data(process):
    t = inside(process)
    x = torch.linspace(-3, 3, len(t), dtype=torch.float64)[:, None]
    alpha, sigma = process.alpha(t), process.sigma(t)
    precision = 1 / SD**2 + (alpha / sigma) ** 2
    D = F(SD).c_skip(process, t) * x
    torch.testing.assert_close(D, alpha * x / sigma**2 / precision, rtol=1e-9, atol=0)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_sigma_data_is_checked(value):
    with pytest.raises(ValueError, match=f"sigma_data must be finite and above 0, got {value}"):
        F(value)
