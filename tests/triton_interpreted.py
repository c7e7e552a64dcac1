"""What Triton's interpreter computes, stage by stage; whole targets are kernel_pipeline.py's.

Kernels are interpreted or not from their import on, so that these tests have a process of their
own, which tests/test_triton.py starts:
`TRITON_INTERPRET=1 STF_TESTED_BACKEND=triton pytest tests/triton_interpreted.py`
"""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from helpers import Allocated
from kernel_pipeline import PRECISIONS
from test_bits import assert_same_bits, problem

from stf_kernels import (
    References,
    gpu_layout,
    stable_target,
)
from stf_kernels import arithmetic as ar
from stf_kernels import torch_backend as spec
from stf_kernels import triton_backend as mine
from stf_kernels.backends import PREFERENCE, resolve
from stf_kernels.stages import Prepared, Samples, Weights
from stf_kernels.triton_backend import kernels, numerics, products, rows, table
from stf_kernels.triton_backend.table import ANY, Entry, Tile

CPU = torch.device("cpu")


def use_tiles(monkeypatch, stage2: Tile, stage4: Tile, slots: int) -> None:
    monkeypatch.setitem(table.LOGITS, 0, (Entry(ANY, ANY, stage2),))
    monkeypatch.setitem(table.DENSE, 0, (Entry(ANY, ANY, stage4),))
    monkeypatch.setattr(mine.tiles, "slots", lambda device, warps: slots)


@pytest.mark.parametrize("slots", [1, 64])
@pytest.mark.parametrize(
    ("stage2", "stage4"),
    [
        (Tile(16, 128, 64, 4, 1), Tile(16, 32, 32, 4, 1)),
        (Tile(32, 128, 128, 4, 1), Tile(32, 16, 128, 4, 1)),
        (Tile(64, 128, 32, 4, 1), Tile(64, 64, 64, 4, 1)),
    ],
)
def test_bits_do_not_depend_on_tiles_or_parts(monkeypatch, stage2, stage4, slots):
    torch.manual_seed(4)
    x, u, sigma = problem((20, 1100, 50), torch.float32)
    sigma = sigma.clamp(min=1.0)  # many survivors
    refs = References(u.float() / 99, limbs=2)
    expected = stable_target(x, refs, sigma, backend="torch")
    use_tiles(monkeypatch, stage2, stage4, slots)
    monkeypatch.setattr(mine, "PART_TERMS", 128)
    assert_same_bits(stable_target(x, refs, sigma, backend="triton"), expected)


@pytest.mark.parametrize(("slots", "cut"), [(1, False), (3, False), (4, True), (40, True)])
def test_parts_are_added_and_a_whole_sum_is_stored(monkeypatch, slots, cut):
    torch.manual_seed(5)
    weights, values = dense_weights(6, 300, 40)
    use_tiles(monkeypatch, Tile(16, 128, 128, 4, 1), Tile(16, 32, 128, 4, 1), slots)
    monkeypatch.setattr(mine, "PART_TERMS", 128)
    launch = kernels.gather.run
    monkeypatch.setattr(kernels.gather, "run", lambda *args, **options: args[5].fill_(1000))
    found = mine.weighted_sum(weights, values)
    monkeypatch.setattr(kernels.gather, "run", launch)
    expected = spec.weighted_sum(spec_weights(6, 300), values)
    assert torch.equal(found, expected + 1000 * cut)
    assert torch.equal(mine.weighted_sum(weights, values), expected)


def dense_weights(B: int, n: int, d: int) -> tuple[object, torch.Tensor]:
    """Stage 3 of rows whose references are all as near, and one limb of values."""
    values = torch.randint(-128, 128, (1, n, d), dtype=torch.int8)
    return mine.weights(*all_as_near(B, n), "exact", False), values


def spec_weights(B: int, n: int) -> Weights:
    return spec.weights(*all_as_near(B, n), "exact", False)


