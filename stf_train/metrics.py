"""The metrics of a run as JSON lines, cut back to the checkpoint on resume."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from stf_train.loop import Step
from stf_train.panel import Bin, together


class MetricsLog:
    """Appends lines, one for each step, to a file whose first `size` bytes are known to be good.

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
        """Adds the line of one step, null standing for what is not finite."""
        self._add({name: v if math.isfinite(v) else None for name, v in asdict(step).items()})

    def write_panel(self, step: int, bins: Sequence[Bin]) -> None:
        """Adds a line with the variance of the target at a step."""
        self._add({"variance_at": step, "bins": [asdict(one) for one in bins]})

    def _add(self, line: dict[str, object]) -> None:
        self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
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
    lines = [line for line in _lines(path) if "step" in line]
    for line in lines:
        line.update({name: math.nan for name, value in line.items() if value is None})
    return [Step(**line) for line in lines]


def read_panel(path: Path) -> list[Bin]:
    """The variance of the target over the whole run."""
    lines = [line for line in _lines(path) if "variance_at" in line]
    return together(Bin(**one) for line in lines for one in line["bins"])


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        yield from map(json.loads, file)
