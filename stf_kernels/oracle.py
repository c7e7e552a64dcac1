"""Float64 direct differences: the truth that accuracy is measured against.

Nothing here is shared with the backends: ||x - alpha y||^2 is summed from differences, in float64,
a few rows at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 19  # of the differences at a time: they stay in the cache


def posterior(
    x: Tensor,
    y: Tensor,
    sigma: Tensor | float,
    alpha: Tensor | float = 1.0,
    log_weight: Tensor | None = None,
    *,
    D: Tensor | float | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits and w = softmax(logit) of the references, given the samples.

        Gaussian noise:   logit_ik = -||x_i - alpha_i y_k||^2 / (2 sigma_i^2) + log_weight_k
        Student-t noise:  logit_ik = -(d + D_i)/2 log(1 + ||x_i - alpha_i y_k||^2 / (sigma_i^2 D_i))
                                     + log_weight_k

    Args:
        x: noisy samples [B, *shape]
        y: clean references [n, *shape]
        sigma, alpha: number or [B]
        log_weight: [n] or [B, n]
        D: degrees of freedom of Student-t noise, number or [B]; None for Gaussian noise

    Returns:
        logit, w: float64 [B, n]
    """
    x, y = x.double().flatten(1), y.double().flatten(1)
    sigma = _per_row(sigma, x)[:, None]
    logit = -(squared_distance(x, y, alpha) / (2 * sigma**2))
    if D is not None:
        freedom = _per_row(D, x)[:, None]
        logit = -(x.shape[1] + freedom) / 2 * torch.log1p(-2 * logit / freedom)
    if log_weight is not None:
        logit = logit + log_weight.double()
    return logit, torch.softmax(logit, 1)


def squared_distance(x: Tensor, y: Tensor, alpha: Tensor | float = 1.0) -> Tensor:
    """||x_i - alpha_i y_k||^2, float64 [B, n]; arguments as for `posterior`."""
    x, y = x.double().flatten(1), y.double().flatten(1)
    alpha = _per_row(alpha, x)
    out = x.new_empty(len(x), len(y))
    columns = max(1, BLOCK_ELEMENTS // x.shape[1])
    for i in range(len(x)):
        for k in range(0, len(y), columns):
            out[i, k : k + columns] = ((x[i] - alpha[i] * y[k : k + columns]) ** 2).sum(1)
    return out


def denoised(
    x: Tensor,
    y: Tensor,
    sigma: Tensor | float,
    alpha: Tensor | float = 1.0,
    log_weight: Tensor | None = None,
    *,
    D: Tensor | float | None = None,
) -> Tensor:
    """D_i = sum_k w_ik y_k, float64 like x; arguments as for `posterior`."""
    _, w = posterior(x, y, sigma, alpha, log_weight, D=D)
    return (w @ y.double().flatten(1)).view(x.shape)


def stable_target(
    x: Tensor,
    y: Tensor,
    sigma: Tensor | float,
    alpha: Tensor | float = 1.0,
    log_weight: Tensor | None = None,
    *,
    D: Tensor | float | None = None,
) -> Tensor:
    """The score sum_k w_ik (alpha_i y_k - x_i) / sigma_i^2, float64 like x."""
    rows = (len(x),) + (1,) * (x.dim() - 1)
    signal = _per_row(alpha, x).view(rows) * denoised(x, y, sigma, alpha, log_weight, D=D)
    return (signal - x.double()) / _per_row(sigma, x).view(rows) ** 2


def _per_row(value: Tensor | float, x: Tensor) -> Tensor:
    value = torch.as_tensor(value, dtype=torch.float64, device=x.device)
    return value.reshape(-1).expand(len(x)).contiguous()
