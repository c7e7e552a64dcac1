"""Stable targets for diffusion training: the exact posterior mean over a large reference batch."""

from . import oracle
from .backends import BackendUnavailable
from .ideal import IdealDenoiser
from .neighbours import Nearest, nearest
from .parameterization import EDM, Velocity
from .references import References
from .scales import sigma_data, sigma_max
from .statistics import TargetStats
from .target import stable_target, stable_target_with_stats, validate

__version__ = "0.1.0"

__all__ = [
    "EDM",
    "BackendUnavailable",
    "IdealDenoiser",
    "Nearest",
    "References",
    "TargetStats",
    "Velocity",
    "nearest",
    "oracle",
    "sigma_data",
    "sigma_max",
    "stable_target",
    "stable_target_with_stats",
    "validate",
]