def all_as_near(B: int, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits 0, as stage 2 gives them, and the largest."""
    zero = torch.zeros(B, dtype=torch.float64)
    return torch.zeros(B, n), zero[:, None].repeat(1, -(-n // 128)), zero


@pytest.mark.parametrize("capacity", [1, 32, 128, 4096])
def test_a_row_may_gather_or_multiply(monkeypatch, capacity):
    torch.manual_seed(6)
    x, u, sigma = problem((20, 500, 40), torch.float32)
    refs = References(u, value_range=(-1, 1))
    expected = stable_target(x, refs, sigma, backend="torch")
    weights, seen = mine.weights, []

    def watched(*args):
        seen.append((weights(*args), spec.weights(*args)))
        return seen[0][0]

    monkeypatch.setattr(gpu_layout, "SPARSE_SURVIVORS", capacity)
    monkeypatch.setattr(mine, "weights", watched)
    assert_same_bits(stable_target(x, refs, sigma, backend="triton"), expected)
    ((found, whole),) = seen
    counts = (whole.weight > 0).sum(1)
    dense = (counts > capacity).nonzero()[:, 0]
    assert torch.equal(found.weight.counts.long(), counts)
    assert int(found.weight.dense) == len(dense)
    assert torch.equal(found.weight.dense_rows[: len(dense)].long().sort().values, dense)
    assert (0 < len(dense) < 20) == (capacity < 4096)


def test_dense_rows_are_not_gathered_and_sparse_ones_not_multiplied(monkeypatch):
    torch.manual_seed(7)
    relative = torch.full((2, 300), -100.0)
    relative[0, 7] = relative[0, 200] = 0.0
    relative[1] = 0.0
    anchors = torch.zeros(2, 3, dtype=torch.float64)
    values = torch.randint(-128, 128, (1, 300, 20), dtype=torch.int8)
    logits = relative, anchors, anchors[:, 0]
    expected = spec.weighted_sum(spec.weights(*logits, "exact", False), values)
    weights = mine.weights(*logits, "exact", False)
    assert weights.weight.counts.tolist() == [2, 300]
    weights.weight.digits[0] = 99  # of the sparse row: not read
    weights.weight.weights[1] = 99  # of the dense row: not read
    assert torch.equal(mine.weighted_sum(weights, values), expected)


def test_sums_longer_than_int32_holds_are_cut(monkeypatch):
    torch.manual_seed(8)
    x, u, sigma = problem((5, 700, 600), torch.float32)
    refs = References(u, value_range=(-1, 1))
    expected = stable_target(x, refs, sigma, backend="torch")
    monkeypatch.setattr(products, "SAFE_TERMS", tl.constexpr(256))
    monkeypatch.setattr(kernels, "SAFE_TERMS", 256)
    product, spans = products.digit_product, []

    def watched(*args):
        begin, end = map(number, args[5:7])
        spans.append(end - begin)
        return product(*args)

    monkeypatch.setattr(products, "digit_product", watched)
    assert_same_bits(stable_target(x, refs, sigma, backend="triton"), expected)
    assert max(spans) == 256
    assert {600 - 512, 256} <= set(spans)


def number(value: object) -> int:
    """An interpreted scalar, constant or not."""
    if isinstance(value, tl.constexpr):
        return int(value.value)
    return int(value.handle.data.item()) if isinstance(value, tl.tensor) else int(value)


def test_the_longest_int32_sum_is_exact():
    terms = kernels.SAFE_TERMS
    worst = torch.full((1, 1, terms), -128, dtype=torch.int8)
    one = torch.ones(1, dtype=torch.float64)
    samples = Samples(torch.zeros(1, terms), worst, one, 0 * one, one, one, None)
    refs = Prepared(worst, one, torch.stack([one, one]), None, None)
    relative, anchors = mine.logits(samples, refs)
    assert anchors.tolist() == [[terms * 2.0**14]]
    assert relative.tolist() == [[0.0]]


def test_more_values_than_an_int32_sum_holds():
    dim = 140_000
    values = torch.full((1, 3, dim), -128, dtype=torch.int8)
    values[0, 1:] = torch.randint(-128, 128, (2, dim), dtype=torch.int8)
    zero = torch.zeros(3, dtype=torch.float64)
    refs = Prepared(values, zero, torch.tensor([1.0, 0.0], dtype=torch.float64), None, None)
    x = torch.randn(2, dim)
    x[0] = -ar.limit(3)  # every digit is -127, so that a limb's sum is 127 * 128 * 140 000 > 2^31
    relative, anchors = stage_2(mine, x, refs, 3)
    assert anchors[0, 0] == 128 * dim * ar.limit(3)
    for a, b in zip((relative, anchors), stage_2(spec, x, refs, 3), strict=True):
        assert torch.equal(a, b)


def stage_2(
    stages: object,
    x: torch.Tensor,
    refs: Prepared,
    limbs: int = 4,
    student: tuple[torch.Tensor, torch.Tensor] | None = None,
    labels: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A backend's logits x.y - ||y||^2 / 2, or of Student-t noise with that in its distance."""
    q, step = stages.quantize(x, limbs)
    scale = refs.affine[0]
    half = (0.5 * scale * scale).repeat(len(x))
    samples = Samples(x, q, step * scale, half, step, step, labels, student=student)
    return stages.logits(samples, refs)


@triton.jit
def log2_1p_of(p_u, p_out, size: tl.constexpr):
    o = tl.arange(0, size)
    tl.store(p_out + o, numerics.log2_1p(tl.load(p_u + o)))


def test_log2_1p():
    torch.manual_seed(15)
    edge = torch.arange(-8, 9) + torch.tensor(2.0).double().sqrt().view(torch.int64)
    edges = torch.cat([2.0**k * edge.view(torch.float64) for k in range(-3, 60)]) - 1
    largest = torch.finfo(torch.float64).max
    special = torch.tensor([0.0, 5e-324, 2.0**-53, 1.0, largest, torch.inf, torch.nan]).double()
    exponents = 2100 * torch.rand(8192 - len(edges) - len(special), dtype=torch.float64) - 1075
    u = torch.cat([special, edges.clamp_min(0), torch.exp2(exponents)])
    out = torch.empty_like(u)
    log2_1p_of[(1,)](u, out, len(u))
    assert_same_bits(out, ar.log2_1p(u))
    assert 0 < out.isnan().sum() < 100


@pytest.mark.parametrize("conditions", [False, True])
@pytest.mark.parametrize("limbs", [1, 3])
def test_student_t_logits(limbs, conditions):
    torch.manual_seed(16)
    offset = torch.tensor([-30.0, 1e-12, 1.0, 1e6, 1e12, torch.inf, torch.nan]).double()
    x = torch.randn(7, 40)
    values, norms, scale = spec.prepare(torch.randn(300, 40), limbs)
    labels = torch.arange(300) % 3
    bias = torch.where(labels == 1, -torch.inf, torch.randn(300, dtype=torch.float64))
    affine = torch.stack([scale, 0 * scale])
    refs = Prepared(
        values, norms, affine, bias if conditions else None, labels if conditions else None
    )
    seen = torch.arange(7) % 4 - 1 if conditions else None
    for degrees in (1e-3, 1.0, 1e9):
        student = offset, torch.full((7,), 0.5 * (40 + degrees), dtype=torch.float64)
        expected = stage_2(spec, x, refs, 4, student, seen)
        for a, b in zip(stage_2(mine, x, refs, 4, student, seen), expected, strict=True):
            assert_same_bits(a, b)
    relative, anchors = expected
    assert anchors[-2:].isnan().all()
    assert not anchors[:-2].isnan().any()
    if not conditions:
        assert (relative[0] == 0).sum() > len(anchors[0])  # u < 0 counts as 0


@pytest.mark.parametrize("student", [False, True])
@pytest.mark.parametrize(("limbs", "size"), [(1, 128), (3, 256)])
def test_chunks_add_up_to_the_whole(limbs, size, student):
    torch.manual_seed(17)
    n = 400
    x, y = torch.randn(9, 30), torch.randn(n, 30)
    values, norms, scale = mine.prepare(y, limbs)
    affine = torch.stack([scale, 0 * scale])
    noise = (
        (torch.full((9,), 1e4).double(), torch.linspace(1, 500, 9).double()) if student else None
    )
    whole = stage_2(mine, x, Prepared(values, norms, affine, None, None), 4, noise)
    peak = whole[1].amax(1)
    expected = spec.weights(*whole, peak, "exact", True)
    sums, num, found = torch.zeros(4, 9, dtype=torch.int64), 0, torch.full((9,), n)
    for start in range(0, n, size):
        part = slice(start, start + size)
        chunk = Prepared(values[:, part], norms[part], affine, None, None)
        logits = stage_2(mine, x, chunk, 4, noise)
        assert torch.equal(logits[0], whole[0][:, part])
        assert torch.equal(logits[1], whole[1][:, start // 128 : -(-(start + size) // 128)])
        weights = assert_same_weights(*logits, peak, "exact")
        sums += torch.stack(weights[1:5])
        found = torch.where(weights.argmax < 0, found, found.minimum(start + weights.argmax))
        num = num + mine.weighted_sum(weights, chunk.values)
    assert torch.equal(sums, torch.stack(expected[1:5]))
    assert torch.equal(found, expected.argmax)
    assert torch.equal(num, spec.weighted_sum(expected, values))
    assert (sums[0] > ar.limit(4)).any()


def test_a_chunk_of_a_set_is_read_where_it_is():
    values = torch.zeros(3, 600, 20, dtype=torch.int8)
    chunk = values[:, 128:384]
    assert not chunk.is_contiguous()
    there, pitch = gpu_layout.pitched(chunk)
    assert (there.data_ptr(), pitch) == (chunk.data_ptr(), 600)
    every_other = values[:, ::2]  # no backend gets these, but they are no trap
    there, pitch = gpu_layout.pitched(every_other)
    assert (there.is_contiguous(), pitch) == (True, 300)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("limbs", [1, 3])
@pytest.mark.parametrize("shape", [(1, 1, 1), (40, 300, 130), (5, 129, 1)], ids=str)
def test_the_stages_allocate_no_more_than_they_say(monkeypatch, shape, limbs, precision):
    rows_, n, dim = shape
    x = torch.randn(rows_, dim)
    values, norms, scale = spec.prepare(torch.randn(n, dim), limbs)
    refs = Prepared(values, norms, torch.stack([scale, scale]), None, None)
    digits = torch.zeros(ar.NORM_LIMBS, n, 1, dtype=torch.int8)
    digit_count = ar.LIMBS[precision]
    for name in filter(str.islower, kernels.__all__):  # the interpreter allocates too
        monkeypatch.setattr(getattr(kernels, name), "run", lambda *args, **options: None)
    with Allocated() as allocated:
        q, step = mine.quantize(x, digit_count)
        samples = Samples(x, q, step, step, step, step, None)
        relative, anchors = mine.logits(samples, refs)
        weights = mine.weights(relative, anchors, step, precision, True)
        mine.weighted_sum(weights, values)
        mine.weighted_sum(weights, digits)
    promised = mine.workspace(rows_, n, dim, limbs, digit_count)
    assert (
        promised - 2 * gpu_layout.ROUNDED_UP < allocated.bytes <= promised - gpu_layout.ROUNDED_UP
    )
    assert len(allocated.seen) <= gpu_layout.ROUNDED_UP // 512


def test_more_references_than_an_int32_sum_holds(monkeypatch):
    monkeypatch.setattr(mine.tiles, "slots", lambda device, warps: 1)  # no parts but the needed
    n = 140_000
    values = torch.full((1, n, 2), -128, dtype=torch.int8)
    values[0, :, 1] = torch.randint(-128, 128, (n,), dtype=torch.int8)
    weights = mine.weights(*all_as_near(2, n), "exact", True)
    assert weights.total.tolist() == [n * ar.limit(4)] * 2
    num = mine.weighted_sum(weights, values)
    assert num[:, 0, 0].tolist() == [-128 * n * ar.limit(4)] * 2
    assert torch.equal(num, spec.weighted_sum(spec_weights(2, n), values))


@pytest.mark.parametrize("limbs", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_references_are_prepared_alike(dtype, limbs):
    torch.manual_seed(9)
    data = torch.randn(37, 45, dtype=torch.float64).mul(3).to(dtype)
    for a, b in zip(mine.prepare(data, limbs), spec.prepare(data, limbs), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_references_that_are_not_finite(bad):
    data = torch.randn(5, 9)
    data[4, 8] = bad
    for a, b in zip(mine.prepare(data, 3), spec.prepare(data, 3), strict=True):
        assert torch.equal(a.nan_to_num(nan=-1), b.nan_to_num(nan=-1))


@pytest.mark.parametrize("limbs", [1, 2, 3, 4])
def test_norms_and_transposed_copy(limbs):
    torch.manual_seed(10)
    values = torch.randint(-128, 128, (limbs, 131, 200), dtype=torch.int8)
    assert torch.equal(mine.norms(values, 128.7), spec.norms(values, 128.7))
    columns = mine.transpose(values)
    assert columns.shape == (limbs, 200, 256)
    assert torch.equal(columns[:, :, :131], values.mT)
    assert not columns[:, :, 131:].any()


@pytest.mark.parametrize("limbs", [3, 4])
def test_quantize_at_the_edges_of_the_types(limbs):
    tiny, huge = torch.finfo(torch.float64).smallest_normal, torch.finfo(torch.float64).max
    lim = float(spec.ar.limit(limbs))
    rows_ = [
        0.0,
        -0.0,
        5e-324,
        -3 * 5e-324,
        tiny,
        0.7 * tiny,
        huge,
        -huge,
        lim,
        lim + 0.5,
        -2 * lim,
    ]
    x = torch.tensor(rows_, dtype=torch.float64)[:, None] * torch.tensor([1.0, -0.5, 0.25])
    x = torch.cat([x, torch.tensor([[1.0, torch.nan, 2.0], [torch.inf, 0.0, 1.0]]).double()])
    q, step = spec.quantize(x, limbs)
    digits, found = mine.quantize(x, limbs)
    assert_same_bits(found, step)
    assert torch.equal(spec.join_limbs(digits.transpose(0, 1))[:, :3], q)
    assert not digits[:, :, 3:].any()
    q, step = spec.quantize(x.float(), limbs)
    digits, found = mine.quantize(x.float(), limbs)
    assert_same_bits(found, step)
    assert torch.equal(spec.join_limbs(digits.transpose(0, 1))[:, :3], q)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_over_the_whole_range_of_2_to_the_e(precision):
    torch.manual_seed(11)
    relative = -70 * torch.rand(4, 700)
    relative[0, :5] = torch.tensor([0.0, -62.999, -63.0, -63.001, -0.5])
    relative[:, 5] = 0.0
    anchors = torch.tensor([[0.0, -3.5, 1e-3, -62.0, -1e4, -torch.inf]]).double().repeat(4, 1)
    anchors[3, 1] = torch.nan
    peak = torch.tensor([0.0, 0.0, 2.5, torch.nan], dtype=torch.float64)  # 2.5: of another chunk
    found = assert_same_weights(relative, anchors, peak, precision)
    assert found.argmax.tolist() == [0, 5, -1, -1]
    assert found.total.tolist()[2:] != [0, 0]
    assert found.total[3] == 0


@pytest.mark.parametrize("peak", [torch.nan, torch.inf, -torch.inf])
def test_a_peak_that_is_not_finite_leaves_no_weight(peak):
    relative, anchors, _ = all_as_near(3, 200)
    peaks = torch.tensor([0.0, peak, 0.0], dtype=torch.float64)
    found = assert_same_weights(relative, anchors, peaks, "exact")
    assert found.weight.counts.tolist() == [200, 0, 200]


def assert_same_weights(relative, anchors, peak, precision) -> Weights:
    """Stage 3's weights and sums are the specification's; they are returned."""
    expected = spec.weights(relative, anchors, peak, precision, True)
    found = mine.weights(relative, anchors, peak, precision, True)
    for name, a, b in zip(expected._fields[1:], found[1:], expected[1:], strict=True):
        assert torch.equal(a, b), name
    digits = spec.join_limbs(found.weight.digits.transpose(0, 1))
    assert torch.equal(digits[:, : relative.shape[1]], expected.weight)
    assert torch.equal(found.weight.counts.long(), (expected.weight > 0).sum(1))
    return found


def test_interpreted_only_when_asked_for_by_name():
    assert kernels.INTERPRETED
    assert mine.unavailable(CPU) is None
    assert "triton" not in PREFERENCE["cpu"]
    assert resolve("auto", CPU).NAME != "triton"
    assert resolve("triton", CPU) is mine


def test_limits_are_the_specification_s():
    assert rows.EXP2_FLOOR.value == -spec.ar.EXP2_FLOOR
    assert kernels.SAFE_TERMS <= spec.ar.MAX_INT32_TERMS
