"""What is built from a config: data set, process, network, target and loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import TypeVar

from torch import nn

from stf_kernels import References
from stf_train import data
from stf_train.config import Config
from stf_train.data import DataSet
from stf_train.loss import DenoisingLoss, SequenceLoss
from stf_train.networks import ADM, SETTINGS, ADMSettings, NCSNpp, UNet
from stf_train.process import (
    DDPM,
    EDM,
    OUTPUTS,
    VE,
    VP,
    FlowToData,
    FlowToNoise,
    Output,
    PFGMpp,
    Process,
)
from stf_train.targets import DenoisingTarget, StableTarget, Target

T = TypeVar("T")


@lru_cache(maxsize=1)
def _load(spec: str, size: int | None, value_range: tuple[float, float], xflip: bool) -> DataSet:
    found = data.load(spec, size=size, value_range=value_range)
    if not xflip:
        return found
    # Sources are drawn from among the references, so that both are flipped alike.
    return replace(found, references=found.references.with_flips())


def dataset(config: Config) -> DataSet:
    """The data set of a run, on the CPU; the last one is kept."""
    return _load(config.data, config.size, config.range, config.xflip)


def known(value: T | None) -> T:
    """An option that the run must have: the command has seen to it."""
    assert value is not None
    return value


def _edm(c: Config) -> tuple[float, float, float]:
    return known(c.sigma_data), known(c.P_mean), known(c.P_std)


def _beta(c: Config) -> tuple[float, float]:
    return known(c.beta_min), known(c.beta_max)


def _output(c: Config) -> Output:
    return OUTPUTS[known(c.output)]


PROCESSES: dict[str, Callable[[Config], Process]] = {
    "edm": lambda c: EDM(*_edm(c)),
    "pfgmpp": lambda c: PFGMpp(*_edm(c), D=known(c.D)),
    "ve": lambda c: VE(known(c.noise_min), known(c.noise_max), _output(c)),
    "vp": lambda c: VP(*_beta(c), _output(c)),
    "ddpm": lambda c: DDPM(1000, *_beta(c), _output(c)),
    "flow-to-noise": lambda c: FlowToNoise(output=_output(c)),
    "flow-to-data": lambda c: FlowToData(output=_output(c)),
}


def process(config: Config) -> Process:
    """The noise process of a run."""
    return PROCESSES[config.process](config)


ARCHITECTURES = ("unet", *SETTINGS, "adm")


def network(config: Config) -> nn.Module:
    """The network of a run, initialised from torch's global generator."""
    found = dataset(config)
    if len(found.shape) != 3:
        raise ValueError(f"data must be images [C, H, W], got {list(found.shape)}")
    channels, side, _ = found.shape
    classes = found.classes if config.cond else 0
    if config.arch == "unet":
        return UNet(config.cbase, channels, classes=classes)
    base = ADMSettings() if config.arch == "adm" else SETTINGS[config.arch]
    settings = replace(
        base,
        channels=config.cbase,
        multipliers=known(config.cres),
        blocks=known(config.blocks),
        attention=known(config.attention),
        dropout=known(config.dropout),
    )
    if isinstance(settings, ADMSettings):
        return ADM(settings, side, channels, classes=classes)
    return NCSNpp(settings, side, channels, classes=classes)


def count(config: Config) -> int:
    """n, references per step."""
    return len(dataset(config)) if config.references == "all" else int(config.references)


def loss(config: Config) -> DenoisingLoss:
    """The loss of a run, around the target that the config names."""
    bank = dataset(config).references.to(config.device)
    targets: dict[str, Callable[[References], Target]] = {
        "dsm": DenoisingTarget,
        "stf": lambda references: StableTarget(references, count(config)),
    }
    target = targets[config.target](bank)
    dropout = config.label_dropout if config.cond else None
    if config.strength is None:
        return DenoisingLoss(process(config), bank, target, dropout)
    chain = process(config)
    assert isinstance(chain, DDPM)
    return SequenceLoss(
        chain, bank, target, dropout, K=known(config.points), strength=config.strength
    )
