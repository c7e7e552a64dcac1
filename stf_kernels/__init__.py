"""Stable targets for diffusion training: the exact posterior mean over a large reference batch."""

from . import oracle
from .backends import BackendUnavailable
from .parameterization import EDM, Velocity
from .references import References
from .statistics import TargetStats
from .target import stable_target, stable_target_with_stats, validate

__version__ = "0.1.0"

__all__ = [
    "EDM",
    "BackendUnavailable",
    "References",
    "TargetStats",
    "Velocity",
    "oracle",
    "stable_target",
    "stable_target_with_stats",
    "validate",
]
