"""A compact U-Net for 8x8 images."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from stf_train.networks.layers import Attention, GroupNorm, NoiseEmbedding, zero

GROUP = 8  # channels per normalisation group


def norm(channels: int) -> GroupNorm:
    """The normalisation of this network."""
    return GroupNorm(channels // GROUP, channels)


class Block(nn.Module):
    """Two 3x3 convolutions around a residual; the noise level scales and shifts what is between."""

    def __init__(self, c_in: int, c_out: int, width: int) -> None:
        super().__init__()
        self.norm0 = norm(c_in)
        self.conv0 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.affine = nn.Linear(width, 2 * c_out)
        self.norm1 = norm(c_out)
        self.conv1 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        zero(self.conv1)

    def forward(
        self, x: Tensor, embedding: Tensor
    ) -> Tensor:  # [B, c_in, H, W] -> [B, c_out, H, W]
        h = self.conv0(silu(self.norm0(x)))
        scale, shift = self.affine(embedding)[:, :, None, None].chunk(2, dim=1)
        h = silu(torch.addcmul(shift, self.norm1(h), 1 + scale))
        return self.skip(x) + self.conv1(h)


class UNet(nn.Module):
    """F(c_in x; c_noise): 8x8 -> 4x4 -> 8x8, attention at 4x4.

    Args:
        channels: features at 8x8, a multiple of 16; twice as many at 4x4.
        image_channels: channels of the image.
        classes: number of classes; 0 for none.
        augmentation: length of the augmentation labels; 0 for none.
    """

    def __init__(
        self,
        channels: int = 64,
        image_channels: int = 1,
        *,
        classes: int = 0,
        augmentation: int = 0,
    ) -> None:
        super().__init__()
        if channels < 16 or channels % 16:
            raise ValueError(f"channels must be a multiple of 16, got {channels}")
        C, width = channels, 2 * channels
        # c_noise = ln(sigma)/4 spans about [-1.6, 1.1]: periods of .3 to 32.
        frequencies = 2 * math.pi * torch.logspace(-1.5, 0.5, width // 2)
        self.embed = NoiseEmbedding(
            frequencies, width, persistent=False, classes=classes, augmentation=augmentation
        )
        self.enter = nn.Conv2d(image_channels, C, 3, padding=1)
        self.encode_fine = Block(C, C, width)
        self.down = nn.Conv2d(C, 2 * C, 2, stride=2)
        self.encode_coarse = Block(2 * C, 2 * C, width)
        self.attention = Attention(norm(2 * C), heads=2)
        self.decode_coarse = Block(2 * C, 2 * C, width)
        self.up = nn.ConvTranspose2d(2 * C, C, 2, stride=2)
        self.decode_fine = Block(2 * C, C, width)
        self.norm = norm(C)
        self.leave = nn.Conv2d(C, image_channels, 3, padding=1)
        zero(self.leave)  # so that D starts as c_skip x

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        labels: Tensor | None = None,
        augment: Tensor | None = None,
    ) -> Tensor:
        """F of x [B, C, H, W] at c_noise [B], the same shape; labels [B], -1 for none."""
        embedding = self.embed(c_noise, labels, augment)
        fine = self.encode_fine(self.enter(x), embedding)
        coarse = self.encode_coarse(self.down(fine), embedding)
        coarse = self.decode_coarse(coarse + self.attention(coarse), embedding)
        fine = self.decode_fine(torch.cat([self.up(coarse), fine], dim=1), embedding)
        return self.leave(silu(self.norm(fine))).to(x.dtype)
