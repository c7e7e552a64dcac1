"""What the networks are made of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import (
    conv2d,
    conv_transpose2d,
    embedding,
    group_norm,
    pad,
    scaled_dot_product_attention,
)


def zero(layer: nn.Module) -> None:
    """Lets a layer start at zero: a residual as the identity, the network as F = 0."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


class GroupNorm(nn.GroupNorm):
    """Group normalisation in float32 at least: in bfloat16 a deviation is off by up to 1/512."""

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> the same
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return group_norm(wide, self.num_groups, self.weight, self.bias, self.eps).to(x.dtype)


class Attention(nn.Module):
    """Self-attention over the pixels, the branch of a residual that the caller adds."""

    def __init__(self, norm: GroupNorm, heads: int) -> None:
        super().__init__()
        channels = norm.num_channels
        self.heads = heads
        self.norm = norm
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        zero(self.out)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> the same
        pixels = self.norm(x).flatten(2).transpose(1, 2)  # [B, HW, C]
        q, k, v = self.qkv(pixels).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # [B, HW, C]
        return self.out(mixed).transpose(1, 2).reshape(x.shape)


class Conditions(nn.Module):
    """Adds to features of the noise level what else is known of an image.

    A dropped label, an augmentation of all zeros and None each add nothing.

    Args:
        classes: number of classes; 0 for a network without labels.
        augmentation: length of the augmentation labels; 0 for a network without.
        width: number of features.
    """

    def __init__(self, classes: int, augmentation: int, width: int) -> None:
        super().__init__()
        for name, count in ("classes", classes), ("augmentation", augmentation):
            if count < 0:
                raise ValueError(f"{name} must be 0 or more, got {count}")
        self.table = nn.Parameter(torch.randn(classes, width)) if classes else None
        self.augment = nn.Linear(augmentation, width, bias=False) if augmentation else None

    def forward(self, features: Tensor, labels: Tensor | None, augment: Tensor | None) -> Tensor:
        # [B, width], [B], [B, augmentation] -> [B, width]
        if labels is not None:
            if self.table is None:
                raise ValueError("labels must be None for a network built with classes=0")
            # A row of zeros for label -1; any other label out of range is an error of the lookup.
            features = features + embedding(labels + 1, pad(self.table, (0, 0, 1, 0)))
        if augment is not None:
            if self.augment is None:
                raise ValueError("augment must be None for a network built with augmentation=0")
            features = features + self.augment(augment)
        return features


class NoiseEmbedding(nn.Module):
    """cos and sin of c_noise on fixed frequencies, the conditions, then a two-layer perceptron.

    Args:
        frequencies: in radians per unit of c_noise, [half the features].
        width: length of the embedding.
        persistent: keeps the frequencies in the state dict, as random ones must be.
        classes, augmentation: as in Conditions.
    """

    def __init__(
        self,
        frequencies: Tensor,
        width: int,
        *,
        persistent: bool,
        classes: int,
        augmentation: int,
    ) -> None:
        super().__init__()
        features = 2 * len(frequencies)
        self.frequencies: Tensor
        self.register_buffer("frequencies", frequencies, persistent=persistent)
        self.perceptron = nn.Sequential(
            nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.conditions = Conditions(classes, augmentation, features)

    def forward(
        self, c_noise: Tensor, labels: Tensor | None, augment: Tensor | None
    ) -> Tensor:  # [B] -> [B, width]
        phase = c_noise[:, None] * self.frequencies
        features = torch.cat([phase.cos(), phase.sin()], dim=1)
        return self.perceptron(self.conditions(features, labels, augment))


def kernel(taps: Sequence[int]) -> Tensor:
    """The separable filter of some taps, [1, 1, k, k], its sum 1.

    (1, 1) averages 2x2 pixels and, upwards, repeats each; (1, 3, 3, 1) is smoother.
    Pixels beyond the border count as zero.
    """
    if not taps or len(taps) % 2 or tuple(taps) != tuple(reversed(taps)) or sum(taps) <= 0:
        raise ValueError(
            f"taps must be symmetric, of even number and positive sum, got {tuple(taps)}"
        )
    row = torch.tensor(taps, dtype=torch.float32)
    return (torch.outer(row, row) / row.sum() ** 2)[None, None]


class Resample(nn.Module):
    """A filter on each channel, the base of those below."""

    def __init__(self, taps: Sequence[int]) -> None:
        super().__init__()
        self.kernel: Tensor
        self.register_buffer("kernel", kernel(taps), persistent=False)
        self.margin = len(taps) // 2 - 1  # keeps an image's centre in place

    def filters(self, x: Tensor) -> Tensor:
        """One filter for each channel of x, in its type."""
        return self.kernel.to(x.dtype).expand(x.shape[1], -1, -1, -1)


class Down(Resample):
    """Half the resolution."""

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C, H/2, W/2]
        return conv2d(x, self.filters(x), stride=2, padding=self.margin, groups=x.shape[1])


class Up(Resample):
    """Twice the resolution; the zeros put between the pixels cost 3/4 of the sum."""

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C, 2H, 2W]
        filters = 4 * self.filters(x)
        return conv_transpose2d(x, filters, stride=2, padding=self.margin, groups=x.shape[1])


class DownConv(Resample):
    """A filter, then a 3x3 convolution at every other pixel: half the resolution."""

    def __init__(self, c_in: int, c_out: int, taps: Sequence[int]) -> None:
        super().__init__(taps)
        self.conv = nn.Conv2d(c_in, c_out, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:  # [B, c_in, H, W] -> [B, c_out, H/2, W/2]
        # One pixel more on each side, for the convolution.
        return self.conv(conv2d(x, self.filters(x), padding=self.margin + 1, groups=x.shape[1]))
