"""Stage 2 on the CPU: which logits are needed, and the limb products they are made of.

References of another class are left out before any product. Of bytes, in large sets, the products
of a sample's most significant digits alone come first. They bound every logit so closely (`bound`
in csrc/) that for most samples few references are left which may come near the largest logit, and
only those are multiplied by the whole sample. Where noise leaves too many of them, all products
are made.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import arithmetic as ar
from . import cpu_products
from .extension import address, extension
from .stages import Prepared, Samples

# Logits from which on bounds come first. On one core of a Zen 5, photograph patches, d = 3072, they
# change the time of stage 2 in ms, with EDM's noise | sigma log-uniform in [.01, 50]:
#   n = 4096, B = 256     28 to 17 | 29 to 23        n = 16 384, B = 256  115 to 60 | 114 to 79
#   n = 4096, B = 64     7.3 to 4.7 | 7.3 to 5.9     n = 50 000, B = 64   102 to 61 | 100 to 77
# and at 2^17, n = 4096, B = 32, 4.3 to 3.9 | 4.5 to 4.8 among other work.
SCREENED = 1 << 18
MAX_SCREENED_DIM = 1 << 16  # squares of 2^23 sum up to less than 2^63
TRIED = 256  # references that tell whether bounds help a sample
MANY = 4  # they do not where one reference in so many is left
AGAIN = 2  # what reading all references again costs, in exact logits for each of them
CALL = 16  # what a product costs besides its size, in blocks of one sample: some 60 us


class Run(NamedTuple):
    """Samples that are multiplied by the references first, ..., last - 1."""

    rows: Tensor  # [m] int64
    first: int  # a multiple of 128
    last: int


class Peaks(NamedTuple):
    """What is known of the samples' largest logits."""

    floor: Tensor  # [B] float64: none is smaller
    lower: Tensor  # [B] float64: the largest lower bound of a logit
    where: Tensor  # [B] int64: the reference it belongs to, -1 for none

    @staticmethod
    def of(floor: Tensor) -> Peaks:
        lower = torch.full_like(floor, -torch.inf)
        floor = torch.where(floor.isnan(), lower, floor)
        return Peaks(floor, lower, torch.full_like(floor, -1, dtype=torch.int64))

    def addresses(self) -> tuple[int, ...]:
        return tuple(map(address, self))


