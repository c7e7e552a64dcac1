"""References larger than memory: `python -m bench.larger_than_memory [n] [B]`.

Makes a file of n references 3x64x64 (1 281 167, as ImageNet has, if not said otherwise: 15.7 GB),
mostly a hole: one in SPACING is a patch of a photograph, the rest are black, which takes no disk
but has to be read and multiplied like anything else. Then it computes the targets of B samples from
it, and measures seconds and peak memory. The truth for it is a small set: the patches, and one
black image with the logarithm of their number as `log_weight`.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.clock import elapsed
from bench.memory import extra_bytes
from bench.problems import VALUE_RANGE, photographs, relative_error
from bench.rows import MB, Row
from stf_kernels import References, stable_target

N, B, SIZE, SPACING = 1_281_167, 16, 64, 1000


def measured(n: int = N, B: int = B) -> list[Row]:
    """A row for reading the file once, for the norms, and one for the targets."""
    patches = photographs(B, n // SPACING, SIZE)
    dim = patches.x[0].numel()
    # Not in a /tmp that may lie in memory.
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", Path.cwd())) as folder:
        path = Path(folder, "references.npy")
        file = np.lib.format.open_memmap(path, "w+", np.uint8, (n, *patches.data.shape[1:]))
        file[: len(patches.data) * SPACING : SPACING] = patches.data.numpy()
        file.flush()
        del file
        opened: list[References] = []
        reading = elapsed(
            lambda: opened.append(References.from_file(path, value_range=VALUE_RANGE))
        )
        found: list[Tensor] = []
        times: list[float] = []

        def call() -> None:
            found.append(stable_target(patches.x, opened[0], patches.sigma, target="denoised"))

        grown = extra_bytes(lambda: times.append(elapsed(call)), torch.device("cpu"))

    black = torch.zeros(1, *patches.data.shape[1:], dtype=torch.uint8)
    weight = torch.zeros(len(patches.data) + 1, dtype=torch.float64)
    weight[-1] = math.log(n - len(patches.data))
    few = References(torch.cat([patches.data, black]), value_range=VALUE_RANGE, log_weight=weight)
    expected = stable_target(patches.x, few, patches.sigma, target="denoised")
    error = relative_error(found[0], expected.double()).amax().item()
    return [
        Row("file", "read for the norms", 1, n, dim, reading, 1),
        Row("file", "targets", B, n, dim, times[0], 1, error=error, extra_bytes=grown),
    ]


def main(n: int, B: int) -> None:
    print(f"{n} references of 3x{SIZE}x{SIZE}; {B} samples; {torch.get_num_threads()} threads")
    for row in measured(n, B):
        print(row)
        if row.extra_bytes is not None:
            print(f"{row.extra_bytes / MB:.0f} MB at the peak, largest error {row.error:.1e}")


if __name__ == "__main__":
    main(*(int(given) for given in (*sys.argv[1:], *map(str, (N, B)[len(sys.argv) - 1 :]))))
