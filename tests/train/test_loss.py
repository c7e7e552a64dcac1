"""The loss, for any target that is handed to it."""

import math

import pytest
import torch

from stf_kernels import References, oracle
from stf_train import data, targets
from stf_train.loss import DenoisingLoss, SequenceLoss
from stf_train.process import DDPM, EDM
from stf_train.targets import DenoisingTarget, StableTarget

from .toys import PROCESSES


def zero_network(x, c_noise):
    return torch.zeros_like(x)


def losses(bank, target, draws, batch=256):
    generator = torch.Generator().manual_seed(5)
    loss = DenoisingLoss(EDM(data.sigma_data(bank)), bank, target)
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

    def __call__(self, x_t, origin, order):
        self.asked.append((x_t, origin, order))
        return self.answer(x_t, origin, order)


def test_targets_are_swapped_without_changing_the_draws(bank):
    asked = []
    for target in (DenoisingTarget(bank), StableTarget(bank, 300)):
        recorder = Recorder(target)
        losses(bank, recorder, draws=2)
        asked.append(recorder.asked)
    for (x_t, origin, order), (other_x_t, other_origin, other_order) in zip(*asked, strict=True):
        assert torch.equal(x_t, other_x_t)
        assert torch.equal(order, other_order)
        for name in ("sources", "alpha", "sigma"):
            assert torch.equal(getattr(origin, name), getattr(other_origin, name))


def test_is_zero_for_a_target_the_network_meets(bank):
    edm = EDM(data.sigma_data(bank))

    def target(x_t, origin, order):
        return edm.output.c_skip(edm, origin.sigma) * x_t

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
    loss = DenoisingLoss(process, bank, StableTarget(bank, n))
    for _ in range(20):
        loss(zero_network, data.draw(len(bank), generator), 40, generator)
    for x_t, references in seen:
        sources = ((x_t * 8).round() / 8).flatten(1)
        references = references.flatten(1)
        assert len(references.unique(dim=0)) == n  # distinct, as the images of the data set are
        assert len(sources.unique(dim=0)) == 40
        assert (sources[:, None] == references[None]).all(2).any(1).all()


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
def test_samples_are_made_by_the_process(bank, generator, process):
    """x_t = alpha y + sigma eps at the times of the process, and the network is asked the same."""
    recorder, asked = Recorder(DenoisingTarget(bank)), []

    def network(x, c_noise):
        asked.append((x, c_noise))
        return torch.zeros_like(x)

    state = generator.get_state()
    order = data.draw(len(bank), generator)
    value = DenoisingLoss(process, bank, recorder)(network, order, 32, generator)

    generator.set_state(state)
    order = data.draw(len(bank), generator)
    y = bank.decode(order[:32])
    t = process.times(32, generator).reshape(32, 1, 1, 1)
    eps = process.noise.draw(y.shape, generator)
    ((x_t, origin, seen),), ((scaled, c_noise),) = recorder.asked, asked
    assert torch.equal(x_t, process.alpha(t) * y + process.sigma(t) * eps)
    assert torch.equal(origin.sources, order[:32])
    assert torch.equal(origin.alpha, process.alpha(t))
    assert torch.equal(origin.sigma, process.sigma(t))
    assert (origin.noise, origin.labels) == (process.noise, None)
    assert torch.equal(seen, order)
    assert torch.equal(scaled, process.output.c_in(process, t) * x_t)
    assert torch.equal(c_noise, process.c_noise(t).flatten())
    error = process.output.c_skip(process, t) * x_t - y
    assert value == (process.weight(t) * error**2).mean()


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
@pytest.mark.parametrize("n", [64, 1797])
def test_every_process_takes_either_target(bank, generator, process, n):
    """The stable target makes the loss of the same draws smaller, and not by rounding."""
    states = torch.Generator(), torch.Generator()
    values = []
    for state, target in zip(states, (DenoisingTarget(bank), StableTarget(bank, n)), strict=True):
        state.manual_seed(11)
        loss = DenoisingLoss(process, bank, target)
        draws = [loss(zero_network, data.draw(1797, state), 64, state) for _ in range(8)]
        values.append(torch.stack(draws).double())
    dsm, stf = values
    assert dsm.isfinite().all()
    assert 0 < stf.mean() < 0.999 * dsm.mean()
    assert torch.equal(states[0].get_state(), states[1].get_state())


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_labels_are_those_of_the_sources_but_for_the_dropped(bank, generator, share):
    recorder, asked = Recorder(DenoisingTarget(bank)), []

    def network(x, c_noise, labels):
        asked.append(labels)
        return torch.zeros_like(x)

    loss = DenoisingLoss(EDM(0.85), bank, recorder, label_dropout=share)
    order = data.draw(len(bank), generator)
    loss(network, order, 1000, generator)
    ((_, origin, _),), (labels,) = recorder.asked, asked
    assert labels is origin.labels
    dropped = labels == -1
    assert torch.equal(labels[~dropped], bank.labels[order[:1000]][~dropped])
    if share in (0.0, 1.0):
        assert dropped.float().mean() == share
    else:
        assert abs(dropped.float().mean() - share) < 5 * math.sqrt(share * (1 - share) / 1000)


