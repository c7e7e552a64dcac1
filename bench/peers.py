"""How else the score is computed: (x [B, d], ref, sigma [B]) -> score [B, d].

    w_ik = softmax_k(-||x_i - y_k||^2 / (2 sigma_i^2))
    score_i = sum_k w_ik (y_k - x_i) / sigma_i^2

Each is written as its users would write it. What does not depend on x they would prepare once;
`prepare` does so outside the timed call.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    import faiss

PREPARED_ROWS = 4096
CHUNK = 1024  # references, of `stable_vm`
LEAST_LOGIT, LEAST_DIFFERENCE = -1e4, -50.0  # its clamps


class Floats(NamedTuple):
    """References as the peers take them."""

    y: Tensor  # [n, d] float32 or bfloat16, contiguous
    half_norm: Tensor  # [n] float32: ||y_k||^2 / 2


def prepare(y: Tensor, dtype: torch.dtype = torch.float32) -> Floats:
    """References [n, *shape] float32 in the type of the products; norms stay float32."""
    flat = y.flatten(1)
    norms = torch.cat([(part**2).sum(1) for part in flat.split(PREPARED_ROWS)])
    return Floats(flat.to(dtype).contiguous(), norms / 2)


def paper(x: Tensor, ref: Floats, sigma: Tensor) -> Tensor:
    """The formula literally, every difference [B, n, d] in memory.

    Source: Xu, Tong, Jaakkola 2023, equation 5 and Algorithm 1.
    """
    variance = sigma[:, None] ** 2
    difference = ref.y[None] - x[:, None]  # [B, n, d]
    w = torch.softmax(-(difference**2).sum(2) / (2 * variance), 1)  # [B, n]
    return (w[:, :, None] * (difference / variance[:, :, None])).sum(1)


def stable_vm(x: Tensor, ref: Floats, sigma: Tensor) -> Tensor:
    """Direct differences in two passes over chunks of references: all logits, then the sum.

    With both clamps of the released code, the first of which bites where d / 2, the source's own
    logit, passes 10 000; without the 1e-8 that it adds to sigma^2.

    Source: Stable Velocity: A Variance Perspective on Flow Matching, 2026 (StableVM).
    """
    variance = sigma[:, None] ** 2
    chunks = ref.y.split(CHUNK)
    logit = torch.cat([-((x[:, None] - y) ** 2).sum(2) / (2 * variance) for y in chunks], 1)
    logit = logit.clamp(min=LEAST_LOGIT)
    w = torch.softmax((logit - logit.amax(1, keepdim=True)).clamp(min=LEAST_DIFFERENCE), 1)
    score = torch.zeros_like(x)
    for y, part in zip(chunks, w.split(CHUNK, 1), strict=True):
        score += (part[:, :, None] * ((y - x[:, None]) / variance[:, :, None])).sum(1)
    return score


def gram(x: Tensor, ref: Floats, sigma: Tensor) -> Tensor:
    """Three lines and two matrix products: ||x - y||^2 = ||x||^2 - 2 x.y + ||y||^2, where ||x||^2
    is the same for every k and drops out of the softmax.

    Products in the type of ref.y, everything else in float32.
    """
    logit = ((x.to(ref.y.dtype) @ ref.y.T).float() - ref.half_norm) / sigma[:, None] ** 2
    denoised = (torch.softmax(logit, 1).to(ref.y.dtype) @ ref.y).float()
    return (denoised - x) / sigma[:, None] ** 2


def sdpa(x: Tensor, ref: Floats, sigma: Tensor) -> Tensor:
    """Attention with one head of dimension d: queries x / sigma^2, keys and values y, and the
    norms as an additive mask (appended to the keys as one more dimension they are slower).
    """
    variance = sigma[:, None] ** 2
    query = (x / variance).to(ref.y.dtype)
    mask = (-ref.half_norm / variance).to(ref.y.dtype)
    key = ref.y[None, None]
    denoised = scaled_dot_product_attention(query[None, None], key, key, mask[None, None], scale=1)
    return (denoised[0, 0].float() - x) / variance


def sdpa_with(backend: SDPBackend, x: Tensor, ref: Floats, sigma: Tensor) -> Tensor:
    """`sdpa` by one of torch's kernels."""
    with sdpa_kernel(backend):
        return sdpa(x, ref, sigma)


@cache
def sdpa_missing(backend: SDPBackend, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why torch's kernel does not take this attention, in torch's words; or None: it does."""
    y = torch.zeros(64, 3072, device=device)
    with warnings.catch_warnings(record=True) as reasons:
        warnings.simplefilter("always")
        try:
            sdpa_with(backend, y, prepare(y, dtype), torch.ones(64, device=device))
        except RuntimeError as error:
            told = [str(reason.message).split(" (Triggered")[0] for reason in reasons]
            return "torch refuses: " + " ".join(told or [str(error).split(". ")[0]])
    return None


def nearest(x: Tensor, ref: Floats, sigma: Tensor, index: faiss.Index, k: int) -> Tensor:
    """The softmax over the k nearest references alone, of direct differences.

    Source: Douze et al., The Faiss library, 2024; the index is an exact one, IndexFlatL2.
    """
    _, found = index.search(x.numpy(), min(k, len(ref.y)))
    variance = sigma[:, None] ** 2
    difference = ref.y[torch.from_numpy(found)] - x[:, None]  # [B, k, d]
    w = torch.softmax(-(difference**2).sum(2) / (2 * variance), 1)
    return (w[:, None] @ difference)[:, 0] / variance


@cache
def faiss_missing(device: torch.device) -> str | None:
    """Why FAISS cannot be measured, or None."""
    if device.type != "cpu":
        return "faiss-cpu searches on the CPU alone"
    try:
        import faiss  # noqa: F401
    except ImportError:
        return "faiss is not installed"
    return None


def keops(x: Tensor, ref: Floats, sigma: Tensor) -> Tensor:
    """Symbolic differences, reduced on the fly by a kernel that KeOps compiles for this d.

    Source: Charlier et al., Kernel Operations on the GPU, with Autodiff, without Memory Overflows,
    JMLR 2021.
    """
    from pykeops.torch import LazyTensor

    half_precision = LazyTensor((0.5 / sigma**2)[:, None, None])
    y = LazyTensor(ref.y[None])
    logit = -half_precision * ((LazyTensor(x[:, None]) - y) ** 2).sum(-1)
    return (logit.sumsoftmaxweight(y, dim=1) - x) / sigma[:, None] ** 2


@cache
def keops_missing() -> str | None:
    """Why KeOps cannot be measured, or None: it is imported, and compiles and runs a small case."""
    try:
        y = torch.eye(4)
        keops(y, prepare(y), torch.ones(4))
    except ImportError:
        return "pykeops is not installed"
    except Exception as error:  # a broken compiler shows as almost anything
        return f"pykeops does not work here: {error}"
    return None
