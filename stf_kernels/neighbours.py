"""The nearest reference, found by integer products and measured by float64 differences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import arguments
from . import arithmetic as ar
from .backends import resolve
from .pipeline import ReferenceSet, plan
from .references import References, readable
from .stages import NOWHERE, Queries, Samples, Stages
from .target import WORKSPACE
from .torch_backend import join_limbs

LIMBS = ar.LIMBS["exact"]
BLOCKS_AT_ONCE = 1 << 10  # blocks of 128 references looked through
MEASURED_AT_ONCE = 1 << 18  # values of samples and references subtracted
ROUNDING = (
    2.0**-49
)  # for each limb of a reference: of the float64 operations of stage 2, and to spare


class Nearest(NamedTuple):
    """The nearest reference of each sample.

    Attributes:
        index: the first of references at the same distance, int64 [B]; -1 where there is none
        distance: float64 [B], data units; NaN where there is none
    """

    index: Tensor  # type: ignore[assignment]
    distance: Tensor


def nearest(
    x_t: Tensor,
    ref: Tensor | References,
    *,
    labels: Tensor | None = None,
    backend: str = "auto",
    workspace: int = WORKSPACE,
) -> Nearest:
    """The nearest reference of each sample in Euclidean distance: is it a copy of one?

        index_i = argmin_k ||x_i - y_k||,    distance_i = min_k ||x_i - y_k||

    The search is exact: integer products leave over every reference that can be the nearest, and
    those are measured by differences in float64. A `log_weight` of the references has no part in
    it, but for -inf, which leaves a reference out.

    Args:
        x_t: samples, such as generated ones, [B, *shape], float16, bfloat16, float32 or float64,
            data units
        ref: references [n, *shape]: `References`, or a float tensor to prepare for this call
        labels: classes of the samples, integer [B], against `References.labels`: only references
            of the same class count; -1 sees all
        backend: "auto", "cpu", "triton", "cuda" or "torch"
        workspace: memory to stay below beside arguments, result and some 20 MB, bytes; references
            that do not fit pass in chunks

    Returns:
        `Nearest`: index and distance; -1 and NaN for a sample that is not finite or has no
        reference

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came
        BackendUnavailable: the backend asked for cannot run on x_t's device

    Example:
        >>> found = stf_kernels.nearest(generated, refs)
        >>> copies = refs.decode(found.index)[found.distance < 1]
    """
    arguments.check_samples(x_t)
    arguments.check_shard(ref, None)
    refs = arguments.as_references(ref, x_t, "exact", backend)
    labels = arguments.checked_labels(labels, refs, x_t)
    if labels is not None and readable(labels):
        arguments.check_classes(labels, refs)
    stages = resolve(backend, x_t.device)
    bias = refs.log_weight
    if bias is not None:
        bias = torch.where(bias == -torch.inf, -torch.inf, 0.0).double()
    among = ReferenceSet(refs._values, refs._norms, refs._affine, bias, refs.labels)
    x = x_t.detach().flatten(1)
    x = (x if x.dtype == torch.float64 else x.float()).contiguous()
    cut = plan(stages, max(len(x), 1), len(refs), among, LIMBS, arguments.byte_count(workspace))
    index = torch.empty(len(x), dtype=torch.int64, device=x.device)
    square = torch.empty(len(x), dtype=torch.float64, device=x.device)
    for start in range(0, len(x), cut.rows):
        rows = slice(start, start + cut.rows)
        seen = None if labels is None else labels[rows]
        index[rows], square[rows] = _search(stages, x[rows], seen, among, cut.columns)
    found = index < NOWHERE
    return Nearest(torch.where(found, index, -1), torch.where(found, ar.sqrt(square), torch.nan))


def _search(
    stages: Stages, x: Tensor, labels: Tensor | None, among: ReferenceSet, columns: int
) -> tuple[Tensor, Tensor]:
    """The nearest of one block of samples, or NOWHERE, and the squared distance; [B] each.

    What stage 2 returns is 2 (step q / a) . v - N here: a constant less ||step q - y||^2 / a^2.
    """
    scale, offset = among.affine
    q, step = stages.quantize(x, LIMBS)
    one = torch.ones_like(step)
    queries = Queries(x, one, one, None, labels, "denoised", ())
    samples = stages.coefficients(queries, q, step, among.affine, True)
    samples = samples._replace(slope=2 * step / scale, curvature=one)
    slack = _Slack(samples, step, among)
    peak = torch.full_like(step, -torch.inf)
    index = torch.full_like(step, NOWHERE, dtype=torch.int64)
    square = torch.full_like(step, torch.inf)
    first = 0
    for chunk in among.chunks(columns):
        logits = stages.logits(samples, chunk)
        peak = torch.maximum(peak, logits[1].amax(1))
        for row, column in at_least(*logits, peak - slack(peak)):
            for i, k in zip(*(t.split(_pairs(x)) for t in (row, column)), strict=True):
                y = scale * join_limbs(chunk.values[:, k]).double() + offset
                distance = ordered_sum((x[i].double() - y) ** 2)
                _take_in(index, square, i, first + k, distance)
        first += len(chunk.norms)
    return index, square


def at_least(relative: Tensor, anchors: Tensor, least: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows and columns of the logits m + r >= least.

    Args:
        relative, anchors: as stage 2 returns them
        least: float64 [B]; a row of NaN has none
    """
    n, inside = relative.shape[1], torch.arange(ar.BLOCK, device=relative.device)
    alive = (anchors >= least[:, None]) & (anchors > -torch.inf)
    for row, block in zip(*(t.split(BLOCKS_AT_ONCE) for t in alive.nonzero().T), strict=True):
        column = ar.BLOCK * block[:, None] + inside
        logit = relative[row[:, None], column.clamp_max(n - 1)].double() + anchors[row, block, None]
        i, j = ((logit >= least[row, None]) & (column < n)).nonzero().T
        if len(i):
            yield row[i], column[i, j]


