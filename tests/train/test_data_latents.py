"""Encoding to latents and decoding, with a tiny autoencoder of random weights."""

import builtins

import numpy as np
import pytest
import torch

from stf_train import data

diffusers = pytest.importorskip("diffusers")


def save_model(folder, **config):
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        **config,
    ).eval()
    model.save_pretrained(folder)
    return model


CONFIGS = {
    "scaled": ({"scaling_factor": 0.5}, 0.0, 0.5),
    "shifted": ({"scaling_factor": 0.25, "shift_factor": 0.1}, 0.1, 0.25),
    "by channel": (
        {
            "scaling_factor": 0.5,
            "latents_mean": [0.1, 0.2, 0.3, 0.4],
            "latents_std": [1.0, 2.0, 3.0, 4.0],
        },
        torch.tensor([0.1, 0.2, 0.3, 0.4]).reshape(4, 1, 1),
        0.5 / torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(4, 1, 1),
    ),
}


@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_encodes_and_decodes_like_the_model(tmp_path, kind):
    config, shift, scale = CONFIGS[kind]
    model = save_model(tmp_path / "model", **config)
    autoencoder = data.Autoencoder(tmp_path / "model")
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    mean = model.encode(images).latent_dist.mean
    latents = autoencoder.encode(images)
    torch.testing.assert_close(latents, scale * (mean - shift), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        autoencoder.decode(latents), model.decode(mean).sample, rtol=1e-4, atol=1e-5
    )


def test_latents_of_a_data_set(tmp_path):
    save_model(tmp_path / "model", scaling_factor=0.5)
    autoencoder = data.Autoencoder(tmp_path / "model")
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "set.npz", x=pixels, y=np.arange(5))
    path = tmp_path / "latents.npy"
    # However the training takes the bytes, the autoencoder sees [-1, 1].
    data.encode(data.load(tmp_path / "set.npz", value_range=(0, 1)), autoencoder, path, batch=2)
    found = data.load(path)
    assert (found.shape, found.levels) == ((4, 4, 4), None)
    assert found.references.labels.tolist() == [0, 1, 2, 3, 4]
    expected = autoencoder.encode(torch.from_numpy(pixels).float() / 127.5 - 1)
    torch.testing.assert_close(found.references.decode(), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(FileExistsError, match="path must be a new file"):
        data.encode(data.load(tmp_path / "set.npz"), autoencoder, path)


def test_only_colour_images_are_encoded(tmp_path):
    save_model(tmp_path / "model")
    autoencoder = data.Autoencoder(tmp_path / "model")
    with pytest.raises(ValueError, match=r"data must be bytes \[n, 3, H, W\] .* got digits"):
        data.encode(data.load("digits"), autoencoder, tmp_path / "latents.npy")


def test_no_such_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"folder must hold an AutoencoderKL .* got stabil"):
        data.Autoencoder("stabilityai/sd-vae-ft-ema")


def test_without_diffusers(tmp_path, monkeypatch):
    save_model(tmp_path / "model")
    real = builtins.__import__

    def without(name, *rest):
        if name == "diffusers":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"needs diffusers: pip install 'stf-kernels\[latents\]'"):
        data.Autoencoder(tmp_path / "model")
