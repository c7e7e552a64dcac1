"""The two operators PyTorch sees. Targets are constants: neither has an autograd formula."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import handles, pipeline
from .backends import resolve
from .pipeline import ReferenceSet
from .ranks import Alone, Group
from .stages import Queries
from .statistics import TargetStats
from .storage import Resident

T = TypeVar("T")

_LIBRARY = torch.library.Library("stf_kernels", "DEF")


def _operator(function: Callable[..., T]) -> Callable[..., T]:
    """PyTorch's operator of that function, much as torch.library.custom_op makes it.

    That one looks after aliases and gradients at every call, of which there are none: 43 us of one
    CPU core against 13, with twelve arguments. And at the first call it imports the compiler, two
    seconds, to keep it out of the function; here that is done once somebody else has imported it.
    """
    untraced = functools.cache(torch.compiler.disable)

    def call(*arguments: Any) -> T:
        if "torch._dynamo" in sys.modules:
            return untraced(function)(*arguments)
        return function(*arguments)

    name = function.__name__
    schema = torch.library.infer_schema(function, mutates_args=())
    _LIBRARY.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
    _LIBRARY.impl(name, call, "CompositeExplicitAutograd")
    return getattr(torch.ops.stf_kernels, name).default


@_operator
def prepare(data: Tensor, limbs: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Float references [n, d] in fixed point: int8 [limbs, n, d], norms [n], affine [2]."""
    values, norms, scale = resolve(backend, data.device).prepare(data.contiguous(), limbs)
    return values, norms, torch.stack([scale, torch.zeros_like(scale)])


@torch.library.register_fake("stf_kernels::prepare")
def _(data: Tensor, limbs: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    n, d = data.shape
    return (
        data.new_empty((limbs, n, d), dtype=torch.int8),
        data.new_empty((n,), dtype=torch.float64),
        data.new_empty((2,), dtype=torch.float64),
    )


@_operator
def stable_target(
    x: Tensor,
    sigma: Tensor,
    alpha: Tensor,
    D: Tensor | None,
    labels: Tensor | None,
    values: Tensor | None,
    stored: int,
    norms: Tensor,
    affine: Tensor,
    bias: Tensor | None,
    ref_labels: Tensor | None,
    columns: Tensor | None,
    shard: list[int],
    group: int,
    kind: str,
    parameters: list[Tensor],
    precision: str,
    backend: str,
    workspace: int,
    with_stats: bool,
) -> list[Tensor]:
    """Targets [B, d], followed by the seven statistics [B] if asked for.

    The references' values are a tensor, or stored elsewhere under a number of `handles.STORED`;
    `shard` is where they begin in the whole set, how many that has and, of a shard, the checksum of
    the whole set; `group` is a number of `handles.GROUPS`, 0 for a process alone.
    """
    if x.shape[0] == 0 and not group:
        return _outputs(x, with_stats)
    with Group(handles.GROUPS[group]) if group else Alone() as ranks:
        queries = Queries(x.contiguous(), sigma, alpha, D, labels, kind, tuple(parameters))
        source = handles.STORED[stored] if values is None else Resident(values)
        refs = ReferenceSet(source, norms, affine, bias, ref_labels, columns, shard[0])
        stages = resolve(backend, x.device)
        if isinstance(ranks, Group):
            choices = {
                "x_t": f"{str(x.dtype).removeprefix('torch.')} [B, {x.shape[1]}]",
                "x_t.device": x.device.type,
                "ref.limbs": str(source.limbs),
                "ref": f"a set of checksum {shard[2]:x}",
                "target": repr(kind),
                "log_weight": "none" if bias is None else "given",
                "labels": "none" if labels is None else "given",
                "noise": "'gaussian'" if D is None else "'student_t'",
                "precision": repr(precision),
                "the function": "stable_target_with_stats" if with_stats else "stable_target",
            }
            queries = ranks.gather(queries, choices, shard[0], len(norms), shard[1])
            if len(queries.x) == 0:
                return _outputs(x, with_stats)
        out, stats = pipeline.run(stages, queries, refs, precision, with_stats, workspace, ranks)
    if x.shape[0] == 0:  # others have some
        return _outputs(x, with_stats)
    return [out] if stats is None else [out, *stats]


def _outputs(x: Tensor, with_stats: bool) -> list[Tensor]:
    """Tensors of the outputs' shapes and types, not filled."""
    out = [torch.empty_like(x, memory_format=torch.contiguous_format)]
    for name in TargetStats._fields if with_stats else ():
        dtype = torch.int64 if name == "argmax" else torch.float64
        out.append(x.new_empty(x.shape[:1], dtype=dtype))
    return out


@torch.library.register_fake("stf_kernels::stable_target")
def _(
    x,
    sigma,
    alpha,
    D,
    labels,
    values,
    stored,
    norms,
    affine,
    bias,
    ref_labels,
    columns,
    shard,
    group,
    kind,
    parameters,
    precision,
    backend,
    workspace,
    with_stats,
):
    return _outputs(x, with_stats)
