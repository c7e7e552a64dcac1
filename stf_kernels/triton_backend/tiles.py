"""Which tile a product takes: a look-up in table.py, nothing is tried out at run time.

No bit depends on it (tests/test_triton.py).
"""

from __future__ import annotations

from functools import cache

import torch

from .table import DENSE, LOGITS, Entry, Tile

INTERPRETER_SLOTS = 4


def logits(device: torch.device, B: int, n: int) -> Tile:
    """The tile of stage 2 for B samples and n references."""
    return look_up(LOGITS[architecture(device)], B, n)


def dense(device: torch.device, B: int, d: int) -> Tile:
    """The tile of stage 4 for at most B dense rows of d values."""
    return look_up(DENSE[architecture(device)], B, d)


def look_up(entries: tuple[Entry, ...], rows: int, width: int) -> Tile:
    """The first entry that reaches as far."""
    return next(e.tile for e in entries if rows <= e.rows and width <= e.width)


@cache
def slots(device: torch.device, warps: int) -> int:
    """How many programs of so many warps are to be busy at once: eight warps a processor."""
    if device.type == "cpu":
        return INTERPRETER_SLOTS
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return int(processors * max(1, 8 // warps))


@cache
def architecture(device: torch.device) -> int:
    """The table's name for a device: 0 for the interpreter."""
    if device.type == "cpu":
        return 0
    major, _ = torch.cuda.get_device_capability(device)
    return {9: 90, 10: 100}.get(major, 80)  # 8.x and 12.x: mma.sync, at most 99 KB are taken
