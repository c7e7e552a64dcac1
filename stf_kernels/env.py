"""`python -m stf_kernels.env`: what was built, for what, what runs here, and why not the rest."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from typing import Any

import torch

from . import __version__, cpu_backend, cuda_backend
from .backends import BACKENDS, PREFERENCE


def report() -> dict[str, str]:
    """One line for each part, to be printed or put into a bug report."""
    lines = {
        "stf-kernels": __version__,
        "python": f"{sys.version.split()[0]} on {platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "triton": _version("triton"),
    }
    extension = cpu_backend.extension()
    if extension is None:
        lines["extension _C"] = f"not importable: {cpu_backend.unavailable(torch.device('cpu'))}"
    else:
        lines["extension _C"] = f"{extension.isa()} code, of {', '.join(extension.isas())}"
        lines["int8 products"] = (
            "oneDNN" if cpu_backend.has_int8_products() else "none that is exact: int16 instead"
        )
        lines["CUDA part"] = (
            f"built for sm_{extension.cuda_architectures.replace(' ', ', sm_')}; "
            f"{'with' if extension.cuda.hopper_built() else 'without'} kernels of sm_90a's own"
            if extension.cuda_architectures
            else f"not built: {extension.cuda_absent}"
        )
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    else:
        lines["CUDA devices"] = "none that torch can use"
    for device in devices[1:]:
        name = torch.cuda.get_device_name(device)
        major, minor = torch.cuda.get_device_capability(device)
        lines[str(device)] = f"{name}, sm_{major}{minor}; {_device_check(extension, device)}"
    lines["backend auto"] = "; ".join(
        f"on {kind} devices {' or '.join(names)}" for kind, names in PREFERENCE.items()
    )
    for name, backend in BACKENDS.items():
        reasons = {str(device): backend.unavailable(device) for device in devices}
        lines[f"backend {name}"] = "; ".join(
            f"{device}: {'runs' if reason is None else reason}"
            for device, reason in reasons.items()
        )
    return lines


def _device_check(extension: Any, device: torch.device) -> str:
    """Whether the device's arithmetic gives the host's bits, by 2^e on [-63, 0]."""
    reason = cuda_backend.unavailable(device)
    if reason is not None:
        return "arithmetic not checked: the CUDA part does not run"
    e = -63 * torch.rand(1 << 16, dtype=torch.float64)
    host, given = torch.empty_like(e), e.to(device)
    there = torch.empty_like(given)
    extension.exp2(e.data_ptr(), host.data_ptr(), e.numel())
    try:
        cuda_backend.exp2(given, there)
        same = int((host == there.cpu()).sum())
    except RuntimeError as error:
        return f"arithmetic not checked: {error}"
    return f"arithmetic: {same} of {e.numel()} values have the host's bits"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    for name, line in report().items():
        print(f"{name + ':':17} {line}")
