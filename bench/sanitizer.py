"""The CUDA backend under NVIDIA's compute-sanitizer, where that is: `python -m bench.sanitizer`.

memcheck finds accesses out of bounds, racecheck threads that share memory without a barrier.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import torch

from bench.parts import ROOT
from stf_kernels import References, cuda_backend, stable_target, stable_target_with_stats

TOOLS = ("memcheck", "racecheck")
SHAPES = ((1, 1, 1), (70, 300, 144), (65, 700, 61))  # B, n, d: ragged, in vectors, out of them


def main() -> int:
    """The command; its exit status."""
    folders = [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    command = shutil.which("compute-sanitizer", path=os.pathsep.join(folders))
    reason = cuda_backend.unavailable(torch.device("cuda"))
    if reason is not None or command is None:
        print(f"not checked: {reason or 'compute-sanitizer is not installed'}")
        return 0
    script = (sys.executable, "-m", "bench.sanitizer", "calls")
    statuses = {
        tool: subprocess.run(
            [command, "--tool", tool, "--error-exitcode", "1", *script], cwd=ROOT
        ).returncode
        for tool in TOOLS
    }
    print(
        ", ".join(f"{tool}: {'failed' if status else 'clean'}" for tool, status in statuses.items())
    )
    return int(any(statuses.values()))


def calls(device: torch.device) -> None:
    """Targets that reach every kernel, with few survivors and with many."""
    generator = torch.Generator().manual_seed(0)
    for choice in ("portable", "auto"):
        cuda_backend.PRODUCTS = dict.fromkeys(cuda_backend.PRODUCTS, choice)
        for B, n, d in SHAPES:
            x = torch.randn(B, d, generator=generator).to(device)
            levels = torch.randint(0, 256, (n, d), generator=generator, dtype=torch.uint8)
            levels = levels.to(device)
            sigma = torch.logspace(-2, 2, B, device=device)
            refs = References(levels, value_range=(-1, 1))
            stable_target_with_stats(x, refs, sigma, backend="cuda")
            floats = References(levels.float() / 99, limbs=3)
            x64 = x.double()
            stable_target(x64, floats, sigma, precision="fast", backend="cuda")
            stable_target(x64, floats, sigma, noise="student_t", D=64, backend="cuda")
            stable_target(x, levels.float(), sigma, backend="cuda").cpu()  # waits for all


if __name__ == "__main__":
    if sys.argv[1:] == ["calls"]:
        calls(torch.device("cuda"))
    else:
        sys.exit(main())
