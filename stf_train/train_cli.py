"""The command stf-train."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import click

from stf_train import build, checkpoint, prepare, presets, run
from stf_train.compute import launched
from stf_train.loop import Diverged
from stf_train.options import (
    COUNT,
    DEVICE,
    FROM_ZERO,
    POSITIVE,
    SEED_MAX,
    SETTINGS,
    Command,
    CountOrAll,
    F,
    Finite,
    Integers,
    Setting,
    attach,
    bad,
    resolve,
)
from stf_train.process import OUTPUTS
from stf_train.progress import Progress


def take_preset(context: click.Context, option: click.Parameter, name: str | None) -> str:
    """Makes a preset's values the defaults of the other options."""
    name = name or presets.of_data(context.params.get("data"))
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
    eager: bool = False,
) -> Callable[[F], F]:
    """An option whose default is the preset's; `nothing` says what it means to have none."""
    hyphened = [f"--{name.replace('_', '-')}"] if name == "batch_gpu" else []  # as EDM spells it
    option = Setting(
        [*hyphened, f"--{name}", name],
        type=kind,
        metavar=metavar,
        nargs=nargs,
        is_eager=eager,
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
    show_default="digits-edm; of --data patches patches-edm, of other data images-edm",
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
    help="The run folder, new or empty.  [default: the next runs/00000-DATA-PROCESS-TARGET]",
)
@click.option(
    "--resume",
    metavar="RUN",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Continue the run in this folder, bit for bit as if it had never stopped. Its options "
    "hold; of those given here only --duration may differ, to train longer, and --data, where the "
    "same data have moved.",
)
@setting(
    "data",
    str,
    "digits, patches, or the path of a data set: images in a folder or zip, CIFAR-10, CelebA, an "
    "array.",
    metavar="NAME|PATH",
    nothing="the path must be given",
    eager=True,
)
@setting("size", COUNT, "Brings images to so many pixels.", metavar="INT", nothing="as they are")
@setting(
    "range", Finite(), "Values of the lowest and the highest byte.", metavar="LOW HIGH", nargs=2
)
@switch("xflip", "Doubles the data by mirror images, sources and references.")
@switch("cache", "Reads the data into memory; 0 leaves those of a .stf or .npy file there.")
@switch("cond", "Trains a class-conditional network.")
@setting(
    "label_dropout",
    Finite(0, 1),
    "How often a class is hidden, for classifier-free guidance.",
    metavar="FLOAT",
    nothing="0.1 with --cond 1",
)
@setting(
    "target",
    click.Choice(["stf", "dsm", "class"]),
    "What the network learns: the stable target field, denoising score matching, or the class of a "
    "noisy sample, for --classifier of stf-sample.",
)
@setting(
    "references",
    CountOrAll(),
    "References per step, the minibatch among them, for --target stf. The target is unbiased at "
    "every N; its variance falls with N. Not given, there are no more than there are samples.",
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
@setting("points", click.IntRange(1, 1000), "Steps of its sequences.", metavar="INT", nothing="2")
@setting("arch", click.Choice(list(build.ARCHITECTURES)), "The network.")
@setting("cbase", COUNT, "Channels of the network at full resolution.", metavar="INT")
@setting(
    "cres",
    Integers(),
    "Channels at each resolution, times cbase.",
    metavar="LIST",
    nothing="the network's",
)
@setting(
    "blocks",
    click.IntRange(1, 1000),
    "Blocks at each resolution.",
    metavar="INT",
    nothing="the network's",
)
@setting(
    "attention",
    Integers(),
    "Resolutions with attention, pixels.",
    metavar="LIST",
    nothing="the network's",
)
@setting(
    "dropout",
    Finite(0, 1, max_open=True),
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
    "seed", click.IntRange(0, SEED_MAX), "Seed of weights, minibatches and noise.", metavar="INT"
)
@setting("tick", POSITIVE, "How often to write the checkpoint, in thousand images.", metavar="KIMG")
@setting("snap", COUNT, "Ticks between pictures of samples.", metavar="TICKS", nothing="none")
@switch("tensorboard", "Writes metrics and pictures of samples for TensorBoard, too.")
@click.option(
    "--threads",
    metavar="INT",
    type=click.IntRange(1, 1024),
    help="CPU threads. The last bits depend on it, so a resumed run keeps it.  "
    "[default: as many as torch takes]",
)
@DEVICE
def train(context: click.Context) -> None:
    """Train a diffusion model, by default on scikit-learn's digits: 1797 images of 8x8 pixels.

    Without any option it trains with the stable target field, 1 to 3 minutes on two CPU cores.
    Data of your own: --data PATH, with the preset images-edm unless another one is named.
    It leaves a run folder with the options, a checkpoint, the metrics of every step, and pictures
    of samples and of the loss.

    On several devices: torchrun --nproc_per_node N -m stf_train --outdir DIR ...
    """
    resume: Path | None = context.params["resume"]
    device = resolve(context.params["device"])
    try:
        accelerator = launched(device)
    except (ImportError, ValueError) as error:
        raise click.UsageError(str(error)) from error
    processes = 1 if accelerator is None else accelerator.num_processes
    first = accelerator is None or accelerator.is_main_process
    if resume is None:
        config = prepare.configured(context, processes)
        folder = context.params["outdir"]
        if accelerator is not None and folder is None:
            raise bad("--outdir", "several processes have to be told the same folder.")
        if first:
            folder = prepare.new_folder(folder, config)
            click.echo(prepare.notice(config))
            run.create(folder, config)
    else:
        folder = resume
        if first:
            prepare.continue_with(context, folder)
    if accelerator is not None:
        accelerator.wait_for_everyone()
    train_to_the_end(folder, quiet=not first)
    if first:
        run.draw_pictures(folder)
        click.echo(f"{folder} holds")
        for name, what in run.CONTENTS.items():
            if (folder / name).exists():
                click.echo(f"  {name:24}{what}")
        if run.draws(checkpoint.read(folder / run.CHECKPOINT).config):
            click.echo(f"More samples: stf-sample {folder}")
        else:
            click.echo(f"Samples of a class: stf-sample RUN --classifier {folder} --guidance 1")


def train_to_the_end(folder: Path, quiet: bool = False) -> None:
    """Trains, and says how far it is."""
    kept = checkpoint.read(folder / run.CHECKPOINT)
    steps = kept.config.steps
    loss: float | None = None
    progress = Progress(steps, "step", done=kept.step, brief=False, quiet=quiet)
    try:
        with progress:
            for step in run.advance(folder):
                if math.isfinite(step.loss):
                    loss = step.loss if loss is None else 0.98 * loss + 0.02 * step.loss
                skipped = f", {step.skipped} skipped" if step.skipped else ""
                progress.update(note=f"loss {loss or math.nan:.3f}{skipped}")
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
