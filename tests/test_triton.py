"""The Triton backend around its kernels, and these interpreted in a process of their own.

The interpreted tests are in triton_interpreted.py and kernel_pipeline.py; test_triton_compile.py
reads the machine code, and test_gpu.py runs it where it can.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import own_process
import pytest
import torch

from stf_kernels import (
    BackendUnavailable,
    stable_target,
    triton_backend,
)
from stf_kernels.backends import BACKENDS, PREFERENCE
from stf_kernels.triton_backend import table, tiles

HERE = Path(__file__).parent
INTERPRETED = ["tests/triton_interpreted.py", "tests/kernel_pipeline.py"]
PASSED = 180


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
    environment = {"TRITON_INTERPRET": "1", "STF_TESTED_BACKEND": "triton"}
    done = own_process.run_pytest(*INTERPRETED, environment=environment)
    assert own_process.passed(done) == PASSED


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
