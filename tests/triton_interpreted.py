"""What Triton's interpreter computes, bit for bit against the specification.

Kernels are interpreted or not from their import on, so that these tests have a process of their
own, which tests/test_triton.py starts: `TRITON_INTERPRET=1 pytest tests/triton_interpreted.py`
"""

from __future__ import annotations

import pytest
import torch
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bits import assert_same_bits, problem

from stf_kernels import References, Velocity, golden, stable_target, stable_target_with_stats
from stf_kernels import torch_backend as spec
from stf_kernels import triton_backend as mine
from stf_kernels.backends import PREFERENCE, resolve
from stf_kernels.stages import Prepared, Samples
from stf_kernels.triton_backend import kernels, products, rows, table
from stf_kernels.triton_backend.table import ANY, Entry, Tile

CPU = torch.device("cpu")
SHAPES = [(1, 1, 1), (3, 2, 1), (1, 127, 5), (2, 129, 64), (18, 300, 130), (9, 1025, 33)]
PRECISIONS = ["exact", "fast"]


def assert_equals_specification(*args: object, **options: object) -> None:
    expected = stable_target_with_stats(*args, backend="torch", **options)
    found = stable_target_with_stats(*args, backend="triton", **options)
    assert_same_bits(found[0], expected[0])
    for name, a, b in zip(expected[1]._fields, found[1], expected[1], strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num()), name


