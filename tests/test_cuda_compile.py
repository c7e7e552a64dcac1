"""The CUDA kernels' machine code, as it lies in the extension; nothing here runs on a GPU."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from stf_kernels import _C

ARCHITECTURES = [name.partition("-")[0] for name in _C.cuda_architectures.split()]
if not ARCHITECTURES:
    pytest.skip(f"there are no CUDA kernels: {_C.cuda_absent}", allow_module_level=True)

BINARY = Path(_C.__file__)
CUOBJDUMP = Path(pytest.importorskip("triton").__file__).parent / "backends/nvidia/bin/cuobjdump"
RESOURCES = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) \S+ LOCAL:(\d+)")
CODE = re.compile(r"Function : (\S+)(.*?)\.{10}", re.DOTALL)
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);", re.MULTILINE)
OPERATION = re.compile(r"(?:@!?U?P\w+ )?([A-Z][\w.]*)")
SHAPES = {"IGMMA.64x192x32.S8.S8"}, {"IGMMA.64x256x32.S8.S8"}  # of three and of four digits

on_hopper = pytest.mark.skipif("90a" not in ARCHITECTURES, reason="not built for sm_90a")


class Kernel(NamedTuple):
    registers: int
    local: int  # bytes of local memory: spilled registers, arrays that lie in none
    addresses: list[int]
    code: list[str]

    def operations(self, first: int = 0, end: int | None = None) -> list[str]:
        """Names of the instructions, with their modifiers."""
        return [found[1] for c in self.code[first:end] if (found := OPERATION.match(c))]

    def loop(self, operation: str) -> list[str]:
        """The instructions of the smallest loop that holds such an operation."""
        loops = []
        for i, instruction in enumerate(self.code):
            jump = re.search(r"\bBRA\b.* 0x([0-9a-f]+)", instruction)
            if jump and int(jump[1], 16) in self.addresses[: i + 1]:
                first = self.addresses.index(int(jump[1], 16))
                if any(o.startswith(operation) for o in self.operations(first, i + 1)):
                    loops.append(self.code[first : i + 1])
        return min(loops, key=len)


def dump(option: str, architecture: str) -> str:
    command = [CUOBJDUMP, option, "-arch", f"sm_{architecture}", BINARY]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@cache
def kernels(architecture: str) -> dict[str, Kernel]:
    """All of them by their mangled names."""
    resources = {
        name: (int(registers), int(stack) + int(local))
        for name, registers, stack, local in RESOURCES.findall(
            dump("--dump-resource-usage", architecture)
        )
    }
    found = {}
    for name, text in CODE.findall(dump("-sass", architecture)):
        instructions = INSTRUCTION.findall(text)
        addresses = [int(address, 16) for address, _ in instructions]
        found[name] = Kernel(*resources[name], addresses, [code for _, code in instructions])
    return found


def products(architecture: str, name: str) -> list[Kernel]:
    """The instances of a template of kernels."""
    pattern = re.compile(rf"\d{name}I")
    return [kernel for mangled, kernel in kernels(architecture).items() if pattern.search(mangled)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_kernel_spills(architecture):
    assert len(kernels(architecture)) > 6
    for name, kernel in kernels(architecture).items():
        assert kernel.local == 0, name
        assert not {"LDL", "STL"} & {o.partition(".")[0] for o in kernel.operations()}, name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_portable_products_multiply_int8_matrices(architecture):
    found = products(architecture, "logits_kernel") + products(architecture, "dense_kernel")
    assert len(found) == 6
    for kernel in found:
        loop = [OPERATION.match(c)[1].partition(".")[0] for c in kernel.loop("IMMA")]
        assert loop.count("IMMA") >= 2 * 3 * 4  # of 64 terms: 3 digits of 8 samples by 4 * 16 rows
        assert {"LDSM", "LDGSTS", "BAR"} <= set(loop)


def accumulators(matrix: list[str]) -> set[int]:
    """The registers that matrix instructions add to."""
    found = set()
    for instruction in matrix:
        columns, first = re.search(r"IGMMA\.64x(\d+)x32\S* R(\d+),", instruction).groups()
        found |= set(range(int(first), int(first) + int(columns) // 2))  # 64 rows, 128 threads
    return found


def touched_before_wait(loop: list[str]) -> set[int]:
    """The registers of other instructions between the first matrix product and the wait for it."""
    first = next(i for i, c in enumerate(loop) if "IGMMA" in c)
    turned = loop[first:] + loop[:first]
    wait = next(i for i, c in enumerate(turned) if "WARPGROUP.DEPBAR" in c)
    others = [c for c in turned[:wait] if "IGMMA" not in c]
    return {int(register) for c in others for register in re.findall(r"\bR(\d+)\b", c)}


@on_hopper
def test_hopper_kernels():
    """Four matrix instructions and one wait a stage: products that run on while others load.

    Where ptxas cannot let them run, it waits after each. Fences of the whole cluster, which
    mbarriers could have, would wait for all memory traffic in every stage.
    """
    found = products("90a", "product")
    assert len(found) == 6
    for kernel in found:
        assert kernel.registers == 168  # of 384 threads; then they are dealt anew:
        assert [c.split()[-1] for c in kernel.code if "USETMAXREG" in c] == ["0xe8", "0x28"]
        operations = kernel.operations()
        assert not any(o.startswith("IMMA") for o in operations)
        assert {"UTMALDG.3D", "UTMALDG.3D.MULTICAST"} <= set(operations)
        loop = kernel.loop("IGMMA")
        matrix = [c for c in loop if "IGMMA" in c]
        assert ["gsb0" in c for c in matrix] == [False, False, False, True]
        assert {c.split()[0] for c in matrix} in SHAPES
        names = [OPERATION.match(c)[1] for c in loop]
        assert names.count("WARPGROUP.DEPBAR.LE") == names.count("WARPGROUP.ARRIVE") == 1
        assert not {"MEMBAR", "CCTL", "LDG", "STG"} & {name.partition(".")[0] for name in names}
        assert len(loop) < 100
        touched = touched_before_wait(loop)
        assert touched  # the addresses of what comes next, at least
        assert not touched & accumulators(matrix)
