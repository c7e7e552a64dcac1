"""The reference set, brought once into the integers all backends compute with."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from functools import cached_property
from os import PathLike
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import arithmetic as ar
from . import file_format, handles, ops, ranks
from .backends import resolve
from .cells import partition
from .statistics import largest_norm
from .storage import Flipped, Host, Resident, Values
from .torch_backend import join_limbs

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DECODE_ELEMENTS = 1 << 22


class PreparedSet(NamedTuple):
    """The references as arguments of `ops.stable_target`, which documents them."""

    values: Tensor | None
    stored: int
    norms: Tensor
    affine: Tensor
    bias: Tensor | None
    labels: Tensor | None
    columns: Tensor | None
    shard: list[int]


class References:
    """Clean samples y_k in fixed point, prepared once and used every step.

    Bytes, and floats that came from bytes, are exactly one int8 plane up to the affine map
    y = a v + b. Other floats take `limbs` planes on a power-of-two grid, y = a v, that
    covers the largest magnitude of the set.

    Args:
        data: [n, *shape], uint8, float16, bfloat16, float32 or float64, finite, data units
        value_range: (lo, hi), the values of the first and the last level; needed for uint8, and
            for floats together with `levels`
        levels: how many equidistant values (2 to 256) the data takes between lo and hi; uint8
            data holds their indices (default 256), float data the values themselves, any value
            off the grid being an error
        labels: classes >= 0, integer [n]
        log_weight: added to the logits, float [n]; -inf leaves a reference out
        limbs: int8 planes of float data, 1 to 4. The grid is about the largest magnitude /
            (127 * 256^(limbs - 1)) and the time proportional to `limbs`; each one fewer costs a
            factor of 256 in accuracy, which shows at small sigma

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came

    Example:
        >>> refs = References(images, value_range=(-1, 1))         # uint8 [50000, 3, 32, 32]
        >>> batch = refs.subset(torch.randperm(len(refs))[:4096])  # a new batch every step
        >>> score = stable_target(x_t, batch, sigma)
    """

    _columns: Tensor | None = None
    _made: torch.cuda.Event | None = None  # when _columns is there, for other streams
    _stored: int  # number of values that are not resident, for ops.stable_target
    # Of a shard: its first reference, and the whole set's size and checksum.
    _shard: tuple[int, int, int] | None = None

    def __init__(
        self,
        data: Tensor,
        *,
        value_range: tuple[float, float] | None = None,
        levels: int | None = None,
        labels: Tensor | None = None,
        log_weight: Tensor | None = None,
        limbs: int | None = None,
    ) -> None:
        check_data("data", data)
        n = data.shape[0]
        flat = data.detach().reshape(n, -1)
        if data.dtype == torch.uint8 or levels is not None:
            if limbs is not None:
                raise ValueError(f"limbs is for float data off a grid, got limbs={limbs}")
            lo, hi = _value_range(value_range, data.dtype)
            count = _levels(levels)
            values = _grid_values(flat, lo, hi, count)
            affine, ratio = _grid(lo, hi, count, data.device)
            norms = resolve("auto", data.device).norms(values, ratio)
        else:
            if value_range is not None:
                raise ValueError(
                    f"value_range for {data.dtype} data needs levels (256 for images that came "
                    "from bytes); without levels float data stands for itself"
                )
            _check_finite(flat)
            values, norms, affine = ops.prepare(flat, _limbs(limbs), "auto")
        self.shape = data.shape[1:]
        self.labels = None if labels is None else _labels(labels, n, data.device)
        self.log_weight = (
            None if log_weight is None else check_log_weight(log_weight, n, data.device).clone()
        )
        self._hold(Resident(values))
        self._norms, self._affine = norms, affine

    def _hold(self, values: Values) -> None:
        self._values = values
        self._stored = 0 if isinstance(values, Resident) else handles.STORED.name(values)

    def _with(
        self,
        values: Values,
        norms: Tensor,
        labels: Tensor | None,
        log_weight: Tensor | None,
        shard: tuple[int, int, int] | None = None,
    ) -> References:
        """Other references of the same shape on the same grid."""
        other = object.__new__(References)
        other.shape, other._affine = self.shape, self._affine.to(values.device)
        other._hold(values)
        other._norms = norms
        other.labels, other.log_weight = labels, log_weight
        other._shard = shard
        return other

    @classmethod
    def _from_float(cls, data: Tensor, precision: str, backend: str) -> References:
        """A plain float tensor given for one call: no value is looked at on the host."""
        self = cls.__new__(cls)
        flat = data.detach().reshape(data.shape[0], -1)
        values, self._norms, self._affine = ops.prepare(flat, ar.LIMBS[precision], backend)
        self._hold(Resident(values))
        self.shape = data.shape[1:]
        self.labels = self.log_weight = None
        return self

    @classmethod
    def from_file(
        cls,
        path: str | PathLike[str],
        *,
        value_range: tuple[float, float] | None = None,
        levels: int | None = None,
        labels: Tensor | None = None,
        log_weight: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> References:
        """References whose values stay in their file, of which a few chunks at a time are read.

        The file may be renamed, replaced or deleted meanwhile, but not written to or cut: on a CPU
        its pages are used where they are, and missing ones end the process.

        Args:
            path: what `save` wrote (stf_kernels/file_format.py describes it), or uint8
                [n, *shape] in a .npy file
            value_range, levels: as for `References`, for a .npy file; the other one knows
            labels, log_weight: as for `References`; they replace those in the file
            device: where targets are computed

        Raises:
            FileNotFoundError, ValueError: path is no such file, or is truncated
        """
        device = _with_index(device)
        self = cls.__new__(cls)
        found = file_format.read(path)
        if found.raw:
            lo, hi = _value_range(value_range, torch.uint8)
            self._affine, ratio = _grid(lo, hi, _levels(levels), device)
            self._hold(found.values(device))
            self._norms = _norms_of(self._values, ratio, _levels(levels))
        elif value_range is not None or levels is not None:
            raise ValueError(f"value_range and levels are those in {path}, and cannot be given")
        else:
            self._hold(found.values(device))
            self._norms, self._affine = found.norms.to(device), found.affine.to(device)
        n, self.shape = len(self._norms), found.shape
        labels = found.labels if labels is None else labels
        log_weight = found.log_weight if log_weight is None else log_weight
        self.labels = None if labels is None else _labels(labels, n, device)
        self.log_weight = None if log_weight is None else check_log_weight(log_weight, n, device)
        return self

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the prepared references to one file for `from_file`, a chunk at a time.

        Args:
            path: of the file, in a folder that exists; a file that is there is replaced at the end

        Raises:
            FileNotFoundError, ValueError: path is no place for such a file
        """
        file_format.write(
            path,
            self.shape,
            self._values,
            self._norms,
            self._affine,
            self.labels,
            self.log_weight,
        )

    def __len__(self) -> int:
        return self._norms.shape[0]

    def __repr__(self) -> str:
        where = {"resident": "on", "host": "in host memory for", "file": "in a file for"}
        part = "" if self._shard is None else f" of {self._shard[1]} from {self._shard[0]}"
        return (
            f"References({len(self)} x {tuple(self.shape)}{part}, {self.limbs} limb"
            f"{'s' * (self.limbs > 1)}, {self.nbytes / 2**20:.1f} MB "
            f"{where[self.placement]} {self.device})"
        )

    @property
    def device(self) -> torch.device:
        """Where targets are computed."""
        return self._values.device

    @property
    def placement(self) -> str:
        """Where the values are: "resident" on the device, in "host" memory or in a "file"."""
        return self._values.placement

    @property
    def limbs(self) -> int:
        """int8 planes a value takes."""
        return self._values.limbs

    @property
    def total(self) -> int:
        """References of the whole set, of which this may be a shard."""
        return len(self) if self._shard is None else self._shard[1]

    @property
    def nbytes(self) -> int:
        """Size of the prepared references, bytes."""
        return self.limbs * len(self) * self._values.dim + self._norms.nbytes

    @cached_property
    def classes(self) -> Tensor:
        """The labels that occur, sorted int64; in a shard those of the whole set."""
        return torch.empty(0) if self.labels is None else torch.unique(self.labels)

    def _log_weights(self, more: Tensor | None) -> Tensor | None:
        """The set's log_weight and `more` together, float64 [n] or None."""
        if self.log_weight is None or more is None:
            return self.log_weight if more is None else more
        return self.log_weight + more

    def _prepared(self, log_weight: Tensor | None, *, by_label: bool, backend: str) -> PreparedSet:
        """What `ops.stable_target` takes; `log_weight` [n] is added to the set's own."""
        total = self._log_weights(log_weight)
        values = self._values.load() if isinstance(self._values, Resident) else None
        if values is None and self._norms.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"references in a {self.placement} cannot pass inside a CUDA graph: load() them"
            )
        return PreparedSet(
            values,
            self._stored,
            self._norms,
            self._affine,
            None if total is None else ar.LOG2E * total,
            self.labels if by_label else None,
            self._columns_for(backend),
            list(self._shard or (0, len(self))),
        )

    def _columns_for(self, backend: str) -> Tensor | None:
        """The copy that `backend` multiplies in stage 4, made at the first use and kept; or None.

        It takes as much memory as the values, which is why a set that only gives subsets has none,
        nor has one whose values are not on the device. Where operations are recorded only, under
        torch.compile or in a CUDA graph, none is made here: the stage makes its own each time.
        """
        if not isinstance(self._values, Resident):
            return None
        if torch.compiler.is_compiling():
            return self._columns
        values = self._values.load()
        if values.is_cuda and torch.cuda.is_current_stream_capturing():
            return self._columns
        if self._columns is None:
            self._columns = resolve(backend, self.device).transpose(values)
            if values.is_cuda and self._columns is not None:
                self._made = torch.cuda.current_stream(self.device).record_event()
        elif self._made is not None:
            torch.cuda.current_stream(self.device).wait_event(self._made)
        return self._columns

    def __getstate__(self) -> dict[str, object]:
        return {k: v for k, v in vars(self).items() if k not in ("_columns", "_made", "_stored")}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._hold(self._values)

    def _logits_are_finite(
        self, x: Tensor, sigma: Tensor, alpha: Tensor, D: Tensor | None
    ) -> Tensor:
        """Whether stage 2 cannot overflow, bool [B], for samples [B, d] and float64 [B]."""
        slope, curvature = ar.logit_coefficients(sigma, alpha, self._affine[0], D)
        x_max = x.abs().amax(1).double()
        finite = torch.isfinite(slope * x_max * x.shape[1] * float(ar.limit(self.limbs)))
        if D is not None:
            finite &= torch.isfinite(x_max * x_max * x.shape[1] / (sigma * sigma * D))
        return finite & torch.isfinite(curvature * largest_norm(self._norms))

    def subset(self, index: Tensor) -> References:
        """The references at `index`, in its order: a gather of what is prepared.

        Args:
            index: positions in 0..n-1, integer [m], m >= 1

        Raises:
            TypeError, ValueError, IndexError: index is not such a tensor
        """
        index = self._positions(index)
        if index.numel() == 0:
            raise ValueError("index must name at least one reference, got none")
        return self._with(
            Resident(self._values.gather(index)),
            self._norms[index],
            None if self.labels is None else self.labels[index],
            None if self.log_weight is None else self.log_weight[index],
        )

    def decode(self, index: Tensor | None = None) -> Tensor:
        """The references' values, float32 [m, *shape]: all, or those at `index` [m]."""
        index = None if index is None else self._positions(index)
        n = len(self) if index is None else index.numel()
        dim = self._values.dim
        out = torch.empty((n, dim), dtype=torch.float32, device=self.device)
        scale, offset = self._affine
        rows = max(1, DECODE_ELEMENTS // max(dim, 1))
        if index is None:
            parts: Iterable[Tensor] = self._values.chunks(rows)
        else:
            parts = map(self._values.gather, index.split(rows))
        start = 0
        for values in parts:
            stop = start + values.shape[1]
            out[start:stop] = scale * join_limbs(values).double() + offset
            start = stop
        return out.view(n, *self.shape)

    def to(self, device: torch.device | str) -> References:
        """The same references for targets on `device`; values in a file or in host memory stay."""
        device = _with_index(device)
        if isinstance(self._values, Resident):
            return self._moved(Resident(self._values.load().to(device)))
        return self._moved(self._values.to(device))

    def load(self) -> References:
        """The same references with their values on the device."""
        if isinstance(self._values, Resident):
            return self
        return self._moved(Resident(self._values.load()))

    def offload(self) -> References:
        """The same references with their values in page-locked host memory, from where a few
        chunks at a time go to the device; on the CPU, and out of a file, they stay as they are.
        """
        if not isinstance(self._values, Resident) or self.device.type != "cuda":
            return self
        return self._moved(Host(self._values.load().cpu().pin_memory(), self.device))

    def with_flips(self) -> References:
        """Twice as many references: these, and behind them their mirror images.

        The last axis of the samples is the one that is mirrored. The values are not copied.
        """
        if self._shard is not None:
            raise ValueError(
                "with_flips of a shard would not be one: flip the whole set, then shard"
            )

        def twice(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else torch.cat([tensor, tensor])

        return self._with(
            Flipped(self._values, self.shape[-1]),
            torch.cat([self._norms, self._norms]),
            twice(self.labels),
            twice(self.log_weight),
        )

    def cells(self, k: int, *, seed: int = 0) -> References:
        """The same references, labelled by the cell of a k-means partition that each lies in.

        With its source's cell as label a sample sees its source's neighbours, and the target
        stays unbiased: within a cell the weights are P(source | x_t, cell), and the mean over the
        cells, given x_t, is the mean over all references. (Each source's nearest references are
        not a partition, and biased.) Next to as many references drawn uniformly, neighbours take
        away more variance where the noise leaves few of them in question, and less where it is so
        large that all images are.

        If the set has labels, the cells refine the classes: one partition of all references is
        crossed with them, label = (the class's place among all, sorted) * k + cell.

        A set on the device is put in the order of the cells, a copy; one that is elsewhere, or
        flipped, stays in its order.

        Args:
            k: number of cells, 1 to n; some may stay empty
            seed: of k-means, which is not the same to the bit on every machine

        Raises:
            ImportError: scikit-learn is missing
            ValueError: k is no such number, or this is a shard

        Example:
            >>> cells = refs.cells(64)
            >>> s = torch.randint(len(cells), (512,))  # sources
            >>> y = cells.decode(s)
            >>> score = stable_target(y + sigma * eps, cells, sigma, labels=cells.labels[s])
        """
        if self._shard is not None:
            raise ValueError("cells of a shard would not be the set's: take those, then shard")
        return partition(self, _count("k", k, 1, len(self)), seed)

    def shard(self, group: ProcessGroup | None = None) -> References:
        """This process's part of the references, for calls with the same `group`.

        Every process calls it on the same set, or on the same file, of which it then reads its
        part only. The cuts are at multiples of 128 references; with fewer blocks than processes a
        shard may be empty.

        Args:
            group: of torch.distributed; None is all processes

        Raises:
            RuntimeError: torch.distributed is not initialized, or this process is not in the group
            ValueError: this is a shard already
        """
        if self._shard is not None:
            raise ValueError("ref is a shard already")
        rank, size = ranks.place(group)
        n = len(self)
        blocks = -(-n // ar.BLOCK)
        start, stop = (min(n, ar.BLOCK * (blocks * r // size)) for r in (rank, rank + 1))
        part = slice(start, stop)
        values = self._values.part(start, stop)
        shard = self._with(
            Resident(values.load()) if isinstance(values, Resident) else values,
            self._norms[part],
            None if self.labels is None else self.labels[part],
            None if self.log_weight is None else self.log_weight[part],
            (start, n, _checksum(self._affine, self._norms, self.labels, self.log_weight)),
        )
        shard.classes = self.classes
        return shard

    def _moved(self, values: Values) -> References:
        """The same references from other values."""
        device = values.device
        moved = self._with(
            values,
            self._norms.to(device),
            None if self.labels is None else self.labels.to(device),
            None if self.log_weight is None else self.log_weight.to(device),
            self._shard,
        )
        if self._shard is not None:
            moved.classes = self.classes.to(device)
        return moved

    def _positions(self, index: Tensor) -> Tensor:
        if not isinstance(index, Tensor) or index.dtype not in INTEGERS or index.dim() != 1:
            raise TypeError(f"index must be an integer tensor [m], got {describe(index)}")
        index = index.to(self.device, torch.int64)
        if readable(index):
            outside = (index < 0) | (index >= len(self))
            if bool(outside.any()):
                raise IndexError(
                    f"index must lie in 0..{len(self) - 1}, got {int(index[outside][0])}"
                )
        return index


def _checksum(*tensors: Tensor | None) -> int:
    """A number >= 0 that others [n], or the same in another order, are most unlikely to have."""
    total = 0
    for tensor in tensors:
        if tensor is not None:
            odd = torch.arange(1, 2 * len(tensor), 2, device=tensor.device)
            total = 31 * total + int((tensor.view(torch.int64) * odd).sum())
    return total % 2**63


INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def readable(tensor: Tensor) -> bool:
    """Whether its values can be looked at for nothing: on the CPU, and neither traced nor fake."""
    real = type(tensor) is Tensor and not torch.compiler.is_compiling()
    return real and tensor.device.type == "cpu"


def describe(value: object) -> str:
    """A value for an error message: dtype and shape of a tensor, repr of anything else."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def check_data(name: str, data: Tensor) -> None:
    """Raises unless `data` is [n, *shape] with n >= 1, d >= 1 and a supported dtype."""
    if not isinstance(data, Tensor):
        raise TypeError(f"{name} must be a tensor [n, *shape], got {type(data).__name__}")
    if data.dtype != torch.uint8 and data.dtype not in FLOAT_DTYPES:
        names = ", ".join(str(t).removeprefix("torch.") for t in (torch.uint8, *FLOAT_DTYPES))
        raise TypeError(f"{name} must be one of {names}, got {describe(data)}")
    check_layout(name, data)
    if data.dim() < 2 or data.shape[0] == 0 or data[0].numel() == 0:
        raise ValueError(f"{name} must be [n, *shape] with n >= 1, got {describe(data)}")


def _with_index(device: torch.device | str) -> torch.device:
    """The device as its tensors name it: "cuda" is the current one of them."""
    return torch.empty(0, device=device).device


def check_layout(name: str, tensor: Tensor) -> None:
    """Raises unless `tensor` is an ordinary dense one."""
    if tensor.layout != torch.strided or tensor.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}")


def check_log_weight(log_weight: Tensor, n: int, device: torch.device) -> Tensor:
    """log_weight as float64 [n] on `device`, or an error."""
    if not isinstance(log_weight, Tensor) or not log_weight.is_floating_point():
        raise TypeError(f"log_weight must be a float tensor [{n}], got {describe(log_weight)}")
    if log_weight.shape != (n,):
        raise ValueError(f"log_weight must be [{n}] like ref, got {list(log_weight.shape)}")
    return log_weight.detach().to(device, torch.float64)


def _limbs(limbs: int | None) -> int:
    return ar.MAX_LIMBS if limbs is None else _count("limbs", limbs, 1, ar.MAX_LIMBS)


def _count(name: str, value: int, low: int, high: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if isinstance(value, bool) or not low <= number <= high:
        raise ValueError(f"{name} must be {low} to {high}, got {value!r}")
    return number


def _value_range(
    value_range: tuple[float, float] | None, dtype: torch.dtype
) -> tuple[float, float]:
    if value_range is None:
        raise ValueError(
            f"value_range=(lo, hi) must say what {dtype} data means, such as (-1, 1), got None"
        )
    try:
        lo, hi = map(float, value_range)
    except (TypeError, ValueError) as error:
        message = f"value_range must be two numbers (lo, hi), got {value_range!r}"
        raise type(error)(message) from None
    if not (math.isfinite(lo) and 0 < (hi - lo) / 255 < math.inf):
        raise ValueError(f"value_range must be finite with lo < hi, got {value_range}")
    return lo, hi


def _levels(levels: int | None) -> int:
    return 256 if levels is None else _count("levels", levels, 2, 256)


def _grid(lo: float, hi: float, levels: int, device: torch.device) -> tuple[Tensor, float]:
    """a and b of the levels, float64 [2], and 2 b / a."""
    scale = (hi - lo) / (levels - 1)
    affine = torch.tensor([scale, 128 * scale + lo], dtype=torch.float64, device=device)
    return affine, 256 + (2 * lo * (levels - 1)) / (hi - lo)


def _norms_of(values: Values, ratio: float, levels: int) -> Tensor:
    """N_k [n] of levels in a file, in one reading."""
    stages = resolve("auto", values.device)
    rows = ar.BLOCK * max(1, DECODE_ELEMENTS // (ar.BLOCK * values.dim))
    parts = []
    for chunk in values.chunks(rows):
        if levels < 256 and int(chunk.max()) + 128 >= levels:
            raise ValueError(f"data must be below levels={levels}, got {int(chunk.max()) + 128}")
        parts.append(stages.norms(chunk, ratio))
    return torch.cat(parts)


def _grid_values(flat: Tensor, lo: float, hi: float, levels: int) -> Tensor:
    """int8 [1, n, d]: level - 128 of each value."""
    if flat.dtype == torch.uint8:
        if levels < 256 and int(flat.max()) >= levels:
            raise ValueError(f"data must be below levels={levels}, got {int(flat.max())}")
        return (flat.contiguous() ^ 0x80).view(torch.int8)[None]
    values = torch.empty(flat.shape, dtype=torch.int8, device=flat.device)
    span = (levels - 1) / (hi - lo)
    # A level stored in this dtype is off by its rounding, twice; a third of a step still names it.
    slack = min(1 / 3, 2 * torch.finfo(flat.dtype).eps * max(abs(lo), abs(hi)) * span)
    rows = max(1, DECODE_ELEMENTS // flat.shape[1])
    for start in range(0, len(flat), rows):
        position = (flat[start : start + rows].double() - lo) * span
        level = torch.round(position)
        good = ((position - level).abs() <= slack) & (level >= 0) & (level < levels)
        if not bool(good.all()):
            k, j = (~good).nonzero()[0].tolist()
            raise ValueError(
                f"data must lie on {levels} levels from {lo:g} to {hi:g}, got "
                f"{flat[start + k, j].item():.9g} in data[{start + k}]"
            )
        values[start : start + rows] = (level - 128).to(torch.int8)
    return values[None]


def _check_finite(flat: Tensor) -> None:
    finite = torch.isfinite(flat).all(1)
    if not bool(finite.all()):
        k = int((~finite).nonzero()[0])
        raise ValueError(f"data must be finite, got {flat[k][~flat[k].isfinite()][0]} in data[{k}]")


def _labels(labels: Tensor, n: int, device: torch.device) -> Tensor:
    if not isinstance(labels, Tensor) or labels.dtype not in INTEGERS:
        raise TypeError(f"labels must be an integer tensor [{n}], got {describe(labels)}")
    if labels.shape != (n,):
        raise ValueError(f"labels must be [{n}] like data, got {list(labels.shape)}")
    if bool((labels < 0).any()):
        raise ValueError(f"labels of references must be >= 0, got {int(labels.min())}")
    return labels.to(device, torch.int64, copy=True).contiguous()