def use_tiles(monkeypatch, stage2: Tile, stage4: Tile, slots: int) -> None:
    monkeypatch.setitem(table.LOGITS, 0, (Entry(ANY, ANY, stage2),))
    monkeypatch.setitem(table.DENSE, 0, (Entry(ANY, ANY, stage4),))
    monkeypatch.setattr(mine.tiles, "slots", lambda device, warps: slots)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bytes(shape, precision):
    torch.manual_seed(0)
    x, u, sigma = problem(shape, torch.float32)
    assert_equals_specification(x, References(u, value_range=(-1, 1)), sigma, precision=precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("limbs", [None, 1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_floats(dtype, limbs, precision):
    torch.manual_seed(1)
    x, u, sigma = problem((6, 150, 40), torch.float64)
    y = ((u.double() - 90) / 70).to(dtype)
    ref = y if limbs is None else References(y, limbs=limbs)
    expected = stable_target(x.to(dtype), ref, sigma, precision=precision, backend="torch")
    found = stable_target(x.to(dtype), ref, sigma, precision=precision, backend="triton")
    assert_same_bits(found, expected)


@pytest.mark.parametrize("target", ["score", "denoised", "epsilon", "v", "edm", Velocity(1, -1)])
def test_every_argument(target):
    torch.manual_seed(2)
    x, u, sigma = problem((12, 300, 40), torch.float32)
    weight = torch.where(torch.rand(300) < 0.2, -torch.inf, torch.randn(300))
    refs = References(u, value_range=(0, 3), labels=torch.arange(300) % 4, log_weight=weight)
    assert_equals_specification(
        x,
        refs,
        sigma,
        alpha=torch.linspace(-1, 1, 12),
        target=target,
        labels=torch.randint(-1, 4, (24,))[::2],
        log_weight=torch.randn(300),
    )


def test_one_label_for_all_samples_need_not_lie_in_memory_for_each():
    torch.manual_seed(2)
    x, u, sigma = problem((7, 90, 10), torch.float32)
    refs = References(u, value_range=(0, 3), labels=(torch.arange(180) % 4)[::2])
    label = torch.tensor([2]).expand(7)
    expected = stable_target(x, refs, sigma, labels=label, backend="torch")
    for backend in ("auto", "triton"):
        found = stable_target(x, refs, sigma, labels=label, backend=backend)
        assert_same_bits(found, expected)


def test_rows_without_a_target_are_nan_and_alone():
    torch.manual_seed(3)
    x, u, sigma = problem((8, 150, 30), torch.float32)
    refs = References(u, value_range=(-1, 1), labels=torch.zeros(150, dtype=torch.int64))
    clean = stable_target(x, refs, sigma, backend="triton")
    x[0, 3], x[1, 0], x[2, 29] = torch.nan, torch.inf, -torch.inf
    sigma[3], sigma[4], sigma[5] = 0.0, -1.0, torch.nan
    assert_equals_specification(x, refs, sigma)
    out = stable_target(x, refs, sigma, backend="triton")
    assert out[:6].isnan().all()
    assert_same_bits(out[6:], clean[6:])
    assert_equals_specification(x, refs, sigma, log_weight=torch.full((150,), -torch.inf))
    partly = torch.where(torch.arange(150) < 128, -torch.inf, 0.0)  # a block without a reference
    assert_equals_specification(x, refs, sigma, log_weight=partly)


@pytest.mark.parametrize("case", golden.CASES)
def test_golden_hashes(case):
    assert golden.digest(golden.CASES[case]("triton", "cpu")) == golden.RECORDED[case]


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
    """Stage 3 of rows whose references are all as near, and two limbs of values."""
    values = torch.randint(-128, 128, (1, n, d), dtype=torch.int8)
    anchors = torch.zeros(B, -(-n // 128), dtype=torch.float64)
    return mine.weights(torch.zeros(B, n), anchors, "exact", False), values


def spec_weights(B: int, n: int) -> object:
    anchors = torch.zeros(B, -(-n // 128), dtype=torch.float64)
    return spec.weights(torch.zeros(B, n), anchors, "exact", False)


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

    monkeypatch.setattr(mine, "SPARSE_SURVIVORS", capacity)
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
    expected = spec.weighted_sum(spec.weights(relative, anchors, "exact", False), values)
    weights = mine.weights(relative, anchors, "exact", False)
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
    expected = spec.weights(relative, anchors, precision, True)
    found = mine.weights(relative, anchors, precision, True)
    for name, a, b in zip(expected._fields[1:], found[1:], expected[1:], strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num()), name
    digits = spec.join_limbs(found.weight.digits.transpose(0, 1))
    assert torch.equal(digits[:, :700], expected.weight)


@settings(max_examples=12, deadline=None)
@given(
    B=st.integers(1, 5),
    n=st.integers(1, 200),
    d=st.integers(1, 40),
    seed=st.integers(0, 2**31),
    exponent=st.integers(-30, 30),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    precision=st.sampled_from(PRECISIONS),
    limbs=st.sampled_from([0, 1, 2, 3, 4]),
)
def test_any_input(B, n, d, seed, exponent, dtype, precision, limbs):
    generator = torch.Generator().manual_seed(seed)
    scale = 2.0**exponent
    x = (torch.randn(B, d, generator=generator, dtype=torch.float64) * scale).to(dtype)
    sigma = torch.rand(B, generator=generator, dtype=torch.float64) * scale
    if limbs:
        y = torch.randn(n, d, generator=generator, dtype=torch.float64) * scale
        refs = References(y, limbs=limbs)
    else:
        u = torch.randint(0, 256, (n, d), generator=generator, dtype=torch.uint8)
        refs = References(u, value_range=(-scale, 2 * scale))
    alpha = torch.rand(B, generator=generator)
    assert_equals_specification(x, refs, sigma, alpha=alpha, precision=precision)


def test_bits_do_not_depend_on_the_batch(monkeypatch):
    torch.manual_seed(12)
    x, u, sigma = problem((17, 200, 30), torch.float32)
    refs = References(u, value_range=(-1, 1))
    whole = stable_target(x, refs, sigma, backend="triton")
    order = torch.randperm(17)
    assert_same_bits(stable_target(x[order], refs, sigma[order], backend="triton"), whole[order])
    monkeypatch.setattr(mine, "rows_per_block", lambda refs, limbs: 5)
    assert_same_bits(stable_target(x, refs, sigma, backend="triton"), whole)


def test_the_transposed_copy_is_made_once_for_a_set(monkeypatch):
    torch.manual_seed(13)
    x, u, sigma = problem((3, 150, 20), torch.float32)
    refs = References(u, value_range=(-1, 1))
    transpose, made = mine.transpose, []
    monkeypatch.setattr(mine, "transpose", lambda v: made.append(v.shape) or transpose(v))
    for _ in range(2):
        stable_target(x, refs, sigma, backend="triton")
    subset = refs.subset(torch.arange(140))
    for _ in range(2):
        stable_target(x, subset, sigma, backend="triton")
    assert made == [(1, 150, 20), (1, 140, 20)]
    stable_target(x, refs, sigma, backend="torch")
    assert len(made) == 2


def test_compiled_into_one_graph():
    torch.manual_seed(14)
    x, u, sigma = problem((3, 150, 20), torch.float32)
    refs = References(u, value_range=(-1, 1))
    call = torch.compile(
        lambda x, sigma: 2 * stable_target(x, refs, sigma, backend="triton"),
        fullgraph=True,
        backend="aot_eager",
    )
    assert_same_bits(call(x, sigma), 2 * stable_target(x, refs, sigma, backend="torch"))


def test_interpreted_only_when_asked_for_by_name():
    assert kernels.INTERPRETED
    assert mine.unavailable(CPU) is None
    assert "triton" not in PREFERENCE["cpu"]
    assert resolve("auto", CPU).NAME != "triton"
    assert resolve("triton", CPU) is mine


def test_limits_are_the_specification_s():
    assert rows.EXP2_FLOOR.value == -spec.ar.EXP2_FLOOR
    assert kernels.SAFE_TERMS <= spec.ar.MAX_INT32_TERMS
