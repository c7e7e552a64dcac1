"""Does the quieter target train a better network? DSM against STF over seeds, on the digits.

A run is one line of a file: its settings, and what its network was worth on the way. All runs of a
seed share initial weights, minibatches, noise and the noise they sample from, so that the target is
the whole difference between them and differences can be taken seed by seed.

Source: the shape of Figures 4 and 5 and Table 5 of Xu et al., ICLR 2023, at a size for a CPU.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from stf_kernels import References, stable_target
from stf_train import data
from stf_train.data import DataSet
from stf_train.ema import EMA
from stf_train.loop import State, train
from stf_train.loss import DenoisingLoss
from stf_train.networks import UNet
from stf_train.process import EDM
from stf_train.quality import Moments, frechet_distance, moments
from stf_train.sample import heun, seeded, sigma_steps
from stf_train.targets import DenoisingTarget, StableTarget

FIXED = 1 << 20  # seed of the noisy samples that all networks are judged by
CHUNK = 500  # samples at a time


@dataclass(frozen=True)
class Settings:
    """What all runs of a study share."""

    steps: int = 320
    batch: int = 128
    lr: float = 3e-3
    rampup: int = 5000  # of lr, images
    ema: int = 10_000  # half-life, images
    cbase: int = 32  # channels of the network
    P_mean: float = -0.4  # of ln sigma
    P_std: float = 1.0
    looks: tuple[int, ...] = (80, 160, 320)  # steps after which the network is judged
    judged: int = 4096  # noisy samples for the excess risk
    drawn: int = 500  # samples for the Frechet distance
    sampling: int = 10  # steps of Heun's method


@dataclass(frozen=True)
class Arm:
    """A target: DSM, or STF with n references."""

    n: int | None  # None for DSM

    def __str__(self) -> str:
        return "DSM" if self.n is None else f"STF, n = {self.n}"


@dataclass(frozen=True)
class Row:
    """One run."""

    settings: Settings
    n: int | None
    seed: int
    images: tuple[int, ...]  # seen at each look
    excess_risk: tuple[float, ...]
    frechet: tuple[float, ...]


class Judge:
    """What a denoiser is worth.

        excess risk = mean lambda(sigma) ||D(x; sigma) - E[y | x]||^2 per value

    over fixed noisy samples of the data, the posterior mean being exact: over all digits. It is
    what the training loss, of either target, exceeds its least possible value by. The Frechet
    distance is that of the pixels of samples from fixed noise, to all digits, in float64.
    """

    def __init__(self, settings: Settings) -> None:
        bank = data.digits()
        process = make_process(bank, settings)
        self._process, self._settings = process, settings
        self._data = DataSet("digits", "all", bank, (-1, 1), data.LEVELS)
        self._real = pixel_moments(self._data, bank.decode(torch.arange(len(bank))))
        g = torch.Generator().manual_seed(FIXED)
        y = bank.decode(torch.randint(len(bank), (settings.judged,), generator=g))
        self._sigma = process.times(settings.judged, g).reshape(-1, 1, 1, 1)
        self._x = y + self._sigma * process.noise.draw(y.shape, g)
        self._best = stable_target(self._x, bank, self._sigma, target="denoised")

    @torch.no_grad()
    def excess_risk(self, network: torch.nn.Module) -> float:
        """Of the denoiser around a network."""
        total = 0.0
        parts = (tensor.split(CHUNK) for tensor in (self._x, self._sigma, self._best))
        for x, sigma, best in zip(*parts, strict=True):
            error = self._process.denoise(network, x, sigma) - best
            total += (self._process.weight(sigma) * error**2).sum(dtype=torch.float64).item()
        return total / self._x.numel()

    def frechet(self, network: torch.nn.Module) -> float:
        """Of samples of the network."""

        def D(x: Tensor, sigma: Tensor) -> Tensor:
            return self._process.denoise(network, x.float(), sigma.float())

        samples = []
        for seeds in torch.arange(self._settings.drawn).split(CHUNK):
            noise = seeded((FIXED + seeds).tolist(), data.SHAPE)
            *_, state = heun(D, noise, sigma_steps(self._settings.sampling))
            samples.append(state.x)
        return frechet_distance(self._real, pixel_moments(self._data, torch.cat(samples)))

    def floor(self, sets: int = 20) -> float:
        """The Frechet distance of as many digits drawn with replacement, the mean over sets."""
        bank = self._data.references
        g = torch.Generator().manual_seed(FIXED)
        draws = torch.randint(len(bank), (sets, self._settings.drawn), generator=g)
        return statistics.fmean(
            frechet_distance(self._real, pixel_moments(self._data, bank.decode(draw)))
            for draw in draws
        )


def pixel_moments(digits: DataSet, samples: Tensor) -> Moments:
    """Moments of samples as a file would hold them."""
    return moments(digits.rounded(samples).flatten(1))


def make_process(bank: References, settings: Settings) -> EDM:
    """EDM, for the deviation of these data."""
    return EDM(data.sigma_data(bank), settings.P_mean, settings.P_std)


def run(
    settings: Settings, arm: Arm, seed: int, judge: Judge, tick: Callable[[], None] = lambda: None
) -> Row:
    """Trains one network and judges its moving average on the way.

    Args:
        settings, arm, seed: which run.
        judge: of the same settings.
        tick: called after each step.
    """
    bank = data.digits()
    target = DenoisingTarget(bank) if arm.n is None else StableTarget(bank, arm.n)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = UNet(settings.cbase)
    state = State(
        network,
        EMA(network, settings.ema),
        torch.optim.Adam(network.parameters()),
        torch.Generator().manual_seed(seed),
    )
    images, risks, distances = [], [], []
    for step in train(
        state,
        DenoisingLoss(make_process(bank, settings), bank, target),
        steps=settings.steps,
        batch=settings.batch,
        lr=settings.lr,
        rampup=settings.rampup,
    ):
        if step.step in settings.looks:
            images.append(step.images)
            risks.append(judge.excess_risk(state.ema.network))
            distances.append(judge.frechet(state.ema.network))
        tick()
    return Row(settings, arm.n, seed, tuple(images), tuple(risks), tuple(distances))


def read(path: Path) -> list[Row]:
    """The rows of a file, none if there is no file; a last line torn by a crash is left out.

    Raises:
        ValueError: another line is not a row.
    """
    if not path.exists():
        return []
    *lines, torn = path.read_text(encoding="utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(parse(line))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}, must be a run: {error!r}") from error
    if torn:
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return rows


def parse(line: str) -> Row:
    """The row of one line."""
    fields = json.loads(line)
    settings = fields.pop("settings")
    settings["looks"] = tuple(settings["looks"])
    fields = {name: tuple(f) if isinstance(f, list) else f for name, f in fields.items()}
    return Row(Settings(**settings), **fields)


def study(
    path: Path,
    settings: Settings,
    arms: Sequence[Arm],
    seeds: Sequence[int],
    tick: Callable[[], None] = lambda: None,
) -> Iterator[Row]:
    """Makes the runs that the file lacks and appends each to it, seed by seed.

    Yields:
        Every run of the study, those of the file first.

    Raises:
        ValueError: the file holds runs with other settings, or what is no run.
    """
    rows = read(path)
    for row in rows:
        if row.settings != settings:
            raise ValueError(f"{path} must hold runs with {settings}, got {row.settings}")
    yield from rows
    done = {(row.n, row.seed) for row in rows}
    missing = [(arm, seed) for seed in seeds for arm in arms if (arm.n, seed) not in done]
    if not missing:
        return
    judge = Judge(settings)
    for arm, seed in missing:
        row = run(settings, arm, seed, judge, tick)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(row)) + "\n")
        yield row


@dataclass(frozen=True)
class Summary:
    """One target at one look, over seeds."""

    arm: Arm
    seeds: int
    mean: float
    sd: float
    lowest: float
    highest: float
    gain: float  # of the same seeds with DSM over this, the mean of the differences
    gain_error: float  # its standard error


def summaries(rows: Sequence[Row], measure: str, look: int = -1) -> list[Summary]:
    """The targets of a study by one measure, "excess_risk" or "frechet", DSM first.

    Raises:
        ValueError: there are fewer than two seeds that all targets were run with.
    """
    values: dict[int | None, dict[int, float]] = {}
    for row in rows:
        values.setdefault(row.n, {})[row.seed] = getattr(row, measure)[look]
    seeds = sorted(set.intersection(*(set(one) for one in values.values())) if values else ())
    if len(seeds) < 2 or None not in values:
        raise ValueError(f"rows must be of DSM and two seeds at least, got seeds {seeds}")
    found = []
    for n in sorted(values, key=lambda n: n or 0):
        of_seeds = [values[n][seed] for seed in seeds]
        gains = [values[None][seed] - values[n][seed] for seed in seeds]
        found.append(
            Summary(
                Arm(n),
                len(seeds),
                statistics.fmean(of_seeds),
                statistics.stdev(of_seeds),
                min(of_seeds),
                max(of_seeds),
                statistics.fmean(gains),
                statistics.stdev(gains) / len(seeds) ** 0.5,
            )
        )
    return found


def table(rows: Sequence[Row]) -> str:
    """Markdown: both measures at the last look, mean and deviation over seeds, gain over DSM."""
    risk, distance = summaries(rows, "excess_risk"), summaries(rows, "frechet")
    lines = [
        "| target | excess risk | less than DSM by | Frechet distance | its range | less by |",
        "|---|---|---|---|---|---|",
    ]
    for a, b in zip(risk, distance, strict=True):
        lines.append(
            f"| {a.arm} | {a.mean:.4f} +- {a.sd:.4f} | {gain(a, 4)} "
            f"| {b.mean:.3f} +- {b.sd:.3f} | {b.lowest:.3f} to {b.highest:.3f} | {gain(b, 3)} |"
        )
    return "\n".join(lines)


def gain(summary: Summary, digits: int) -> str:
    """The gain over DSM with its standard error; nothing for DSM itself."""
    if summary.arm.n is None:
        return ""
    return f"{summary.gain:.{digits}f} ({summary.gain_error:.{digits}f})"
