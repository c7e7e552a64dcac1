"""The operators inside PyTorch: compile, fake tensors, autograd, autocast, threads."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import helpers
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import get_compilation_metrics
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from stf_kernels import EDM, References, Velocity, stable_target, stable_target_with_stats

DATA = helpers.random_bytes(150, 3, 8, 8)
FLOATS = helpers.byte_values(DATA[:20]).float()
REFS = References(
    DATA,
    value_range=(-1, 1),
    labels=torch.arange(150) % 3,
    log_weight=torch.randn(150, generator=helpers.generator(2)),
)
LABELS = torch.tensor([0, -1, 2, 1])
X = 3 * torch.randn(4, 3, 8, 8, generator=helpers.generator(1))
SIGMA = torch.tensor([0.1, 1.0, 5.0, 50.0])

# Calls that between them reach every argument; the references are captured, as in a training step.
CALLS: dict[str, Callable[..., Tensor | tuple]] = {
    "bytes": lambda x, s, **o: stable_target(x, REFS, s, **o),
    "floats": lambda x, s, **o: stable_target(x, FLOATS, s, **o),
    "labels": lambda x, s, **o: stable_target(x, REFS, s, labels=LABELS, **o),
    "log_weight": lambda x, s, **o: stable_target(x, REFS, s, log_weight=-REFS.log_weight, **o),
    "alpha": lambda x, s, **o: stable_target(x, REFS, s, alpha=0.5, target="v", **o),
    "velocity": lambda x, s, **o: stable_target(x, REFS, s, alpha=1 - s, target="velocity", **o),
    "path": lambda x, s, **o: stable_target(x, REFS, s, target=Velocity(s, 1.0), **o),
    "edm": lambda x, s, **o: stable_target(x, REFS, s, target=EDM(0.7), **o),
    "subset": lambda x, s, **o: stable_target(x, REFS.subset(torch.arange(40)), s, **o),
    "stats": lambda x, s, **o: stable_target_with_stats(x, REFS, s, **o),
}


def flat(result: Tensor | tuple) -> list[Tensor]:
    """The tensors of a target, or of a target with its statistics."""
    return [result] if isinstance(result, Tensor) else [result[0], *result[1]]


def assert_same(one: Tensor | tuple, other: Tensor | tuple) -> None:
    pairs = list(zip(flat(one), flat(other), strict=True))
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


class Operators(TorchDispatchMode):
    """Records the package's operators as they are called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "stf_kernels":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["bytes", "floats", "labels", "path", "stats"])
def test_operators_pass_opcheck(name, backend):
    with Operators() as operators:
        CALLS[name](X, SIGMA, backend=backend)
    assert len(operators.calls) == (2 if name == "floats" else 1)
    for func, args, kwargs in operators.calls:
        torch.library.opcheck(func, args, kwargs)


@pytest.mark.parametrize("name", CALLS)
def test_compiles_as_one_graph_to_the_same_bits(name, precision, backend):
    options = {"precision": precision, "backend": backend}
    compiled = torch.compile(
        lambda x, s: CALLS[name](x, s, **options), fullgraph=True, backend="aot_eager"
    )
    assert_same(compiled(X, SIGMA), CALLS[name](X, SIGMA, **options))


@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
def test_inductor_compiles_a_training_loss(backend):
    """The target between operations that are fused around it, and their gradient."""

    def loss(weight: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        target = stable_target(x * 2, REFS, sigma, target="epsilon", backend=backend)
        return ((x * weight - target) ** 2).mean()

    gradients = []
    for step in (loss, torch.compile(loss, fullgraph=True)):
        weight = torch.ones(3, 8, 8, requires_grad=True)
        step(weight, X, SIGMA).backward()
        gradients.append(weight.grad)
    # Fused or not, a value is the mean of four 2 x (x w - target), each rounded a few times.
    target = stable_target(X * 2, REFS, SIGMA, target="epsilon", backend=backend)
    largest = float((2 * X.abs() * (X.abs() + target.abs())).max()) / X[0].numel()
    slack = 16 * helpers.HALF_ULP32 * largest
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=slack)


@pytest.mark.parametrize("name", ["bytes", "floats", "velocity", "stats"])
def test_a_dynamic_batch_does_not_compile_again(name, backend):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda x, s: CALLS[name](x, s, backend=backend),
        fullgraph=True,
        dynamic=True,
        backend=counter,
    )
    for rows in (4, 3, 2):
        part = X[:rows].clone(), SIGMA[:rows].clone()
        assert_same(compiled(*part), CALLS[name](*part, backend=backend))
        if rows == 4:
            graphs = counter.frame_count
    assert counter.frame_count == graphs > 0


def test_compiled_code_looks_at_no_label(backend):
    """Eager calls name a class that has no reference; compiled ones make its row NaN, alone."""
    labels = torch.tensor([0, -1, 7, 1])
    compiled = torch.compile(
        lambda x, labels: stable_target(x, REFS, 1.0, labels=labels, backend=backend),
        fullgraph=True,
        backend="aot_eager",
    )
    target = compiled(X, labels)
    others = [0, 1, 3]
    assert bool(target[2].isnan().all())
    expected = stable_target(X[others], REFS, 1.0, labels=labels[others], backend=backend)
    assert torch.equal(target[others], expected)


