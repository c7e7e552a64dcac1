"""A long run in parts: each a process of its own, that leaves rows in one file as they come.

A part that fails or runs out of time is a red line, and the others run.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.rows import Row

ROOT = Path(__file__).parents[1]
PYTHON = sys.executable
RED, GREEN, PLAIN = ("\x1b[31m", "\x1b[32m", "\x1b[0m") if sys.stdout.isatty() else ("", "", "")

Emit = Callable[[Row], None]


@dataclass(frozen=True)
class Part:
    """A command, and the most it may take of the time there is for all."""

    name: str
    command: tuple[str, ...]  # "{rows}" stands for the file
    share: float


@dataclass(frozen=True)
class Outcome:
    """How a part went."""

    part: str
    seconds: float
    failure: str | None


def run(part: Part, rows: Path, limit: float) -> Outcome:
    """Runs a part within `limit` seconds; whatever it started ends with it."""
    print(f"\n== {part.name}, at most {max(limit, 0):.0f} s", flush=True)
    if limit < 1:
        return Outcome(part.name, 0.0, "no time was left for it")
    start = time.monotonic()
    command = [str(rows) if word == "{rows}" else word for word in part.command]
    # What a part leaves when it is ended goes with the folder of the rows.
    environment = {**os.environ, "TMPDIR": str(rows.parent)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
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


def append(path: Path, row: Row) -> None:
    """Adds a row to a file at once, so that a part cut short leaves what it had."""
    with path.open("a") as file:
        print(json.dumps(asdict(row)), file=file)


def appending(path: Path) -> Emit:
    """Appends rows to a file, and prints them."""

    def emit(row: Row) -> None:
        append(path, row)
        print(row, flush=True)

    return emit


def read(path: Path) -> list[Row]:
    """The rows that parts have left so far."""
    if not path.exists():
        return []
    return [Row(**json.loads(line)) for line in path.read_text().splitlines() if line[-1:] == "}"]
