"""Settings under one name: those of published runs, and small ones for the data that ship along.

A preset holds the options in which it differs from COMMON; every one of them is a flag of
stf-train. Where a publication measures time in steps or an average's memory as a decay, the
formulas below turn it into images.

Sources: Karras et al. 2022, Table 7 (EDM); Song et al. 2021, Appendices G and H (VE, VP); Xu et
al. 2023, Section 6 and Appendix D (STF, 4096 references). EDM's augmentation is not among them.
"""

from __future__ import annotations

import math

from stf_train.config import P_MEAN, P_STD
from stf_train.networks import SETTINGS, ADMSettings
from stf_train.sampling import Sampling

Options = dict[str, object]


def halflife(decay: float, batch: int) -> float:
    """The half-life, in million images, of an average that keeps `decay` of itself in a step."""
    return batch * math.log(0.5) / math.log(decay) / 1e6


def after(steps: int, batch: int) -> float:
    """So many steps in million images."""
    return steps * batch / 1e6


COMMON: Options = {
    "size": None,
    "range": (-1.0, 1.0),
    "xflip": False,
    "cache": True,
    "cond": False,
    "label_dropout": None,
    "target": "stf",
    "references": "4096",
    "output": None,
    "sigma_data": None,
    "P_mean": None,
    "P_std": None,
    "D": None,
    "noise_min": None,
    "noise_max": None,
    "beta_min": None,
    "beta_max": None,
    "strength": None,
    "points": None,
    "cres": None,
    "blocks": None,
    "attention": None,
    "dropout": None,
    "clip": None,
    "ema_rampup": 0.05,
    "batch_gpu": None,
    "fp16": False,
    "bf16": False,
    "ls": 1.0,
    "compile": False,
    "seed": 0,
    "tick": 50.0,
    "snap": 50,
    "tensorboard": False,
}

EDM: Options = COMMON | {
    "process": "edm",
    "sigma_data": 0.5,
    "P_mean": -1.2,
    "P_std": 1.2,
    "sampling": Sampling("heun"),
}
VE: Options = COMMON | {
    "process": "ve",
    "output": "epsilon",
    "range": (0.0, 1.0),
    "noise_min": 0.01,
    "noise_max": 50.0,
    "sampling": Sampling("rk45", steps=1000),
}
VP: Options = COMMON | {
    "process": "vp",
    "output": "epsilon",
    "beta_min": 0.1,
    "beta_max": 20.0,
    "sampling": Sampling("ddim", steps=100),
}

# An average that keeps min(decay, (1 + i) / (10 + i)) at step i has this half-life at first.
EARLY = math.log(2) / 9

CIFAR10: Options = {"data": None, "xflip": True, "cbase": 128, "dropout": 0.1, "blocks": 4}
CIFAR10 |= {"attention": (16,)}
KARRAS: Options = {
    "cres": (2, 2, 2),
    "dropout": 0.13,
    "batch": 512,
    "duration": 200.0,
    "lr": 1e-3,
    "rampup": 10.0,
    "ema": 0.5,
}
SONG: Options = {
    "cres": (1, 2, 2, 2),
    "batch": 128,
    "duration": after(1_300_000, 128),
    "lr": 2e-4,
    "rampup": after(5000, 128),
    "clip": 1.0,
    "ema_rampup": EARLY,
}

DIGITS: Options = {
    "data": "digits",
    "references": "1024",
    "arch": "unet",
    "cbase": 48,
    "batch": 128,
    "duration": 0.14,
    "lr": 3e-3,
    "rampup": 0.005,
    "ema": 0.01,
    "tick": 10.0,
}
DIGITS_EDM: Options = EDM | DIGITS | {"sigma_data": None, "P_mean": P_MEAN, "P_std": P_STD}
# For networks that are told of 1000 steps.
STEPPED: Options = {
    "arch": "ddpmpp-vp",
    "cbase": 32,
    "cres": (1, 2),
    "blocks": 1,
    "attention": (4,),
    "dropout": 0.0,
}

