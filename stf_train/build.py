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
from stf_train.data import DataSet, Facts
from stf_train.loss import ClassLoss, DenoisingLoss, SequenceLoss
from stf_train.networks import ADM, SETTINGS, ADMSettings, Classifier, NCSNpp, UNet
from stf_train.presets import CLASSIFIER
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
def _load(
    spec: str, size: int | None, value_range: tuple[float, float], cache: bool
) -> tuple[DataSet, Facts]:
    found = data.load(spec, size=size, value_range=value_range, resident=cache)
    return found, Facts.of(found)


def _loaded(config: Config) -> tuple[DataSet, Facts]:
    return _load(config.data, config.size, config.range, config.cache)


@lru_cache(maxsize=1)
def _flipped(found: DataSet) -> DataSet:
    return replace(found, references=found.references.with_flips())


def dataset(config: Config) -> DataSet:
    """The data set of a run, on the CPU; the last one is kept.

    Raises:
        FileNotFoundError, ValueError, MemoryError: as `stf_train.data.load`.
        ValueError: it is not the one that the run was started with.
    """
    found, facts = _loaded(config)
    if config.facts is not None and not facts.same(config.facts):
        raise ValueError(
            f"{config.data} must be the data that the run was started with, {config.facts}, "
            f"checksum {config.facts.checksum}; got {facts}, checksum {facts.checksum}"
        )
    # Sources are drawn from among the references, so that both are flipped alike.
    return _flipped(found) if config.xflip else found


def facts(config: Config) -> Facts:
    """What a run knows of its data, which need not be there any more if it was started."""
    return config.facts or _loaded(config)[1]


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
    found = facts(config)
    if len(found.shape) != 3:
        raise ValueError(f"data must be images [C, H, W], got {list(found.shape)}")
    channels, side, width = found.shape
    halvings = {"unet": 1, CLASSIFIER: 0}.get(config.arch)
    if halvings is None:
        halvings = len(known(config.cres)) - 1
    if side % 2**halvings or width % 2**halvings:
        raise ValueError(
            f"images must have sides that are multiples of {2**halvings} for {config.arch}, which "
            f"halves them {halvings} time{'s' * (halvings > 1)}, got {width}x{side} pixels; of a "
            "folder or zip of images --size makes others"
        )
    if config.target == "class":
        return Classifier(config.cbase, (side, width), channels, found.classes)
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
    if config.target == "class":
        return ClassLoss(process(config), bank)
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
