"""The two operators PyTorch sees. Targets are constants: neither has an autograd formula."""

from __future__ import annotations

import torch
from torch import Tensor

from . import pipeline, statistics
from .backends import resolve
from .stages import Prepared


@torch.library.custom_op("stf_kernels::prepare", mutates_args=())
def prepare(data: Tensor, limbs: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Float references [n, d] in fixed point: int8 [limbs, n, d], norms [n], affine [2]."""
    values, norms, scale = resolve(backend, data.device).prepare(data.contiguous(), limbs)
    return values, norms, torch.stack([scale, torch.zeros_like(scale)])


@prepare.register_fake
def _(data: Tensor, limbs: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    n, d = data.shape
    return (
        data.new_empty((limbs, n, d), dtype=torch.int8),
        data.new_empty((n,), dtype=torch.float64),
        data.new_empty((2,), dtype=torch.float64),
    )


@torch.library.custom_op("stf_kernels::stable_target", mutates_args=())
def stable_target(
    x: Tensor,
    sigma: Tensor,
    alpha: Tensor,
    values: Tensor,
    norms: Tensor,
    affine: Tensor,
    bias: Tensor | None,
    columns: Tensor | None,
    labels: Tensor | None,
    ref_labels: Tensor | None,
    kind: str,
    parameters: list[Tensor],
    precision: str,
    backend: str,
    with_stats: bool,
) -> list[Tensor]:
    """Targets [B, d], followed by the seven statistics [B] if asked for."""
    if x.shape[0] == 0:
        return _outputs(x, with_stats)
    refs = Prepared(values, norms, affine, bias, ref_labels, columns)
    stages = resolve(backend, x.device)
    out, sums = pipeline.run(
        stages, x, sigma, alpha, refs, labels, kind, parameters, precision, with_stats
    )
    if sums is None:
        return [out]
    return [out, *statistics.from_sums(sums, x, sigma, alpha, refs, precision)]


def _outputs(x: Tensor, with_stats: bool) -> list[Tensor]:
    """Tensors of the outputs' shapes and types, not filled."""
    out = [torch.empty_like(x, memory_format=torch.contiguous_format)]
    for name in statistics.TargetStats._fields if with_stats else ():
        dtype = torch.int64 if name == "argmax" else torch.float64
        out.append(x.new_empty(x.shape[:1], dtype=dtype))
    return out


@stable_target.register_fake
def _(
    x,
    sigma,
    alpha,
    values,
    norms,
    affine,
    bias,
    columns,
    labels,
    ref_labels,
    kind,
    parameters,
    precision,
    backend,
    with_stats,
):
    return _outputs(x, with_stats)
