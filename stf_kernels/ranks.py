"""The processes that share the references: one alone, or those of a group of torch.distributed.

In a group every process has a shard of the references and samples of its own. It takes the samples
of all through its shard; largest logits are reduced by max and integers by sum, so that the bits
are those of one process.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from . import handles
from .stages import Queries

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

NOTE_BYTES = 4096  # of what processes tell each other, padded
MESSAGE_CHARACTERS = 600  # of an error, each at most six bytes of a note

_NUMBERS: WeakKeyDictionary[ProcessGroup, int] = WeakKeyDictionary()


def place(group: ProcessGroup | None) -> tuple[int, int]:
    """This process's rank in the group and the group's size; None is all processes.

    Raises:
        RuntimeError: torch.distributed is not initialized, or this process is not in the group
        TypeError: group is something else
    """
    if not dist.is_available():
        raise RuntimeError("group needs torch.distributed, which this PyTorch is built without")
    if not dist.is_initialized():
        raise RuntimeError("group needs torch.distributed.init_process_group to be called first")
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise RuntimeError(f"group must have this process, rank {dist.get_rank()}, as a member")
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a process group of torch.distributed, got {group!r}")
    return dist.get_rank(group), dist.get_world_size(group)


def number(group: ProcessGroup) -> int:
    """The group's number in `handles.GROUPS`, for `ops.stable_target`; raises as `place` does."""
    place(group)
    if group not in _NUMBERS:
        _NUMBERS[group] = handles.GROUPS.name(group)
    return _NUMBERS[group]


# What torch.compiler.assume_constant_result does, which would import the compiler, and Triton.
number._dynamo_marked_constant = True  # type: ignore[attr-defined]


class Ranks(Protocol):
    """What a call asks of the other processes; tensors are changed in place."""

    def rows(self, total: int) -> range:
        """Which of all samples are this process's."""
        ...

    def largest_shard(self, n: int) -> int:
        """References of the process that has most; `n` are here."""
        ...

    def fewest(self, count: int) -> int:
        """The smallest of every process's number, >= 0."""
        ...

    def largest(self, values: Tensor) -> Tensor:
        """The largest of every process, element by element; NaN passes through."""
        ...

    def add(self, sums: list[Tensor]) -> None:
        """Adds up every process's integers."""
        ...

    def least(self, values: Tensor) -> None:
        """The smallest of every process's integers, element by element."""
        ...


class Alone:
    """One process."""

    def __enter__(self) -> Alone:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def rows(self, total: int) -> range:
        return range(total)

    def largest_shard(self, n: int) -> int:
        return n

    def fewest(self, count: int) -> int:
        return count

    def largest(self, values: Tensor) -> Tensor:
        return values

    def add(self, sums: list[Tensor]) -> None:
        pass

    def least(self, values: Tensor) -> None:
        pass


