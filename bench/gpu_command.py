"""bench/gpu: build, bits, rates, times, memory, training and tests on a machine with an NVIDIA GPU.

It needs torch, Triton, pytest, scikit-learn with Pillow and what the build requires, all of them
installed; no network. Every part is a process of its own: one that fails or runs out of time is a
red line, the others run, and the exit status is 1. Rows with provenance go to bench/results/.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from bench.floors import floors
from bench.parts import PYTHON, ROOT, Outcome, Part, read, report, run
from bench.rows import Row, table

BUILD = ("pip", "install", "--no-build-isolation", "--no-deps", "-e", ".")
GPU_TESTS = ("tests/test_gpu.py", "tests/test_storage.py")
SWEEP, ON_GPU = (PYTHON, "-m", "bench.sweeps"), ("{rows}", "--device", "cuda")
PARTS = (
    Part("build", (PYTHON, "-m", *BUILD), 0.3),
    Part("environment", (PYTHON, "-m", "stf_kernels.env"), 0.1),
    Part("bits", (PYTHON, "-m", "stf_kernels.golden"), 0.2),
    Part("rates", (*SWEEP, "rates", *ON_GPU), 0.1),
    Part("cuda-products", (PYTHON, "-m", "bench.gpu_parts", "cuda-products", "{rows}"), 0.1),
    Part("targets", (PYTHON, "-m", "bench.gpu_parts", "targets", "{rows}"), 0.4),
    Part("training", (*SWEEP, "training", *ON_GPU), 0.25),
    Part("tests", (PYTHON, "-m", "pytest", "-q", "-k", "gpu", *GPU_TESTS), 0.4),
    Part("sanitizer", (PYTHON, "-m", "bench.sanitizer"), 0.3),
    Part("slow-peers", (PYTHON, "-m", "bench.gpu_parts", "slow-peers", "{rows}"), 0.2),
    *(
        Part(name, (*SWEEP, name, *ON_GPU), 0.3)
        for name in ("errors", "noise", "refs", "kernels", "n", "d", "B")
    ),
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
            rows = [*read(file), *floor_rows(read(file))]
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


def floor_rows(rows: Sequence[Row]) -> list[Row]:
    """For each shape of a target what the rates would let it take at least."""
    shapes = dict.fromkeys(row.shape for row in rows if row.what == "STF" and row.ms is not None)
    return [
        Row("floor", name, *shape, ms, rounds=0)
        for shape in shapes
        for name, ms in floors(rows, *shape).items()
    ]


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
