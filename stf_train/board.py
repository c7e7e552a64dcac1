"""The metrics and samples of a run for TensorBoard, which is optional."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from stf_train.loop import Step
from stf_train.panel import Bin


class Board:
    """Writes what the metrics file says, and pictures of samples, for TensorBoard.

    Args:
        folder: of its files.
        step: from which on those of an earlier session are to be hidden.

    Raises:
        ImportError: tensorboard is not installed.
    """

    def __init__(self, folder: Path, step: int) -> None:
        check()
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step)

    def write(self, step: Step) -> None:
        """Adds a step."""
        for name in ("loss", "grad_norm", "lr", "skipped"):
            self._writer.add_scalar(name, getattr(step, name), step.step)

    def write_panel(self, step: int, bins: Iterable[Bin]) -> None:
        """Adds the variance of the target."""
        for one in bins:
            at = f"2^{one.octave}"
            for name in ("V_DSM", "removed", "ess", "entropy"):
                self._writer.add_scalar(f"{name}/sigma {at}", getattr(one, name), step)
            self._writer.add_scalar(f"V_STF/sigma {at}", one.V_DSM - one.removed, step)

    def write_samples(self, step: int, page: np.ndarray) -> None:
        """Adds a grid of samples, [height, width, 3] uint8."""
        self._writer.add_image("samples", page, step, dataformats="HWC")

    def close(self) -> None:
        """Brings everything to the disk."""
        self._writer.close()


def check() -> None:
    """Raises an ImportError if there is no tensorboard."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ImportError("--tensorboard needs tensorboard: pip install tensorboard") from error
