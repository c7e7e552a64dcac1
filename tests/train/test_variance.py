"""The variance of targets: closed forms, estimates, and the study over seeds."""

import itertools
import json
import math
from functools import partial

import pytest
import torch
from click.testing import CliRunner
from scipy.integrate import quad
from torch.nn.functional import logsigmoid

from stf_kernels import IdealDenoiser, oracle
from stf_train import data, variance_cli, variance_study
from stf_train.process import VE
from stf_train.targets import DenoisingTarget
from stf_train.variance import (
    Budget,
    Curve,
    Estimate,
    Patches,
    TwoGaussians,
    WholeSet,
    closed_forms,
    divergence,
    measured,
    noisy,
    scales,
    stable_variance,
)
from stf_train.variance_plots import Numbers, Panel
from stf_train.variance_study import Arm, Judge, Row, Settings, study, summaries

PROCESS = VE()
HALF = 0.01 * 5000**0.5  # sigma at t = .5
TINY = Settings(steps=3, looks=(1, 3), batch=8, cbase=16, judged=32, drawn=40, sampling=2)


def test_divergence_is_the_f_divergence_by_its_definition():
    def f(r):
        return (1 / r - 1) ** 2 if r < 1.5 else 8 * r / 27 - 1 / 3

    w = torch.tensor([[0.05, 0.15, 0.3, 0.5], [0.25] * 4, [1e-9, 0.2, 0.3, 0.5 - 1e-9]]).double()
    expected = [sum(k * f(0.25 / k) for k in row) for row in w.tolist()]
    assert divergence(w).tolist() == pytest.approx(expected, rel=1e-12)
    assert divergence(w)[1] == 0


def test_divergence_of_a_single_weight():
    w = torch.eye(7, dtype=torch.float64)
    assert divergence(w).tolist() == pytest.approx([36 + 8 * 6 / (27 * 7)] * 7)


@pytest.mark.parametrize("make", [lambda: Patches(60, size=4), lambda: TwoGaussians(60)])
@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_weights_of_the_whole_set_are_those_of_direct_differences(make, t, generator):
    problem = make()
    y = problem.whole.double() / (255 if problem.whole.dtype == torch.uint8 else 1)
    x = noisy(y[:20], t, PROCESS, generator)
    found = WholeSet(problem, PROCESS).weights(x, t)
    _, expected = oracle.posterior(x, y, scales(PROCESS, t)[1])
    assert found.shape == (20, 60)
    # Logits are kept to 2^-25 of their distance to the largest.
    torch.testing.assert_close(found, expected, rtol=0, atol=2.0**-25)


def test_v_dsm_of_a_set_is_the_trace_of_the_covariance():
    problem, t = Patches(50, size=4), 0.4
    whole, sigma = WholeSet(problem, PROCESS), scales(PROCESS, t)[1]
    y = problem.references(problem.whole).decode(torch.arange(50)).double().flatten(1)
    x = torch.cat(list(whole._noisy(t, 120, torch.Generator().manual_seed(3)))).flatten(1)
    _, w = oracle.posterior(x, y, sigma)
    traces = (w @ y.square()).sum(1) - (w @ y).square().sum(1)
    found = whole.dsm(t, 120, torch.Generator().manual_seed(3))
    assert found[0] == pytest.approx(traces.mean().item() / sigma**4, rel=1e-6)
    assert found[1] == pytest.approx(traces.std().item() / sigma**4 / 120**0.5, rel=1e-6)


def test_every_sample_of_the_set_is_a_source_as_often_as_any_other():
    problem = Patches(10, size=4)
    (x,) = WholeSet(problem, PROCESS)._noisy(0.0, 30, torch.Generator())
    nearest = torch.cdist(x.flatten(1), problem.whole.flatten(1).double() / 255).argmin(1)
    assert nearest.bincount().tolist() == [3] * 10


def test_gaussian_score_is_the_gradient_of_the_log_density(generator):
    problem, t = TwoGaussians(2, d=3, mu=0.5, s=0.2), 0.6
    v = scales(PROCESS, t)[1] ** 2 + 0.2**2
    x = torch.randn(20, 3, generator=generator, dtype=torch.float64).requires_grad_()
    halves = [-((x - c * 0.5) ** 2).sum(1) / (2 * v) for c in (1, -1)]
    torch.logsumexp(torch.stack(halves), 0).sum().backward()
    torch.testing.assert_close(problem.score(x.detach(), t, PROCESS), x.grad)


def normal(z):
    return math.exp(-z * z / 2) / math.sqrt(2 * math.pi)


