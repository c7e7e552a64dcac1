"""The error analysis of docs/method.md: its bounds hold, its numbers are those measured."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from bench import error_bounds
from bench.error_bounds import ROUNDINGS, SIGMAS

pytestmark = pytest.mark.skipif(
    np.finfo(np.longdouble).nmant < 63, reason="the truth needs numbers longer than float64"
)


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, error_bounds.Error]]:
    given = error_bounds.problem()
    return {precision: error_bounds.errors(given, precision) for precision in ("exact", "fast")}


@pytest.mark.parametrize("name", [*ROUNDINGS, "before", "result", "whole"])
@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_every_error_is_within_its_bound(found, precision, name):
    measured, bound = found[precision][name]
    assert torch.isfinite(measured).all()
    assert (measured <= bound).all(), (measured / bound).tolist()


@pytest.mark.parametrize("name", ["sample", "weights"])
def test_a_byte_less_exceeds_the_bound(found, name):
    """What "fast" rounds more coarsely is seen: the bounds of "exact" do not hold for it."""
    assert (found["fast"][name].measured > found["exact"][name].bound).any()


@pytest.mark.parametrize("name", ["float32", "weights", "result"])
def test_bounds_are_near_the_errors_somewhere(found, name):
    measured, bound = found["exact"][name]
    assert (measured / bound).max() > 1 / 50


def test_nothing_but_the_result_s_rounding_is_seen_in_the_result(found):
    before, result, whole = (found["exact"][name] for name in ("before", "result", "whole"))
    assert before.measured.max() < 2e-9
    torch.testing.assert_close(whole.measured, result.measured, rtol=1e-2, atol=0)


def test_the_result_s_rounding_is_that_of_normal_numbers(found):
    """Spread over a row, it is 2.53e-8 of the norm, whatever the unit."""
    for exponent in (0.0, 0.25, 0.5, 0.75):
        assert error_bounds.normal_rounding(2.0**exponent) == pytest.approx(2.53e-8, rel=3e-3)
    x = torch.randn(1 << 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    relative = float((x.float() - x).norm() / x.norm())
    assert relative == pytest.approx(error_bounds.normal_rounding(1.0), rel=1e-2)
    measured = found["exact"]["result"].measured
    assert measured.min() > 2.4e-8
    assert measured.max() < 2.7e-8


def test_float32_samples_are_exact_but_where_they_are_tiny():
    given = error_bounds.problem(rows=1)
    q, step = error_bounds.spec.quantize(given.x, 4)
    exact = step[:, None] * q.double() == given.x.double()
    assert exact[given.x.abs() >= 2.0**23 * step[:, None]].all()
    assert not exact.all()


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_the_note_has_these_numbers(found, precision):
    text = error_bounds.NOTE.read_text()
    name = f"{precision}, d = 3072"
    table = re.search(f"<!-- {name} -->\n(.*?)\n<!--", text, re.DOTALL)[1].splitlines()
    columns = error_bounds.COLUMNS[precision]
    assert table[0] == f"| sigma | {' | '.join(columns)} |"
    assert len(table) == 2 + len(SIGMAS)
    for i, line in enumerate(table[2:]):
        sigma, *cells = line.strip("| ").split(" | ")
        assert float(sigma) == pytest.approx(float(SIGMAS[i]), rel=1e-2)
        for column, cell in zip(columns, cells, strict=True):
            here = [float(values[i]) for values in found[precision][column]]
            written = [float(number) for number in cell.split(" / ")]
            assert written == pytest.approx(here, rel=0.1, abs=1e-12)
