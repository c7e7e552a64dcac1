"""The measurements of bench/gpu, one part a process: `python -m bench.gpu_parts PART FILE`.

Rows are appended to FILE as they come, so that a part cut short leaves what it had.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

import torch

from bench.cases import Case, cases, our_names, yardstick
from bench.clock import milliseconds
from bench.parts import Emit, appending
from bench.rows import Row
from bench.sweeps import Shape, point
from stf_kernels import arithmetic as ar
from stf_kernels import cuda_backend
from stf_kernels.gpu_layout import ceil_div, padded
from stf_kernels.stages import Prepared, Samples

SHAPES = ((512, 4096, 32), (64, 4096, 32), (512, 50_000, 32), (512, 4096, 64))  # B, n, size
PAPER_ELEMENTS = 1 << 30  # of each of the paper's four tensors B n d


def targets(device: torch.device, emit: Emit) -> None:
    """Our backends at every shape, then the peers, of which some compile for a while."""
    wanted = [case for case in cases(device).values() if not case.slow]
    names = our_names(device)
    ours = [case for case in wanted if case.name in names]
    peers = [case for case in wanted if case not in ours]
    jobs = [(case, *shape) for some in (ours, peers) for shape in SHAPES for case in some]
    measure(jobs, device, emit)


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


def cuda_products(device: torch.device, emit: Emit) -> None:
    """Stages 2 and 4 of the CUDA backend alone, all rows dense, by each kernel that runs there."""
    reason = cuda_backend.unavailable(device)
    if reason is not None:
        print(f"not measured: {reason}")
        return
    for B, n, size in SHAPES:
        for kernel in ("portable", "hopper"):
            if kernel == "portable" or cuda_backend.capability(device) == cuda_backend.HOPPER:
                for row in _products(kernel, B, n, 3 * size**2, device):
                    emit(row)


def _products(kernel: str, B: int, n: int, d: int, device: torch.device) -> list[Row]:
    """Stage 2, and stage 4 with its gather that clears, as products of L B by n by d."""
    limbs = ar.LIMBS["exact"]
    values = torch.randint(-128, 128, (1, n, d), dtype=torch.int8, device=device)
    ones = torch.ones(max(B, n), dtype=torch.float64, device=device)
    q, step = cuda_backend.quantize(torch.randn(B, d, device=device), limbs)
    samples = Samples(q, q, step, ones[:B], ones[:B], ones[:B], None)
    refs = Prepared(values, ones[:n], ones[:2], None, None)
    columns = cuda_backend.transpose(values)
    equal = torch.zeros(B, padded(n), device=device)[:, :n]
    anchors = torch.zeros(B, ceil_div(n, ar.BLOCK), dtype=torch.float64, device=device)
    weights = cuda_backend.weights(equal, anchors, anchors[:, 0], "exact", False)
    stages = {
        "stage 2": lambda: cuda_backend.logits(samples, refs)[0],
        "stage 4": lambda: cuda_backend.weighted_sum(weights, values, columns),
    }
    before = dict(cuda_backend.PRODUCTS)
    cuda_backend.PRODUCTS.update(dict.fromkeys(before, kernel))
    try:
        rows = []
        for name, call in stages.items():
            ms, rounds = milliseconds(call, device)
            rate = 2 * limbs * B * n * d / (ms / 1e3)
            by = f"cuda {kernel}, {name}"
            rows.append(Row("product", by, limbs * B, n, d, ms, rounds, rate=rate))
        return rows
    finally:
        cuda_backend.PRODUCTS.update(before)


PARTS = {"targets": targets, "slow-peers": slow_peers, "cuda-products": cuda_products}


if __name__ == "__main__":
    PARTS[sys.argv[1]](torch.device("cuda"), appending(Path(sys.argv[2])))
