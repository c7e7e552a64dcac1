"""Stage 2 on the CPU leaves out what cannot count, and nothing else."""

from __future__ import annotations

import math
from typing import NamedTuple

import helpers
import pytest
import torch
from torch import Tensor

from stf_kernels import (
    References,
    arithmetic,
    cpu_backend,
    cpu_logits,
    cpu_products,
    stable_target_with_stats,
    torch_backend,
)
from stf_kernels.pipeline import Plan
from stf_kernels.stages import Prepared, Queries, Samples

needs_extension = pytest.mark.skipif(
    cpu_backend.extension() is None, reason="the extension stf_kernels._C is not built"
)
with_either_product = pytest.mark.usefixtures("either_product")
pytestmark = needs_extension

AWAY = arithmetic.EXP2_FLOOR + 1


class Problem(NamedTuple):
    """The same samples as two backends keep them, and references of bytes."""

    spec: Samples
    mine: Samples
    refs: Prepared


def problem(
    data: Tensor,
    x: Tensor,
    sigma: Tensor,
    *,
    alpha: float = 1.0,
    value_range: tuple[float, float] = (-1.0, 1.0),
    precision: str = "exact",
    D: float | None = None,
    **of_refs: Tensor,
) -> Problem:
    """Stage 1 of samples x float [B, d] and references uint8 [n, d]."""
    labels = of_refs.pop("labels", None)
    lo, hi = value_range
    step = (hi - lo) / 255
    twice = 256 + 2 * lo * 255 / (hi - lo)
    values = (data.to(torch.int16) - 128).to(torch.int8)[None]
    affine = torch.tensor([step, 128 * step + lo], dtype=torch.float64)
    norms = torch_backend.norms(values, twice)
    refs = Prepared(values, norms, affine, of_refs.get("bias"), of_refs.get("ref_labels"))
    alphas = torch.full_like(sigma, alpha)
    degrees = None if D is None else torch.full_like(sigma, D)
    queries = Queries(x, sigma, alphas, degrees, labels, "denoised", ())
    both = []
    for stages in (torch_backend, cpu_backend):
        q, unit = stages.quantize(x, arithmetic.LIMBS[precision])
        both.append(stages.coefficients(queries, q, unit, affine, False))
    return Problem(*both, refs)


def nothing_known(rows: int) -> Tensor:
    return torch.full((rows,), -torch.inf, dtype=torch.float64)


def alive(anchors: Tensor) -> Tensor:
    """Which (sample, block) was not left out."""
    return anchors != -torch.inf


class Work(NamedTuple):
    """What stage 2 did, call by call."""

    products: list[int]  # rows times columns of each limb product
    bounded: list[int]  # samples of which the top digit was multiplied
    refined: list[int]  # samples of which only candidates were computed


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    done = Work([], [], [])
    product, multiply, refine = cpu_products.multiply, cpu_logits.multiply, cpu_logits.refine

    def multiplying(left: Tensor, right: Tensor, out: Tensor) -> None:
        done.products.append(len(left) * right.shape[1])
        product(left, right, out)

    def bounding(call: object, run: object, tops: Tensor | None = None, *rest: object) -> None:
        done.bounded.append(0 if tops is None else len(tops))
        multiply(call, run, tops, *rest)

    def refining(call: object, rows: Tensor, *rest: object) -> None:
        done.refined.append(len(rows))
        refine(call, rows, *rest)

    monkeypatch.setattr(cpu_products, "multiply", multiplying)
    monkeypatch.setattr(cpu_logits, "multiply", bounding)
    monkeypatch.setattr(cpu_logits, "refine", refining)
    return done


@pytest.fixture(params=["int8", "halves"])
def either_product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds by products of the most significant digit, and of the upper half."""
    if request.param == "halves":
        monkeypatch.setattr(cpu_products, "has_int8_products", lambda: False)
    elif not cpu_products.has_int8_products():
        pytest.skip("no fast exact int8 products here")


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds come first however small the problem."""
    monkeypatch.setattr(cpu_logits, "SCREENED", 0)


