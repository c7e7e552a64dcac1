"""Data sets as references: what can be read, and the draw of minibatches and references from it."""

from stf_train.data.dataset import DataSet, draw, sigma_data
from stf_train.data.latents import Autoencoder, encode
from stf_train.data.loading import convert, load
from stf_train.data.shipped import LEVELS, SHAPE, TOTAL, digits

__all__ = [
    "LEVELS",
    "SHAPE",
    "TOTAL",
    "Autoencoder",
    "DataSet",
    "convert",
    "digits",
    "draw",
    "encode",
    "load",
    "sigma_data",
]
