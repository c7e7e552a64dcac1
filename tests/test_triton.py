"""The Triton backend: interpreted in a process of its own, and run where there is a GPU.

The interpreted tests are in triton_interpreted.py; test_triton_compile.py reads the machine code.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_bits import assert_same_bits, problem

from stf_kernels import (
    BackendUnavailable,
    References,
    golden,
    pipeline,
    stable_target,
    stable_target_with_stats,
    triton_backend,
)
from stf_kernels.backends import BACKENDS, PREFERENCE
from stf_kernels.triton_backend import table, tiles

HERE = Path(__file__).parent
CPU = torch.device("cpu")
NO_GPU = (
    triton_backend.unavailable(torch.device("cuda", 0))
    if torch.cuda.is_available()
    else "torch sees no CUDA device"
)
needs_gpu = pytest.mark.skipif(NO_GPU is not None, reason=str(NO_GPU))
INTERPRETED, INTERPRETED_TESTS = "tests/triton_interpreted.py", 160


def run(code: str, **environment: str) -> str:
    """What a fresh Python prints."""
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=HERE.parent,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_the_interpreter_computes_the_specification_s_bits():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", INTERPRETED],
        cwd=HERE.parent,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    last = done.stdout.splitlines()[-1]
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:]
    counted = {
        what: int(count) for count, what in re.findall(r"(\d+) (\w+)", last.split(" in ")[0])
    }
    counted.pop("warnings", None)
    assert counted == {"passed": INTERPRETED_TESTS}


def test_importing_the_package_leaves_triton_alone():
    assert run("import sys, stf_kernels; print('triton' in sys.modules)") == "False\n"


def test_without_triton_the_reason_is_named():
    code = """
import sys
sys.modules["triton"] = None
import torch
from stf_kernels import triton_backend
print(triton_backend.unavailable(torch.device("cuda", 0)))
"""
    assert "triton is not importable" in run(code)


def test_samples_on_the_cpu_need_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(
        BackendUnavailable, match="'triton' cannot run on cpu: it needs an NVIDIA GPU"
    ):
        stable_target(torch.zeros(1, 1), torch.zeros(1, 1), 1.0, backend="triton")


def test_auto_prefers_triton_on_cuda_devices_and_nowhere_else():
    assert {kind: names[0] for kind, names in PREFERENCE.items()} == {
        "cpu": "cpu",
        "cuda": "triton",
    }
    assert all("triton" not in names for kind, names in PREFERENCE.items() if kind != "cuda")
    assert BACKENDS["triton"] is triton_backend


def test_tiles_go_by_architecture_and_size():
    for stage in (table.LOGITS, table.DENSE):
        for entries in stage.values():
            assert entries[-1][:2] == (table.ANY, table.ANY)
            assert all(128 % entry.tile.BK == 0 for entry in entries)
    assert all(entry.tile.BN == 128 for row in table.LOGITS.values() for entry in row)
    for architecture in (80, 90, 100):
        few, many = (tiles.look_up(table.LOGITS[architecture], B, 4096).BM for B in (64, 512))
        assert few < many
        norms, values = (tiles.look_up(table.DENSE[architecture], 512, d).BN for d in (1, 3072))
        assert norms < values


@needs_gpu
@pytest.mark.parametrize("case", golden.CASES)
def test_golden_hashes_on_a_gpu(case):
    target = golden.CASES[case]("cuda").compute(backend="triton")
    assert golden.digest(target) == golden.RECORDED[case]


@needs_gpu
@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (33, 1000, 100), (300, 4096, 3072), (64, 9000, 768)])
@pytest.mark.parametrize("noise", [{}, {"noise": "student_t", "D": 128}], ids=["gaussian", "t"])
def test_a_gpu_computes_the_specification_s_bits(shape, precision, noise):
    torch.manual_seed(0)
    x, u, sigma = (t.cuda() for t in problem(shape, torch.float32))
    refs = References(u, value_range=(-1, 1))
    options = {"precision": precision, **noise}
    expected = stable_target_with_stats(x, refs, sigma, backend="torch", **options)
    found = stable_target_with_stats(x, refs, sigma, backend="triton", **options)
    assert_same_bits(found[0], expected[0])
    for a, b in zip(found[1], expected[1], strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


@needs_gpu
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("limbs", [1, 3])
def test_references_in_chunks_on_a_gpu(monkeypatch, limbs, kept):
    torch.manual_seed(4)
    x, u, sigma = (t.cuda() for t in problem((64, 5000, 300), torch.float32))
    refs = References(u.float() / 99, limbs=limbs)
    expected = stable_target(x, refs, sigma, backend="triton")
    monkeypatch.setattr(pipeline, "plan", lambda *_: pipeline.Plan(40, 1024, kept))
    assert_same_bits(stable_target(x, refs, sigma, backend="triton"), expected)


@needs_gpu
@pytest.mark.parametrize("kept", [True, False])
def test_captured_in_a_graph_without_waiting_for_the_device(kept):
    torch.manual_seed(1)
    x, u, sigma = (t.cuda() for t in problem((64, 1000, 300), torch.float32))
    refs = References(u, value_range=(-1, 1))
    expected = stable_target(x, refs, sigma, backend="torch")
    torch.cuda.set_sync_debug_mode("error")
    try:
        stable_target(x, refs, sigma, backend="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    if not kept:
        refs = References(u, value_range=(-1, 1))  # its transposed copy becomes part of the graph
    static, graph = torch.zeros_like(x), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = stable_target(static, refs, sigma, backend="triton")
    static.copy_(x)
    graph.replay()
    assert_same_bits(out, expected)
    assert_same_bits(stable_target(x, refs, sigma, backend="triton"), expected)


@needs_gpu
def test_side_streams_and_devices():
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
                found.append(stable_target(*here, backend="triton"))
        torch.cuda.synchronize(device)
        for out in found:
            assert_same_bits(out.cpu(), expected)


@needs_gpu
def test_compiled_into_one_graph_on_a_gpu():
    torch.manual_seed(3)
    x, u, sigma = (t.cuda() for t in problem((64, 1000, 300), torch.float32))
    refs = References(u, value_range=(-1, 1))
    expected = stable_target(x, refs, sigma, backend="torch")
    call = torch.compile(lambda x: stable_target(x, refs, sigma), fullgraph=True)
    assert_same_bits(call(x), expected)
