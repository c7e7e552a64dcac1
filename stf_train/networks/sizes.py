"""The sizes of a U-Net, and what they ask of an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes of a U-Net.

    Args:
        channels: features that the multipliers multiply.
        multipliers: features at each resolution, from fine to coarse, each half the one before.
        blocks: residual blocks at each resolution; one more on the way up.
        attention: resolutions with self-attention, in pixels.
        dropout: probability.

    Raises:
        ValueError: one of them is out of its range.
    """

    channels: int
    multipliers: tuple[int, ...]
    blocks: int
    attention: tuple[int, ...]
    dropout: float

    unit: ClassVar[int]  # what the channels are a multiple of

    def __post_init__(self) -> None:
        if self.channels < 1 or self.channels % self.unit:
            raise ValueError(f"channels must be a multiple of {self.unit}, got {self.channels}")
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError(f"multipliers must be 1 or more each, got {self.multipliers}")
        if self.blocks < 1:
            raise ValueError(f"blocks must be 1 or more, got {self.blocks}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")

    @property
    def divisor(self) -> int:
        """What the sides of an image are multiples of, to be halved from level to level."""
        return 2 ** (len(self.multipliers) - 1)

    def attended(self, resolution: int) -> list[bool]:
        """Which levels have attention, for images with sides of so many pixels.

        Raises:
            ValueError: the resolution cannot be halved so often, or no level has one of those
                asked for.
        """
        if resolution < 1 or resolution % self.divisor:
            raise ValueError(f"resolution must be a multiple of {self.divisor}, got {resolution}")
        sides = [resolution >> level for level in range(len(self.multipliers))]
        if not set(self.attention) <= set(sides):
            raise ValueError(f"attention must be among {sides}, got {self.attention}")
        return [side in self.attention for side in sides]

    def check(self, x: Tensor) -> None:
        """Raises a ValueError for images [B, C, H, W] that cannot be halved so often."""
        if any(side % self.divisor for side in x.shape[-2:]):
            raise ValueError(
                f"x must have sides that are multiples of {self.divisor}, got {list(x.shape)}"
            )
