"""What callers pass, checked: errors name the argument, what was expected and what came."""

from __future__ import annotations

import math
import numbers
import operator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import arithmetic as ar
from .references import (
    FLOAT_DTYPES,
    INTEGERS,
    References,
    check_data,
    check_layout,
    describe,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def check_shard(ref: Tensor | References, group: ProcessGroup | None) -> None:
    """Raises unless `ref` is a shard exactly if there is a group."""
    is_shard = isinstance(ref, References) and ref._shard is not None
    if group is None and is_shard:
        raise ValueError(f"ref must be a whole set, or group that of refs.shard(group), got {ref}")
    if group is not None and not is_shard:
        raise ValueError(
            f"ref must be a shard, refs.shard(group) of References, with group, got {describe(ref)}"
        )


def check_noise(noise: str, D: Tensor | float | None) -> None:
    """Raises unless there is such noise, and D exactly if it has degrees of freedom."""
    if noise not in ("gaussian", "student_t"):
        raise ValueError(f"noise must be 'gaussian' or 'student_t', got {noise!r}")
    if noise == "gaussian" and D is not None:
        raise ValueError("D is for noise='student_t', got noise='gaussian'")
    if noise == "student_t" and D is None:
        raise ValueError("D, the degrees of freedom, must be given with noise='student_t'")


def freedom(noise: str, D: Tensor | float | None, x_t: Tensor) -> Tensor | None:
    """D of Student-t noise as float64 [B], None for Gaussian noise."""
    check_noise(noise, D)
    return None if D is None else per_row("D", D, x_t)


def check_precision(precision: str) -> None:
    if not isinstance(precision, str) or precision not in ar.LIMBS:
        raise ValueError(f"precision must be 'exact' or 'fast', got {precision!r}")


def byte_count(workspace: int) -> int:
    try:
        count = -1 if isinstance(workspace, bool) else operator.index(workspace)
    except TypeError:
        count = -1
    if not 1 <= count < 1 << 63:
        raise ValueError(f"workspace must be a number of bytes >= 1, got {workspace!r}")
    return count


def check_samples(x_t: Tensor) -> None:
    if not isinstance(x_t, Tensor):
        raise TypeError(f"x_t must be a tensor [B, *shape], got {type(x_t).__name__}")
    if x_t.dtype not in FLOAT_DTYPES:
        names = ", ".join(str(t).removeprefix("torch.") for t in FLOAT_DTYPES)
        raise TypeError(f"x_t must be one of {names}, got {describe(x_t)}")
    check_layout("x_t", x_t)
    if x_t.dim() < 2:
        raise ValueError(f"x_t must be [B, *shape], got {list(x_t.shape)}")
    if math.prod(x_t.shape[1:]) > ar.MAX_VALUES:
        raise ValueError(
            f"x_t must have at most {ar.MAX_VALUES} values a sample, got {list(x_t.shape)}"
        )


def as_references(
    ref: Tensor | References, x_t: Tensor, precision: str, backend: str
) -> References:
    if not isinstance(ref, References):
        check_data("ref", ref)
        if ref.dtype == torch.uint8:
            raise TypeError(
                "ref of bytes must come as References(ref, value_range=(lo, hi)), because bytes do "
                f"not say what they mean, got a tensor {describe(ref)}"
            )
    got = tuple(ref.shape if isinstance(ref, References) else ref.shape[1:])
    if got != x_t.shape[1:]:
        expected = ", ".join(map(str, x_t.shape[1:]))
        raise ValueError(f"ref must be [n, {expected}] like x_t, got {[len(ref), *got]}")
    if ref.device != x_t.device:
        raise ValueError(f"ref must be on {x_t.device} like x_t, got {ref.device}")
    if isinstance(ref, References):
        return ref
    return References._from_float(ref, precision, backend)


def per_row(name: str, value: Tensor | float, x_t: Tensor) -> Tensor:
    """A number, [B] or [B, 1, ...] as float64 [B]."""
    rows = x_t.shape[0]
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a number or a tensor, got {describe(value)}")
        try:
            number = float(value)
        except OverflowError:
            raise ValueError(f"{name} must fit a float, got {str(value)[:20]}...") from None
        return torch.full((rows,), number, dtype=torch.float64, device=x_t.device)
    if value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must be real, got {describe(value)}")
    if value.dim() and value.device != x_t.device:
        raise ValueError(f"{name} must be on {x_t.device} like x_t, got {value.device}")
    value = value.detach().to(x_t.device, torch.float64)
    if value.dim() == 0:
        return value.expand(rows).contiguous()
    if value.shape[0] != rows or any(size != 1 for size in value.shape[1:]):
        raise ValueError(
            f"{name} must be a number, [{rows}] or [{rows}, 1, ...] like x_t, "
            f"got {list(value.shape)}"
        )
    return value.reshape(rows).contiguous()


def checked_labels(labels: Tensor | None, refs: References, x_t: Tensor) -> Tensor | None:
    if labels is None:
        return None
    rows = x_t.shape[0]
    if refs.labels is None:
        raise ValueError("labels need references with labels: References(..., labels=...)")
    if not isinstance(labels, Tensor) or labels.dtype not in INTEGERS:
        raise TypeError(f"labels must be an integer tensor [{rows}], got {describe(labels)}")
    if labels.shape != (rows,):
        raise ValueError(f"labels must be [{rows}] like x_t, got {list(labels.shape)}")
    if labels.device != x_t.device:
        raise ValueError(f"labels must be on {x_t.device} like x_t, got {labels.device}")
    return labels.to(torch.int64).contiguous()


def check_classes(labels: Tensor, refs: References) -> None:
    known = torch.isin(labels, refs.classes) | (labels == -1)
    if not bool(known.all()):
        i = first(~known)
        raise ValueError(
            f"labels[{i}] must be a class of ref ({len(refs.classes)} classes) or -1, "
            f"got {int(labels[i])}, which has no reference"
        )


def first(mask: Tensor) -> int:
    return int(mask.nonzero()[0])
