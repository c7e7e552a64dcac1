"""Samplers: generators that walk a denoiser D(x; t) from noise to data and yield every state.

They know alpha, sigma and their derivatives, and nothing else of a process or a network.
"""

from stf_train.process import Denoiser
from stf_train.sample.ddim import ddim
from stf_train.sample.heun import Churn, heun
from stf_train.sample.rk45 import rk45
from stf_train.sample.sde import (
    euler_maruyama,
    euler_maruyama_step,
    predictor_corrector,
    reverse_diffusion,
)
from stf_train.sample.state import (
    RHO,
    SIGMA_MAX,
    SIGMA_MIN,
    STEPS,
    Sample,
    even_steps,
    seeded,
    sigma_steps,
)

__all__ = [
    "RHO",
    "SIGMA_MAX",
    "SIGMA_MIN",
    "STEPS",
    "Churn",
    "Denoiser",
    "Sample",
    "ddim",
    "euler_maruyama",
    "euler_maruyama_step",
    "even_steps",
    "heun",
    "predictor_corrector",
    "reverse_diffusion",
    "rk45",
    "seeded",
    "sigma_steps",
]
