"""`python -m stf_kernels.golden`: do the golden targets have the recorded bits, however computed?

Every backend and device that runs here, every instruction set of the C++ code, several numbers of
threads and processes, references in memory and in a file, and the least workspace there is.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from .backends import BACKENDS
from .extension import extension
from .golden_inputs import CASES, RECORDED, Problem, digest
from .references import References
from .target import WORKSPACE

PROCESSES = (1, 2, 3, 4)
PATIENCE = timedelta(minutes=5)


@dataclass(frozen=True)
class Way:
    """One way to compute the targets; none may change a bit."""

    device: str
    backend: str
    code: str = ""  # of the backend cpu: the instruction set of its C++
    threads: int = 1
    references: str = "resident"  # or in a "file", or in "host" memory for a GPU
    workspace: str = "default"  # or the "least" that a call accepts: a block of references a chunk
    processes: int = 0  # that share the references by torch.distributed; 0 is a plain call


@dataclass(frozen=True)
class Outcome:
    """What came of one way."""

    way: Way
    digests: dict[str, str]  # of each case
    failure: str = ""  # why there are none

    @property
    def different(self) -> list[str]:
        """The cases whose bits are not the recorded ones."""
        return [case for case, found in self.digests.items() if found != RECORDED[case]]

    @property
    def verdict(self) -> str:
        if self.failure:
            return f"FAILED: {self.failure}"
        return f"DIFFERENT: {', '.join(self.different)}" if self.different else "equal"


def fingerprint(digests: dict[str, str]) -> str:
    """One sha256 of all cases: that of their hashes as text, a line each, in the order of CASES."""
    return hashlib.sha256("".join(f"{digests[case]}\n" for case in CASES).encode()).hexdigest()


def absent() -> dict[str, str]:
    """What does not run here, and why."""
    reasons = {}
    if not torch.cuda.is_available():
        reasons["cuda"] = "torch sees no CUDA device"
    for device in _devices():
        for name, backend in BACKENDS.items():
            reason = backend.unavailable(torch.device(device))
            if reason is not None:
                reasons[f"{device} {name}"] = reason
    if not _has_gloo():
        reasons["processes"] = "this PyTorch is built without Gloo"
    return reasons


def ways() -> Iterator[Way]:
    """All ways of this machine."""
    skipped = absent()
    for device in _devices():
        for name in BACKENDS:
            if f"{device} {name}" in skipped:
                continue
            if device == "cpu" and name == "triton":
                yield Way(device, name)  # interpreted, slowly
                continue
            codes = extension().isas() if name == "cpu" else [""]  # the best one first
            plain = Way(device, name, codes[0])
            for code in codes:
                yield from (replace(plain, code=code, threads=count) for count in _threads(device))
            yield replace(plain, workspace="least")
            for where in ("file",) if device == "cpu" else ("host", "file"):
                yield replace(plain, references=where)
                yield replace(plain, references=where, workspace="least")
            if device == "cpu" and _has_gloo():
                yield from (replace(plain, processes=count) for count in PROCESSES)


def check(chosen: Iterable[Way]) -> Iterator[Outcome]:
    """The outcomes of the ways, those of several processes last."""
    shared = []
    for way in chosen:
        if way.processes:
            shared.append(way)
            continue
        yield _attempt(way, partial(_hashes, way))
    if shared:
        yield from _shared(shared)


def report(outcomes: Iterable[Outcome], every_case: bool = False) -> list[str]:
    """Lines to print: the cases that differ, or every case; the ways; and what did not run."""
    names = [field.name for field in fields(Way)]
    cases, table = [], [[*names, "sha256 of all targets", "is"]]
    for outcome in outcomes:
        way = [str(value or "-") for value in asdict(outcome.way).values()]
        for case, found in outcome.digests.items():
            if every_case or case in outcome.different:
                verdict = "DIFFERENT" if case in outcome.different else "equal"
                cases.append(f"{' '.join(way)}: {case:20} {found} {verdict}")
        found = "-" if outcome.failure else fingerprint(outcome.digests)
        table.append([*way, found, outcome.verdict])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in table]
    return [*cases, *lines, *(f"not run: {name}: {why}" for name, why in absent().items())]


def status(outcomes: Iterable[Outcome]) -> int:
    """The exit status: 1 where a bit is not as recorded, or was not computed."""
    return int(any(outcome.verdict != "equal" for outcome in outcomes))


def _devices() -> list[str]:
    return ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]


def _has_gloo() -> bool:
    return dist.is_available() and dist.is_gloo_available()


def _threads(device: str) -> list[int]:
    return sorted({1, 2, os.cpu_count() or 1}) if device == "cpu" else [1]


def _attempt(way: Way, hashes: Callable[[], dict[str, str]]) -> Outcome:
    try:
        with _set_to(way):
            return Outcome(way, hashes())
    except Exception as error:
        return Outcome(way, {}, f"{type(error).__name__}: {error}")


def _hashes(way: Way) -> dict[str, str]:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for case, build in CASES.items():
            problem = build(way.device)
            refs = _placed(problem.refs, way.references, Path(folder, case))
            problem = problem._replace(refs=refs)
            workspace = WORKSPACE if way.workspace == "default" else _least(problem, way.backend)
            found[case] = digest(problem.compute(backend=way.backend, workspace=workspace))
            del problem, refs  # which hold the file
    return found


@contextmanager
def _set_to(way: Way) -> Iterator[None]:
    """The number of threads and the instruction set of a way, for a while."""
    threads, compiled = torch.get_num_threads(), extension()
    code = compiled.isa() if way.code else ""
    try:
        torch.set_num_threads(way.threads)
        if way.code:
            compiled.use_isa(way.code)
        yield
    finally:
        torch.set_num_threads(threads)
        if way.code:
            compiled.use_isa(code)


def _placed(refs: References, where: str, path: Path) -> References:
    if where == "resident":
        return refs
    if where == "host":
        return refs.offload()
    refs.save(path)
    return References.from_file(path, device=refs.device)


def _least(problem: Problem, backend: str) -> int:
    """The smallest workspace that a call accepts, by its own word."""
    try:
        problem.compute(backend=backend, workspace=1)
    except ValueError as error:
        found = re.search(r"workspace must be at least (\d+) bytes", str(error))
        if found is None:
            raise
        return int(found[1])
    return 1


def _shared(chosen: list[Way]) -> Iterator[Outcome]:
    """Ways of several processes, in processes that are started once for all."""
    count = max(way.processes for way in chosen)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(count, context) as pool:
        work = [pool.submit(_process, rank, count, chosen, folder) for rank in range(count)]
        try:
            found, *_ = [future.result() for future in work]
        except Exception as error:
            found = [Outcome(way, {}, f"{type(error).__name__}: {error}") for way in chosen]
    yield from found


def _process(rank: int, count: int, chosen: list[Way], folder: str) -> list[Outcome]:
    """One of the processes; the first one returns the outcomes."""
    store = Path(folder, "store").as_uri()
    dist.init_process_group("gloo", store, rank=rank, world_size=count, timeout=PATIENCE)
    try:
        outcomes = []
        for way in chosen:
            group = dist.new_group(range(way.processes), timeout=PATIENCE)
            if rank < way.processes:
                outcomes.append(_attempt(way, partial(_hashes_of_all, way, group)))
            dist.barrier()
        return outcomes
    finally:
        dist.destroy_process_group()


def _hashes_of_all(way: Way, group: dist.ProcessGroup) -> dict[str, str]:
    """The hashes of what each process computes of the rows that are its own, with its shard."""
    found = {}
    for case, build in CASES.items():
        problem = build(way.device)
        rank, rows = dist.get_rank(group), len(problem.x)
        mine = slice(rows * rank // way.processes, rows * (rank + 1) // way.processes)
        sharded = problem._replace(refs=problem.refs.shard(group))
        parts: list[Tensor] = [torch.empty(0)] * way.processes
        dist.all_gather_object(
            parts, sharded.compute(mine, backend=way.backend, group=group), group
        )
        found[case] = digest(problem.join(parts))
    return found


def main() -> int:
    """The command; its exit status is 1 where a bit is not as recorded."""
    parser = argparse.ArgumentParser(
        prog="python -m stf_kernels.golden",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cases", action="store_true", help="print the hash of every case")
    options = parser.parse_args()
    outcomes = list(check(ways()))
    print("\n".join(report(outcomes, options.cases)))
    return status(outcomes)


if __name__ == "__main__":
    sys.exit(main())
