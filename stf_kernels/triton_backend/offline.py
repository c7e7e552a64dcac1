"""Compilation without a GPU, and what the machine code holds.

The int8 matrix instruction is IMMA on sm_80, IGMMA on sm_90 and UTCIMMA on sm_100; a spill is an
instruction of local memory, LDL or STL.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = (80, 90, 100)
TYPES = {
    "x": "fp32",
    "data": "fp32",
    "out": "fp32",
    "relative": "fp32",
    "q": "i8",
    "values": "i8",
    "columns": "i8",
    "digits": "i8",
    "labels": "i64",
    "ref_labels": "i64",
    "num": "i64",
    "total": "i64",
    "sums": "i64",
    "largest": "i64",
    "count": "i32",
    "index": "i32",
    "weight": "i32",
    "dense": "i32",
    "dense_rows": "i32",
}  # what p_ arguments point to; float64 otherwise

_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);", re.MULTILINE)
_PRODUCT = re.compile(r"\b(IMMA|IGMMA|UTCIMMA)\b")
_SPILL = re.compile(r"\b(LDL|STL)\b")
_JUMP = re.compile(r"\bBRA\b.* 0x([0-9a-f]+)")


class Code(NamedTuple):
    """A compiled kernel's machine code in numbers."""

    products: dict[str, int]  # int8 matrix instructions by name
    registers: int  # of a thread
    shared: int  # bytes of a program
    spills: int  # instructions of local memory
    spills_in_loop: int  # of these, inside a loop that holds a matrix instruction
    ptx: str


def compile_kernel(
    kernel: triton.JITFunction,
    constants: dict[str, object],
    architecture: int,
    *,
    warps: int = 4,
    stages: int = 3,
    types: dict[str, str] | None = None,
) -> Code:
    """Compiles `kernel` for sm_<architecture> as a launch with aligned arguments would.

    Args:
        kernel: a function under triton.jit
        constants: its constexpr arguments, and pointers that are None
        architecture: compute capability times ten
        warps, stages: of the launch
        types: what a pointer points to, where it is not as in TYPES
    """
    names = kernel.arg_names
    known = {**TYPES, **(types or {})}
    signature = {name: _type(name, constants, known) for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if name not in constants and (name.startswith("p_") or name in ("d", "o_relative"))
    }
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False},
    )
    return _read(compiled.asm["cubin"], compiled.asm["ptx"], compiled.metadata.shared)


def _type(name: str, constants: dict[str, object], known: dict[str, str]) -> str:
    if name in constants:
        return "constexpr"
    return "*" + known.get(name[2:], "fp64") if name.startswith("p_") else "i32"


def _read(cubin: bytes, ptx: str, shared: int) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text, usage = (_cuobjdump(option, file.name) for option in ("-sass", "-res-usage"))
    lines = [(int(address, 16), line) for address, line in _INSTRUCTION.findall(text)]
    loops = []
    for address, line in lines:
        jump = _JUMP.search(line)
        if jump and int(jump[1], 16) < address:
            loops.append(range(int(jump[1], 16), address))
    products: dict[str, int] = {}
    inner = []
    for address, line in lines:
        if found := _PRODUCT.search(line):
            products[found[1]] = products.get(found[1], 0) + 1
            around = [loop for loop in loops if address in loop]
            if around:
                inner.append(min(around, key=len))
    spills = [address for address, line in lines if _SPILL.search(line)]
    inside = sum(any(address in loop for loop in inner) for address in spills)
    registers = [int(count) for count in re.findall(r"REG:(\d+)", usage)]
    return Code(products, max(registers), shared, len(spills), inside, ptx)


def _cuobjdump(option: str, path: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout
