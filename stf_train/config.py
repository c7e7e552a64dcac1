"""The options of a run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields

# Higher and narrower than EDM's -1.2 and 1.2: the digits have a sigma_data of .85 where EDM has .5,
# and no fine detail that only shows at low noise.
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
