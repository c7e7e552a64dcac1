"""The command stf-train."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from tqdm import tqdm

from stf_train import board, build, checkpoint, presets, run
from stf_train.compute import launched
from stf_train.config import Config
from stf_train.loop import Diverged
from stf_train.options import (
    DEVICE,
    Command,
    CountOrAll,
    F,
    Finite,
    Integers,
    Setting,
    attach,
    bad,
    given,
    resolve,
)
from stf_train.process import OUTPUTS

SETTINGS = {"show_default": True, "max_content_width": 100}
POSITIVE = Finite(min=0, min_open=True)
FROM_ZERO = Finite(min=0)
COUNT = click.IntRange(min=1)


def take_preset(context: click.Context, option: click.Parameter, name: str) -> str:
    """Makes a preset's values the defaults of the other options."""
    context.default_map = presets.PRESETS[name]
    return name


def refuse_augment(context: click.Context, option: click.Parameter, value: object) -> None:
    if value is not None:
        raise bad(
            "--augment",
            "EDM's augmentation is not implemented: references would have to be augmented alike. "
            "--xflip 1 mirrors both.",
        )


def setting(
    name: str,
    kind: click.ParamType | type,
    help: str,
    *,
    metavar: str | None = None,
    nothing: str | None = None,
    nargs: int = 1,
) -> Callable[[F], F]:
    """An option whose default is the preset's; `nothing` says what it means to have none."""
    hyphened = [f"--{name.replace('_', '-')}"] if name == "batch_gpu" else []  # as EDM spells it
    option = Setting(
        [*hyphened, f"--{name}", name],
        type=kind,
        metavar=metavar,
        nargs=nargs,
        default=presets.PRESETS[presets.DEFAULT][name],
        show_default=True,
        help=help,
    )
    option.nothing = nothing
    return attach(option)


def switch(name: str, help: str) -> Callable[[F], F]:
    """A setting that is on or off."""
    return setting(name, click.BOOL, help, metavar="BOOL")


