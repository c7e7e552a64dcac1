"""The commands stf-sample and stf-eval."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import torch
from tqdm import tqdm

from stf_train import build, features, plots, run
from stf_train import evaluate as evaluation
from stf_train.checkpoint import Checkpoint
from stf_train.config import Config
from stf_train.data import DataSet
from stf_train.guidance import extrapolated
from stf_train.options import DEVICE, Command, F, Finite, Seeds, attach, bad, given, resolve
from stf_train.sample import Denoiser, Sample
from stf_train.sampling import SAMPLERS, Sampling, asked
from stf_train.train_cli import COUNT, FROM_ZERO, POSITIVE, SETTINGS, read

RUNS = "the run's"
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


def how(name: str, kind: click.ParamType, help: str, metavar: str | None = None) -> click.Option:
    """A setting of the sampler, by default that of the run."""
    return click.Option(
        [f"--{name}", name], type=kind, metavar=metavar, show_default=RUNS, help=help
    )


FLOAT = "FLOAT"
HOW = (
    how("sampler", click.Choice(list(SAMPLERS)), "The sampler."),
    how("steps", click.IntRange(min=2), "Sampling steps, of all samplers but rk45.", "INT"),
    how("sigma_min", POSITIVE, "Lowest noise level: heun, and the others on edm, pfgmpp.", FLOAT),
    how("sigma_max", POSITIVE, "Highest noise level.", FLOAT),
    how("rho", POSITIVE, "Exponent of the noise levels between them.", FLOAT),
    how("S_churn", FROM_ZERO, "Amount of churn, of heun.", FLOAT),
    how("S_min", FROM_ZERO, "Lowest noise to churn.", FLOAT),
    how("S_max", click.FloatRange(min=0), "Highest noise to churn.", FLOAT),
    how("S_noise", FROM_ZERO, "Noise inflation.", FLOAT),
    how("eta", click.FloatRange(0, 1), "Fresh noise, of ddim.", FLOAT),
    how("snr", POSITIVE, "Signal to noise of the corrector, of pc.", FLOAT),
    how("tolerance", POSITIVE, "Error of a step, of rk45.", FLOAT),
    how("last_denoise", click.BOOL, "Whether rk45 ends with the denoiser.", "BOOL"),
    click.Option(
        ["--class", "label"],
        metavar="INT",
        type=click.IntRange(min=0),
        show_default="each seed modulo the number of classes",
        help="Class of all samples, of a conditional network.",
    ),
    click.Option(
        ["--guidance", "guidance"],
        metavar="W",
        type=Finite(-100, 100),
        default=0,
        show_default=True,
        help="(1 + W) D - W D': away from D', which is the network without the class, or --guide.",
    ),
    click.Option(
        ["--guide", "guide"],
        metavar="RUN",
        type=FOLDER,
        help="The run of a worse network, for autoguidance.",
    ),
)


def sampler_options(function: F) -> F:
    """Adds the options of HOW."""
    for option in reversed(HOW):
        function = attach(option)(function)
    return function


BATCH = click.option("--batch", metavar="INT", type=COUNT, default=500, help="Samples at a time.")
RUN = click.argument("folder", metavar="RUN", type=FOLDER)


@click.command(cls=Command, context_settings=SETTINGS)
@RUN
@click.option(
    "--output",
    metavar="FILE",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    default="samples.png",
    help="A grid of the samples as .png, or their values as .npy, [m, C, H, W] in data units.",
)
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
    output: Path = context.params["output"]
    seeds: list[int] = context.params["seeds"]
    size: int = context.params["batch"]
    if output.suffix not in (".png", ".npy"):
        raise bad("--output", f"{output} ends neither in .png nor in .npy.")
    kept = read(context.params["folder"], "RUN")
    draw = drawing(context, kept)
    parts = []
    evaluations = 0
    for start in tqdm(range(0, len(seeds), size), unit="batch"):
        state = draw(seeds[start : start + size])
        parts.append(state.x.float().cpu())
        evaluations = max(evaluations, state.evaluations)
    images = torch.cat(parts)
    if output.suffix == ".npy":
        np.save(output, images.numpy())
    else:
        pictured = run.pictured(kept.config, images.double())
        plots.save_samples(output, pictured, ink=run.is_ink(kept.config))
    click.echo(f"{output}: {len(images)} samples, {evaluations} network evaluations each")


def drawing(context: click.Context, kept: Checkpoint) -> Callable[[Sequence[int]], Sample]:
    """The samples of some seeds, drawn as the options say."""
    config, device = kept.config, resolve(context.params["device"])
    sampling = settings(context, config)
    label, w, guide = (context.params[name] for name in ("label", "guidance", "guide"))
    if label is not None and not config.cond:
        raise bad("--class", f"{context.params['folder']} is not conditional.")
    if label is not None and label >= build.dataset(config).classes:
        raise bad("--class", f"there are {build.dataset(config).classes} classes, got {label}.")
    denoise = run.denoiser(kept, device)
    conditioned = run.conditioned(config, denoise, label)
    if guide is not None and not given(context, "guidance"):
        raise bad("--guide", "needs --guidance W.")
    if given(context, "guidance"):
        conditioned = guided(conditioned, worse(kept, guide, device, denoise, label), w)
    draw = run.sampler(config, sampling, conditioned, device)

    def checked(seeds: Sequence[int]) -> Sample:
        try:
            return draw(seeds)
        except ValueError as error:  # of settings that do not go with the process
            raise click.UsageError(str(error)) from error
        except ArithmeticError as error:
            raise click.ClickException(str(error)) from error

    return checked


def settings(context: click.Context, config: Config) -> Sampling:
    """The run's settings of the sampler, some of them replaced."""
    names = [option.name for option in HOW if option.name in Sampling.__dataclass_fields__]
    changes = {str(n): context.params[n] for n in names if n and given(context, n)}
    sampler = changes.get("sampler", config.sampling.sampler)
    base = config.sampling if sampler == config.sampling.sampler else Sampling(sampler)
    known = ("sampler", *asked(sampler, build.process(config)))
    for name in changes:
        if name not in known:
            raise bad(
                f"--{name}", f"makes no difference to {sampler} on the process {config.process}."
            )
    if changes.get("S_max") == float("inf"):
        changes["S_max"] = None
    return replace(base, **changes)


