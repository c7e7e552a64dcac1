"""The measurements of bench/gpu, one part a process: `python -m bench.gpu_parts PART FILE`.

Rows are appended to FILE as they come, so that a part cut short leaves what it had.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

import torch

from bench.cases import Case, cases, our_names, yardstick
from bench.parts import Emit, appending
from bench.sweeps import Shape, point

SHAPES = ((512, 4096, 32), (64, 4096, 32), (512, 50_000, 32), (512, 4096, 64))  # B, n, size
PAPER_ELEMENTS = 1 << 30  # of each of the paper's four tensors B n d


def targets(device: torch.device, emit: Emit) -> None:
    """Our backends and the peers at every shape."""
    wanted = [case for case in cases(device).values() if not case.slow]
    measure([(case, *shape) for shape in SHAPES for case in wanted], device, emit)


def slow_peers(device: torch.device, emit: Emit) -> None:
    """The peers whose memory or time asks for few samples, and ours at the same shapes."""
    found = cases(device)
    wanted = [found[yardstick(device)], *(case for case in found.values() if case.slow)]
    jobs = []
    for B, n, size in SHAPES:
        fitting = 1 << ((PAPER_ELEMENTS // (n * 3 * size**2)).bit_length() - 1)
        jobs += [(case, min(B, fitting), n, size) for case in wanted]
    measure(list(dict.fromkeys(jobs)), device, emit)


def measure(jobs: list[tuple[Case, int, int, int]], device: torch.device, emit: Emit) -> None:
    """A row for each job.

    Raises:
        RuntimeError: at the end, naming those of our own that failed; a peer that fails is printed
    """
    failed = []
    for case, B, n, size in jobs:
        if case.missing:
            print(f"not measured: {case.name}: {case.missing}")
            continue
        try:
            emit(point(case, Shape(B, n, size), device))
        except Exception as error:
            traceback.print_exc()
            print(f"not measured: {case.name} at {B}, {n}, {size}: {type(error).__name__}")
            if case.name in our_names(device):
                failed.append(f"{case.name} at {B}, {n}, {size}")
            torch.cuda.empty_cache()
    if failed:
        raise RuntimeError(f"failed: {', '.join(failed)}")


PARTS = {"targets": targets, "slow-peers": slow_peers}


if __name__ == "__main__":
    PARTS[sys.argv[1]](torch.device("cuda"), appending(Path(sys.argv[2])))