@click.command(cls=Command, context_settings=SETTINGS)
@click.option(
    "--preset",
    type=click.Choice(list(presets.PRESETS)),
    metavar="NAME",
    default=presets.DEFAULT,
    is_eager=True,
    callback=take_preset,
    help="Settings under one name, which those given one by one replace: "
    + ", ".join(presets.PRESETS)
    + ". With --help behind it, the defaults shown are its own.",
)
@click.option(
    "--outdir",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="The run folder, new or empty.  [default: the next runs/00000-PRESET-TARGET]",
)
@click.option(
    "--resume",
    metavar="RUN",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Continue the run in this folder, bit for bit as if it had never stopped. Its options "
    "hold; of those given here only --duration may differ, to train longer.",
)
@setting(
    "data",
    str,
    "digits, patches, or the path of a data set: images in a folder or zip, CIFAR-10, CelebA, an "
    "array.",
    metavar="NAME|PATH",
    nothing="the path must be given",
)
@setting("size", COUNT, "Brings images to so many pixels.", metavar="INT", nothing="as they are")
@setting("range", float, "Values of the lowest and the highest byte.", metavar="LOW HIGH", nargs=2)
@switch("xflip", "Doubles the data by mirror images, sources and references.")
@switch("cond", "Trains a class-conditional network.")
@setting(
    "label_dropout",
    click.FloatRange(0, 1),
    "How often a class is hidden, for classifier-free guidance.",
    metavar="FLOAT",
    nothing="0.1 with --cond 1",
)
@setting(
    "target",
    click.Choice(["stf", "dsm"]),
    "What the network learns: the stable target field, or denoising score matching.",
)
@setting(
    "references",
    CountOrAll(),
    "References per step, the minibatch among them, for --target stf. The target is unbiased at "
    "every N; its variance falls with N.",
    metavar="N|all",
)
@setting("process", click.Choice(list(presets.PROCESS)), "How noise is added.")
@setting("output", click.Choice(list(OUTPUTS)), "What the network says.", nothing="the process's")
@setting(
    "sigma_data",
    POSITIVE,
    "Deviation of the data, for edm and pfgmpp.",
    metavar="FLOAT",
    nothing="measured",
)
@setting(
    "P_mean",
    Finite(-100, 100),
    "Mean of ln sigma, edm and pfgmpp.",
    metavar="FLOAT",
    nothing="-1.2",
)
@setting("P_std", POSITIVE, "Its deviation.", metavar="FLOAT", nothing="1.2")
@setting("D", POSITIVE, "Dimensions of pfgmpp.", metavar="FLOAT", nothing="128")
@setting("noise_min", POSITIVE, "Lowest noise of ve.", metavar="FLOAT", nothing="0.01")
@setting("noise_max", POSITIVE, "Highest noise of ve.", metavar="FLOAT", nothing="50")
@setting("beta_min", POSITIVE, "First beta of vp and ddpm.", metavar="FLOAT", nothing="0.1, 1e-4")
@setting("beta_max", POSITIVE, "Last beta of vp and ddpm.", metavar="FLOAT", nothing="20, 2e-2")
@setting(
    "strength",
    FROM_ZERO,
    "Lambda of the sequence-aware loss, for ddpm.",
    metavar="FLOAT",
    nothing="another loss",
)
@setting("points", COUNT, "Steps of its sequences.", metavar="INT", nothing="2")
@setting("arch", click.Choice(list(build.ARCHITECTURES)), "The network.")
@setting("cbase", COUNT, "Channels of the network at full resolution.", metavar="INT")
@setting(
    "cres",
    Integers(),
    "Channels at each resolution, times cbase.",
    metavar="LIST",
    nothing="the network's",
)
@setting("blocks", COUNT, "Blocks at each resolution.", metavar="INT", nothing="the network's")
@setting(
    "attention",
    Integers(),
    "Resolutions with attention, pixels.",
    metavar="LIST",
    nothing="the network's",
)
@setting(
    "dropout",
    click.FloatRange(0, 1, max_open=True),
    "Dropout probability.",
    metavar="FLOAT",
    nothing="the network's",
)
@click.option("--augment", hidden=True, callback=refuse_augment, expose_value=False)
@setting("batch", COUNT, "Samples per step, on all devices together.", metavar="INT")
@setting(
    "batch_gpu",
    COUNT,
    "Samples at a time on each device; the references are always those of the whole step.",
    metavar="INT",
    nothing="all",
)
@setting("duration", POSITIVE, "Length of the training, in million images.", metavar="MIMG")
@setting("lr", POSITIVE, "Learning rate.", metavar="FLOAT")
@setting("rampup", FROM_ZERO, "Over which it rises from 0, in million images.", metavar="MIMG")
@setting(
    "clip",
    POSITIVE,
    "Norm that a longer gradient is cut down to.",
    metavar="FLOAT",
    nothing="none",
)
@setting(
    "ema",
    FROM_ZERO,
    "Half-life of the moving average of the weights, in million images.",
    metavar="MIMG",
)
@setting(
    "ema_rampup",
    POSITIVE,
    "Longest half-life early on, as a fraction of the images seen.",
    metavar="FLOAT",
)
@switch("fp16", "Lets the network multiply in float16; see --ls.")
@switch("bf16", "Lets the network multiply in bfloat16.")
@setting("ls", POSITIVE, "Loss scale, against underflow in float16.", metavar="FLOAT")
@switch("compile", "Compiles the network by torch.compile.")
@setting(
    "seed", click.IntRange(0, 2**32 - 1), "Seed of weights, minibatches and noise.", metavar="INT"
)
@setting("tick", POSITIVE, "How often to write the checkpoint, in thousand images.", metavar="KIMG")
@setting("snap", COUNT, "Ticks between pictures of samples.", metavar="TICKS", nothing="none")
@switch("tensorboard", "Writes metrics and pictures of samples for TensorBoard, too.")
@click.option(
    "--threads",
    metavar="INT",
    type=COUNT,
    help="CPU threads. The last bits depend on it, so a resumed run keeps it.  "
    "[default: as many as torch takes]",
)
@DEVICE
def train(context: click.Context) -> None:
    """Train a diffusion model, by default on scikit-learn's digits: 1797 images of 8x8 pixels.

    Without any option it trains with the stable target field for about a minute on two CPU cores.
    It leaves a run folder with the options, a checkpoint, the metrics of every step, and pictures
    of samples and of the loss.

    On several devices: torchrun --nproc_per_node N -m stf_train --outdir DIR ...
    """
    resume: Path | None = context.params["resume"]
    accelerator = launched(resolve(context.params["device"]))
    processes = 1 if accelerator is None else accelerator.num_processes
    first = accelerator is None or accelerator.is_main_process
    if resume is None:
        config = configured(context, processes)
        if accelerator is not None and context.params["outdir"] is None:
            raise bad("--outdir", "several processes have to be told the same folder.")
        folder = context.params["outdir"]
        if first:
            folder = new_folder(folder, f"{config.preset}-{config.target}")
            run.create(folder, config)
    else:
        folder = resume
        if first:
            continue_with(context, folder)
    if accelerator is not None:
        accelerator.wait_for_everyone()
    train_to_the_end(folder, quiet=not first)
    if first:
        run.draw_pictures(folder)
        click.echo(f"{folder} holds")
        for name, what in run.CONTENTS.items():
            click.echo(f"  {name:24}{what}")
        click.echo(f"More samples: stf-sample {folder}")


