"""The figures of docs/evidence.md, drawn from the rows of one run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.floors import READ, floors
from bench.problems import LEVELS
from bench.rows import MB, Row
from bench.runs import Run
from bench.sweeps import CURVES, LEVEL_N

SIZE, DPI = (8.4, 5.2), 120
GAP = 0.043  # between the labels of two lines, in parts of the axis
TEXT = 8.5
BESIDE = 1.25  # where the label of a line that stops begins, in parts of its x
ROOM = 0.65  # of the axis: lines that stop further right have their label beside the axes
# Okabe and Ito's colours, which colour-blind readers tell apart.
STYLES = {
    "exact": ("stable_target, exact", "#0072B2"),
    "exact, file": ("the same, from a file", "#56B4E9"),
    "fast": ("stable_target, fast", "#56B4E9"),
    "Gram fp32": ("Gram fp32", "#D55E00"),
    "SDPA fp32": ("SDPA fp32", "#E69F00"),
    "StableVM": ("StableVM chunks", "#009E73"),
    "paper": ("paper's formula", "#CC79A7"),
    "KeOps": ("KeOps", "#8C6D31"),
    "128 nearest": ("FAISS, 128 nearest", "#555555"),
    "Gram bf16": ("Gram bf16", "#000000"),
    "16 nearest": ("16 nearest", "#E69F00"),
    "1024 nearest": ("1024 nearest", "#009E73"),
}
AXES: dict[str, tuple[str, Callable[[Row], int]]] = {
    "n": ("n, references (B = 64, d = 3072)", lambda row: row.n),
    "d": ("d, values of an image (B = 64, n = 1024)", lambda row: row.d),
    "B": ("B, noisy samples (n = 4096, d = 3072)", lambda row: row.B),
}
FLOORS = ("two fp32 products", "one int8 product", "one int16 product", READ)


def style(by: str) -> tuple[str, str, float]:
    """Label, colour and width of a case's line."""
    key = by.split(" ", 1)[1] if by.split(" ")[0] in ("cpu", "cuda", "triton", "torch") else by
    label, colour = STYLES[key]
    return label, colour, 2.6 if key == "exact" else 1.4