def test_conditional_stable_target_refers_to_the_class(bank, generator):
    """With so much noise that the target is the mean of all it refers to."""
    recorder = Recorder(StableTarget(bank, 600))
    process = EDM(0.85, P_mean=14.0, P_std=0.01)
    loss = DenoisingLoss(process, bank, recorder, label_dropout=0.2)
    order = data.draw(len(bank), generator)
    got = []
    recorder.answer = lambda *a: got.append(StableTarget(bank, 600)(*a)) or got[-1]
    loss(lambda x, c, labels: torch.zeros_like(x), order, 100, generator)
    ((_, origin, _),), (targets_,) = recorder.asked, got
    refs, classes = bank.decode(order[:600]), bank.labels[order[:600]]
    assert set(origin.labels.tolist()) == set(range(-1, 10))
    for label, target in zip(origin.labels, targets_, strict=True):
        mean = (refs if label == -1 else refs[classes == label]).mean(0)
        torch.testing.assert_close(target, mean, rtol=0, atol=1e-4)


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_label_dropout_is_a_probability(bank, share):
    with pytest.raises(ValueError, match=rf"label_dropout must lie in \[0, 1\], got {share}"):
        DenoisingLoss(EDM(0.85), bank, DenoisingTarget(bank), label_dropout=share)


def test_label_dropout_needs_labels():
    unlabelled = References(torch.randn(5, 3))
    with pytest.raises(ValueError, match="label_dropout needs data with labels"):
        DenoisingLoss(EDM(0.85), unlabelled, DenoisingTarget(unlabelled), label_dropout=0.1)


def sequence(bank, generator, target=None, T=1000, batch=64, network=zero_network, **options):
    recorder = Recorder(target or DenoisingTarget(bank))
    process = DDPM(T)
    loss = SequenceLoss(process, bank, recorder, **options)
    order = data.draw(len(bank), generator)
    value = loss(network, order, batch, generator)
    ((x_t, origin, _),) = recorder.asked
    return value, x_t, origin, order, process


@pytest.mark.parametrize("T", [3, 1000])
@pytest.mark.parametrize("K", [1, 2, 4])
def test_sequence_loss_is_its_formula(bank, generator, T, K):
    """With epsilon-prediction and a silent network the errors are the noises themselves."""
    B, strength = 64, 0.7
    state = generator.get_state()
    value, x_t, origin, order, process = sequence(
        bank, generator, T=T, batch=B, K=K, strength=strength
    )
    generator.set_state(state)
    data.draw(len(bank), generator)
    t = process.times(B, generator)
    y = bank.decode(order[:B])
    expected, sums = 0.0, torch.zeros_like(y)
    for k in range(K):
        part = slice(k * B, (k + 1) * B)
        step = (t - k).clamp(min=0).reshape(B, 1, 1, 1)
        assert torch.equal(origin.sources[part], order[:B])
        torch.testing.assert_close(origin.sigma[part], process.sigma(step))
        eps = (x_t[part] - process.alpha(step) * y) / process.sigma(step)
        assert abs(eps.std() - 1) < 0.1
        if k == 0:
            expected = (eps**2).mean()
        sums += (t >= k).reshape(B, 1, 1, 1) * eps
    expected += strength / K**2 * (sums**2).mean()
    # At the first step sigma is .01: a rounding of x of 2^-24 becomes one of 100 2^-24 in eps.
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
    assert (t == 0).any() or T == 1000


def test_points_of_a_sequence_have_noises_of_their_own(bank, generator):
    _, x_t, origin, order, _ = sequence(bank, generator, K=2, strength=1.0)
    y = bank.decode(order[:64]).repeat(2, 1, 1, 1)
    a, b = ((x_t - origin.alpha * y) / origin.sigma).flatten().chunk(2)
    assert abs((a * b).mean()) < 5 / math.sqrt(len(a))


def test_sequence_loss_without_strength_is_that_of_ddpm(bank):
    """On the same draws: the noises of the first points come first."""
    values = []
    for loss in (
        SequenceLoss(DDPM(), bank, DenoisingTarget(bank), strength=0.0),
        DenoisingLoss(DDPM(), bank, DenoisingTarget(bank)),
    ):
        generator = torch.Generator().manual_seed(2)
        values.append(loss(zero_network, data.draw(len(bank), generator), 64, generator))
    torch.testing.assert_close(*values, rtol=1e-6, atol=0)


def test_sequence_loss_takes_the_stable_target_of_each_point(bank, generator):
    recorded = []

    def answer(*arguments):
        recorded.append(StableTarget(bank, 500)(*arguments))
        return recorded[-1]

    state = generator.get_state()
    stf, x_t, origin, order, _ = sequence(bank, generator, answer, K=3, strength=0.5)
    generator.set_state(state)
    dsm, *_ = sequence(bank, generator, K=3, strength=0.5)
    (targets_,) = recorded
    assert targets_.shape == (3 * 64, 1, 8, 8)
    from_oracle = oracle.denoised(
        x_t, bank.decode(order[:500]), origin.sigma.flatten(), origin.alpha.flatten()
    )
    torch.testing.assert_close(targets_.double(), from_oracle, rtol=0, atol=1e-5)
    assert stf < dsm


def test_sequence_loss_repeats_the_labels(bank, generator):
    asked = []

    def network(x, c_noise, labels):
        asked.append(labels)
        return torch.zeros_like(x)

    options = {"network": network, "label_dropout": 0.5, "K": 2, "strength": 1.0}
    sequence(bank, generator, **options)
    (labels,) = asked
    assert torch.equal(labels[:64], labels[64:])
    assert (labels == -1).any()


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"K": 0, "strength": 1.0}, ValueError, "K must be at least 1, got 0"),
        ({"strength": -1.0}, ValueError, "strength must be at least 0, got -1.0"),
        ({"strength": math.nan}, ValueError, "strength must be at least 0, got nan"),
        ({"process": EDM(1.0), "strength": 1.0}, TypeError, "must be one of steps, DDPM, got EDM"),
    ],
)
def test_sequence_loss_errors(bank, options, kind, message):
    with pytest.raises(kind, match=message):
        SequenceLoss(options.pop("process", DDPM()), bank, DenoisingTarget(bank), **options)
