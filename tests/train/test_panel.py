"""The variance of the target, watched during a run."""

import json

import pytest
import torch

from stf_train import build, metrics, panel, plots, run
from stf_train.data import draw
from stf_train.panel import Bin, measure, together


def by_hand(loss, n, batch, generator):
    """Every noisy sample's numbers in float64, from the definition."""
    order = draw(len(loss.data), generator)
    m = loss.draw(order, batch, generator)
    process = loss.process
    y = loss.data.decode(m.sources)
    t = m.t.reshape(-1, 1, 1, 1)
    alpha, sigma = (v(t).double().flatten() for v in (process.alpha, process.sigma))
    x = (process.alpha(t) * y + process.sigma(t) * m.eps[0]).double().flatten(1)

    def posterior(index):
        refs = loss.data.decode(index).double().flatten(1)
        gap = (x[:, None] - alpha[:, None, None] * refs).square().sum(2)
        if process.noise.D is None:
            logits = -gap / (2 * sigma[:, None] ** 2)
        else:
            D, d = process.noise.D, x.shape[1]
            logits = -(d + D) / 2 * torch.log1p(gap / (sigma[:, None] ** 2 * D))
        if m.labels is not None:
            others = loss.data.labels[index][None] != m.labels[:, None]
            logits = logits.masked_fill(others & (m.labels[:, None] >= 0), -torch.inf)
        w = logits.softmax(1)
        mean = w @ refs
        spread = (refs[None] - mean[:, None]).square().sum(2)
        trace = (w * spread).sum(1) * alpha**2 / sigma**4
        return trace, 1 / w.square().sum(1), -torch.special.xlogy(w, w).sum(1)

    V_DSM = posterior(torch.arange(len(loss.data)))[0]
    return (sigma / alpha).log2().floor(), torch.stack([V_DSM, *posterior(order[:n])])


@pytest.mark.parametrize("preset", ["digits-edm", "digits-pfgmpp", "digits-vp", "digits-edm-cond"])
def test_is_the_definition(tiny, monkeypatch, preset):
    loss = build.loss(tiny(preset=preset))
    made = []
    plain = torch.Generator

    def watched():
        made.append(plain())
        return made[-1]

    monkeypatch.setattr(panel.torch, "Generator", watched)
    bins = measure(loss, 300, 48, (1, 2))
    monkeypatch.undo()
    octaves, values = by_hand(loss, 300, 48, plain().manual_seed(made[0].initial_seed()))
    assert len(bins) > 3
    assert sum(one.samples for one in bins) == 48
    for one in bins:
        inside = octaves == one.octave
        assert one.samples == int(inside.sum())
        got = torch.tensor([one.V_DSM, one.removed, one.ess, one.entropy], dtype=torch.float64)
        sigma = 2.0**one.octave
        # D is float32: ||D||^2 is off by its rounding, 64 values of at most 1.
        slack = torch.tensor([64e-6 / sigma**4, 64e-6 / sigma**4, 1e-5, 1e-5])
        assert ((got - values[:, inside].mean(1)).abs() <= slack + 1e-4 * got.abs()).all()


def test_removes_all_of_the_variance_with_all_references(tiny):
    loss = build.loss(tiny())
    for one in measure(loss, len(loss.data), 64, (0,)):
        assert one.removed == one.V_DSM
    few = together(measure(loss, 64, 64, (0,)))
    assert all(one.removed <= one.V_DSM * 1.5 for one in few)
    assert sum(one.removed for one in few) < 0.9 * sum(one.V_DSM for one in few)


def test_leaves_the_run_alone(tiny, tmp_path):
    """Its draws are its own, and other steps see other samples."""
    config = tiny(references=200)
    loss = build.loss(config)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert measure(loss, 100, 32, (0, 1)) == measure(loss, 100, 32, (0, 1))
    assert measure(loss, 100, 32, (0, 1)) != measure(loss, 100, 32, (0, 2))
    assert torch.equal(torch.get_rng_state(), state)


def test_together_is_the_mean_over_samples():
    a = [Bin(0, 1, 4.0, 2.0, 1.0, 0.0), Bin(2, 5, 1.0, 1.0, 1.0, 1.0)]
    b = [Bin(0, 3, 8.0, 0.0, 5.0, 4.0)]
    assert together(b + a) == [Bin(0, 4, 7.0, 0.5, 4.0, 3.0), a[1]]


def test_is_in_the_metrics_of_a_run(tiny, tmp_path):
    run.create(tmp_path, tiny(references=200))
    list(run.advance(tmp_path))
    lines = [json.loads(line) for line in (tmp_path / run.METRICS).open()]
    assert [line["variance_at"] for line in lines if "variance_at" in line] == [1, 5, 9]
    bins = metrics.read_panel(tmp_path / run.METRICS)
    assert sum(one.samples for one in bins) == 3 * 16
    plots.save_variance(tmp_path / "v.png", bins, "title")
    assert (tmp_path / "v.png").stat().st_size > 10_000
