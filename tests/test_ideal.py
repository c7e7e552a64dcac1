"""`IdealDenoiser`: a network's interface around the exact posterior mean."""

from __future__ import annotations

import copy
import itertools
import pickle

import helpers
import pytest
import torch
from helpers import HALF_ULP64, byte_values, denoised_bound
from sklearn.datasets import load_digits
from torch import Tensor

from stf_kernels import IdealDenoiser, References, nearest, oracle, stable_target
from stf_train.sample import heun, seeded, sigma_steps


@pytest.fixture(scope="module")
def digits() -> References:
    images, labels = load_digits(return_X_y=True)
    data = torch.from_numpy(images).to(torch.uint8).view(-1, 1, 8, 8)
    return References(data, value_range=(-1, 1), levels=17, labels=torch.from_numpy(labels))


def last(denoise: object, seeds: range, **options: float) -> Tensor:
    """Where Heun's method ends with this denoiser, float64 [len(seeds), 1, 8, 8]."""
    *_, end = heun(denoise, seeded(seeds, (1, 8, 8)), sigma_steps(**options))
    return end.x


# The last step is D, where one digit has all of the weight, but for x - sigma ((x - D) / sigma):
# three roundings of each of 64 values below 1.
AT = 3 * 8 * HALF_ULP64


def test_a_sampler_ends_on_references(digits, backend):
    samples = last(IdealDenoiser(digits, backend=backend), range(24))
    found = nearest(samples, digits)
    assert bool((found.distance <= AT).all())
    assert len(found.index.unique()) > 12


def test_a_sampler_with_labels_ends_on_references_of_the_class(digits, backend):
    ideal, labels = IdealDenoiser(digits, backend=backend), torch.arange(20) % 10
    samples = last(lambda x, sigma: ideal(x, sigma, labels), range(20))
    found = nearest(samples, digits)
    assert bool((found.distance <= AT).all())
    assert torch.equal(digits.labels[found.index], labels)


def test_two_references_are_a_hyperbolic_tangent(precision, backend):
    """y = +mu, -mu: D = mu tanh(x mu / sigma^2 + difference of log weights / 2)."""
    mu = torch.tensor([1.0, -0.5, 0.25], dtype=torch.float64)
    weight = torch.tensor([0.3, -0.9], dtype=torch.float64)
    refs = References(torch.stack([mu, -mu]), log_weight=weight)
    x = torch.linspace(-2, 2, 31, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.3, -1])
    for sigma in (0.3, 1.0, 10.0):
        actual = IdealDenoiser(refs, precision=precision, backend=backend)(x, sigma)
        expected = torch.tanh(x @ mu / sigma**2 + 0.6)[:, None] * mu
        bound = denoised_bound(x, torch.stack([mu, -mu]), sigma, 1.0, weight, precision=precision)
        helpers.assert_rows_within(actual, expected, bound + 8 * HALF_ULP64)


def test_it_is_the_denoised_target_however_sigma_comes(digits, precision, backend):
    x = digits.decode(torch.arange(5)) + 0.5 * torch.randn(5, 1, 8, 8)
    ideal = IdealDenoiser(digits, precision=precision, backend=backend)
    options = {"target": "denoised", "precision": precision, "backend": backend}
    expected = stable_target(x, digits, 0.5, **options)
    sigmas = [0.5, torch.tensor(0.5), torch.full((5,), 0.5), torch.full((5, 1, 1, 1), 0.5)]
    for sigma in sigmas:
        assert torch.equal(ideal(x, sigma), expected)
    labels = torch.tensor([0, 1, 2, -1, 3])
    assert torch.equal(
        ideal(x, 0.5, labels=labels), stable_target(x, digits, 0.5, labels=labels, **options)
    )
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        out = ideal(x.to(dtype), 0.5)
        assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(out, stable_target(x.to(dtype), digits, 0.5, **options))


