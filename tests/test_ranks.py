"""References in shards on several processes: the bits of one, and errors that reach all of them.

Four processes are started once. They form groups of one to four and run every case below, each on
samples of its own; the tests are about what they report.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import re
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import helpers
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from stf_kernels import (
    EDM,
    BackendUnavailable,
    References,
    Velocity,
    pipeline,
    stable_target,
    stable_target_with_stats,
    torch_backend,
)
from stf_kernels.backends import resolve
from stf_kernels.ranks import Group

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs Gloo"
)

WORLD = 4
TIMEOUT = timedelta(seconds=10)  # of the group in which a process is killed
PATIENCE = timedelta(seconds=60)  # of the others under test: nothing in them waits in vain
MEMBERS = {1: [0], 2: [2, 3], 3: [1, 2, 3], 4: [0, 1, 2, 3]}
BATCHES = (5, 0, 7, 1)  # samples of each rank
SHAPE = (3, 4, 4)
DATA = helpers.random_bytes(700, *SHAPE)


class Here(NamedTuple):
    """One process in a group."""

    group: dist.ProcessGroup
    rank: int
    size: int
    folder: Path

    @property
    def odd(self) -> bool:
        """Whether this is the one process that does something else; it has samples."""
        return self.rank == 2 % self.size


def byte_references(n: int = 700, **options: object) -> References:
    return References(DATA[:n], value_range=(-1, 1), **options)


def batch(here: Here, refs: References, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Samples around references of several shards, and their noise levels."""
    rows = BATCHES[here.rank]
    sigma = torch.logspace(-2, 2, max(rows, 1))[:rows]
    clean = refs.decode(sources(rows, len(refs))).double()
    return helpers.noisy(clean, sigma, seed=100 * here.rank + seed), sigma


def sources(rows: int, n: int) -> Tensor:
    return torch.arange(rows) * 389 % n


@contextmanager
def recorded(owner: object, name: str) -> Iterator[list[tuple[tuple, Any]]]:
    """Arguments and result of each call of a function."""
    function, calls = getattr(owner, name), []

    def wrapper(*args: Any) -> Any:
        result = function(*args)
        calls.append((args, result))
        return result

    with mock.patch.object(owner, name, wrapper):
        yield calls


def everyone(here: Here, value: Any) -> list[Any]:
    """Every process's value."""
    values = [None] * here.size
    dist.all_gather_object(values, value, here.group)
    return values


def bits(result: Tensor | tuple) -> list[Tensor]:
    tensors = [result] if isinstance(result, Tensor) else [result[0], *result[1]]
    integers = {torch.float32: torch.int32, torch.float64: torch.int64}
    return [t.view(integers.get(t.dtype, t.dtype)) for t in tensors]


