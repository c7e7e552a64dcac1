"""Evaluation: several sets of samples against a data set, and a report that says what was done."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

from torch import Tensor

from stf_train.data import DataSet
from stf_train.features import Extractor, Features, join, of_data
from stf_train.progress import Progress
from stf_train.quality import frechet_distance, inception_score, moments, precision_recall


class Drawn(Protocol):
    """What a sampler ends with, such as the last state of those in `stf_train.sample`."""

    @property
    def x(self) -> Tensor:
        """Samples, [m, *shape], data units."""

    @property
    def evaluations(self) -> int:
        """Of all networks there are, for each sample."""


# One sample for each seed, which alone decides it.
Sampler = Callable[[Sequence[int]], Drawn]


@dataclass(frozen=True)
class Report:
    """Measures of several sets of samples, and all that a number needs to mean something."""

    data: str
    split: str
    size: int  # samples of the data that were compared with
    extractor: str
    width: int  # features
    levels: int | None  # samples are clipped and rounded to so many values; None for floats
    n: int  # samples in each set
    seeds: tuple[str, ...]  # of each set
    evaluations: float  # of all networks for a sample (NFE), the mean
    measures: dict[str, tuple[float, ...]]  # of each set

    def mean(self, measure: str) -> float:
        """Over the sets."""
        return statistics.fmean(self.measures[measure])

    def sd(self, measure: str) -> float:
        """Over the sets, by one less than their number; nan for one set."""
        values = self.measures[measure]
        return statistics.stdev(values) if len(values) > 1 else float("nan")

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        kept = "as they are" if self.levels is None else f"rounded to {self.levels} levels"
        sets = f"{len(self.seeds)} set{'s' * (len(self.seeds) > 1)} of {self.n}"
        lines = [
            f"data       {self.data}, split {self.split}, {self.size} samples",
            f"extractor  {self.extractor}: {self.width} features",
            f"samples    {sets}, seeds {' / '.join(self.seeds)}, {kept}",
            f"NFE        {self.evaluations:g}",
            "",
            f"{'':24}{'mean':>12}{'sd':>12}{'min':>12}{'max':>12}",
        ]
        for name, values in self.measures.items():
            spread = self.sd(name) if len(values) > 1 else None
            numbers = (self.mean(name), spread, min(values), max(values))
            cells = ("-" if number is None else f"{number:.5g}" for number in numbers)
            lines.append(f"{name:24}" + "".join(f"{cell:>12}" for cell in cells))
        return "\n".join(lines)


def seed_sets(n: int, sets: int = 3, first: int = 0) -> list[range]:
    """Consecutive seeds for `sets` sets of n samples."""
    return [range(first + i * n, first + (i + 1) * n) for i in range(sets)]


def evaluate(
    sampler: Sampler,
    data: DataSet,
    extractor: Extractor,
    seeds: Sequence[Sequence[int]],
    *,
    batch: int = 500,
    neighbours: int = 3,
    splits: int = 10,
) -> Report:
    """Draws sets of samples and compares each with the data.

    Samples are clipped and rounded first as an image file would (`DataSet.rounded`). There is an
    inception score if the extractor knows classes.

    Args:
        sampler: takes at most `batch` seeds at a time.
        data: what the samples should be like.
        extractor: by what they are compared.
        seeds: of each set; all sets of one size, no seed twice.
        batch: samples at a time.
        neighbours: k of precision and recall.
        splits: of the inception score.

    Returns:
        The report.

    Raises:
        ValueError: the sets of seeds are no such, the samples are not like the data, or one is not
            finite: its seed is named.
    """
    check_seeds(seeds)
    real = of_data(extractor, data)
    real_moments = moments(real.features)
    measures: dict[str, list[float]] = {}
    evaluations = 0.0
    with Progress(sum(map(len, seeds)), "sample") as progress:
        for one in seeds:
            parts = []
            for start in range(0, len(one), batch):
                part = one[start : start + batch]
                drawn = sampler(part)
                parts.append(features(drawn.x, part, data, extractor))
                evaluations += len(part) * drawn.evaluations
                progress.update(len(part))
            fake = join(parts)
            precision, recall = precision_recall(real.features, fake.features, neighbours)
            found = {"Frechet distance": frechet_distance(real_moments, moments(fake.features))}
            if fake.logits is not None:
                found[f"inception score /{splits}"] = inception_score(fake.logits, splits)
            found |= {f"precision k={neighbours}": precision, f"recall k={neighbours}": recall}
            for name, value in found.items():
                measures.setdefault(name, []).append(value)
    return Report(
        data.name,
        data.split,
        len(data),
        extractor.name,
        real.features.shape[1],
        data.levels,
        len(seeds[0]),
        tuple(map(describe, seeds)),
        evaluations / sum(map(len, seeds)),
        {name: tuple(values) for name, values in measures.items()},
    )


def features(
    samples: Tensor, seeds: Sequence[int], data: DataSet, extractor: Extractor
) -> Features:
    """The features of one batch of samples."""
    if samples.shape != (len(seeds), *data.shape):
        raise ValueError(
            f"sampler must return [{len(seeds)}, {', '.join(map(str, data.shape))}] like the data, "
            f"got {list(samples.shape)}"
        )
    finite = samples.flatten(1).isfinite().all(1)
    if not bool(finite.all()):
        seed = seeds[int((~finite).nonzero()[0])]
        raise ValueError(f"sampler must return finite samples, that of seed {seed} is not")
    return extractor(data.rounded(samples.to(data.references.device)))


def check_seeds(seeds: Sequence[Sequence[int]]) -> None:
    """Refuses sets whose spread would say nothing of the sampler."""
    if not seeds or len({len(one) for one in seeds}) > 1:
        sizes = [len(one) for one in seeds]
        raise ValueError(f"seeds must be sets of one size, at least one, got sizes {sizes}")
    if len({seed for one in seeds for seed in one}) < sum(map(len, seeds)):
        raise ValueError("seeds must not occur twice: the spread over sets would be too small")


def describe(seeds: Sequence[int]) -> str:
    """A set of seeds for people: 0-99, or the first, the last and how many of them."""
    first, last = seeds[0], seeds[-1]
    if list(seeds) == list(range(first, last + 1)):
        return f"{first}-{last}"
    return f"{first},..,{last} ({len(seeds)})"