def configured(context: click.Context, processes: int) -> Config:
    """The config that the options ask for, refused if they do not fit the data or each other."""
    params = context.params
    outside = ("preset", "outdir", "resume", "threads", "device")
    asked = {n: v for n, v in params.items() if n not in outside and given(context, n)}
    try:
        options = presets.settle(params["preset"], asked)
    except presets.Inapplicable as error:
        raise bad(f"--{error.name}", error.reason) from error
    if options["data"] is None:
        raise bad("--data", f"the preset {params['preset']} needs the path of its data.")
    if options["references"] != "all":
        options["references"] = int(str(options["references"]))
    config = Config(
        **options,  # type: ignore[arg-type]
        preset=params["preset"],
        device=resolve(params["device"]),
        threads=params["threads"] or torch.get_num_threads(),
        processes=processes,
    )
    return check(config)


def check(config: Config) -> Config:
    """The config with the deviation of its data measured, if it is one that can be run."""
    try:
        found = build.dataset(config)
        if config.process in ("edm", "pfgmpp") and config.sigma_data is None:
            config = replace(config, sigma_data=found.sigma_data)
        if config.cond and not found.classes:
            raise bad("--cond", f"{config.data} has no classes.")
        build.process(config)
        # The sizes of a network, without its weights.
        with torch.device("meta"):
            build.network(config)
        run.compute(config).parts(config.batch)
        if config.tensorboard:
            board.check()
    except (FileNotFoundError, ImportError, MemoryError, ValueError) as error:
        raise click.UsageError(str(error)) from error
    if config.fp16 and config.bf16:
        raise bad("--bf16", "--fp16 is asked for as well.")
    if config.batch > len(found):
        raise bad("--batch", f"{config.batch} is more than the {len(found)} samples there are.")
    n = build.count(config)
    if config.target == "stf" and n > len(found):
        raise bad("--references", f"{n} is more than the {len(found)} samples there are.")
    if config.target == "stf" and n < config.batch:
        raise bad(
            "--references",
            f"{n} is less than --batch {config.batch}: every sample of the minibatch has to be "
            "among the references, or the target is biased.",
        )
    return config


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


def train_to_the_end(folder: Path, quiet: bool = False) -> None:
    """Trains with a progress bar."""
    kept = checkpoint.read(folder / run.CHECKPOINT)
    steps = kept.config.steps
    loss: float | None = None
    bar: Any = tqdm(run.advance(folder), total=steps, initial=kept.step, unit="step", disable=quiet)
    try:
        with bar:
            for step in bar:
                if math.isfinite(step.loss):
                    loss = step.loss if loss is None else 0.98 * loss + 0.02 * step.loss
                skipped = f", {step.skipped} skipped" if step.skipped else ""
                bar.set_postfix_str(f"loss {loss or math.nan:.3f}{skipped}", refresh=False)
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


def read(folder: Path, hint: str) -> checkpoint.Checkpoint:
    """The checkpoint of a run folder."""
    try:
        return checkpoint.read(folder / run.CHECKPOINT)
    except (FileNotFoundError, ValueError) as error:
        raise bad(hint, str(error)) from error
