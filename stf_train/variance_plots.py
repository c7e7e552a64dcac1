"""The pictures of `stf-variance`, drawn from the numbers in its files alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stf_train.variance import Curve
from stf_train.variance_study import Row, Summary, summaries

DECADES = 6  # of the variance that are shown


@dataclass(frozen=True)
class Panel:
    """The curves of one problem: one row of a figure."""

    title: str
    curves: tuple[Curve, ...]


@dataclass(frozen=True)
class Numbers:
    """All of a figure, and how it was made."""

    settings: dict[str, object]
    panels: tuple[Panel, ...]

    def save(self, path: Path) -> None:
        """Writes them as JSON, to six digits."""
        rounded = json.loads(
            json.dumps(asdict(self)), parse_float=lambda x: float(f"{float(x):.6g}")
        )
        path.write_text(json.dumps(rounded) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Numbers:
        """Reads what `save` wrote.

        Raises:
            ValueError: the file is no such.
        """
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            panels = tuple(
                Panel(panel["title"], tuple(Curve(**curve) for curve in panel["curves"]))
                for panel in found["panels"]
            )
            return cls(found["settings"], panels)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} must hold the numbers of a figure: {error!r}") from error


def save_variance(path: Path, panels: Sequence[Panel]) -> None:
    """Writes, for each problem, V_DSM beside D(t), and V_STF beside V_DSM, as a PNG.

    Dots with bars of two standard errors are Monte-Carlo, lines are closed forms, and where there
    is none the line beside V_STF joins the dots of V_DSM.
    """
    figure = Figure(figsize=(11, 3.9 * len(panels)), layout="constrained")
    grid = figure.subplots(len(panels), 2, squeeze=False)
    for (left, right), panel in zip(grid, panels, strict=True):
        dsm, share, stf = (
            [curve for curve in panel.curves if curve.quantity == quantity]
            for quantity in ("V_DSM", "D", "V_STF")
        )
        closed = any(curve.errors is None for curve in panel.curves)
        top = max(max(curve.values) for curve in dsm)
        for axes in (left, right):
            axes.set(xlabel="t", yscale="log", ylim=(top * 10.0**-DECADES, 2 * top))
            axes.set_ylabel(r"variance of the score target, 1 / (data unit)$^2$")
            axes.grid(alpha=0.2)
        left.set_title(panel.title, fontsize=10)
        right.set_title("n references, the source among them", fontsize=10)
        for curve in dsm:
            draw(left, curve, "C0", "$V_{DSM}$")
        if not closed:
            (curve,) = dsm
            right.plot(curve.t, curve.values, color="0.6", linewidth=1, label="$V_{DSM}$")
        ns = sorted({curve.n or 0 for curve in stf})
        for curve in stf:
            draw(right, curve, f"C{ns.index(curve.n or 0)}", f"$V_{{STF}}$, n = {curve.n}")
        twin = left.twinx()
        # By the last: the closed form, where there is one.
        largest = max(share[-1].values)
        twin.set(ylim=(0, 1.12), ylabel="D(t) / its largest value")
        for curve in share:
            draw(twin, curve, "C3", "D(t)", 1 / largest)
        lines, names = left.get_legend_handles_labels()
        more, others = twin.get_legend_handles_labels()
        title = "lines: closed forms" if closed else None
        twin.legend(lines + more, names + others, loc="upper right", fontsize=8, title=title)
        right.legend(loc="upper right", fontsize=8, title=title)
    figure.savefig(path, dpi=110)


def draw(axes: Axes, curve: Curve, color: str, label: str, factor: float = 1) -> None:
    """One curve: a line for a closed form, else dots with bars."""
    values = factor * np.array(curve.values)
    if curve.errors is None:
        axes.plot(curve.t, values, color=color, linewidth=1)
    else:
        bars = 2 * factor * np.array(curve.errors)
        axes.errorbar(
            curve.t, values, bars, color=color, fmt="o", markersize=3, linewidth=1, label=label
        )


def save_study(path: Path, rows: Sequence[Row], floor: float) -> None:
    """Writes what networks are worth against the images they were trained on, as a PNG.

    Lines join means over seeds, bars are one deviation over seeds; the lower row has the means of
    what DSM is worse by with the same seed, with two standard errors.

    Args:
        path: of the picture.
        rows: of a study.
        floor: the Frechet distance that samples without fault would have.
    """
    measures = (("excess_risk", "excess risk"), ("frechet", "Frechet distance of the pixels"))
    looks = range(len(rows[0].images))
    figure = Figure(figsize=(11, 7), layout="constrained")
    grid = figure.subplots(2, 2, sharex=True)
    for column, (measure, name) in enumerate(measures):
        worth, gains = grid[:, column]
        # [look][target] to [target][look]
        of_targets = list(zip(*(summaries(rows, measure, look) for look in looks), strict=True))
        for i, found in enumerate(of_targets):
            images = np.array(rows[0].images) * 1.02 ** (i - (len(of_targets) - 1) / 2)
            style = {"color": f"C{i}", "marker": "o", "markersize": 3, "linewidth": 1}
            label = str(found[0].arm)
            means, sds = column_of(found, "mean"), column_of(found, "sd")
            worth.errorbar(images, means, sds, label=label, **style)
            if found[0].arm.n is not None:
                errors = 2 * column_of(found, "gain_error")
                gains.errorbar(images, column_of(found, "gain"), errors, label=label, **style)
        worth.set(title=f"{name}, {of_targets[0][0].seeds} seeds", xscale="log", yscale="log")
        worth.yaxis.set_major_formatter("{x:g}")
        worth.yaxis.set_minor_formatter("{x:g}")
        gains.set(title="DSM minus STF, seed by seed", xlabel="training images")
        gains.axhline(0, color="0.6", linewidth=1)
        if measure == "frechet":
            worth.axhline(
                floor, color="0.6", linewidth=1, linestyle="--", label="digits drawn anew"
            )
        for axes in (worth, gains):
            axes.set_xticks(rows[0].images, [str(images) for images in rows[0].images])
            axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
            axes.grid(alpha=0.2)
            axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def column_of(found: Sequence[Summary], field: str) -> np.ndarray:
    """One number of each."""
    return np.array([getattr(summary, field) for summary in found])