class Call(NamedTuple):
    """Arguments and results of `logits`."""

    samples: Samples
    refs: Prepared
    relative: Tensor  # [B, n] float32
    anchors: Tensor  # [B, ceil(n / 128)] float64, -inf until they are known

    @staticmethod
    def of(samples: Samples, refs: Prepared) -> Call:
        rows, n = len(samples.q), len(refs.norms)
        relative = torch.empty((rows, n), dtype=torch.float32, device="cpu")
        blocks = (rows, -(-n // ar.BLOCK))
        anchors = torch.full(blocks, -torch.inf, dtype=torch.float64, device="cpu")
        return Call(samples, refs, relative, anchors)

    def addresses(self) -> tuple[tuple[int, ...], ...]:
        """csrc/cpu_stages.h: LogitCall."""
        samples, refs = self.samples, self.refs
        student = samples.student or (None, None)
        return (
            tuple(map(address, (samples.slope, samples.curvature, *student, samples.labels))),
            tuple(map(address, (refs.norms, refs.bias, refs.labels))),
            (len(refs.norms), address(self.relative), address(self.anchors)),
        )

    def digits(self) -> tuple[int, int, int]:
        """csrc/cpu_stages.h: Quantized."""
        _, limbs, dim = self.samples.q.shape
        return address(self.samples.q), dim, limbs


def logits(
    samples: Samples, refs: Prepared, floor: Tensor | float | None = None
) -> tuple[Tensor, Tensor]:
    """Stage 2: r float32 [B, n] relative to anchors m float64 [B, ceil(n / 128)].

    Where an anchor is -inf, r is not initialised. With a `floor`, -inf if nothing is known, what
    cannot come within EXP2_FLOOR + 1 of the row's largest logit is left out, a whole block as one
    of anchor -inf, references in others as ones of r = -inf.
    """
    call = Call.of(samples, refs)
    runs = runs_of(samples.labels, len(samples.q), refs)
    if floor is not None and can_screen(refs, runs):
        if not isinstance(floor, Tensor):
            floor = torch.full_like(samples.slope, floor)
        runs = screen(call, runs, floor)
    for run in runs:
        multiply(call, run)
    return call.relative, call.anchors


def runs_of(labels: Tensor | None, rows: int, refs: Prepared) -> list[Run]:
    """Products that cover every sample and block in which there is a reference of its class."""
    n = len(refs.norms)
    if labels is None:
        return [Run(torch.arange(rows, device="cpu"), 0, n)]
    seen = torch.empty((-(-n // ar.BLOCK), rows), dtype=torch.uint8, device="cpu")
    extension().seen(
        address(labels), rows, address(refs.labels), n, address(seen), torch.get_num_threads()
    )
    runs = []
    for first, last in stretches(seen):
        members = seen[first:last].any(0).nonzero()[:, 0]
        runs.append(Run(members, first * ar.BLOCK, min(last * ar.BLOCK, n)))
    return runs


def stretches(seen: Tensor) -> list[tuple[int, int]]:
    """Blocks first, ..., last - 1 that are best multiplied together; none that nobody sees.

    Args:
        seen: which samples see which block, uint8 [blocks, B]
    """
    members = [int.from_bytes(row.tobytes(), "big") for row in np.packbits(seen.numpy(), axis=1)]
    out: list[tuple[int, int]] = []
    together = 0  # the samples of the last stretch
    for block, mine in enumerate(members):
        if mine == 0:
            continue
        if out and out[-1][1] == block:
            first, union = out[-1][0], together | mine
            apart = together.bit_count() * (block - first) + mine.bit_count()
            if union.bit_count() * (block + 1 - first) <= apart + CALL:
                out[-1], together = (first, block + 1), union
                continue
        out.append((block, block + 1))
        together = mine
    return out


def multiply(call: Call, run: Run, tops: Tensor | None = None, peaks: Peaks | None = None) -> None:
    """The logits of one run from the products of all digits.

    Args:
        tops: samples int64 [m] of which only the most significant part is multiplied, for upper
            bounds of their logits in `relative` and `anchors`; of bytes only
        peaks: whose lower bounds they raise
    """
    q, whole = call.samples.q, call.samples.q
    if len(run.rows) < len(q):
        whole = q[run.rows]
    count, (ref_limbs, _, dim) = len(run.rows), call.refs.values.shape
    terms = -(-dim // -(-dim // ar.MAX_INT32_TERMS))  # of a span of a sum too long for int32
    lefts = [cpu_products.factor(part) for part in whole.split(terms, 2)]
    full = len(lefts[0])
    if tops is not None:
        lefts[0] = torch.cat([lefts[0], cpu_products.tops(q[tops])])
    held, dtype = ref_limbs * len(lefts) * len(lefts[0]), cpu_products.sums_dtype(lefts[0])
    fitting = cpu_products.PRODUCT_BYTES // (held * dtype.itemsize)
    width = ar.BLOCK * max(1, fitting // ar.BLOCK)
    buffer = torch.empty(held * min(width, run.last - run.first), dtype=dtype, device="cpu")
    halves, threads = dtype == torch.int64, torch.get_num_threads()
    for first in range(run.first, run.last, width):
        part = call.refs.values[:, first : min(first + width, run.last)]
        columns = part.shape[1]
        dots = buffer[: held * columns].view(ref_limbs, len(lefts), len(lefts[0]), columns)
        for limb, span in itertools.product(range(ref_limbs), range(len(lefts))):
            right = part[limb, :, span * terms : (span + 1) * terms]
            cpu_products.multiply(lefts[span], right.t(), dots[limb, span])
        if count:
            sums = address(dots), len(lefts), full // count, columns, halves
            rows = address(run.rows), count
            extension().logits(sums, *rows, ref_limbs, call.addresses(), first, threads)
        if tops is not None and peaks is not None:
            scale, offset = call.refs.affine.tolist()
            extension().bound(
                (address(dots[0, 0, full:]), 1, 1, columns, halves),
                address(tops),
                len(tops),
                call.digits(),
                offset / scale,
                call.addresses(),
                first,
                peaks.addresses(),
                threads,
            )


def can_screen(refs: Prepared, runs: list[Run]) -> bool:
    """Whether bounds come first."""
    limbs, _, dim = refs.values.shape
    if limbs > 1 or dim > MAX_SCREENED_DIM:
        return False
    return sum(len(run.rows) * (run.last - run.first) for run in runs) >= SCREENED


def screen(call: Call, runs: list[Run], floor: Tensor) -> list[Run]:
    """The logits of samples near whose peak are few references; returns the runs that are left.

    Args:
        floor: as in torch_backend.logits
    """
    rows = len(call.samples.q)
    halves = cpu_products.halves(call.samples.q)
    visible = torch.zeros(rows, dtype=torch.int64, device="cpu")
    for run in runs:
        visible[run.rows] += run.last - run.first
    chosen = helped(call, halves, floor)
    peaks = Peaks.of(floor)
    for run in runs:
        top = chosen[run.rows]
        multiply(call, run._replace(rows=run.rows[~top]), run.rows[top], peaks)
    tried = chosen.nonzero()[:, 0]
    excess = settle(call, tried, halves, peaks) - visible[tried] // MANY
    few = excess <= 0
    if int(excess[~few].sum()) < AGAIN * len(call.refs.norms):
        few.fill_(True)
    refine(call, tried[few], halves, peaks.floor)
    many = torch.zeros(rows, dtype=torch.bool, device="cpu")
    many[tried[~few]] = True
    left = (run._replace(rows=run.rows[many[run.rows]]) for run in runs)
    return [run for run in left if len(run.rows)]


def helped(call: Call, halves: Tensor, floor: Tensor) -> Tensor:
    """Which samples bounds seem to help, bool [B], judged by some of the references."""
    refs, rows = call.refs, torch.arange(len(floor), device="cpu")
    every = slice(None, None, max(1, len(refs.norms) // TRIED))
    some = Prepared(
        refs.values[:, every].contiguous(),
        refs.norms[every].contiguous(),
        refs.affine,
        None if refs.bias is None else refs.bias[every].contiguous(),
        None if refs.labels is None else refs.labels[every].contiguous(),
    )
    trial, peaks = Call.of(call.samples, some), Peaks.of(floor)
    multiply(trial, Run(rows[:0], 0, len(some.norms)), rows, peaks)
    candidates = settle(trial, rows, halves, peaks)
    visible = (trial.relative != -torch.inf).sum(1)
    return candidates * MANY <= visible


def settle(call: Call, rows: Tensor, halves: Tensor, peaks: Peaks) -> Tensor:
    """Raises the floor of `rows` to the exact logit of the reference that promises most.

    Args:
        halves: the samples in 16-bit halves, int16 [B, 2, d]

    Returns:
        how many references may come within EXP2_FLOOR + 1 of the row's peak, int64 [len(rows)]
    """
    candidates = torch.empty_like(rows)
    extension().settle(
        address(rows),
        len(rows),
        address(halves),
        halves.shape[2],
        address(call.refs.values),
        call.addresses(),
        peaks.addresses(),
        address(candidates),
        torch.get_num_threads(),
    )
    return candidates


def refine(call: Call, rows: Tensor, halves: Tensor, floor: Tensor) -> None:
    """The exact logits of `rows` where their bounds reach the floor."""
    extension().refine(
        address(rows),
        len(rows),
        address(halves),
        halves.shape[2],
        address(call.refs.values),
        call.addresses(),
        address(floor),
        torch.get_num_threads(),
    )
