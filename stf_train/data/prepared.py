"""Prepared references in a file, as `References.save` leaves them."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open

from stf_kernels import References
from stf_train.data.dataset import DataSet
from stf_train.data.source import check_memory

SUFFIX = ".stf"


def load(path: Path, value_range: tuple[float, float], labelled: bool, resident: bool) -> DataSet:
    """The references in a file, with as many levels in `value_range` as their step makes.

    Raises:
        FileNotFoundError: there is none.
        MemoryError: they are larger than the memory, and to be resident.
        ValueError: it is no such file, or its bytes do not begin and end with value_range.
    """
    references = References.from_file(path)
    if not labelled:
        references.labels = None
    with safe_open(path, "pt") as file:
        step, offset = file.get_tensor("affine").tolist()  # y = step v + offset
    levels = None
    # Floats lie on a grid about 0; bytes 0, 1, ... are v = -128, -127, ...
    if references.limbs == 1 and offset != 0:
        lo, hi = value_range
        levels = 1 + round((hi - lo) / step)
        low, high = offset - 128 * step, offset + (levels - 129) * step
        if not 2 <= levels <= 256 or max(abs(low - lo), abs(high - hi)) > 1e-9 * (hi - lo):
            raise ValueError(
                f"value_range must be that of the references in {path}, which begin at {low:g} "
                f"and rise by {step:g}, got {value_range}"
            )
    if resident:
        check_memory(path.stem, references.nbytes)
        references = references.load()
    return DataSet(
        path.stem, "all", references, value_range if levels is not None else None, levels
    )
