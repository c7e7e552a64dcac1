"""The time of a call."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

WARM_UP, ROUNDS = 0.2, (5, 200)  # seconds; how often, at least and at most
CPU_ROUNDS = (3, 40)
FLUSH_BYTES = 1 << 28  # several times the second-level cache of any GPU so far


def milliseconds(
    call: Callable[[], object], device: torch.device, seconds: float = 0.3
) -> tuple[float, int]:
    """Median time of a call, and the rounds it was measured in; it has been made before.

    On a GPU it is that between two CUDA events. Before each round the second-level cache is
    overwritten, as the network of a training step would: the call finds its inputs in device
    memory.

    Args:
        call: on a GPU, enqueues work on the current stream
        device: of the work
        seconds: about how long to measure
    """
    if device.type != "cuda":
        first = elapsed(call)
        rounds = _rounds(first, seconds, CPU_ROUNDS)
        return statistics.median([first, *(elapsed(call) for _ in range(rounds - 1))]), rounds
    start = time.perf_counter()
    while time.perf_counter() - start < WARM_UP:  # an idle GPU has lowered its clock
        call()
        torch.cuda.synchronize(device)
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    rounds = _rounds(_round(call, flush), seconds, ROUNDS)
    return statistics.median(_round(call, flush) for _ in range(rounds)), rounds


def elapsed(call: Callable[[], object]) -> float:
    """Milliseconds of one call, the GPU's work included."""
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def _rounds(ms: float, seconds: float, limits: tuple[int, int]) -> int:
    least, most = limits
    return min(max(round(1e3 * seconds / max(ms, 1e-3)), least), most)


def _round(call: Callable[[], object], flush: torch.Tensor) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