PRESETS: dict[str, Options] = {
    "digits-edm": DIGITS_EDM,
    "digits-edm-cond": DIGITS_EDM | {"cond": True, "label_dropout": 0.1},
    "digits-pfgmpp": DIGITS_EDM | {"process": "pfgmpp", "D": 128.0},
    "digits-ve": VE | DIGITS | {"clip": 1.0},
    "digits-vp": VP | DIGITS | STEPPED,
    "digits-flow": COMMON
    | DIGITS
    | {"process": "flow-to-noise", "output": "velocity", "sampling": Sampling("heun")},
    "digits-seq": VP
    | DIGITS
    | STEPPED
    | {"process": "ddpm", "beta_min": 1e-4, "beta_max": 2e-2, "strength": 1.0, "points": 2},
    "patches-edm": EDM
    | DIGITS
    | STEPPED
    | {"data": "patches", "sigma_data": None, "arch": "ddpmpp-edm", "attention": (8,)},
    "images-edm": EDM
    | DIGITS
    | STEPPED
    | {"data": None, "sigma_data": None, "arch": "ddpmpp-edm", "attention": ()},
    "cifar10-edm-ncsnpp": EDM | CIFAR10 | KARRAS | {"arch": "ncsnpp-edm"},
    "cifar10-edm-ddpmpp": EDM | CIFAR10 | KARRAS | {"arch": "ddpmpp-edm"},
    "cifar10-ve": VE | CIFAR10 | SONG | {"arch": "ncsnpp-ve", "ema": halflife(0.999, 128)},
    "cifar10-vp": VP | CIFAR10 | SONG | {"arch": "ddpmpp-vp", "ema": halflife(0.9999, 128)},
    "celeba64-ve": VE
    | CIFAR10
    | SONG
    | {
        "size": 64,
        "noise_max": 90.0,
        "arch": "ncsnpp-ve-celeba",
        "ema": halflife(0.999, 128),
        "sampling": Sampling("rk45", steps=1000, snr=0.17, tolerance=1e-4),
    },
}
DEFAULT = "digits-edm"


def of_data(data: str | None) -> str:
    """The preset for data that are given without one."""
    shipped = {None: DEFAULT, "digits": DEFAULT, "patches": "patches-edm"}
    return shipped.get(data and data.lower(), "images-edm")


# What a process asks for, where it is chosen against the preset.
PROCESS: dict[str, Options] = {
    "edm": {"sigma_data": None, "P_mean": -1.2, "P_std": 1.2},
    "pfgmpp": {"sigma_data": None, "P_mean": -1.2, "P_std": 1.2, "D": 128.0},
    "ve": {"output": "epsilon", "noise_min": 0.01, "noise_max": 50.0},
    "vp": {"output": "epsilon", "beta_min": 0.1, "beta_max": 20.0},
    "ddpm": {
        "output": "epsilon",
        "beta_min": 1e-4,
        "beta_max": 2e-2,
        "strength": None,
        "points": None,
    },
    "flow-to-noise": {"output": "velocity"},
    "flow-to-data": {"output": "velocity"},
}
CLASSIFIER = "classifier"  # the network of --target class
# Of a network, and what they are called there.
SIZES = {
    "cres": "multipliers",
    "blocks": "blocks",
    "attention": "attention",
    "dropout": "dropout",
}


class Inapplicable(ValueError):
    """An option that does not go with another one."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason


def settle(preset: str, given: Options) -> Options:
    """A preset's options with some replaced, and what these then ask for.

    Raises:
        Inapplicable: an option says nothing of the run that the others describe.
    """
    options = PRESETS[preset] | given
    process, arch = str(options["process"]), str(options["arch"])
    if process != PRESETS[preset]["process"]:
        fresh = dict.fromkeys(name for wanted in PROCESS.values() for name in wanted)
        options |= fresh | PROCESS[process] | {"sampling": Sampling("heun")}
    if arch != PRESETS[preset]["arch"]:
        sizes = None if arch == "unet" else ADMSettings() if arch == "adm" else SETTINGS[arch]
        options |= {option: getattr(sizes, name, None) for option, name in SIZES.items()}
    if options["cond"] != PRESETS[preset]["cond"]:
        options["label_dropout"] = 0.1 if options["cond"] else None
    if given.get("strength") is not None and options["points"] is None:
        options["points"] = 2
    options |= given
    if options["target"] == "class":
        fixed: Options = dict.fromkeys(("label_dropout", "strength", "points", *SIZES))
        fixed |= {"arch": CLASSIFIER, "cond": False}
        for name in ("output", *fixed):
            if name in given:
                raise Inapplicable(name, "--target class has a network and a loss of its own")
        options |= fixed

    for name in given:
        knows = [p for p, wanted in PROCESS.items() if name in wanted]
        if knows and process not in knows:
            raise Inapplicable(name, f"is for --process {' or '.join(knows)}, got {process}")
    for name in SIZES:
        if name in given and arch == "unet":
            raise Inapplicable(name, "--arch unet has a structure of its own")
    if "label_dropout" in given and not options["cond"]:
        raise Inapplicable("label_dropout", "is for --cond 1, got an unconditional network")
    if "points" in given and options["strength"] is None:
        raise Inapplicable("points", "is for the sequence-aware loss, which --strength asks for")
    if "references" in given and options["target"] != "stf":
        raise Inapplicable("references", f"--target {options['target']} has no references")
    return options
