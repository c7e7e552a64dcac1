"""The extractors."""

import hashlib
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from stf_train import data, features
from stf_train.features import (
    Classified,
    Convolutions,
    Features,
    Inception,
    Pixels,
    PrincipalComponents,
)


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def test_features_of_data_in_batches(digits, monkeypatch):
    whole = features.of_data(Pixels(), digits)
    assert torch.equal(whole.features, digits.references.decode().flatten(1))
    assert whole.logits is None
    monkeypatch.setattr(features, "BATCH", 500)
    assert torch.equal(features.of_data(Pixels(), digits).features, whole.features)


def test_images_come_in_minus_one_to_one():
    """However the training takes the bytes."""
    for value_range in ((-1, 1), (0, 1), (0, 255)):
        patches = data.load("patches", size=128, value_range=value_range)
        got = features.of_data(Pixels(), patches).features
        expected = data.load("patches", size=128).references.decode().flatten(1)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_principal_components_are_those_of_scikit_learn(digits):
    extractor = PrincipalComponents(digits, 10)
    images = digits.references.decode()
    got = extractor(images).features.flip(1).numpy()
    expected = PCA(10, svd_solver="full").fit_transform(images.flatten(1).double().numpy())
    signs = np.sign((got * expected).sum(0))
    np.testing.assert_allclose(got, signs * expected, atol=1e-9)
    assert extractor.name == "10 principal components of digits"
    with pytest.raises(ValueError, match=r"count must lie in 1\.\.64, .* got 65"):
        PrincipalComponents(digits, 65)


def plain_convolution(image, weights):
    """[C, H, W] and [K, C, 3, 3], by definition, in plain NumPy."""
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1)))
    H, W = image.shape[1:]
    windows = np.stack([padded[:, i : i + H, j : j + W] for i in range(3) for j in range(3)])
    kernel = weights.reshape(*weights.shape[:2], 9).transpose(2, 1, 0)  # [9, C, K]
    return np.einsum("ochw,ock->khw", windows, kernel)