def assert_same_bits(one: Tensor | tuple, other: Tensor | tuple) -> None:
    for a, b in zip(bits(one), bits(other), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def compare(
    here: Here,
    refs: References,
    x: Tensor,
    sigma: Tensor | float,
    call: Callable = stable_target_with_stats,
    log_weight: Tensor | None = None,
    whole: References | None = None,
    **options: object,
) -> Tensor | tuple:
    """Shards give this process the bits that the whole set gives it alone."""
    shard = refs.shard(here.group)
    first = shard._shard[0]
    part = None if log_weight is None else log_weight[first : first + len(shard)]
    got = call(x, shard, sigma, group=here.group, log_weight=part, **options)
    expected = call(x, refs if whole is None else whole, sigma, log_weight=log_weight, **options)
    assert_same_bits(got, expected)
    return expected


def targets(here: Here, backend: str) -> None:
    refs = byte_references()
    x, sigma = batch(here, refs)
    kinds = ["score", "denoised", "epsilon", "v", "velocity", EDM(0.7), Velocity(sigma, 1.0)]
    for precision in helpers.PRECISIONS:
        for kind in kinds:
            compare(
                here,
                refs,
                x,
                sigma,
                stable_target,
                alpha=1 / (1 + sigma),
                target=kind,
                precision=precision,
                backend=backend,
            )


def statistics(here: Here, backend: str) -> None:
    refs = byte_references()
    x, sigma = batch(here, refs)
    for precision in helpers.PRECISIONS:
        _, stats = compare(here, refs, x, sigma, precision=precision, backend=backend)
        assert stats.argmax[:2].tolist() == [0, 389][: len(x)]  # of several shards


def equal_weights(here: Here, backend: str) -> None:
    """Of the same reference in every shard, the first is the argmax."""
    refs = References(DATA[:1].repeat(700, 1, 1, 1), value_range=(-1, 1))
    x, sigma = batch(here, refs)
    _, stats = compare(here, refs, x, sigma, backend=backend)
    assert not bool(stats.argmax.any())


def floats(here: Here, backend: str) -> None:
    data = helpers.byte_values(DATA[:300]).float() ** 3
    for limbs in (None, 2):
        refs = References(data, limbs=limbs)
        x, sigma = batch(here, refs)
        compare(here, refs, x, sigma, backend=backend)
        compare(here, refs, x.double() + 1e-9, sigma.double(), stable_target, backend=backend)
        compare(here, refs, x.bfloat16(), sigma, stable_target, backend=backend)


def labels(here: Here, backend: str) -> None:
    """Classes in all shards (0 to 2), in the last only (3); -1 sees all."""
    classes = torch.arange(700) % 3
    classes[-5:] = 3
    refs = byte_references(labels=classes)
    x, sigma = batch(here, refs)
    wanted = torch.tensor([0, 3, -1, 1, 2, 3, 0])[: len(x)]
    compare(here, refs, x, sigma, labels=wanted, backend=backend)
    compare(here, refs, x[:0], sigma[:0], labels=wanted[:0], backend=backend)


def log_weight(here: Here, backend: str) -> None:
    """A shard left out entirely, one in part; one's own and the call's; none left."""
    weight = torch.randn(700, generator=helpers.generator(7))
    weight[:130] = weight[500:520] = -torch.inf
    refs, weighted = byte_references(), byte_references(log_weight=weight)
    x, sigma = batch(here, refs)
    compare(here, refs, x, sigma, log_weight=weight, backend=backend)
    compare(here, weighted, x, sigma, backend=backend)
    compare(here, weighted, x, sigma, log_weight=2 * weight, validate=True, backend=backend)
    target, _ = compare(
        here, refs, x, sigma, log_weight=torch.full((700,), -torch.inf), backend=backend
    )
    assert bool(target.isnan().all())


def student_t(here: Here, backend: str) -> None:
    refs = byte_references()
    x, sigma = batch(here, refs)
    compare(here, refs, x, sigma, noise="student_t", D=sigma * 10 + 1, backend=backend)


def bad_rows(here: Here, backend: str) -> None:
    """Rows of NaN stay alone, in their process and elsewhere."""
    refs = byte_references()
    x, sigma = batch(here, refs)
    x[1:2, 0, 0, 0] = torch.nan
    sigma[3:4] = 0
    target, _ = compare(here, refs, x, sigma, backend=backend)
    assert target.flatten(1).isnan().any(1).tolist() == [i in (1, 3) for i in range(len(x))]


def few_references(here: Here, backend: str) -> None:
    """With fewer blocks of 128 than processes, some have none."""
    for n in (100, 300):
        refs = byte_references(n)
        x, sigma = batch(here, refs)
        compare(here, refs, x, sigma, backend=backend)
    lengths = everyone(here, len(refs.shard(here.group)))
    assert sum(lengths) == 300
    assert (0 in lengths) == (here.size == 4)


def no_samples(here: Here, backend: str) -> None:
    refs = byte_references()
    x = torch.zeros(0, *SHAPE)
    target, stats = compare(here, refs, x, 1.0, backend=backend)
    assert target.shape == x.shape
    assert stats.argmax.shape == (0,)


def flips(here: Here, backend: str) -> None:
    refs = byte_references().with_flips()
    x, sigma = batch(here, refs)
    compare(here, refs, x, sigma, backend=backend)


def file(here: Here, backend: str) -> None:
    """Shards that stay in a file, against the whole set in memory."""
    saved = byte_references(labels=torch.arange(700) % 3)
    path = here.folder / f"{here.size}_{here.rank}_{backend}.safetensors"
    saved.save(path)
    refs = References.from_file(path)
    assert refs.shard(here.group).placement == "file"
    x, sigma = batch(here, saved)
    wanted = torch.tensor([0, 1, -1, 1, 2, 2, 0])[: len(x)]
    stages = resolve(backend, x.device)
    for room in (
        stages.workspace(len(x) + 20, 128, math.prod(SHAPE), 1, 4) + (64 << 10),
        256 << 20,
    ):
        compare(here, refs, x, sigma, whole=saved, labels=wanted, workspace=room, backend=backend)
    # Only one process has them in a file.
    mixed = refs if here.odd else saved
    compare(here, mixed, x, sigma, whole=saved, backend=backend)


def plans(here: Here, backend: str) -> None:
    """Processes that would cut the work in other ways all take the smallest block of rows."""
    refs = byte_references()
    x, sigma = batch(here, refs)
    x, sigma = x.repeat(40, 1, 1, 1), sigma.repeat(40)
    total = 40 * sum(BATCHES[: here.size])
    expected = stable_target_with_stats(x, refs, sigma, backend=backend)
    mine = pipeline.Plan(70 - 10 * here.rank, 128 * (1 + here.rank % 2), here.rank % 2 == 0)
    with (
        mock.patch.object(pipeline, "plan", return_value=mine),
        recorded(pipeline, "quantized") as blocks,
    ):
        got = stable_target_with_stats(
            x, refs.shard(here.group), sigma, group=here.group, backend=backend
        )
    assert_same_bits(got, expected)
    assert len(blocks) == math.ceil(total / (80 - 10 * here.size)) > 1


def shards_only(here: Here, backend: str) -> None:
    """Every process takes all samples through its own references, and through no other."""
    refs = byte_references()
    x, sigma = batch(here, refs)
    shard = refs.shard(here.group)
    with recorded(resolve(backend, x.device), "logits") as calls:
        stable_target(x, shard, sigma, group=here.group, backend=backend)
    assert sum(len(chunk.norms) for (_, chunk, *_), _ in calls) == len(shard)
    assert sum(everyone(here, len(shard))) == 700
    assert all(len(samples.x) == sum(BATCHES[: here.size]) for (samples, *_), _ in calls)


def backends_mixed(here: Here, backend: str) -> None:
    refs = byte_references()
    x, sigma = batch(here, refs)
    compare(here, refs, x, sigma, backend=backend if here.odd else "torch")


def compiled(here: Here, backend: str) -> None:
    refs = byte_references()
    x, sigma = batch(here, refs)
    shard = refs.shard(here.group)

    def double(x: Tensor, sigma: Tensor) -> Tensor:
        return 2 * stable_target(x, shard, sigma, group=here.group, backend=backend)

    function = torch.compile(double, fullgraph=True, backend="aot_eager")
    with recorded(Group, "gather") as calls:
        for _ in range(2):
            got = function(x, sigma)
    assert len(calls) == 2
    assert torch.equal(got, 2 * stable_target(x, refs, sigma, backend=backend))


def nan_is_largest(here: Here) -> None:
    """NaN of either sign wins over infinity, that over numbers, and they over -inf."""
    low, high, nan = -torch.inf, torch.inf, torch.nan
    values = [nan, -nan, high, low, 2.0, -2.0, 1e-310] if here.odd else [3.0] * 4 + [low] * 3
    with Group(here.group) as ranks:
        found = ranks.largest(torch.tensor(values, dtype=torch.float64))
    assert bool(found[:2].isnan().all())
    three = low if here.size == 1 else 3.0
    assert found[2:].tolist() == [high, three, 2.0, -2.0, 1e-310]


CASES = {
    f"{case.__name__}-{backend}": (case, backend)
    for backend in helpers.BACKENDS
    for case in (
        targets,
        statistics,
        equal_weights,
        floats,
        labels,
        log_weight,
        student_t,
        bad_rows,
        few_references,
        no_samples,
        flips,
        file,
        plans,
        shards_only,
    )
}
CASES["backends_mixed-cpu"] = backends_mixed, "cpu"
CASES["compiled-torch"] = compiled, "torch"


def call(here: Here, refs: References | None = None, **changed: Any) -> Tensor:
    """A right call, but for what is changed in it."""
    refs = byte_references() if refs is None else refs
    x, sigma = batch(here, refs)
    arguments = {"x_t": x, "ref": refs.shard(here.group), "sigma": sigma, "group": here.group}
    arguments |= changed
    return arguments.pop("function", stable_target)(**arguments)


def call_if_odd(here: Here, **changed: Any) -> Tensor:
    return call(here, **(changed if here.odd else {}))


# What one process passes that is wrong in itself, the error there, and how its words begin.
WRONG: dict[str, tuple[Callable[[Here], Any], type[Exception], str]] = {
    "shape": (
        lambda here: call_if_odd(here, x_t=torch.zeros(2, 3, 4, 5)),
        ValueError,
        "ref must be [n, 3, 4, 5] like x_t, got [",
    ),
    "type": (lambda here: call_if_odd(here, x_t="noise"), TypeError, "x_t must be a tensor"),
    "target": (lambda here: call_if_odd(here, target="speed"), ValueError, "target must be one of"),
    "sigma": (lambda here: call_if_odd(here, sigma="1"), TypeError, "sigma must be a number"),
    "precision": (lambda here: call_if_odd(here, precision=8), ValueError, "precision must be"),
    "backend": (
        lambda here: call_if_odd(here, backend="triton"),
        BackendUnavailable,
        "backend 'triton' cannot run on cpu",
    ),
    "workspace": (
        lambda here: call_if_odd(here, workspace=1),
        ValueError,
        "workspace must be at least",
    ),
    "validate": (
        lambda here: call(here, sigma=0.0 if here.odd else 1.0, validate=True),
        ValueError,
        "sigma[0] must be > 0",
    ),
    "class": (
        lambda here: call(
            here,
            byte_references(labels=torch.arange(700) % 3),
            labels=torch.full((BATCHES[here.rank],), 3 if here.odd else 2),
        ),
        ValueError,
        "labels[0] must be a class of ref",
    ),
    "log_weight": (
        lambda here: call_if_odd(here, log_weight=torch.zeros(700)),
        ValueError,
        "log_weight must be [",
    ),
    "no shard": (
        lambda here: call_if_odd(here, ref=byte_references()),
        ValueError,
        "ref must be a shard, refs.shard(group)",
    ),
    "tensor": (
        lambda here: call_if_odd(here, ref=torch.zeros(8, *SHAPE)),
        ValueError,
        "ref must be a shard, refs.shard(group)",
    ),
    "long words": (
        lambda here: call_if_odd(here, precision="\0\u00fc" * 5000),
        ValueError,
        "precision must be",
    ),
}


def told(here: Here, name: str) -> None:
    """One process raises its own error, the others one that has its words; then all goes on."""
    wrong, kind, words = WRONG[name]
    assert_one_fails(here, lambda: wrong(here), kind, words)


def assert_one_fails(here: Here, act: Callable[[], Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind if here.odd else RuntimeError) as caught:
        act()
    if not here.odd:
        start = f"rank {2 % here.size} of group failed with {kind.__name__}: "
        assert str(caught.value).startswith(start)
        words = start + words
    assert str(caught.value).startswith(words)
    assert bool(call(here).isfinite().all())


PLACES = {name: (torch_backend, name) for name in ("quantize", "logits", "weights", "finish")}
PLACES |= {"gather": (torch.Tensor, "new_zeros"), "sum": (torch_backend, "weighted_sum")}


def fails_within(here: Here, place: str) -> None:
    """Where one process fails in the middle, whatever it is at, all raise."""

    def act() -> None:
        fails = mock.patch.object(*PLACES[place], side_effect=MemoryError("no room"))
        with fails if here.odd else nullcontext():
            call(here, function=stable_target_with_stats, backend="torch")

    assert_one_fails(here, act, MemoryError, "no room")


def file_is_cut(here: Here) -> None:
    paths = [here.folder / f"cut_{rank}.safetensors" for rank in range(here.size)]
    byte_references().save(paths[here.rank])
    shard = References.from_file(paths[here.rank]).shard(here.group)
    if here.odd:
        os.truncate(paths[here.rank], 8)
    words = f"{paths[2 % here.size]} was cut while in use"
    assert_one_fails(here, lambda: call(here, ref=shard), OSError, words)


# What processes do not agree about, and what all of them say.
DIFFERENT: dict[str, tuple[Callable[[Here], Any], str]] = {
    "precision": (
        lambda here: call_if_odd(here, precision="fast"),
        "precision must be the same on all ranks of group, got 'exact' on ranks 0, 1, 3, "
        "'fast' on rank 2",
    ),
    "target": (
        lambda here: call_if_odd(here, target="v"),
        "target must be the same on all ranks of group, got 'score' on ranks 0, 1, 3, "
        "'v' on rank 2",
    ),
    "noise": (
        lambda here: call_if_odd(here, noise="student_t", D=3.0),
        "noise must be the same on all ranks of group, got 'gaussian' on ranks 0, 1, 3, "
        "'student_t' on rank 2",
    ),
    "labels": (
        lambda here: call(
            here,
            byte_references(labels=torch.arange(700) % 3),
            labels=torch.zeros(BATCHES[here.rank], dtype=torch.int64) if here.odd else None,
        ),
        "labels must be the same on all ranks of group, got none on ranks 0, 1, 3, given on rank 2",
    ),
    "log_weight": (
        lambda here: call_if_odd(
            here, log_weight=torch.zeros(len(byte_references().shard(here.group)))
        ),
        "log_weight must be the same on all ranks of group, got none on ranks 0, 1, 3, "
        "given on rank 2",
    ),
    "function": (
        lambda here: call_if_odd(here, function=stable_target_with_stats),
        "the function must be the same on all ranks of group, got stable_target on ranks 0, 1, 3, "
        "stable_target_with_stats on rank 2",
    ),
    "x_t type": (
        lambda here: call_if_odd(here, x_t=torch.zeros(7, *SHAPE, dtype=torch.float64)),
        "x_t must be the same on all ranks of group, got float32 [B, 48] on ranks 0, 1, 3, "
        "float64 [B, 48] on rank 2",
    ),
    "x_t size": (
        lambda here: call(here, References(DATA[:, :2], value_range=(-1, 1)) if here.odd else None),
        "x_t must be the same on all ranks of group, got float32 [B, 48] on ranks 0, 1, 3, "
        "float32 [B, 32] on rank 2",
    ),
    "ref limbs": (
        lambda here: call(here, References(DATA.float(), limbs=3) if here.odd else None),
        "ref.limbs must be the same on all ranks of group, got 1 on ranks 0, 1, 3, 3 on rank 2",
    ),
}


def differ(here: Here, name: str) -> None:
    """Processes that do not agree all raise the same, and can go on."""
    act, words = DIFFERENT[name]
    with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
        act(here)
    call(here)


def other_references(here: Here) -> None:
    """As many in another order, one other among them, fewer, other labels."""
    order = torch.randperm(700, generator=helpers.generator(here.rank))
    moved = DATA.clone()
    moved[600, 0, 0, 0] ^= 1
    for other in (
        byte_references().subset(order),
        References(moved, value_range=(-1, 1)),
        byte_references(600),
        byte_references(labels=torch.zeros(700, dtype=torch.int64)),
    ):
        with pytest.raises(
            ValueError,
            match=r"^ref must be the same on all ranks of group, got a set of checksum \w+ on "
            r"ranks 0, 1, 3, a set of checksum \w+ on rank 2$",
        ):
            call(here, other if here.odd else None)
    call(here)


def shards_of_another_group(here: Here) -> None:
    shard = byte_references().shard(dist.group.WORLD)
    if here.size < WORLD:
        with pytest.raises(ValueError, match="ref must be the shards"):
            call(here, ref=shard)
    call(here)


def shard_without_group(here: Here) -> None:
    words = r"ref must be a whole set, or group that of refs.shard\(group\)"
    with pytest.raises(ValueError, match=words):
        call(here, group=None)


def graph_capture(here: Here) -> None:
    with (
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=True),
        pytest.raises(RuntimeError, match="group cannot be used in a CUDA graph"),
    ):
        call(here)
    call(here)


def outside(here: Here) -> None:
    """In a process that is not in the group."""
    words = f"group must have this process, rank {dist.get_rank()}, as a member"
    with pytest.raises(RuntimeError, match=words):
        byte_references().shard(here.group)
    with pytest.raises(RuntimeError, match=words):
        stable_target(torch.zeros(1, *SHAPE), byte_references(), 1.0, group=here.group)


MORE: dict[str, tuple] = {
    "nan is largest": (nan_is_largest,),
    "shards of another group": (shards_of_another_group,),
}
ERRORS: dict[str, tuple] = {
    **{f"told {name}": (told, name) for name in WRONG},
    **{f"fails within {place}": (fails_within, place) for place in PLACES},
    **{f"differ {name}": (differ, name) for name in DIFFERENT},
    "file is cut": (file_is_cut,),
    "other references": (other_references,),
    "shard without group": (shard_without_group,),
    "graph capture": (graph_capture,),
}


def killed(here: Here) -> None:
    """One process is killed in the middle of a call: the others raise before their timeout."""

    def kill(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with mock.patch.object(torch_backend, "weights", kill if here.odd else torch_backend.weights):
        begun = time.perf_counter()
        with pytest.raises(RuntimeError):
            call(here, backend="torch")
    assert time.perf_counter() - begun < TIMEOUT.total_seconds() + 5


def work(rank: int, folder: Path) -> None:
    """What each of the processes does: all cases, in groups of all sizes."""
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD)
    dist.barrier()  # to connect within the timeout
    groups = [dist.new_group(members, timeout=PATIENCE) for members in MEMBERS.values()]
    controls = [dist.new_group(members, timeout=5 * PATIENCE) for members in MEMBERS.values()]
    doomed = dist.new_group(timeout=TIMEOUT)
    report = folder / f"report_{rank}"
    for (size, members), group, control in zip(MEMBERS.items(), groups, controls, strict=True):
        dist.barrier()
        if rank not in members:
            note(report, size, "outside", attempt(outside, Here(group, -1, size, folder)))
            continue
        here = Here(group, members.index(rank), size, folder)
        for name, (case, *options) in (
            CASES | MORE if size < WORLD else CASES | MORE | ERRORS
        ).items():
            failure = attempt(case, here, *options)
            note(report, size, name, failure)
            # After a failure the processes may be out of step.
            if any(everyone(here._replace(group=control), failure)):
                break
    here = Here(doomed, rank, WORLD, folder)
    note(report, WORLD, "killed", attempt(killed, here))
    os._exit(0)  # not to wait for the one that was killed


def attempt(case: Callable[..., None], *args: Any) -> str:
    """How a case failed, in words; nothing if it did not."""
    try:
        case(*args)
    except BaseException:
        return traceback.format_exc()
    return ""


def note(report: Path, size: int, case: str, failure: str) -> None:
    with report.open("a") as file:
        file.write(json.dumps([size, case, failure]) + "\n")


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], list[str]]:
    """What the processes say about each case in groups of each size."""
    folder = tmp_path_factory.mktemp("ranks")
    context = multiprocessing.get_context("spawn")
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):
        processes = [context.Process(target=work, args=(r, folder)) for r in range(WORLD)]
        for process in processes:
            process.start()
    end = time.monotonic() + 600
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
        process.kill()
    found: dict[tuple[int, str], list[str]] = {}
    for rank in range(WORLD):
        for line in (folder / f"report_{rank}").read_text().splitlines():
            size, case, failure = json.loads(line)
            found.setdefault((size, case), []).append(failure)
    return found


