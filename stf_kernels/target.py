"""The face: `stable_target` and its arguments, checked."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import arithmetic as ar
from . import ops, ranks
from .arguments import (
    as_references,
    byte_count,
    check_classes,
    check_precision,
    check_samples,
    check_shard,
    checked_labels,
    first,
    freedom,
    per_row,
)
from .parameterization import Parameterization, parse
from .references import References, check_log_weight, readable
from .statistics import TargetStats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

WORKSPACE = 256 << 20


def stable_target(
    x_t: Tensor,
    ref: Tensor | References,
    sigma: Tensor | float,
    *,
    alpha: Tensor | float = 1.0,
    target: Parameterization = "score",
    log_weight: Tensor | None = None,
    labels: Tensor | None = None,
    noise: str = "gaussian",
    D: Tensor | float | None = None,
    precision: str = "exact",
    backend: str = "auto",
    group: ProcessGroup | None = None,
    workspace: int = WORKSPACE,
    validate: bool = False,
) -> Tensor:
    """The training target of x_t = alpha y + sigma eps, averaged over the references' posterior.

        w_ik = softmax_k( -||x_i - alpha_i y_k||^2 / (2 sigma_i^2) + log_weight_k )
        D_i = sum_k w_ik y_k,    score_i = (alpha_i D_i - x_i) / sigma_i^2

    It is unbiased at every n if the clean source of each x_t is itself one of the references, the
    references being as likely as each other to be it (or log_weight saying how likely). The result
    is a constant: no gradient flows through it. Values are not inspected: a sample that is not
    finite, a sigma that is not > 0 or a row with no reference gives a NaN row and touches no other.

    Args:
        x_t: noisy samples [B, *shape], float16, bfloat16, float32 or float64, data units
        ref: clean references [n, *shape]: `References`, or a float tensor to prepare for this call
        sigma: noise level, number, [B] or [B, 1, ...], > 0, data units
        alpha: signal scale, number, [B] or [B, 1, ...]
        target: "score", "denoised" (D), "epsilon" ((x - alpha D) / sigma), "v" (alpha epsilon -
            sigma D), "velocity" or `Velocity(alpha_dot, sigma_dot)`, "edm" or `EDM(sigma_data)`
        log_weight: added to the logits, float [n]; -inf leaves a reference out
        labels: classes of the samples, integer [B], against `References.labels`: only references
            of the same class count; -1 sees all
        noise: of x_t: "gaussian", or "student_t" (PFGM++), for which the logit is
            -(d + D)/2 log(1 + ||x_i - alpha_i y_k||^2 / (sigma_i^2 D)) + log_weight_k
        D: degrees of freedom of Student-t noise, number, [B] or [B, 1, ...], > 0
        precision: "exact" (31-bit samples and weights) or "fast" (23-bit)
        backend: "auto", "cpu", "triton", "cuda" or "torch"
        group: processes of torch.distributed that share the references. ref is this one's shard,
            `refs.shard(group)`, and log_weight [len(ref)] that of the shard; x_t is its own, of
            any length, 0 included. All of them must call, with the same choices: the call sends
            every process all samples, labels and levels, then their largest logits and integer
            sums, and waits for the others. Bits are those of the whole set in one process. Where
            one process raises, all do; one that is killed, or fails while torch.compile traces,
            leaves the others to the group's timeout
        workspace: bytes that tensors stay below, beside arguments, as float32 or float64, and
            result; references that do not fit pass in chunks, and no bit of the target depends on
            it
        validate: inspect the values (this waits for the device) and raise for what would be NaN

    Returns:
        the target, shaped like x_t, contiguous; float64 for float64 x_t, otherwise float32

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; for labels on
            the CPU also the class that has no reference
        BackendUnavailable: the backend asked for cannot run on x_t's device
        RuntimeError: another process of the group failed, or this one is not in it

    Example:
        >>> refs = stf_kernels.References(images, value_range=(-1, 1))
        >>> x_t = y + sigma * torch.randn_like(y)
        >>> score = stf_kernels.stable_target(x_t, refs, sigma)

    Source: Xu, Tong, Jaakkola, Stable Target Field for Reduced Variance Score Estimation in
    Diffusion Models, ICLR 2023, equation 5; Student-t noise: Xu et al., PFGM++, ICML 2023.
    """
    (out,) = _call(
        x_t,
        ref,
        sigma,
        alpha,
        target,
        log_weight,
        labels,
        noise,
        D,
        precision,
        backend,
        group,
        workspace,
        validate,
        False,
    )
    return out.view(x_t.shape)


def stable_target_with_stats(
    x_t: Tensor,
    ref: Tensor | References,
    sigma: Tensor | float,
    *,
    alpha: Tensor | float = 1.0,
    target: Parameterization = "score",
    log_weight: Tensor | None = None,
    labels: Tensor | None = None,
    noise: str = "gaussian",
    D: Tensor | float | None = None,
    precision: str = "exact",
    backend: str = "auto",
    group: ProcessGroup | None = None,
    workspace: int = WORKSPACE,
    validate: bool = False,
) -> tuple[Tensor, TargetStats]:
    """`stable_target` and the statistics of its weights, from the same pass.

    Args and errors as for `stable_target`.

    Returns:
        the target, and `TargetStats`, seven tensors [B]. From them log p_t(x_t) is
        lse - log n - d/2 log(2 pi sigma^2), and the trace of the posterior covariance
        second_moment - ||D||^2.
    """
    out, *stats = _call(
        x_t,
        ref,
        sigma,
        alpha,
        target,
        log_weight,
        labels,
        noise,
        D,
        precision,
        backend,
        group,
        workspace,
        validate,
        True,
    )
    return out.view(x_t.shape), TargetStats(*stats)


def validate(
    x_t: Tensor,
    ref: Tensor | References,
    sigma: Tensor | float,
    *,
    alpha: Tensor | float = 1.0,
    log_weight: Tensor | None = None,
    labels: Tensor | None = None,
    noise: str = "gaussian",
    D: Tensor | float | None = None,
) -> None:
    """Raises where `stable_target` with these arguments would return a NaN row.

    Raises:
        TypeError, ValueError: naming the argument, the first row concerned and its value
    """
    check_samples(x_t)
    refs = as_references(ref, x_t, "exact", "auto")
    rows = x_t.shape[0]
    bad = ~torch.isfinite(x_t).flatten(1).all(1)
    if bool(bad.any()):
        row = x_t[first(bad)]
        raise ValueError(f"x_t[{first(bad)}] must be finite, got {row[~row.isfinite()][0]:g}")
    if isinstance(ref, Tensor) and not bool(torch.isfinite(ref).all()):
        k = first(~torch.isfinite(ref).flatten(1).all(1))
        raise ValueError(f"ref[{k}] must be finite, got {ref[k][~ref[k].isfinite()][0]:g}")
    sigma = per_row("sigma", sigma, x_t)
    bad = ~((sigma > 0) & (sigma * sigma > 0) & torch.isfinite(sigma * sigma))
    if bool(bad.any()):
        i = first(bad)
        raise ValueError(f"sigma[{i}] must be > 0 and finite, its square too, got {sigma[i]:g}")
    alpha = per_row("alpha", alpha, x_t)
    if not bool(torch.isfinite(alpha).all()):
        i = first(~torch.isfinite(alpha))
        raise ValueError(f"alpha[{i}] must be finite, got {alpha[i]:g}")
    degrees = freedom(noise, D, x_t)
    if degrees is not None:
        bad = ~((degrees > 0) & torch.isfinite(degrees))
        if bool(bad.any()):
            raise ValueError(f"D[{first(bad)}] must be > 0 and finite, got {degrees[bad][0]:g}")

    bad = ~refs._logits_are_finite(x_t.flatten(1), sigma, alpha, degrees)
    if bool(bad.any()):
        raise ValueError(
            f"sigma[{first(bad)}] must be large enough for the logits to be finite in float64, "
            f"got {sigma[first(bad)]:g} with alpha {alpha[first(bad)]:g}"
        )

    labels = checked_labels(labels, refs, x_t)
    if labels is not None:
        check_classes(labels, refs)
    if log_weight is not None:
        log_weight = check_log_weight(log_weight, len(refs), x_t.device)
    weight = refs._log_weights(log_weight)
    if weight is None:
        return
    bad = torch.isnan(weight) | (weight == torch.inf)
    if bool(bad.any()):
        raise ValueError(
            f"log_weight[{first(bad)}] must be finite or -inf, got {weight[first(bad)]:g}"
        )
    if refs._shard is not None:
        return  # what it leaves out, other shards may have
    counted = weight > -torch.inf
    if not bool(counted.any()):
        raise ValueError("log_weight must leave at least one reference, got -inf for all")
    if labels is not None and refs.labels is not None and rows:
        left = torch.isin(labels, refs.labels[counted]) | (labels == -1)
        if not bool(left.all()):
            i = first(~left)
            raise ValueError(
                f"log_weight must leave a reference of labels[{i}] = {int(labels[i])}, "
                "got -inf for all of them"
            )


def _call(
    x_t: Tensor,
    ref: Tensor | References,
    sigma: Tensor | float,
    alpha: Tensor | float,
    target: Parameterization,
    log_weight: Tensor | None,
    labels: Tensor | None,
    noise: str,
    D: Tensor | float | None,
    precision: str,
    backend: str,
    group: ProcessGroup | None,
    workspace: int,
    validate_values: bool,
    with_stats: bool,
) -> list[Tensor]:
    number = 0 if group is None else ranks.number(group)
    try:
        check_samples(x_t)
        check_shard(ref, group)
        check_precision(precision)
        kind, parameters = parse(target)
        if validate_values:
            validate(
                x_t, ref, sigma, alpha=alpha, log_weight=log_weight, labels=labels, noise=noise, D=D
            )
        refs = as_references(ref, x_t, precision, backend)
        most = ar.MAX_REFERENCES_WITH_STATS if with_stats else ar.MAX_REFERENCES
        if refs.total > most:
            what = " for statistics" if with_stats else ""
            raise ValueError(f"ref must have at most {most} references{what}, got {refs.total}")
        if log_weight is not None:
            log_weight = check_log_weight(log_weight, len(refs), x_t.device)
        labels = checked_labels(labels, refs, x_t)
        if labels is not None and readable(labels):
            check_classes(labels, refs)
        x = x_t.detach().flatten(1)
        x = (x if x.dtype == torch.float64 else x.float()).contiguous()
        checked = (
            x,
            per_row("sigma", sigma, x_t),
            per_row("alpha", alpha, x_t),
            freedom(noise, D, x_t),
            labels,
            *refs._prepared(log_weight, by_label=labels is not None, backend=backend),
            number,
            kind,
            [per_row(f"a parameter of target {kind!r}", p, x_t) for p in parameters],
            precision,
            backend,
            byte_count(workspace),
            with_stats,
        )
    except Exception as error:
        if group is not None and not torch.compiler.is_compiling():
            ranks.Group(group).tell(error)
        raise
    return ops.stable_target(*checked)
