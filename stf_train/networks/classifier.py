"""A network that says the class of a noisy image, for classifier guidance."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from stf_train.networks.layers import NoiseEmbedding
from stf_train.networks.unet import GROUP, Block, norm

LEVELS = 3  # resolutions, at most


class Classifier(nn.Module):
    """Logits of the classes of x at c_noise: the encoder of a U-Net and the mean over its pixels.

    Args:
        channels: features at full resolution, a multiple of 8; twice as many at the others.
        sides: height and width of the images, halved twice if they are even so often.
        image_channels: channels of the image.
        classes: K.
    """

    def __init__(
        self, channels: int, sides: tuple[int, int], image_channels: int, classes: int
    ) -> None:
        super().__init__()
        if channels < GROUP or channels % GROUP:
            raise ValueError(f"channels must be a multiple of {GROUP}, got {channels}")
        width = 2 * channels
        # c_noise as for the small U-Net.
        frequencies = 2 * math.pi * torch.logspace(-1.5, 0.5, width // 2)
        self.embed = NoiseEmbedding(frequencies, width, persistent=False, classes=0, augmentation=0)
        self.enter = nn.Conv2d(image_channels, channels, 3, padding=1)
        self.blocks = nn.ModuleList([Block(channels, 2 * channels, width)])
        for level in range(1, LEVELS):
            if all(side % 2**level == 0 for side in sides):
                self.blocks.append(Block(2 * channels, 2 * channels, width))
        self.shrink = nn.AvgPool2d(2)
        self.norm = norm(2 * channels)
        self.leave = nn.Linear(2 * channels, classes)

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        """Logits [B, K] of x [B, C, H, W] at c_noise [B]."""
        embedding = self.embed(c_noise, None, None)
        h = self.enter(x)
        for level, block in enumerate(self.blocks):
            h = block(self.shrink(h) if level else h, embedding)
        return self.leave(silu(self.norm(h)).mean((2, 3)))
