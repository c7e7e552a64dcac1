"""How the work of a step is divided, and in which precision the network computes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from stf_train.process import Network

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Compute:
    """One process or several, each of which takes its share of a minibatch, part by part.

    All processes draw the same minibatch from generators in the same state; every part has the
    references of the whole.

    Args:
        accelerator: of several processes; None for a single one.
        batch_gpu: samples of a part; None for all a process has.
        autocast: the type in which the network multiplies; None for float32.
        ls: what the loss is multiplied by, and the gradient divided by, against underflow.
        compile: whether the network goes through torch.compile.
    """

    accelerator: Accelerator | None = None
    batch_gpu: int | None = None
    autocast: torch.dtype | None = None
    ls: float = 1.0
    compile: bool = False

    @property
    def rank(self) -> int:
        """Which process this is."""
        return 0 if self.accelerator is None else self.accelerator.process_index

    @property
    def processes(self) -> int:
        """How many there are."""
        return 1 if self.accelerator is None else self.accelerator.num_processes

    def parts(self, batch: int) -> list[tuple[int, int]]:
        """The samples of a minibatch that this process takes, as ranges.

        Raises:
            ValueError: the minibatch does not divide so.
        """
        share, rest = divmod(batch, self.processes)
        size = self.batch_gpu or share
        if rest or share % size:
            raise ValueError(
                f"batch must be a multiple of batch_gpu {size} times {self.processes} processes, "
                f"got {batch}"
            )
        first = self.rank * share
        return [(start, start + size) for start in range(first, first + share, size)]

    def prepare(self, network: nn.Module) -> nn.Module:
        """The network to train: its gradients are the mean over the processes."""
        if self.accelerator is not None:
            network = self.accelerator.prepare_model(network, device_placement=False)
        return torch.compile(network) if self.compile else network  # type: ignore[return-value]

    def forward(self, network: nn.Module) -> Network:
        """The network as the loss calls it."""
        if self.autocast is None:
            return network

        def F(x: Tensor, *others: Tensor) -> Tensor:
            with torch.autocast(x.device.type, self.autocast):
                return network(x, *others)

        return F

    def sync(self, network: nn.Module, last: bool) -> AbstractContextManager[object]:
        """Gradients go to the other processes with the last part."""
        if self.accelerator is None or last:
            return nullcontext()
        return self.accelerator.no_sync(network)

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the processes."""
        if self.accelerator is None:
            return value
        return self.accelerator.reduce(value, "mean")

    @contextmanager
    def dropout(self, seed: int, step: int, device: torch.device) -> Iterator[None]:
        """Lends torch's global generators a state that follows from the run's seed and the step.

        So there is nothing of them to keep in a checkpoint.
        """
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            entropy = np.random.SeedSequence((seed, step, self.rank)).generate_state(1)
            torch.manual_seed(int(entropy[0]))
            yield


def launched(device: str) -> Accelerator | None:
    """The accelerator of a process that torchrun or accelerate started beside others, or None.

    Of accelerate's own settings, which come by the environment, none holds: those of the run do.

    Raises:
        ImportError: accelerate is not installed.
        ValueError: accelerate was asked for several processes, and started one.
    """
    named = {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR", "WORLD_SIZE"} & os.environ.keys()
    if named == {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"}:
        # It has laid out where processes are to meet; on the CPU it starts them by mpirun alone.
        raise ValueError(
            "accelerate launch must start every process asked for, got one: it starts several on "
            "GPUs only; use torchrun --nproc_per_node N -m stf_train"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise ImportError(
            'several processes need accelerate: pip install "stf-kernels[train]"'
        ) from error
    return Accelerator(cpu=device == "cpu", mixed_precision="no", dynamo_backend="no")
