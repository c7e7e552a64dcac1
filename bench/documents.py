"""What README.md and docs/evidence.md say in numbers, made from rows.

A block stands between `<!-- rows: NAME -->` and `<!-- end -->`. All numbers of the block are those
of the newest run that has them, for each kind of machine; what no GPU has measured, it says.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from bench.figures import levels, style
from bench.parts import ROOT
from bench.rows import MB, Row, percent
from bench.runs import KINDS, Run, newest

DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "evidence.md")
BLOCK = re.compile(r"(<!-- rows: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
NO_GPU = "*Not measured on a GPU.*"
COLUMNS = {"gpu": "GPU", "int8": "VNNI", "int16": "AVX2"}
# Label, what, by, B and n; "exact" and "fast" are ours, on the backend `auto` takes.
HEADLINE = (
    ("**`stable_target`, exact**", "STF", "exact", 512, 4096),
    ("`stable_target`, fast", "STF", "fast", 512, 4096),
    ("`softmax((x @ y.T - norms) / sigma^2) @ y`, fp32", "STF", "Gram fp32", 512, 4096),
    ("`scaled_dot_product_attention`, fp32", "STF", "SDPA fp32", 512, 4096),
    ("plain DSM target (no references)", "DSM", "-", 512, 4096),
    ("**`stable_target`, exact**", "STF", "exact", 64, 4096),
    ("KeOps", "STF", "KeOps", 64, 4096),
    ("direct differences in chunks, as StableVM", "STF", "StableVM", 64, 4096),
    ("the paper's formula, B n d materialised", "STF", "paper", 64, 4096),
    ("**`stable_target`, exact**", "STF", "exact", 64, 50_000),
    ("**its references in a file**", "STF", "exact, file", 64, 50_000),
    ("the same softmax of products, fp32", "STF", "Gram fp32", 64, 50_000),
    ("`scaled_dot_product_attention`, fp32", "STF", "SDPA fp32", 64, 50_000),
)
PAPER_STEPS = (
    ("EDM, NCSN++, two A100 (98.5 -> 101.5 s per 50 000 images)", "+3.0 %", "36 050 -> 40 640"),
    ("VE (13 -> 16 s per 50 steps)", "+23 %", ""),
)
FIGURE_TITLES = {
    "time-n": "Time against the number of references",
    "time-d": "Time against the size of an image",
    "time-B": "Time against the number of noisy samples",
    "memory-n": "Peak memory against the number of references",
    "memory-B": "Peak memory against the number of noisy samples",
    "errors": "Error of the score against sigma, for every scheme",
    "nearest": "Bias of the posterior mean when only the nearest references count",
}


def write(runs: Sequence[Run]) -> list[Path]:
    """Fills in the blocks of all documents."""
    for path in DOCUMENTS:
        path.write_text(filled(path, runs))
    return list(DOCUMENTS)


def filled(path: Path, runs: Sequence[Run]) -> str:
    """The text of a document with its blocks made anew."""
    up = "../" * (len(path.relative_to(ROOT).parts) - 1)

    def block(match: re.Match[str]) -> str:
        return "\n".join([match[1].rstrip(), *BLOCKS[match[2]](runs, up), match[3]])

    return BLOCK.sub(block, path.read_text())


def number(value: float | None) -> str:
    """Three digits."""
    if value is None:
        return ""
    rounded = float(f"{value:.3g}")
    return count(round(rounded)) if rounded >= 100 else f"{rounded:.3g}"


def count(value: int) -> str:
    """All digits, thousands apart where there are five or more."""
    return f"{value:,}".replace(",", " ") if value >= 10_000 else str(value)


def grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table."""
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)]


def link(run: Run, up: str) -> str:
    return f"[rows]({up}bench/results/{run.name})"


def found(runs: Sequence[Run], shows: Callable[[Run], object]) -> list[Run]:
    """Of each kind of machine the newest run that shows something."""
    every = (newest(runs, kind, lambda run: bool(shows(run))) for kind in KINDS)
    return [run for run in every if run is not None]


def sections(
    runs: Sequence[Run], up: str, shows: Callable[[Run], object], body: Callable[[Run], list[str]]
) -> list[str]:
    """A body for each kind of machine, under a line that names it; a line where there is no GPU."""
    shown = found(runs, shows)
    lines = []
    for run in shown:
        lines += [f"{run.machine} ({link(run, up)}):", "", *body(run), ""]
    if not any(run.kind == "gpu" for run in shown):
        lines += [NO_GPU, ""]
    return lines[:-1]


