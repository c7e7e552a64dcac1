"""The runs whose rows are kept, and what each of them shows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from bench import provenance
from bench.rows import Row
from bench.sweeps import CURVES, curve_names

KINDS = ("gpu", "int8", "int16")  # of machines
INT8 = {"avx512_vnni", "avx_vnni", "amx_int8"}  # what makes an int8 product fast and exact


@dataclass(frozen=True)
class Run:
    """The rows of one file."""

    name: str
    origin: dict[str, Any]
    rows: tuple[Row, ...]

    @property
    def machine(self) -> str:
        """What it ran on, in words."""
        if self.origin["gpu"]:
            return str(self.origin["gpu"]["name"])
        return f"{self.origin['cpu']}, {self.origin['cores']} cores, {self.products}"

    @property
    def products(self) -> str:
        return "int8 products (VNNI)" if self.kind == "int8" else "int16 products (AVX2)"

    @property
    def kind(self) -> str:
        """ "gpu", or of a CPU what its exact products are made of."""
        if self.origin["gpu"]:
            return "gpu"
        return "int8" if INT8 & set(self.origin["flags"]) else "int16"

    @cached_property
    def exact(self) -> str:
        """By whom the exact target was made: the backend `auto` takes comes first."""
        ours = (row.by for row in self.rows if row.what == "STF" and row.by.endswith(" exact"))
        return next(ours, "")

    @property
    def fast(self) -> str:
        return self.exact.replace("exact", "fast")

    def has(self, axis: str) -> bool:
        """Whether a curve was measured: its last case is there, and ours at several shapes."""
        found = self.along(axis)
        last = curve_names(axis, self.exact)[-1].removeprefix("STF ")
        least = min(2, len(CURVES[axis].shapes))
        return last in found and len(found.get(self.exact, ())) >= least

    def draws(self) -> bool:
        """Whether figures can be drawn from it."""
        return self.has("n") and any(row.sigma for row in self.rows)

    def find(self, what: str, by: str, B: int, n: int, d: int = 3072) -> Row | None:
        """The first timed row of a shape."""
        return next(
            (
                row
                for row in self.rows
                if (row.what, row.by, *row.shape) == (what, by, B, n, d)
                and row.ms is not None
                and (row.noise, row.refs) == ("edm", "uint8")
            ),
            None,
        )

    def along(self, axis: str) -> dict[str, list[Row]]:
        """The rows of a curve by case, in the order of the axis; the last may be a note."""
        shapes = {(s.B, s.n, 3 * s.size**2, s.noise, s.refs) for s in CURVES[axis].shapes}
        names = curve_names(axis, self.exact)
        found: dict[str, dict[tuple[object, ...], Row]] = {name: {} for name in names}
        for row in self.rows:
            key = (*row.shape, row.noise, row.refs)
            if f"{row.what} {row.by}" in names and key in shapes and row.sigma is None:
                kept = found[f"{row.what} {row.by}"]
                if key not in kept or kept[key].ms is None:
                    kept[key] = row
        order = [(s.B, s.n, 3 * s.size**2, s.noise, s.refs) for s in CURVES[axis].shapes]
        return {
            name.removeprefix("STF "): [rows[key] for key in order if key in rows]
            for name, rows in found.items()
            if rows
        }


def load() -> list[Run]:
    """All that are kept, the newest first."""
    found = []
    for path in provenance.RESULTS.glob("*.json"):
        kept = json.loads(path.read_text())
        found.append(Run(path.name, kept["provenance"], tuple(Row(**row) for row in kept["rows"])))
    return sorted(found, key=lambda run: (run.origin["date"], run.name), reverse=True)


def drawn(runs: Sequence[Run]) -> list[Run]:
    """Those whose figures are in docs/figures: of each kind of machine the newest that has all."""
    every = (newest(runs, kind, Run.draws) for kind in KINDS)
    return [run for run in every if run is not None]


def newest(runs: Iterable[Run], kind: str, shows: Callable[[Run], bool]) -> Run | None:
    """The newest run on a kind of machine that shows something.

    Args:
        runs: newest first
        kind: see `Run.kind`
        shows: whether a run does
    """
    return next((run for run in runs if run.kind == kind and shows(run)), None)
