"""The loss, for any target that is handed to it."""

import math

import pytest
import torch

from stf_train import data, targets
from stf_train.loss import EDMLoss
from stf_train.process import EDM
from stf_train.targets import DenoisingTarget, StableTarget


def zero_network(x, c_noise):
    return torch.zeros_like(x)


def losses(bank, target, draws, batch=256):
    generator = torch.Generator().manual_seed(5)
    loss = EDMLoss(EDM(data.sigma_data(bank)), bank, target)
    values = [
        loss(zero_network, data.draw(len(bank), generator), batch, generator) for _ in range(draws)
    ]
    return torch.stack(values).double()


def test_is_one_for_a_network_that_says_nothing(bank):
    values = losses(bank, DenoisingTarget(bank), draws=60)
    assert abs(values.mean() - 1) < 4 * values.std() / math.sqrt(len(values))


def test_stable_target_takes_the_avoidable_part_away(bank):
    """On the same draws the loss falls by the variance of the source given x_t."""
    dsm = losses(bank, DenoisingTarget(bank), draws=20)
    stf = losses(bank, StableTarget(bank, len(bank)), draws=20)
    fall = dsm - stf
    assert fall.mean() > 4 * fall.std() / math.sqrt(len(fall))
    assert (stf > 0).all()


class Recorder:
    """A target that notes what it is asked, and answers as another."""

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def __call__(self, x_t, sigma, order):
        self.asked.append((x_t, sigma, order))
        return self.answer(x_t, sigma, order)


def test_targets_are_swapped_without_changing_the_draws(bank):
    asked = []
    for target in (DenoisingTarget(bank), StableTarget(bank, 300)):
        recorder = Recorder(target)
        losses(bank, recorder, draws=2)
        asked.append(recorder.asked)
    for one, other in zip(*asked, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_is_zero_for_a_target_the_network_meets(bank):
    edm = EDM(data.sigma_data(bank))

    def target(x_t, sigma, order):
        return edm.c_skip(sigma) * x_t + edm.c_out(sigma) * zero_network(x_t, None)

    assert (losses(bank, target, draws=2) == 0).all()


@pytest.mark.parametrize("n", [40, 200])
def test_every_source_is_among_the_references(bank, generator, monkeypatch, n):
    """With next to no noise x_t itself tells which image it came from."""
    seen = []

    def spy(x_t, ref, sigma, **options):
        seen.append((x_t, ref.decode()))
        return torch.zeros_like(x_t)

    monkeypatch.setattr(targets, "stable_target", spy)
    process = EDM(data.sigma_data(bank), P_mean=-12.0, P_std=0.1)
    loss = EDMLoss(process, bank, StableTarget(bank, n))
    for _ in range(20):
        loss(zero_network, data.draw(len(bank), generator), 40, generator)
    for x_t, references in seen:
        sources = ((x_t * 8).round() / 8).flatten(1)
        references = references.flatten(1)
        assert len(references.unique(dim=0)) == n  # distinct, as the images of the data set are
        assert len(sources.unique(dim=0)) == 40
        assert (sources[:, None] == references[None]).all(2).any(1).all()
