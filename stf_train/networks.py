"""A compact U-Net for 8x8 images."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

GROUP = 8  # channels per normalisation group


def zero(layer: nn.Module) -> None:
    """Lets a layer start at zero: a residual as the identity, the network as F = 0."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


class NoiseEmbedding(nn.Module):
    """Sines and cosines of c_noise on fixed frequencies, then a two-layer perceptron."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # c_noise = ln(sigma)/4 spans about [-1.6, 1.1]: periods of .3 to 32.
        frequencies = 2 * math.pi * torch.logspace(-1.5, 0.5, width // 2)
        self.frequencies: Tensor
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.perceptron = nn.Sequential(
            nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )

    def forward(self, c_noise: Tensor) -> Tensor:  # [B] -> [B, width]
        phase = c_noise[:, None] * self.frequencies
        return self.perceptron(torch.cat([phase.cos(), phase.sin()], dim=1))


class Block(nn.Module):
    """Two 3x3 convolutions around a residual; the noise level scales and shifts what is between."""

    def __init__(self, c_in: int, c_out: int, width: int) -> None:
        super().__init__()
        self.norm0 = nn.GroupNorm(c_in // GROUP, c_in)
        self.conv0 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.affine = nn.Linear(width, 2 * c_out)
        self.norm1 = nn.GroupNorm(c_out // GROUP, c_out)
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


class Attention(nn.Module):
    """Self-attention over the pixels, around a residual."""

    def __init__(self, channels: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(channels // GROUP, channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        zero(self.out)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> the same
        B, C, H, W = x.shape
        pixels = self.norm(x).flatten(2).transpose(1, 2)  # [B, HW, C]
        q, k, v = self.qkv(pixels).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # [B, HW, C]
        return x + self.out(mixed).transpose(1, 2).reshape(B, C, H, W)


class UNet(nn.Module):
    """F(c_in x; c_noise): 8x8 -> 4x4 -> 8x8, attention at 4x4.

    Args:
        channels: features at 8x8, a multiple of 16; twice as many at 4x4.
        image_channels: channels of the image.
    """

    def __init__(self, channels: int = 64, image_channels: int = 1) -> None:
        super().__init__()
        if channels < 16 or channels % 16:
            raise ValueError(f"channels must be a multiple of 16, got {channels}")
        C, width = channels, 2 * channels
        self.embed = NoiseEmbedding(width)
        self.enter = nn.Conv2d(image_channels, C, 3, padding=1)
        self.encode_fine = Block(C, C, width)
        self.down = nn.Conv2d(C, 2 * C, 2, stride=2)
        self.encode_coarse = Block(2 * C, 2 * C, width)
        self.attention = Attention(2 * C)
        self.decode_coarse = Block(2 * C, 2 * C, width)
        self.up = nn.ConvTranspose2d(2 * C, C, 2, stride=2)
        self.decode_fine = Block(2 * C, C, width)
        self.norm = nn.GroupNorm(C // GROUP, C)
        self.leave = nn.Conv2d(C, image_channels, 3, padding=1)
        zero(self.leave)  # so that D starts as c_skip x

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:  # [B, 1, 8, 8], [B] -> [B, 1, 8, 8]
        embedding = self.embed(c_noise)
        fine = self.encode_fine(self.enter(x), embedding)
        coarse = self.encode_coarse(self.down(fine), embedding)
        coarse = self.decode_coarse(self.attention(coarse), embedding)
        fine = self.decode_fine(torch.cat([self.up(coarse), fine], dim=1), embedding)
        return self.leave(silu(self.norm(fine)))
