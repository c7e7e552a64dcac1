"""The time of a call on a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

WARM_UP, ROUNDS = 0.2, (5, 200)  # seconds; how often, at least and at most
FLUSH_BYTES = 1 << 28  # several times the second-level cache of any GPU so far


def milliseconds(
    call: Callable[[], object], device: torch.device, seconds: float = 0.3
) -> tuple[float, int]:
    """Median time of a call between two CUDA events, and the rounds it was measured in.

    Before each round the second-level cache is overwritten, as the network of a training step
    would: the call finds its inputs in device memory.

    Args:
        call: enqueues work on the current stream
        device: a CUDA device
        seconds: about how long to measure
    """
    start = time.perf_counter()
    while time.perf_counter() - start < WARM_UP:  # an idle GPU has lowered its clock
        call()
        torch.cuda.synchronize(device)
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    first = _round(call, flush)
    rounds = min(max(round(1e3 * seconds / max(first, 1e-3)), ROUNDS[0]), ROUNDS[1])
    return statistics.median(_round(call, flush) for _ in range(rounds)), rounds


def _round(call: Callable[[], object], flush: torch.Tensor) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
