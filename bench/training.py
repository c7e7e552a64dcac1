"""A training step with the denoising and with the stable target, taken in turn."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from bench.clock import elapsed
from bench.memory import extra_bytes
from bench.problems import P_MEAN, photographs
from bench.rows import Row
from stf_kernels import References
from stf_train import cli, config, data
from stf_train.compute import Compute
from stf_train.ema import EMA
from stf_train.loop import State, Step, train
from stf_train.loss import DenoisingLoss
from stf_train.networks import SETTINGS, NCSNpp, UNet
from stf_train.process import EDM
from stf_train.targets import DenoisingTarget, StableTarget, Target

PAPER_NS = (1024, 4096, 50_000)  # two of the paper, and all of CIFAR-10
WARM_UP = 3  # steps of each run


@dataclass(frozen=True)
class System:
    """A network on a data set, and how it is trained."""

    name: str
    bank: References
    references: tuple[int, ...]  # n of the stable targets
    process: EDM
    network: Callable[[], nn.Module]
    batch: int
    batch_gpu: int | None = None

    def runs(self) -> dict[int | None, Iterator[Step]]:
        """The steps, without end, of a run for each n, and of one with the denoising target."""
        targets: dict[int | None, Target] = {None: DenoisingTarget(self.bank)}
        targets |= {n: StableTarget(self.bank, n) for n in self.references}
        return {n: self._run(target) for n, target in targets.items()}

    def _run(self, target: Target) -> Iterator[Step]:
        network = self.network().to(self.bank.device)
        ema = EMA(network, halflife=1e4)
        state = State(network, ema, torch.optim.Adam(network.parameters()), torch.Generator())
        loss = DenoisingLoss(self.process, self.bank, target)
        compute = Compute(batch_gpu=self.batch_gpu)
        return train(
            state, loss, steps=1 << 40, batch=self.batch, lr=1e-3, rampup=5e3, compute=compute
        )

    def measured(self, seconds: float, rounds: tuple[int, int]) -> list[Row]:
        """The rows of steps taken in turn for about so long, within so many rounds."""
        runs = self.runs()
        device = self.bank.device
        peaks = {n: extra_bytes(partial(next, run), device) for n, run in runs.items()}
        for _ in range(WARM_UP):
            turn = sum(step_ms(run) for run in runs.values()) / 1e3
        turns = min(max(round(seconds / turn), rounds[0]), rounds[1])
        times = [{n: step_ms(run) for n, run in runs.items()} for _ in range(turns)]
        return self.rows({n: [turn[n] for turn in times] for n in runs}, peaks)

    def rows(
        self,
        times: dict[int | None, list[float]],
        peaks: dict[int | None, int | None] | None = None,
    ) -> list[Row]:
        """The rows of steps taken in turn, so that drift meets all alike.

        overhead = median_i(stf_i - dsm_i) / median(dsm)

        Its standard error is by order statistics: the median of m lies between those at m / 2 +-
        sqrt(m) / 2 in two cases of three, whatever the distribution.

        Args:
            times: milliseconds of the i-th step for each n, None being the denoising target
            peaks: extra memory of a step, bytes
        """
        dsm = times[None]
        step = statistics.median(dsm)
        found = []
        for n, ms in times.items():
            added = sorted(b - a for a, b in zip(dsm, ms, strict=True))
            middle, reach = len(added) / 2, math.sqrt(len(added)) / 2
            low, high = added[math.floor(middle - reach)], added[math.ceil(middle + reach) - 1]
            found.append(
                Row(
                    what="step",
                    by=f"{self.name} {'DSM' if n is None else 'STF'}",
                    B=self.batch,
                    n=n or self.references[0],
                    d=self.bank.shape.numel(),
                    ms=statistics.median(ms),
                    rounds=len(ms),
                    extra_bytes=peaks[n] if peaks else None,
                    overhead=None if n is None else statistics.median(added) / step,
                    overhead_error=None if n is None else (high - low) / 2 / step,
                )
            )
        return found


def digits(device: str) -> System:
    """The default run of stf-train."""
    default: dict[str | None, Any] = {option.name: option.default for option in cli.train.params}
    bank = data.digits(device)
    return System(
        "digits",
        bank,
        (int(default["references"]),),
        EDM(data.sigma_data(bank), config.P_MEAN, config.P_STD),
        lambda: UNet(default["cbase"], bank.shape[0]),
        default["batch"],
    )


def patches(device: str) -> System:
    """A wider such network on 3x32x32 photograph patches, for a GPU."""
    return _on_patches(
        "patches", device, (4096,), lambda: UNet(channels=128, image_channels=3), batch=256
    )


def small(device: str) -> System:
    """A small network on as many images as CIFAR-10 has, of their shape: for a CPU."""
    return _on_patches(
        "small", device, PAPER_NS, lambda: UNet(channels=16, image_channels=3), batch=128
    )


def ncsnpp(device: str) -> System:
    """EDM's NCSN++ of 56.4 million parameters on such images, at the settings of Xu et al. 2023:
    512 samples, in parts of 256 as on each of their two GPUs.
    """
    return _on_patches(
        "NCSN++",
        device,
        PAPER_NS,
        lambda: NCSNpp(SETTINGS["ncsnpp-edm"]),
        batch=512,
        batch_gpu=256,
    )


SYSTEMS = {"cpu": (small,), "cuda": (digits, patches, ncsnpp)}


def _on_patches(
    name: str,
    device: str,
    references: tuple[int, ...],
    network: Callable[[], nn.Module],
    batch: int,
    batch_gpu: int | None = None,
) -> System:
    """EDM on as many patches as there are references at most."""
    bank = photographs(1, max(references), device=device).refs
    process = EDM(data.sigma_data(bank), P_MEAN)
    return System(name, bank, references, process, network, batch, batch_gpu)


def step_ms(run: Iterator[Step]) -> float:
    """One step, the device's work included."""
    return elapsed(partial(next, run))