def test_student_t_noise(backend):
    data = helpers.photograph_patches(30, 8)
    y = byte_values(data)
    x = helpers.noisy(y[:6], 0.4)
    refs = References(data, value_range=(-1, 1))
    ideal = IdealDenoiser(refs, noise="student_t", D=32, backend=backend)
    bound = denoised_bound(x, y, 0.4, D=32.0, precision="exact")
    expected = oracle.denoised(x, y, 0.4, D=32.0)
    helpers.assert_rows_within(ideal(x.double(), 0.4), expected, bound)
    assert "noise='student_t', D=32" in repr(ideal)


def test_a_workspace_reaches_the_call(digits):
    x = torch.zeros(3, 1, 8, 8)
    with pytest.raises(ValueError, match="workspace must be at least"):
        IdealDenoiser(digits, workspace=1)(x, 1.0)


def test_it_has_nothing_to_train_and_gives_no_gradient(digits):
    ideal = IdealDenoiser(digits)
    assert list(ideal.state_dict()) == list(ideal.parameters()) == list(ideal.buffers()) == []
    x = torch.zeros(2, 1, 8, 8, requires_grad=True)
    assert not ideal(x, 1.0).requires_grad
    ideal.load_state_dict({})
    assert not ideal.eval().training


def test_conversions_move_the_references_but_never_change_them(digits):
    ideal = IdealDenoiser(digits)
    x, before = torch.zeros(2, 1, 8, 8), digits
    for convert in (ideal.half, ideal.double, ideal.bfloat16, ideal.float, ideal.cpu):
        assert convert() is ideal
        assert ideal.refs is before
    assert ideal.to(torch.float64).refs is before
    assert ideal(x, 1.0).dtype == torch.float32
    inside = torch.nn.Sequential(ideal).to("meta")
    assert inside[0].refs.device.type == "meta"
    assert before.device.type == "cpu"


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_give_the_same_bits(digits, way):
    x = torch.randn(4, 1, 8, 8, generator=helpers.generator(0))
    ideal = IdealDenoiser(digits, precision="fast")
    other = way(ideal)
    assert other.refs is not ideal.refs
    assert other.precision == "fast"
    assert torch.equal(other(x, 0.7), ideal(x, 0.7))


def test_compiles_as_one_graph_to_the_same_bits(digits, precision, backend):
    torch._dynamo.reset()
    ideal = IdealDenoiser(digits, precision=precision, backend=backend)
    compiled = torch.compile(ideal, fullgraph=True, backend="aot_eager")
    labels = torch.tensor([0, 1, -1])
    x = torch.randn(3, 1, 8, 8, generator=helpers.generator(1))
    for sigma, given in itertools.product((0.4, torch.tensor([0.1, 1, 10])), (None, labels)):
        assert torch.equal(compiled(x, sigma, given), ideal(x, sigma, given))


@pytest.mark.parametrize("refs", [torch.zeros(3, 4), None])
def test_references_are_asked_for(refs):
    with pytest.raises(TypeError, match="refs must be References, got"):
        IdealDenoiser(refs)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"noise": "laplace"}, "noise must be 'gaussian' or 'student_t', got 'laplace'"),
        ({"noise": "student_t"}, "D, the degrees of freedom, must be given with"),
        ({"D": 4}, "D is for noise='student_t', got noise='gaussian'"),
        ({"noise": "student_t", "D": -1.0}, "D must be a number > 0, got -1.0"),
        ({"noise": "student_t", "D": "4"}, "D must be a number > 0, got '4'"),
        ({"precision": "half"}, "precision must be 'exact' or 'fast', got 'half'"),
        ({"backend": "gpu"}, "backend must be one of 'auto', .*, got 'gpu'"),
        ({"workspace": 0}, "workspace must be a number of bytes >= 1, got 0"),
    ],
    ids=str,
)
def test_options_are_checked_before_the_first_call(options, words):
    refs = References(torch.zeros(2, 3, dtype=torch.uint8), value_range=(0, 1))
    with pytest.raises(ValueError, match=f"^{words}"):
        IdealDenoiser(refs, **options)
