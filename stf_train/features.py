"""What samples and data are compared by: features of images in [-1, 1]."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, relu

from stf_train.data import DataSet
from stf_train.progress import Progress
from stf_train.quality import moments

BATCH = 512


class Features(NamedTuple):
    """Of m images."""

    features: Tensor  # [m, F]
    logits: Tensor | None  # of the classes, [m, K]; None if the extractor knows no classes


class Extractor(Protocol):
    """Features of images; its name is printed with every number that comes of them."""

    name: str

    def __call__(self, images: Tensor) -> Features:
        """Features of images in [-1, 1] (or of latents, as they are), [m, *shape] float32."""


def of_data(extractor: Extractor, data: DataSet) -> Features:
    """The features of a whole data set, rounded as `DataSet.rounded` does."""
    parts = []
    with Progress(len(data), "sample", data.name) as progress:
        for index in torch.arange(len(data)).split(BATCH):
            parts.append(extractor(data.rounded(data.references.decode(index))))
            progress.update(len(index))
    return join(parts)


def join(parts: list[Features]) -> Features:
    """The features of several batches."""
    logits = [part.logits for part in parts if part.logits is not None]
    return Features(
        torch.cat([part.features for part in parts]), torch.cat(logits) if logits else None
    )


class Pixels:
    """The values themselves."""

    name = "pixels"

    def __call__(self, images: Tensor) -> Features:
        return Features(images.flatten(1), None)


class PrincipalComponents:
    """The coordinates of largest variance in a data set.

    Args:
        data: what the components are of.
        count: of components, at most the size of a sample.

    Raises:
        ValueError: count is outside.
    """

    def __init__(self, data: DataSet, count: int) -> None:
        size = data.shape.numel()
        if not 1 <= count <= size:
            raise ValueError(f"count must lie in 1..{size}, the size of a sample, got {count}")
        self.name = f"{count} principal components of {data.name}"
        self._mean, covariance = moments(of_data(Pixels(), data).features)
        # Eigenvalues rise.
        self._axes = torch.linalg.eigh(covariance).eigenvectors[:, -count:]

    def __call__(self, images: Tensor) -> Features:
        return Features((images.flatten(1).double() - self._mean) @ self._axes, None)


class Convolutions:
    """Two layers of 3x3 convolutions with fixed random signs for weights.

    Each layer's rectified output, averaged over the image, gives `width` features: contrasts and
    their combinations, whatever their place. They compare small images with each other where a
    network trained on photographs has nothing to say; they are no measure of likeness to the eye.

    Args:
        channels: of the images.
        width: features of each layer.
        seed: of the signs, which are the same on every machine.
    """

    def __init__(self, channels: int, width: int = 64, seed: int = 0) -> None:
        self.name = f"{width} + {width} random convolutions, seed {seed}"
        self.channels = channels
        # The bits of this generator never change (NumPy enhancement proposal 19).
        bits = np.random.PCG64(seed).random_raw(1 + 9 * width * (channels + width) // 64)
        signs = 2.0 * np.unpackbits(bits.astype("<u8").view(np.uint8)) - 1
        weights = torch.from_numpy(signs).float()
        first = 9 * width * channels
        self._first = weights[:first].reshape(width, channels, 3, 3) / (9 * channels) ** 0.5
        self._second = (
            weights[first : first + 9 * width**2].reshape(width, width, 3, 3) / (9 * width) ** 0.5
        )

    def __call__(self, images: Tensor) -> Features:
        if images.ndim != 4 or images.shape[1] != self.channels:
            raise ValueError(f"images must be [m, {self.channels}, H, W], got {list(images.shape)}")
        first = relu(conv2d(images, self._first.to(images.device), padding=1))
        second = relu(conv2d(avg_pool2d(first, 2), self._second.to(images.device), padding=1))
        return Features(torch.cat([first.mean((2, 3)), second.mean((2, 3))], dim=1), None)


class Classified:
    """An extractor's features, and class probabilities by a softmax regression on them.

        p(y | x) = softmax_y(w_y . (f(x) - mean) / sd + b_y)

    Args:
        extractor: f.
        data: samples with classes, to learn from.

    Raises:
        ValueError: data have no classes.
    """

    def __init__(self, extractor: Extractor, data: DataSet) -> None:
        labels = data.references.labels
        if labels is None:
            raise ValueError(f"data must have classes, got {data}")
        self.name = f"{extractor.name}, softmax regression on {data.name}"
        self._extractor = extractor
        features = of_data(extractor, data).features.double().cpu()
        self._mean, deviation = features.mean(0), features.std(0)
        self._scale = torch.where(deviation > 0, 1 / deviation, 0.0)
        standard = ((features - self._mean) * self._scale).numpy()
        model = LogisticRegression(max_iter=1000).fit(standard, labels.cpu().numpy())
        self._weight, self._bias = torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_)

    def __call__(self, images: Tensor) -> Features:
        features = self._extractor(images).features
        logits = (features.double().cpu() - self._mean) * self._scale @ self._weight.T + self._bias
        if logits.shape[1] == 1:  # two classes have one row of weights, the second's
            logits = torch.cat([torch.zeros_like(logits), logits], dim=1)
        return Features(features, logits)


class Inception:
    """Inception-v3 as the FID is defined by, through torch-fidelity, from a local file of weights.

    Features are those before the last layer, [m, 2048], logits those of its classes without the
    bias, as in the first publication of the inception score.

    Args:
        weights: torch-fidelity's weights-inception-2015-12-05-6726825d.pth. Nothing is fetched.
        device: where to compute.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: torch-fidelity cannot be imported.
        ValueError: the file holds other things than tensors.

    Source: A. Obukhov et al., "High-fidelity performance metrics for generative models in
    PyTorch", 2020, a port of the network of Heusel et al. 2017.
    """

    def __init__(self, weights: str | Path, device: torch.device | str = "cpu") -> None:
        path = Path(weights)
        if not path.is_file():
            raise FileNotFoundError(
                "weights must be torch-fidelity's weights-inception-2015-12-05-6726825d.pth, "
                f"there is no {path}"
            )
        try:
            import torch_fidelity
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        # RuntimeError: what a torchvision that was built for another torch raises.
        except (ImportError, RuntimeError) as error:
            raise ImportError(
                "Inception features need torch-fidelity and the torchvision of this torch, "
                f"pip install 'stf-kernels[eval]': {error}"
            ) from error
        # torch-fidelity unpickles whatever a file names; a file that loads like this names nothing.
        try:
            torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged pickle can raise anything
            raise ValueError(f"weights must be a file of tensors, got {path}: {error}") from error
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
        self.name = f"Inception-v3 of torch-fidelity {torch_fidelity.__version__}, weights {digest}"
        self._device = device
        self._model = FeatureExtractorInceptionV3(
            "inception-v3-compat",
            ["2048", "logits_unbiased"],
            feature_extractor_weights_path=str(path),
        ).to(device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images must be [m, 1 or 3, H, W], got {list(images.shape)}")
        levels = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        features, logits = self._model(levels.expand(-1, 3, -1, -1).to(self._device))
        return Features(features, logits)
