"""The backends for NVIDIA GPUs on one: bits, graphs, streams, devices, torch.compile."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bits import assert_same_bits, problem

from stf_kernels import (
    References,
    cuda_backend,
    golden,
    pipeline,
    stable_target,
    stable_target_with_stats,
)
from stf_kernels.backends import BACKENDS

GPU = torch.device("cuda", 0)


def _on_a_gpu(name: str) -> object:
    reason = BACKENDS[name].unavailable(GPU)
    return pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=str(reason)))


on_a_gpu = pytest.mark.parametrize("backend", [_on_a_gpu("triton"), _on_a_gpu("cuda")])
on_a_gpu_with_cuda = pytest.mark.parametrize("backend", [_on_a_gpu("cuda")])


def assert_equals_specification(backend: str, *args: object, **options: object) -> None:
    expected = stable_target_with_stats(*args, backend="torch", **options)
    found = stable_target_with_stats(*args, backend=backend, **options)
    assert_same_bits(found[0], expected[0])
    for name, a, b in zip(expected[1]._fields, found[1], expected[1], strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num()), name


@on_a_gpu
@pytest.mark.parametrize("case", golden.CASES)
def test_golden_hashes(case, backend):
    problem = golden.CASES[case]("cuda")
    assert golden.digest(problem.compute(backend=backend)) == golden.RECORDED[case]


@on_a_gpu
@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (33, 1000, 100), (300, 4096, 3072), (64, 9000, 768)])
@pytest.mark.parametrize("noise", [{}, {"noise": "student_t", "D": 128}], ids=["gaussian", "t"])
def test_the_specification_s_bits(shape, precision, noise, backend):
    torch.manual_seed(0)
    x, u, sigma = (t.cuda() for t in problem(shape, torch.float32))
    refs = References(u, value_range=(-1, 1))
    assert_equals_specification(backend, x, refs, sigma, precision=precision, **noise)


@on_a_gpu
@settings(max_examples=100, deadline=None)
@given(
    B=st.integers(1, 200),
    n=st.integers(1, 3000),
    d=st.integers(1, 300),
    seed=st.integers(0, 2**31),
    exponent=st.integers(-30, 30),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    precision=st.sampled_from(["exact", "fast"]),
    limbs=st.sampled_from([0, 1, 2, 3, 4]),
)
def test_a_gpu_and_the_cpu_have_the_same_bits(
    backend, B, n, d, seed, exponent, dtype, precision, limbs
):
    torch.manual_seed(seed)
    x, u, sigma = problem((B, n, d), torch.float64)
    scale = 2.0**exponent
    x, sigma = (x * scale).to(dtype), sigma * scale
    y = (u.double() / 127.5 - 1) * scale
    refs = References(y, limbs=limbs) if limbs else References(u, value_range=(-scale, scale))
    options = {"alpha": torch.rand(B), "precision": precision}
    expected = stable_target_with_stats(x, refs, sigma, backend="torch", **options)
    options["alpha"] = options["alpha"].cuda()
    found = stable_target_with_stats(
        x.cuda(), refs.to("cuda"), sigma.cuda(), backend=backend, **options
    )
    assert_same_bits(found[0].cpu(), expected[0])
    for name in ("ess", "max_weight", "argmax", "lost_mass"):  # no logarithm, which is a platform's
        a, b = (getattr(stats, name).cpu().nan_to_num() for stats in (found[1], expected[1]))
        assert torch.equal(a, b), name


@on_a_gpu_with_cuda
@pytest.mark.parametrize("kernel", ["portable", "hopper"])
@pytest.mark.parametrize("shape", [(65, 1000, 128), (200, 4096, 3072), (130, 300, 4800)])
def test_both_kernels_of_the_products(monkeypatch, shape, kernel, backend):
    if kernel == "hopper" and torch.cuda.get_device_capability(GPU) != cuda_backend.HOPPER:
        pytest.skip("it needs compute capability 9.0")
    monkeypatch.setattr(cuda_backend, "PRODUCTS", dict.fromkeys(cuda_backend.PRODUCTS, kernel))
    torch.manual_seed(5)
    x, u, sigma = (t.cuda() for t in problem(shape, torch.float32))
    assert_equals_specification(backend, x, References(u, value_range=(-1, 1)), sigma)
    assert_equals_specification(backend, x, References(u.float() / 99, limbs=3), sigma)


@on_a_gpu
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("limbs", [1, 3])
def test_references_in_chunks(monkeypatch, limbs, kept, backend):
    torch.manual_seed(4)
    x, u, sigma = (t.cuda() for t in problem((64, 5000, 300), torch.float32))
    refs = References(u.float() / 99, limbs=limbs)
    expected = stable_target(x, refs, sigma, backend=backend)
    monkeypatch.setattr(pipeline, "plan", lambda *_: pipeline.Plan(40, 1024, kept))
    assert_same_bits(stable_target(x, refs, sigma, backend=backend), expected)


@on_a_gpu
@pytest.mark.parametrize("kept", [True, False])
def test_captured_in_a_graph_without_waiting_for_the_device(kept, backend):
    torch.manual_seed(1)
    x, u, sigma = (t.cuda() for t in problem((64, 1000, 300), torch.float32))
    refs = References(u, value_range=(-1, 1))
    expected = stable_target(x, refs, sigma, backend="torch")
    torch.cuda.set_sync_debug_mode("error")
    try:
        stable_target(x, refs, sigma, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    if not kept:
        refs = References(u, value_range=(-1, 1))  # its transposed copy becomes part of the graph
    static, graph = torch.zeros_like(x), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = stable_target(static, refs, sigma, backend=backend)
    static.copy_(x)
    graph.replay()
    assert_same_bits(out, expected)
    assert_same_bits(stable_target(x, refs, sigma, backend=backend), expected)


@on_a_gpu
def test_side_streams_and_devices(backend):
    torch.manual_seed(2)
    x, u, sigma = problem((64, 1000, 300), torch.float32)
    expected = stable_target(x, References(u, value_range=(-1, 1)), sigma, backend="torch")
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        refs = References(u.to(device), value_range=(-1, 1))
        here = x.to(device), refs, sigma.to(device)
        torch.cuda.synchronize(device)
        streams = [torch.cuda.Stream(device) for _ in range(3)]
        found = []
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(stable_target(*here, backend=backend))
        torch.cuda.synchronize(device)
        for out in found:
            assert_same_bits(out.cpu(), expected)


@on_a_gpu
def test_compiled_into_one_graph(backend):
    torch.manual_seed(3)
    x, u, sigma = (t.cuda() for t in problem((64, 1000, 300), torch.float32))
    refs = References(u, value_range=(-1, 1))
    expected = stable_target(x, refs, sigma, backend="torch")
    call = torch.compile(lambda x: stable_target(x, refs, sigma, backend=backend), fullgraph=True)
    assert_same_bits(call(x), expected)
