"""The training loop."""

from itertools import islice

import pytest
import torch

from stf_train import loop, run
from stf_train.loss import EDMLoss


@pytest.fixture
def setup(tiny):
    config = tiny()
    return run.initial_state(config), run.make_loss(config)


def train(state, loss, steps=6, lr=1e-3, rampup=0.0):
    return loop.train(state, loss, steps=steps, batch=16, lr=lr, rampup=rampup)


def test_is_lazy_and_state_is_that_of_the_last_report(setup):
    state, loss = setup
    for step in islice(train(state, loss), 2):
        assert step.step == state.step
        assert step.images == 16 * state.step
    assert state.step == 2


def test_learns_a_single_image(setup):
    """The loss of a network that starts at 0 falls to a fifth."""
    state, loss = setup

    class OneImage:
        def __len__(self):
            return 16

        def decode(self, index):
            return image.expand(len(index), 1, 8, 8)

    image = loss.data.decode(torch.tensor([0]))
    one = OneImage()
    losses = []
    target = lambda x_t, sigma, order: one.decode(order[: len(x_t)])  # noqa: E731
    for step in train(state, EDMLoss(loss.process, one, target), steps=60, lr=3e-3):
        losses.append(step.loss)
    assert sum(losses[-10:]) < 0.2 * sum(losses[:10])


def test_learning_rate_ramps_up(setup):
    rates = [step.lr for step in train(*setup, steps=6, lr=1e-3, rampup=64)]
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 1e-3])


def test_reports_the_gradient_norm(setup):
    state, loss = setup
    (step,) = train(state, loss, steps=1)
    squares = sum(p.grad.double().square().sum() for p in state.network.parameters())
    assert step.grad_norm == pytest.approx(squares.sqrt().item(), rel=1e-5)


def test_stops_before_a_gradient_that_is_not_finite_does_harm(setup):
    state, loss = setup

    class Explosive(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * float("inf")

    def exploding(network, order, batch, generator):
        return Explosive.apply(loss(network, order, batch, generator))

    exploding.data = loss.data
    before = [p.clone() for p in state.network.parameters()]
    with pytest.raises(loop.Diverged, match=r"the gradient norm of step 1 is (nan|inf)"):
        next(train(state, exploding))
    assert all(torch.equal(a, b) for a, b in zip(before, state.network.parameters(), strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_stops_before_a_loss_that_is_not_finite_does_harm(setup, value):
    state, loss = setup
    target = loss.target

    def broken(x_t, sigma, order):
        return target(x_t, sigma, order) * (value if state.step == 2 else 1)

    steps = train(state, EDMLoss(loss.process, loss.data, broken))
    assert len(list(islice(steps, 2))) == 2
    before = [p.clone() for p in state.network.parameters()]
    with pytest.raises(loop.Diverged, match=r"the loss of step 3 is (nan|inf)"):
        next(steps)
    assert state.step == 2
    assert all(torch.equal(a, b) for a, b in zip(before, state.network.parameters(), strict=True))
    assert all(p.isfinite().all() for p in state.ema.network.parameters())
