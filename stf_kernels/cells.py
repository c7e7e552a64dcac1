"""A partition of the references into neighbourhoods, by k-means."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .storage import Resident
from .torch_backend import join_limbs

if TYPE_CHECKING:
    from .references import References

BATCH = 1024  # references in a step of k-means, or k if that is more
STEPS = 100  # a large set is sampled, a small one is gone through many times


def partition(refs: References, k: int, seed: int) -> References:
    """What `References.cells` returns, and documents."""
    try:
        from sklearn.cluster import MiniBatchKMeans
    except ImportError as error:
        raise ImportError('cells need scikit-learn: pip install "stf-kernels[train]"') from error
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 32:
        raise ValueError(f"seed must be an integer in 0..2^32 - 1, got {seed!r}")
    size = max(BATCH, k)
    means = MiniBatchKMeans(k, random_state=seed, n_init=1)
    generator = torch.Generator().manual_seed(seed)
    steps = 0
    while steps < STEPS:
        for index in torch.randperm(len(refs), generator=generator).split(size)[: STEPS - steps]:
            means.partial_fit(_floats(refs._values.gather(index.to(refs.device))))
            steps += 1
    cell = np.concatenate([means.predict(_floats(v)) for v in refs._values.chunks(size)])
    labels = torch.from_numpy(cell).to(refs.device, torch.int64)
    if refs.labels is not None:
        labels = torch.unique(refs.labels, return_inverse=True)[1] * k + labels
    if not isinstance(refs._values, Resident):
        return refs._with(refs._values, refs._norms, labels, refs.log_weight)
    order = labels.argsort(stable=True)
    cells = refs.subset(order)
    cells.labels = labels[order]
    return cells


def _floats(values: Tensor) -> np.ndarray:
    """float32 [m, d] of digits [R, m, d], the integers: k-means minds no scale and no offset."""
    integers = values[0] if len(values) == 1 else join_limbs(values)
    return integers.float().cpu().numpy()
