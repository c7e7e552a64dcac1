"""The parts of the report: `python -m bench.sweeps PART FILE`, on any device.

A curve has one process for each case, so that none finds memory or libraries that another left;
it ends where a call would take too long or the memory is not enough, and the last row says so.
"""

from __future__ import annotations

import argparse
import resource
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bench.cases import Case, cases, our_names, streamed, yardstick
from bench.clock import elapsed, milliseconds
from bench.fresh import in_fresh_process
from bench.memory import extra_bytes
from bench.parts import Emit, appending
from bench.problems import Problem, photographs, relative_error
from bench.rows import Row
from stf_kernels.cpu_products import has_int8_products, multiply

SECONDS = 0.6  # of the timed rounds of a point
SLOW = 2e3  # milliseconds of a call that is made only once
LONGEST = {True: 60e3, False: 4e3}  # milliseconds that no call takes: ours, others
LEAST_EXTRAPOLATED = 400  # times below this say little about the next point
MEMORY_SHARE = 0.9  # of what is free
CHECKED_ELEMENTS = 1 << 28  # n d, up to which there is an error: float64 takes its time
SLICE = 8  # samples at a time, for an error


@dataclass(frozen=True)
class Shape:
    """The arguments of `photographs`."""

    B: int
    n: int
    size: int = 32
    noise: str = "edm"
    refs: str = "uint8"

    def problem(self, device: torch.device) -> Problem:
        return photographs(**asdict(self), device=str(device))

    def path(self, store: Path) -> Path:
        """Where it is kept for the processes of several cases."""
        return store / f"problem-{self.B}-{self.n}-{self.size}-{self.noise}-{self.refs}"

    def found(self, device: torch.device, store: Path | None) -> Problem:
        """Kept, or made."""
        if store is not None and (path := self.path(store)).exists():
            return torch.load(path, weights_only=False)
        return self.problem(device)

    def first(self) -> Shape:
        """Of the call that loads libraries; KeOps compiles for each d."""
        return Shape(4, 128, self.size)

    def reduced(self) -> Shape:
        """For a trial."""
        return replace(self, B=max(1, self.B // FRACTION), n=self.n // FRACTION)


@dataclass(frozen=True)
class Curve:
    """Cases, and the shapes along which each of them is measured."""

    shapes: tuple[Shape, ...]
    peers: tuple[str, ...]


ALL = ("Gram fp32", "SDPA fp32", "StableVM", "paper", "KeOps", "128 nearest")
KERNELS = tuple(f"SDPA {kernel} fp32" for kernel in ("math", "flash", "efficient", "cuDNN"))
CURVES = {
    "n": Curve(tuple(Shape(64, 1024 << 2 * i) for i in range(6)), ALL),
    "d": Curve(tuple(Shape(64, 1024, size) for size in (8, 16, 32, 64, 128)), ALL),
    "B": Curve(tuple(Shape(4**i, 4096) for i in range(5)), ALL),
    "noise": Curve(
        tuple(Shape(512, 4096, noise=noise) for noise in ("edm", "ve", "flow")),
        ("Gram fp32", "SDPA fp32"),
    ),
    "refs": Curve(
        tuple(
            Shape(64, 4096, refs=refs)
            for refs in (
                *("uint8", "float16", "bfloat16"),
                *("float32, 2 limbs", "float32, 3 limbs", "float32"),
            )
        ),
        (),
    ),
    "kernels": Curve((Shape(512, 4096),), KERNELS),
}
LEVELS, LEVEL_N = 33, 4096  # noise levels, one sample each, and the references for them
PRODUCTS = ((2048, 4096, 3072), (8192, 8192, 8192))  # the first: 512 samples of 4 limbs, n, d
COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 32}
STEPS = {"cpu": (12.0, (4, 40)), "cuda": (15.0, (5, 200))}  # seconds of steps, and how many turns
# Of a trial: what B and n are divided by, and other sizes.
FRACTION, FEW_LEVELS, FEW_STEPS, FEW_IN_FILE = 16, 5, (1.0, (2, 2)), (20_000, 4)


def curve_names(name: str, exact: str) -> list[str]:
    """The cases of a curve, ours first.

    Args:
        name: of CURVES
        exact: ours, by backend and precision
    """
    ours = [exact]
    if name == "n":
        ours.append(f"{exact}, file")
    if name in ("noise", "refs"):
        ours.append(exact.replace("exact", "fast"))
    return [f"STF {by}" for by in (*ours, *CURVES[name].peers)]


def measure(
    case: Case, shapes: Iterable[Shape], device: torch.device, emit: Emit, store: Path | None = None
) -> None:
    """The rows of one case, until there is a reason to stop.

    Args:
        store: a folder that may have the shapes' problems
    """
    ours = case.name in our_names(device)
    size = before = None
    for shape in shapes:
        note = case.missing or _too_long(before, shape, LONGEST[case.name == yardstick(device)])
        if note is None:
            try:
                if shape.size != size:
                    case.build(shape.first().found(device, store))()
                    size = shape.size
                before = point(case, shape, device, store)
                emit(before)
                continue
            except (MemoryError, RuntimeError) as error:  # of torch's allocators, the second
                if ours:
                    raise
                note = _refusal(error)
        emit(replace(empty(case, shape), note=note))
        return


def point(case: Case, shape: Shape, device: torch.device, store: Path | None = None) -> Row:
    """One row. The first call at this shape is the one whose memory counts."""
    problem = shape.found(device, store)
    truth = checked = None
    if problem.data.numel() <= CHECKED_ELEMENTS:
        truth, checked = problem.truth, problem.checked
    call = case.build(problem)
    del problem  # where all are floats, the bytes are in nobody's way
    if device.type == "cuda":
        call()  # what libraries and compilers allocate once is not the call's
    found: list[Tensor] = []
    first: list[float] = []
    extra = extra_bytes(lambda: first.append(elapsed(lambda: found.append(call()))), device)
    score = found.pop() if found else call()
    error = None if truth is None else relative_error(score[checked], truth).amax().item()
    del score
    slow = first and first[0] > SLOW
    ms, rounds = (first[0], 1) if slow else milliseconds(call, device, SECONDS)
    return replace(empty(case, shape), ms=ms, rounds=rounds, error=error, extra_bytes=extra)


def empty(case: Case, shape: Shape) -> Row:
    """The row of a case at a shape, without what was measured."""
    dim = 3 * shape.size**2
    return Row(
        *(case.what, case.by, shape.B, shape.n, dim, None, 0), noise=shape.noise, refs=shape.refs
    )


def _too_long(before: Row | None, shape: Shape, longest: float) -> str | None:
    """Why the next point is not measured, if the time grows with B n d as it should."""
    if before is None or before.ms is None or before.ms < LEAST_EXTRAPOLATED:
        return None
    growth = shape.B * shape.n * 3 * shape.size**2 / (before.B * before.n * before.d)
    expected = before.ms * growth
    return f"{expected / 1e3:.0f} s a call" if expected > longest else None


def _refusal(error: Exception) -> str:
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in text:
        return "out of memory"
    return text[:100]


def limit_memory() -> int:
    """Lets this process have most of the free memory, so that asking for more is an error instead
    of the end of somebody's process; and says how much that is, in bytes.
    """
    free = next(
        1024 * int(line.split()[1])
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemAvailable")
    )
    allowed = int(MEMORY_SHARE * free)
    resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))
    return allowed


