"""ADM with adaptive group normalisation, through diffusers.

Source: Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis", NeurIPS 2021.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from stf_train.networks.layers import Conditions, zero
from stf_train.networks.sizes import Sizes


@dataclass(frozen=True, kw_only=True)
class ADMSettings(Sizes):
    """What sets one such network apart from another; the defaults are for ImageNet at 64x64.

    Args:
        head: features of an attention head.
        channels, multipliers, blocks, attention, dropout: as in Sizes.
    """

    head: int = 64
    channels: int = 192
    multipliers: tuple[int, ...] = (1, 2, 3, 4)
    blocks: int = 3
    attention: tuple[int, ...] = (32, 16, 8)
    dropout: float = 0.1

    unit: ClassVar[int] = 32  # normalisation groups

    def __post_init__(self) -> None:
        super().__post_init__()
        features = [self.channels * multiplier for multiplier in self.multipliers]
        if self.head < 1 or any(C % self.head for C in features):
            raise ValueError(f"head must divide the features {features}, got {self.head}")


class ADM(nn.Module):
    """F(x; c_noise), diffusers' UNet2DModel under the names used here.

    Args:
        settings: the sizes.
        resolution: pixels of an image's side; it says at which levels the attention is.
        image_channels: channels of the image.
        classes: number of classes; 0 for none.
        augmentation: length of the augmentation labels; 0 for none.

    Raises:
        ImportError: diffusers is not installed.
        ValueError: the resolution cannot be halved so often, or has no level for the attention.
    """

    def __init__(
        self,
        settings: ADMSettings,
        resolution: int = 64,
        image_channels: int = 3,
        *,
        classes: int = 0,
        augmentation: int = 0,
    ) -> None:
        super().__init__()
        # An optional package of many imports: only where it is used.
        try:
            from diffusers import UNet2DModel
            from diffusers.models.attention_processor import Attention
            from diffusers.models.resnet import ResnetBlock2D
        except ImportError as error:
            raise ImportError('ADM needs diffusers: pip install "stf-kernels[adm]"') from error

        self.settings = settings
        attended = settings.attended(resolution)
        self.width = 4 * settings.channels
        unet: Any = UNet2DModel(
            sample_size=resolution,
            in_channels=image_channels,
            out_channels=image_channels,
            # "fourier" takes the logarithm of c_noise, which may be negative, and divides F by it.
            time_embedding_type="positional",
            down_block_types=tuple(
                "AttnDownBlock2D" if a else "ResnetDownsampleBlock2D" for a in attended
            ),
            up_block_types=tuple(
                "AttnUpBlock2D" if a else "ResnetUpsampleBlock2D" for a in reversed(attended)
            ),
            block_out_channels=tuple(settings.channels * m for m in settings.multipliers),
            layers_per_block=settings.blocks,
            downsample_type="resnet",
            upsample_type="resnet",
            dropout=settings.dropout,
            attention_head_dim=settings.head,
            norm_num_groups=settings.unit,
            # By default the attention in the middle goes without where there is a scale and shift.
            attn_norm_num_groups=settings.unit,
            resnet_time_scale_shift="scale_shift",
            class_embed_type="identity",
        )
        self.conditions = Conditions(classes, augmentation, self.width)
        for layer in unet.modules():
            if isinstance(layer, ResnetBlock2D):
                zero(layer.conv2)
            elif isinstance(layer, Attention):
                zero(layer.to_out)
        zero(unet.conv_out)
        self.unet = unet

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        labels: Tensor | None = None,
        augment: Tensor | None = None,
    ) -> Tensor:
        """F of x [B, C, H, W] at c_noise [B], the same shape; labels [B], -1 for none."""
        self.settings.check(x)
        conditions = self.conditions(x.new_zeros(len(x), self.width), labels, augment)
        return self.unet(x, c_noise, conditions).sample.to(x.dtype)
