"""Measures everything that needs no GPU, and draws figures and tables: `python -m bench.report`.

`--draw` only draws, from the rows that are kept in bench/results/: the figures in docs/figures/ and
what stands between markers in README.md, bench/README.md and docs/.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch

from bench import documents, figures, provenance, runs
from bench.parts import PYTHON, ROOT, Outcome, Part, read, report, run

FIGURES = ROOT / "docs" / "figures"
SWEEP = (PYTHON, "-m", "bench.sweeps")
# The most important first: what comes late may find no time left on a slow machine.
BENCHMARK = (PYTHON, "-m", "pytest", "bench/", "--benchmark-only")
PARTS = (
    Part("targets", (*BENCHMARK, "--rows", "{rows}"), 0.4),
    *(
        Part(name, (*SWEEP, name, "{rows}"), share)
        for name, share in (
            *(("training", 0.1), ("rates", 0.06), ("errors", 0.08), ("n", 0.32), ("B", 0.12)),
            *(("d", 0.12), ("noise", 0.08), ("larger", 0.15), ("refs", 0.1), ("kernels", 0.06)),
        )
    ),
)
NAMES = [part.name for part in PARTS]


def main() -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    parser.add_argument("--quick", action="store_true", help="small shapes, no result: a trial")
    parser.add_argument(
        "--seconds", metavar="S", type=float, default=690, help="time to measure [%(default)g]"
    )
    parser.add_argument("--only", metavar="PART", nargs="+", choices=NAMES, help="of: %(choices)s")
    options = parser.parse_args()
    outcomes = (
        [] if options.draw else measure(options.only or NAMES, options.seconds, options.quick)
    )
    if not options.quick:
        draw()
    return int(any(outcome.failure for outcome in outcomes))


def measure(names: list[str], seconds: float, quick: bool) -> list[Outcome]:
    """Runs parts, and keeps their rows unless they are those of a trial."""
    origin = provenance.provenance(
        torch.device("cpu"), shlex.join(("python", "-m", "bench.report", *sys.argv[1:]))
    )
    outcomes = []
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(dir=ROOT, prefix=".report-") as folder:  # gigabytes
        file = Path(folder, "rows")
        for part in PARTS:
            if part.name not in names:
                continue
            limit = min(part.share * seconds, deadline - time.monotonic())
            command = (*part.command, "--quick") if quick else part.command
            outcomes.append(run(Part(part.name, command, part.share), file, limit))
            if not quick:  # after each part, so that a run cut short leaves what was measured
                path = provenance.write(read(file), origin, list(map(asdict, outcomes)))
    for outcome in outcomes:
        report(outcome)
    if not quick:
        print(f"rows: {path.relative_to(ROOT)}")
    return outcomes


def draw() -> None:
    """Figures and tables from the rows that are kept, none older than its kind's newest."""
    kept = runs.load()
    for shown in runs.drawn(kept):
        for path in figures.draw(shown, FIGURES):
            print(path.relative_to(ROOT))
    for path in documents.write(kept):
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    sys.exit(main())