def worse(
    kept: Checkpoint,
    guide: Path | None,
    device: str,
    denoise: run.ClassDenoiser,
    label: int | None,
) -> run.Conditioned:
    """The denoiser that guidance leads away from."""
    config = kept.config
    if guide is not None:
        other = read(guide, "--guide")
        if build.process(other.config) != build.process(config):
            raise bad("--guide", f"{guide} has another process.")
        if other.config.cond and not config.cond:
            raise bad("--guide", f"{guide} is conditional, and the network guided is not.")
        return run.conditioned(other.config, run.denoiser(other, device), label)
    if not config.cond or not config.label_dropout:
        raise bad(
            "--guidance", "the network knows nothing without a class; train with --label_dropout."
        )

    def without(seeds: Sequence[int]) -> Denoiser:
        none = torch.full((len(seeds),), -1, device=device)
        return lambda x, t: denoise(x, t, none)

    return without


def guided(good: run.Conditioned, bad: run.Conditioned, w: float) -> run.Conditioned:
    """Guidance for the samples of some seeds."""
    return lambda seeds: extrapolated(good(seeds), bad(seeds), w)


EXTRACTORS = ("convolutions", "pixels", "components", "inception")


@click.command("evaluate", cls=Command, context_settings=SETTINGS)
@RUN
@click.option(
    "--output",
    metavar="FILE",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    show_default=True,
    help="Keeps the report as .json.",
)
@click.option("--n", metavar="INT", type=COUNT, default=1000, help="Samples in each set.")
@click.option("--sets", metavar="INT", type=COUNT, default=3, help="Sets, for the spread.")
@click.option("--seed", metavar="INT", type=click.IntRange(0), default=0, help="The first seed.")
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
    kept = read(context.params["folder"], "RUN")
    draw = drawing(context, kept)
    device = resolve(context.params["device"])
    # Compared with is what there is, not its mirror images.
    found = build.dataset(replace(kept.config, xflip=False)).to(device)
    seeds = evaluation.seed_sets(
        context.params["n"], context.params["sets"], context.params["seed"]
    )
    extractor = extractor_of(context, found, device)
    try:
        report = evaluation.evaluate(draw, found, extractor, seeds, batch=context.params["batch"])
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    click.echo(str(report))
    if context.params["output"] is not None:
        about = {"run": str(context.params["folder"]), "step": kept.step} | report.as_dict()
        context.params["output"].write_text(json.dumps(about, indent=2) + "\n")


def extractor_of(context: click.Context, found: DataSet, device: str) -> features.Extractor:
    """What --extractor names; with classes, where the data have some."""
    name, weights = context.params["extractor"], context.params["weights"]
    if (name == "inception") != (weights is not None):
        raise bad("--weights", f"is for --extractor inception and needed there, got {name}.")
    if name == "inception":
        try:
            return features.Inception(weights, device)
        except (FileNotFoundError, ImportError, ValueError) as error:
            raise bad("--weights", str(error)) from error
    makers: dict[str, Callable[[], features.Extractor]] = {
        "convolutions": lambda: features.Convolutions(found.shape[0]),
        "pixels": features.Pixels,
        "components": lambda: features.PrincipalComponents(found, min(64, found.shape.numel())),
    }
    extractor = makers[name]()
    return features.Classified(extractor, found) if found.classes else extractor
