"""The options of the benchmarks, the rows they leave, and the one table at the end."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from bench import goals, provenance
from bench.cases import yardstick
from bench.parts import append
from bench.rows import Row, table

CPU = torch.device("cpu")
TIMED = {"test_targets.py", "test_training.py"}


@dataclass
class Book:
    """What a session has measured, and what it has not."""

    rows: list[Row] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


BOOK = pytest.StashKey[Book]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("stf-kernels benchmarks")
    group.addoption("--quick", action="store_true", help="small shapes: a trial, not a result")
    group.addoption(
        "--results", action="store_true", help="write the rows with provenance to bench/results/"
    )
    group.addoption("--rows", metavar="FILE", type=Path, help="append the rows to a file")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--quick") and config.getoption("--results"):
        raise pytest.UsageError("--results keeps results, and --quick makes none")
    config.stash[BOOK] = Book()
    config.option.benchmark_quiet = True  # one table; --benchmark-verbose brings the plugin's back


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leaves out, rather than lists as skipped, what --benchmark-only has no use for."""
    untimed = collection_path.name not in TIMED and collection_path.suffix == ".py"
    return True if untimed and config.getoption("benchmark_only") else None


@pytest.fixture
def book(request: pytest.FixtureRequest) -> Book:
    return request.config.stash[BOOK]


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    book = config.stash[BOOK]
    if not book.rows:
        return
    write = terminalreporter.write_line
    terminalreporter.section(f"{provenance.cpu_name()}, {torch.get_num_threads()} threads")
    for line in table(book.rows, yardstick(CPU)):
        write(line)
    for line in book.missing:
        write(f"not measured: {line}")
    if (path := config.getoption("--rows")) is not None:
        for row in book.rows:
            append(path, row)
    if config.getoption("--quick"):
        return
    for line in goals.verdicts(book.rows):
        write(line)
    if config.getoption("--results"):
        command = shlex.join(("pytest", *config.invocation_params.args))
        path = provenance.write(book.rows, provenance.provenance(CPU, command))
        write(f"rows: {path.relative_to(provenance.ROOT)}")
