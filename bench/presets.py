"""Every preset trained for real, small enough for a CPU: `python -m bench.presets [NAME ...]`.

Runs the command of each preset (all, if none is named) in runs/small/NAME, adds a row to
docs/presets.jsonl, and draws docs/presets.png of all that have one, once their pictures are there.
A preset with a row and a picture is not run again.
"""

from __future__ import annotations

import json
import shlex
import sys
import time

from matplotlib.figure import Figure
from matplotlib.image import imread

from bench.provenance import ROOT
from stf_train import build, checkpoint, cli, run
from stf_train.presets import PRESETS

RUNS = ROOT / "runs" / "small"
ROWS = ROOT / "docs" / "presets.jsonl"
SHEET = ROOT / "docs" / "presets.png"
SHOWN = 4  # samples in a row and in a column, of the 10 in a run's picture

# Sizes and rates for minutes on one core, in place of days on eight GPUs.
SHORT = "--batch 64 --duration 0.035"
RATES = "--lr 3e-3 --rampup 0.003 --ema 0.01 --tick 10"
SMALL = f"--cbase 16 --blocks 1 --dropout 0 --references 1024 {SHORT} {RATES}"
ON_DIGITS = f"--data digits --xflip 0 --attention 4 {SMALL}"
ON_PATCHES = f"--data patches --size 16 --attention 8 {SMALL}"
# VE's network normalises its input: where constants of its own are small beside it, it cannot tell
# how large a sample is. 5 is about the largest distance of two digits in [0, 1].
OTHER_UNITS = "--range 0 0.1 --noise_min 0.001 --noise_max 0.5"
FLAGS = {
    "digits-ve": f"{SHORT} {OTHER_UNITS}",
    "patches-edm": f"--cbase 16 {SHORT}",
    "images-edm": f"--data patches --cbase 16 {SHORT}",
    "cifar10-edm-ncsnpp": ON_DIGITS,
    "cifar10-edm-ddpmpp": ON_DIGITS,
    "cifar10-ve": f"{ON_DIGITS} {OTHER_UNITS}",
    "cifar10-vp": ON_DIGITS,
    "celeba64-ve": f"{ON_PATCHES} --range 0 0.1 --noise_min 0.001 --noise_max 2.7",
}
# The probability flow of a network that cannot tell how much noise is left leaves some of it; the
# corrector's fresh noise forgets what went wrong before.
SAMPLING = dict.fromkeys(
    ("digits-ve", "cifar10-ve", "celeba64-ve"), "--sampler pc --steps 300 --snr 0.17"
)


def command(name: str) -> list[str]:
    """The words of the command that trains a preset, small."""
    return ["stf-train", "--preset", name, *FLAGS.get(name, SHORT).split()]


def measure(name: str) -> dict[str, object]:
    """Trains a preset and samples from it; returns its row."""
    folder = RUNS / name
    start = time.process_time()
    cli.train.main([*command(name)[1:], "--outdir", str(folder)], standalone_mode=False)
    sampling = SAMPLING.get(name, "").split()
    if sampling:  # in place of what the preset's own sampler has drawn
        output = ["--output", str(folder / run.SAMPLES), "--overwrite"]
        cli.sample.main([str(folder), *sampling, *output], standalone_mode=False)
    minutes = (time.process_time() - start) / 60
    config = checkpoint.read(folder / run.CHECKPOINT).config
    return {
        "preset": name,
        "command": shlex.join(command(name)),
        "samples": shlex.join(["stf-sample", "RUN", *sampling]),
        "data": config.data,
        "steps": config.steps,
        "minutes of one core": round(minutes, 1),
        "parameters": sum(p.numel() for p in build.network(config).parameters()),
        "sampler": sampling[1] if sampling else config.sampling.sampler,
    }


def draw(rows: dict[str, dict]) -> None:
    """Draws samples of every preset under what its run was."""
    figure = Figure(figsize=(14, 9), layout="constrained")
    places = figure.subplots(3, 5).flatten()
    for axes in places:
        axes.set_axis_off()
    for axes, (name, row) in zip(places, rows.items(), strict=False):
        page = imread(RUNS / name / run.SAMPLES)
        height, width = (side * SHOWN // 10 for side in page.shape[:2])
        axes.imshow(page[:height, :width])
        size = f"{row['parameters'] / 1e6:.2f} M parameters"
        axes.set_title(
            f"{name}\n{row['steps']} steps, {row['minutes of one core']} min\n{size}, "
            f"{row['sampler']}",
            fontsize=9,
        )
    figure.savefig(SHEET, dpi=90)


def read() -> dict[str, dict]:
    """The rows there are, in the order of the presets."""
    lines = ROWS.read_text().splitlines() if ROWS.exists() else []
    found = {row["preset"]: row for row in map(json.loads, lines)}
    return {name: found[name] for name in PRESETS if name in found}


def has_picture(name: str) -> bool:
    return (RUNS / name / run.SAMPLES).exists()


def main(names: list[str]) -> None:
    for name in names or PRESETS:
        if name not in read() or not has_picture(name):
            row = measure(name)
            rows = {**read(), name: row}
            ROWS.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
    rows = read()
    if missing := [name for name in rows if not has_picture(name)]:
        print(f"No new {SHEET.name}: there is no picture of {', '.join(missing)} in {RUNS}")
    else:
        draw(rows)


if __name__ == "__main__":
    main(sys.argv[1:])
