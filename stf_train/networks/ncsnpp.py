"""NCSN++ and DDPM++, one U-Net under two sets of choices.

Source: Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations",
ICLR 2021, Appendix H; Karras et al. 2022, Appendix F, for the EDM settings; the resampling filter
is that of Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", CVPR 2020.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from stf_train.networks.layers import Attention, Down, DownConv, GroupNorm, NoiseEmbedding, Up, zero
from stf_train.networks.sizes import Sizes

HALF_ROOT = math.sqrt(0.5)  # keeps the variance of a sum of two
FOURIER_SCALE = 16.0


@dataclass(frozen=True, kw_only=True)
class Settings(Sizes):
    """What sets one such network apart from another.

    Args:
        embedding: of the noise level. "positional": c_noise by the sines of the transformer, at
            periods of 2 pi to 2e4 pi. "fourier": by random frequencies, N(0, 16^2).
        taps: resampling filter, (1, 1) or (1, 3, 3, 1).
        residual_input: adds the image itself, resampled and convolved, at each resolution below
            the first.
        channels, multipliers, blocks, attention, dropout: as in Sizes.
    """

    embedding: Literal["positional", "fourier"]
    taps: tuple[int, ...]
    residual_input: bool
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    blocks: int = 4
    attention: tuple[int, ...] = (16,)
    dropout: float = 0.1

    unit: ClassVar[int] = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.embedding not in ("positional", "fourier"):
            raise ValueError(f'embedding must be "positional" or "fourier", got {self.embedding!r}')

    def frequencies(self) -> Tensor:
        """Of the noise embedding, in radians per unit of c_noise."""
        if self.embedding == "fourier":
            return 2 * math.pi * FOURIER_SCALE * torch.randn(self.channels)
        return torch.logspace(0, -4, self.channels // 2)


NCSNPP = Settings(embedding="fourier", taps=(1, 3, 3, 1), residual_input=True)
DDPMPP = Settings(embedding="positional", taps=(1, 1), residual_input=False)

# The first three are those of Song et al. 2021, for c_noise = ln sigma, 999 (1 - t) and 999 t; the
# last two those of Karras et al. 2022 for CIFAR-10, for c_noise = ln(sigma)/4.
SETTINGS = {
    "ncsnpp-ve": NCSNPP,
    "ncsnpp-ve-celeba": replace(NCSNPP, embedding="positional"),
    "ddpmpp-vp": DDPMPP,
    "ncsnpp-edm": replace(NCSNPP, multipliers=(2, 2, 2), dropout=0.13),
    "ddpmpp-edm": replace(DDPMPP, multipliers=(2, 2, 2), dropout=0.13),
}


def norm(channels: int) -> GroupNorm:
    """32 groups at most, of 4 channels at least, and as many as divide the channels."""
    groups = next(g for g in range(min(channels // 4, 32), 0, -1) if channels % g == 0)
    return GroupNorm(groups, channels, eps=1e-6)


class Block(nn.Module):
    """The residual block of BigGAN: resampled within, shifted by the noise level.

    y = (skip(x) + h(x)) / sqrt 2, then, with attention, z = (y + attention(y)) / sqrt 2
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        width: int,
        dropout: float,
        *,
        attention: bool = False,
        resample: Up | Down | None = None,
    ) -> None:
        super().__init__()
        self.resample = resample
        self.norm0 = norm(c_in)
        self.conv0 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.shift = nn.Linear(width, c_out)
        self.norm1 = norm(c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv1 = nn.Conv2d(c_out, c_out, 3, padding=1)
        plain = c_in == c_out and resample is None
        self.skip = nn.Identity() if plain else nn.Conv2d(c_in, c_out, 1)
        self.attention = Attention(norm(c_out), heads=1) if attention else None

    def forward(
        self, x: Tensor, embedding: Tensor
    ) -> Tensor:  # [B, c_in, H, W], [B, width] -> [B, c_out, H', W']
        h = silu(self.norm0(x))
        if self.resample is not None:
            x, h = self.resample(x), self.resample(h)
        h = self.conv0(h) + self.shift(embedding)[:, :, None, None]
        h = self.conv1(self.dropout(silu(self.norm1(h))))
        x = (self.skip(x) + h) * HALF_ROOT
        if self.attention is not None:
            x = (x + self.attention(x)) * HALF_ROOT
        return x


class NCSNpp(nn.Module):
    """F(x; c_noise), a U-Net of residual blocks.

    What belongs to the process is not in here: the scaling of x, and the factors of F such as the
    1/sigma of Song et al.'s VE network.

    Args:
        settings: one of SETTINGS, or others.
        resolution: pixels of an image's side; it says at which levels the attention is. Any image
            whose sides are multiples of 2^(levels - 1) passes.
        image_channels: channels of the image.
        classes: number of classes; 0 for none.
        augmentation: length of the augmentation labels; 0 for none.

    Raises:
        ValueError: the resolution cannot be halved so often, or has no level for the attention.
    """

    def __init__(
        self,
        settings: Settings,
        resolution: int = 32,
        image_channels: int = 3,
        *,
        classes: int = 0,
        augmentation: int = 0,
    ) -> None:
        super().__init__()
        self.settings = settings
        attended = settings.attended(resolution)
        width = 4 * settings.channels
        self.embed = NoiseEmbedding(
            settings.frequencies(),
            width,
            persistent=settings.embedding == "fourier",
            classes=classes,
            augmentation=augmentation,
        )

        def block(
            c_in: int, c_out: int, *, attention: bool = False, resample: Up | Down | None = None
        ) -> Block:
            return Block(
                c_in, c_out, width, settings.dropout, attention=attention, resample=resample
            )

        C = settings.channels
        self.enter = nn.Conv2d(image_channels, C, 3, padding=1)
        self.encoder = nn.ModuleList()
        self.images = nn.ModuleList()  # the image at the resolutions below the first
        skips, c_image = [C], image_channels
        for level, multiplier in enumerate(settings.multipliers):
            if level > 0:
                self.encoder.append(block(C, C, resample=Down(settings.taps)))
                skips.append(C)
                if settings.residual_input:
                    self.images.append(DownConv(c_image, C, settings.taps))
                    c_image = C
            for _ in range(settings.blocks):
                c_in, C = C, settings.channels * multiplier
                self.encoder.append(block(c_in, C, attention=attended[level]))
                skips.append(C)

        self.middle = nn.ModuleList([block(C, C, attention=True), block(C, C)])

        self.decoder = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(settings.multipliers))):
            for i in range(settings.blocks + 1):
                c_in, C = C + skips.pop(), settings.channels * multiplier
                last = i == settings.blocks
                self.decoder.append(block(c_in, C, attention=last and attended[level]))
            if level > 0:
                self.decoder.append(block(C, C, resample=Up(settings.taps)))

        self.norm = norm(C)
        self.leave = nn.Conv2d(C, image_channels, 3, padding=1)
        self.initialise()

    def initialise(self) -> None:
        """Uniform weights of variance 1/(fan in + fan out) x 2, zeros where a branch ends."""
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        for layer in self.modules():
            if isinstance(layer, Block):
                zero(layer.conv1)
            elif isinstance(layer, Attention):
                # Variance .1/C for each of q, k and v.
                nn.init.xavier_uniform_(layer.qkv.weight, gain=math.sqrt(0.2))
                zero(layer.out)
        zero(self.leave)

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        labels: Tensor | None = None,
        augment: Tensor | None = None,
    ) -> Tensor:
        """F of x [B, C, H, W] at c_noise [B], the same shape; labels [B], -1 for none."""
        self.settings.check(x)
        embedding = self.embed(c_noise, labels, augment)
        h, image, images = self.enter(x), x, iter(self.images)
        skips = [h]
        for block in self.encoder:
            h = block(h, embedding)
            if block.resample is not None and self.images:
                h = image = (next(images)(image) + h) * HALF_ROOT
            skips.append(h)
        for block in self.middle:
            h = block(h, embedding)
        for block in self.decoder:
            if block.resample is None:
                h = torch.cat([h, skips.pop()], dim=1)
            h = block(h, embedding)
        return self.leave(silu(self.norm(h))).to(x.dtype)
