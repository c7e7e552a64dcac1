"""Which backend computes: one dict, one function."""

from __future__ import annotations

import torch

from . import cpu_backend, cuda_backend, torch_backend, triton_backend
from .stages import Stages

BACKENDS: dict[str, Stages] = {
    module.NAME: module for module in (cpu_backend, triton_backend, cuda_backend, torch_backend)
}

# What "auto" tries, in this order. "cuda" is taken by name alone: neither it nor "triton" has been
# measured on a GPU, and two that nobody compared need no order.
PREFERENCE = {"cpu": ("cpu", "torch"), "cuda": ("triton", "torch")}


class BackendUnavailable(RuntimeError):
    """The backend asked for by name cannot run here; the message says why."""


def check_name(name: str) -> None:
    """Raises ValueError if no backend has that name."""
    if not isinstance(name, str) or name not in ("auto", *BACKENDS):
        names = ", ".join(map(repr, ("auto", *BACKENDS)))
        raise ValueError(f"backend must be one of {names}, got {name!r}")


def resolve(name: str, device: torch.device) -> Stages:
    """The backend of that name, or for "auto" the first that runs on `device`.

    Raises:
        ValueError: no backend has that name
        BackendUnavailable: it cannot run on `device`
    """
    check_name(name)
    candidates = PREFERENCE.get(device.type, ("torch",)) if name == "auto" else (name,)
    reasons = []
    for candidate in candidates:
        reason = BACKENDS[candidate].unavailable(device)
        if reason is None:
            return BACKENDS[candidate]
        reasons.append(f"backend {candidate!r} cannot run on {device}: {reason}")
    raise BackendUnavailable("; ".join(reasons))
