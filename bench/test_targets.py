"""The time of a target on the CPU, beside its error and its extra memory."""

from __future__ import annotations

import statistics
import time

import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from bench.cases import cases, streamed, yardstick
from bench.conftest import CPU, Book
from bench.memory import extra_bytes, extra_bytes_in_fresh_process
from bench.problems import photographs
from bench.rows import Row

CASES = cases(CPU)
SECONDS, ROUNDS = 1.0, (3, 40)  # of the timed rounds of a case
SLOW = 2.0  # seconds of a call that is timed only once

FULL, SMALL = (512, 4096), (64, 4096)  # B, n
SHAPES = (FULL, SMALL, (64, 50_000))


def jobs(quick: bool) -> list[tuple[str, int, int]]:
    """Case, B and n: the slow cases at the small shape, beside ours; all others everywhere else."""
    found = []
    for B, n in SHAPES:
        for name, case in CASES.items():
            if (B, n) == SMALL:
                wanted = case.slow or name == yardstick(CPU)
            else:
                wanted = not case.slow and ((B, n) == FULL or "fast" not in name)
            if case.name == streamed(CPU).name:
                wanted = n > FULL[1]
            if wanted and not case.aside:
                found.append((name, B // 16, n // 16) if quick else (name, B, n))
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    found = jobs(metafunc.config.getoption("--quick"))
    names = [f"{case}-{B}-{n}".replace(" ", "-") for case, B, n in found]
    metafunc.parametrize(("name", "B", "n"), found, ids=names)


def test_target(name: str, B: int, n: int, benchmark: BenchmarkFixture, book: Book) -> None:
    case = CASES[name]
    if case.missing:
        book.missing.append(f"{case.by}: {case.missing}")
        pytest.skip(case.missing)
    problem = photographs(B, n)
    case.build(photographs.__wrapped__(4, 128))()  # loads libraries; KeOps compiles
    call = case.build(problem)
    rounds, extra = 1, None
    found: list[Tensor] = []
    if case.slow:  # called once: its memory is that of the timed call
        extra = extra_bytes(lambda: found.append(benchmark.pedantic(call)), CPU)
    else:
        start = time.perf_counter()
        call()
        estimate = time.perf_counter() - start
        if estimate < SLOW:
            rounds = min(max(round(SECONDS / estimate), ROUNDS[0]), ROUNDS[1])
    target = found.pop() if found else benchmark.pedantic(call, rounds=rounds)
    if benchmark.stats is None:  # --benchmark-disable
        return
    if not case.slow:
        extra = extra_bytes_in_fresh_process(name, B, n)
    book.rows.append(
        Row(
            what=case.what,
            by=case.by,
            B=B,
            n=n,
            d=problem.x[0].numel(),
            ms=1e3 * statistics.median(benchmark.stats.stats.data),
            rounds=rounds,
            error=problem.worst_error(target) if case.what == "STF" else None,
            extra_bytes=extra,
        )
    )
