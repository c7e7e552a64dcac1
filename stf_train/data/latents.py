"""Latents: images encoded once by an autoencoder from diffusers, and decoded again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from stf_train.data import arrays
from stf_train.data.dataset import DataSet
from stf_train.progress import Progress


class Autoencoder:
    """diffusers' AutoencoderKL between images and the latents a diffusion model works on.

        latent = scale (mean of q(z | image) - shift)

    The mean, so that an image has one latent, as a reference has to; scale and shift are those of
    the model's own configuration (scaling_factor and shift_factor, or latents_mean and
    latents_std), by which diffusers' pipelines bring its latents to about unit variance.

    Args:
        folder: config.json and the weights, as `save_pretrained` leaves them. Nothing is fetched.
        device: where to compute.

    Raises:
        FileNotFoundError: there is no such folder.
        ImportError: diffusers is not installed.

    Source: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", 2022.
    """

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu") -> None:
        if not (Path(folder) / "config.json").is_file():
            raise FileNotFoundError(
                f"folder must hold an AutoencoderKL of diffusers, its config.json and weights, "
                f"got {folder}"
            )
        try:
            from diffusers import AutoencoderKL
        except ImportError as error:
            raise ImportError(
                "an autoencoder needs diffusers: pip install 'stf-kernels[latents]'"
            ) from error
        model = AutoencoderKL.from_pretrained(str(folder), local_files_only=True)
        self._model = model.eval().requires_grad_(False).to(device)
        config = model.config
        shift = [config.shift_factor or 0.0] if config.latents_mean is None else config.latents_mean
        deviation = torch.tensor([1.0] if config.latents_std is None else config.latents_std)
        self._shift = torch.tensor(shift, device=device).reshape(-1, 1, 1)
        self._scale = (config.scaling_factor / deviation).to(device).reshape(-1, 1, 1)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Latents [m, c, h, w] float32 of images [m, 3, H, W] in [-1, 1]."""
        mean = self._model.encode(images.to(self._shift)).latent_dist.mode()
        return self._scale * (mean - self._shift)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images [m, 3, H, W] float32, in about [-1, 1], of latents [m, c, h, w]."""
        return self._model.decode(latents.to(self._shift) / self._scale + self._shift).sample


def encode(data: DataSet, autoencoder: Autoencoder, path: str | Path, *, batch: int = 16) -> None:
    """Writes the latents of a data set into a .npy file that `load` reads, with its classes.

    Args:
        data: images, [n, 3, H, W].
        autoencoder: what encodes them.
        path: of the new file, [n, c, h, w] float32; it appears when it is whole.
        batch: images at a time.

    Raises:
        FileExistsError: there is such a file.
        ValueError: path does not end in .npy, or data are not colour images.
    """
    path = arrays.new(path)
    if data.levels is None or len(data.shape) != 3 or data.shape[0] != 3:
        raise ValueError(f"data must be bytes [n, 3, H, W] to be encoded, got {data}")

    def latents(index: Tensor) -> Tensor:
        return autoencoder.encode(data.rounded(data.references.decode(index)))

    def chunks() -> Iterator[tuple[int, Tensor]]:
        parts = torch.arange(len(data)).split(batch)
        with Progress(len(data), "sample", data.name) as progress:
            for part in parts:
                yield int(part[0]), latents(part)
                progress.update(len(part))

    shape = (len(data), *latents(torch.arange(1)).shape[1:])
    arrays.write(path, shape, "float32", chunks(), data.references.labels)
