"""The exact minimiser of the denoising loss over a set, with a network's interface."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .arguments import byte_count, check_noise, check_precision
from .backends import check_name
from .references import References, describe
from .target import WORKSPACE, stable_target


class IdealDenoiser(nn.Module):
    """D(x; sigma), the denoiser of least loss over the references, in place of a network.

        D(x; sigma) = argmin_D E ||D(y + sigma n; sigma) - y||^2 = sum_k w_k y_k
        w = softmax_k( -||x - y_k||^2 / (2 sigma^2) + log_weight_k )

    A sampler that calls it ends on the references themselves: what a network makes of new samples
    is what it does not learn of this function. It has no parameters and no gradient, and its
    state_dict is empty. `to(device)` moves the references; no other conversion changes them.

    Args:
        refs: the references
        noise: "gaussian", or "student_t" (PFGM++): the logit of `stable_target`
        D: degrees of freedom of Student-t noise, number > 0
        precision, backend, workspace: as for `stable_target`

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came

    Example:
        >>> D = stf_kernels.IdealDenoiser(stf_kernels.References(images, value_range=(-1, 1)))
        >>> slope = (x - D(x, sigma)) / sigma  # of the probability flow ODE

    Source: Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models, 2022,
    equation 57; Student-t noise: Xu et al., PFGM++, ICML 2023.
    """

    def __init__(
        self,
        refs: References,
        *,
        noise: str = "gaussian",
        D: float | None = None,
        precision: str = "exact",
        backend: str = "auto",
        workspace: int = WORKSPACE,
    ) -> None:
        super().__init__()
        if not isinstance(refs, References):
            raise TypeError(f"refs must be References, got {type(refs).__name__}")
        if refs.total != len(refs):
            raise ValueError(f"refs must be a whole set, got a shard, {refs}")
        check_noise(noise, D)
        if D is not None and not (isinstance(D, numbers.Real) and 0 < D < math.inf):
            raise ValueError(f"D must be a number > 0, got {describe(D)}")
        check_precision(precision)
        check_name(backend)
        byte_count(workspace)
        self.refs = refs
        self.noise, self.D = noise, D
        self.precision, self.backend, self.workspace = precision, backend, workspace

    def forward(self, x: Tensor, sigma: Tensor | float, labels: Tensor | None = None) -> Tensor:
        """The denoised samples.

        Args:
            x: noisy samples [B, *shape], float16, bfloat16, float32 or float64, data units
            sigma: noise level, number, [B] or [B, 1, ...], > 0, data units
            labels: classes, integer [B], against those of the references; -1 sees all

        Returns:
            D(x; sigma), shaped like x; float64 for float64 x, otherwise float32

        Raises:
            TypeError, ValueError: as `stable_target`
        """
        return stable_target(
            x,
            self.refs,
            sigma,
            target="denoised",
            labels=labels,
            noise=self.noise,
            D=self.D,
            precision=self.precision,
            backend=self.backend,
            workspace=self.workspace,
        )

    def extra_repr(self) -> str:
        noise = "" if self.noise == "gaussian" else f", noise={self.noise!r}, D={self.D}"
        return f"{self.refs}{noise}, precision={self.precision!r}, backend={self.backend!r}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> IdealDenoiser:
        """What `to`, `cuda` and `cpu` call: the references go where `fn` takes a tensor."""
        device = fn(torch.empty(0, device=self.refs.device)).device
        if device != self.refs.device:
            self.refs = self.refs.to(device)
        super()._apply(fn, recurse)
        return self
