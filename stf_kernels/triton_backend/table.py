"""Tile shapes of the two products, written by `python -m bench.triton_tiles`; 0: the interpreter.

sm_80: reasoned
sm_90: reasoned
sm_100: reasoned
"""

from __future__ import annotations

from typing import NamedTuple

ANY = 1 << 62


class Tile(NamedTuple):
    """What one program computes, its warps and the stages of its load pipeline."""

    BM: int  # rows, each with all its digits
    BN: int  # references in stage 2, where it is always 128; values in stage 4
    BK: int  # terms of a step, a divisor of 128
    warps: int
    stages: int


class Entry(NamedTuple):
    """The tile for problems up to a size."""

    rows: int  # samples
    width: int  # references in stage 2, values in stage 4
    tile: Tile


LOGITS = {
    0: (Entry(ANY, ANY, Tile(16, 128, 128, 4, 1)),),
    80: (
        Entry(16, ANY, Tile(16, 128, 128, 8, 4)),
        Entry(32, 4096, Tile(16, 128, 128, 8, 4)),
        Entry(32, ANY, Tile(32, 128, 128, 8, 4)),
        Entry(64, 4096, Tile(16, 128, 128, 8, 4)),
        Entry(128, 1024, Tile(16, 128, 128, 8, 4)),
        Entry(128, 4096, Tile(32, 128, 128, 8, 4)),
        Entry(ANY, 1024, Tile(32, 128, 128, 8, 4)),
        Entry(ANY, ANY, Tile(64, 128, 64, 8, 4)),
    ),
    90: (
        Entry(16, ANY, Tile(16, 128, 128, 8, 4)),
        Entry(32, 4096, Tile(16, 128, 128, 8, 4)),
        Entry(32, ANY, Tile(32, 128, 128, 8, 4)),
        Entry(64, 4096, Tile(16, 128, 128, 8, 4)),
        Entry(128, 1024, Tile(16, 128, 128, 8, 4)),
        Entry(128, 4096, Tile(32, 128, 128, 8, 4)),
        Entry(ANY, 1024, Tile(32, 128, 128, 8, 4)),
        Entry(ANY, ANY, Tile(64, 128, 128, 8, 4)),
    ),
    100: (
        Entry(16, ANY, Tile(16, 128, 128, 8, 4)),
        Entry(32, 4096, Tile(16, 128, 128, 8, 4)),
        Entry(32, ANY, Tile(32, 128, 128, 8, 4)),
        Entry(64, 4096, Tile(16, 128, 128, 8, 4)),
        Entry(128, 1024, Tile(16, 128, 128, 8, 4)),
        Entry(128, 4096, Tile(32, 128, 128, 8, 4)),
        Entry(ANY, 1024, Tile(32, 128, 128, 8, 4)),
        Entry(ANY, ANY, Tile(64, 128, 64, 8, 4)),
    ),
}
DENSE = {
    0: (
        Entry(ANY, 16, Tile(16, 16, 128, 4, 1)),
        Entry(ANY, ANY, Tile(16, 64, 128, 4, 1)),
    ),
    80: (
        Entry(ANY, 16, Tile(16, 16, 128, 4, 3)),
        Entry(16, ANY, Tile(16, 128, 128, 8, 4)),
        Entry(32, ANY, Tile(32, 128, 128, 8, 4)),
        Entry(ANY, ANY, Tile(64, 128, 64, 8, 4)),
    ),
    90: (
        Entry(ANY, 16, Tile(16, 16, 128, 4, 3)),
        Entry(16, ANY, Tile(16, 128, 128, 8, 4)),
        Entry(32, ANY, Tile(32, 128, 128, 8, 4)),
        Entry(ANY, ANY, Tile(64, 128, 128, 8, 4)),
    ),
    100: (
        Entry(ANY, 16, Tile(16, 16, 128, 4, 3)),
        Entry(16, ANY, Tile(16, 128, 128, 8, 4)),
        Entry(32, ANY, Tile(32, 128, 128, 8, 4)),
        Entry(ANY, ANY, Tile(64, 128, 64, 8, 4)),
    ),
}
