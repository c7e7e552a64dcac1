"""Data whose posterior mean is known, and the processes to put it through."""

import torch

from stf_train.process import (
    DDPM,
    EDM,
    OUTPUTS,
    VE,
    VP,
    F,
    FlowToData,
    FlowToNoise,
    PFGMpp,
)

PROCESSES = {
    "EDM": EDM(0.7),
    "PFGM++": PFGMpp(0.7, D=16),
    "VE": VE(),
    "VP": VP(),
    "DDPM": DDPM(),
    "flow to noise": FlowToNoise(),
    "flow to data": FlowToData(),
}
GAUSSIAN = {name: process for name, process in PROCESSES.items() if name != "PFGM++"}
OUTPUT_KINDS = {**OUTPUTS, "F": F(0.7)}


def inside(process, count=41):
    """Times within the span, [count, 1] float64, off the steps of DDPM."""
    start, end = process.span
    share = torch.linspace(0.0107, 0.9893, count, dtype=torch.float64)
    return (start + (end - start) * share)[:, None]


def mixture(process, means, deviations, weights):
    """D(x; t) = E[y | x_t = x] for y of a mixture of normals, every coordinate for itself.

    x_t given component c is N(alpha m_c, alpha^2 s_c^2 + sigma^2), and y and x_t are jointly
    normal with covariance alpha s_c^2.
    """
    m, s, w = (torch.tensor(v, dtype=torch.float64) for v in (means, deviations, weights))

    def denoise(x, t):
        alpha, sigma, x = process.alpha(t)[..., None], process.sigma(t)[..., None], x[..., None]
        variance = alpha**2 * s**2 + sigma**2
        gap = x - alpha * m
        responsibility = (w.log() - variance.log() / 2 - gap**2 / (2 * variance)).softmax(-1)
        return (responsibility * (m + alpha * s**2 / variance * gap)).sum(-1)

    return denoise


def last(states):
    for state in states:
        result = state
    return result
