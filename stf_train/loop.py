"""The training loop: a generator over one flat loop body."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from stf_train.data import draw
from stf_train.ema import EMA
from stf_train.loss import EDMLoss


@dataclass
class State:
    """All a run needs to go on bit for bit: what changes from step to step, and nothing else."""

    network: nn.Module
    ema: EMA
    optimizer: torch.optim.Adam
    generator: torch.Generator  # on the CPU; every random number of the run comes from it
    step: int = 0  # steps done


@dataclass(frozen=True)
class Step:
    """What one step reports."""

    step: int  # steps done
    images: int  # training images seen so far
    loss: float  # of the minibatch, before the step
    grad_norm: float
    lr: float


class Diverged(ArithmeticError):
    """The loss or gradient of a step is not finite; the weights are those of the step before."""


def train(
    state: State, loss: EDMLoss, *, steps: int, batch: int, lr: float, rampup: float
) -> Iterator[Step]:
    """Trains until `state.step` reaches `steps`, updating `state` in place before each yield.

    Args:
        state: where to begin.
        loss: the loss, which holds the data and the target.
        steps: steps at the end, those already done included.
        batch: B, samples per step.
        lr: learning rate of Adam, after the ramp-up.
        rampup: images over which the learning rate rises linearly from 0.

    Yields:
        A report after each step.

    Raises:
        Diverged: a loss or gradient is not finite.
    """
    parameters = list(state.network.parameters())
    for step in range(state.step + 1, steps + 1):
        images = step * batch

        # Draw the minibatch and its noise; compute the loss.
        order = draw(len(loss.data), state.generator)
        value = loss(state.network, order, batch, state.generator)
        state.optimizer.zero_grad()
        value.backward()
        norm = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).norm()
        for name, number in (("loss", value), ("gradient norm", norm)):
            if not math.isfinite(number.item()):
                raise Diverged(f"the {name} of step {step} is {number.item()}")

        # Update weights.
        step_lr = lr * min(images / max(rampup, 1e-8), 1)
        for group in state.optimizer.param_groups:
            group["lr"] = step_lr
        state.optimizer.step()

        # Update EMA.
        state.ema.update(state.network, batch, images)
        state.step = step
        yield Step(step, images, value.item(), norm.item(), step_lr)
