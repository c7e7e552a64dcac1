"""Fixed inputs and the recorded hashes of their targets; `golden.py` computes and compares them.

The inputs come from integer arithmetic alone, so that they are the same on every machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .parameterization import EDM, Parameterization, Velocity
from .references import References
from .target import stable_target, stable_target_with_stats

SIGMAS = (0.002, 0.01, 0.03, 0.1, 0.25, 0.5, 1.0, 3.0, 10.0, 25.0, 50.0, 80.0)


def random_bits(count: int, seed: int) -> np.ndarray:
    """uint64 [count]: SplitMix64 (Steele, Lea, Flood 2014) at consecutive states."""
    z = np.arange(1, count + 1, dtype=np.uint64) + np.uint64(seed << 32)
    z *= np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def images(n: int, dim: int, seed: int) -> Tensor:
    """uint8 [n, dim]: every one of 17 images many times over, a few of its bytes changed."""
    base = random_bits(17 * dim, seed).reshape(17, dim) & np.uint64(255)
    change = random_bits(n * dim, seed + 1).reshape(n, dim)
    step = (change & np.uint64(7)).astype(np.int64) - 4
    changed = (change >> np.uint64(8)) % np.uint64(11) == 0
    byte = base[np.arange(n) % 17].astype(np.int64) + np.where(changed, step, 0)
    return torch.from_numpy(np.clip(byte, 0, 255).astype(np.uint8))


def noise(rows: int, dim: int, seed: int) -> Tensor:
    """float64 [rows, dim]: twelve 16-bit uniform numbers added up, variance 1, exact."""
    words = random_bits(rows * dim * 3, seed).reshape(3, rows, dim)
    shifts = [np.uint64(s) for s in (0, 16, 32, 48)]
    total = sum(((words >> s) & np.uint64(0xFFFF)).sum(0).astype(np.int64) for s in shifts)
    return torch.from_numpy((total - 12 * 32768) * 2.0**-16 + 6 * 2.0**-16)


def samples(u: Tensor, rows: int, seed: int, alpha: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """x = alpha y + sigma eps in float64 [rows, dim], and sigma [rows]."""
    sigma = torch.tensor(SIGMAS, dtype=torch.float64).repeat(-(-rows // len(SIGMAS)))[:rows]
    y = u[(torch.arange(rows) * 29) % len(u)].double() / 127.5 - 1
    return alpha * y + sigma[:, None] * noise(rows, u.shape[1], seed), sigma


class Problem(NamedTuple):
    """The arguments of a call, on one device."""

    x: Tensor  # [B, d]
    refs: References
    sigma: Tensor  # [B]
    rows: dict[str, Tensor]  # arguments with one value for each sample, [B]
    options: dict[str, Any]  # the others
    statistics: bool = False  # what is hashed: those that take no logarithm, or the target

    def compute(self, rows: slice = slice(None), **where: Any) -> Tensor:
        """Targets [m, d] of some of the samples, or statistics [5, m].

        Args:
            rows: the samples
            where: arguments of `stable_target` that change no bit
        """
        call = stable_target_with_stats if self.statistics else stable_target
        given: dict[str, Any] = {name: values[rows] for name, values in self.rows.items()}
        result = call(self.x[rows], self.refs, self.sigma[rows], **given, **self.options, **where)
        if isinstance(result, Tensor):
            return result
        stats = result[1]
        free_of_logarithms = (stats.ess, stats.max_weight, stats.second_moment, stats.lost_mass)
        return torch.stack([stats.argmax.double(), *free_of_logarithms])

    def join(self, parts: list[Tensor]) -> Tensor:
        """What `compute` returned for one part of the samples after the other."""
        return torch.cat(parts, 1 if self.statistics else 0)


def _levels(device: str, n: int, dim: int, seed: int = 1, **options: Any) -> Problem:
    u = images(n, dim, seed)
    x, sigma = samples(u, 24, seed + 1)
    refs = References(u.to(device), value_range=(-1, 1))
    return Problem(x.float().to(device), refs, sigma.to(device), {}, options)


def _conditions(device: str) -> Problem:
    u = images(500, 96, 3)
    alpha = torch.linspace(0.0, 1.0, 24, dtype=torch.float64)[:, None]
    x, sigma = samples(u, 24, 4, alpha)
    weight = torch.where(torch.arange(500) % 7 == 0, -torch.inf, (torch.arange(500) % 5) / 4)
    refs = References(
        u.to(device),
        value_range=(0, 1),
        labels=torch.arange(500) % 3,
        log_weight=weight.double(),
    )
    rows = {"alpha": alpha[:, 0].to(device), "labels": (torch.arange(24) % 4 - 1).to(device)}
    return Problem(x.float().to(device), refs, sigma.to(device), rows, {"target": "v"})


def _floats(
    device: str, dtype: torch.dtype, limbs: int | None, target: Parameterization
) -> Problem:
    u = images(300, 130, 5)
    x, sigma = samples(u, 24, 6)
    y = ((u.double() - 100) / 90).to(dtype).to(device)
    x = x if dtype == torch.float64 else x.float()
    refs = References(y, limbs=limbs)
    return Problem(x.to(device), refs, sigma.to(device), {}, {"target": target})


def _student_t(device: str) -> Problem:
    problem = _levels(device, 400, 75, seed=9, noise="student_t", target="denoised")
    D = 2.0 ** torch.arange(-1, 23, dtype=torch.float64)
    return problem._replace(rows={"D": D.to(device)})


# Called with a device. "dense" has rows of more than 1024 survivors.
CASES: dict[str, Callable[[str], Problem]] = {
    "levels exact": lambda device: _levels(device, 600, 192, precision="exact"),
    "levels fast": lambda device: _levels(device, 600, 192, precision="fast"),
    "dense exact": lambda device: _levels(device, 1500, 61, precision="exact"),
    "dense fast": lambda device: _levels(device, 1500, 61, precision="fast"),
    "conditions": _conditions,
    "float32": lambda device: _floats(device, torch.float32, None, "denoised"),
    "float64": lambda device: _floats(device, torch.float64, None, Velocity(1.0, -1.0)),
    "float16 three limbs": lambda device: _floats(device, torch.float16, 3, "epsilon"),
    "bfloat16 two limbs": lambda device: _floats(device, torch.bfloat16, 2, EDM(0.5)),
    "student-t": _student_t,
    "statistics": lambda device: _levels(device, 700, 64, seed=7)._replace(statistics=True),
}

RECORDED = {
    "levels exact": "880e960d330dd826c9fcb7dd95cf8d1f71e43ea8a78b0f1654b8b76d22e8fe5c",
    "levels fast": "20002eaf7be79934357bf42e63d5765ce1ddc539ba1425d63a1f97d94e7e366d",
    "dense exact": "c37cb9e37040591202626977349a048371e91bc360bb77c20a9755c8e0fbc6dc",
    "dense fast": "fcc0ae6db52f6af2655980d7b113a34ca9e01407b4436ee0e9bb73c5cd6ccc42",
    "conditions": "5ae4038839cbbb7732e5fea8454aa444035101f2f75a15852f2244919cb8fb94",
    "float32": "38687288bce7d9bbc3909e244a7878d94b8fcc9969fa37dd8b42e367b0e7efb8",
    "float64": "532275a57e552ab47a0ec5886bc2c54060669911067e3ff616ff744d936eb2f5",
    "float16 three limbs": "5810ccb716f1be0836416ad2935643eaa6b9ba562556f6f3f5891d3c32cad68f",
    "bfloat16 two limbs": "2a521435937bc2cbc9f30ea1f9eab5b1c87bdc7e9fc8f403dc8ec8c2089101db",
    "student-t": "872f8ed4739ae7d1a55506fac070223e9cb806fb7f3ed2d5899614c63ac8551c",
    "statistics": "ef06ff21f17a1aeb4d1e7fa6abf72208ecabf6b33d6b30fd9d25bbb50e2c86c6",
}


def digest(tensor: Tensor) -> str:
    """sha256 of the tensor's bytes, little-endian, row by row."""
    data = tensor.detach().cpu().contiguous().numpy()
    return hashlib.sha256(data.astype(data.dtype.newbyteorder("<")).tobytes()).hexdigest()
