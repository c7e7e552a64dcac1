"""What passes between the five stages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from . import arithmetic as ar

NOWHERE = 1 << 62  # the index of a largest logit that is not among these references


class Queries(NamedTuple):
    """Noisy samples and what is asked of them."""

    x: Tensor  # [B, d] float32 or float64, contiguous
    sigma: Tensor  # [B] float64
    alpha: Tensor  # [B] float64
    D: Tensor | None  # [B] float64, of Student-t noise
    labels: Tensor | None  # [B] int64; -1 sees every reference
    kind: str  # of the target, a key of parameterization.KINDS
    parameters: tuple[Tensor, ...]  # of that kind, [B] float64 each

    def rows(self, part: slice) -> Queries:
        if part.start == 0 and part.stop >= len(self.x):
            return self
        return self.with_tensors(t[part] for t in self.tensors())

    @property
    def pair(self) -> tuple[Tensor | None, Tensor | None]:
        """The parameters, and None for each of two that the kind does not have."""
        first, second = (*self.parameters, None, None)[:2]
        return first, second

    def tensors(self) -> list[Tensor]:
        """x and the tensors [B], in the order of the fields."""
        return [t for t in (*self[:5], *self.parameters) if t is not None]

    def with_tensors(self, tensors: Iterable[Tensor]) -> Queries:
        """The same with others in the place of `tensors()`."""
        rest = iter(tensors)
        five = [None if t is None else next(rest) for t in self[:5]]
        return Queries._make([*five, self.kind, tuple(rest)])


class Prepared(NamedTuple):
    """References in fixed point, y = a v + b, with v = sum_r 256^r values[r]."""

    values: Tensor  # [R, n, d] int8
    norms: Tensor  # [n] float64: N_k = sum_j v^2 + 2 (b/a) sum_j v
    affine: Tensor  # [2] float64: a, b
    bias: Tensor | None  # [n] float64: log2(e) * log_weight
    labels: Tensor | None  # [n] int64
    columns: Tensor | None = None  # [R, d, n padded to 128] int8, zero in the padding


class Samples(NamedTuple):
    """Noisy samples with what each row needs in every stage."""

    x: Tensor  # [B, d] float32 or float64
    q: Tensor  # the backend's digits of rint(x / step), rows first
    slope: Tensor  # [B] float64: A step, with A and C of arithmetic.logit_coefficients
    curvature: Tensor  # [B] float64: C
    c_D: Tensor  # [B] float64: target = c_D D + c_x x
    c_x: Tensor  # [B] float64
    labels: Tensor | None  # [B] int64; -1 sees every reference
    distance: Tensor | None = None  # [B] float64: S = ||x - alpha b||^2, where it is asked for
    student: tuple[Tensor, Tensor] | None = None  # [B] float64 each, for Student-t noise:
    # S / (sigma^2 D) and (d + D) / 2

    def rows(self, part: slice) -> Samples:
        """What stage 5 and the statistics need of some of the rows."""
        c_D, c_x = self.c_D[part], self.c_x[part]
        distance = None if self.distance is None else self.distance[part]
        return self._replace(x=self.x[part], c_D=c_D, c_x=c_x, distance=distance)

    @staticmethod
    def numbers(queries: Queries, distances: bool) -> Tensor:
        """Room for what kernels write of each row, float64 [4, 5 or 7, B], one row a field."""
        count = 4 + distances if queries.D is None else 7
        return torch.empty((count, len(queries.x)), dtype=torch.float64, device=queries.x.device)

    @staticmethod
    def of(queries: Queries, q: Tensor, numbers: Tensor) -> Samples:
        """Samples whose `numbers` are written."""
        slope, curvature, c_D, c_x, *more = numbers.unbind()
        distance, student = more[0] if more else None, (more[1], more[2]) if more[1:] else None
        return Samples(queries.x, q, slope, curvature, c_D, c_x, queries.labels, distance, student)


class Weights(NamedTuple):
    """Integer weights, as the backend keeps them, and integer sums over the references."""

    weight: Any  # P_ik, in the backend's form
    total: Tensor  # [B] int64: sum P
    square: Tensor | None = None  # [B] int64: sum rint(P^2 / 2^24)
    bits: Tensor | None = None  # [B] int64: sum rint(-2^10 P e)
    lost: Tensor | None = None  # [B] int64: sum rint(2^62 p) over P = 0
    argmax: Tensor | None = None  # [B] int64: the first with e = 0, -1 if there is none


class Stages(Protocol):
    """The functions a backend module offers; torch_backend.py documents each."""

    NAME: str
    MAX_ROWS: int  # samples in one block of rows
    BLOCK_BYTES: int  # what one block is best to hold, where that does not cut the references

    def unavailable(self, device: torch.device) -> str | None: ...
    def workspace(self, rows: int, n: int, dim: int, ref_limbs: int, limbs: int) -> int: ...
    def prepare(self, data: Tensor, limbs: int) -> tuple[Tensor, Tensor, Tensor]: ...
    def norms(self, values: Tensor, twice_offset: float) -> Tensor: ...
    def transpose(self, values: Tensor) -> Tensor | None: ...
    def quantize(self, x: Tensor, limbs: int) -> tuple[Tensor, Tensor]: ...
    def coefficients(
        self, queries: Queries, q: Tensor, step: Tensor, affine: Tensor, distances: bool
    ) -> Samples: ...
    def logits(
        self, samples: Samples, refs: Prepared, floor: Tensor | float | None = None
    ) -> tuple[Tensor, Tensor]: ...
    def weights(
        self,
        relative: Tensor,
        anchors: Tensor,
        peak: Tensor,
        precision: str,
        statistics: bool,
    ) -> Weights: ...
    def weighted_sum(
        self, weights: Weights, values: Tensor, columns: Tensor | None = None
    ) -> Tensor: ...
    def finish(
        self, num: Tensor, total: Tensor, affine: Tensor, samples: Samples, out: Tensor
    ) -> None: ...


class Sums(NamedTuple):
    """Each row's integer sums, from which statistics.py makes the statistics."""

    peak: Tensor  # [B] float64: the largest logit, log2 units
    total: Tensor  # [B] int64, like all below
    square: Tensor | None = None
    bits: Tensor | None = None
    lost: Tensor | None = None
    norm: Tensor | None = None  # [B, 6]: sum_k P_ik times each digit of N_k
    argmax: Tensor | None = None  # index in the whole set, or NOWHERE

    def added(self) -> list[Tensor]:
        """The fields that add up over parts of the references."""
        return [t for t in self[1:6] if t is not None]

    def add_(self, more: Sums) -> Sums:
        """Takes in the sums over other references."""
        for mine, other in zip(self.added(), more.added(), strict=True):
            mine.add_(other)
        if self.argmax is not None and more.argmax is not None:
            torch.minimum(self.argmax, more.argmax, out=self.argmax)
        return self

    def rows(self, part: slice) -> Sums:
        return Sums(*(None if t is None else t[part] for t in self))  # type: ignore[arg-type]

    @classmethod
    def zero(cls, peak: Tensor, statistics: bool) -> Sums:
        """The sums over no reference."""
        zero = torch.zeros_like(peak, dtype=torch.int64)
        if not statistics:
            return cls(peak, zero)
        square, bits, lost = zero.clone(), zero.clone(), zero.clone()
        norm = zero[:, None].repeat(1, ar.NORM_LIMBS)
        return cls(peak, zero, square, bits, lost, norm, zero + NOWHERE)
