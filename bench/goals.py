"""What a CPU run is to show (two cores with AVX-512 VNNI), held against its rows."""

from __future__ import annotations

from collections.abc import Iterable

from bench.rows import MB, Row

Key = tuple[str, str, int, int]


def verdicts(rows: Iterable[Row]) -> list[str]:
    """One line a goal: reached or missed, or that the rows for it are not all there."""
    found = {(row.what, row.by, row.B, row.n): row for row in rows}
    ours, small = ("STF", "cpu exact", 512, 4096), ("STF", "cpu exact", 64, 4096)
    large, streamed = (("STF", f"cpu exact{where}", 64, 50_000) for where in ("", ", file"))
    added = [100 * row.overhead for row in found.values() if row.overhead is not None]
    extra = found[ours].extra_bytes if ours in found else None
    measured = [
        ("Gram fp32 / ours", 3.0, _ratio(found, ("STF", "Gram fp32", 512, 4096), ours)),
        ("SDPA fp32 / ours", 3.0, _ratio(found, ("STF", "SDPA fp32", 512, 4096), ours)),
        ("paper / ours at B = 64", 1000.0, _ratio(found, ("STF", "paper", 64, 4096), small)),
        ("resident / from a file, n = 50 000", 0.7, _ratio(found, large, streamed)),
        ("extra memory, MB", -64.0, None if extra is None else extra / MB),
        ("STF on a digits step, %", -2.0, added[0] if added else None),
    ]
    return [_verdict(*line) for line in measured]


def _ratio(found: dict[Key, Row], above: Key, below: Key) -> float | None:
    times = [found[key].ms if key in found else None for key in (above, below)]
    return times[0] / times[1] if times[0] and times[1] else None


def _verdict(name: str, bound: float, value: float | None) -> str:
    """A positive bound is a lower one, a negative one an upper one."""
    goal = f"{name}: at {'least' if bound > 0 else 'most'} {abs(bound):g}"
    if value is None:
        return f"{goal}, not measured"
    reached = value >= bound if bound > 0 else value <= -bound
    return f"{goal}, {'reached' if reached else 'MISSED'}: {value:.3g}"