def assert_good(reports: dict, size: int, case: str, processes: int) -> None:
    said = reports.get((size, case), [])
    assert not any(said), "\n".join(said)
    assert len(said) == processes, f"{case} was not run by all, or a case before it failed"


@pytest.mark.parametrize("size", MEMBERS)
@pytest.mark.parametrize("case", CASES)
def test_shards_give_the_bits_of_the_whole_set(reports, case, size):
    assert_good(reports, size, case, size)


@pytest.mark.parametrize("size", MEMBERS)
@pytest.mark.parametrize("case", MORE)
def test_in_groups_of_every_size(reports, case, size):
    assert_good(reports, size, case, size)


@pytest.mark.parametrize("case", ERRORS)
def test_errors_reach_all_processes(reports, case):
    assert_good(reports, WORLD, case, WORLD)


def test_a_killed_process_makes_the_others_raise(reports):
    assert_good(reports, WORLD, "killed", WORLD - 1)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_process_outside_the_group_is_told(reports, size):
    assert_good(reports, size, "outside", WORLD - size)


def test_group_needs_torch_distributed():
    assert not dist.is_initialized()
    for act in (
        byte_references().shard,
        lambda: stable_target(torch.zeros(1, *SHAPE), byte_references(), 1.0, group=object()),
    ):
        with pytest.raises(RuntimeError, match="init_process_group"):
            act()


def test_group_must_be_one(tmp_path):
    store = f"file://{tmp_path / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        with pytest.raises(TypeError, match="group must be a process group"):
            stable_target(torch.zeros(1, *SHAPE), byte_references(), 1.0, group="all")
    finally:
        dist.destroy_process_group()
