"""Every argument of the face and all that it takes."""

from __future__ import annotations

import math

import helpers
import pytest
import torch
from helpers import byte_values
from torch import Tensor

import stf_kernels
from stf_kernels import (
    BackendUnavailable,
    References,
    backends,
    stable_target,
    stable_target_with_stats,
    validate,
)

DATA = helpers.random_bytes(6, 3, 8, 8)
FLOATS = byte_values(DATA).float()
LABELS = torch.tensor([0, 0, 1, 1, 2, 2])
REFS = References(DATA, value_range=(-1, 1), labels=LABELS)
X = torch.randn(4, 3, 8, 8, generator=helpers.generator(1))


def ones(*shape: int, **options) -> Tensor:
    return torch.ones(*shape, **options)


@pytest.mark.parametrize("name", ["sigma", "alpha"])
@pytest.mark.parametrize(
    "shape", [(), (4,), (4, 1), (4, 1, 1, 1)], ids=["scalar", "[B]", "[B, 1]", "[B, 1, 1, 1]"]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.int64])
def test_a_noise_level_may_have_any_shape_and_type(name, shape, dtype, backend):
    value = torch.full(shape, 2, dtype=dtype)
    call = {"sigma": 1.0, "alpha": 1.0, name: 2.0}
    by_number = stable_target(X, REFS, call["sigma"], alpha=call["alpha"], backend=backend)
    call[name] = value
    by_tensor = stable_target(X, REFS, call["sigma"], alpha=call["alpha"], backend=backend)
    assert torch.equal(by_tensor, by_number)


def test_numbers_may_be_integers():
    assert torch.equal(stable_target(X, REFS, 2, alpha=1), stable_target(X, REFS, 2.0, alpha=1.0))


STRIDED = {
    "strided": lambda t: t.repeat_interleave(3, 0)[1::3],
    "reversed twice": lambda t: t.flip(0).contiguous().flip(0),
    "a column": lambda t: torch.stack([t, t], 1)[:, 0],
}


@pytest.mark.parametrize("layout", STRIDED)
@pytest.mark.parametrize("name", ["sigma", "alpha", "log_weight", "labels"])
def test_the_layout_of_vectors_does_not_matter(name, layout, backend):
    call = {
        "sigma": torch.tensor([0.5, 1.0, 4.0, 9.0]),
        "alpha": torch.tensor([0.2, 0.5, 0.7, 1.0]).double(),
        "log_weight": torch.randn(6, generator=helpers.generator(2)).double(),
        "labels": torch.tensor([2, 0, -1, 1]),
    }
    expected = stable_target(X, REFS, backend=backend, **call)
    call[name] = STRIDED[layout](call[name])
    assert torch.equal(stable_target(X, REFS, backend=backend, **call), expected)


@pytest.mark.parametrize("layout", STRIDED)
@pytest.mark.parametrize("name", ["labels", "log_weight"])
def test_the_layout_of_the_references_vectors_does_not_matter(name, layout, backend):
    given = {"labels": LABELS, "log_weight": torch.arange(6).double()}
    labels = torch.tensor([2, 0, 1, 1])
    expected, actual = (
        stable_target(
            X, References(DATA, value_range=(-1, 1), **g), 1.0, labels=labels, backend=backend
        )
        for g in (given, given | {name: STRIDED[layout](given[name])})
    )
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", ["sigma", "alpha", "labels"])
def test_an_expanded_vector_is_that_number_for_every_row(name, backend):
    call = {"sigma": ones(4), "alpha": ones(4), "labels": torch.full((4,), 2)}
    value = 2 if name == "labels" else 0.5
    call[name] = torch.full_like(call[name], value)
    expected = stable_target(X, REFS, backend=backend, **call)
    call[name] = torch.tensor(value).expand(4)
    assert torch.equal(stable_target(X, REFS, backend=backend, **call), expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_labels_may_be_any_integer_type(dtype, backend):
    labels = torch.tensor([2, 0, 1, 1])
    refs = References(DATA, value_range=(-1, 1), labels=LABELS.to(dtype))
    expected = stable_target(X, REFS, 1.0, labels=labels, backend=backend)
    actual = stable_target(X, refs, 1.0, labels=labels.to(dtype), backend=backend)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_log_weight_may_be_any_float_type(dtype, backend):
    prior = torch.tensor([0.5, -1.0, 2.0, 0.0, -math.inf, 1.5]).double()  # exact in each
    expected = stable_target(X, REFS, 1.0, log_weight=prior, backend=backend)
    actual = stable_target(X, REFS, 1.0, log_weight=prior.to(dtype), backend=backend)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_result_is_float32_or_the_samples_float64(dtype, backend):
    target = stable_target(X.to(dtype), REFS, 1.0, backend=backend)
    assert target.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    as_float = stable_target(X.to(dtype).float(), REFS, 1.0, backend=backend)
    assert torch.equal(target.float(), as_float)


X_LAYOUTS = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "strided": lambda x: x.repeat_interleave(2, 0)[::2],
    "offset": lambda x: torch.cat([x[:1], x])[1:],
    "reversed twice": lambda x: x.flip(3).contiguous().flip(3),
}


