"""Data sets as references: what can be read, and the draw of minibatches and references from it."""

from stf_train.data.dataset import DataSet, Facts, draw, sigma_data
from stf_train.data.latents import Autoencoder, encode
from stf_train.data.loading import convert, load
from stf_train.data.shipped import LEVELS, SHAPE, SHIPPED, TOTAL, digits
from stf_train.data.source import physical_memory

__all__ = [
    "LEVELS",
    "SHAPE",
    "SHIPPED",
    "TOTAL",
    "Autoencoder",
    "DataSet",
    "Facts",
    "convert",
    "digits",
    "draw",
    "encode",
    "load",
    "physical_memory",
    "sigma_data",
]
