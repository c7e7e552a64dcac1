"""A run and its folder: what is built from a config, and what is kept where."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from stf_train import checkpoint, data, metrics, plots
from stf_train.config import Config
from stf_train.ema import EMA
from stf_train.loop import State, Step, train
from stf_train.loss import EDMLoss
from stf_train.networks import UNet
from stf_train.process import EDM
from stf_train.sample import Denoiser, heun, seeded, sigma_steps
from stf_train.targets import DenoisingTarget, StableTarget, Target

CONFIG = "config.json"
CHECKPOINT = "checkpoint.safetensors"
METRICS = "metrics.jsonl"
SAMPLES = "samples.png"
LOSS = "loss.png"

CONTENTS = {
    CONFIG: "the options of the run",
    CHECKPOINT: "weights, EMA, optimizer and random state",
    METRICS: "loss, gradient norm and learning rate of every step",
    SAMPLES: "samples drawn with the EMA weights",
    LOSS: "the loss over the run",
}


def process(config: Config) -> EDM:
    """The noise process of a run."""
    return EDM(config.sigma_data, config.P_mean, config.P_std)


def initial_state(config: Config) -> State:
    """The state before the first step; the seed alone decides it."""
    generator = torch.Generator().manual_seed(config.seed)
    # Layers initialise themselves from the global generator: lend it the state of ours.
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(generator.get_state())
        network = UNet(config.cbase, data.SHAPE[0])
        generator.set_state(torch.get_rng_state())
    network.to(config.device)
    ema = EMA(network, config.ema * 1e6)
    return State(network, ema, torch.optim.Adam(network.parameters()), generator)


def make_loss(config: Config) -> EDMLoss:
    """The loss of a run, around the target that the config names."""
    bank = data.digits(config.device)
    targets: dict[str, Target] = {
        "dsm": DenoisingTarget(bank),
        "stf": StableTarget(bank, config.references),
    }
    return EDMLoss(process(config), bank, targets[config.target])


def create(folder: Path, config: Config) -> None:
    """Lays down a run at step 0; from here on there is always a whole checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.write(folder / CHECKPOINT, checkpoint.pack(initial_state(config), config, 0))


def set_duration(folder: Path, duration: float) -> None:
    """Gives a run a new length, in million images; the steps done stay as they are."""
    kept = checkpoint.read(folder / CHECKPOINT)
    config = replace(kept.config, duration=duration)
    checkpoint.write(folder / CHECKPOINT, replace(kept, config=config))


def advance(folder: Path) -> Iterator[Step]:
    """Trains a run from its checkpoint to its end, keeping its metrics and checkpoint up to date.

    A run that was never stopped goes the same way, from the checkpoint of step 0. So it makes no
    difference, to the last bit, where it was stopped: on the same device, with the same number of
    threads, which is therefore part of the config and set here.

    Yields:
        A report after each step.
    """
    kept = checkpoint.read(folder / CHECKPOINT)
    config = kept.config
    # A copy for people to read; what holds is in the checkpoint.
    text = json.dumps(config.as_dict(), indent=2) + "\n"
    checkpoint.replace(folder / CONFIG, text.encode())
    torch.set_num_threads(config.threads)
    torch.backends.cudnn.deterministic = True
    state = initial_state(config)
    kept.restore(state)
    loss = make_loss(config)
    with metrics.MetricsLog(folder / METRICS, kept.metrics_bytes) as log:
        for step in train(
            state,
            loss,
            steps=config.steps,
            batch=config.batch,
            lr=config.lr,
            rampup=config.rampup * 1e6,
        ):
            log.write(step)
            # Save the checkpoint; the metrics it counts on come first.
            if step.step % config.tick_steps == 0 or step.step == config.steps:
                kept = checkpoint.pack(state, config, log.sync())
                checkpoint.write(folder / CHECKPOINT, kept)
            yield step


def draw_pictures(folder: Path) -> None:
    """Writes a grid of 100 samples of the EMA weights, and the loss over the run."""
    kept = checkpoint.read(folder / CHECKPOINT)
    device = kept.config.device
    noise = seeded(range(100), data.SHAPE, device)
    *_, state = heun(denoiser(kept, device), noise, sigma_steps())
    plots.save_samples(folder / SAMPLES, state.x)
    plots.save_loss(
        folder / LOSS, metrics.read(folder / METRICS), f"digits, --target {kept.config.target}"
    )


def denoiser(kept: checkpoint.Checkpoint, device: str) -> Denoiser:
    """D(x; sigma) of the EMA weights; all but the network itself in the type of x."""
    network = UNet(kept.config.cbase, data.SHAPE[0]).eval().requires_grad_(False)
    network.load_state_dict(kept.part("ema"))
    network.to(device)
    edm = process(kept.config)

    def F(x: torch.Tensor, c_noise: torch.Tensor) -> torch.Tensor:
        return network(x.float(), c_noise.float()).to(x.dtype)

    return lambda x, sigma: edm.denoise(F, x, sigma)
