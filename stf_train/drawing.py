"""How samples are drawn from a run, as the options of stf-sample and stf-eval say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import click
import torch

from stf_train import build, run
from stf_train.checkpoint import Checkpoint
from stf_train.config import Config
from stf_train.guidance import classifier_guidance, extrapolated
from stf_train.options import FROM_ZERO, POSITIVE, F, Finite, attach, bad, blaming, given, resolve
from stf_train.prepare import read
from stf_train.process import GAUSSIAN
from stf_train.sample import Denoiser, Sample
from stf_train.sampling import SAMPLERS, Sampling, asked

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
    how("steps", click.IntRange(2, 1_000_000), "Sampling steps, of all samplers but rk45.", "INT"),
    how("sigma_min", POSITIVE, "Lowest noise level: heun, and the others on edm, pfgmpp.", FLOAT),
    how("sigma_max", POSITIVE, "Highest noise level.", FLOAT),
    how("rho", POSITIVE, "Exponent of the noise levels between them.", FLOAT),
    how("S_churn", FROM_ZERO, "Amount of churn, of heun.", FLOAT),
    how("S_min", FROM_ZERO, "Lowest noise to churn.", FLOAT),
    how("S_max", click.FloatRange(min=0), "Highest noise to churn.", FLOAT),
    how("S_noise", FROM_ZERO, "Noise inflation.", FLOAT),
    how("eta", Finite(0, 1), "Fresh noise, of ddim.", FLOAT),
    how("snr", POSITIVE, "Signal to noise of the corrector, of pc.", FLOAT),
    how("tolerance", POSITIVE, "Error of a step, of rk45.", FLOAT),
    how("last_denoise", click.BOOL, "Whether rk45 ends with the denoiser.", "BOOL"),
    click.Option(
        ["--class", "label"],
        metavar="INT",
        type=click.IntRange(min=0),
        show_default="each seed modulo the number of classes",
        help="Class of all samples, of a conditional network or for --classifier.",
    ),
    click.Option(
        ["--guidance", "guidance"],
        metavar="W",
        type=Finite(-100, 100),
        default=0,
        show_default=True,
        help="(1 + W) D - W D': away from D', which is the network without the class, or --guide; "
        "with --classifier W times its gradient is added to the score. What is said of network "
        "evaluations counts all networks.",
    ),
    click.Option(
        ["--guide", "guide"],
        metavar="RUN",
        type=FOLDER,
        help="The run of a worse network, for autoguidance.",
    ),
    click.Option(
        ["--classifier", "classifier"],
        metavar="RUN",
        type=FOLDER,
        help="A run of --target class on the same data, for classifier guidance.",
    ),
)


def sampler_options(function: F) -> F:
    """Adds the options of HOW."""
    for option in reversed(HOW):
        function = attach(option)(function)
    return function


def settings(context: click.Context, config: Config) -> Sampling:
    """The run's settings of the sampler, some of them replaced."""
    process = build.process(config)
    names = [option.name for option in HOW if option.name in Sampling.__dataclass_fields__]
    changes = {str(n): context.params[n] for n in names if n and given(context, n)}
    sampler = changes.get("sampler", config.sampling.sampler)
    base = config.sampling if sampler == config.sampling.sampler else Sampling(sampler)
    known = ("sampler", *asked(sampler, process))
    for name in changes:
        if name not in known:
            raise bad(
                f"--{name}", f"makes no difference to {sampler} on the process {config.process}."
            )
    if changes.get("S_max") == float("inf"):
        changes["S_max"] = None
    found = replace(base, **changes)
    # What its arguments refuse is said before the first state.
    with blaming("--sampler", churn="--S_churn", **{name: f"--{name}" for name in names if name}):
        nothing = process.noise.draw((1, 1), torch.Generator(), torch.float64)
        next(found(process, lambda x, t: x, lambda: nothing))
    return found