def draw(run: Run, folder: Path) -> list[Path]:
    """All figures that the rows of a run give; their files."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {folder / f"{name}-{run.kind}.png": figure(run) for name, figure in FIGURES.items()}
    return [save(figure, run, path) for path, figure in drawn.items() if figure is not None]


def save(figure: Figure, run: Run, path: Path) -> Path:
    """The same bytes from the same rows: nothing of the day, but where the numbers come from."""
    figure.savefig(path, dpi=DPI, metadata={"Software": None, "Source": run.name})
    return path


def time_along(run: Run, axis: str) -> Figure | None:
    """Time against n, d or B, with what no scheme of its kind can be faster than."""
    curves = run.along(axis)
    if not any(row.ms for rows in curves.values() for row in rows):
        return None
    figure, axes = _axes(AXES[axis][0], "milliseconds", run)
    ends = _lines(axes, curves, axis, lambda row: row.ms)
    shapes = [(s.B, s.n, 3 * s.size**2) for s in CURVES[axis].shapes]
    at = [dict(zip(("B", "n", "d"), shape, strict=True))[axis] for shape in shapes]
    for name in FLOORS:
        times = [floors(run.rows, *shape).get(name, 0.0) for shape in shapes]
        if all(times):
            axes.plot(at, times, ":", color="#777777", linewidth=1.1, zorder=1)
            ends.append((at[-1], times[-1], f"floor: {name}", "#777777"))
    _label(axes, ends, max(at))
    return figure


def memory_along(run: Run, axis: str) -> Figure | None:
    """Peak extra memory against n or B."""
    curves = run.along(axis)
    if not any(row.extra_bytes for rows in curves.values() for row in rows):
        return None
    figure, axes = _axes(AXES[axis][0], "MB at the peak, beyond inputs and references", run)
    ends = _lines(axes, curves, axis, megabytes)
    _label(axes, ends, max(AXES[axis][1](row) for rows in curves.values() for row in rows))
    return figure


def megabytes(row: Row) -> float | None:
    """Extra memory, of which a tenth of a megabyte is the least that can be told from none."""
    return None if row.extra_bytes is None else max(row.extra_bytes / MB, 0.1)


def errors(run: Run) -> Figure | None:
    """The error of the score against sigma, of every scheme that sees all references."""
    schemes = ("exact", "fast", "paper", "StableVM", "KeOps", "Gram fp32", "SDPA fp32", "Gram bf16")
    curves = {by: rows for by, rows in levels(run).items() if by.split(" ", 1)[-1] in schemes}
    curves |= {by: rows for by, rows in levels(run).items() if by in schemes}
    curves = {by: rows for by, rows in curves.items() if not by.startswith("torch ")}
    figure, axes = _axes(f"sigma (n = {LEVEL_N}, d = 3072)", "relative error of the score", run)
    return _against_sigma(figure, axes, curves, lambda row: row.error)


def bias(run: Run) -> Figure | None:
    """The bias of the posterior mean when only the nearest references count, against sigma."""
    curves = {by: rows for by, rows in levels(run).items() if by.endswith("nearest")}
    figure, axes = _axes(
        f"sigma (n = {LEVEL_N}, d = 3072)", "relative bias of the posterior mean D", run
    )
    axes.set_ylim(1e-8, 2)
    return _against_sigma(figure, axes, curves, lambda row: row.bias)


def levels(run: Run) -> dict[str, list[Row]]:
    """The rows at single noise levels by case, from the lowest level to the highest."""
    found: dict[str, list[Row]] = {}
    for row in sorted((row for row in run.rows if row.sigma), key=lambda row: row.sigma or 0):
        found.setdefault(row.by, []).append(row)
    return found


End = tuple[float, float, str, str]  # x, y, label and colour of a line's end
Value = Callable[[Row], float | None]


def _points(rows: Iterable[Row], x: Value, y: Value) -> tuple[list[float], list[float]]:
    """What the rows have both of."""
    found = [(x(row), y(row)) for row in rows]
    both = [(left, right) for left, right in found if left is not None and right is not None]
    return [left for left, _ in both], [right for _, right in both]


def _axes(x: str, y: str, run: Run) -> tuple[Figure, Axes]:
    figure = Figure(SIZE, layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log", xlabel=x, ylabel=y)
    axes.set_title(f"{run.machine}; torch {run.origin['torch']}", loc="left", fontsize=9)
    axes.grid(True, which="major", color="#e4e4e4", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _lines(
    axes: Axes,
    curves: dict[str, list[Row]],
    axis: str,
    value: Value,
) -> list[End]:
    """Draws the lines, a cross where one stops early; their ends."""
    ends: list[End] = []
    for by, rows in curves.items():
        x, y = _points(rows, AXES[axis][1], value)
        if not x:
            continue
        label, colour, width = style(by)
        axes.plot(x, y, "o-", color=colour, linewidth=width, markersize=3.5, zorder=1 + width)
        if rows[-1].note:
            axes.plot(x[-1], y[-1], "x", color=colour, markersize=9, markeredgewidth=2)
            label += f" (next: {rows[-1].note})"
        ends.append((x[-1], y[-1], label, colour))
    return ends


def _against_sigma(
    figure: Figure,
    axes: Axes,
    curves: dict[str, list[Row]],
    value: Value,
) -> Figure | None:
    ends: list[End] = []
    for by, rows in curves.items():
        x, y = _points(rows, lambda row: row.sigma, value)
        if x:
            label, colour, width = style(by)
            axes.plot(x, y, color=colour, linewidth=width, zorder=1 + width)
            ends.append((x[-1], y[-1], label, colour))
    if not ends:
        return None
    _label(axes, ends, LEVELS[1])
    return figure


def _label(axes: Axes, ends: Sequence[End], right: float) -> None:
    """Names the lines at their ends: in a column beside the axes those that end where there is no
    room for words, the others where they stop; no two of a group at one height.
    """
    low, high = map(math.log10, axes.get_ylim())
    left = axes.get_xlim()[0]
    last = {end for end in ends if math.log(end[0] / left) > ROOM * math.log(right / left)}
    for group in (last, set(ends) - last):
        column = sorted(group, key=lambda end: (end[1], end[2]))
        heights = spread((math.log10(y) - low) / (high - low) for _, y, *_ in column)
        for (x, y, label, colour), height in zip(column, heights, strict=True):
            place = (1.02, height) if group is last else (x * BESIDE, height)
            axes.annotate(
                label,
                (x, y),
                place,
                textcoords="axes fraction" if group is last else axes.get_xaxis_transform(),
                color=colour,
                fontsize=TEXT,
                va="center",
                annotation_clip=False,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.8},
                arrowprops={
                    "arrowstyle": "-",
                    "color": colour,
                    "linewidth": 0.5,
                    "relpos": (0, 0.5),
                },
            )


def spread(heights: Iterable[float]) -> list[float]:
    """Ascending heights, moved apart to no less than GAP, as little as that takes."""
    found: list[float] = []
    groups: list[tuple[float, int]] = []  # centre and size
    for height in heights:
        groups.append((height, 1))
        while len(groups) > 1:
            (below, m), (above, k) = groups[-2:]
            if above - below >= GAP * (m + k) / 2:
                break
            groups[-2:] = [((below * m + above * k) / (m + k), m + k)]
    for centre, size in groups:
        found += [centre + GAP * (i - (size - 1) / 2) for i in range(size)]
    return found


FIGURES: dict[str, Callable[[Run], Figure | None]] = {
    **{f"time-{axis}": partial(time_along, axis=axis) for axis in AXES},
    **{f"memory-{axis}": partial(memory_along, axis=axis) for axis in ("n", "B")},
    "errors": errors,
    "nearest": bias,
}
