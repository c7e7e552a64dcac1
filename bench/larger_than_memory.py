"""References larger than memory: `python -m bench.larger_than_memory [n] [B]`.

Makes a file of n references 3x64x64 (1 281 167, as ImageNet has, if not said otherwise: 15.7 GB),
mostly a hole: one in SPACING is a patch of a photograph, the rest are black, which takes no disk
but has to be read and multiplied like anything else. Then it computes the targets of B samples from
it and prints seconds and peak memory. The truth for it is a small set: the patches, and one black
image with the logarithm of their number as `log_weight`.
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.memory import extra_bytes
from bench.problems import VALUE_RANGE, photographs
from stf_kernels import References, stable_target

N, B, SIZE, SPACING = 1_281_167, 64, 64, 1000


def main(n: int, B: int) -> None:
    patches = photographs(B, n // SPACING, SIZE)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        path = Path(folder, "references.npy")
        shape = (n, *patches.data.shape[1:])
        file = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
        file[: len(patches.data) * SPACING : SPACING] = patches.data.numpy()
        file.flush()
        del file
        start = time.perf_counter()
        refs = References.from_file(path, value_range=VALUE_RANGE)
        opened = time.perf_counter() - start

        found = []

        def call() -> Tensor:
            found.append(stable_target(patches.x, refs, patches.sigma, target="denoised"))
            return found[0]

        start = time.perf_counter()
        grown = extra_bytes(call, torch.device("cpu"))
        seconds = time.perf_counter() - start

    black = torch.zeros(1, *patches.data.shape[1:], dtype=torch.uint8)
    weight = torch.zeros(len(patches.data) + 1, dtype=torch.float64)
    weight[-1] = math.log(n - len(patches.data))
    few = References(torch.cat([patches.data, black]), value_range=VALUE_RANGE, log_weight=weight)
    expected = stable_target(patches.x, few, patches.sigma, target="denoised")
    error = (found[0] - expected).abs().max().item()
    size = n * patches.x[0].numel()
    print(f"{n} references, {size / 1e9:.1f} GB; {B} samples; {torch.get_num_threads()} threads")
    print(f"read once for the norms: {opened:.1f} s")
    print(f"targets: {seconds:.1f} s, {grown / 1e6:.0f} MB at the peak, largest error {error:.1e}")


if __name__ == "__main__":
    main(*(int(given) for given in (*sys.argv[1:], *map(str, (N, B)[len(sys.argv) - 1 :]))))