def assert_same_sums(
    some: Problem, outputs: tuple[Tensor, Tensor], precision: str = "exact"
) -> Tensor:
    """What `outputs` of the CPU's stage 2 leaves is exact, the rest counts nowhere; which is left.

    The specification's logits give anchors, and the peak; sums are compared after stage 4.
    """
    relative, anchors = torch_backend.logits(some.spec, some.refs)
    peak = anchors.amax(1)
    left = alive(outputs[1])
    assert torch.equal(outputs[1][left].nan_to_num(), anchors[left].nan_to_num())
    assert torch.equal(outputs[1][left].isnan(), anchors[left].isnan())
    assert not ((anchors >= peak[:, None] - AWAY) & alive(anchors) & ~left).any()
    assert not anchors[~left].isnan().any()
    for statistics in (False, True):
        spec = torch_backend.weights(relative, anchors, peak, precision, statistics)
        mine = cpu_backend.weights(*outputs, peak, precision, statistics)
        for a, b in zip(spec[1:], mine[1:], strict=True):
            assert (a is None and b is None) or torch.equal(a, b)
        num = torch_backend.weighted_sum(spec, some.refs.values)
        assert torch.equal(cpu_backend.weighted_sum(mine, some.refs.values), num)
    return left


ROWS, COUNT, SIZE = 48, 1000, 16  # 1000 is no multiple of 128


def patches(*, by_class: bool = False) -> tuple[Tensor, Tensor]:
    """References of photographs uint8 [n, d], some nearly equal, and classes int64 [n]."""
    images = helpers.photograph_patches(COUNT - 100, SIZE)
    images = torch.cat([images, helpers.near_duplicates(images[:50], 2)]).flatten(1)
    labels = torch.arange(COUNT) * 5 // COUNT
    return images, labels if by_class else labels[torch.randperm(COUNT)]


def noisy_patches(images: Tensor, sigma: Tensor) -> Tensor:
    y = helpers.byte_values(images[torch.arange(len(sigma)) * 37 % len(images)])
    return helpers.noisy(y, sigma, seed=3)


def photographs(*, by_class: bool = False, source: bool = True, **options: object) -> Problem:
    torch.manual_seed(0)
    images, labels = patches(by_class=by_class)
    sigma = torch.logspace(math.log10(0.002), math.log10(80), ROWS, dtype=torch.float64)
    x = noisy_patches(images, sigma)
    if not source:
        images = images[torch.arange(COUNT).fmod(37) != 0]
        labels = labels[: len(images)]
    if options.pop("classes", False):
        options |= {"ref_labels": labels, "labels": torch.arange(ROWS) % 6 - 1}
    if options.pop("weighted", False):
        weight = torch.where(torch.rand(len(images)) < 0.3, -torch.inf, torch.randn(len(images)))
        options["bias"] = weight.double() * arithmetic.LOG2E
    return problem(images, x, sigma, **options)


CASES = {
    "plain": {},
    "fast": {"precision": "fast"},
    "source left out": {"source": False},
    "weights": {"weighted": True},
    "classes": {"classes": True},
    "classes in order": {"classes": True, "by_class": True},
    "student-t": {"D": 64.0},
    "student-t of 2 degrees": {"D": 2.0},
    "all at once": {"D": 2048.0, "weighted": True, "classes": True, "by_class": True},
    "alpha": {"alpha": -0.7},
    "value range": {"value_range": (10.0, 11.0)},
}


@with_either_product
@pytest.mark.parametrize("case", CASES)
def test_what_is_left_out_counts_nowhere(case, always, work):
    some = photographs(**CASES[case])
    outputs = cpu_backend.logits(some.mine, some.refs, nothing_known(ROWS))
    assert work.bounded[0] == ROWS  # by some of the references
    assert work.refined[0] > ROWS // 3  # many of the samples had few candidates
    left = assert_same_sums(some, outputs, CASES[case].get("precision", "exact"))
    assert left.float().mean() < 0.9
    assert left[-1].all() or some.mine.labels is not None  # where all count, all are left


