"""Every backend returns the specification's bits; the specification is MATH.md read twice."""

from __future__ import annotations

import math

import helpers
import plain_spec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stf_kernels import (
    References,
    Velocity,
    cpu_products,
    golden,
    parameterization,
    stable_target,
    stable_target_with_stats,
    torch_backend,
)
from stf_kernels import arithmetic as ar
from stf_kernels import cpu_backend as cpu
from stf_kernels.stages import Queries, Stages

needs_extension = pytest.mark.skipif(
    cpu.extension() is None, reason="the extension stf_kernels._C is not built"
)
SHAPES = [  # B, n, d
    (1, 1, 1),
    (3, 2, 1),
    (1, 127, 5),
    (2, 129, 64),
    (33, 1000, 100),
    (7, 700, 3072),
    (300, 40, 17),
    (9, 1025, 33),
    (2, 200, 49_152),
]


def assert_same_bits(a: torch.Tensor, b: torch.Tensor) -> None:
    """Equal types, NaN in the same places, and every other value equal with its sign of zero."""
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    assert torch.equal(a.isnan(), b.isnan())
    assert torch.equal(a.nan_to_num(), b.nan_to_num())
    assert torch.equal(torch.signbit(a.nan_to_num()), torch.signbit(b.nan_to_num()))


LEVELS = [0.5, 80.0, 2e-3, 1e-200, 1e200, 0.0, -1.0, math.inf, math.nan, 3.0, 0.25, 1.0]
ALPHAS = [1.0, 0.0, -0.0, -2.0, 1e-300, 0.5, 0.5, 0.5, 0.5, math.nan, math.inf, 0.3]