def shapes_of(name: str, quick: bool) -> list[Shape]:
    return [shape.reduced() if quick else shape for shape in CURVES[name].shapes]


def keep(shape: Shape, store: Path) -> None:
    """Makes a problem with its truth for all cases of a curve. One without is sooner made again."""
    if shape.n * 3 * shape.size**2 <= CHECKED_ELEMENTS:
        problem = shape.problem(torch.device("cpu"))
        assert problem.truth is not None
        torch.save(problem, shape.path(store))


def curves(name: str, path: Path, device: torch.device, quick: bool) -> None:
    """A curve, each case in a process of its own; on a CPU its problems are made but once."""
    shapes = shapes_of(name, quick) if device.type == "cpu" else []
    shapes += sorted({shape.first() for shape in shapes}, key=lambda shape: shape.size)
    failed = []
    try:
        for shape in shapes:
            keep(shape, path.parent)
        photographs.cache_clear()
        for case in curve_names(name, yardstick(device).removeprefix("STF ")):
            try:
                in_fresh_process(case_alone, name, case, path, device, quick)
            except Exception:  # of the case, or BrokenProcessPool; the others are measured
                traceback.print_exc()
                failed.append(case)
    finally:
        for shape in shapes:
            shape.path(path.parent).unlink(missing_ok=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def case_alone(name: str, case: str, path: Path, device: torch.device, quick: bool) -> None:
    """The rows of a case of a curve, in this process."""
    if device.type == "cpu":
        limit_memory()
    measure(cases(device)[case], shapes_of(name, quick), device, appending(path), store=path.parent)


def rates(device: torch.device, emit: Emit, quick: bool = False) -> None:
    """Products of random matrices, the second one transposed, and a copy."""
    for m, n, k in PRODUCTS if device.type == "cuda" else PRODUCTS[:1]:
        m, n = (m // FRACTION, n // FRACTION) if quick else (m, n)
        for kind, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
            a, b = (torch.randn(rows, k, device=device, dtype=dtype) for rows in (m, n))
            emit(_product(kind, torch.mm, a, b))
        a, b = (torch.randint(-128, 128, (rows, k), device=device) for rows in (m, n))
        if device.type == "cuda" or has_int8_products():
            emit(_product("int8", torch._int_mm, a.to(torch.int8), b.to(torch.int8)))
        else:  # halves of samples, which have 16 bits, by bytes
            out = torch.empty((m, n), dtype=torch.int64)
            halves = (256 * a + a).to(torch.int16)
            emit(_product("int16", partial(multiply, out=out), halves, b.to(torch.int8)))
    size = COPY_BYTES[device.type]
    source = torch.randint(256, (size,), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    ms, rounds = milliseconds(lambda: target.copy_(source), device)
    rate = 2 * size / (ms / 1e3)
    emit(Row("copy", "device, read + written", 1, 1, size, ms, rounds, rate=rate))


def _product(kind: str, product: Callable[[Tensor, Tensor], object], a: Tensor, b: Tensor) -> Row:
    (m, k), n = a.shape, len(b)
    product(a, b.T)
    ms, rounds = milliseconds(lambda: product(a, b.T), a.device)
    return Row("product", kind, m, n, k, ms, rounds, rate=2 * m * n * k / (ms / 1e3))


def errors(device: torch.device, emit: Emit, quick: bool = False) -> None:
    """The error of every case at noise levels from the lowest to the highest, a sample at each.

    Of those that leave references out also that of the posterior mean D = x + sigma^2 score: as
    all the references there are stand in for the data, it is the bias of the target.
    """
    count, n = (FEW_LEVELS, LEVEL_N // FRACTION) if quick else (LEVELS, LEVEL_N)
    problem = photographs(count, n, device=str(device), noise="levels")
    parts = torch.arange(count, device=device).split(SLICE)
    truth = torch.cat([problem.exactly(rows) for rows in parts])
    mean = denoised(problem, truth)
    for case in cases(device).values():
        if case.what != "STF" or case.name == streamed(device).name:
            continue
        if case.missing:
            emit(Row(case.what, case.by, 1, n, 3072, None, 0, note=case.missing))
            continue
        score = torch.cat([_part(problem, rows, case) for rows in parts])
        found = relative_error(score, truth)
        bias = relative_error(denoised(problem, score), mean)
        for i, sigma in enumerate(problem.sigma.tolist()):
            emit(
                Row(
                    *(case.what, case.by, 1, n, problem.x[0].numel(), None, 0),
                    error=found[i].item(),
                    sigma=sigma,
                    bias=bias[i].item() if "nearest" in case.by else None,
                )
            )


def _part(problem: Problem, rows: Tensor, case: Case) -> Tensor:
    x, sigma, source = (value[rows] for value in (problem.x, problem.sigma, problem.source))
    score = case.build(replace(problem, x=x, sigma=sigma, source=source))()
    return score.view_as(x)


def denoised(problem: Problem, score: Tensor) -> Tensor:
    """D = x + sigma^2 score, float64 on the CPU."""
    variance = problem.sigma.cpu().double()[:, None, None, None] ** 2
    return problem.x.cpu().double() + variance * score.cpu().double()


def steps(device: torch.device, emit: Emit, quick: bool = False) -> None:
    """Training steps with either target, taken in turn."""
    from bench import training  # curves do without the time this takes

    for system in training.SYSTEMS[device.type]:
        for row in system(str(device)).measured(*FEW_STEPS if quick else STEPS[device.type]):
            emit(row)


def larger(device: torch.device, emit: Emit, quick: bool = False) -> None:
    """References in a file larger than memory."""
    from bench import larger_than_memory

    for row in larger_than_memory.measured(*FEW_IN_FILE if quick else ()):
        emit(row)


PARTS: dict[str, Callable[[torch.device, Emit, bool], None]] = {
    "rates": rates,
    "errors": errors,
    "training": steps,
    "larger": larger,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.sweeps", description=__doc__)
    parser.add_argument("part", choices=[*PARTS, *CURVES])
    parser.add_argument("rows", type=Path, metavar="FILE", help="to append rows to")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="n and B divided by 16: a trial")
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.part in PARTS:
        PARTS[options.part](device, appending(options.rows), options.quick)
    else:
        curves(options.part, options.rows, device, options.quick)


if __name__ == "__main__":
    main()
