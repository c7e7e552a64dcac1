"""A run and its folder: what is kept where, and how it goes on from there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stf_train import build, checkpoint, metrics, panel, plots
from stf_train.board import Board
from stf_train.compute import Compute, launched
from stf_train.config import Config
from stf_train.ema import EMA
from stf_train.guidance import Classifier, class_logits
from stf_train.loop import State, Step, train
from stf_train.process import Network, Process
from stf_train.sample import Denoiser, Sample, seeded
from stf_train.sampling import Sampling

CONFIG = "config.json"
CHECKPOINT = "checkpoint.safetensors"
METRICS = "metrics.jsonl"
SAMPLES = "samples.png"
LOSS = "loss.png"
VARIANCE = "variance.png"
BOARD = "tensorboard"

CONTENTS = {
    CONFIG: "the options of the run",
    CHECKPOINT: "weights, EMA, optimizer and random state",
    METRICS: "loss, gradient norm and learning rate of every step, variance of the target",
    SAMPLES: "samples drawn with the EMA weights",
    LOSS: "the loss over the run",
    VARIANCE: "variance of the target at each noise level, with and without references",
}


def draws(config: Config) -> bool:
    """Whether the network of a run is a denoiser, from which there are samples."""
    return config.target != "class"


def initial_state(config: Config) -> State:
    """The state before the first step; the seed alone decides it."""
    generator = torch.Generator().manual_seed(config.seed)
    # Layers initialise themselves from the global generator: lend it the state of ours.
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(generator.get_state())
        network = build.network(config)
        generator.set_state(torch.get_rng_state())
    network.to(config.device)
    ema = EMA(network, config.ema * 1e6, config.ema_rampup)
    return State(network, ema, torch.optim.Adam(network.parameters()), generator)


def compute(config: Config) -> Compute:
    """How the steps of a run are computed, by this process and those started with it.

    Raises:
        ValueError: there are other than the run was started with.
    """
    dtype = torch.float16 if config.fp16 else torch.bfloat16 if config.bf16 else None
    found = Compute(launched(config.device), config.batch_gpu, dtype, config.ls, config.compile)
    if found.processes != config.processes:
        raise ValueError(
            f"processes must be {config.processes} as when the run was started, "
            f"got {found.processes}"
        )
    return found


def create(folder: Path, config: Config) -> None:
    """Lays down a run at step 0; from here on there is always a whole checkpoint."""
    kept = checkpoint.pack(initial_state(config), config, 0)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.write(folder / CHECKPOINT, kept)


def change(folder: Path, **options: object) -> None:
    """Gives a run another length, or place of its data; the steps done stay as they are."""
    kept = checkpoint.read(folder / CHECKPOINT)
    config = replace(kept.config, **options)  # type: ignore[arg-type]
    checkpoint.write(folder / CHECKPOINT, replace(kept, config=config))


def advance(folder: Path) -> Iterator[Step]:
    """Trains a run from its checkpoint to its end, keeping its metrics and checkpoint up to date.

    A run that was never stopped goes the same way, from the checkpoint of step 0. So it makes no
    difference, to the last bit, where it was stopped: on the same devices, with the same number of
    threads and processes, which are therefore part of the config. Of several processes the first
    one writes.

    Yields:
        A report after each step.
    """
    kept = checkpoint.read(folder / CHECKPOINT)
    config = kept.config
    torch.set_num_threads(config.threads)
    torch.backends.cudnn.deterministic = True
    how = compute(config)
    state = initial_state(config)
    kept.restore(state)
    loss = build.loss(config)
    steps = train(
        state,
        loss,
        steps=config.steps,
        batch=config.batch,
        lr=config.lr,
        rampup=config.rampup * 1e6,
        clip=config.clip,
        compute=how,
    )
    if how.rank > 0:
        yield from steps
        return
    # A copy for people to read; what holds is in the checkpoint.
    text = json.dumps(config.as_dict(), indent=2) + "\n"
    checkpoint.replace(folder / CONFIG, text.encode())
    with ExitStack() as stack:
        log = stack.enter_context(metrics.MetricsLog(folder / METRICS, kept.metrics_bytes))
        board = None
        if config.tensorboard:
            board = stack.enter_context(closing(Board(folder / BOARD, state.step + 1)))
        for step in steps:
            log.write(step)
            if board is not None:
                board.write(step)
            # Look at the variance of the target, once in a tick.
            if draws(config) and (step.step - 1) % config.tick_steps == 0:
                entropy = (config.seed, step.step)
                bins = panel.measure(loss, build.count(config), config.batch, entropy)
                log.write_panel(step.step, bins)
                if board is not None:
                    board.write_panel(step.step, bins)
            # Save the checkpoint; the metrics it counts on come first.
            tick, rest = divmod(step.step, config.tick_steps)
            if rest == 0 or step.step == config.steps:
                kept = checkpoint.pack(state, config, log.sync())
                checkpoint.write(folder / CHECKPOINT, kept)
                snap = config.snap if draws(config) else None
                if rest == 0 and snap is not None and tick % snap == 0:
                    page = draw_samples(folder / f"samples-{step.images:09d}.png", kept)
                    if board is not None:
                        board.write_samples(step.step, page)
            yield step


def draw_pictures(folder: Path) -> None:
    """Writes the loss over the run, a grid of 100 samples of the EMA weights and the variances."""
    kept = checkpoint.read(folder / CHECKPOINT)
    config = kept.config
    title = f"{config.preset}, --target {config.target}"
    plots.save_loss(folder / LOSS, metrics.read(folder / METRICS), title)
    if draws(config):
        draw_samples(folder / SAMPLES, kept)
        title = f"{config.preset}, --references {config.references}"
        plots.save_variance(folder / VARIANCE, metrics.read_panel(folder / METRICS), title)


def draw_samples(path: Path, kept: checkpoint.Checkpoint) -> np.ndarray:
    """Writes a grid of 100 samples of the EMA weights; returns it, [height, width, 3] uint8."""
    config = kept.config
    denoise = denoiser(config, Averaged(kept, config.device))
    draw = sampler(config, config.sampling, conditioned(config, denoise))
    return plots.save_samples(path, pictured(config, draw(range(100)).x), ink=is_ink(config))


def is_ink(config: Config) -> bool:
    """Whether high values are ink on paper."""
    return config.data == "digits"


def pictured(config: Config, samples: Tensor) -> Tensor:
    """Samples with the range of the data brought to [-1, 1]."""
    lo, hi = config.range
    return (samples - lo) * (2 / (hi - lo)) - 1


# D(x; t) of some classes, None for an unconditional network: ([B, *shape], [B, 1, ...], [B])
ClassDenoiser = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]


class Averaged:
    """F of the EMA weights of a run: in float32, its answer in the type of x.

    Its calls are counted.
    """

    def __init__(self, kept: checkpoint.Checkpoint, device: str) -> None:
        # Its initial weights, which are replaced, come from the global generator.
        with torch.random.fork_rng(devices=[]):
            network = build.network(kept.config).eval().requires_grad_(False)
        network.load_state_dict(kept.part("ema"))
        self._network = network.to(device)
        self.calls = 0

    def __call__(self, x: Tensor, c_noise: Tensor, *labels: Tensor) -> Tensor:
        self.calls += 1
        return self._network(x.float(), c_noise.float(), *labels).to(x.dtype)


def denoiser(config: Config, network: Network) -> ClassDenoiser:
    """D(x; t) of a run's network; all but the network itself in the type of x."""
    process = build.process(config)
    return lambda x, t, labels: process.denoise(network, x, t, labels)


