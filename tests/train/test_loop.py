"""The training loop."""

import math
from itertools import islice

import pytest
import torch

from stf_train import build, loop, run
from stf_train.compute import Compute
from stf_train.loss import DenoisingLoss


@pytest.fixture
def setup(tiny):
    config = tiny()
    return run.initial_state(config), build.loss(config)


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
        shape = loss.data.shape

        def __len__(self):
            return 16

        def decode(self, index):
            return image.expand(len(index), 1, 8, 8)

    image = loss.data.decode(torch.tensor([0]))
    one = OneImage()
    losses = []
    target = lambda x_t, sigma, order: one.decode(order[: len(x_t)])  # noqa: E731
    for step in train(state, DenoisingLoss(loss.process, one, target), steps=60, lr=3e-3):
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


class Explosive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("inf")


class Broken(DenoisingLoss):
    """A loss that is not finite, or has no finite gradient, at some steps."""

    def __init__(self, loss, state, at, value=None):
        super().__init__(loss.process, loss.data, loss.target)
        self.state, self.at, self.value = state, at, value

    def of(self, network, minibatch, order):
        value = super().of(network, minibatch, order)
        if self.state.step + 1 not in self.at:
            return value
        return Explosive.apply(value) if self.value is None else value * self.value


VALUES = pytest.mark.parametrize("value", [None, float("nan"), float("inf")])


@VALUES
def test_a_step_that_is_not_finite_is_left_out_and_counted(setup, value):
    state, loss = setup
    steps = train(state, Broken(loss, state, {3, 5}, value))
    assert [step.skipped for step in islice(steps, 2)] == [0, 0]
    before = [p.clone() for p in state.network.parameters()]
    averages = [p.clone() for p in state.ema.network.parameters()]
    third = next(steps)
    assert (third.step, third.skipped, state.step) == (3, 1, 3)
    assert not math.isfinite(third.grad_norm)
    assert all(torch.equal(a, b) for a, b in zip(before, state.network.parameters(), strict=True))
    assert all(
        torch.equal(a, b) for a, b in zip(averages, state.ema.network.parameters(), strict=True)
    )
    assert [step.skipped for step in steps] == [1, 2, 2]
    assert all(p.isfinite().all() for p in state.ema.network.parameters())


@VALUES
def test_gives_up_after_too_many_in_a_row(setup, value):
    state, loss = setup
    at = {1, *range(3, 3 + loop.PATIENCE)}
    with pytest.raises(loop.Diverged, match=r"10 steps in a row .*: at step 12 the loss is "):
        for _ in train(state, Broken(loss, state, at, value), steps=50):
            pass
    assert state.skipped == 1 + loop.PATIENCE


def test_clip_cuts_the_gradient_down(setup):
    state, loss = setup
    (step,) = loop.train(state, loss, steps=1, batch=16, lr=1e-3, rampup=0, clip=1e-3)
    squares = sum(p.grad.double().square().sum() for p in state.network.parameters())
    assert step.grad_norm > 1e-2
    assert squares.sqrt().item() == pytest.approx(1e-3, rel=1e-5)


def updated(tiny, **how):
    config = tiny(references=40)
    state = run.initial_state(config)
    steps = loop.train(
        state,
        build.loss(config),
        steps=3,
        batch=16,
        lr=1e-3,
        rampup=0,
        compute=Compute(**how),
    )
    return [step.loss for step in steps], [p.clone() for p in state.network.parameters()]


@pytest.mark.parametrize("how", [{"batch_gpu": 4}, {"ls": 1024.0}, {"batch_gpu": 8, "ls": 0.25}])
def test_parts_and_loss_scale_change_the_rounding_alone(tiny, how):
    losses, weights = updated(tiny)
    others, parted = updated(tiny, **how)
    assert others == pytest.approx(losses, rel=1e-5)
    for a, b in zip(weights, parted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)  # of steps of 1e-3 each


def test_every_part_has_the_references_of_the_whole(setup):
    state, loss = setup
    seen = []
    target = loss.target

    def spy(x_t, origin, order):
        seen.append((origin.sources.tolist(), order.tolist()))
        return target(x_t, origin, order)

    loss.target = spy
    how = Compute(batch_gpu=4)
    next(loop.train(state, loss, steps=1, batch=16, lr=1e-3, rampup=0, compute=how))
    orders = [order for _, order in seen]
    assert len(seen) == 4
    assert all(order == orders[0] for order in orders)
    assert [s for sources, _ in seen for s in sources] == orders[0][:16]


@pytest.mark.parametrize("batch_gpu", [3, 32])
def test_a_minibatch_that_does_not_divide_is_refused(setup, batch_gpu):
    state, loss = setup
    how = Compute(batch_gpu=batch_gpu)
    with pytest.raises(ValueError, match=f"a multiple of batch_gpu {batch_gpu} times 1"):
        next(loop.train(state, loss, steps=1, batch=16, lr=1e-3, rampup=0, compute=how))


def test_bfloat16_reaches_the_network(tiny):
    seen = []
    config = tiny()
    state = run.initial_state(config)
    state.network.enter.register_forward_hook(lambda m, x, y: seen.append(y.dtype))
    how = Compute(autocast=torch.bfloat16)
    (step,) = loop.train(
        state, build.loss(config), steps=1, batch=16, lr=1e-3, rampup=0, compute=how
    )
    assert seen == [torch.bfloat16]
    assert math.isfinite(step.loss)
    assert all(p.grad.dtype == torch.float32 for p in state.network.parameters())
