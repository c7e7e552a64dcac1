"""The CUDA kernels that are no products, on the host, bit for bit against the specification.

tests/test_cuda.py starts these tests, with cuda_on_host.py as a plugin.
"""

from __future__ import annotations

import pytest
import torch
from cuda_on_host import host
from test_bits import assert_same_bits

from stf_kernels import arithmetic as ar
from stf_kernels import cuda_backend as mine
from stf_kernels import gpu_layout
from stf_kernels import torch_backend as spec
from stf_kernels.stages import Samples, Weights

PRECISIONS = ["exact", "fast"]
# Around what a vector, a warp, a block and their multiples hold.
SIZES = [1, 3, 16, 129, 2048, 2050]


def misplaced(tensor: torch.Tensor) -> torch.Tensor:
    """The same values where no vector begins."""
    place = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)
    return place.copy_(tensor)


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("limbs", [3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dim", SIZES)
def test_quantize(dim, dtype, limbs, moved):
    torch.manual_seed(0)
    x = (torch.randn(5, dim, dtype=torch.float64) * torch.logspace(-30, 30, 5)[:, None]).to(dtype)
    x[1, -1], x[2, 0] = torch.nan, -torch.inf
    x[3] = 0
    assert_same_digits(misplaced(x) if moved else x, limbs)


@pytest.mark.parametrize("limbs", [3, 4])
def test_quantize_at_the_edges_of_the_types(limbs):
    tiny, huge = torch.finfo(torch.float64).smallest_normal, torch.finfo(torch.float64).max
    lim = float(ar.limit(limbs))
    rows = [0.0, -0.0, 5e-324, -1.5e-323, tiny, 0.7 * tiny, huge, -huge, lim, lim + 0.5, -2 * lim]
    x = torch.tensor(rows, dtype=torch.float64)[:, None] * torch.tensor([1.0, -0.5, 0.25])
    assert_same_digits(x, limbs)
    assert_same_digits(x.float(), limbs)


def assert_same_digits(x: torch.Tensor, limbs: int) -> None:
    q, step = spec.quantize(x, limbs)
    digits, found = mine.quantize(x, limbs)
    dim = x.shape[1]
    assert_same_bits(found, step)
    assert digits.shape == (len(x), limbs, gpu_layout.padded(dim))
    assert torch.equal(spec.join_limbs(digits.transpose(0, 1))[:, :dim], q)
    assert not digits[:, :, dim:].any()


def logits(rows: int, n: int, reach: float, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Logits down to `reach` below the largest, relative to their anchors; anchors; peak."""
    generator = torch.Generator().manual_seed(seed)
    blocks = gpu_layout.ceil_div(n, ar.BLOCK)
    logit = reach * torch.rand(rows, n, generator=generator, dtype=torch.float64)
    logit = torch.nn.functional.pad(logit, (0, blocks * ar.BLOCK - n), value=-torch.inf)
    logit = logit.view(rows, blocks, ar.BLOCK) + 7.3
    anchors = logit.amax(2)
    relative = torch.empty(rows, blocks * ar.BLOCK)
    relative[:, :n] = (logit - anchors[:, :, None]).float().view(rows, -1)[:, :n]
    relative[:, n:] = torch.nan  # stage 2 promises nothing there
    return relative[:, :n], anchors, anchors.amax(1)


def assert_same_weights(relative, anchors, peak, precision) -> Weights:
    """Stage 3's weights and sums are the specification's; they are returned."""
    expected = spec.weights(relative, anchors, peak, precision, True)
    found = mine.weights(relative, anchors, peak, precision, True)
    for name, a, b in zip(expected._fields[1:], found[1:], expected[1:], strict=True):
        assert torch.equal(a, b), name
    bare = mine.weights(relative, anchors, peak, precision, False)
    assert torch.equal(bare.total, expected.total)
    assert bare[2:] == (None,) * 4
    for weights in (found, bare):
        assert torch.equal(joined(weights.weight, relative.shape[1]), expected.weight)
    return found


def joined(survivors, n: int) -> torch.Tensor:
    """The weights int64 [B, n] that lists and digits stand for."""
    dense = int(survivors.dense)
    counts = survivors.counts.tolist()
    assert sorted(-1 - count for count in counts if count < 0) == list(range(dense))
    out = torch.zeros(len(counts), n, dtype=torch.int64)
    for row, count in enumerate(counts):
        if count < 0:
            digits = survivors.digits[-1 - count].long()
            assert int(survivors.dense_rows[-1 - count]) == row
            assert not digits[:, n:].any()
            out[row] = sum(digits[i, :n] << 8 * i for i in range(len(digits)))
        else:
            index = survivors.indices[row, :count].long()
            assert len(index.unique()) == count
            out[row, index] = survivors.weights[row, :count].long()
            assert (survivors.weights[row, :count] > 0).all()
    return out


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("reach", [-1.0, -70.0, -5000.0])
@pytest.mark.parametrize("n", [*SIZES, 128, 9000])
def test_weights(n, reach, precision):
    found = assert_same_weights(*logits(3, n, reach), precision)
    few = n <= gpu_layout.SPARSE_SURVIVORS
    if few or reach == -1.0:
        assert int(found.weight.dense) == (0 if few else 3)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("survivors", [127, 128, 129])
def test_a_row_is_dense_with_more_survivors_than_its_list_holds(survivors, precision):
    assert host.CAPACITY == gpu_layout.SPARSE_SURVIVORS == 128
    relative = torch.full((2, 700), -100.0)
    relative[:, torch.arange(survivors) * 5] = 0.0
    anchors = torch.zeros(2, 6, dtype=torch.float64)
    found = assert_same_weights(relative, anchors, anchors[:, 0], precision)
    assert int(found.weight.dense) == (2 if survivors > 128 else 0)


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


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_smallest_weight_that_is_counted(precision):
    """Around P = 1/2 every float of a logit decides as the specification does."""
    edge = torch.tensor([-1 - torch.tensor(float(ar.limit(ar.LIMBS[precision]))).double().log2()])
    words = edge.float().view(torch.int32) + torch.arange(-60, 60, dtype=torch.int32)
    relative = torch.cat([torch.zeros(1), words.view(torch.float32), torch.full((579,), -1e3)])
    for shift in (0.0, -0.37, -11.2):
        near = torch.where(relative < 0, relative - shift, relative)
        anchors = torch.full((1, 6), shift, dtype=torch.float64)
        found = assert_same_weights(near[None].clone(), anchors, anchors[:, 0] * 0, precision)
        assert 0 < int(found.weight.counts) < 121


@pytest.mark.parametrize("peak", [torch.nan, torch.inf, -torch.inf])
def test_a_peak_that_is_not_finite_leaves_no_weight(peak):
    relative, anchors, _ = logits(3, 200, -1.0)
    peaks = torch.tensor([8.0, peak, 9.0], dtype=torch.float64)
    found = assert_same_weights(relative, anchors, peaks, "exact")
    assert found.weight.counts[1] == 0
    assert int(found.weight.dense) == 2


@pytest.mark.parametrize("limbs", [1, 3])
@pytest.mark.parametrize("n", [1, 40, 1000])
@pytest.mark.parametrize("dim", [1, 3, 16, 1040, 1100])
def test_gather(dim, n, limbs):
    torch.manual_seed(2)
    relative, anchors, peak = logits(3, n, -300.0)
    values = torch.randint(-128, 128, (limbs, n, dim), dtype=torch.int8)
    assert_same_sums((relative, anchors, peak), values)
    assert_same_sums((relative, anchors, peak), misplaced(values))
    whole = torch.randint(-128, 128, (limbs, n + 77, dim), dtype=torch.int8)
    assert_same_sums((relative, anchors, peak), whole[:, 40 : 40 + n])


def assert_same_sums(given, values) -> None:
    """Stage 4 of rows that are all sparse."""
    found = mine.weights(*given, "exact", False)
    assert int(found.weight.dense) == 0
    expected = spec.weighted_sum(spec.weights(*given, "exact", False), values)
    num = torch.full(expected.shape, 99, dtype=torch.int64)
    gather(found, values, num)
    assert torch.equal(num, expected)


def gather(weights: Weights, values: torch.Tensor, num: torch.Tensor) -> None:
    there, pitch = gpu_layout.pitched(values)
    matrix = (there.data_ptr(), *values.shape, pitch)
    survivors = tuple(tensor.data_ptr() for tensor in weights.weight)
    host.gather(survivors, len(num), matrix, num.data_ptr(), (0, 0))


@pytest.mark.parametrize("dim", [1, 48, 1100])
def test_gather_clears_dense_rows_and_knows_the_largest_weight(dim):
    relative, anchors, peak = logits(2, 300, -1e9)
    relative[0], anchors[0] = 0.0, peak[0]
    values = torch.full((6, 300, dim), -128, dtype=torch.int8)  # as many limbs as norms have
    weights = mine.weights(relative, anchors, peak, "exact", False)
    num = torch.full((2, 6, dim), 99, dtype=torch.int64)
    gather(weights, values, num)
    assert int(weights.weight.counts[0]) < 0
    assert not num[0].any()
    assert (num[1] == -128 * weights.total[1]).all()
    assert weights.total[1] >= ar.limit(4)


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("limbs", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dim", SIZES)
def test_finish(dim, dtype, limbs, moved):
    torch.manual_seed(3)
    num = torch.randint(-(2**50), 2**50, (4, limbs, dim))
    total = torch.tensor([1, 2**40, 0, 12345])
    affine = torch.tensor([1 / 127.5, -1.0], dtype=torch.float64)
    x, out = torch.randn(4, dim, dtype=dtype), torch.empty(4, dim, dtype=dtype)
    if moved:
        num, x, out = misplaced(num), misplaced(x), misplaced(out)
    one = torch.ones(4, dtype=torch.float64)
    c_D, c_x = torch.randn(2, 4, dtype=torch.float64)
    samples = Samples(x, x, one, one, c_D, c_x, None)
    expected = torch.empty_like(x)
    spec.finish(num, total, affine, samples, expected)
    mine.finish(num, total, affine, samples, out)
    assert_same_bits(out, expected)


@pytest.mark.parametrize("limbs", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize("shape", [(1, 1), (37, 45), (20, 128), (3, 4099)], ids=str)
def test_references_are_prepared_alike(shape, dtype, limbs):
    torch.manual_seed(9)
    data = torch.randn(shape, dtype=torch.float64).mul(3).to(dtype)
    for given in (data, misplaced(data)):
        for a, b in zip(mine.prepare(given, limbs), spec.prepare(data, limbs), strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_references_that_are_not_finite(dtype, bad):
    data = torch.randn(50, 90, dtype=dtype)
    data[49, 89] = bad
    for a, b in zip(mine.prepare(data, 3), spec.prepare(data, 3), strict=True):
        assert_same_bits(a, b)
    assert mine.prepare(data, 3)[2].isnan()


def test_a_set_of_zeros():
    data = torch.zeros(3, 5)
    for a, b in zip(mine.prepare(data, 3), spec.prepare(data, 3), strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("limbs", [1, 2, 3, 4])
@pytest.mark.parametrize("dim", SIZES)
def test_norms(dim, limbs):
    torch.manual_seed(10)
    values = torch.randint(-128, 128, (limbs, 19, dim), dtype=torch.int8)
    values[:, 3] = -128
    for given in (values, misplaced(values), values[:, 2:13]):
        assert_same_bits(mine.norms(given, 128.7), spec.norms(given, 128.7))


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 131, 200), (3, 128, 128), (1, 300, 16)], ids=str)
def test_transpose(shape):
    torch.manual_seed(11)
    values = torch.randint(-128, 128, shape, dtype=torch.int8)
    n = shape[1]
    for given in (values, misplaced(values), values[:, n // 3 :]):
        columns = mine.transpose(given)
        assert columns.shape == (shape[0], shape[2], gpu_layout.padded(given.shape[1]))
        assert torch.equal(columns[:, :, : given.shape[1]], given.mT)
        assert not columns[:, :, given.shape[1] :].any()


def test_powers_of_two():
    e = torch.cat([-63 * torch.rand(1000, dtype=torch.float64), torch.tensor([0.0, -63.0])])
    out = torch.empty_like(e)
    mine.exp2(e, out)
    assert torch.allclose(out, torch.exp2(e), rtol=2e-12, atol=0)


def test_an_error_names_the_call_and_the_shape():
    x = torch.randn(3, 20)
    digits, step = mine.quantize(x, 4)
    message = r"cuda quantize samples=3 values=20 limbs=4: cudaErrorInvalidDevice"
    with pytest.raises(RuntimeError, match=message):
        host.quantize(x.data_ptr(), False, 3, 20, 4, digits.data_ptr(), step.data_ptr(), (99, 0))
    assert host.processors(0) > 0
    with pytest.raises(RuntimeError, match=r"cuda processors device=99: cudaErrorInvalidDevice"):
        host.processors(99)