def classifier(network: Network, process: Process, labels: Tensor) -> Classifier:
    """log p(c | x_t) by a network of --target class, on any process."""

    def log_p(x: Tensor, t: Tensor) -> Tensor:
        every = class_logits(network, process, x, t).log_softmax(1)
        return every.gather(1, labels.to(x.device)[:, None])[:, 0]

    return log_p


# The denoiser for the samples of some seeds.
Conditioned = Callable[[Sequence[int]], Denoiser]


def conditioned(config: Config, denoise: ClassDenoiser, label: int | None = None) -> Conditioned:
    """A denoiser told a class: `label`, or of each sample its seed modulo the number of classes."""

    def of(seeds: Sequence[int]) -> Denoiser:
        if not config.cond:
            return lambda x, t: denoise(x, t, None)
        labels = classes_of(config, seeds, label)
        return lambda x, t: denoise(x, t, labels.to(x.device))

    return of


def classes_of(config: Config, seeds: Sequence[int], label: int | None) -> Tensor:
    """The class of each sample: `label`, or its seed modulo the number of classes, [B]."""
    classes = build.facts(config).classes
    return torch.tensor([seed % classes if label is None else label for seed in seeds])


def sampler(
    config: Config, how: Sampling, conditioned: Conditioned, device: str | None = None
) -> Callable[[Sequence[int]], Sample]:
    """Draws one sample for each seed."""
    process = build.process(config)
    shape = build.facts(config).shape

    def draw(seeds: Sequence[int]) -> Sample:
        randn = seeded(seeds, shape, device or config.device, process.noise)
        *_, last = how(process, conditioned(seeds), randn)
        return last

    return draw