def test_closed_v_dsm_by_another_quadrature():
    problem = TwoGaussians(2)
    v, r = HALF**2 + 1e-8, 0.8

    def integrand(z):
        odds = 2 * r * (r + math.sqrt(v) * z) / v
        return normal(z) * 4 * math.exp(-odds) / (1 + math.exp(-odds)) ** 2 * r**2 / v**2

    expected = quad(integrand, -12, 12)[0] + 64 * 1e-8 / (HALF**2 * v)
    assert expected == pytest.approx(0.94854, abs=5e-6)
    assert problem.closed_dsm(HALF) == pytest.approx(expected, rel=1e-9)


def test_closed_v_stf_by_enumeration():
    """All signs of the other references, one after the other."""
    problem, n = TwoGaussians(2, s=0.0), 4
    v, r = HALF**2, 0.8

    def a(odds):
        return 1 / (1 + math.exp(-odds))

    def integrand(z):
        odds = 2 * r * (r + math.sqrt(v) * z) / v
        total = 0.0
        for signs in itertools.product((1, 0), repeat=n - 1):
            k = 1 + sum(signs)
            share = k * a(odds) / (k * a(odds) + (n - k) * (1 - a(odds)))
            total += 4 * r**2 * (share - a(odds)) ** 2 / v**2
        return normal(z) * total / 2 ** (n - 1)

    assert problem.closed_stf(HALF, n) == pytest.approx(quad(integrand, -10, 12)[0], rel=1e-8)


def test_closed_forms_for_one_reference_are_those_of_dsm():
    dsm, _, stf = closed_forms(TwoGaussians(2), PROCESS, [1], points=9)
    assert (dsm.quantity, stf.quantity, stf.n) == ("V_DSM", "V_STF", 1)
    # Leading order in s / sigma, which is 1e-2 at t = 0.
    assert stf.values == pytest.approx(dsm.values, rel=2e-4)


def test_closed_divergence_is_that_of_two_points():
    problem = TwoGaussians(2)
    assert problem.closed_divergence(1e-2) == pytest.approx(1 + 8 / 54)  # only one is left
    assert problem.closed_divergence(50.0) < 1e-3

    def integrand(z):
        odds = torch.tensor(2 * 0.8 * (0.8 + HALF * z) / HALF**2, dtype=torch.float64)
        w = logsigmoid(torch.stack([odds, -odds])).exp()
        return normal(z) * divergence(w[None]).item()

    # The kink of f leaves the trapezoidal sum a second-order method.
    expected = quad(integrand, -10, 10, limit=200)[0]
    assert problem.closed_divergence(HALF) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("n", [1, 2, 30])
@pytest.mark.parametrize("t", [0.0, 0.5])
def test_stable_variance_is_the_closed_form(n, t, generator):
    problem = TwoGaussians(2)
    mean, error = stable_variance(problem, PROCESS, t, n, 3000, generator)
    expected = problem.closed_stf(scales(PROCESS, t)[1], n)
    # At t = 0 the weights vary by s / sigma sqrt(d) = 8 %, whose square the closed form lacks.
    assert abs(mean - expected) < 4.5 * error + (0.01 * expected if t == 0 else 0)
    assert error < 0.2 * expected


def test_stable_variance_of_a_finite_set_lies_between_dsm_and_nothing(generator):
    problem, t = Patches(64, size=4), 0.5
    dsm = WholeSet(problem, PROCESS).dsm(t, 2000, generator)
    one, some = (stable_variance(problem, PROCESS, t, n, 2000, generator) for n in (1, 16))
    assert abs(one[0] - dsm[0]) < 4.5 * math.hypot(one[1], dsm[1])
    assert some[0] + 4.5 * some[1] < dsm[0]
    # All of the set in another order: the same bits.
    assert stable_variance(problem, PROCESS, t, 64, 200, generator) == (0, 0)


def test_stable_variance_takes_sources_among_the_references(monkeypatch, generator):
    seen = []

    def spy(x, references, sigma, *, alpha, labels):
        y = references.decode(torch.arange(len(references))).double()
        far = torch.cdist(x.flatten(1), y.flatten(1))
        own = far.masked_fill(references.labels != labels[:, None], torch.inf)
        # A patch may be in other sets too.
        seen.append((len(references), own.amin(1).equal(far.amin(1))))
        return oracle.stable_target(x, y, sigma)

    problem = Patches(200, size=8)
    monkeypatch.setattr(problem, "score", lambda x, t, process: torch.zeros_like(x))
    monkeypatch.setattr("stf_train.variance.stable_target", spy)
    stable_variance(problem, PROCESS, 0.0, 100, 160, generator)
    assert seen == [(1000, True)]  # ten sets of 100 in a call, 16 sources in each


