"""Where rows come from, and the file they are kept in. Neither names the host."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import stf_kernels
from bench.rows import Row

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
# The instructions that decide which product is fast.
FLAGS = (
    *("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8"),
    *("asimddp", "i8mm", "bf16", "sve"),
)


def provenance(device: torch.device, command: str, commit: str | None = None) -> dict[str, object]:
    """Machine, software, commit, date and command of a run.

    Args:
        device: where the rows were measured
        command: as it was typed
        commit: for a copy without its git history: what it is a copy of
    """
    dirty = None
    if commit is None and (commit := _git("rev-parse", "HEAD")) is not None:
        dirty = bool(_git("status", "--porcelain"))
    gpu = None
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        gpu = {
            "name": about.name,
            "capability": f"{about.major}.{about.minor}",
            "memory_bytes": about.total_memory,
            "cuda": torch.version.cuda,
            "driver": _driver(),
        }
    return {
        "gpu": gpu,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "flags": [flag for flag in FLAGS if flag in _cpuinfo("flags|Features").split()],
        "os": _operating_system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "peers": {name: _version(name) for name in ("faiss-cpu", "pykeops")},
        "stf_kernels": stf_kernels.__version__,
        "commit": commit,
        "dirty": dirty,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
    }


def write(
    rows: Iterable[Row], origin: dict[str, object], parts: list[dict[str, object]] | None = None
) -> Path:
    """Keeps the rows of a run as bench/results/MACHINE-DATE.json.

    Args:
        rows: what was measured
        origin: their `provenance`
        parts: how the parts of a run in parts went
    """
    gpu = origin["gpu"]
    machine = gpu["name"] if isinstance(gpu, dict) else f"{origin['cpu']} {origin['cores']} cores"
    name = re.sub(r"[^a-z0-9]+", "-", str(machine).lower()).strip("-")
    stamp = re.sub(r"[-:]|\+.*", "", str(origin["date"]))  # 20250131T235959, UTC
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{stamp}.json"
    sections = {"provenance": json.dumps(origin), "rows": _lines(map(asdict, rows))}
    if parts is not None:
        sections["parts"] = _lines(parts)
    text = ",\n".join(f'"{name}": {section}' for name, section in sections.items())
    path.write_text(f"{{{text}}}\n")
    return path


def _lines(items: Iterable[dict[str, object]]) -> str:
    """A JSON list of one item a line."""
    return "[\n" + ",\n".join(map(json.dumps, items)) + "\n]"


def cpu_name() -> str:
    """The processor's own name."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(field: str) -> str:
    """A field of the first processor in /proc/cpuinfo, empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    found = re.search(rf"^(?:{field})\s*:\s*(.*)$", text, re.MULTILINE)
    return found[1] if found else ""


def _operating_system() -> str:
    try:
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        name = platform.system()
    return f"{name} {platform.machine()}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    found = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found.splitlines()[0] if found else None


def _git(*words: str) -> str | None:
    return _output("git", *words)


def _output(*command: str) -> str | None:
    """What a command prints, None where it fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