def drawing(context: click.Context, kept: Checkpoint) -> Callable[[Sequence[int]], Sample]:
    """The samples of some seeds, drawn as the options say, with the calls of all networks."""
    config, device = kept.config, resolve(context.params["device"])
    how, kind = settings(context, config), guidance(context)
    label, w = context.params["label"], context.params["guidance"]
    classes = build.facts(config).classes
    if label is not None and not config.cond and kind != "classifier":
        raise bad("--class", f"{context.params['folder']} is not conditional.")
    if label is not None and label >= classes:
        raise bad("--class", f"there are {classes} classes, got {label}.")
    networks = [run.Averaged(kept, device)]
    denoise = run.denoiser(config, networks[0])
    conditioned = run.conditioned(config, denoise, label)
    if kind == "classifier":
        networks.append(run.Averaged(classifying(context, config, how), device))
        conditioned = told(conditioned, networks[1], config, label, w)
    elif kind == "guide":
        other = worse(context, config)
        networks.append(run.Averaged(other, device))
        leading = run.denoiser(other.config, networks[1])
        conditioned = away(conditioned, run.conditioned(other.config, leading, label), w)
    elif kind == "class":
        if not config.cond or not config.label_dropout:
            raise bad(
                "--guidance",
                "needs --classifier, --guide, or a network trained with --cond 1 and a "
                "--label_dropout above 0.",
            )
        conditioned = away(conditioned, without_class(denoise, device), w)
    draw = run.sampler(config, how, conditioned, device)

    def counted(seeds: Sequence[int]) -> Sample:
        before = sum(network.calls for network in networks)
        try:
            state = draw(seeds)
        except ArithmeticError as error:
            raise click.ClickException(str(error)) from error
        return replace(state, evaluations=sum(network.calls for network in networks) - before)

    return counted


def denoising(folder: Path, option: str) -> Checkpoint:
    """The checkpoint of a run whose network draws samples."""
    kept = read(folder, option)
    if not run.draws(kept.config):
        raise bad(option, f"{folder} has learnt classes, which is for --classifier.")
    return kept


def guidance(context: click.Context) -> str | None:
    """The kind of guidance asked for: by a "classifier", a "guide" or the "class", or None."""
    kinds = [kind for kind in ("classifier", "guide") if context.params[kind] is not None]
    if len(kinds) > 1:
        raise bad("--classifier", "is another guidance than --guide: only one of them.")
    if not given(context, "guidance"):
        for kind in kinds:
            raise bad(f"--{kind}", "needs --guidance W.")
        return None
    return kinds[0] if kinds else "class"


def classifying(context: click.Context, config: Config, how: Sampling) -> Checkpoint:
    """The run of the classifier, if it knows the samples of a run."""
    folder: Path = context.params["classifier"]
    kept = read(folder, "--classifier")
    if run.draws(kept.config):
        raise bad("--classifier", f"{folder} was not trained with --target class.")
    own, known = build.facts(config), build.facts(kept.config)
    if (own.shape, own.classes, config.range) != (known.shape, known.classes, kept.config.range):
        raise bad("--classifier", f"{folder} knows other data: {known}; {own} are asked for.")
    process = build.process(config)
    if process.noise != GAUSSIAN:
        raise bad("--classifier", f"needs Gaussian noise, which {config.process} does not have.")
    start = torch.tensor(process.span[0], dtype=torch.float64)
    if how.sampler != "heun" and process.alpha(start) == 0:
        raise bad(
            "--classifier",
            f"{how.sampler} starts from noise without any signal, where no class is more likely "
            "than another; --sampler heun does not.",
        )
    return kept


def told(
    conditioned: run.Conditioned,
    network: run.Averaged,
    config: Config,
    label: int | None,
    scale: float,
) -> run.Conditioned:
    """Classifier guidance for the samples of some seeds."""
    process = build.process(config)

    def of(seeds: Sequence[int]) -> Denoiser:
        log_p = run.classifier(network, process, run.classes_of(config, seeds, label))
        return classifier_guidance(conditioned(seeds), log_p, process, scale)

    return of


def worse(context: click.Context, config: Config) -> Checkpoint:
    """The run of the network that autoguidance leads away from."""
    folder: Path = context.params["guide"]
    other = denoising(folder, "--guide")
    own, known = build.facts(config), build.facts(other.config)
    if build.process(other.config) != build.process(config):
        raise bad("--guide", f"{folder} has another process.")
    if own.shape != known.shape:
        raise bad("--guide", f"{folder} knows other data: {known}; {own} are asked for.")
    if other.config.cond and not config.cond:
        raise bad("--guide", f"{folder} is conditional, and the network guided is not.")
    return other


def away(good: run.Conditioned, bad: run.Conditioned, w: float) -> run.Conditioned:
    """Guidance by a worse denoiser for the samples of some seeds."""
    return lambda seeds: extrapolated(good(seeds), bad(seeds), w)


def without_class(denoise: run.ClassDenoiser, device: str) -> run.Conditioned:
    """The denoiser of a conditional network that is told no class."""

    def of(seeds: Sequence[int]) -> Denoiser:
        none = torch.full((len(seeds),), -1, device=device)
        return lambda x, t: denoise(x, t, none)

    return of
