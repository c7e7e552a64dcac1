"""A training step with the denoising and with the stable target, taken in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bench.problems import P_MEAN, photographs
from bench.rows import Row
from stf_kernels import References
from stf_train import cli, config, data
from stf_train.ema import EMA
from stf_train.loop import State, Step, train
from stf_train.loss import DenoisingLoss
from stf_train.networks import UNet
from stf_train.process import EDM
from stf_train.targets import DenoisingTarget, StableTarget, Target


@dataclass(frozen=True)
class System:
    """A network on a data set, and how it is trained."""

    name: str
    bank: References
    references: int  # n
    process: EDM
    channels: int
    batch: int

    def runs(self) -> dict[str, Iterator[Step]]:
        """The steps of a run with either target, without end."""
        targets: dict[str, Target] = {
            "DSM": DenoisingTarget(self.bank),
            "STF": StableTarget(self.bank, self.references),
        }
        return {name: self._run(target) for name, target in targets.items()}

    def _run(self, target: Target) -> Iterator[Step]:
        network = UNet(self.channels, self.bank.shape[0]).to(self.bank.device)
        ema = EMA(network, halflife=1e4)
        state = State(network, ema, torch.optim.Adam(network.parameters()), torch.Generator())
        loss = DenoisingLoss(self.process, self.bank, target)
        return train(state, loss, steps=1 << 40, batch=self.batch, lr=1e-3, rampup=5e3)

    def rows(self, dsm: list[float], stf: list[float]) -> list[Row]:
        """The rows of steps taken in turn, so that drift meets both alike.

        overhead = median_i(stf_i - dsm_i) / median(dsm)

        Args:
            dsm, stf: milliseconds of the i-th step with either target
        """
        added = statistics.median(b - a for a, b in zip(dsm, stf, strict=True))
        overhead = {"DSM": None, "STF": added / statistics.median(dsm)}
        return [
            Row(
                what="step",
                by=f"{self.name} {target}",
                B=self.batch,
                n=self.references,
                d=self.bank.shape.numel(),
                ms=statistics.median(times),
                rounds=len(times),
                overhead=overhead[target],
            )
            for target, times in (("DSM", dsm), ("STF", stf))
        ]


def digits(device: str) -> System:
    """The default run of stf-train."""
    default: dict[str | None, Any] = {option.name: option.default for option in cli.train.params}
    bank = data.digits(device)
    return System(
        "digits",
        bank,
        int(default["references"]),
        EDM(data.sigma_data(bank), config.P_MEAN, config.P_STD),
        default["cbase"],
        default["batch"],
    )


def patches(device: str) -> System:
    """A wider such network on 3x32x32 photograph patches, for a GPU."""
    bank = photographs(1, 4096, device=device).refs
    process = EDM(data.sigma_data(bank), P_MEAN)
    return System("patches", bank, len(bank), process, channels=128, batch=256)


def step_ms(run: Iterator[Step]) -> float:
    """One step, the device's work included."""
    start = time.perf_counter()
    next(run)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)
