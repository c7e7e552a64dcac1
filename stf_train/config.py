"""The options of a run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields

# EDM's -1.2 and 1.2 are for images of sigma_data .5. The digits' is .85, so the noise levels at
# which they take shape are higher: the Frechet distance of 2000 samples to the data, on pixels
# after 1250 steps at learning rate .002, is .085 with these and .103 with those (one seed).
P_MEAN, P_STD = -0.4, 1.0
RAMPUP = 0.005


@dataclass(frozen=True)
class Config:
    """Everything that decides the bits of a run, by the names and in the units of the options."""

    target: str  # "stf" or "dsm"
    references: int  # n; dsm makes no use of it
    batch: int  # B
    duration: float  # million images
    lr: float
    rampup: float  # of lr, million images
    ema: float  # half-life, million images
    P_mean: float
    P_std: float
    sigma_data: float  # measured
    cbase: int  # channels of the network
    seed: int
    tick: float  # between checkpoints, thousand images
    device: str  # "cpu" or "cuda"
    threads: int  # of the CPU: they decide the order of float sums

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return math.ceil(round(self.duration * 1e6) / self.batch)

    @property
    def tick_steps(self) -> int:
        """Steps between checkpoints."""
        return max(1, round(self.tick * 1e3 / self.batch))

    def as_dict(self) -> dict[str, object]:
        """A dictionary for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, object]) -> Config:
        """The config of such a dictionary.

        Raises:
            ValueError: names are missing or unknown.
        """
        expected = {field.name for field in fields(cls)}
        if values.keys() != expected:
            wrong = ", ".join(sorted(values.keys() ^ expected))
            raise ValueError(f"config must hold the options of this version, differs in {wrong}")
        return cls(**values)  # type: ignore[arg-type]
