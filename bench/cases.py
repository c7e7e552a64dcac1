"""Everything that is timed for a target, by name; the same list on every device."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from bench import peers
from bench.peers import Floats
from bench.problems import Problem
from stf_kernels import References, stable_target
from stf_kernels.backends import BACKENDS, resolve

Call = Callable[[], Tensor]
Peer = Callable[[Tensor, Floats, Tensor], Tensor]

KERNELS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
}
NEAREST = (16, 128, 1024)
# What is also measured without the host, which is slower to launch some calls than a GPU to run
# them: in a CUDA graph, as a step of training may be.
GRAPHS = ("triton exact", "cuda exact", "Gram fp32 compiled", "Gram bf16 compiled")


@dataclass(frozen=True)
class Case:
    """One way to a target. `build` prepares whatever a user would prepare once."""

    what: str  # "DSM" or "STF"
    by: str
    build: Callable[[Problem], Call]
    slow: bool = False  # seconds a call, or gigabytes a row: few samples, one round on a CPU
    aside: bool = False  # for the report: `pytest bench/` leaves it out
    check: Callable[[], str | None] = lambda: None

    @property
    def missing(self) -> str | None:
        """Why it cannot be measured here, or None; asking may compile something."""
        return self.check()

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
    found += [Case("STF", "KeOps", peer(peers.keops), slow=True, check=peers.keops_missing)]
    found += [Case("STF", "StableVM", peer(peers.stable_vm), slow=True)]
    found += [attention(kernel, torch.float32, device) for kernel in KERNELS]
    found += [
        Case(
            "STF",
            f"{k} nearest",
            truncated(k),
            aside=True,
            check=partial(peers.faiss_missing, device),
        )
        for k in NEAREST
    ]
    found += [Case("STF", "Gram bf16", peer(peers.gram, torch.bfloat16), aside=True)]
    if device.type == "cuda":
        bf16 = torch.bfloat16
        found += [
            Case("STF", "Gram fp32 compiled", peer(peers.gram, compiled=True)),
            Case("STF", "Gram tf32", peer(peers.gram, products="high")),
            Case("STF", "Gram tf32 compiled", peer(peers.gram, products="high", compiled=True)),
            Case("STF", "Gram bf16 compiled", peer(peers.gram, bf16, compiled=True)),
            Case("STF", "SDPA bf16", peer(peers.sdpa, bf16)),
            *(attention(kernel, bf16, device) for kernel in KERNELS),
        ]
        found += [replayed(case) for case in found if case.by in GRAPHS]
    return {case.name: case for case in found}


def ours(device: torch.device) -> list[Case]:
    """Each backend that runs on the device, the one `auto` takes first, in both precisions."""
    first = resolve("auto", device).NAME
    names = [first, *(name for name in BACKENDS if name != first)]
    slow = {"torch"} if device.type == "cpu" else set()
    return [
        Case("STF", f"{name} {precision}", stable(name, precision), slow=name in slow)
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
        x, sigma = problem.x, problem.sigma
        return lambda: stable_target(x, refs, sigma, backend=name)

    return Case("STF", f"{name} exact, file", build)


def replayed(case: Case) -> Case:
    """The same call, recorded once in a CUDA graph."""

    def build(problem: Problem) -> Call:
        call = case.build(problem)
        call()  # what is compiled or kept at the first call is not recorded
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay

    return replace(case, by=f"{case.by}, graph", build=build)


def our_names(device: torch.device) -> set[str]:
    """The cases that must not fail."""
    mine = ours(device)
    graphs = [replayed(case) for case in mine if case.by in GRAPHS and device.type == "cuda"]
    return {"DSM -", streamed(device).name, *(case.name for case in (*mine, *graphs))}


def yardstick(device: torch.device) -> str:
    """The case that the others are divided by: exact, on the backend that `auto` takes."""
    return f"STF {resolve('auto', device).NAME} exact"


def attention(kernel: str, dtype: torch.dtype, device: torch.device) -> Case:
    """Attention by one of torch's kernels, whichever torch would take."""
    short = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    return Case(
        "STF",
        f"SDPA {kernel} {short}",
        peer(partial(peers.sdpa_with, KERNELS[kernel]), dtype),
        aside=True,
        check=partial(peers.sdpa_missing, KERNELS[kernel], device, dtype),
    )


def truncated(k: int) -> Callable[[Problem], Call]:
    """The k nearest references, found by FAISS."""

    def build(problem: Problem) -> Call:
        import faiss

        ref = peers.prepare(problem.refs.decode())
        index = faiss.IndexFlatL2(ref.y.shape[1])
        index.add(ref.y.numpy())
        x, sigma = problem.x.flatten(1), problem.sigma
        return lambda: peers.nearest(x, ref, sigma, index, k)

    return build


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
        x, sigma = problem.x.flatten(1), problem.sigma
        score = function
        if compiled:
            torch.compiler.reset()  # or the ninth shape or precision of a function runs eagerly
            score = torch.compile(function, dynamic=False)

        def call() -> Tensor:
            torch.set_float32_matmul_precision(products)
            return score(x, ref, sigma)

        return call

    return build
