"""One measurement is one row; a table of rows is what a run prints at its end."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

MB = 1e6


@dataclass(frozen=True)
class Row:
    """What was measured, and how it went; None is what does not apply or was not measured."""

    what: str  # "DSM", "STF": a target; "step": of training; "product", "copy", "floor"
    by: str
    B: int
    n: int
    d: int
    ms: float | None  # median
    rounds: int
    error: float | None = None  # worst relative error of a row of the score
    extra_bytes: int | None = None  # peak memory beyond inputs and prepared references
    overhead: float | None = None  # of an STF step, in parts of the DSM step
    overhead_error: float | None = None  # its standard error
    rate: float | None = None  # operations, or bytes of a copy, a second
    noise: str = "edm"  # of problems.NOISE
    refs: str = "uint8"  # of problems.REFERENCES
    sigma: float | None = None  # of the one sample that `error` is for
    bias: float | None = None  # relative error of the posterior mean D of that sample
    note: str | None = None  # why there is no time

    def __str__(self) -> str:
        found = self.note or ("" if self.ms is None else f"{milliseconds(self.ms)} ms")
        if self.sigma is not None:
            found = f"error {self.error:.1e} at sigma {self.sigma:.3g}"
        return f"{self.what} {self.by} {self.B} {self.n} {self.d}: {found}"

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.B, self.n, self.d


def table(rows: Iterable[Row], yardstick: str) -> list[str]:
    """The rows as aligned lines, those of one shape together, in the order they were measured.

    Args:
        rows: of one run
        yardstick: what and by of the rows that the others of their shape are divided by
    """
    rows = list(rows)
    unit = {row.shape: row.ms for row in rows if f"{row.what} {row.by}" == yardstick}
    shapes = list(dict.fromkeys(row.shape for row in rows))
    cells = [("what", "by", "B", "n", "d", "ms", "x ours", "error", "extra MB", "")]
    for row in sorted(rows, key=lambda row: shapes.index(row.shape)):
        ours = unit.get(row.shape)
        cells.append(
            (
                row.what,
                row.by,
                str(row.B),
                str(row.n),
                str(row.d),
                "-" if row.ms is None else milliseconds(row.ms),
                _number(row.ms / ours if row.ms and ours else None, "{:.2f}"),
                _number(row.error, "{:.1e}"),
                _number(None if row.extra_bytes is None else row.extra_bytes / MB, "{:.0f}"),
                _remark(row),
            )
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if column in (0, 1, 9) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]


def milliseconds(ms: float) -> str:
    """As many digits as a timing has."""
    return f"{ms:.4f}" if ms < 1 else f"{ms:.2f}" if ms < 100 else f"{ms:.0f}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _remark(row: Row) -> str:
    if row.overhead is not None:
        return f"{percent(row)} of a DSM step"
    if row.rate is not None:
        return f"{row.rate / 1e12:.4g} T/s"
    return row.note or ""


def percent(row: Row) -> str:
    """What a step's target adds, with its standard error where that is known."""
    assert row.overhead is not None
    error = "" if row.overhead_error is None else f" ± {100 * row.overhead_error:.1f}"
    return f"{100 * row.overhead:+.1f}{error} %"