@with_either_product
@pytest.mark.parametrize("isa", cpu_backend.extension().isas() if cpu_backend.extension() else [])
@pytest.mark.parametrize("threads", [1, 3])
def test_bounds_are_the_same_for_all_threads_and_instruction_sets(
    isa, threads, always, use_isa, num_threads
):
    for options in ({}, {"D": 64.0, "weighted": True}):
        some = photographs(**options)
        num_threads(1)
        spec = cpu_backend.logits(some.mine, some.refs, nothing_known(ROWS))
        num_threads(threads)
        use_isa(isa)
        mine = cpu_backend.logits(some.mine, some.refs, nothing_known(ROWS))
        assert torch.equal(spec[1], mine[1])
        left = alive(spec[1]).repeat_interleave(arithmetic.BLOCK, 1)[:, :COUNT]
        assert torch.equal(spec[0][left], mine[0][left])


@with_either_product
def test_a_floor_leaves_out_more(always, work):
    some = photographs()
    _, anchors = torch_backend.logits(some.spec, some.refs)
    peak, counts = anchors.amax(1), []
    for floor in (nothing_known(ROWS), peak - 1000, peak - 20, peak):
        left = assert_same_sums(some, cpu_backend.logits(some.mine, some.refs, floor))
        counts.append(int(left.sum()))
    assert counts == sorted(counts, reverse=True)
    _, far = cpu_backend.logits(some.mine, some.refs, peak + 2000)  # a peak in another chunk
    assert not alive(far[: ROWS // 2]).any()
    assert min(work.refined) > 0


@with_either_product
def test_without_a_floor_every_logit_is_there(always, work):
    some = photographs()
    for mine, spec in zip(
        cpu_backend.logits(some.mine, some.refs),
        torch_backend.logits(some.spec, some.refs),
        strict=True,
    ):
        assert torch.equal(mine, spec)
    assert work.refined == []


def test_small_problems_and_float_references_are_not_bounded(work):
    some = photographs()
    assert cpu_logits.SCREENED > ROWS * COUNT
    cpu_backend.logits(some.mine, some.refs, nothing_known(ROWS))
    ref = helpers.byte_values(patches()[0]).float()
    stable_target_with_stats(ref[:9], ref, 0.1, backend="cpu")
    assert work.products
    assert sum(work.bounded) == len(work.refined) == 0


@with_either_product
def test_samples_that_bounds_do_not_help_take_all_products(always, work):
    images, _ = patches()
    sigma = torch.linspace(40, 80, ROWS, dtype=torch.float64)
    some = problem(images, noisy_patches(images, sigma), sigma)
    outputs = cpu_backend.logits(some.mine, some.refs, nothing_known(ROWS))
    assert assert_same_sums(some, outputs).all()
    assert work.bounded == [ROWS, 0]  # tried with some references, then none
    assert work.refined == [0]


@with_either_product
def test_samples_that_only_seemed_to_be_helped_take_all_products(always, work, monkeypatch):
    monkeypatch.setattr(cpu_logits, "TRIED", 1)  # the first reference of all
    images, _ = patches()
    sigma = torch.full((ROWS,), 20.0, dtype=torch.float64)
    bias = torch.zeros(COUNT, dtype=torch.float64)
    bias[::COUNT] = -torch.inf  # no candidate
    some = problem(images, noisy_patches(images, sigma), sigma, bias=bias)
    outputs = cpu_backend.logits(some.mine, some.refs, nothing_known(ROWS))
    assert assert_same_sums(some, outputs).all()
    assert work.bounded == [ROWS, ROWS, 0]
    assert work.refined == [0]


@with_either_product
def test_one_sample_with_many_candidates_is_not_worth_reading_all_again(always, work, monkeypatch):
    images, _ = patches()
    sigma = torch.full((ROWS,), 0.05, dtype=torch.float64)
    sigma[5] = 20
    some = problem(images, noisy_patches(images, sigma), sigma)
    monkeypatch.setattr(cpu_logits, "helped", lambda *_: torch.ones(ROWS, dtype=torch.bool))
    outputs = cpu_backend.logits(some.mine, some.refs, nothing_known(ROWS))
    assert assert_same_sums(some, outputs)[5].all()
    assert work.bounded == [ROWS]
    assert work.refined == [ROWS]


@with_either_product
def test_rows_without_a_target_stay_alone(always, work):
    images, _ = patches()
    sigma = torch.full((12,), 0.1, dtype=torch.float64)
    x = noisy_patches(images, sigma)
    sigma[0], sigma[1], sigma[2], sigma[3] = 0, -1, torch.nan, torch.inf
    x[4, 7], x[5, 0] = torch.nan, torch.inf
    x[6] = 0
    sigma[7] = 1e-150
    some = problem(images, x, sigma)
    assert_same_sums(some, cpu_backend.logits(some.mine, some.refs, nothing_known(12)))
    assert work.refined[-1] >= 4


@with_either_product
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e300, -1e300])
def test_any_bias_gives_what_all_products_give(value, always, work):
    images, _ = patches()
    sigma = torch.full((12,), 0.1, dtype=torch.float64)
    bias = torch.zeros(COUNT, dtype=torch.float64)
    bias[[300, 700]] = value
    labels = {"ref_labels": torch.arange(COUNT) // 500, "labels": torch.arange(12) % 2}
    for some in (
        problem(images, noisy_patches(images, sigma), sigma, bias=bias),
        problem(images, noisy_patches(images, sigma), sigma, bias=bias[:500].repeat(2), **labels),
        problem(images, noisy_patches(images, sigma), sigma, bias=torch.full_like(bias, value)),
    ):
        assert_same_sums(some, cpu_backend.logits(some.mine, some.refs, nothing_known(12)))
    assert work.refined[0] > 0


def bounds(some: Problem) -> tuple[Tensor, Tensor]:
    """Lower and upper bounds of every logit, float64 [B, n]: of sets of one reference each."""
    rows, (_, n, _) = len(some.mine.x), some.refs.values.shape
    lower, upper = torch.empty(2, rows, n, dtype=torch.float64)
    for k in range(n):
        call = cpu_logits.Call.of(some.mine, only(some.refs, k))
        peaks = cpu_logits.Peaks.of(nothing_known(rows))
        run = cpu_logits.Run(torch.arange(0), 0, 1)
        cpu_logits.multiply(call, run, torch.arange(rows), peaks)
        assert (call.relative.double() >= call.anchors).all()
        lower[:, k], upper[:, k] = peaks.lower, call.anchors[:, 0]
    return lower, upper


def only(refs: Prepared, k: int) -> Prepared:
    bias = None if refs.bias is None else refs.bias[k : k + 1].clone()
    values = refs.values[:, k : k + 1].contiguous()
    return Prepared(values, refs.norms[k : k + 1].clone(), refs.affine, bias, None)


def exact(some: Problem) -> Tensor:
    """Every logit of the specification, float64 [B, n]: the anchor of a set of one reference."""
    n = some.refs.values.shape[1]
    return torch.cat([torch_backend.logits(some.spec, only(some.refs, k))[1] for k in range(n)], 1)


def assert_bounded(some: Problem) -> Tensor:
    """No logit is out of its bounds; how wide they are, as a share of the row's logits' spread."""
    (lower, upper), logit = bounds(some), exact(some)
    assert torch.isfinite(logit).all()
    assert (lower <= logit).all()
    assert (logit <= upper).all()
    spread = logit.amax(1) - logit.amin(1)
    return (upper - lower).amax(1) / spread


@with_either_product
@pytest.mark.parametrize("precision", helpers.PRECISIONS)
@pytest.mark.parametrize("value_range", [(-1.0, 1.0), (0.0, 1.0), (100.0, 101.0), (-3e-5, 9e4)])
@pytest.mark.parametrize("noise", [None, 1.0, 64.0, 1e6])
def test_no_logit_is_out_of_its_bounds(precision, value_range, noise):
    torch.manual_seed(1)
    lo, hi = value_range
    for dim in (2, 3, 65, 768):
        images = torch.randint(0, 256, (20, dim), dtype=torch.uint8)
        images[1], images[2], images[3] = 0, 255, 128
        sigma = torch.logspace(-3, 3, 24, dtype=torch.float64) * (hi - lo)
        x = helpers.byte_values(images[torch.arange(24) % 20], lo, hi)
        x = x + sigma[:, None] * torch.randn(24, dim, dtype=torch.float64)
        x[-1], x[-2] = 0, hi
        for alpha in (1.0, -0.3):
            some = problem(
                images,
                (alpha * x).float(),
                sigma,
                alpha=alpha,
                value_range=value_range,
                precision=precision,
                D=noise,
                bias=torch.randn(20, dtype=torch.float64) * 10,
            )
            assert_bounded(some)


@with_either_product
def test_bounds_that_are_reached_are_kept():
    """The worst case: what the top digit leaves of a sample points straight at a reference."""
    torch.manual_seed(2)
    dim = 96
    images = torch.randint(0, 256, (12, dim), dtype=torch.uint8)
    y = helpers.byte_values(images)
    x = []
    for towards in y:
        x.append(y[0] + 0.9 / 127 / 2 * (towards - y[0]) / (towards - y[0] + 1e-9).abs().amax())
        x.append(y[0] - 0.9 / 127 / 2 * (towards - y[0]) / (towards - y[0] + 1e-9).abs().amax())
    x = torch.cat([torch.stack(x), torch.full((2, dim), 1 / 127 / 2, dtype=torch.float64)])
    for scale in (1e-3, 0.1, 10.0):
        sigma = torch.full((len(x),), scale, dtype=torch.float64)
        some = problem(images, x.float(), sigma)
        assert_bounded(some)


@with_either_product
@pytest.mark.parametrize("noise", [None, 3.0])
def test_bounds_without_a_rest_have_room_for_rounding(noise):
    """Samples that are their top digits: the bounds are the logit, but for the order of sums."""
    torch.manual_seed(3)
    images = torch.randint(0, 256, (20, 300), dtype=torch.uint8)
    x = torch.randint(-127, 128, (24, 300)).float()
    x[:, 0] = 127
    sigma = torch.logspace(-2, 3, 24, dtype=torch.float64)
    some = problem(images, x, sigma, value_range=(-50.0, 60.0), D=noise)
    assert not some.mine.q[:, :-1].any()
    assert (assert_bounded(some) < 2.0**-20).all()


@with_either_product
def test_bounds_are_close_where_there_is_little_noise():
    images, _ = patches()
    sigma = torch.logspace(-2.5, -0.5, 16, dtype=torch.float64)
    some = problem(images[::25], noisy_patches(images, sigma), sigma)
    assert (assert_bounded(some) < 0.1).all()


@with_either_product
@pytest.mark.parametrize("columns", [256, 1024])
@pytest.mark.parametrize("keep", [False, True])
def test_a_target_has_the_same_bits_in_chunks(columns, keep, always, work, monkeypatch):
    torch.manual_seed(4)
    images, labels = patches(by_class=True)
    refs = References(images, value_range=(-1, 1), labels=labels, log_weight=torch.randn(COUNT))
    sigma = torch.logspace(-2.5, 1.5, ROWS, dtype=torch.float64)
    x = noisy_patches(images, sigma)
    for options in ({}, {"labels": torch.arange(ROWS) % 6 - 1}, {"noise": "student_t", "D": 64}):
        spec = stable_target_with_stats(x, refs, sigma, backend="torch", **options)
        with monkeypatch.context() as patch:
            patch.setattr("stf_kernels.pipeline.plan", lambda *_: Plan(20, columns, keep))
            mine = stable_target_with_stats(x, refs, sigma, backend="cpu", **options)
        assert torch.equal(spec[0], mine[0])
        for name, a, b in zip(spec[1]._fields, spec[1], mine[1], strict=True):
            assert torch.equal(a, b), name
    assert len(work.refined) > 0
    assert sum(work.refined) > 0


def test_a_set_in_the_order_of_its_classes_is_read_where_its_class_is(work):
    torch.manual_seed(5)
    images, labels = torch.randint(0, 256, (2048, 64), dtype=torch.uint8), torch.arange(2048) // 256
    sigma = torch.linspace(0.1, 3, 160, dtype=torch.float64)
    x = helpers.noisy(helpers.byte_values(images[:160]), sigma)
    mine = torch.arange(160) % 8
    digits = 4 if cpu_products.has_int8_products() else 2
    some = problem(images, x, sigma, labels=mine, ref_labels=labels)
    outputs = cpu_backend.logits(some.mine, some.refs)
    assert work.products == [20 * digits * 256] * 8
    own = labels.view(-1, arithmetic.BLOCK)[:, 0] == mine[:, None]
    assert torch.equal(assert_same_sums(some, outputs), own)

    work.products.clear()
    some = problem(images, x, sigma, labels=mine, ref_labels=labels[torch.randperm(2048)])
    outputs = cpu_backend.logits(some.mine, some.refs)
    assert work.products == [160 * digits * 2048]  # every class is in every block
    assert assert_same_sums(some, outputs).all()


def test_stretches_cover_what_is_seen_and_little_more():
    torch.manual_seed(6)
    for share in (0.01, 0.1, 0.5, 0.99):
        seen = (torch.rand(60, 37) < share).to(torch.uint8)
        found = cpu_logits.stretches(seen)
        covered, cost = torch.zeros_like(seen), 0
        for first, last in found:
            members = seen[first:last].amax(0)
            assert members.any()
            assert not covered[first:last].any()  # each block once
            covered[first:last] = members
            cost += cpu_logits.CALL + int(members.sum()) * (last - first)
        assert (covered >= seen).all()
        assert not covered[seen.sum(1) == 0].any()  # a block nobody sees is not read
        assert cost <= cpu_logits.CALL * int(seen.amax(1).sum()) + int(seen.sum())
    assert cpu_logits.stretches(torch.ones(9, 3, dtype=torch.uint8)) == [(0, 9)]
    assert cpu_logits.stretches(torch.zeros(9, 3, dtype=torch.uint8)) == []
    blocks = torch.zeros(9, 200, dtype=torch.uint8)
    blocks[:4, :100] = blocks[4:, 100:] = 1
    assert cpu_logits.stretches(blocks) == [(0, 4), (4, 9)]


@pytest.mark.parametrize("isa", cpu_backend.extension().isas() if cpu_backend.extension() else [])
def test_student_t_logits_are_the_specifications_in_every_instruction_set(isa, use_isa):
    torch.manual_seed(7)
    special = [0.0, -0.0, -1.0, torch.inf, torch.nan, 5e-324, 1e-310, 2.0**53, 1e300, 1.7e308]
    powers = torch.logspace(-1074, 1023, 3001, base=2, dtype=torch.float64)
    u = torch.cat([torch.tensor(special, dtype=torch.float64), powers, torch.rand(500).double()])
    u = torch.cat([u, u.nextafter(torch.tensor(torch.inf, dtype=torch.float64))])
    zero, ones = torch.zeros_like(u), torch.ones_like(u)
    samples = Samples(
        u[:, None], torch.zeros(len(u), 2).long(), zero, zero, zero, zero, None, None, (u, 3 * ones)
    )
    affine = torch.tensor([1.0, 0.0], dtype=torch.float64)
    refs = Prepared(torch.zeros(1, 3, 2, dtype=torch.int8), ones[:3], affine, None, None)
    _, spec = torch_backend.logits(samples, refs)  # -3 log2(1 + u), with u as the offset
    use_isa(isa)
    digits = torch.zeros(len(u), 4, 2, dtype=torch.int8)
    _, mine = cpu_backend.logits(samples._replace(q=digits), refs)
    assert torch.equal(spec.isnan(), mine.isnan())
    assert torch.equal(spec.nan_to_num().view(torch.int64), mine.nan_to_num().view(torch.int64))
    near = (u > 0) & (u < 2.0**1000)
    truth = -3 * torch.log1p(u[near]) / math.log(2)
    error = (mine[near, 0] - truth).abs()
    assert (error <= 8 * helpers.HALF_ULP64 * truth.abs() + 5e-324).all()
