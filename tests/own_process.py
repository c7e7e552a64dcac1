"""pytest in a process of its own: some kernels are interpreted, or built, from their import on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path


def run_pytest(*arguments: str, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """pytest with these arguments and, beside this process's, environment variables."""
    options = ["-q", "-p", "no:cacheprovider", "--durations=10"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, *arguments],
        cwd=Path(__file__).parents[1],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def passed(done: subprocess.CompletedProcess[str]) -> int:
    """How many tests passed in such a process, if all did."""
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-20_000:]
    found = re.findall(r"(\d+) (passed|skipped|xfailed)", done.stdout.splitlines()[-1])
    assert [what for _, what in found] == ["passed"], found
    return int(found[0][0])