def test_patches_are_distinct_and_from_the_photographs():
    patches = Patches(300, seed=1)
    assert patches.whole.shape == (300, 3, 16, 16)
    assert patches.whole.dtype == torch.uint8
    drawn = patches.sets(2, 250, torch.Generator().manual_seed(0))
    for one in drawn.split(250):
        # Two patches of one colour may be equal, so positions are what is distinct.
        rows, counts = one.flatten(1).unique(dim=0, return_counts=True)
        _, whole = patches.whole.flatten(1).unique(dim=0, return_counts=True)
        assert counts.max() <= whole.max()
        assert len(rows) > 200
    with pytest.raises(ValueError, match=r"N must lie in 1\.\.8216"):
        Patches(9000)
    with pytest.raises(ValueError, match=r"n must lie in 1\.\.300"):
        patches.sets(1, 301, torch.Generator())


def test_estimate():
    assert Estimate.of(torch.tensor([1.0, 2.0, 3.0, 6.0])) == pytest.approx(
        (3, math.sqrt(14 / 3 / 4))
    )


def test_measured_has_a_generator_for_every_point():
    budget, problem = Budget(3, 64, 32), TwoGaussians(40)
    ticks = []
    both = measured(problem, PROCESS, (1, 4), budget, 0, lambda: ticks.append(1))
    assert [(c.quantity, c.n) for c in both] == [
        ("V_DSM", None),
        ("D", None),
        ("V_STF", 1),
        ("V_STF", 4),
    ]
    assert len(ticks) == 12
    # A curve does not depend on which others are drawn beside it.
    assert measured(problem, PROCESS, (4,), budget, 0)[2] == both[3]
    assert measured(problem, PROCESS, (4,), budget, 1)[2] != both[3]


def test_numbers_come_back(tmp_path):
    curve = Curve("V_STF", 4, (0.0, 1.0), (1.25, 1 / 3), None)
    Numbers({"seed": 1}, (Panel("x", (curve,)),)).save(tmp_path / "n.json")
    found = Numbers.load(tmp_path / "n.json")
    assert found.settings == {"seed": 1}
    assert tuple(found.panels[0].curves[0].values) == (1.25, 0.333333)
    (tmp_path / "n.json").write_text("{}")
    with pytest.raises(ValueError, match="must hold the numbers of a figure"):
        Numbers.load(tmp_path / "n.json")


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs stf-variance in an empty folder with next to nothing to compute."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(variance_cli, "QUICK", Budget(3, 32, 32))
    monkeypatch.setattr(variance_cli, "QUICK_STUDY", TINY)
    monkeypatch.setattr(variance_cli, "Patches", partial(Patches, size=4))
    monkeypatch.setattr(variance_cli, "closed_forms", partial(closed_forms, points=5))
    return lambda *arguments: CliRunner().invoke(variance_cli.variance, arguments)


@pytest.mark.parametrize(("figure", "curves"), [("figure-2", [12]), ("figure-3", [5, 5])])
def test_figures_are_drawn_again_from_their_numbers(command, tmp_path, figure, curves):
    result = command(figure, "--quick")
    assert result.exit_code == 0, result.output
    picture, numbers = tmp_path / f"{figure}.png", tmp_path / f"{figure}.json"
    panels = json.loads(numbers.read_text())["panels"]
    assert [len(panel["curves"]) for panel in panels] == curves
    before = picture.stat().st_size
    picture.unlink()
    assert command("draw", str(numbers)).exit_code == 0
    # All but the sixth digit.
    assert abs(picture.stat().st_size - before) < 0.02 * before


def test_quick_goes_before_or_behind_the_command(command, tmp_path):
    for number, line in enumerate(["--quick figure-2", "figure-2 --quick"]):
        result = command(*line.split(), "--output", f"{number}.png")
        assert result.exit_code == 0, result.output
    one, other = (json.loads((tmp_path / f"{n}.json").read_text()) for n in (0, 1))
    assert one == other
    assert one["settings"]["points"] == 3


def test_figures_replace_nothing_unasked(command, tmp_path):
    for name in ("figure-2.png", "figure-2.json"):
        (tmp_path / name).write_text("kept")
        result = command("figure-2", "--quick")
        assert result.exit_code == 2
        assert f"{name} is there; --overwrite replaces it" in result.output
        assert (tmp_path / name).read_text() == "kept"
        (tmp_path / name).unlink()
    (tmp_path / "figure-2.png").write_text("old")
    assert command("figure-2", "--quick", "--overwrite").exit_code == 0
    assert (tmp_path / "figure-2.png").read_bytes() != b"old"


def test_figures_want_a_png(command, tmp_path):
    result = command("figure-2", "--output", "x.jpg")
    assert result.exit_code == 2
    assert "x.jpg does not end in .png" in result.output
    assert not list(tmp_path.iterdir())


