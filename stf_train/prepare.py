"""What stf-train does before it writes: from the options to a checked config and a folder."""

from __future__ import annotations

import itertools
import os
import re
from dataclasses import replace
from pathlib import Path

import click
import torch

from stf_train import board, build, checkpoint, data, presets, run
from stf_train.config import Config
from stf_train.options import bad, blaming, given, resolve

# Whose arguments have names of their own.
ARGUMENTS = {
    "channels": "--cbase",
    "multipliers": "--cres",
    "sigma_min": "--noise_min",
    "sigma_max": "--noise_max",
    "value_range": "--range",
    "resident": "--cache",
    **{name: f"--{name}" for name in (*presets.SIZES, "size", "data", "batch", "processes")},
    **{name: f"--{name}" for wanted in presets.PROCESS.values() for name in wanted},
}
BYTES = 16  # of a parameter: weight, average and two moments


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
    options["data"] = place(str(options["data"]))
    if options["references"] != "all":
        options["references"] = int(str(options["references"]))
    config = Config(
        **options,  # type: ignore[arg-type]
        preset=params["preset"],
        device=resolve(params["device"]),
        threads=params["threads"] or torch.get_num_threads(),
        processes=processes,
    )
    return check(context, config)


def place(spec: str) -> str:
    """Where data are, wherever a later command is called from."""
    name = spec.lower()
    return name if name in data.SHIPPED else os.path.abspath(spec)


def check(context: click.Context, config: Config) -> Config:
    """The config with what it has of its data, if it is one that can be run."""
    low, high = config.range
    if not low < high:
        raise bad("--range", f"LOW must be below HIGH, got {low:g} {high:g}.")
    if config.fp16 and config.bf16:
        raise bad("--bf16", "--fp16 is asked for as well.")
    if config.steps < 1:
        raise bad("--duration", f"there is less than one image in it, got {config.duration:g}.")
    with blaming("--data", **ARGUMENTS):
        found = build.dataset(config)
        config = replace(config, facts=build.facts(config))
    if found.levels is None and given(context, "range"):
        raise bad("--range", f"is for bytes, {config.data} holds floats.")
    for option, asked in {"--cond": config.cond, "--target": config.target == "class"}.items():
        if asked and not found.classes:
            raise bad(option, f"{config.data} has no classes.")
    if config.process in ("edm", "pfgmpp") and config.sigma_data is None:
        config = replace(config, sigma_data=found.sigma_data)
    with blaming("--process", **ARGUMENTS):
        build.process(config)
    # The sides of an image are too few for the network, or its levels too many.
    images = "--cres" if given(context, "cres") else "--data"
    with blaming("--arch", **ARGUMENTS, images=images), torch.device("meta"):
        network = build.network(config)
    if sum(p.numel() for p in network.parameters()) * BYTES > data.physical_memory():
        raise bad("--cbase", f"the network would not fit the memory, got {config.cbase}.")
    with blaming("--batch-gpu", **ARGUMENTS):
        run.compute(config).parts(config.batch)
    if config.tensorboard:
        with blaming("--tensorboard"):
            board.check()
    if config.batch > len(found):
        raise bad("--batch", f"{config.batch} is more than the {len(found)} samples there are.")
    return replace(config, references=references(context, config, len(found)))


def references(context: click.Context, config: Config, count: int) -> int | str:
    """How many of the `count` samples are references of a step."""
    n = config.references
    if config.target != "stf" or n == "all":
        return n
    if int(n) > count:
        if given(context, "references"):
            raise bad("--references", f"{n} is more than the {count} samples there are.")
        return "all"
    if int(n) < config.batch:
        raise bad(
            "--references",
            f"{n} is less than --batch {config.batch}: every sample of the minibatch has to be "
            "among the references, or the target is biased.",
        )
    return n


def notice(config: Config) -> str:
    """What is going to be trained on what."""
    found = build.facts(config)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build.network(config).parameters())
    n = "" if config.target != "stf" else f" with {config.references} references"
    unused = ", not used" if found.classes and not config.cond and config.target != "class" else ""
    mirrored = ", and their mirror images" if config.xflip else ""
    return "\n".join(
        [
            f"data      {found}{unused}{mirrored}",
            f"preset    {config.preset}",
            f"network   {config.arch}, {parameters / 1e6:.2f} million parameters",
            f"training  {config.process}, target {config.target}{n}, {config.steps} steps of "
            f"{config.batch}",
        ]
    )


def continue_with(context: click.Context, folder: Path) -> None:
    """Refuses options that differ from those of the run; makes it longer if asked to."""
    kept = read(folder, "--resume")
    config = kept.config
    resolve(config.device)
    options = config.as_dict()
    for name, value in context.params.items():
        if name in ("resume", "duration", "data") or not given(context, name):
            continue
        if name == "outdir":
            raise bad("--outdir", "a resumed run stays in its folder.")
        if value not in (options[name], "auto"):
            raise bad(f"--{name}", f"{folder} was started with {options[name]}, got {value}.")
    config = found_again(context, config)
    if given(context, "duration"):
        config = replace(config, duration=context.params["duration"])
        if config.steps < kept.step:
            done = kept.step * config.batch / 1e6
            raise bad(
                "--duration", f"{folder} has seen {done} million images, got {config.duration}."
            )
    if config != kept.config:
        run.change(folder, duration=config.duration, data=config.data)
    if config.steps == kept.step:
        click.echo(
            f"{folder} is finished, with {kept.step} steps or {config.duration:g} million images. "
            f"To go on: stf-train --resume {folder} --duration MIMG, with more of them"
        )


def found_again(context: click.Context, config: Config) -> Config:
    """The config of a run with its data where --data says they are now."""
    if given(context, "data"):
        config = replace(config, data=place(context.params["data"]))
    elif config.data not in data.SHIPPED and not Path(config.data).exists():
        raise bad(
            "--data",
            f"there is no {config.data} any more, which the run was started with; where its data "
            "have moved to is to be given.",
        )
    with blaming("--data", resident="--cache"):
        build.dataset(config)
    return config


def new_folder(outdir: Path | None, config: Config) -> Path:
    """The folder of a new run: the one asked for, or the next free number."""
    if outdir is not None:
        if outdir.is_dir() and any(outdir.iterdir()):
            raise bad(
                "--outdir",
                f"{outdir} is not empty. To continue a run: stf-train --resume {outdir}",
            )
        folder = outdir
    else:
        runs = Path("runs")
        number = next(i for i in itertools.count() if not any(runs.glob(f"{i:05d}-*")))
        folder = runs / f"{number:05d}-{name(config)}"
    with blaming("--outdir"):
        folder.mkdir(parents=True, exist_ok=outdir is not None)
    return folder


def name(config: Config) -> str:
    """Of a run: data, process and target."""
    known = build.facts(config).name.lower()
    words = [re.sub(r"[^a-z0-9]+", "-", known).strip("-") or "data", config.process]
    return "-".join([*words, *["cond"] * config.cond, config.target])


def read(folder: Path, hint: str) -> checkpoint.Checkpoint:
    """The checkpoint of a run folder."""
    with blaming(hint):
        return checkpoint.read(folder / run.CHECKPOINT)
