"""The CUDA backend: the stages as compiled kernels (csrc/cuda_*), int8 products on tensor cores.

Row lists and counts stay on the device, and every launch goes to the caller's stream: a call can
be captured in a CUDA graph. Each of the two products has two kernels: a portable one, for every
GPU from compute capability 8.0 on, and one for 9.0 (Hopper) that takes most shapes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import arithmetic as ar
from . import gpu_layout
from .extension import absence, address, extension, levels
from .gpu_layout import (
    STATISTICS_SUMS,
    Survivors,
    before_weights,
    ceil_div,
    dotted,
    padded,
    pitched,
)
from .stages import Prepared, Queries, Samples, Weights

NAME = "cuda"
MAX_ROWS, BLOCK_BYTES = gpu_layout.MAX_ROWS, gpu_layout.BLOCK_BYTES
workspace = gpu_layout.workspace

HOPPER = (9, 0)

# Which kernel each product runs: "portable", "hopper", or "auto", which is Hopper's on such a GPU
# where it takes the operands. The bits are the same: change it to measure.
PRODUCTS = {"logits": "auto", "multiply_dense": "auto"}


def unavailable(device: torch.device) -> str | None:
    """Why this backend cannot run on `device`, or None."""
    if device.type != "cuda":
        return "it needs an NVIDIA GPU"
    if extension() is None:
        return f"the extension stf_kernels._C is not importable ({absence})"
    built = extension().cuda_architectures.split()
    if not built:
        return f"the CUDA part of the extension is not built: {extension().cuda_absent}"
    reason = gpu_layout.unfit(device)
    if reason is not None:
        return reason
    here = torch.cuda.get_device_capability(device)
    if not any(code_runs(architecture, here) for architecture in built):
        return (
            f"it was built for sm_{', sm_'.join(built)}, none of which runs on compute capability "
            f"{dotted(here)}"
        )
    try:
        extension().cuda.processors(device.index or 0)
    except RuntimeError as error:
        return f"CUDA cannot use the device ({error})"
    return None


def code_runs(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether what CMake builds for an architecture runs on a GPU.

    Machine code runs on the same major and no smaller minor number, PTX on all that came later;
    of 90a both run on that one alone, of 100f in that family. "80" is both, "80-real" machine code
    and "80-virtual" PTX.
    """
    found = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", architecture)
    assert found is not None, architecture
    major, minor, letter, kind = found.groups()
    built = int(major), int(minor)
    if letter == "a":
        return capability == built
    same = capability[0] == built[0] and capability >= built
    if letter == "f":
        return same
    return (same and kind != "-virtual") or (capability >= built and kind != "-real")


def _functions() -> Any:
    """The C functions; tests put those compiled for the host in their place."""
    return extension().cuda


def _place(tensor: Tensor) -> tuple[int, int]:
    """Device and stream of a launch."""
    if not tensor.is_cuda:
        return 0, 0  # the host's functions have but one
    return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream


def _launch(of: Tensor, function: Callable[..., None], *arguments: Any) -> None:
    """Calls a C function for the device and stream of a tensor.

    It is torch that makes the device current: C++ could not go back to one that this process does
    not use without a context, and its memory, on that device.
    """
    with gpu_layout.current(of):
        function(*arguments, _place(of))


def _matrix(values: Tensor, pitch: int) -> tuple[int, ...]:
    """Matrix in csrc/cuda_stages.h."""
    return (address(values), *values.shape, pitch)


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a GPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def on_hopper(product: str, device: torch.device, taken: bool) -> bool:
    """Whether a product runs Hopper's kernel.

    Args:
        product: a key of PRODUCTS
        device: of the operands
        taken: whether that kernel takes them, by their shape and address

    Raises:
        ValueError: PRODUCTS asks for a kernel that does not exist, or that does not take them
    """
    choice = PRODUCTS[product]
    if choice not in ("auto", "portable", "hopper"):
        raise ValueError(
            f"PRODUCTS[{product!r}] must be 'auto', 'portable' or 'hopper', got {choice!r}"
        )
    if choice == "hopper" and not taken:
        raise ValueError(f"PRODUCTS[{product!r}] is 'hopper', which does not take this shape")
    return taken and (choice == "hopper" or (choice == "auto" and capability(device) == HOPPER))


