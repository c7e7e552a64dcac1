"""The command stf-variance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import click

from stf_train import data
from stf_train.options import OVERWRITE, SEED_MAX, SETTINGS, F, Seeds, bad, writable
from stf_train.process import VE
from stf_train.progress import Progress
from stf_train.variance import Budget, Patches, Problem, TwoGaussians, closed_forms, measured
from stf_train.variance_plots import Numbers, Panel, save_study, save_variance
from stf_train.variance_study import Arm, Judge, Settings, study, table

GAUSSIANS = Budget(points=41, samples=8192, divergence_samples=2048)
PATCHES = Budget(points=26, samples=3072, divergence_samples=1024)
# Of the study: a tenth of the steps, and little to judge by.
QUICK_STUDY = Settings(steps=32, looks=(16, 32), cbase=16, judged=256, drawn=100, sampling=4)
QUICK = Budget(points=11, samples=512, divergence_samples=256)


def png(default: str) -> Callable[[F], F]:
    """The options for where a picture goes."""
    output = click.option(
        "--output",
        metavar="PNG",
        type=click.Path(dir_okay=False, path_type=Path),
        default=default,
        help="The picture; its numbers go beside it, with .json in place of .png.",
    )
    return lambda function: output(OVERWRITE(function))


SEED = click.option(
    "--seed", metavar="INT", type=click.IntRange(0, SEED_MAX), default=0, help="Of all draws."
)
FEW = click.option("--quick", is_flag=True, help="A few points with large errors, in seconds.")


@click.group(context_settings=SETTINGS)
@FEW
@click.pass_context
def variance(context: click.Context, quick: bool) -> None:
    """The variance of training targets: Figures 2 and 3 of the STF paper, and a training study."""
    # The commands have the option, too; draw, which measures nothing, takes no notice.
    context.default_map = {name: {"quick": quick} for name in variance.commands}


@variance.command("figure-2")
@png("figure-2.png")
@SEED
@FEW
def figure_2(output: Path, overwrite: bool, seed: int, quick: bool) -> None:
    """V_DSM, D(t) and V_STF on two Gaussians, beside their closed forms.

    They lie at +-.1 in 64 dimensions with deviation 1e-4; noise is VE, sigma .01 to 50; n is 1, 10,
    50 and 100. V_DSM and D(t) are those of a set of 1000 samples, V_STF has fresh references.
    """
    check(output, overwrite)
    problem, ns = TwoGaussians(seed=seed), (1, 10, 50, 100)
    budget = QUICK if quick else GAUSSIANS
    (panel,) = measure([problem], ns, budget, seed)
    panel = Panel(panel.title, panel.curves + tuple(closed_forms(problem, VE(), ns)))
    finish(output, seed, budget, [panel])


@variance.command("figure-3")
@png("figure-3.png")
@SEED
@FEW
def figure_3(output: Path, overwrite: bool, seed: int, quick: bool) -> None:
    """V_DSM, D(t) and V_STF on 1024 and on 4096 patches of photographs, 3x16x16 in [0, 1].

    Noise is VE, sigma .01 to 50; n is 1, 100 and 1000. The patches are all the distribution there
    is, so that the posterior over them is exact and only the noisy samples are drawn by chance.
    """
    check(output, overwrite)
    problems = [Patches(N, seed) for N in (1024, 4096)]
    budget = QUICK if quick else PATCHES
    finish(output, seed, budget, measure(problems, (1, 100, 1000), budget, seed))


@variance.command("draw")
@click.argument(
    "numbers", metavar="JSON", type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
def draw(numbers: Path) -> None:
    """Draw the picture of Figure 2 or 3 again from its numbers."""
    try:
        found = Numbers.load(numbers)
    except ValueError as error:
        raise bad("JSON", str(error)) from error
    save_variance(numbers.with_suffix(".png"), found.panels)
    click.echo(numbers.with_suffix(".png"))


@variance.command("study")
@click.option(
    "--rows",
    metavar="JSONL",
    type=click.Path(dir_okay=False, path_type=Path),
    default="study-digits.jsonl",
    help="The runs, a line each. Those it holds are not made again: stop and go on at will, or "
    "add seeds. The picture goes beside it, with .png in place of .jsonl.",
)
@click.option(
    "--seeds", metavar="LIST", type=Seeds(), default="0-4", help="One run of each target."
)
@click.option(
    "--references",
    metavar="N",
    type=click.IntRange(1, data.TOTAL),
    multiple=True,
    default=(128, 512, data.TOTAL),
    help="Of STF, at least 128, the minibatch; may be given several times. DSM is always there.",
)
@FEW
def study_command(rows: Path, seeds: list[int], references: Sequence[int], quick: bool) -> None:
    """Train small networks on the digits with DSM and with STF, over seeds, and compare them.

    By their excess risk, the distance of the denoiser to the exact one over all digits, and by the
    Frechet distance of the pixels of their samples. All runs of a seed share weights, minibatches
    and noise.
    """
    settings = QUICK_STUDY if quick else Settings()
    if rows.suffix != ".jsonl":
        raise bad("--rows", f"{rows} does not end in .jsonl.")
    writable("--rows", rows, overwrite=True)
    if min(references) < settings.batch:
        raise bad(
            "--references", f"{min(references)} is less than the minibatch of {settings.batch}."
        )
    seeds = sorted(set(seeds))
    if len(seeds) < 2:
        raise bad("--seeds", "two seeds at least are needed for a deviation over seeds.")
    arms = [Arm(None), *(Arm(n) for n in sorted(set(references)))]
    found = []
    with Progress(len(arms) * len(seeds) * settings.steps, "step") as progress:
        try:
            for row in study(rows, settings, arms, seeds, progress.update):
                if Arm(row.n) in arms and row.seed in seeds:
                    found.append(row)
                    progress.update(settings.steps * len(found) - progress.done)
        except ValueError as error:
            raise bad("--rows", str(error)) from error
    picture = rows.with_suffix(".png")
    floor = Judge(settings).floor()
    save_study(picture, found, floor)
    click.echo(table(found))
    click.echo(f"digits drawn anew: Frechet distance {floor:.3f}")
    click.echo(f"{rows} and {picture}")


def check(output: Path, overwrite: bool) -> None:
    """Refuses a picture that cannot be written, or is there."""
    if output.suffix != ".png":
        raise bad("--output", f"{output} does not end in .png.")
    for path in (output, output.with_suffix(".json")):
        writable("--output", path, overwrite)


def measure(
    problems: Sequence[Problem], ns: Sequence[int], budget: Budget, seed: int
) -> list[Panel]:
    """The panels of the problems."""
    panels = []
    with Progress(len(problems) * (2 + len(ns)) * budget.points, "point") as progress:
        for problem in problems:
            curves = measured(problem, VE(), ns, budget, seed, progress.update)
            panels.append(Panel(problem.name, tuple(curves)))
    return panels


def finish(output: Path, seed: int, budget: Budget, panels: Sequence[Panel]) -> None:
    """Writes numbers and picture."""
    settings = {"seed": seed, **asdict(budget), "process": repr(VE())}
    Numbers(settings, tuple(panels)).save(output.with_suffix(".json"))
    save_variance(output, panels)
    click.echo(f"{output} and {output.with_suffix('.json')}")