def headline(run: Run, what: str, by: str, B: int, n: int) -> Row | None:
    """A row of the README's table."""
    return run.find(what, by.replace("exact", run.exact).replace("fast", run.fast), B, n)


def cost(runs: Sequence[Run], up: str) -> list[str]:
    """The README's table, a column of times for each kind of machine, and the default step."""
    # Of a run of some parts only other shapes may be there, not the formula at this one.
    columns = found(runs, lambda run: headline(run, "STF", "paper", 64, 4096))
    machines = "; ".join(
        f"{COLUMNS[run.kind]}: {run.machine}, torch {run.origin['torch']} ({link(run, up)})"
        for run in columns
    )
    text = f"Medians on {machines}. Error and memory are those of the first column that has them."
    head = ["score of B samples, n references", "B, n"]
    head += [f"ms, {COLUMNS[run.kind]}" for run in columns]
    table = grid([*head, "error", "extra MB"], headlines(columns))
    return [*wrapped(text), "", *table, "", *wrapped(default_step(columns))]


def headlines(columns: Sequence[Run]) -> Iterator[list[str]]:
    """The lines of the README's table."""
    for label, what, by, B, n in HEADLINE:
        rows = [headline(run, what, by, B, n) for run in columns]
        times = ["" if row is None else number(row.ms) for row in rows]
        if label.startswith("**"):
            times = [time and f"**{time}**" for time in times]
        if first := next(filter(None, rows), None):
            yield [label, f"{B}, {count(n)}", *times, error(first), megabytes(first)]


def default_step(columns: Sequence[Run]) -> str:
    """The overhead of the stable target there."""
    steps = []
    for run in columns:
        dsm, stf = digits(run, "DSM"), digits(run, "STF")
        if dsm and stf and stf.overhead is not None:
            added = f"{percent(stf).removeprefix('+')} (median of pairs of steps)"
            steps.append(f"{number(dsm.ms)} ms ({COLUMNS[run.kind]}), to which STF adds {added}")
    gpu = "" if any(run.kind == "gpu" for run in columns) else " Nothing was measured on a GPU."
    if not steps:
        return gpu.strip()
    return (
        "With the DSM target a step of the default `stf-train` (B = 128, n = 1024, a small network "
        f"on 8x8 images) takes {'; '.join(steps)}.{gpu}"
    )


def digits(run: Run, target: str) -> Row | None:
    return run.find("step", f"digits {target}", 128, 1024, 64)


def wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False)


def error(row: Row) -> str:
    return "" if row.error is None else f"{row.error:.1e}".replace("e-0", "e-")


def megabytes(row: Row) -> str:
    return "" if row.extra_bytes is None else number(row.extra_bytes / MB)


def table_of_runs(runs: Sequence[Run], up: str) -> list[str]:
    """Where all rows come from."""
    return grid(
        ("rows", "machine", "date", "commit", "command"),
        (
            (
                f"[{run.name}]({up}bench/results/{run.name})",
                run.machine,
                str(run.origin["date"])[:10],
                str(run.origin["commit"])[:7],
                f"`{run.origin['command']}`",
            )
            for run in runs
        ),
    )


def pictures(*names: str) -> Callable[[Sequence[Run], str], list[str]]:
    """A block of figures."""

    def block(runs: Sequence[Run], up: str) -> list[str]:
        def body(run: Run) -> list[str]:
            images = (
                [f"![{FIGURE_TITLES[name]}]({up}docs/figures/{name}-{run.kind}.png)", ""]
                for name in names
            )
            return [line for image in images for line in image][:-1]

        return sections(runs, up, Run.draws, body)

    return block


def stops(runs: Sequence[Run], up: str) -> list[str]:
    """Where a curve ends, and why."""

    def ends(run: Run) -> Iterator[tuple[str, ...]]:
        for axis in ("n", "d", "B"):
            for by, rows in run.along(axis).items():
                if note := rows[-1].note:
                    at = {"n": rows[-1].n, "d": rows[-1].d, "B": rows[-1].B}[axis]
                    yield style(by)[0], f"{axis} = {count(at)}", note

    return sections(
        runs, up, Run.draws, lambda run: grid(("scheme", "not measured at", "because"), ends(run))
    )


