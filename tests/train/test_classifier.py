"""The classifier of noisy samples: what it learns, and that it leads samples to their class."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from stf_kernels import IdealDenoiser, References, nearest
from stf_train import build, loop, run
from stf_train.ema import EMA
from stf_train.guidance import class_logits, classifier_guidance
from stf_train.loss import ClassLoss
from stf_train.networks import Classifier
from stf_train.process import EDM, VP, PFGMpp
from stf_train.sample import heun, seeded, sigma_steps

from .toys import GAUSSIAN, inside


@pytest.mark.parametrize("sides", [(8, 8), (15, 15), (6, 4), (1, 1)])
def test_images_of_any_size_have_logits(sides):
    network = Classifier(8, sides, 3, 5)
    assert network(torch.randn(2, 3, *sides), torch.zeros(2)).shape == (2, 5)


def test_channels_are_in_groups():
    with pytest.raises(ValueError, match="channels must be a multiple of 8, got 12"):
        Classifier(12, (8, 8), 1, 10)


@pytest.mark.parametrize("process", GAUSSIAN.values(), ids=GAUSSIAN.keys())
def test_what_it_is_told_is_the_same_on_every_process(process):
    """y + r eps at the ratio r, however alpha scales it."""
    t = inside(process, 7)
    ratio = process.sigma(t) / process.alpha(t)
    y, eps = torch.linspace(-1, 1, 7)[:, None].double(), torch.ones(7, 1).double()
    seen = []

    def network(x, c_noise):
        seen.append((x, c_noise))
        return x

    for path, time in ((process, t), (EDM(0.5), ratio)):
        class_logits(network, path, path.alpha(time) * y + path.sigma(time) * eps, time)
    for got, expected in zip(*seen, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(seen[0][1], ratio.log().clamp(-8, 8).flatten() / 4)


def test_pure_noise_and_pure_data_are_finite():
    process = GAUSSIAN["flow to noise"]
    t = torch.tensor([[0.0], [1.0]])
    _, told = class_logits(lambda x, c: (x, c), process, torch.ones(2, 1), t)
    torch.testing.assert_close(told, torch.tensor([-2.0, 2.0]))


def test_loss_is_the_cross_entropy_of_the_sources_classes(bank, generator):
    loss = ClassLoss(VP(), bank)
    order = torch.randperm(len(bank), generator=generator)
    minibatch = loss.draw(order, 6, generator)
    weight = torch.randn(64, 10, generator=generator)
    asked = []

    def network(x, c_noise):
        asked.append(x)
        return x.flatten(1) @ weight

    got = loss.of(network, minibatch, order)
    expected = cross_entropy(asked[0].flatten(1) @ weight, bank.labels[order[:6]])
    torch.testing.assert_close(got, expected)
    with pytest.raises(ValueError, match="needs data with labels"):
        ClassLoss(VP(), References(torch.zeros(3, 1, 8, 8)))


@pytest.mark.parametrize("process", GAUSSIAN.values(), ids=GAUSSIAN.keys())
def test_it_sees_all_noise_alike(process, bank, generator):
    m = ClassLoss(process, bank).draw(torch.randperm(len(bank)), 400, generator)
    places = ((process.sigma(m.t) / process.alpha(m.t)).log10() + 2) / 4
    assert (places.sort().values - torch.linspace(0, 1, 400)).abs().max() < 0.1


def test_a_run_learns_classes(tmp_path, tiny):
    """Through the command's own path; stopped and resumed to the bit."""
    config = tiny(target="class", arch="classifier")
    assert isinstance(build.loss(config), ClassLoss)
    for folder in ("a", "b"):
        run.create(tmp_path / folder, config)
    steps = list(run.advance(tmp_path / "a"))
    assert steps[0].loss == pytest.approx(math.log(10), rel=0.3)
    stopped = run.advance(tmp_path / "b")
    for _ in range(6):
        next(stopped)
    stopped.close()
    list(run.advance(tmp_path / "b"))
    for name in (run.CHECKPOINT, run.METRICS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    run.draw_pictures(tmp_path / "a")
    assert not (tmp_path / "a" / run.SAMPLES).exists()


def test_guidance_leads_to_the_class(bank):
    """The exact unconditional denoiser ends at digits, which have classes: chance is a tenth."""
    torch.manual_seed(0)
    process, classes = EDM(0.85, -0.4, 1.0), torch.arange(60) % 10
    network = Classifier(16, (8, 8), 1, 10)
    adam, generator = torch.optim.Adam(network.parameters()), torch.Generator().manual_seed(0)
    state = loop.State(network, EMA(network, 2000), adam, generator)
    loss = ClassLoss(process, bank)
    list(loop.train(state, loss, steps=80, batch=64, lr=6e-3, rampup=1000))
    averaged = state.ema.network

    def F(x, c_noise):
        return averaged(x.float(), c_noise.float()).double()

    def accuracy(scale):
        log_p = run.classifier(F, process, classes)
        guided = classifier_guidance(IdealDenoiser(bank), log_p, process, scale)
        *_, end = heun(guided, seeded(range(60), (1, 8, 8)), sigma_steps(10, 0.02, 10.0))
        index, _ = nearest(end.x.float(), bank)
        return (bank.labels[index] == classes).float().mean().item()

    unguided, guided = accuracy(0.0), accuracy(6.0)
    assert unguided < 0.2
    assert guided > 0.4


def test_guidance_needs_gaussian_noise_and_a_signal():
    with pytest.raises(ValueError, match="classifier guidance needs Gaussian noise"):
        classifier_guidance(lambda x, t: x, lambda x, t: x.sum(1), PFGMpp(0.5, D=16))
    process = GAUSSIAN["flow to noise"]
    guided = classifier_guidance(lambda x, t: x, lambda x, t: x.sum(1), process)
    with pytest.raises(ValueError, match="needs alpha above 0, got t = 1"):
        guided(torch.ones(1, 2), torch.ones(1, 1))