@pytest.mark.parametrize("layout", X_LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_layout_of_samples_does_not_matter(layout, dtype, backend):
    x = X.to(dtype)
    other = X_LAYOUTS[layout](x)
    target = stable_target(other, REFS, 1.0, backend=backend)
    assert target.shape == x.shape
    assert target.is_contiguous()
    assert torch.equal(target, stable_target(x, REFS, 1.0, backend=backend))


def test_an_expanded_sample_gives_equal_rows(backend):
    target = stable_target(X[:1].expand(5, -1, -1, -1), REFS, 1.0, backend=backend)
    assert torch.equal(target, stable_target(X[:1], REFS, 1.0, backend=backend).expand_as(target))


def test_nothing_given_is_written_to(backend):
    given = X.clone(), FLOATS.clone(), ones(4), ones(4) / 2, torch.zeros(6).double()
    x, ref, sigma, alpha, prior = (t.clone() for t in given)
    stable_target_with_stats(x, ref, sigma, alpha=alpha, log_weight=prior, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(given, (x, ref, sigma, alpha, prior), strict=True))


@pytest.mark.parametrize("ref", ["References", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_no_samples_give_an_empty_result(ref, dtype, precision, backend):
    ref = REFS if ref == "References" else FLOATS
    x = torch.empty(0, 3, 8, 8, dtype=dtype)
    for sigma in (1.0, torch.empty(0), torch.empty(0, 1, 1, 1)):
        target, stats = stable_target_with_stats(
            x, ref, sigma, precision=precision, backend=backend
        )
        assert target.shape == (0, 3, 8, 8)
        assert target.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert all(s.shape == (0,) for s in stats)
        assert stats.argmax.dtype == torch.int64
    assert stable_target(x, ref, 1.0, precision=precision, backend=backend).shape == (0, 3, 8, 8)


def test_no_samples_pass_validation_and_labels():
    labels = torch.empty(0, dtype=torch.int64)
    validate(X[:0], REFS, 1.0, labels=labels)
    assert stable_target(X[:0], REFS, 1.0, labels=labels).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 3, 4), (2, 3, 4, 5)])
def test_samples_of_any_number_of_dimensions(shape, backend):
    data = helpers.random_bytes(9, *shape)
    x = torch.randn(3, *shape, generator=helpers.generator(1))
    refs = References(data, value_range=(-1, 1))
    target = stable_target(x, refs, ones(3, *[1] * len(shape)), backend=backend)
    flat = References(data.flatten(1), value_range=(-1, 1))
    assert target.shape == x.shape
    assert torch.equal(target.flatten(1), stable_target(x.flatten(1), flat, 1.0, backend=backend))


def test_validate_changes_nothing(backend):
    options = {"labels": torch.tensor([0, 1, 2, -1]), "backend": backend}
    assert torch.equal(
        stable_target(X, REFS, 1.0, validate=True, **options),
        stable_target(X, REFS, 1.0, **options),
    )


def test_precision_decides_the_digits(backend):
    exact, fast = (
        stable_target(X.double(), REFS, 0.5, precision=p, backend=backend)
        for p in ("exact", "fast")
    )
    assert torch.equal(stable_target(X.double(), REFS, 0.5, backend=backend), exact)
    assert not torch.equal(exact, fast)


def test_auto_takes_the_first_that_runs_and_names_lead_to_their_module(monkeypatch):
    cpu = torch.device("cpu")
    assert backends.resolve("torch", cpu).NAME == "torch"
    monkeypatch.setattr(backends.BACKENDS["cpu"], "unavailable", lambda device: None)
    assert backends.resolve("cpu", cpu).NAME == "cpu"
    assert backends.resolve("auto", cpu).NAME == "cpu"
    monkeypatch.setattr(backends.BACKENDS["cpu"], "unavailable", lambda device: "no compiler")
    assert backends.resolve("auto", cpu).NAME == "torch"


def test_an_unavailable_backend_says_why(monkeypatch):
    monkeypatch.setattr(backends.BACKENDS["cpu"], "unavailable", lambda device: "no compiler")
    assert torch.equal(stable_target(X, REFS, 1.0), stable_target(X, REFS, 1.0, backend="torch"))
    for ref in (REFS, FLOATS):
        with pytest.raises(BackendUnavailable, match=r"'cpu' cannot run on cpu: no compiler"):
            stable_target(X, ref, 1.0, backend="cpu")


def test_validation_passes_what_has_a_target():
    validate(X, REFS, 1.0)
    validate(X, FLOATS, ones(4, 1, 1, 1), alpha=ones(4) * 0)
    validate(
        X,
        REFS,
        1e-3,
        labels=torch.tensor([-1, 0, 1, -1]),
        log_weight=torch.tensor([0.0, -math.inf, 0.0, 0.0, -math.inf, -math.inf]),
    )


def test_everything_public_is_there():
    for name in stf_kernels.__all__:
        assert getattr(stf_kernels, name) is not None