def error_table(runs: Sequence[Run], up: str) -> list[str]:
    """Each scheme's largest error, and where, and its error at some levels."""
    shown = (0.002, 0.02, 0.2, 2.0, 80.0)

    def lines(run: Run) -> Iterator[tuple[str, ...]]:
        for by, rows in levels(run).items():
            worst = max(rows, key=lambda row: row.error or 0)
            near = [min(rows, key=lambda row: abs((row.sigma or 0) / at - 1)) for at in shown]
            yield by, error(worst), f"{worst.sigma:.2g}", *map(error, near)

    head = ("scheme", "largest error", "at sigma", *(f"sigma {at:g}" for at in shown))
    return sections(runs, up, levels, lambda run: grid(head, lines(run)))


def comparison(axis: str, *values: str) -> Callable[[Sequence[Run], str], list[str]]:
    """A block that has a line for each case at each value of an axis that is no number.

    Args:
        axis: of CURVES
        values: the field of a row that tells the values apart, and its name in the table; or none
    """

    def block(runs: Sequence[Run], up: str) -> list[str]:
        def body(run: Run) -> list[str]:
            rows = [row for rows in run.along(axis).values() for row in rows]
            if values:  # those of one value together, in their order
                order = list(dict.fromkeys(getattr(row, values[0]) for row in rows))
                rows.sort(key=lambda row: order.index(getattr(row, values[0])))
            cells = (
                (
                    *(getattr(row, field) for field in values[:1]),
                    *(row.by, time_or_note(row), error(row), megabytes(row)),
                )
                for row in rows
            )
            return grid((*values[1:], "scheme", "ms", "error", "extra MB"), cells)

        return sections(runs, up, lambda run: run.has(axis), body)

    return block


def time_or_note(row: Row) -> str:
    return row.note or "" if row.ms is None else number(row.ms)


def training(runs: Sequence[Run], up: str) -> list[str]:
    """Steps with either target, beside the paper's."""

    def steps(run: Run) -> list[Row]:
        return [row for row in run.rows if row.what == "step"]

    def body(run: Run) -> list[str]:
        cells = [
            (
                row.by,
                str(row.B),
                "" if row.overhead is None else count(row.n),
                time_or_note(row),
                "" if row.overhead is None else percent(row),
                megabytes(row),
            )
            for row in steps(run)
        ]
        return grid(("step", "B", "n", "ms", "STF adds", "extra MB of a step"), cells)

    paper = grid(
        ("the paper, 3x32x32, as printed there", "STF adds", "MB for each GPU"), PAPER_STEPS
    )
    return [*sections(runs, up, steps, body), "", *paper]


def larger(runs: Sequence[Run], up: str) -> list[str]:
    """References in a file larger than memory."""
    lines = []
    for run in found(runs, files):
        read, made = files(run)
        size = f"{made.n * made.d / 1e9:.1f} GB"
        lines += wrapped(
            f"{count(made.n)} references of 3x64x64 bytes, a file of {size} that is mostly a "
            f"hole, took {seconds(made)} for {made.B} samples and {megabytes(made)} MB of memory "
            f"on {run.machine} (`python -m bench.larger_than_memory`, {link(run, up)}), after "
            f"{seconds(read)} of reading for the norms, which a saved file has."
        )
    return lines or ["How long a file larger than memory takes has not been measured."]


def files(run: Run) -> list[Row]:
    return [row for row in run.rows if row.what == "file"]


def seconds(row: Row) -> str:
    return f"{number(None if row.ms is None else row.ms / 1e3)} s"


BLOCKS: dict[str, Callable[[Sequence[Run], str], list[str]]] = {
    "cost": cost,
    "runs": table_of_runs,
    "growth": pictures("time-n", "time-d", "time-B"),
    "stops": stops,
    "memory": pictures("memory-n", "memory-B"),
    "errors": pictures("errors"),
    "error-table": error_table,
    "nearest": pictures("nearest"),
    "noise": comparison("noise", "noise", "noise"),
    "refs": comparison("refs", "refs", "references"),
    "kernels": comparison("kernels"),
    "training": training,
    "larger": larger,
}
