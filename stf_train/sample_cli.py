"""The commands stf-sample and stf-eval."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import torch

from stf_train import build, features, plots, run
from stf_train import evaluate as evaluation
from stf_train.config import Config
from stf_train.data import DataSet
from stf_train.drawing import FOLDER, denoising, drawing, sampler_options, settings
from stf_train.options import (
    COUNT,
    DEVICE,
    OVERWRITE,
    SEED_MAX,
    SETTINGS,
    Command,
    Seeds,
    bad,
    blaming,
    free,
    resolve,
    writable,
)
from stf_train.prepare import found_again
from stf_train.progress import Progress

RUN = click.argument("folder", metavar="RUN", type=FOLDER)
BATCH = click.option("--batch", metavar="INT", type=COUNT, default=500, help="Samples at a time.")
FEWEST = 10  # samples in a set: an inception score is of ten parts


@click.command(cls=Command, context_settings=SETTINGS)
@RUN
@click.option(
    "--output",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    show_default="RUN/samples-SAMPLER-SEEDS.png",
    help="A grid of the samples as .png, or their values as .npy, [m, C, H, W] in data units.",
)
@OVERWRITE
@click.option(
    "--seeds",
    metavar="LIST",
    type=Seeds(),
    default="0-99",
    help="One sample for each seed, like 1,2,5-10.",
)
@BATCH
@sampler_options
@DEVICE
def sample(context: click.Context) -> None:
    """Draw samples from the run in folder RUN, with its EMA weights.

    Samplers: heun (Algorithm 2 of "Elucidating the Design Space of Diffusion-Based Generative
    Models", Karras et al. 2022), ddim, rk45, pc (predictor-corrector) and em (Euler-Maruyama).
    """
    folder: Path = context.params["folder"]
    seeds: list[int] = context.params["seeds"]
    size: int = context.params["batch"]
    kept = denoising(folder, "RUN")
    draw = drawing(context, kept)
    output: Path = context.params["output"] or new_output(context, kept.config)
    if output.suffix not in (".png", ".npy"):
        raise bad("--output", f"{output} ends neither in .png nor in .npy.")
    writable("--output", output, context.params["overwrite"])
    parts = []
    evaluations = 0
    with Progress(len(seeds), "sample", brief=False) as progress:
        for start in range(0, len(seeds), size):
            part = seeds[start : start + size]
            state = draw(part)
            parts.append(state.x.float().cpu())
            evaluations = max(evaluations, state.evaluations)
            progress.update(len(part))
    images = torch.cat(parts)
    if output.suffix == ".npy":
        np.save(output, images.numpy())
    else:
        pictured = run.pictured(kept.config, images.double())
        plots.save_samples(output, pictured, ink=run.is_ink(kept.config))
    click.echo(f"{output}: {len(images)} samples, {evaluations} network evaluations each")


def new_output(context: click.Context, config: Config) -> Path:
    """A picture in the run folder that is not there yet."""
    seeds = evaluation.describe(context.params["seeds"]).replace(",..,", "-").partition(" ")[0]
    folder: Path = context.params["folder"]
    return free(folder / f"samples-{settings(context, config).sampler}-{seeds}.png")


EXTRACTORS = ("convolutions", "pixels", "components", "inception")


@click.command("evaluate", cls=Command, context_settings=SETTINGS)
@RUN
@click.option(
    "--output",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    show_default=True,
    help="Keeps the report as .json.",
)
@OVERWRITE
@click.option(
    "--data",
    metavar="PATH",
    show_default="where the run found them",
    help="Where the data of the run are now.",
)
@click.option(
    "--n", metavar="INT", type=click.IntRange(FEWEST), default=1000, help="Samples in each set."
)
@click.option("--sets", metavar="INT", type=COUNT, default=3, help="Sets, for the spread.")
@click.option(
    "--seed", metavar="INT", type=click.IntRange(0, SEED_MAX), default=0, help="The first seed."
)
@click.option(
    "--extractor",
    type=click.Choice(EXTRACTORS),
    default="convolutions",
    help="What samples and data are compared by; inception, for the FID, needs --weights.",
)
@click.option(
    "--weights",
    metavar="FILE",
    type=click.Path(path_type=Path),
    show_default=True,
    help="torch-fidelity's weights of Inception-v3.",
)
@BATCH
@sampler_options
@DEVICE
def evaluate(context: click.Context) -> None:
    """Compare samples from the run in folder RUN with its data, in several sets of seeds.

    Frechet distance, precision and recall, and the inception score where the extractor knows
    classes; with the number of network evaluations, and mean, deviation and extremes over sets.
    """
    kept = denoising(context.params["folder"], "RUN")
    output: Path | None = context.params["output"]
    if output is not None:
        writable("--output", output, context.params["overwrite"])
    config = found_again(context, kept.config)
    draw = drawing(context, kept)
    device = resolve(context.params["device"])
    # Compared with is what there is, not its mirror images.
    found = build.dataset(replace(config, xflip=False)).to(device)
    if len(found) < FEWEST:
        raise bad("RUN", f"its data have {len(found)} samples, {FEWEST} at least are needed.")
    seeds = evaluation.seed_sets(
        context.params["n"], context.params["sets"], context.params["seed"]
    )
    extractor = extractor_of(context, found, device)
    try:
        report = evaluation.evaluate(draw, found, extractor, seeds, batch=context.params["batch"])
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    click.echo(str(report))
    if output is not None:
        about = {"run": str(context.params["folder"]), "step": kept.step} | report.as_dict()
        output.write_text(json.dumps(about, indent=2) + "\n")


def extractor_of(context: click.Context, found: DataSet, device: str) -> features.Extractor:
    """What --extractor names; with classes, where the data have some."""
    name, weights = context.params["extractor"], context.params["weights"]
    if name == "inception" and weights is None:
        raise bad("--weights", "must be given with --extractor inception.")
    if name != "inception" and weights is not None:
        raise bad("--weights", f"is for --extractor inception, got {name}.")
    if name == "inception":
        with blaming("--extractor", weights="--weights"):
            return features.Inception(weights, device)
    makers: dict[str, Callable[[], features.Extractor]] = {
        "convolutions": lambda: features.Convolutions(found.shape[0]),
        "pixels": features.Pixels,
        "components": lambda: features.PrincipalComponents(found, min(64, found.shape.numel())),
    }
    extractor = makers[name]()
    labels = found.references.labels
    several = labels is not None and len(labels.unique()) > 1
    return features.Classified(extractor, found) if several else extractor
