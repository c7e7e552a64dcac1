"""The measurements of bench/gpu, one part a process: `python -m bench.gpu_parts PART FILE`.

Rows are appended to FILE as they come, so that a part cut short leaves what it had.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from bench import training
from bench.cases import Case, cases, ours, yardstick
from bench.clock import milliseconds
from bench.memory import extra_bytes
from bench.problems import photographs
from bench.rows import Row

Emit = Callable[[Row], None]

PRODUCTS = ((2048, 4096, 3072), (8192, 8192, 8192))  # the first: 512 samples of 4 limbs, n, d
SHAPES = ((512, 4096, 32), (64, 4096, 32), (512, 50_000, 32), (512, 4096, 64))  # B, n, size
PAPER_ELEMENTS = 1 << 30  # of each of the paper's four tensors B n d
COPY_BYTES = 1 << 32
WARM_UP, PAIRS = 10, 200  # of training steps


def rates(device: torch.device, emit: Emit) -> None:
    """Products of random bf16 and int8 matrices, the second one transposed, and a copy."""
    for m, n, k in PRODUCTS:
        a, b = (torch.randn(rows, k, device=device, dtype=torch.bfloat16) for rows in (m, n))
        emit(_product("bf16", torch.mm, a, b))
        a, b = (
            torch.randint(-128, 128, (rows, k), device=device).to(torch.int8) for rows in (m, n)
        )
        emit(_product("int8", torch._int_mm, a, b))
    source = torch.randint(256, (COPY_BYTES,), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    ms, rounds = milliseconds(lambda: target.copy_(source), device)
    rate = 2 * COPY_BYTES / (ms / 1e3)
    emit(Row("copy", "device, read + written", 1, 1, COPY_BYTES, ms, rounds, rate=rate))


def _product(kind: str, product: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Row:
    (m, k), n = a.shape, len(b)
    ms, rounds = milliseconds(lambda: product(a, b.T), a.device)
    return Row("product", kind, m, n, k, ms, rounds, rate=2 * m * n * k / (ms / 1e3))


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
    our_names = {case.name for case in ours(device)} | {"DSM -"}
    failed = []
    for case, B, n, size in jobs:
        if case.missing:
            print(f"not measured: {case.name}: {case.missing}")
            continue
        try:
            emit(_row(case, B, n, size, device))
        except Exception as error:
            traceback.print_exc()
            print(f"not measured: {case.name} at {B}, {n}, {size}: {type(error).__name__}")
            if case.name in our_names:
                failed.append(f"{case.name} at {B}, {n}, {size}")
            torch.cuda.empty_cache()
    if failed:
        raise RuntimeError(f"failed: {', '.join(failed)}")


def _row(case: Case, B: int, n: int, size: int, device: torch.device) -> Row:
    problem = photographs(B, n, size, device=str(device))
    call = case.build(problem)
    score = call()
    error = problem.worst_error(score) if case.what == "STF" else None
    del score
    extra = extra_bytes(call, device)
    ms, rounds = milliseconds(call, device)
    return Row(case.what, case.by, B, n, problem.x[0].numel(), ms, rounds, error, extra)


def steps(device: torch.device, emit: Emit) -> None:
    """Training steps with either target, taken in turn."""
    for system in (training.digits(str(device)), training.patches(str(device))):
        runs = system.runs()
        for run in runs.values():
            for _ in range(WARM_UP):
                next(run)
        pairs = [[training.step_ms(run) for run in runs.values()] for _ in range(PAIRS)]
        for row in system.rows(*map(list, zip(*pairs, strict=True))):
            emit(row)


PARTS = {
    "rates": rates,
    "targets": targets,
    "slow-peers": slow_peers,
    "training": steps,
}


def main(part: str, path: str) -> None:
    with Path(path).open("a") as file:

        def emit(row: Row) -> None:
            print(json.dumps(asdict(row)), file=file, flush=True)
            print(f"{row.what} {row.by} {row.B} {row.n} {row.d}: {row.ms:.4f} ms", flush=True)

        PARTS[part](torch.device("cuda"), emit)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
