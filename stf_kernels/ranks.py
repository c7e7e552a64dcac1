"""The processes that share the references: one alone."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Ranks(Protocol):
    """What a call asks of the other processes; tensors are changed in place."""

    def rows(self, total: int) -> range:
        """Which of all samples are this process's."""
        ...

    def largest_shard(self, n: int) -> int:
        """References of the process that has most; `n` are here."""
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

    def rows(self, total: int) -> range:
        return range(total)

    def largest_shard(self, n: int) -> int:
        return n

    def largest(self, values: Tensor) -> Tensor:
        return values

    def add(self, sums: list[Tensor]) -> None:
        pass

    def least(self, values: Tensor) -> None:
        pass
