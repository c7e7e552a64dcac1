"""Everything that is timed for a target, by name; the same list on every device."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench import peers
from bench.peers import Floats
from bench.problems import Problem
from stf_kernels import References, stable_target
from stf_kernels.backends import BACKENDS, resolve

Call = Callable[[], Tensor]
Peer = Callable[[Tensor, Floats, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One way to a target. `build` prepares whatever a user would prepare once."""

    what: str  # "DSM" or "STF"
    by: str
    build: Callable[[Problem], Call]
    slow: bool = False  # seconds a call, or gigabytes a row: few samples, one round on a CPU
    missing: str | None = None  # why it cannot be measured here

    @property
    def name(self) -> str:
        return f"{self.what} {self.by}"


def cases(device: torch.device) -> dict[str, Case]:
    """All cases of a device by name: the plain target, our backends, then the peers."""
    found = [Case("DSM", "-", denoising), *ours(device), streamed(device)]
    found += [Case("STF", "paper", peer(peers.paper), slow=True)]
    found += [
        Case("STF", "Gram fp32", peer(peers.gram)),
        Case("STF", "SDPA fp32", peer(peers.sdpa)),
    ]
    found += [Case("STF", "KeOps", peer(peers.keops), slow=True, missing=peers.keops_missing())]
    if device.type == "cuda":
        bf16 = torch.bfloat16
        found += [
            Case("STF", "Gram fp32 compiled", peer(peers.gram, compiled=True)),
            Case("STF", "Gram tf32", peer(peers.gram, products="high")),
            Case("STF", "Gram tf32 compiled", peer(peers.gram, products="high", compiled=True)),
            Case("STF", "Gram bf16", peer(peers.gram, bf16)),
            Case("STF", "Gram bf16 compiled", peer(peers.gram, bf16, compiled=True)),
            Case("STF", "SDPA bf16", peer(peers.sdpa, bf16)),
        ]
    return {case.name: case for case in found}


def ours(device: torch.device) -> list[Case]:
    """Each backend that runs on the device, the one `auto` takes first, in both precisions."""
    first = resolve("auto", device).NAME
    names = [first, *(name for name in BACKENDS if name != first)]
    return [
        Case("STF", f"{name} {precision}", stable(name, precision))
        for name in names
        if BACKENDS[name].unavailable(device) is None
        for precision in ("exact", "fast")
    ]


def streamed(device: torch.device) -> Case:
    """The exact one with references in a file, of which a few chunks at a time are in memory."""
    name = resolve("auto", device).NAME

    def build(problem: Problem) -> Call:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "references.stf")
            problem.refs.save(path)
            refs = References.from_file(path, device=device)  # stays open when the name is gone
        return lambda: stable_target(problem.x, refs, problem.sigma, backend=name)

    return Case("STF", f"{name} exact, file", build)


def yardstick(device: torch.device) -> str:
    """The case that the others are divided by: exact, on the backend that `auto` takes."""
    return f"STF {resolve('auto', device).NAME} exact"


def denoising(problem: Problem) -> Call:
    """(y - x) / sigma^2 with y the source itself: the target of denoising score matching."""

    def call() -> Tensor:
        variance = problem.sigma[:, None, None, None] ** 2
        return (problem.refs.decode(problem.source) - problem.x) / variance

    return call


def stable(backend: str, precision: str) -> Callable[[Problem], Call]:
    def build(problem: Problem) -> Call:
        return lambda: stable_target(
            problem.x, problem.refs, problem.sigma, precision=precision, backend=backend
        )

    return build


def peer(
    function: Peer,
    dtype: torch.dtype = torch.float32,
    *,
    products: str = "highest",
    compiled: bool = False,
) -> Callable[[Problem], Call]:
    """A peer on the float values of the references.

    Args:
        function: of bench/peers.py
        dtype: of the matrix products
        products: what torch.set_float32_matmul_precision gets for the call: "high" is tf32
        compiled: through torch.compile
    """

    def build(problem: Problem) -> Call:
        ref = peers.prepare(problem.refs.decode(), dtype)
        x = problem.x.flatten(1)
        score = function
        if compiled:
            torch.compiler.reset()  # or the ninth shape or precision of a function runs eagerly
            score = torch.compile(function, dynamic=False)

        def call() -> Tensor:
            torch.set_float32_matmul_precision(products)
            return score(x, ref, problem.sigma)

        return call

    return build