def prepare(data: Tensor, limbs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Float references [n, d] in fixed point: values int8 [R, n, d], norms [n], scale a []."""
    data = data if data.dtype == torch.float64 else data.float()
    wide, size = data.dtype == torch.float64, data.numel()
    values = torch.empty((limbs, *data.shape), dtype=torch.int8, device=data.device)
    largest = torch.zeros(1, dtype=torch.int64, device=data.device)
    scale = torch.empty((), dtype=torch.float64, device=data.device)
    c = _functions()
    _launch(data, c.magnitude, address(data), wide, size, address(largest))
    into = address(values), address(scale)
    _launch(data, c.fix, address(data), wide, size, address(largest), limbs, *into)
    return values, norms(values, 0.0), scale


def norms(values: Tensor, twice_offset: float) -> Tensor:
    """N_k = sum_j v_kj^2 + 2 (b/a) sum_j v_kj in float64 [n]."""
    out = torch.empty(values.shape[1], dtype=torch.float64, device=values.device)
    values, pitch = pitched(values)
    _launch(values, _functions().norms, _matrix(values, pitch), twice_offset, address(out))
    return out


def transpose(values: Tensor) -> Tensor:
    """The copy [R, d, n padded to 128] of the references that stage 4 multiplies."""
    ref_limbs, n, dim = values.shape
    out = torch.empty((ref_limbs, dim, padded(n)), dtype=torch.int8, device=values.device)
    values, pitch = pitched(values)
    _launch(values, _functions().transpose, _matrix(values, pitch), address(out))
    return out


def quantize(x: Tensor, limbs: int) -> tuple[Tensor, Tensor]:
    """Stage 1: the digits of rint(x / step), int8 [B, L, d padded to 128], and step [B]."""
    rows, dim = x.shape
    digits = torch.empty((rows, limbs, padded(dim)), dtype=torch.int8, device=x.device)
    step = torch.empty(rows, dtype=torch.float64, device=x.device)
    wide = x.dtype == torch.float64
    into = address(digits), address(step)
    _launch(x, _functions().quantize, address(x), wide, rows, dim, limbs, *into)
    return digits, step


def coefficients(
    queries: Queries, q: Tensor, step: Tensor, affine: Tensor, distances: bool
) -> Samples:
    """What each row is multiplied by in stages 2 and 5."""
    rows, limbs, _ = q.shape
    numbers = Samples.numbers(queries, distances)
    of = levels(queries, step, affine, numbers)
    digits = address(q), rows, limbs
    _launch(q, _functions().coefficients, of, digits, queries.x.shape[1])
    return Samples.of(queries, q, numbers)


def logits(
    samples: Samples, refs: Prepared, floor: Tensor | float | None = None
) -> tuple[Tensor, Tensor]:
    """Stage 2: r float32 [B, n] relative to anchors m float64 [B, ceil(n / 128)].

    No block is left out, whatever `floor`.
    """
    n = refs.values.shape[1]
    rows, limbs, _ = samples.q.shape
    device = samples.q.device
    relative = torch.empty((rows, padded(n)), dtype=torch.float32, device=device)
    anchors = torch.empty((rows, ceil_div(n, ar.BLOCK)), dtype=torch.float64, device=device)
    values, pitch = pitched(refs.values)
    q = address(samples.q), rows, limbs
    references = _matrix(values, pitch)
    offset, exponent = samples.student or (None, None)
    of_samples = samples.slope, samples.curvature, offset, exponent, samples.labels
    ref_labels = refs.labels if samples.labels is not None else None
    call = (
        tuple(map(address, of_samples)),
        tuple(map(address, (refs.norms, refs.bias, ref_labels))),
        (n, address(relative), address(anchors)),
    )
    taken = _functions().hopper_takes_logits(q, references)
    hopper = on_hopper("logits", device, taken)
    _launch(samples.q, _functions().logits, hopper, q, references, call)
    return relative[:, :n], anchors


def weights(
    relative: Tensor, anchors: Tensor, peak: Tensor, precision: str, statistics: bool
) -> Weights:
    """Stage 3: integer weights P = rint(2^e lim) as lists and digits, and their sums.

    Args:
        relative, anchors: as `logits` returns them
        peak: the largest logit of the row over all references, float64 [B]
    """
    rows, n = relative.shape
    limbs = ar.LIMBS[precision]
    if relative.stride() != (padded(n), 1):  # none that `logits` returned
        relative = torch.nn.functional.pad(relative, (0, padded(n) - n))

    survivors, sums = before_weights(rows, n, limbs, statistics, relative.device)
    survivors.dense.zero_()
    _launch(
        relative,
        _functions().weights,
        address(relative),
        address(anchors),
        address(peak),
        rows,
        n,
        limbs,
        tuple(map(address, survivors)),
        (*map(address, sums), 0, 0, 0, 0)[:STATISTICS_SUMS],
    )
    return Weights(survivors, *sums)


def weighted_sum(weights: Weights, values: Tensor, columns: Tensor | None = None) -> Tensor:
    """Stage 4: sum_k P_ik v_kj for each reference limb, exact int64 [B, R, d].

    Args:
        weights: as `weights` leaves them
        values: int8 [R, n, d]
        columns: `transpose(values)`, where it is at hand
    """
    survivors: Survivors = weights.weight
    ref_limbs, _, dim = values.shape
    rows, limbs, _ = survivors.digits.shape
    num = torch.empty((rows, ref_limbs, dim), dtype=torch.int64, device=values.device)
    if columns is None:
        columns = transpose(values)
    values, pitch = pitched(values)
    addresses = tuple(map(address, survivors))
    of_lists = addresses, rows, _matrix(values, pitch)
    _launch(values, _functions().gather, *of_lists, address(num))
    dense = addresses, rows, limbs, _matrix(columns, dim)
    taken = _functions().hopper_takes_dense(*dense)
    hopper = on_hopper("multiply_dense", values.device, taken)
    _launch(values, _functions().multiply_dense, hopper, *dense, address(num))
    return num


def finish(num: Tensor, total: Tensor, affine: Tensor, samples: Samples, out: Tensor) -> None:
    """Stage 5: out = c_D D + c_x x with D = a num / total + b, rounded once to out's type."""
    rows, ref_limbs, dim = num.shape
    _launch(
        num,
        _functions().finish,
        address(num),
        address(total),
        address(affine),
        address(samples.c_D),
        address(samples.c_x),
        address(samples.x),
        samples.x.dtype == torch.float64,
        rows,
        ref_limbs,
        dim,
        address(out),
    )


def exp2(e: Tensor, out: Tensor) -> None:
    """out = 2^e for -63 <= e <= 0 in float64, for stf_kernels.env to compare with the host's."""
    _launch(e, _functions().exp2, address(e), address(out), e.numel())
