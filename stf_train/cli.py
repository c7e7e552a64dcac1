"""The commands."""

from stf_train.sample_cli import evaluate, sample
from stf_train.train_cli import train

__all__ = ["evaluate", "sample", "train"]