def assert_same_coefficients(
    stages: Stages, kind: str, dtype: torch.dtype, student: bool, distances: bool, more: int = 0
) -> None:
    """A backend's coefficients are the specification's, over all that sigma, alpha and D may be.

    Args:
        more: rows of ordinary levels
    """
    torch.manual_seed(5)
    levels, alphas = [*LEVELS, *torch.rand(more).tolist()], [*ALPHAS, *torch.rand(more).tolist()]
    rows, limbs = len(levels), 3 if distances else 4
    x = (torch.randn(rows, 301, dtype=torch.float64) * torch.logspace(-9, 9, rows)[:, None]).to(
        dtype
    )
    x[10, 7] = math.nan
    x[11] = 0
    sigma, alpha = (torch.tensor(v, dtype=torch.float64) for v in (levels, alphas))
    freedom = torch.tensor([128.0, 0.5, 1e9, 0.0, -3.0, math.nan], dtype=torch.float64)
    freedom = freedom.repeat(rows // 6 + 1)[:rows]
    given = torch.randn(2, rows, dtype=torch.float64).abs()
    parameters = tuple(given[: {"velocity": 2, "edm": 1}.get(kind, 0)])
    queries = Queries(x, sigma, alpha, freedom if student else None, None, kind, parameters)
    affine = torch.tensor([1 / 127.5, 0.7], dtype=torch.float64)
    expected, found = (
        s.coefficients(queries, *s.quantize(x, limbs), affine, distances)
        for s in (torch_backend, stages)
    )
    assert (found.distance is None) == (not student and not distances)
    assert (found.student is None) == (not student)
    for name in ("slope", "curvature", "c_D", "c_x", "distance"):
        a, b = getattr(found, name), getattr(expected, name)
        if a is not None:
            assert_same_bits(a, b)
    for a, b in zip(found.student or (), expected.student or (), strict=True):
        assert_same_bits(a, b)


def assert_backends_agree(*args: object, **options: object) -> None:
    spec = stable_target_with_stats(*args, backend="torch", **options)
    mine = stable_target_with_stats(*args, backend="cpu", **options)
    assert_same_bits(spec[0], mine[0])
    for name, a, b in zip(spec[1]._fields, spec[1], mine[1], strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num()), name
    assert_same_bits(spec[0], stable_target(*args, backend="cpu", **options))


def near_duplicates(n: int, dim: int) -> torch.Tensor:
    """uint8 [n, dim] in which every image of the first quarter comes back a little changed."""
    u = torch.randint(0, 256, (n, dim))
    base = max(1, n // 4)
    copies = u[torch.arange(n) % base] + torch.randint(-2, 3, (n, dim))
    return torch.where(torch.rand(n, 1) < 0.5, copies, u).clamp(0, 255).to(torch.uint8)


def problem(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Noisy samples, bytes, and sigma from .002 to 80."""
    rows, n, dim = shape
    u = near_duplicates(n, dim)
    sigma = torch.logspace(math.log10(0.002), math.log10(80), rows, dtype=torch.float64)
    y = u.double()[torch.arange(rows) % n] / 127.5 - 1
    x = y + sigma[:, None] * torch.randn(rows, dim, dtype=torch.float64)
    return x.to(dtype), u, sigma


@needs_extension
@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cpu_equals_specification_on_bytes(shape, precision):
    torch.manual_seed(0)
    x, u, sigma = problem(shape, torch.float32)
    refs = References(u, value_range=(-1, 1))
    assert_backends_agree(x, refs, sigma, precision=precision)


@needs_extension
@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("limbs", [None, 1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_cpu_equals_specification_on_floats(dtype, limbs, precision):
    torch.manual_seed(1)
    x, u, sigma = problem((20, 333, 120), torch.float64)
    y = ((u.double() - 90) / 70).to(dtype)
    ref = y if limbs is None else References(y, limbs=limbs)
    assert_backends_agree(x.to(dtype), ref, sigma, target="denoised", precision=precision)


@needs_extension
@pytest.mark.parametrize("target", ["score", "denoised", "epsilon", "v", "edm", Velocity(1, -1)])
def test_cpu_equals_specification_with_every_argument(target):
    torch.manual_seed(2)
    x, u, sigma = problem((40, 600, 75), torch.float32)
    weight = torch.where(torch.rand(600) < 0.2, -torch.inf, torch.randn(600))
    refs = References(u, value_range=(0, 3), labels=torch.arange(600) % 4, log_weight=weight)
    assert_backends_agree(
        x,
        refs,
        sigma,
        alpha=torch.linspace(-1, 1, 40),
        target=target,
        labels=torch.randint(-1, 4, (40,)),
        log_weight=torch.randn(600),
    )


@needs_extension
@pytest.mark.parametrize("isa", cpu.extension().isas() if cpu.extension() else [])
@pytest.mark.parametrize("distances", [False, True])
@pytest.mark.parametrize("student", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", parameterization.KINDS)
def test_coefficients(kind, dtype, student, distances, isa, use_isa):
    use_isa(isa)
    assert_same_coefficients(cpu, kind, dtype, student, distances, more=2000)


def test_square_roots_are_the_nearest():
    torch.manual_seed(6)
    x = torch.rand(10_000, dtype=torch.float64) * torch.logspace(-200, 200, 10_000).double()
    assert ar.sqrt(x).tolist() == [math.sqrt(value) for value in x.tolist()]
    odd = torch.tensor([-1.0, math.nan, math.inf, 0.0, -0.0, 5e-324], dtype=torch.float64)
    assert_same_bits(ar.sqrt(odd), odd.sqrt())
    assert ar.sqrt(torch.tensor(2.0, dtype=torch.float64)).item() == math.sqrt(2)


@needs_extension
def test_rows_without_a_target_are_nan_in_every_backend_and_alone():
    torch.manual_seed(3)
    x, u, sigma = problem((8, 300, 50), torch.float32)
    refs = References(u, value_range=(-1, 1), labels=torch.zeros(300, dtype=torch.int64))
    clean = stable_target(x, refs, sigma, backend="cpu")
    x[0, 3], x[1, 0], x[2, 49] = torch.nan, torch.inf, -torch.inf
    sigma[3], sigma[4], sigma[5] = 0.0, -1.0, torch.nan
    assert_backends_agree(x, refs, sigma)
    out = stable_target(x, refs, sigma, backend="cpu")
    assert out[:6].isnan().all()
    assert_same_bits(out[6:], clean[6:])
    nothing = torch.full((300,), -torch.inf)
    assert_backends_agree(x, refs, sigma, log_weight=nothing)
    assert stable_target(x, refs, sigma, log_weight=nothing, backend="cpu").isnan().all()


@needs_extension
@pytest.mark.parametrize("isa", cpu.extension().isas() if cpu.extension() else [])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_bits_do_not_depend_on_threads_or_instruction_set(isa, threads):
    torch.manual_seed(4)
    x, u, sigma = problem((50, 900, 200), torch.float32)
    refs = References(u, value_range=(-1, 1))
    floats = References(u.float() / 99, limbs=4)
    spec = stable_target(x, refs, sigma, backend="torch")
    spec_floats = stable_target(x, floats, sigma, backend="torch")
    before, best = torch.get_num_threads(), cpu.extension().isa()
    try:
        torch.set_num_threads(threads)
        cpu.extension().use_isa(isa)
        assert cpu.extension().isa() == isa
        assert_same_bits(stable_target(x, refs, sigma, backend="cpu"), spec)
        assert_same_bits(stable_target(x, floats, sigma, backend="cpu"), spec_floats)
        assert_same_bits(References(u.float() / 99, limbs=4)._norms, floats._norms)
    finally:
        torch.set_num_threads(before)
        cpu.extension().use_isa(best)


@needs_extension
@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_products_of_halves_give_the_specification_s_bits(monkeypatch, precision):
    torch.manual_seed(5)
    x, u, sigma = problem((30, 1200, 90), torch.float32)
    multiply, seen = cpu_products.multiply, set()

    def watched(left, right, out):
        seen.add(left.dtype)
        multiply(left, right, out)

    for refs in (References(u, value_range=(-1, 1)), References(u.float() / 50)):
        spec = stable_target(x, refs, sigma, backend="torch", precision=precision)
        with monkeypatch.context() as patch:
            patch.setattr(cpu_products, "multiply", watched)
            patch.setattr(cpu_products, "has_int8_products", lambda: False)
            out = stable_target(x, refs, sigma, backend="cpu", precision=precision)
        assert_same_bits(out, spec)
    assert seen == {torch.int16}


@needs_extension
@pytest.mark.parametrize("isa", cpu.extension().isas() if cpu.extension() else [])
@pytest.mark.parametrize(("rows", "terms", "columns"), [(1, 1, 1), (5, 383, 17), (9, 770, 130)])
@pytest.mark.parametrize("extreme", [False, True])
def test_products_of_halves_are_exact(isa, rows, terms, columns, extreme):
    torch.manual_seed(12)
    digits = torch.randint(-128, 128, (rows, 4, terms), dtype=torch.int8)
    right = torch.randint(-128, 128, (terms, columns), dtype=torch.int8)
    digits[:, 3] = digits[:, 3].clamp(min=-127)  # as stage 1 leaves it: what int32 holds
    if extreme:
        digits[:], digits[:, 0], digits[:, 3] = -128, 0, -127  # halves of -2^15 and 128 more
        right.fill_(-128)
    halves = cpu_products.halves(digits).view(2 * rows, terms)
    low, high = halves.view(rows, 2, terms).long().unbind(1)
    place = 256 ** torch.arange(4)[:, None]
    assert torch.equal((high << 16) + low, (digits.long() * place).sum(1))
    used = cpu.extension().isa()
    try:
        cpu.extension().use_isa(isa)
        for matrix in (right, right.t().contiguous().t()):
            sums = torch.full((2 * rows, columns), -1)
            cpu_products.multiply(halves, matrix, sums)
            assert torch.equal(sums, halves.long() @ right.long())
    finally:
        cpu.extension().use_isa(used)


@needs_extension
def test_a_row_may_gather_or_multiply(monkeypatch):
    torch.manual_seed(6)
    x, u, sigma = problem((24, 800, 64), torch.float32)
    refs = References(u, value_range=(-1, 1))
    spec = stable_target_with_stats(x, refs, sigma, backend="torch")
    weights, dense = cpu.weights, {}
    for share in (800, 20, 1):  # lists of 1, 40 and 800 survivors

        def watched(*args, share=share):
            out = weights(*args)
            dense[share] = int(out.weight.slots)
            return out

        monkeypatch.setattr(cpu, "SPARSE_SHARE", share)
        monkeypatch.setattr(cpu, "weights", watched)
        out = stable_target_with_stats(x, refs, sigma, backend="cpu")
        assert_same_bits(out[0], spec[0])
        assert all(torch.equal(a, b) for a, b in zip(out[1], spec[1], strict=True))
    assert 24 > dense[800] > dense[20] > dense[1] == 0


@needs_extension
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_bits_do_not_depend_on_the_batch(monkeypatch, backend):
    torch.manual_seed(7)
    x, u, sigma = problem((37, 500, 60), torch.float32)
    refs = References(u, value_range=(-1, 1))
    whole = stable_target(x, refs, sigma, backend=backend)
    alone = torch.cat(
        [stable_target(x[i : i + 1], refs, sigma[i : i + 1], backend=backend) for i in range(37)]
    )
    assert_same_bits(alone, whole)
    order = torch.randperm(37)
    assert_same_bits(stable_target(x[order], refs, sigma[order], backend=backend), whole[order])
    stages = {"torch": golden.BACKENDS["torch"], "cpu": cpu}[backend]
    monkeypatch.setattr(stages, "MAX_ROWS", 5)
    assert_same_bits(stable_target(x, refs, sigma, backend=backend), whole)


@needs_extension
def test_bits_do_not_depend_on_how_many_products_are_held(monkeypatch):
    torch.manual_seed(8)
    x, u, sigma = problem((12, 1111, 80), torch.float32)
    refs = References(u, value_range=(-1, 1))
    whole = stable_target(x, refs, sigma, backend="cpu")
    monkeypatch.setattr(cpu_products, "PRODUCT_BYTES", 1)
    assert_same_bits(stable_target(x, refs, sigma, backend="cpu"), whole)


@needs_extension
def test_sums_longer_than_int32_holds_are_split(monkeypatch):
    torch.manual_seed(9)
    u = torch.full((2, 140_000), 255, dtype=torch.uint8)
    u[1, ::3] = 0
    x = torch.ones(2, 140_000)
    seen = set()
    multiply = cpu_products.multiply

    def watched(left, right, out):
        seen.add((left.dtype, left.shape[1]))
        multiply(left, right, out)

    monkeypatch.setattr(cpu_products, "multiply", watched)
    assert_backends_agree(x, References(u, value_range=(-1, 1)), torch.tensor([1.0, 1e4]))
    if cpu.has_int8_products():
        assert (torch.int8, 70_000) in seen
    many = torch.full((140_000, 2), 255, dtype=torch.uint8)
    refs = References(many, value_range=(-1, 1))
    out = stable_target(torch.zeros(2, 2), refs, 1e3, target="denoised", backend="cpu")
    assert torch.equal(out, torch.ones(2, 2))


@needs_extension
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    n=st.integers(1, 300),
    dim=st.integers(1, 70),
    seed=st.integers(0, 2**31),
    exponent=st.integers(-30, 30),
    bits=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    precision=st.sampled_from(["exact", "fast"]),
    limbs=st.sampled_from([0, 1, 2, 3, 4]),
)
def test_cpu_equals_specification_on_any_input(
    rows, n, dim, seed, exponent, bits, precision, limbs
):
    generator = torch.Generator().manual_seed(seed)
    scale = 2.0**exponent
    x = (torch.randn(rows, dim, generator=generator, dtype=torch.float64) * scale).to(bits)
    sigma = torch.rand(rows, generator=generator, dtype=torch.float64) * scale
    if limbs:
        y = torch.randn(n, dim, generator=generator, dtype=torch.float64) * scale
        refs = References(y, limbs=limbs)
    else:
        u = torch.randint(0, 256, (n, dim), generator=generator, dtype=torch.uint8)
        refs = References(u, value_range=(-scale, 2 * scale))
    alpha = torch.rand(rows, generator=generator)
    assert_backends_agree(x, refs, sigma, alpha=alpha, target="denoised", precision=precision)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("ref_limbs", [0, 1, 2, 3, 4])
def test_backends_equal_the_text_in_plain_python(ref_limbs, precision, backend):
    torch.manual_seed(10)
    limbs = {"exact": 4, "fast": 3}[precision]
    rows, n, dim = 8, 140, 6
    x, u, sigma = problem((rows, n, dim), torch.float32)
    labels, ref_labels = torch.arange(rows) % 3 - 1, torch.arange(n) % 2
    bias = torch.randn(n, dtype=torch.float64)
    bias[5] = -torch.inf
    refs, v, affine, ratio = helpers.references_and_plain(u, ref_limbs, ref_labels, bias)
    alpha = 0.875
    out = stable_target(
        x, refs, sigma, alpha=alpha, labels=labels, precision=precision, backend=backend
    )
    for i in range(rows):
        s = sigma[i].item()
        row = plain_spec.target_row(
            x[i].tolist(),
            v,
            ref_limbs or 1,
            affine,
            ratio,
            s,
            alpha,
            (alpha / (s * s), -1.0 / (s * s)),
            limbs,
            bias.tolist(),
            [labels[i] in (-1, k % 2) for k in range(n)],
        )
        assert out[i].tolist() == [plain_spec.float32(value) for value in row]


@needs_extension
@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("case", golden.CASES)
def test_golden_hashes(case, backend):
    target = golden.CASES[case]("cpu").compute(backend=backend)
    assert golden.digest(target) == golden.RECORDED[case]
