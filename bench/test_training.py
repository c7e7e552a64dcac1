"""The time of a training step on the CPU, and what the stable target adds to it."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench import training
from bench.conftest import Book

WARM_UP, SECONDS, PAIRS = 5, 15.0, (30, 250)  # of steps taken in turn


def test_step_of_the_digits_run(
    benchmark: BenchmarkFixture, book: Book, request: pytest.FixtureRequest
) -> None:
    system = training.digits("cpu")
    runs = system.runs()
    for _ in range(WARM_UP):
        pair = sum(training.step_ms(run) for run in runs.values()) / 1e3
    pairs = min(max(round(SECONDS / pair), PAIRS[0]), PAIRS[1])
    if request.config.getoption("--quick"):
        pairs = WARM_UP
    (n,) = system.references
    dsm: list[float] = []
    # Before each timed STF step, untimed by the plugin and timed here, a DSM step.
    benchmark.pedantic(
        lambda: next(runs[n]),
        setup=lambda: dsm.append(training.step_ms(runs[None])),
        rounds=pairs,
    )
    if benchmark.stats is None:  # --benchmark-disable
        return
    stf = [1e3 * seconds for seconds in benchmark.stats.stats.data]
    book.rows += system.rows({None: dsm, n: stf})
