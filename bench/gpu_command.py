"""bench/gpu: build, bits, rates, times, memory, training and tests on a machine with an NVIDIA GPU.

It needs torch, Triton, pytest, scikit-learn with Pillow and what the build requires, all of them
installed; no network. Every part is a process of its own: one that fails or runs out of time is a
red line, the others run, and the exit status is 1. Rows with provenance go to bench/results/.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.rows import Row, table

ROOT = Path(__file__).parents[1]
PYTHON = sys.executable
RED, GREEN, PLAIN = ("\x1b[31m", "\x1b[32m", "\x1b[0m") if sys.stdout.isatty() else ("", "", "")


@dataclass(frozen=True)
class Part:
    """A command, and the most it may take of the time there is for all."""

    name: str
    command: tuple[str, ...]
    share: float


@dataclass(frozen=True)
class Outcome:
    """How a part went."""

    part: str
    seconds: float
    failure: str | None


BUILD = ("pip", "install", "--no-build-isolation", "--no-deps", "-e", ".")
PARTS = (
    Part("build", (PYTHON, "-m", *BUILD), 0.3),
    Part("environment", (PYTHON, "-m", "stf_kernels.env"), 0.1),
    Part("bits", (PYTHON, "-m", "stf_kernels.golden"), 0.1),
    *(
        Part(name, (PYTHON, "-m", "bench.gpu_parts", name, "{rows}"), share)
        for name, share in (("rates", 0.1), ("targets", 0.4), ("training", 0.15))
    ),
    Part("tests", (PYTHON, "-m", "pytest", "-q"), 0.4),
    Part("slow-peers", (PYTHON, "-m", "bench.gpu_parts", "slow-peers", "{rows}"), 0.2),
)


def main() -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(
        prog="bench/gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seconds", metavar="S", type=float, default=520, help="time for all parts [%(default)g]"
    )
    parser.add_argument(
        "--only",
        metavar="PART",
        nargs="+",
        choices=[part.name for part in PARTS],
        help="these parts alone, of: %(choices)s",
    )
    parser.add_argument("--commit", help="for a copy without git history: what it is a copy of")
    options = parser.parse_args()

    reason = no_gpu()
    if reason is not None:
        print(f"bench/gpu: {reason}; nothing was measured", file=sys.stderr)
        return 1

    import torch

    from bench import provenance

    command = shlex.join(("bench/gpu", *sys.argv[1:]))
    origin = provenance.provenance(torch.device("cuda"), command, options.commit)
    parts = [part for part in PARTS if options.only is None or part.name in options.only]
    deadline = time.monotonic() + options.seconds
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows"
        for part in parts:
            limit = min(part.share * options.seconds, deadline - time.monotonic())
            outcomes.append(run(part, file, limit))
            rows = [*read(file), *floors(read(file))]
            # After each part, so that a machine taken away leaves what was measured.
            path = provenance.write(rows, origin, list(map(asdict, outcomes)))

    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print("\n".join([*table(rows, yardstick(rows)), *product_ratios(rows)]))
    print(f"rows: {path.relative_to(ROOT)}")
    for outcome in outcomes:
        report(outcome)
    return int(any(outcome.failure for outcome in outcomes))


def no_gpu() -> str | None:
    """Why there is no NVIDIA GPU to measure, or None."""
    try:
        import torch
    except ImportError as error:
        return f"it needs PyTorch with CUDA ({error})"
    if torch.version.cuda is None:
        return f"it needs an NVIDIA GPU, and torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return f"it needs an NVIDIA GPU, and torch {torch.__version__} finds none"
    return None


def run(part: Part, rows: Path, limit: float) -> Outcome:
    """Runs a part within `limit` seconds; whatever it started ends with it."""
    print(f"\n== {part.name}, at most {max(limit, 0):.0f} s", flush=True)
    if limit < 1:
        return Outcome(part.name, 0.0, "no time was left for it")
    start = time.monotonic()
    command = [str(rows) if word == "{rows}" else word for word in part.command]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        status = process.wait(limit)
        failure = f"exit status {status}" if status else None
    except subprocess.TimeoutExpired:
        failure = f"not done after {limit:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    outcome = Outcome(part.name, round(time.monotonic() - start, 1), failure)
    report(outcome)
    return outcome


def report(outcome: Outcome) -> None:
    """A green line, or a red one."""
    if outcome.failure is None:
        print(f"{GREEN}{outcome.part}: done in {outcome.seconds:.0f} s{PLAIN}", flush=True)
    else:
        print(f"{RED}{outcome.part}: FAILED, {outcome.failure}{PLAIN}", flush=True)


def read(path: Path) -> list[Row]:
    """The rows that parts have left so far."""
    if not path.exists():
        return []
    return [Row(**json.loads(line)) for line in path.read_text().splitlines() if line[-1:] == "}"]


def floors(rows: Sequence[Row]) -> list[Row]:
    """For each shape the time of the two products alone, calculated from the best measured rates.

    4 B n d operations in bf16; four times as many in int8, for the four limbs of "exact" with
    every row dense.
    """
    rates = product_rates(rows)
    found = []
    for B, n, d in dict.fromkeys((row.B, row.n, row.d) for row in rows if row.what == "STF"):
        for kind, limbs in (("bf16", 1), ("int8", 4)):
            best = max((rate for (by, *_), rate in rates.items() if by == kind), default=None)
            if best is not None:
                ms = 1e3 * 4 * B * n * d * limbs / best
                found.append(Row("floor", f"two {kind} products", B, n, d, ms, rounds=0))
    return found


def product_rates(rows: Iterable[Row]) -> dict[tuple[str, int, int, int], float]:
    """Operations a second of each measured product, by kind and sizes m, n, k."""
    return {
        (row.by, row.B, row.n, row.d): row.rate
        for row in rows
        if row.what == "product" and row.rate is not None
    }


def product_ratios(rows: Iterable[Row]) -> list[str]:
    """The int8 product rate in parts of the bf16 one."""
    rates = product_rates(rows)
    return [
        f"int8 / bf16 product rate at {m}x{n}x{k}: {rate / rates['bf16', m, n, k]:.2f}"
        for (kind, m, n, k), rate in rates.items()
        if kind == "int8" and ("bf16", m, n, k) in rates
    ]


def yardstick(rows: Sequence[Row]) -> str:
    """The first exact case that was measured: that of the backend `auto` takes."""
    exact = [row.by for row in rows if row.what == "STF" and row.by.endswith(" exact")]
    return f"STF {exact[0]}" if exact else ""
