"""Diffusion and flow processes: x_t = alpha(t) y + sigma(t) eps, and how a network is put on them.

`path` is what samplers know, `output` what a network's output means, `base` what the loss asks for;
`noise` the distributions of eps; the rest are the processes.
"""

from stf_train.process.base import Network, Process
from stf_train.process.edm import EDM, PFGMpp
from stf_train.process.flow import FlowToData, FlowToNoise
from stf_train.process.noise import GAUSSIAN, Gaussian, Noise, StudentT
from stf_train.process.output import OUTPUTS, Denoised, Epsilon, F, Output, Score, V, Velocity
from stf_train.process.path import Denoiser, Path, SigmaTime
from stf_train.process.ve import VE
from stf_train.process.vp import DDPM, VP

__all__ = [
    "DDPM",
    "EDM",
    "GAUSSIAN",
    "OUTPUTS",
    "VE",
    "VP",
    "Denoised",
    "Denoiser",
    "Epsilon",
    "F",
    "FlowToData",
    "FlowToNoise",
    "Gaussian",
    "Network",
    "Noise",
    "Output",
    "PFGMpp",
    "Path",
    "Process",
    "Score",
    "SigmaTime",
    "StudentT",
    "V",
    "Velocity",
]
