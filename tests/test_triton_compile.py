"""The Triton kernels' machine code, compiled without a GPU for the architectures of the table."""

from __future__ import annotations

import os
import re
import struct

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the kernels are interpreted", allow_module_level=True)

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from stf_kernels import References, stable_target, stable_target_with_stats, triton_backend
from stf_kernels import arithmetic as ar
from stf_kernels.gpu_layout import SPARSE_SURVIVORS
from stf_kernels.triton_backend import PART_TERMS, kernels, table
from stf_kernels.triton_backend.offline import ARCHITECTURES, Code, compile_kernel

BIG = {80: "IMMA", 90: "IGMMA", 100: "UTCIMMA" if kernels.VERSION >= (3, 9) else "IMMA"}
SHARED = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}  # a program's; 99 KB: sm_86, sm_89, sm_120
# What would round otherwise than MATH.md: contraction, approximation, subnormals as zero.
INEXACT = re.compile(r"\b(fma|mad)\.[\w.]*f(32|64)|\.approx|\.full|\.ftz")


def tiles(stage: dict[int, tuple[table.Entry, ...]]) -> list[tuple[int, table.Tile]]:
    """Every tile of a stage with its architecture, once."""
    found = [(a, e.tile) for a in ARCHITECTURES for e in stage[a]]
    return list(dict.fromkeys(found))


def assert_good(code: Code, architecture: int, tile: table.Tile) -> None:
    instruction = BIG[architecture] if tile.BM == 64 else "IMMA"
    assert list(code.products) == [instruction]
    assert code.products[instruction] > 0
    assert code.spills_in_loop == 0
    assert code.shared <= SHARED[architecture]
    assert INEXACT.search(code.ptx) is None


CONDITIONS = ("p_bias", "p_labels", "p_ref_labels")
STUDENT = ("p_offset", "p_exponent")


@pytest.mark.parametrize(
    ("L", "R", "spans", "ragged", "absent"),
    [
        (4, 1, 1, False, CONDITIONS + STUDENT),
        (3, 3, 1, False, CONDITIONS + STUDENT),
        (4, 4, 2, True, STUDENT),
        (4, 1, 1, False, CONDITIONS),
        (4, 4, 2, True, ()),
    ],
)
@pytest.mark.parametrize(("architecture", "tile"), tiles(table.LOGITS), ids=str)
def test_logits(architecture, tile, L, R, spans, ragged, absent):
    sizes = {"L": L, "R": R, "SPANS": spans, "RAGGED": ragged, "BM": tile.BM, "BK": tile.BK}
    code = compile_kernel(
        kernels.logits,
        {**dict.fromkeys(absent), **sizes},
        architecture,
        warps=tile.warps,
        stages=tile.stages,
    )
    assert_good(code, architecture, tile)
    student = "p_offset" not in absent
    assert ("div.rn.f64" in code.ptx) == student
    assert (set(ar.LOG2_COEFFICIENTS) <= doubles(code.ptx)) == student


@pytest.mark.parametrize("L", [4, 3])
@pytest.mark.parametrize(("architecture", "tile"), tiles(table.DENSE), ids=str)
def test_multiply_dense(architecture, tile, L):
    sizes = {"L": L, "R": 1, "BM": tile.BM, "BN": tile.BN, "BK": tile.BK}
    constants = {**sizes, "SLOTS": 132, "PART": PART_TERMS}
    code = compile_kernel(
        kernels.multiply_dense, constants, architecture, warps=tile.warps, stages=tile.stages
    )
    assert_good(code, architecture, tile)


ROW_KERNELS = {
    "quantize": {"L": 4, "BD": 1024},
    "coefficients": {"KIND": "edm", "DISTANCES": True, "p_second": None, "L": 4, "BD": 1024},
    "clear": {"S": 5, "BB": 128},
    "weights": {"L": 4, "CAPACITY": SPARSE_SURVIVORS, "STATISTICS": True, "BK": 1024},
    "gather": {
        "R": 1,
        "CAPACITY": SPARSE_SURVIVORS,
        "SLOTS": 132,
        "PART": PART_TERMS,
        "BM": 64,
        "BN": 128,
        "BK": 4,
        "BD": 512,
    },
    "finish": {"R": 4, "BD": 1024},
    "magnitude": {"STEPS": 16, "BD": 2048},
    "fix": {"R": 4, "BD": 1024},
    "norms": {"R": 4, "BD": 1024},
    "transpose": {"R": 1, "BN": 128, "BD": 64},
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", ROW_KERNELS)
def test_row_kernels(name, architecture):
    code = compile_kernel(getattr(kernels, name), ROW_KERNELS[name], architecture)
    assert not code.products
    assert code.spills == 0
    assert INEXACT.search(code.ptx) is None
    if name == "weights":
        assert set(ar.EXP2_COEFFICIENTS) <= doubles(code.ptx)
    assert ("div.rn.f64" in code.ptx) == (name in ("coefficients", "finish"))
    assert ("sqrt.rn.f64" in code.ptx) == (name == "coefficients")


def doubles(ptx: str) -> set[float]:
    """The float64 constants of PTX, as 0d followed by sixteen hexadecimal digits."""
    words = re.findall(r"0d([0-9A-Fa-f]{16})", ptx)
    return {struct.unpack(">d", bytes.fromhex(word))[0] for word in words}


class NoDevice:
    """What a launch asks Triton's driver before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def test_every_launch_of_the_stages_binds_and_compiles(monkeypatch):
    run, launched = JITFunction.run, []

    def compile_only(self, *args, warmup, **options):
        compiled = run(self, *args, warmup=True, **options)
        assert not compiled.metadata.enable_fp_fusion
        launched.append((self.__name__, compiled.metadata.num_warps))

    monkeypatch.setattr(driver, "_active", NoDevice())
    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(triton_backend.tiles, "architecture", lambda device: 90)
    monkeypatch.setattr(triton_backend, "unavailable", lambda device: None)
    torch.manual_seed(0)
    y, labels = torch.randn(300, 128), torch.arange(300) % 3
    triton_backend.prepare(y, 3)
    stable_target(torch.randn(40, 128), References(y, limbs=1), 1.0, backend="triton")
    stable_target_with_stats(
        torch.randn(3, 100),
        References(y[:, :100], limbs=3, labels=labels, log_weight=torch.randn(300)),
        1.0,
        labels=labels[:3],
        noise="student_t",
        D=64,
        backend="triton",
    )
    assert {name for name, _ in launched} == {name for name in kernels.__all__ if name.islower()}
    assert ("logits", 8) in launched


def test_every_kernel_is_compiled_here():
    assert set(ROW_KERNELS) | {"logits", "multiply_dense"} == {
        name for name in kernels.__all__ if name.islower()
    }


def test_a_tile_too_large_for_its_warps_is_seen_to_spill():
    sizes = {"L": 4, "R": 1, "BM": 64, "BN": 128, "BK": 128, "SLOTS": 132, "PART": PART_TERMS}
    code = compile_kernel(kernels.multiply_dense, sizes, 80, warps=4)
    assert code.spills_in_loop > 0
