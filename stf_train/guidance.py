"""Guidance: denoisers made from denoisers, to be handed to any sampler.

All kinds shift the score, that is D by sigma^2 / alpha times as much. So what is a sum of scores,
of epsilons or of velocities in the papers is the same sum of denoisers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stf_train.process import Denoiser, Network, Path
from stf_train.sample.state import check_gaussian

# log p(c | x_t) of the classes asked for: ([B, *shape], [B, 1, ...]) -> [B]
Classifier = Callable[[Tensor, Tensor], Tensor]
LOG_RATIO = 8.0  # of noise and signal: beyond it a classifier sees nothing, or everything


def classifier_guidance(
    denoise: Denoiser, log_p: Classifier, process: Path, scale: float = 1.0
) -> Denoiser:
    """D + scale sigma^2 / alpha grad_x log p(c | x_t).

    With the true p(c | x_t), an unconditional D and scale 1 this is the conditional posterior mean
    E[y | x_t, c]. There is no such D where alpha = 0, at the very start of a flow, nor for noise
    that is not Gaussian.

    Args:
        denoise: D(x; t), the denoiser.
        log_p: the log-probability of each sample's class given the noisy sample and its time.
        process: alpha and sigma.
        scale: strength.

    Raises:
        ValueError: the noise is not Gaussian; alpha is 0.

    Source: Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis", NeurIPS 2021,
    Algorithms 1 and 2.
    """

    check_gaussian(process, "classifier guidance")

    def guided(x: Tensor, t: Tensor) -> Tensor:
        if not bool((process.alpha(t) > 0).all()):
            raise ValueError(f"classifier guidance needs alpha above 0, got t = {t.max().item():g}")
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(log_p(leaf, t).sum(), leaf)
        return denoise(x, t) + scale * process.sigma(t) ** 2 / process.alpha(t) * gradient

    return guided


def class_logits(network: Network, path: Path, x: Tensor, t: Tensor) -> Tensor:
    """The logits of the classes of noisy samples, [B, K].

        F(x / sqrt(alpha^2 + sigma^2); ln(sigma / alpha) / 4)

    What the network is given depends on x / alpha and sigma / alpha alone, so that one trained on
    a process knows the samples of every other with the same noise.

    Args:
        network: F, takes ([B, *shape], [B]).
        path: alpha and sigma.
        x: noisy samples, [B, *shape].
        t: their times, [B, 1, ...].
    """
    alpha, sigma = path.alpha(t), path.sigma(t)
    noise = (sigma / alpha).log().clamp(-LOG_RATIO, LOG_RATIO)
    return network(x / (alpha**2 + sigma**2).sqrt(), noise.flatten() / 4)


def extrapolated(denoise: Denoiser, worse: Denoiser, w: float) -> Denoiser:
    """(1 + w) D - w D_worse: away from what a worse denoiser says.

    Classifier-free guidance has for `worse` the same network without the class (-1): w = 0 samples
    from the class, w = -1 without regard to it. Autoguidance has a smaller or less trained network
    told the same class; its paper's weight is 1 + w.

    Args:
        denoise: D(x; t), the denoiser.
        worse: the denoiser to lead away from.
        w: strength, any number.

    Source: Ho and Salimans, "Classifier-Free Diffusion Guidance", 2022, Equation 6; Karras et al.,
    "Guiding a Diffusion Model with a Bad Version of Itself", NeurIPS 2024.
    """
    return lambda x, t: (1 + w) * denoise(x, t) - w * worse(x, t)
