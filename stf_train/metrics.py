"""The metrics of a run as JSON lines, cut back to the checkpoint on resume."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from stf_train.loop import Step


class MetricsLog:
    """Appends one line per step to a file whose first `size` bytes are known to be good.

    The rest is cut off: lines of steps after the checkpoint, which will be done again, and a line
    torn by a crash. Lines hold no clock times, so those of a resumed run equal those of an
    uninterrupted one.

    Raises:
        ValueError: the file is shorter than `size`.
    """

    def __init__(self, path: Path, size: int = 0) -> None:
        self._file = open(path, "ab")  # noqa: SIM115
        found = self._file.tell()
        if found < size:
            self._file.close()
            raise ValueError(
                f"{path} must hold the {size} bytes its checkpoint knows of, got {found}"
            )
        self._file.truncate(size)

    def write(self, step: Step) -> None:
        """Adds the line of one step."""
        self._file.write(json.dumps(asdict(step)).encode() + b"\n")
        self._file.flush()

    def sync(self) -> int:
        """Brings all lines to the disk; returns the size of the file in bytes."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()


def read(path: Path) -> list[Step]:
    """All steps of a finished or paused run."""
    with open(path, encoding="utf-8") as file:
        return [Step(**json.loads(line)) for line in file]