def test_references_may_be_an_argument_of_the_compiled_function(backend):
    compiled = torch.compile(
        lambda x, refs, s: stable_target(x, refs, s, backend=backend),
        fullgraph=True,
        backend="aot_eager",
    )
    other = REFS.subset(torch.arange(100, 150))
    for refs in (REFS, other):
        assert torch.equal(compiled(X, refs, SIGMA), stable_target(X, refs, SIGMA, backend=backend))


# Labels on the CPU are looked at, which fake ones do not allow; compiled code leaves that out.
@pytest.mark.parametrize("name", [name for name in CALLS if name != "labels"])
def test_fake_tensors_have_the_shapes_and_types_of_real_ones(name, backend):
    real = flat(CALLS[name](X, SIGMA, backend=backend))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = flat(CALLS[name](mode.from_tensor(X), mode.from_tensor(SIGMA), backend=backend))
    for a, b in zip(fake, real, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_no_bit(name, dtype, backend):
    expected = CALLS[name](X, SIGMA, backend=backend)
    with torch.autocast("cpu", dtype=dtype):
        assert (X.flatten(1) @ X.flatten(1).T).dtype == dtype  # it is on
        assert_same(CALLS[name](X, SIGMA, backend=backend), expected)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("name", CALLS)
def test_works_without_autograd(name, mode, backend):
    expected = CALLS[name](X, SIGMA, backend=backend)
    with mode():
        assert_same(CALLS[name](X, SIGMA, backend=backend), expected)


def test_references_prepared_in_inference_mode_serve_outside(backend):
    with torch.inference_mode():
        refs = References(DATA, value_range=(-1, 1))
        floats = References(FLOATS)
    for inside, outside in (
        (refs, References(DATA, value_range=(-1, 1))),
        (floats, References(FLOATS)),
    ):
        assert_same(
            stable_target_with_stats(X, inside, SIGMA, backend=backend),
            stable_target_with_stats(X, outside, SIGMA, backend=backend),
        )


def test_targets_are_constants(backend):
    """Whatever requires a gradient among the inputs, none reaches it and none is asked for."""
    inputs = {
        "x": X.clone(),
        "ref": FLOATS.clone(),
        "sigma": SIGMA.clone(),
        "alpha": torch.ones(4),
        "log_weight": torch.zeros(20),
        "sigma_dot": torch.ones(4),
    }
    for tensor in inputs.values():
        tensor.requires_grad_()
    result = stable_target_with_stats(
        inputs["x"],
        inputs["ref"],
        inputs["sigma"],
        alpha=inputs["alpha"],
        log_weight=inputs["log_weight"],
        target=Velocity(-1.0, inputs["sigma_dot"]),
        backend=backend,
    )
    assert not any(t.requires_grad for t in flat(result))
    prediction = torch.ones_like(X, requires_grad=True)
    ((prediction - result[0]) ** 2).sum().backward()
    assert torch.equal(prediction.grad, 2 * (1 - result[0]))
    assert all(t.grad is None for t in inputs.values())


def test_references_of_data_that_require_a_gradient_are_constants(backend):
    refs = References(
        FLOATS.clone().requires_grad_(), log_weight=torch.zeros(20, requires_grad=True)
    )
    assert not refs.decode().requires_grad
    assert not refs.log_weight.requires_grad
    assert not stable_target(X, refs, SIGMA, backend=backend).requires_grad


@pytest.mark.parametrize("name", CALLS)
def test_the_number_of_threads_changes_no_bit(name, backend, num_threads):
    expected = CALLS[name](X, SIGMA, backend=backend)
    for threads in (2, 5):
        num_threads(threads)
        assert_same(CALLS[name](X, SIGMA, backend=backend), expected)


def test_calls_from_several_threads_do_not_meet(backend):
    expected = [CALLS["stats"](X * k, SIGMA, backend=backend) for k in range(1, 9)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            results = pool.map(lambda k: CALLS["stats"](X * k, SIGMA, backend=backend), range(1, 9))
            for actual, own in zip(results, expected, strict=True):
                assert_same(actual, own)


@pytest.mark.parametrize("name", CALLS)
def test_the_default_type_changes_no_bit(name, backend):
    expected = CALLS[name](X, SIGMA, backend=backend)
    torch.set_default_dtype(torch.float64)
    try:
        assert_same(CALLS[name](X, SIGMA, backend=backend), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_deterministic_mode_has_nothing_to_refuse(backend):
    expected = CALLS["stats"](X, SIGMA, backend=backend)
    torch.use_deterministic_algorithms(True)
    try:
        assert_same(CALLS["stats"](X, SIGMA, backend=backend), expected)
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_global_random_state_is_left_alone(backend):
    before = torch.get_rng_state()
    CALLS["stats"](X, SIGMA, backend=backend)
    References(FLOATS)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_compiler_stays_out_of_the_operators(backend):
    def call(x: Tensor, s: Tensor) -> tuple:  # looks at values: no graph holds the operator
        return stable_target_with_stats(x, REFS, s, backend=backend, validate=True)

    assert_same(torch.compile(call, backend="eager")(X, SIGMA), call(X, SIGMA))
    compiled = {Path(m.co_filename).name for m in get_compilation_metrics() if m.co_filename}
    assert "target.py" in compiled  # which calls the operator
    inside = {"pipeline.py", "stages.py", "statistics.py", f"{backend}_backend.py"}
    assert not compiled & inside


def test_a_call_does_not_import_the_compiler():
    code = """
import sys, torch
from stf_kernels import stable_target
stable_target(torch.randn(2, 3), torch.randn(5, 3), 0.5)
print("torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
