"""The CUDA backend around its kernels: where it runs, which kernels, how much memory."""

from __future__ import annotations

import types

import pytest
import torch
from helpers import Allocated

from stf_kernels import BackendUnavailable, cuda_backend, gpu_layout, stable_target
from stf_kernels import arithmetic as ar
from stf_kernels import torch_backend as spec
from stf_kernels.backends import BACKENDS, PREFERENCE
from stf_kernels.stages import Prepared, Samples

GPU = torch.device("cuda", 0)
NOT_BUILT = "nvcc was not there"


@pytest.fixture
def world(monkeypatch):
    """An extension and a GPU to be set, where the backend asks for them."""
    world = types.SimpleNamespace(
        extension=types.SimpleNamespace(
            cuda=types.SimpleNamespace(processors=lambda device: 132),
            cuda_architectures="80 90a",
            cuda_absent=NOT_BUILT,
        ),
        capability=(9, 0),
        available=True,
    )
    monkeypatch.setattr(cuda_backend, "extension", lambda: world.extension)
    monkeypatch.setattr(cuda_backend, "absence", "no such file")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: world.available)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: world.capability)
    return world


def test_it_runs_where_its_code_does(world):
    assert cuda_backend.unavailable(GPU) is None


def test_every_obstacle_is_named(world, monkeypatch):
    def reason(device: torch.device = GPU) -> str:
        found = cuda_backend.unavailable(device)
        assert found is not None
        return found

    def old_driver(device: int) -> int:
        raise RuntimeError("cudaErrorInsufficientDriver")

    assert reason(torch.device("cpu")) == "it needs an NVIDIA GPU"
    world.extension.cuda.processors = old_driver
    assert reason() == "CUDA cannot use the device (cudaErrorInsufficientDriver)"
    world.capability = (7, 5)
    assert reason() == "it needs compute capability 8.0 or later, got 7.5"
    world.capability, world.extension.cuda_architectures = (12, 0), "80-real 90a"
    assert reason() == (
        "it was built for sm_80-real, sm_90a, none of which runs on compute capability 12.0"
    )
    world.available = False
    assert reason() == "torch sees no CUDA device"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert reason() == "it needs an NVIDIA GPU"
    world.extension.cuda_architectures = ""
    assert reason() == f"the CUDA part of the extension is not built: {NOT_BUILT}"
    world.extension = None
    assert reason() == "the extension stf_kernels._C is not importable (no such file)"


def test_the_reason_reaches_the_caller():
    with pytest.raises(BackendUnavailable, match="'cuda' cannot run on cpu: it needs an NVIDIA"):
        stable_target(torch.zeros(1, 1), torch.zeros(1, 1), 1.0, backend="cuda")


@pytest.mark.parametrize(
    ("architecture", "runs", "does_not"),
    [
        ("80", [(8, 0), (8, 6), (9, 0), (12, 0)], [(7, 5)]),
        ("86", [(8, 6), (8, 9), (10, 0)], [(8, 0)]),
        ("80-real", [(8, 0), (8, 9)], [(9, 0)]),
        ("86-real", [(8, 7)], [(8, 0), (12, 0)]),
        ("80-virtual", [(8, 0), (9, 0)], [(7, 5)]),
        ("90a", [(9, 0)], [(8, 0), (10, 0)]),
        ("90a-real", [(9, 0)], [(10, 0)]),
        ("100f", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        ("100", [(10, 3), (12, 0)], [(9, 0)]),
    ],
)
def test_what_code_for_an_architecture_runs_on(architecture, runs, does_not):
    assert all(cuda_backend.code_runs(architecture, capability) for capability in runs)
    assert not any(cuda_backend.code_runs(architecture, capability) for capability in does_not)


def test_auto_does_not_take_what_was_not_measured():
    assert BACKENDS["cuda"] is cuda_backend
    assert all("cuda" not in names for names in PREFERENCE.values())


@pytest.mark.parametrize("product", cuda_backend.PRODUCTS)
def test_which_kernel_a_product_runs(monkeypatch, product):
    capability = [cuda_backend.HOPPER]
    monkeypatch.setattr(cuda_backend, "capability", lambda device: capability[0])

    def hopper(choice: str, taken: bool) -> bool:
        monkeypatch.setitem(cuda_backend.PRODUCTS, product, choice)
        return cuda_backend.on_hopper(product, GPU, taken)

    assert cuda_backend.PRODUCTS[product] == "auto"
    assert hopper("auto", True)
    assert not hopper("auto", False)
    assert not hopper("portable", True)
    assert hopper("hopper", True)
    with pytest.raises(ValueError, match="does not take"):
        hopper("hopper", False)
    with pytest.raises(ValueError, match="must be 'auto', 'portable' or 'hopper', got 'fast'"):
        hopper("fast", True)
    for other in ((8, 0), (10, 0), (12, 0)):
        capability[0] = other
        assert not hopper("auto", True)


class NoKernels:
    """Functions that compute nothing."""

    def __getattr__(self, name: str) -> object:
        return lambda *arguments: False


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("limbs", [1, 3])
@pytest.mark.parametrize("shape", [(1, 1, 1), (40, 300, 130), (5, 129, 1)], ids=str)
def test_the_stages_allocate_no_more_than_they_say(monkeypatch, shape, limbs, precision):
    monkeypatch.setattr(cuda_backend, "_functions", NoKernels)
    rows, n, dim = shape
    x = torch.randn(rows, dim)
    values, norms, scale = spec.prepare(torch.randn(n, dim), limbs)
    refs = Prepared(values, norms, torch.stack([scale, scale]), None, None)
    digits = torch.zeros(ar.NORM_LIMBS, n, 1, dtype=torch.int8)
    with Allocated() as allocated:
        q, step = cuda_backend.quantize(x, ar.LIMBS[precision])
        samples = Samples(x, q, step, step, step, step, None)
        relative, anchors = cuda_backend.logits(samples, refs)
        weights = cuda_backend.weights(relative, anchors, step, precision, True)
        cuda_backend.weighted_sum(weights, values)
        cuda_backend.weighted_sum(weights, digits)
    promised = cuda_backend.workspace(rows, n, dim, limbs, ar.LIMBS[precision])
    rounded_up = gpu_layout.ROUNDED_UP
    assert promised - 2 * rounded_up < allocated.bytes <= promised - rounded_up
    assert len(allocated.seen) <= rounded_up // 512