class Ideal(torch.nn.Module):
    """F of the exact denoiser over all digits, off by `error`."""

    def __init__(self, judge: Judge, error: float = 0.0) -> None:
        super().__init__()
        self.judge, self.error = judge, error
        self.best = IdealDenoiser(data.digits())

    def forward(self, x_in: torch.Tensor, c_noise: torch.Tensor) -> torch.Tensor:
        process = self.judge._process
        sigma = (4 * c_noise.double()).exp().reshape(-1, 1, 1, 1)
        output = process.output
        x = x_in.double() / output.c_in(process, sigma)
        D = self.best(x, sigma) - output.c_skip(process, sigma) * x
        return (D / output.c_out(process, sigma)).float() + self.error


def test_excess_risk_is_that_over_the_exact_denoiser():
    judge = Judge(TINY)
    assert judge.excess_risk(Ideal(judge)) < 1e-8
    # The weight makes an error of F count the same at every noise level.
    assert judge.excess_risk(Ideal(judge, 0.1)) == pytest.approx(0.01, rel=1e-3)


def test_frechet_distance_of_the_exact_denoiser_is_that_of_the_digits_themselves():
    judge = Judge(Settings(judged=16, drawn=300, sampling=10))
    floor = judge.floor()
    assert 0 < floor < 1
    assert judge.frechet(Ideal(judge)) < 1.5 * floor
    assert judge.frechet(Ideal(judge, 0.5)) > 2 * floor


def test_the_target_is_all_that_differs_between_the_runs_of_a_seed(monkeypatch):
    judge = Judge(TINY)
    dsm, stf = (variance_study.run(TINY, Arm(n), 0, judge) for n in (None, 64))
    assert stf.excess_risk[-1] != dsm.excess_risk[-1]
    monkeypatch.setattr(variance_study, "StableTarget", lambda bank, n: DenoisingTarget(bank))
    same = variance_study.run(TINY, Arm(64), 0, judge)
    assert (same.excess_risk, same.frechet) == (dsm.excess_risk, dsm.frechet)
    assert (same.n, same.images) == (64, (8, 24))


def test_an_interrupted_study_goes_on(tmp_path):
    arms, seeds = (Arm(None), Arm(64)), (0, 1)
    whole = tmp_path / "whole.jsonl"
    rows = list(study(whole, TINY, arms, seeds))
    assert [(row.n, row.seed) for row in rows] == [(None, 0), (64, 0), (None, 1), (64, 1)]

    part = tmp_path / "part.jsonl"
    lines = whole.read_text().splitlines(keepends=True)
    part.write_text("".join(lines[:2]) + lines[2][:50])  # torn
    ticks = []
    assert list(study(part, TINY, arms, seeds, lambda: ticks.append(1))) == rows
    assert part.read_text() == whole.read_text()
    assert len(ticks) == 2 * TINY.steps

    assert list(study(part, TINY, arms, seeds, pytest.fail)) == rows


def test_a_study_keeps_to_its_settings(tmp_path):
    path = tmp_path / "rows.jsonl"
    list(study(path, TINY, (Arm(None),), (0,)))
    with pytest.raises(ValueError, match="must hold runs with Settings"):
        list(study(path, Settings(), (Arm(None),), (0,)))
    path.write_text("{}\n")
    with pytest.raises(ValueError, match="line 1, must be a run"):
        list(study(path, TINY, (Arm(None),), (0,)))


def test_summaries_take_differences_seed_by_seed():
    def row(n, seed, risk):
        return Row(TINY, n, seed, (8,), (risk,), (1.0,))

    rows = [row(None, 0, 5.0), row(None, 1, 9.0), row(64, 0, 4.0), row(64, 1, 7.0)]
    dsm, stf = summaries(rows, "excess_risk")
    assert (dsm.arm, dsm.mean, dsm.gain) == (Arm(None), 7, 0)
    assert dsm.sd == pytest.approx(8**0.5)
    assert (stf.arm, stf.mean, stf.lowest, stf.highest) == (Arm(64), 5.5, 4, 7)
    assert (stf.gain, stf.gain_error) == (1.5, pytest.approx(0.5))
    # A seed that is not there for all targets does not count.
    assert summaries([*rows, row(None, 2, 100.0)], "excess_risk") == [dsm, stf]
    with pytest.raises(ValueError, match="two seeds at least"):
        summaries(rows[::2], "excess_risk")


def test_study_command(command, tmp_path):
    result = command("study", "--quick", "--seeds", "0,1", "--references", "130")
    assert result.exit_code == 0, result.output
    assert "| STF, n = 130 |" in result.output
    assert (tmp_path / "study-digits.png").stat().st_size > 10_000
    assert len((tmp_path / "study-digits.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--references", "7"], "7 is less than the minibatch of 8"),
        (["--seeds", "3"], "two seeds at least"),
        (["--rows", "x.txt"], "x.txt does not end in .jsonl"),
    ],
)
def test_study_command_refuses(command, arguments, message):
    result = command("study", "--quick", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())
