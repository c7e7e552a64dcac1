"""The extra memory of a call: `python -m bench.memory CASE B n` prints it for a CPU, in bytes.

On a CPU it is the growth of the resident set at its peak, read by a fresh process: VmHWM of
/proc/self/status after the call, less VmHWM before it, which writing 5 to /proc/self/clear_refs has
brought down to what is resident then. A small call has loaded the libraries before, and
malloc_trim has given back what the C library kept of the preparations and would hand out unseen.
On a GPU it is the growth of torch.cuda.max_memory_allocated. The result is part of either.
"""

from __future__ import annotations

import ctypes
import gc
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from bench.cases import cases
from bench.problems import photographs

ROOT = Path(__file__).parents[1]
RESET = Path("/proc/self/clear_refs")


def extra_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that one call needs at its peak beyond what is there before it; None for the memory of
    a machine without Linux's /proc, where nothing is called.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not RESET.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)
    RESET.write_text("5")
    before = _peak_resident()
    call()
    return _peak_resident() - before


def _peak_resident() -> int:
    (kilobytes,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(kilobytes)


def extra_bytes_in_fresh_process(case: str, B: int, n: int) -> int | None:
    """`extra_bytes` of a CPU case in a process of its own."""
    if not RESET.exists():
        return None
    command = [sys.executable, "-m", "bench.memory", case, str(B), str(n)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.split()[-1])


def main(case: str, B: int, n: int) -> None:
    device = torch.device("cpu")
    build = cases(device)[case].build
    build(photographs(4, 128))()
    call = build(photographs(B, n))
    print(extra_bytes(call, device))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
