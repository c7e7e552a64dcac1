"""What no scheme of its kind can be faster than, from the rates that were measured beside it.

Calculated, not measured: operations over the best rate of a product, bytes over that of a copy.
"""

from __future__ import annotations

from collections.abc import Sequence

from bench.rows import Row

# Operations of each kind, in parts of B n d. One product of one digit, or of a half, which is two,
# is the least that looks at every reference; with four limbs and every row dense there are eight.
PRODUCTS = {
    "two fp32 products": ("fp32", 4),
    "two bf16 products": ("bf16", 4),
    "one int8 product": ("int8", 2),
    "one int16 product": ("int16", 2),
    "two int8 products, four limbs": ("int8", 16),
}
READ = "reading n d bytes"


def floors(rows: Sequence[Row], B: int, n: int, d: int) -> dict[str, float]:
    """Milliseconds by name, of those whose rate is among the rows."""
    found = {}
    for name, (kind, operations) in PRODUCTS.items():
        if best := best_rate(rows, "product", kind):
            found[name] = 1e3 * operations * B * n * d / best
    if best := best_rate(rows, "copy"):
        found[READ] = 1e3 * n * d / best
    return found


def best_rate(rows: Sequence[Row], what: str, kind: str | None = None) -> float | None:
    """Operations or bytes a second."""
    return max(
        (
            row.rate
            for row in rows
            if row.what == what and kind in (None, row.by) and row.rate is not None
        ),
        default=None,
    )
