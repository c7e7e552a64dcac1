"""The extra memory of a call.

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
from collections.abc import Callable
from pathlib import Path

import torch

from bench.cases import cases
from bench.fresh import in_fresh_process
from bench.problems import photographs

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
    return in_fresh_process(_extra_bytes_here, case, B, n) if RESET.exists() else None


def _extra_bytes_here(case: str, B: int, n: int) -> int | None:
    device = torch.device("cpu")
    build = cases(device)[case].build
    build(photographs(4, 128))()
    return extra_bytes(build(photographs(B, n)), device)
