"""References with the facts about them that a run has to know, and the draw from them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from stf_kernels import References

ELEMENTS = 1 << 24  # decoded at a time
CHECKED = 4096  # samples that a checksum is of


@dataclass(frozen=True)
class DataSet:
    """References and what a training run or an evaluation has to know of them."""

    name: str
    split: str
    references: References
    value_range: tuple[float, float] | None  # of the lowest and highest byte; None for floats
    levels: int | None  # equidistant values between them; None for floats

    def __len__(self) -> int:
        return len(self.references)

    def __str__(self) -> str:
        kind = "floats" if self.levels is None else f"{self.levels} levels in {self.value_range}"
        classes = f", {self.classes} classes" if self.classes else ""
        return f"{self.name}, {self.split}: {len(self)} x {list(self.shape)}, {kind}{classes}"

    @property
    def shape(self) -> torch.Size:
        """Of one sample."""
        return self.references.shape

    @property
    def classes(self) -> int:
        """How many; 0 if the samples have none."""
        labels = self.references.labels
        return 0 if labels is None else int(labels.max()) + 1

    @cached_property
    def sigma_data(self) -> float:
        """sqrt(mean y^2), see `sigma_data`; one pass over the data."""
        return sigma_data(self.references)

    def to(self, device: torch.device | str) -> DataSet:
        """The same for targets on `device`, see `References.to`."""
        return replace(self, references=self.references.to(device))

    def rounded(self, samples: Tensor) -> Tensor:
        """What a file of these samples would hold: clipped, rounded to the levels, in [-1, 1].

        Args:
            samples: [m, *shape], data units.

        Returns:
            float32 [m, *shape]; floats, which have no levels, as they are.
        """
        if self.levels is None or self.value_range is None:
            return samples.float()
        (lo, hi), top = self.value_range, self.levels - 1
        level = ((samples.double() - lo) * (top / (hi - lo))).round().clamp(0, top)
        return (level * (2 / top) - 1).float()


@dataclass(frozen=True)
class Facts:
    """What a run keeps of its data: enough to sample without them, and to know them again."""

    name: str
    count: int
    shape: tuple[int, ...]
    classes: int
    checksum: str  # of the classes, and of the values of CHECKED samples spread evenly, or of all

    @classmethod
    def of(cls, data: DataSet) -> Facts:
        """The facts about a data set."""
        digest = hashlib.sha256()
        labels = data.references.labels
        if labels is not None:
            digest.update(labels.cpu().numpy().astype("<i8").tobytes())
        count = min(len(data), CHECKED)
        index = torch.arange(count) * len(data) // count
        for part in index.split(max(1, ELEMENTS // data.shape.numel())):
            values = data.references.decode(part.to(data.references.device))
            digest.update(values.cpu().numpy().astype("<f4").tobytes())
        checksum = digest.hexdigest()[:16]
        return cls(data.name, len(data), tuple(data.shape), data.classes, checksum)

    def same(self, other: Facts) -> bool:
        """Whether these are the same data, whatever they are called."""
        return replace(self, name=other.name) == other

    def __str__(self) -> str:
        sides = "x".join(map(str, self.shape))
        classes = f", {self.classes} classes" if self.classes else ", no classes"
        return f"{self.name}, {self.count} samples of {sides}{classes}"


def sigma_data(data: References) -> float:
    """sqrt(mean y^2) over all values of the data set.

    The preconditioning assumes centred data, whose deviation this is. For data about another mean,
    like ink on an empty page, the same formulas need the deviation about zero: with it the
    network's input and its target have mean square 1 at every noise level.
    """
    rows = max(1, ELEMENTS // data.shape.numel())
    parts = torch.arange(len(data)).split(rows)
    total = torch.stack([data.decode(part).double().square().sum() for part in parts]).sum()
    return (total / (len(data) * data.shape.numel())).sqrt().item()


def draw(total: int, generator: torch.Generator) -> Tensor:
    """A uniformly random order of the data set, one per training step.

    Its first B entries are the sources of the minibatch, its first n >= B entries the references.
    So every source is a reference, all references are distinct, and given the *set* of references
    each source is uniform in it. The softmax weight of reference k is then the posterior
    P(source of x_t = k | x_t, set), and by the tower rule the expectation of the stable target is
    that of the denoising target, E[y | x_t], at every n. Without the sources it would be biased.

    Args:
        total: size of the data set.
        generator: the run's generator, on the CPU.

    Returns:
        A permutation of 0..total-1, [total] int64.
    """
    return torch.randperm(total, generator=generator)
