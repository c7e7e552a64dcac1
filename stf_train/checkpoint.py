"""One safetensors file that holds a whole run at one step."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from stf_train.config import Config
from stf_train.loop import State

FORMAT = "stf_train 3"


@dataclass(frozen=True)
class Checkpoint:
    """What the file holds; the tensors are named network.*, ema.*, optimizer.* and generator."""

    config: Config
    step: int
    skipped: tuple[int, int]  # steps without a finite gradient: all, and the last ones in a row
    metrics_bytes: int  # length of the metrics file at this step
    tensors: dict[str, Tensor]

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors under one prefix, without it."""
        return {
            key[len(name) + 1 :]: t for key, t in self.tensors.items() if key.startswith(f"{name}.")
        }

    def restore(self, state: State) -> None:
        """Brings a freshly built state to this step."""
        state.network.load_state_dict(self.part("network"))
        state.ema.network.load_state_dict(self.part("ema"))
        adam = self.part("optimizer")
        for name, parameter in state.network.named_parameters():
            state.optimizer.state[parameter] = {
                # Moments live beside their weights; the step count stays on the CPU.
                key.removeprefix(f"{name}."): tensor.to(parameter.device) if tensor.ndim else tensor
                for key, tensor in adam.items()
                if key.rpartition(".")[0] == name
            }
        state.generator.set_state(self.tensors["generator"])
        state.step = self.step
        state.skipped, state.in_a_row = self.skipped


def pack(state: State, config: Config, metrics_bytes: int) -> Checkpoint:
    """The checkpoint of a state."""
    tensors = {f"network.{k}": t for k, t in state.network.state_dict().items()}
    tensors |= {f"ema.{k}": t for k, t in state.ema.network.state_dict().items()}
    for name, parameter in state.network.named_parameters():
        for key, value in state.optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = value
    tensors["generator"] = state.generator.get_state()
    skipped = (state.skipped, state.in_a_row)
    return Checkpoint(config, state.step, skipped, metrics_bytes, tensors)


def write(path: Path, checkpoint: Checkpoint) -> None:
    """Puts the file in place at once: a kill at any moment leaves the old one or the new one."""
    about = {
        "format": FORMAT,
        "step": checkpoint.step,
        "skipped": checkpoint.skipped,
        "metrics_bytes": checkpoint.metrics_bytes,
        "config": checkpoint.config.as_dict(),
    }
    # A single key: safetensors does not keep the order of several, and equal runs are to give
    # equal bytes.
    replace(path, save(checkpoint.tensors, {"stf_train": json.dumps(about)}))


def replace(path: Path, content: bytes) -> None:
    """Writes a file by way of a temporary one, on the disk before it takes the name."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    if os.name == "posix":  # the directory entry, too; other systems cannot open a directory
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def read(path: Path) -> Checkpoint:
    """Reads a checkpoint, its tensors on the CPU.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is not a checkpoint of this package.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["stf_train"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} is not a checkpoint of stf-train: {error}") from error
    if about["format"] != FORMAT:
        raise ValueError(f"{path} must have format {FORMAT!r}, got {about['format']!r}")
    config = Config.from_dict(about["config"])
    skipped, in_a_row = about["skipped"]
    return Checkpoint(config, about["step"], (skipped, in_a_row), about["metrics_bytes"], tensors)
