"""The CUDA backend on the host: its products, alone and in whole targets.

As a pytest plugin this puts the kernels that tests/host_cuda compiled for the host in the place of
the extension's; tests/test_cuda.py starts the processes that have them.
"""

from __future__ import annotations

import importlib
import mmap
import zlib
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from test_bits import assert_same_bits, problem
from torch.utils._python_dispatch import TorchDispatchMode

from stf_kernels import References, gpu_layout, pipeline, stable_target
from stf_kernels import cuda_backend as mine
from stf_kernels import torch_backend as spec
from stf_kernels.gpu_layout import padded
from stf_kernels.stages import Prepared, Samples, Weights

NO_KERNELS = ("aten::empty.memory_format", "aten::empty_like", "stf_kernels::stable_target")

host: Any = importlib.import_module("_cuda_on_host")


def use(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's kernels as those of backend="cuda"."""
    monkeypatch.setattr(mine, "_functions", lambda: host)
    monkeypatch.setattr(mine, "unavailable", lambda device: None)


@pytest.fixture(autouse=True)
def _on_the_host(monkeypatch, request):
    use(monkeypatch)
    host.seed(zlib.crc32(request.node.nodeid.encode()))  # another order for every test


def operands(
    B: int, n: int, dim: int, ref_limbs: int, limbs: int, *, pitch: int = 0, offset: int = 0
) -> tuple[Samples, Prepared]:
    """Samples of any digits, references of any digits that begin `offset` bytes off."""
    x = torch.randn(B, dim, dtype=torch.float64)
    q, step = spec.quantize(x, limbs)
    digits, found = mine.quantize(x, limbs)
    assert torch.equal(found, step)
    assert torch.equal(spec.join_limbs(digits.transpose(0, 1))[:, :dim], q)
    pitch = pitch or n
    store = torch.randint(-128, 128, (offset + ref_limbs * pitch * dim,), dtype=torch.int8)
    values = store.as_strided((ref_limbs, n, dim), (pitch * dim, dim, 1), offset)
    ones = torch.ones(B, dtype=torch.float64)
    refs = Prepared(values, torch.randn(n, dtype=torch.float64), torch.zeros(2), None, None)
    return Samples(x, digits, step * 1e-9, 0.3 * ones, ones, ones, None), refs


def assert_same_logits(samples: Samples, refs: Prepared, limbs: int) -> torch.Tensor:
    expected = spec.logits(samples._replace(q=spec.quantize(samples.x, limbs)[0]), refs)
    found = mine.logits(samples, refs)
    for a, b in zip(found, expected, strict=True):
        assert_same_bits(a, b)
    return found[0]


@pytest.mark.parametrize("limbs", [3, 4])
@pytest.mark.parametrize("ref_limbs", [1, 2, 3])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 2, 15), (2, 129, 64), (70, 130, 80), (33, 20, 61)], ids=str
)
def test_logits(shape, ref_limbs, limbs):
    torch.manual_seed(0)
    for pitch, offset in ((0, 0), (shape[1] + 3, 0), (0, 5)):
        samples, refs = operands(*shape, ref_limbs, limbs, pitch=pitch, offset=offset)
        assert_same_logits(samples, refs, limbs)


def test_logits_of_references_that_lie_far_apart():
    """Limbs more than 2^31 bytes from each other, in memory that nothing backs."""
    torch.manual_seed(1)
    n, dim, limb = 5, 48, 48 * 50_000_000
    memory = torch.frombuffer(mmap.mmap(-1, 3 * limb), dtype=torch.int8)
    values = memory.as_strided((3, n, dim), (limb, dim, 1))
    samples, refs = operands(3, n, dim, 3, 4)
    values.copy_(refs.values)
    assert values.stride(0) > 2**31
    assert_same_logits(samples, refs._replace(values=values), 4)
    weights = spec.weights(
        torch.zeros(3, n), torch.zeros(3, 1).double(), samples.slope * 0, "exact", False
    )
    found = mine.weights(
        torch.zeros(3, n), torch.zeros(3, 1).double(), samples.slope * 0, "exact", False
    )
    assert torch.equal(mine.weighted_sum(found, values), spec.weighted_sum(weights, values))


@pytest.mark.parametrize("dim", [512, 513, 1024, 1100])
@pytest.mark.parametrize("ref_limbs", [1, 2])
def test_more_values_than_an_int32_sum_holds(ref_limbs, dim):
    """The host's kernels cut their sums after 512 terms."""
    torch.manual_seed(2)
    assert_same_logits(*operands(3, 5, dim, ref_limbs, 3), 3)


