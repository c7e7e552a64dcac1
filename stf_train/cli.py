"""The commands stf-train and stf-sample."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import torch
from tqdm import tqdm

from stf_train import checkpoint, data, plots, run
from stf_train.config import P_MEAN, P_STD, RAMPUP, Config
from stf_train.loop import Diverged
from stf_train.options import DEVICE, CountOrAll, Finite, Seeds, bad, given, resolve
from stf_train.sample import RHO, SIGMA_MAX, SIGMA_MIN, STEPS, Churn, heun, seeded, sigma_steps

SETTINGS = {"show_default": True, "max_content_width": 100}


@click.command(context_settings=SETTINGS)
@click.option(
    "--outdir",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="The run folder, new or empty.  [default: the next runs/00000-digits-TARGET]",
)
@click.option(
    "--resume",
    metavar="RUN",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Continue the run in this folder, bit for bit as if it had never stopped. Its options "
    "hold; of those given here only --duration may differ, to train longer.",
)
@click.option(
    "--target",
    type=click.Choice(["stf", "dsm"]),
    default="stf",
    help="What the network learns: the stable target field, or denoising score matching.",
)
@click.option(
    "--references",
    metavar="N|all",
    type=CountOrAll(data.TOTAL),
    default="1024",
    help="References per step, the minibatch among them, for --target stf. The target is unbiased "
    "at every N; its variance falls with N.",
)
@click.option(
    "--batch",
    metavar="INT",
    type=click.IntRange(1, data.TOTAL),
    default=128,
    help="Samples per step.",
)
@click.option(
    "--duration",
    metavar="MIMG",
    type=Finite(min=0, min_open=True),
    default=0.14,
    help="Length of the training, in million images.",
)
@click.option(
    "--lr", metavar="FLOAT", type=Finite(min=0, min_open=True), default=3e-3, help="Learning rate."
)
@click.option(
    "--ema",
    metavar="MIMG",
    type=Finite(min=0),
    default=0.01,
    help="Half-life of the moving average of the weights, in million images.",
)
@click.option(
    "--cbase",
    metavar="INT",
    type=click.IntRange(min=16),
    default=48,
    help="Channels of the network at full resolution, a multiple of 16.",
)
@click.option(
    "--seed",
    metavar="INT",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    help="Seed of weights, minibatches and noise.",
)
@click.option(
    "--tick",
    metavar="KIMG",
    type=Finite(min=0, min_open=True),
    default=10,
    help="How often to write the checkpoint, in thousand images.",
)
@click.option(
    "--threads",
    metavar="INT",
    type=click.IntRange(min=1),
    help="CPU threads. The last bits depend on it, so a resumed run keeps it.  "
    "[default: as many as torch takes]",
)
@DEVICE
@click.pass_context
def train(
    context: click.Context,
    outdir: Path | None,
    resume: Path | None,
    target: str,
    references: int,
    batch: int,
    duration: float,
    lr: float,
    ema: float,
    cbase: int,
    seed: int,
    tick: float,
    threads: int | None,
    device: str,
) -> None:
    """Train a small diffusion model on scikit-learn's digits: 1797 images of 8x8 pixels.

    Without any option it trains with the stable target field for about a minute on two CPU cores.
    It leaves a run folder with the options, a checkpoint, the metrics of every step, and pictures
    of samples and of the loss.
    """
    if resume is None:
        config = Config(
            target=target,
            references=references,
            batch=batch,
            duration=duration,
            lr=lr,
            rampup=RAMPUP,
            ema=ema,
            P_mean=P_MEAN,
            P_std=P_STD,
            sigma_data=data.sigma_data(data.digits()),
            cbase=cbase,
            seed=seed,
            tick=tick,
            device=resolve(device),
            threads=threads or torch.get_num_threads(),
        )
        check(context, config)
        folder = new_folder(outdir, f"digits-{target}")
        run.create(folder, config)
    else:
        folder = resume
        continue_with(context, folder)
    train_to_the_end(folder)
    run.draw_pictures(folder)
    click.echo(f"{folder} holds")
    for name, what in run.CONTENTS.items():
        click.echo(f"  {name:24}{what}")
    click.echo(f"More samples: stf-sample {folder}")


def check(context: click.Context, config: Config) -> None:
    """Refuses options that do not fit the data or each other."""
    if config.cbase % 16:
        raise bad("--cbase", f"{config.cbase} is not a multiple of 16.")
    if config.target == "dsm" and given(context, "references"):
        raise bad("--references", "--target dsm has no references.")
    if config.references < config.batch:
        raise bad(
            "--references",
            f"{config.references} is less than --batch {config.batch}: every sample of the "
            "minibatch has to be among the references, or the target is biased.",
        )


def continue_with(context: click.Context, folder: Path) -> None:
    """Refuses options that differ from those of the run; makes it longer if asked to."""
    kept = read(folder, "--resume")
    resolve(kept.config.device)
    options = kept.config.as_dict()
    for name, value in context.params.items():
        if name in ("resume", "duration") or not given(context, name):
            continue
        if name == "outdir":
            raise bad("--outdir", "a resumed run stays in its folder.")
        if value not in (options[name], "auto"):
            raise bad(f"--{name}", f"{folder} was started with {options[name]}, got {value}.")
    if given(context, "duration"):
        duration = context.params["duration"]
        if replace(kept.config, duration=duration).steps < kept.step:
            done = kept.step * kept.config.batch / 1e6
            raise bad("--duration", f"{folder} has seen {done} million images, got {duration}.")
        run.set_duration(folder, duration)


def new_folder(outdir: Path | None, name: str) -> Path:
    """The folder of a new run: the one asked for, or the next free number."""
    if outdir is not None:
        if outdir.is_dir() and any(outdir.iterdir()):
            raise bad(
                "--outdir",
                f"{outdir} is not empty. To continue a run: stf-train --resume {outdir}",
            )
        outdir.mkdir(parents=True, exist_ok=True)
        return outdir
    runs = Path("runs")
    runs.mkdir(exist_ok=True)
    number = next(i for i in itertools.count() if not any(runs.glob(f"{i:05d}-*")))
    folder = runs / f"{number:05d}-{name}"
    folder.mkdir()
    return folder


def train_to_the_end(folder: Path) -> None:
    """Trains with a progress bar."""
    kept = checkpoint.read(folder / run.CHECKPOINT)
    steps = kept.config.steps
    loss = None
    try:
        with tqdm(run.advance(folder), total=steps, initial=kept.step, unit="step") as bar:
            for step in bar:
                loss = step.loss if loss is None else 0.98 * loss + 0.02 * step.loss
                bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
    except KeyboardInterrupt as stop:
        done = checkpoint.read(folder / run.CHECKPOINT).step
        raise click.ClickException(
            f"stopped; stf-train --resume {folder} continues from step {done} of {steps}"
        ) from stop
    except Diverged as stop:
        done = checkpoint.read(folder / run.CHECKPOINT).step
        raise click.ClickException(
            f"{stop}; a lower --lr may help. {folder} keeps the checkpoint of step {done}"
        ) from stop
    except ValueError as damage:
        raise click.ClickException(str(damage)) from damage


@click.command(context_settings=SETTINGS)
@click.argument(
    "folder", metavar="RUN", type=click.Path(exists=True, file_okay=False, path_type=Path)
)
@click.option(
    "--output",
    metavar="FILE",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    default="samples.png",
    help="A grid of the samples as .png, or their values as .npy, [m, 1, 8, 8] in about [-1, 1].",
)
@click.option(
    "--seeds",
    metavar="LIST",
    type=Seeds(),
    default="0-99",
    help="One sample for each seed, like 1,2,5-10.",
)
@click.option(
    "--batch", metavar="INT", type=click.IntRange(min=1), default=500, help="Samples at a time."
)
@click.option(
    "--steps", metavar="INT", type=click.IntRange(min=2), default=STEPS, help="Sampling steps."
)
@click.option(
    "--sigma_min",
    metavar="FLOAT",
    type=Finite(min=0, min_open=True),
    default=SIGMA_MIN,
    help="Lowest noise level.",
)
@click.option(
    "--sigma_max",
    metavar="FLOAT",
    type=Finite(min=0, min_open=True),
    default=SIGMA_MAX,
    help="Highest noise level.",
)
@click.option(
    "--rho",
    metavar="FLOAT",
    type=Finite(min=0, min_open=True),
    default=RHO,
    help="Exponent of the noise levels between them.",
)
@click.option(
    "--S_churn", "S_churn", metavar="FLOAT", type=Finite(min=0), default=0, help="Amount of churn."
)
@click.option(
    "--S_min",
    "S_min",
    metavar="FLOAT",
    type=Finite(min=0),
    default=0,
    help="Lowest noise to churn.",
)
@click.option(
    "--S_max",
    "S_max",
    metavar="FLOAT",
    type=click.FloatRange(min=0),
    default=float("inf"),
    help="Highest noise to churn.",
)
@click.option(
    "--S_noise", "S_noise", metavar="FLOAT", type=Finite(min=0), default=1, help="Noise inflation."
)
@DEVICE
def sample(
    folder: Path,
    output: Path,
    seeds: list[int],
    batch: int,
    steps: int,
    sigma_min: float,
    sigma_max: float,
    rho: float,
    S_churn: float,
    S_min: float,
    S_max: float,
    S_noise: float,
    device: str,
) -> None:
    """Draw samples from the run in folder RUN, with its EMA weights and Heun's method.

    The options are those of Algorithm 2 of "Elucidating the Design Space of Diffusion-Based
    Generative Models" (Karras et al. 2022).
    """
    if output.suffix not in (".png", ".npy"):
        raise bad("--output", f"{output} ends neither in .png nor in .npy.")
    device = resolve(device)
    kept = read(folder, "RUN")
    denoise = run.denoiser(kept, device)
    try:
        t = sigma_steps(steps, sigma_min, sigma_max, rho)
        churn = Churn(S_churn, S_min, S_max, S_noise)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    batches = [seeds[start : start + batch] for start in range(0, len(seeds), batch)]
    parts = []
    for batch_seeds in tqdm(batches, unit="batch"):
        noise = seeded(batch_seeds, data.SHAPE, device)
        *_, state = heun(denoise, noise, t, churn)
        parts.append(state.x)
    images = torch.cat(parts).float().cpu()
    if output.suffix == ".npy":
        np.save(output, images.numpy())
    else:
        plots.save_samples(output, images)
    click.echo(f"{output}: {len(images)} samples, {state.evaluations} network evaluations each")


def read(folder: Path, hint: str) -> checkpoint.Checkpoint:
    """The checkpoint of a run folder."""
    try:
        return checkpoint.read(folder / run.CHECKPOINT)
    except (FileNotFoundError, ValueError) as error:
        raise bad(hint, str(error)) from error