class Group:
    """The processes of a group, for one call; the body of `with` fails in all of them or in none.

    Before every collective on tensors, and at the end, processes agree to go on. One that has
    failed says no to what the others ask next, whatever that is about, and they raise.

    Raises:
        RuntimeError: of the body, in a process where it did not fail, naming the rank that did
    """

    def __init__(self, group: ProcessGroup) -> None:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "group cannot be used in a CUDA graph: the call waits for other processes"
            )
        self._group = group
        self._size = place(group)[1]
        self._devices = [pair.split(":")[0] for pair in dist.get_backend_config(group).split(",")]
        self._device = "cpu" if "cpu" in self._devices else self._devices[0]  # of what is told
        self._listening = True  # whether the others will ask once more
        self._range = range(0)
        self._largest_shard = 0

    def __enter__(self) -> Group:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if error is None:
            self._agree()
        elif isinstance(error, Exception):
            self.tell(error)

    def tell(self, error: Exception) -> None:
        """Lets the others know that this process fails, unless they know."""
        if not self._listening:
            return
        words = f"{type(error).__name__}: {error}".encode("ascii", "backslashreplace").decode()
        with suppress(Exception):  # the error that is told matters more
            self._smallest(-1)
            self._notes({"failed": words[:MESSAGE_CHARACTERS]})

    def gather(
        self, queries: Queries, choices: dict[str, str], first: int, count: int, n: int
    ) -> Queries:
        """The samples of all processes, in the order of ranks, once their arguments agree.

        Args:
            queries: this process's samples
            choices: what must be the same everywhere, by the name of the argument
            first, count: this process's references in the whole set
            n: references of the whole set

        Raises:
            ValueError: in every process the same, naming what differs and each rank's value
        """
        device = queries.x.device.type
        if device not in self._devices:
            raise ValueError(
                f"group must have a backend for {device} tensors like x_t, "
                f"got {dist.get_backend_config(self._group)}"
            )
        mine = {"rows": len(queries.x), "choices": choices, "first": first, "count": count, "n": n}
        self._agree()
        notes = self._notes(mine)
        _check_choices([note["choices"] for note in notes])
        _check_tiles([(note["first"], note["count"], note["n"]) for note in notes])
        counts = [note["rows"] for note in notes]
        start = sum(counts[: dist.get_rank(self._group)])
        self._range = range(start, start + len(queries.x))
        self._largest_shard = max(note["count"] for note in notes)

        x, *numbers = queries.tensors()
        bits = torch.stack([t.view(torch.int64) for t in numbers], 1)
        x, bits = self._gathered([x, bits], counts)
        columns = zip(bits.t().contiguous(), numbers, strict=True)
        return queries.with_tensors([x, *(column.view(t.dtype) for column, t in columns)])

    def rows(self, total: int) -> range:
        return self._range

    def largest_shard(self, n: int) -> int:
        return self._largest_shard

    def fewest(self, count: int) -> int:
        return self._agree(count)

    def largest(self, values: Tensor) -> Tensor:
        # As integers, among which NaN is the largest: maxima of floats do not all keep it.
        bits = torch.where(values.isnan(), torch.nan, values).view(torch.int64)
        ordered = _mirrored(bits)
        self._reduce([ordered], dist.ReduceOp.MAX)
        return _mirrored(ordered).view(values.dtype)

    def add(self, sums: list[Tensor]) -> None:
        self._reduce(sums, dist.ReduceOp.SUM)

    def least(self, values: Tensor) -> None:
        self._reduce([values], dist.ReduceOp.MIN)

    def _reduce(self, tensors: list[Tensor], operation: dist.ReduceOp.RedOpType) -> None:
        self._agree()
        with self._talking():
            works = [dist.all_reduce(t, operation, self._group, async_op=True) for t in tensors]
            for work in works:
                work.wait()

    def _gathered(self, tensors: list[Tensor], counts: list[int]) -> list[Tensor]:
        """Every rank's rows of each tensor, one rank after the other; `counts` says how many."""
        padded = [t.new_zeros((max(counts), *t.shape[1:])) for t in tensors]
        for whole, t in zip(padded, tensors, strict=True):
            whole[: len(t)] = t
        parts = [[torch.empty_like(whole) for _ in counts] for whole in padded]
        self._agree()
        with self._talking():
            for part, whole in zip(parts, padded, strict=True):
                dist.all_gather(part, whole, self._group)
        return [
            torch.cat([rows[:count] for rows, count in zip(part, counts, strict=True)])
            for part in parts
        ]

    def _agree(self, number: int = 0) -> int:
        """The smallest of every process's number, >= 0; raises if one has failed."""
        smallest = self._smallest(number)
        if smallest >= 0:
            return smallest
        notes = self._notes({})
        self._listening = False
        raise RuntimeError(
            "; ".join(
                f"rank {rank} of group failed with {note['failed']}"
                for rank, note in enumerate(notes)
                if "failed" in note
            )
        )

    def _smallest(self, number: int) -> int:
        flag = torch.tensor([number], device=self._device)
        with self._talking():
            dist.all_reduce(flag, dist.ReduceOp.MIN, self._group)
        return int(flag)

    def _notes(self, note: dict[str, Any]) -> list[dict[str, Any]]:
        """Every process's note, in the order of ranks."""
        text = json.dumps(note).encode().ljust(NOTE_BYTES)
        mine = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(self._device)
        notes = [torch.empty_like(mine) for _ in range(self._size)]
        with self._talking():
            dist.all_gather(notes, mine, self._group)
        return [json.loads(other.cpu().numpy().tobytes()) for other in notes]

    @contextmanager
    def _talking(self) -> Iterator[None]:
        """Around a collective: if that fails, the others do not listen any more."""
        self._listening = False
        yield
        self._listening = True


def _mirrored(bits: Tensor) -> Tensor:
    """Bits of float64 as integers in the order of the floats, and back."""
    return bits ^ ((bits >> 63) & 0x7FFF_FFFF_FFFF_FFFF)


def _check_choices(choices: list[dict[str, str]]) -> None:
    for name in choices[0]:
        ranks_of: dict[str, list[int]] = {}
        for rank, other in enumerate(choices):
            ranks_of.setdefault(other[name], []).append(rank)
        if len(ranks_of) > 1:
            got = ", ".join(f"{value} on {_ranks(ranks)}" for value, ranks in ranks_of.items())
            raise ValueError(f"{name} must be the same on all ranks of group, got {got}")


def _check_tiles(shards: list[tuple[int, int, int]]) -> None:
    """Raises unless the shards (first, count, n) are the whole set, each reference once."""
    end = 0
    for first, count, n in sorted(shards):
        if first != end or n != shards[0][2]:
            break
        end += count
    else:
        if end == n:
            return
    got = ", ".join(
        f"{first} to {first + count} of {n} on rank {rank}"
        for rank, (first, count, n) in enumerate(shards)
    )
    raise ValueError(f"ref must be the shards that ref.shard(group) makes of one set, got {got}")


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