def dense_weights(B: int, n: int, precision: str) -> tuple[Weights, Weights]:
    """Stage 3, here and in the specification, of rows with all their references near."""
    relative = -10 * torch.rand(B, n)
    anchors = torch.zeros(B, -(-n // 128), dtype=torch.float64)
    return tuple(
        s.weights(relative, anchors, anchors[:, 0], precision, False) for s in (mine, spec)
    )


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("processors", [1, 3, 40])
@pytest.mark.parametrize(
    ("shape", "ref_limbs"), [((1, 600, 1), 6), ((70, 300, 130), 1), ((5, 1300, 50), 3)], ids=str
)
def test_weighted_sums_of_dense_rows(shape, ref_limbs, processors, precision):
    """600 and 1300 references are cut, in two parts and in three."""
    torch.manual_seed(3)
    B, n, dim = shape
    values = torch.randint(-128, 128, (ref_limbs, n, dim), dtype=torch.int8)
    found, expected = dense_weights(B, n, precision)
    assert found.weight.dense.tolist() == [B]
    host.set_device(processors, 8, 0)
    assert torch.equal(mine.weighted_sum(found, values), spec.weighted_sum(expected, values))


def test_which_way_a_row_goes():
    torch.manual_seed(4)
    x, u, sigma = problem((20, 500, 40), torch.float32)
    refs = References(u, value_range=(-1, 1))
    expected = stable_target(x, refs, sigma, backend="torch")
    seen: list[tuple[Weights, Weights]] = []
    with pytest.MonkeyPatch.context() as patch:
        weights = mine.weights

        def watched(*args):
            seen.append((weights(*args), spec.weights(*args)))
            return seen[0][0]

        patch.setattr(mine, "weights", watched)
        assert_same_bits(stable_target(x, refs, sigma, backend="cuda"), expected)
    ((found, whole),) = seen
    survivors = (whole.weight > 0).sum(1)
    dense = survivors > gpu_layout.SPARSE_SURVIVORS
    assert 0 < dense.sum() < 20
    assert torch.equal(found.weight.counts >= 0, ~dense)
    assert torch.equal(found.weight.counts[~dense].long(), survivors[~dense])
    slots = -1 - found.weight.counts[dense].long()
    assert torch.equal(slots.sort().values, torch.arange(int(dense.sum())))
    assert torch.equal(found.weight.dense_rows[slots].long(), dense.nonzero()[:, 0])


def test_a_call_is_few_launches(monkeypatch):
    class Kernels:
        def __getattr__(self, name: str) -> Callable[..., object]:
            def watched(*args: object) -> object:
                if not name.startswith("hopper_"):  # a question
                    launched.append(name)
                return getattr(host, name)(*args)

            return watched

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if not function.is_view and function.name() not in NO_KERNELS:
                launched.append(function.name())
            return function(*args, **(kwargs or {}))

    torch.manual_seed(0)
    x, u, sigma = problem((5, 300, 48), torch.float32)
    sigma = sigma.float()
    refs = References(u, value_range=(-1, 1))
    stable_target(x, refs, sigma, backend="cuda")  # makes the copy that is kept
    launched: list[str] = []
    monkeypatch.setattr(mine, "_functions", Kernels)
    run = pipeline.run

    def watched_run(*args: object) -> object:  # a mode does not see into an operator
        with Operators():
            return run(*args)

    monkeypatch.setattr(pipeline, "run", watched_run)
    with Operators():
        stable_target(x, refs, sigma, backend="cuda")
    assert launched == [
        "aten::_to_copy",  # sigma
        "aten::full",  # alpha
        "quantize",
        "coefficients",
        "logits",
        "aten::amax",
        "aten::zero_",
        "weights",
        "gather",
        "multiply_dense",
        "finish",
    ]


def test_launches_go_to_the_device_and_stream_of_the_tensors(monkeypatch):
    torch.manual_seed(5)
    x, u, sigma = problem((5, 300, 20), torch.float32)
    y = u.float() / 99
    host.take_launches()
    monkeypatch.setattr(mine, "_place", lambda tensor: (1, 0xABC))
    stable_target(x, y, sigma, backend="cuda")
    launches = host.take_launches()
    assert len(launches) >= 9  # magnitude, fix, norms, and one or two of each stage
    assert {launch[-2:] for launch in launches} == {(1, 0xABC)}
    assert host.current_device() == 0


def test_torch_makes_the_device_current_for_every_launch(monkeypatch):
    torch.manual_seed(8)
    x, u, sigma = problem((5, 300, 20), torch.float32)
    inside, outside = [], []

    @contextmanager
    def current(tensor):
        outside.extend(host.take_launches())
        yield
        inside.extend(host.take_launches())

    monkeypatch.setattr(gpu_layout, "current", current)
    host.take_launches()
    stable_target(x, u.float() / 99, sigma, backend="cuda")
    assert len(inside) >= 9
    assert outside + host.take_launches() == []


def test_what_cuda_refuses_names_the_call_and_the_shape(monkeypatch):
    monkeypatch.setattr(mine, "_place", lambda tensor: (2, 0))
    with pytest.raises(
        RuntimeError, match=r"cuda quantize samples=3 values=5.*cudaErrorInvalidDevice"
    ):
        mine.quantize(torch.zeros(3, 5), 4)
    samples, refs = torch.zeros(1, 5, 128, dtype=torch.int8), torch.zeros(1, 1, 7, dtype=torch.int8)
    one = torch.ones(1, dtype=torch.float64)
    monkeypatch.setattr(mine, "_place", lambda tensor: (0, 0))
    with pytest.raises(RuntimeError, match=r"cuda logits .*values=7 .*limbs must be 3 or 4, got 5"):
        mine.logits(
            Samples(one, samples, one, one, one, one, None), Prepared(refs, one, one, None, None)
        )


def test_the_order_of_threads_changes_nothing():
    torch.manual_seed(6)
    x, u, sigma = problem((18, 300, 64), torch.float32)
    refs = References(u.float() / 99, limbs=2)
    expected = stable_target(x, refs, sigma, backend="torch")
    for seed in range(4):
        host.seed(seed)
        assert_same_bits(stable_target(x, refs, sigma, backend="cuda"), expected)


def test_the_padding_of_the_logits_is_minus_infinity():
    torch.manual_seed(7)
    samples, refs = operands(3, 130, 20, 1, 4)
    relative = mine.logits(samples, refs)[0]
    whole = relative.as_strided((3, padded(130)), relative.stride())
    assert torch.equal(whole[:, 130:], torch.full((3, 126), -torch.inf))
