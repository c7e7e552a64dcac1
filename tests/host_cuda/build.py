"""Compiles csrc's CUDA sources for the host, and finds what a process needs to load them."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import own_process
import pybind11
from filelock import FileLock

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
MODULE = "_cuda_on_host"
COMPILER = os.environ.get("CXX", "g++")
FLAGS = [
    *("-std=c++17", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    *(f"-I{HERE}", f"-I{CSRC}", f"-isystem{pybind11.get_include()}"),
    f"-isystem{sysconfig.get_paths()['include']}",
]
SAFE_TERMS = 512  # int32 sums are cut where they need not be, for tests of a usual size
CHECKED = [  # the kernels and their callers
    *("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
    *("-ftrivial-auto-var-init=pattern", "-fno-omit-frame-pointer"),
    f"-DSTF_SAFE_TERMS={SAFE_TERMS}",
]
UNCHECKED = {"machine": ["-O3"], "cuda_bindings": ["-O0"], "module": ["-O0"]}
NEEDS = "it needs g++ with its sanitizers, on x86-64 Linux"


def missing() -> str | None:
    """Why nothing can be built here, or None."""
    if platform.system() != "Linux" or platform.machine() != "x86_64" or not shutil.which(COMPILER):
        return NEEDS
    return None if Path(_library("libasan.so")).is_absolute() else NEEDS


def sources() -> list[Path]:
    """The kernels, the machine and the module."""
    return [*CSRC.glob("cuda_*.cu"), CSRC / "cuda_bindings.cpp", *HERE.glob("*.c*")]


def build(folder: Path) -> Path:
    """The module, in `folder`, where the parts that have not changed are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    headers = b"".join(p.read_bytes() for d in (HERE, CSRC) for p in sorted(d.glob("*.*h")))

    def compiled(source: Path) -> Path:
        flags = FLAGS + UNCHECKED.get(source.stem, CHECKED)
        text = headers + source.read_bytes() + repr((COMPILER, flags)).encode()
        out = folder / f"{source.stem}-{hashlib.sha256(text).hexdigest()[:16]}.o"
        if not out.exists():
            fresh = out.with_suffix(".part")
            _run([COMPILER, "-x", "c++", "-c", str(source), *flags, "-o", str(fresh)])
            fresh.replace(out)
        return out

    def linked(objects: list[Path]) -> Path:
        key = hashlib.sha256("".join(o.name for o in objects).encode()).hexdigest()[:16]
        module = folder / key / (MODULE + sysconfig.get_config_var("EXT_SUFFIX"))
        if not module.exists():
            module.parent.mkdir(exist_ok=True)
            fresh = module.with_suffix(".part")
            link = ["-shared", "-fsanitize=address,undefined", *map(str, objects)]
            _run([COMPILER, *link, "-o", str(fresh)])
            fresh.replace(module)
        return module

    # Two processes of tests may ask for it: the second waits, and finds it made.
    with FileLock(folder / "lock"), ThreadPoolExecutor(2) as pool:
        return linked(list(pool.map(compiled, sorted(sources(), key=lambda p: -p.stat().st_size))))


def environment() -> dict[str, str]:
    """What a process must have in its environment to import such a module."""
    return {
        **os.environ,
        "LD_PRELOAD": f"{_library('libasan.so')} {_library('libstdc++.so')}",
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
    }


def _library(name: str) -> str:
    found = subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True)
    return found.stdout.strip()


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def run_pytest(*arguments: str) -> subprocess.CompletedProcess[str]:
    """pytest in a process that has the module, which is built where it must be."""
    module = build(CSRC.parent / "build" / "host_cuda")
    path = os.pathsep.join([str(module.parent), str(HERE.parent)])
    return own_process.run_pytest(
        *("-p", "cuda_on_host"),
        "--capture=sys",  # what a sanitizer says last must not be captured
        *arguments,
        environment=environment() | {"PYTHONPATH": path, "STF_TESTED_BACKEND": "cuda"},
    )


if __name__ == "__main__":
    done = run_pytest(*sys.argv[1:])
    print(done.stdout + done.stderr)
    sys.exit(done.returncode)
