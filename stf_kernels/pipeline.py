"""The walk through the five stages, the same for every backend.

References pass in chunks, twice: a first sweep finds each row's largest logit, a second one makes
the weights against it and adds up integers. One chunk that holds everything is the common case.
Cuts are at multiples of 128 references, the block that shares an anchor, so no bit depends on them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import arithmetic as ar
from .ranks import Ranks
from .stages import NOWHERE, Prepared, Queries, Samples, Stages, Sums, Weights
from .statistics import TargetStats, digits_of_norms, from_sums, largest_norm, norms_exponent
from .storage import Resident, Values

DIGITS_BYTES = 64  # of a reference whose norm is split into digits
STATISTICS_BYTES = 512  # of a sample, its sums and what is made of them
FEW_ROWS = 32  # with fewer, reading a reference costs more than multiplying it
ROW_TILE = 64  # blocks of rows in whole tiles of a GPU's kernels, all aligned like the first
FEW_REFERENCES = 1024  # a chunk of fewer is not worth its overhead
STREAM_BYTES = 32 << 20  # of a chunk: the first one comes before anything is computed

Logits = tuple[Tensor, Tensor]  # what stage 2 returns


class ReferenceSet(NamedTuple):
    """The references, wherever their values are; the rest as in `Prepared`."""

    values: Values
    norms: Tensor
    affine: Tensor
    bias: Tensor | None
    labels: Tensor | None
    columns: Tensor | None = None
    first: int = 0  # of a shard: where it begins in the whole set

    def chunks(self, size: int) -> Iterator[Prepared]:
        """The references, `size` at a time, a multiple of 128 unless that is all."""
        if isinstance(self.values, Resident) and 0 < len(self.norms) <= size:
            yield Prepared(self.values.load(), *self[1:6])
            return
        start = 0
        for values in self.values.chunks(size):
            part = slice(start, start + values.shape[1])
            bias = None if self.bias is None else self.bias[part]
            labels = None if self.labels is None else self.labels[part]
            yield Prepared(values, self.norms[part], self.affine, bias, labels)
            start = part.stop


class Plan(NamedTuple):
    """How a call is cut."""

    rows: int  # samples in a block
    columns: int  # references in a chunk
    keep: bool  # whether the first sweep's logits wait for the second, or are made again


def run(
    stages: Stages,
    queries: Queries,
    refs: ReferenceSet,
    precision: str,
    statistics: bool,
    workspace: int,
    ranks: Ranks,
) -> tuple[Tensor, TargetStats | None]:
    """Targets [B, d] and, if asked for, the statistics of their weights; None of no rows.

    Args:
        stages: a backend module
        queries: the samples, of all ranks
        refs: the references, or this rank's shard of them
        precision: a key of arithmetic.LIMBS
        statistics: whether to make them
        workspace: bytes to stay below
        ranks: the processes that share the references; the result has this one's rows only
    """
    limbs = ar.LIMBS[precision]
    rows, n = len(queries.x), len(refs.norms)
    cut = plan(stages, rows, ranks.largest_shard(n), refs, limbs, workspace, statistics)
    cut = cut._replace(rows=ranks.fewest(cut.rows))  # blocks of rows are the same everywhere
    if refs.columns is None and isinstance(refs.values, Resident) and 0 < n <= cut.columns:
        # Once for all blocks of rows.
        refs = refs._replace(columns=stages.transpose(refs.values.load()))
    exponent = norms_exponent(ranks.largest(largest_norm(refs.norms))) if statistics else None
    mine = ranks.rows(rows)
    out = torch.empty_like(queries.x[mine.start : mine.stop])
    found: list[TargetStats] = []
    for start in range(0, rows, cut.rows):
        stop = min(start + cut.rows, rows)
        block = queries.rows(slice(start, stop))
        samples = quantized(stages, block, refs.affine, limbs, statistics)
        peak, kept = largest_logits(stages, samples, refs.chunks(cut.columns), cut.keep)
        peak = ranks.largest(peak)
        num, sums = add_up(stages, samples, refs, cut.columns, kept, peak, precision, exponent)
        ranks.add([num, *sums.added()])
        if sums.argmax is not None:
            ranks.least(sums.argmax)
        first, last = max(start, mine.start), min(stop, mine.stop)
        if first >= last:
            continue
        if last - first < stop - start:
            own = slice(first - start, last - start)
            block, samples, num, sums = block.rows(own), samples.rows(own), num[own], sums.rows(own)
        target = out[first - mine.start : last - mine.start]
        stages.finish(num, sums.total, refs.affine, samples, target)
        if exponent is not None:
            assert samples.distance is not None
            given = samples.distance, block, refs.affine, exponent, precision
            found.append(from_sums(sums, *given))
    if len(found) > 1:
        return out, TargetStats(*map(torch.cat, zip(*found, strict=True)))
    return out, found[0] if found else None


def plan(
    stages: Stages,
    rows: int,
    n: int,
    refs: ReferenceSet,
    limbs: int,
    workspace: int,
    statistics: bool = False,
) -> Plan:
    """A cut that stays below `workspace` bytes.

    Args:
        n: references, or those of the largest shard

    Raises:
        ValueError: not even one sample with one block of references does
    """
    values, n = refs.values, max(n, 1)
    total, rows = rows, min(rows, stages.MAX_ROWS)
    sums = 8 * values.limbs * values.dim  # of a row, the second ones of two chunks

    def bytes_needed(rows: int, columns: int, keep: bool) -> int:
        stage = stages.workspace(rows, columns, values.dim, values.limbs, limbs)
        stage += DIGITS_BYTES * columns + STATISTICS_BYTES * rows if statistics else 0
        if columns >= n:
            at_hand = 0 if refs.columns is None else refs.columns.nbytes
            return stage + values.staging(columns) - at_hand
        kept = 4 * n + 8 * -(-n // ar.BLOCK) if keep else 0
        return stage + values.staging(columns) + rows * (kept + sums)

    def columns_for(rows: int, keep: bool) -> int:
        def fits(blocks: int) -> bool:
            return bytes_needed(rows, ar.BLOCK * blocks, keep) <= workspace

        return ar.BLOCK * _most(-(-most // ar.BLOCK), fits)

    enough = min(n, FEW_REFERENCES)
    resident = isinstance(values, Resident)
    most = n if resident else max(enough, min(n, STREAM_BYTES // (values.limbs * values.dim)))
    if resident:
        best = min(workspace, stages.BLOCK_BYTES)
        whole = _most(rows, lambda count: bytes_needed(count, n, True) <= best)
        if whole < total:
            whole = whole // ROW_TILE * ROW_TILE or whole
        if whole >= min(rows, FEW_ROWS):
            return Plan(whole, n, True)
    for count in (rows, min(rows, FEW_ROWS)) if resident else (rows,):
        if columns_for(count, True) >= enough:
            return Plan(count, columns_for(count, True), True)
    while rows > 1 and columns_for(rows, False) < enough:
        rows = -(-rows // 2)
    if columns_for(rows, False) == 0:
        raise ValueError(
            f"workspace must be at least {bytes_needed(1, ar.BLOCK, False)} bytes for samples of "
            f"{values.dim} values, got {workspace}"
        )
    return Plan(rows, columns_for(rows, False), False)


def _most(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest count up to `limit` that fits, 0 for none; fewer than one that fits do too."""
    if fits(limit):
        return limit
    low, high = 0, limit - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def quantized(
    stages: Stages, queries: Queries, affine: Tensor, limbs: int, distances: bool
) -> Samples:
    """Stage 1, and what each row is multiplied by in the others."""
    q, step = stages.quantize(queries.x, limbs)
    return stages.coefficients(queries, q, step, affine, distances)


def largest_logits(
    stages: Stages, samples: Samples, chunks: Iterable[Prepared], keep: bool
) -> tuple[Tensor, deque[Logits]]:
    """The first sweep: each row's largest logit [B], -inf without references, and the logits."""
    peak: Tensor | None = None
    kept: deque[Logits] = deque()
    for chunk in chunks:
        relative, anchors = stages.logits(samples, chunk, -torch.inf if peak is None else peak)
        largest = anchors.amax(1)
        peak = largest if peak is None else torch.maximum(peak, largest)  # NaN passes through
        if keep:
            kept.append((relative, anchors))
        del relative, anchors  # before the next chunk's are made
    return torch.full_like(samples.slope, -torch.inf) if peak is None else peak, kept


def add_up(
    stages: Stages,
    samples: Samples,
    refs: ReferenceSet,
    columns: int,
    kept: deque[Logits],
    peak: Tensor,
    precision: str,
    exponent: Tensor | None,
) -> tuple[Tensor, Sums]:
    """The second sweep: num int64 [B, R, d], and the other integer sums over the references.

    Args:
        columns: references in a chunk
        kept: the logits of the first sweep, if it kept them: they are used up
        peak: each row's largest logit over all references, float64 [B]
        exponent: what `norms_exponent` gave, for the sums of the statistics; or None
    """
    rows, dim = samples.x.shape
    num, sums, first = None, None, refs.first
    for chunk in refs.chunks(columns):
        relative, anchors = kept.popleft() if kept else stages.logits(samples, chunk, peak)
        weights = stages.weights(relative, anchors, peak, precision, exponent is not None)
        part = stages.weighted_sum(weights, chunk.values, chunk.columns)
        num = part if num is None else num.add_(part)
        more = sums_of(stages, weights, peak, chunk.norms, first, exponent)
        sums = more if sums is None else sums.add_(more)
        first += len(chunk.norms)
        del relative, anchors, weights, part, more  # before the next chunk's are made
    if num is None or sums is None:  # an empty shard
        num = torch.zeros((rows, refs.values.limbs, dim), dtype=torch.int64, device=peak.device)
        sums = Sums.zero(peak, exponent is not None)
    return num, sums


def sums_of(
    stages: Stages,
    weights: Weights,
    peak: Tensor,
    norms: Tensor,
    first: int,
    exponent: Tensor | None,
) -> Sums:
    """The sums of one chunk, whose first reference has index `first` in the whole set."""
    if exponent is None or weights.argmax is None:
        return Sums(peak, weights.total)
    digits = digits_of_norms(norms, exponent)[:, :, None]
    norm = stages.weighted_sum(weights, digits)[:, :, 0]
    argmax = torch.where(weights.argmax < 0, NOWHERE, first + weights.argmax)
    return Sums(peak, weights.total, weights.square, weights.bits, weights.lost, norm, argmax)
