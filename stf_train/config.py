"""The options of a run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields

from stf_train.data import Facts
from stf_train.sampling import Sampling

# Of the digits, higher and narrower than EDM's -1.2 and 1.2: they have a sigma_data of .85 where
# EDM has .5, and no fine detail that only shows at low noise.
P_MEAN, P_STD = -0.4, 1.0


@dataclass(frozen=True)
class Config:
    """Everything that decides the bits of a run, by the names and in the units of the options.

    None stands for what the process, the network or the loss of the run does not have.
    """

    preset: str  # what the others were taken from
    # Data
    data: str  # a name or a path, see `stf_train.data.load`
    size: int | None  # of the images, None as they are
    range: tuple[float, float]  # values of the lowest and the highest byte
    xflip: bool
    cache: bool  # whether the samples are read into memory, or stay in their file
    cond: bool
    label_dropout: float | None
    # Target
    target: str  # "stf", "dsm" or "class"
    references: int | str  # n or "all", which stf alone makes use of
    # Process
    process: str
    output: str | None
    sigma_data: float | None
    P_mean: float | None
    P_std: float | None
    D: float | None
    noise_min: float | None
    noise_max: float | None
    beta_min: float | None
    beta_max: float | None
    # Loss
    strength: float | None
    points: int | None
    # Network
    arch: str
    cbase: int  # channels
    cres: tuple[int, ...] | None
    blocks: int | None
    attention: tuple[int, ...] | None
    dropout: float | None
    # Optimiser
    batch: int  # B, samples per step
    duration: float  # million images
    lr: float
    rampup: float  # of lr, million images
    clip: float | None  # of the gradient's norm
    ema: float  # half-life, million images
    ema_rampup: float  # half-life as a fraction of the images seen
    # Computation
    batch_gpu: int | None  # samples at a time on each device
    fp16: bool
    bf16: bool
    ls: float  # loss scale
    compile: bool
    device: str  # "cpu" or "cuda"
    threads: int  # of the CPU: they decide the order of float sums
    processes: int
    seed: int
    # Reports
    tick: float  # between checkpoints, thousand images
    snap: int | None  # ticks between pictures
    tensorboard: bool
    sampling: Sampling
    facts: Facts | None = None  # about the data, without mirror images; None if not looked at yet

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
        """The config of such a dictionary, also after it went through JSON.

        Raises:
            ValueError: names are missing or unknown.
        """
        expected = {field.name for field in fields(cls)}
        if values.keys() != expected:
            wrong = ", ".join(sorted(values.keys() ^ expected))
            raise ValueError(f"config must hold the options of this version, differs in {wrong}")
        plain = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        sampling, facts = plain.pop("sampling"), plain.pop("facts")
        assert isinstance(sampling, dict)
        if isinstance(facts, dict):
            facts = Facts(**facts | {"shape": tuple(facts["shape"])})
        return cls(**plain, sampling=Sampling(**sampling), facts=facts)  # type: ignore[arg-type]