class _Slack:
    """How far below the largest of a row's logits the nearest reference's may be, in units of a^2.

    Let k be the nearest, l the reference of the largest logit, delta = x - step q. The logits are
    right but for 2 delta . v / a and rounding, so l's exceeds k's by at most

        2 |delta . (v_k - v_l)| / a <= (step / a) sqrt(d) ||v_k - v_l|| <= 2 (step / a) sqrt(d) u

    where u = ||x - y_l|| / a is no smaller than the distance of k; and u comes from l's logit.
    """

    def __init__(self, samples: Samples, step: Tensor, among: ReferenceSet) -> None:
        x, distance = samples.x, samples.distance
        assert distance is not None
        scale, offset = among.affine
        limbs, width = among.values.limbs, x.shape[1] ** 0.5
        norm = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64) + width * offset.abs()
        # No term of stage 2 exceeds the square, and |v| is below 256^R.
        self.rounding = limbs * ROUNDING * (norm / scale + width * ar.LIMB_RADIX**limbs) ** 2
        self.base = distance / scale**2
        self.step = width * step / scale

    def __call__(self, peak: Tensor) -> Tensor:
        u = ((self.base - peak).clamp_min(0) + self.rounding).sqrt() + self.step
        # What is added last: the float32 of r.
        return (2 * self.step * u + 2 * self.rounding) * (1 + 2.0**-20)


def ordered_sum(terms: Tensor) -> Tensor:
    """Row sums [m] of [m, d], halves added until one is left: the same bits in any batch."""
    while terms.shape[1] > 1:
        half = (terms.shape[1] + 1) // 2
        rest = terms[:, half:]
        terms = torch.cat([terms[:, : rest.shape[1]] + rest, terms[:, rest.shape[1] : half]], 1)
    return terms[:, 0]


def _pairs(x: Tensor) -> int:
    return max(1, MEASURED_AT_ONCE // x.shape[1])


def _take_in(index: Tensor, square: Tensor, row: Tensor, column: Tensor, distance: Tensor) -> None:
    """Makes `column` the row's nearest where it is nearer, or as near and before."""
    least = square.scatter_reduce(0, row, distance, "amin")
    index[least < square] = NOWHERE
    column = torch.where(distance == least[row], column, NOWHERE)
    index.scatter_reduce_(0, row, column, "amin")
    square.copy_(least)
