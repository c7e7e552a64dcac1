"""The training loop: a generator over one flat loop body."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from stf_train.compute import Compute
from stf_train.data import draw
from stf_train.ema import EMA
from stf_train.loss import DenoisingLoss

PATIENCE = 10  # steps in a row without a finite gradient
ALONE = Compute()


@dataclass
class State:
    """All a run needs to go on bit for bit: what changes from step to step, and nothing else."""

    network: nn.Module
    ema: EMA
    optimizer: torch.optim.Adam
    generator: torch.Generator  # on the CPU; every random number of the run follows from it
    step: int = 0  # steps done
    skipped: int = 0  # of them, those whose gradient was not finite
    in_a_row: int = 0  # the last of those


@dataclass(frozen=True)
class Step:
    """What one step reports."""

    step: int  # steps done
    images: int  # training images seen so far
    loss: float  # of the minibatch, before the step
    grad_norm: float
    lr: float
    skipped: int = 0  # steps so far whose loss or gradient was not finite


class Diverged(ArithmeticError):
    """Too many steps in a row had a loss or a gradient that was not finite."""


def train(
    state: State,
    loss: DenoisingLoss,
    *,
    steps: int,
    batch: int,
    lr: float,
    rampup: float,
    clip: float | None = None,
    compute: Compute = ALONE,
) -> Iterator[Step]:
    """Trains until `state.step` reaches `steps`, updating `state` in place before each yield.

    A step whose loss or gradient is not finite leaves the weights as they are, and is counted.

    Args:
        state: where to begin.
        loss: the loss, which holds the data and the target.
        steps: steps at the end, those already done included.
        batch: B, samples per step.
        lr: learning rate of Adam, after the ramp-up.
        rampup: images over which the learning rate rises linearly from 0.
        clip: the norm down to which a longer gradient is scaled.
        compute: who computes which part of the minibatch.

    Yields:
        A report after each step.

    Raises:
        Diverged: PATIENCE steps in a row had to be left out.
        ValueError: the minibatch does not divide into the parts asked for.
    """
    parameters = list(state.network.parameters())
    device = parameters[0].device
    parts = compute.parts(batch)
    network = compute.prepare(state.network)
    forward = compute.forward(network)
    for step in range(state.step + 1, steps + 1):
        images = step * batch

        # Draw the minibatch and its noise; compute the loss.
        order = draw(len(loss.data), state.generator)
        minibatch = loss.draw(order, batch, state.generator)
        state.optimizer.zero_grad()
        total = torch.zeros((), device=device)
        with compute.dropout(state.generator.initial_seed(), step, device):
            for part in parts:
                with compute.sync(network, last=part is parts[-1]):
                    value = loss.of(forward, minibatch.part(*part), order) / len(parts)
                    (value * compute.ls).backward()
                total += value.detach()
        loss_value = compute.mean(total).item()
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.cat([g.flatten() for g in gradients]).norm().item() / compute.ls

        # Update weights and EMA, unless something is not finite.
        step_lr = lr * min(images / max(rampup, 1e-8), 1)
        if math.isfinite(loss_value) and math.isfinite(norm):
            scale = (1 if clip is None or norm <= clip else clip / norm) / compute.ls
            if scale != 1:
                torch._foreach_mul_(gradients, scale)
            for group in state.optimizer.param_groups:
                group["lr"] = step_lr
            state.optimizer.step()
            state.ema.update(state.network, batch, images)
            state.in_a_row = 0
        else:
            state.skipped += 1
            state.in_a_row += 1
            if state.in_a_row == PATIENCE:
                raise Diverged(
                    f"{PATIENCE} steps in a row had no finite gradient: at step {step} the loss is "
                    f"{loss_value}, the gradient norm {norm}"
                )
        state.step = step
        yield Step(step, images, loss_value, norm, step_lr, state.skipped)