def test_convolutions_by_their_definition():
    C, K = 3, 5
    raw = np.random.PCG64(2).random_raw(1 + 9 * K * (C + K) // 64)
    # Byte after byte, each from its highest bit.
    octets = b"".join(int(word).to_bytes(8, "little") for word in raw)
    bits = [octet >> (7 - place) & 1 for octet in octets for place in range(8)]
    signs = 2.0 * np.array(bits) - 1
    first = signs[: 9 * K * C].reshape(K, C, 3, 3) / np.sqrt(9 * C)
    second = signs[9 * K * C : 9 * K * (C + K)].reshape(K, K, 3, 3) / np.sqrt(9 * K)
    images = np.random.default_rng(0).uniform(-1, 1, (2, C, 8, 6))
    got = Convolutions(C, K, seed=2)(torch.from_numpy(images).float()).features
    for image, row in zip(images, got.numpy(), strict=True):
        one = np.maximum(plain_convolution(image, first), 0)
        half = one.reshape(K, 4, 2, 3, 2).mean((2, 4))
        two = np.maximum(plain_convolution(half, second), 0)
        np.testing.assert_allclose(row, [*one.mean((1, 2)), *two.mean((1, 2))], rtol=1e-5)


def test_convolutions_have_fair_signs_that_follow_the_seed():
    extractor = Convolutions(3)
    signs = torch.cat([extractor._first.sign().flatten(), extractor._second.sign().flatten()])
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(signs.mean()) < 4 / len(signs) ** 0.5
    assert torch.equal(Convolutions(3)._second, extractor._second)
    assert not torch.equal(Convolutions(3, seed=1)._second, extractor._second)
    assert extractor.name == "64 + 64 random convolutions, seed 0"


def test_convolutions_take_images_of_their_channels():
    with pytest.raises(ValueError, match=r"images must be \[m, 3, H, W\], got \[2, 1, 8, 8\]"):
        Convolutions(3)(torch.zeros(2, 1, 8, 8))


def test_classes_are_learnt(digits):
    extractor = Classified(Pixels(), digits)
    found = features.of_data(extractor, digits)
    assert found.logits.shape == (1797, 10)
    right = found.logits.argmax(1) == digits.references.labels
    assert right.double().mean() > 0.99  # of the digits it was fitted to
    assert torch.equal(found.features, digits.references.decode().flatten(1))
    assert extractor.name == "pixels, softmax regression on digits"


def test_two_classes_are_learnt():
    patches = data.load("patches", size=64)
    found = features.of_data(Classified(Convolutions(3), patches), patches)
    assert found.logits.shape == (len(patches), 2)
    right = found.logits.argmax(1) == patches.references.labels
    assert right.double().mean() > 0.95


def test_a_constant_feature_does_no_harm(digits):
    """The corners of digits are empty everywhere."""
    assert digits.references.decode().flatten(1).std(0).min() == 0
    assert Classified(Pixels(), digits)(torch.ones(1, 1, 8, 8)).logits.isfinite().all()


def test_classes_are_needed():
    with pytest.raises(ValueError, match="data must have classes, got digits"):
        Classified(Pixels(), data.load("digits", labels="none"))


@pytest.fixture
def fidelity(monkeypatch):
    """A stand-in for torch-fidelity, which takes the same arguments; what it is given is kept."""
    calls = types.SimpleNamespace(made=None, images=[])

    class Extractor(torch.nn.Module):
        def __init__(self, name, features_list, feature_extractor_weights_path):
            super().__init__()
            calls.made = name, features_list, feature_extractor_weights_path

        def forward(self, x):
            calls.images.append(x)
            return x.flatten(1).float(), x.flatten(1).float()[:, :4]

    package = types.ModuleType("torch_fidelity")
    package.__version__ = "9.9"
    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = Extractor
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


def test_inception_is_given_bytes_in_colour(fidelity, tmp_path):
    weights = tmp_path / "weights.pth"
    torch.save({"a": torch.zeros(1)}, weights)
    extractor = Inception(weights)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert extractor.name == f"Inception-v3 of torch-fidelity 9.9, weights {digest[:8]}"
    assert fidelity.made == ("inception-v3-compat", ["2048", "logits_unbiased"], str(weights))
    pixels = torch.arange(256, dtype=torch.uint8).reshape(2, 1, 16, 8)
    found = extractor(pixels.float() / 127.5 - 1)
    assert isinstance(found, Features)
    assert fidelity.images[0].dtype == torch.uint8
    assert torch.equal(fidelity.images[0], pixels.expand(2, 3, 16, 8))
    assert found.logits.shape == (2, 4)
    with pytest.raises(ValueError, match=r"images must be \[m, 1 or 3, H, W\], got \[2, 64\]"):
        extractor(torch.zeros(2, 64))


def test_inception_of_torch_fidelity(tmp_path, monkeypatch):
    """The real network, of random weights, against torch-fidelity's own use of it."""
    pytest.importorskip("torch_fidelity")
    from torch_fidelity import feature_extractor_inceptionv3 as module

    network = module.FeatureExtractorInceptionV3
    names = ["2048", "logits_unbiased"]
    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr(network, "load_state_dict", lambda *_: None)
        patch.setattr(module.torch, "load", lambda *_, **__: None)
        model = network("n", names, feature_extractor_weights_path="none")
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    found = Inception(tmp_path / "weights.pth")(pixels.float() / 127.5 - 1)
    expected = model(pixels)
    assert torch.equal(found.features, expected[0])
    assert torch.equal(found.logits, expected[1])
    assert found.features.shape == (2, 2048)


def test_weights_run_nothing(fidelity, tmp_path):
    """torch-fidelity would unpickle whatever the file names."""
    weights = tmp_path / "weights.pth"
    ran = tmp_path / "ran"

    class Harm:
        def __reduce__(self):
            return Path.touch, (ran,)

    torch.save({"a": Harm()}, weights)
    with pytest.raises(ValueError, match=r"weights must be a file of tensors, got .*weights\.pth"):
        Inception(weights)
    assert fidelity.made is None
    assert not ran.exists()
    torch.load(weights, weights_only=False)
    assert ran.exists()


@pytest.mark.parametrize("content", [b"", b"abc", b"PK\x03\x04"])
def test_weights_that_are_none(fidelity, tmp_path, content):
    (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"weights must be a file of tensors, got .*weights\.pth"):
        Inception(tmp_path / "weights.pth")


def test_no_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"weights must be torch-fidelity's .*there is no"):
        Inception(tmp_path / "weights.pth")


def test_without_torch_fidelity(tmp_path, monkeypatch):
    (tmp_path / "weights.pth").touch()
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match=r"pip install 'stf-kernels\[eval\]'"):
        Inception(tmp_path / "weights.pth")
