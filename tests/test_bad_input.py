"""Bad input: a table of calls, and what they say: the argument, what was expected, what came."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import helpers
import pytest
import torch
from torch import Tensor

from stf_kernels import EDM, References, Velocity, stable_target, validate

DATA = helpers.random_bytes(6, 3, 8, 8)
FLOATS = helpers.byte_values(DATA).float()
LABELS = torch.tensor([0, 0, 1, 1, 2, 2])
REFS = References(DATA, value_range=(-1, 1), labels=LABELS)
X = torch.randn(4, 3, 8, 8, generator=helpers.generator(1))


class Case(NamedTuple):
    """A call that must fail, how, and with what in its message."""

    call: Callable[[], object]
    error: type[Exception]
    message: str


def target(
    x: object = X, ref: object = REFS, sigma: object = 1.0, **options: object
) -> Callable[[], object]:
    return lambda: stable_target(x, ref, sigma, **options)


def references(data: object = DATA, **options: object) -> Callable[[], object]:
    if isinstance(data, Tensor) and data.dtype == torch.uint8:
        options = {"value_range": (-1, 1)} | options
    return lambda: References(data, **options)


def ones(*shape: int, device: str = "cpu") -> Tensor:
    return torch.ones(shape, device=device)


BAD_ARGUMENTS = {
    "x_t is a list": Case(target([1.0]), TypeError, r"x_t must be a tensor .*got list"),
    "x_t is None": Case(target(None), TypeError, r"x_t must be a tensor .*got NoneType"),
    "x_t is bytes": Case(target(DATA), TypeError, r"x_t .*float16.*got uint8 \[6, 3, 8, 8\]"),
    "x_t is integers": Case(target(X.long()), TypeError, r"x_t .*float32.*got int64"),
    "x_t is complex": Case(target(X + 0j), TypeError, r"x_t .*float32.*got complex64"),
    "x_t has no batch": Case(target(X[0, 0, 0]), ValueError, r"x_t must be \[B, .*got \[8\]"),
    "ref is a list": Case(target(ref=[FLOATS]), TypeError, r"ref must be a tensor .*got list"),
    "ref is plain bytes": Case(
        target(ref=DATA), TypeError, r"ref .*References\(.*value_range.*got .*uint8"
    ),
    "ref is integers": Case(target(ref=DATA.long()), TypeError, r"ref .*uint8.*got int64"),
    "ref is empty": Case(
        target(ref=FLOATS[:0]), ValueError, r"ref must be \[n, .*n >= 1.*\[0, 3, 8, 8\]"
    ),
    "ref has another shape": Case(
        target(ref=FLOATS.flatten(1)),
        ValueError,
        r"ref must be \[n, 3, 8, 8\] like x_t, got \[6, 192\]",
    ),
    "References have another shape": Case(
        target(X[:, :, :4]), ValueError, r"ref must be \[n, 3, 4, 8\] like x_t, got \[6, 3, 8, 8\]"
    ),
    "ref is elsewhere": Case(
        target(ref=FLOATS.to("meta")), ValueError, r"ref must be on cpu like x_t, got meta"
    ),
    "sigma is None": Case(target(sigma=None), TypeError, r"sigma must be a number or .*None"),
    "sigma is a string": Case(target(sigma="1"), TypeError, r"sigma must be a number.*'1'"),
    "sigma is a bool": Case(target(sigma=True), TypeError, r"sigma must be a number.*True"),
    "sigma is a list": Case(target(sigma=[1.0] * 4), TypeError, r"sigma must be .*\[1\.0"),
    "sigma is bools": Case(target(sigma=X[:, 0, 0, 0] > 0), TypeError, r"sigma must be .*bool"),
    "sigma is complex": Case(target(sigma=ones(4) + 0j), TypeError, r"sigma must .*complex64"),
    "sigma is too long": Case(
        target(sigma=ones(5)), ValueError, r"sigma must be a number, \[4\] or .*got \[5\]"
    ),
    "sigma is one for four": Case(target(sigma=ones(1)), ValueError, r"sigma must .*got \[1\]"),
    "sigma is by pixel": Case(
        target(sigma=ones(4, 1, 8, 8)), ValueError, r"sigma must .*got \[4, 1, 8, 8\]"
    ),
    "sigma is elsewhere": Case(
        target(sigma=ones(4, device="meta")), ValueError, r"sigma must be on cpu .*got meta"
    ),
    "alpha is None": Case(target(alpha=None), TypeError, r"alpha must be a number or .*None"),
    "alpha is too long": Case(target(alpha=ones(3, 1)), ValueError, r"alpha must .*got \[3, 1\]"),
    "alpha is elsewhere": Case(
        target(alpha=ones(4, device="meta")), ValueError, r"alpha .* on cpu"
    ),
    "target is unknown": Case(
        target(target="noise"), ValueError, r"target must be one of 'score'.*'edm'.*got 'noise'"
    ),
    "target is a class": Case(target(target=EDM), ValueError, r"target must be .*got <class"),
    "target is None": Case(target(target=None), ValueError, r"target must be .*got None"),
    "alpha_dot is a string": Case(target(target=Velocity("1", 0)), TypeError, r"velocity.*'1'"),
    "sigma_dot is too long": Case(
        target(target=Velocity(1.0, ones(9))), ValueError, r"velocity.*got \[9\]"
    ),
    "sigma_data is zero": Case(
        lambda: EDM(0.0), ValueError, r"sigma_data must be > 0 and finite, got 0\.0"
    ),
    "sigma_data is nan": Case(lambda: EDM(math.nan), ValueError, r"sigma_data must .*got nan"),
    "log_weight is a list": Case(
        target(log_weight=[0.0] * 6), TypeError, r"log_weight must be a float tensor \[6\]"
    ),
    "log_weight is integers": Case(
        target(log_weight=LABELS), TypeError, r"log_weight must be a float tensor.*got int64 \[6\]"
    ),
    "log_weight is too short": Case(
        target(log_weight=ones(4)), ValueError, r"log_weight must be \[6\] like ref, got \[4\]"
    ),
    "log_weight is by row": Case(
        target(log_weight=ones(4, 6)), ValueError, r"log_weight must be \[6\] .*got \[4, 6\]"
    ),
    "labels without classes": Case(
        target(ref=FLOATS, labels=LABELS[:4]), ValueError, r"labels need references with labels"
    ),
    "labels are a list": Case(
        target(labels=[0, 1, 2, 0]), TypeError, r"labels must be an integer tensor \[4\]"
    ),
    "labels are floats": Case(
        target(labels=ones(4)), TypeError, r"labels must be an integer tensor \[4\], got float32"
    ),
    "labels are one-hot": Case(
        target(labels=torch.eye(4).long()), ValueError, r"labels must be \[4\] .*got \[4, 4\]"
    ),
    "labels are elsewhere": Case(
        target(labels=LABELS[:4].to("meta")), ValueError, r"labels must be on cpu .*got meta"
    ),
    "a label is no class": Case(
        target(labels=torch.tensor([0, -1, 7, 8])), ValueError, r"labels\[2\] .*3 classes.*got 7"
    ),
    "a label is below -1": Case(
        target(labels=torch.tensor([0, -1, 2, -2])), ValueError, r"labels\[3\] .*got -2"
    ),
    "precision is unknown": Case(
        target(precision="half"), ValueError, r"precision must be 'exact' or 'fast', got 'half'"
    ),
    "precision is None": Case(target(precision=None), ValueError, r"precision must .*got None"),
    "backend is unknown": Case(
        target(backend="gpu"), ValueError, r"backend must be one of 'auto'.*'torch'.*got 'gpu'"
    ),
    "backend is unknown for a tensor": Case(
        target(ref=FLOATS, backend="gpu"), ValueError, r"backend must be one of 'auto'.*got 'gpu'"
    ),
    "backend is None": Case(target(backend=None), ValueError, r"backend must be one of .*got None"),
    "data is a list": Case(references([1]), TypeError, r"data must be a tensor .*got list"),
    "data is integers": Case(references(DATA.long()), TypeError, r"data must .*got int64"),
    "data is one image": Case(
        references(DATA[0, 0, 0]), ValueError, r"data must be \[n, \*shape\].*got uint8 \[8\]"
    ),
    "data is no image": Case(references(DATA[:0]), ValueError, r"data must .*n >= 1.*\[0,"),
    "data has no value": Case(references(DATA[:, :0]), ValueError, r"data must .*\[6, 0, 8, 8\]"),
    "data is not finite": Case(
        references(torch.tensor([[0.0], [math.nan]])),
        ValueError,
        r"data must be finite.*nan in data\[1\]",
    ),
    "data is infinite": Case(
        references(torch.tensor([[0.0], [-math.inf]])),
        ValueError,
        r"data must be finite.*-inf in data\[1\]",
    ),
    "data is off its grid": Case(
        references(torch.tensor([[-1.0, 1.0], [0.0, 1.0]]), value_range=(-1, 1), levels=256),
        ValueError,
        r"data must lie on 256 levels from -1 to 1, got 0 in data\[1\]",
    ),
    "data is a tenth of a level off its grid": Case(
        references(torch.tensor([[-1.0, -1 + 4.2 / 255]]), value_range=(-1, 1), levels=256),
        ValueError,
        r"data must lie on 256 levels from -1 to 1, got -0\.98",
    ),
    "data is beyond its grid": Case(
        references(torch.tensor([[-1.0, 3.0]]), value_range=(-1, 1), levels=3),
        ValueError,
        r"data must lie on 3 levels from -1 to 1, got 3 in data\[0\]",
    ),
    "data on a grid is not finite": Case(
        references(torch.tensor([[-1.0, math.nan]]), value_range=(-1, 1), levels=3),
        ValueError,
        r"data must lie on 3 levels .*got nan in data\[0\]",
    ),
    "data has too many levels": Case(
        references(levels=17), ValueError, rf"data must be below levels=17, got {int(DATA.max())}"
    ),
    "value_range is missing": Case(
        references(value_range=None), ValueError, r"value_range=\(lo, hi\) must .*uint8.*got None"
    ),
    "value_range of levels is missing": Case(
        references(FLOATS, levels=256),
        ValueError,
        r"value_range=\(lo, hi\) must .*got None",
    ),
    "value_range without levels": Case(
        references(FLOATS, value_range=(-1, 1)), ValueError, r"value_range .*needs levels"
    ),
    "value_range is reversed": Case(
        references(value_range=(1, -1)), ValueError, r"value_range must .*lo < hi, got \(1, -1\)"
    ),
    "value_range is infinite": Case(
        references(value_range=(0, math.inf)), ValueError, r"value_range must be finite.*inf"
    ),
    "value_range is a number": Case(references(value_range=1), TypeError, r"value_range .*got 1"),
    "value_range is three numbers": Case(
        references(value_range=(0, 1, 2)), ValueError, r"value_range must .*got \(0, 1, 2\)"
    ),
    "levels are too many": Case(
        references(levels=257), ValueError, r"levels must be 2 to 256, .*257"
    ),
    "levels are too few": Case(references(levels=1), ValueError, r"levels must be 2 to 256, got 1"),
    "limbs are too many": Case(
        references(FLOATS, limbs=5), ValueError, r"limbs must be 1 to 4, .*5"
    ),
    "limbs are none": Case(references(FLOATS, limbs=0), ValueError, r"limbs must be 1 to 4, got 0"),
    "limbs of bytes": Case(references(limbs=2), ValueError, r"limbs is for float data.*limbs=2"),
    "labels of references are floats": Case(
        references(labels=ones(6)),
        TypeError,
        r"labels must be an integer tensor \[6\]",
    ),
    "labels of references are too few": Case(
        references(labels=LABELS[:5]), ValueError, r"labels must be \[6\] like data, got \[5\]"
    ),
    "labels of references are negative": Case(
        references(labels=LABELS - 1), ValueError, r"labels of references must be >= 0, got -1"
    ),
    "log_weight of references is too long": Case(
        references(log_weight=ones(7)), ValueError, r"log_weight must be \[6\] .*got \[7\]"
    ),
    "log_weight of references is a number": Case(
        references(log_weight=0.0), TypeError, r"log_weight must be a float tensor \[6\], got 0\.0"
    ),
    "index is a list": Case(
        lambda: REFS.subset([0]), TypeError, r"index must be an integer tensor \[m\], got \[0\]"
    ),
    "index is a mask": Case(
        lambda: REFS.subset(LABELS == 0),
        TypeError,
        r"index must be an integer .*got bool",
    ),
    "index is a matrix": Case(
        lambda: REFS.decode(LABELS[None]), TypeError, r"index must be an integer tensor.*\[1, 6\]"
    ),
    "index names nothing": Case(
        lambda: REFS.subset(LABELS[:0]), ValueError, r"index must name at least one reference"
    ),
    "index of subset is too large": Case(lambda: REFS.subset(LABELS + 4), IndexError, r"6"),
    "index of decode is too large": Case(lambda: REFS.decode(LABELS + 4), IndexError, r"6"),
    "index of subset is negative": Case(lambda: REFS.subset(LABELS - 1), IndexError, r"-1"),
    "index of decode is negative": Case(lambda: REFS.decode(LABELS - 1), IndexError, r"-1"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_a_bad_argument_is_named_with_what_was_expected_and_what_came(case):
    call, error, message = BAD_ARGUMENTS[case]
    with pytest.raises(error, match=message) as caught:
        call()
    assert caught.type is error


def spoiled(values: Tensor, index: int, value: float) -> Tensor:
    values = values.clone()
    values[index].view(-1)[-1] = value
    return values


BAD_VALUES = {
    "x_t is nan": (
        {"x_t": spoiled(X, 2, math.nan)},
        r"x_t\[2\] must be finite, got nan",
    ),
    "x_t is infinite": ({"x_t": spoiled(X, 0, -math.inf)}, r"x_t\[0\] must be finite, got -inf"),
    "ref is nan": ({"ref": spoiled(FLOATS, 4, math.nan)}, r"ref\[4\] must be finite, got nan"),
    "sigma is zero": ({"sigma": spoiled(ones(4), 1, 0.0)}, r"sigma\[1\] must be > 0 .*, got 0"),
    "sigma is negative": ({"sigma": -2.0}, r"sigma\[0\] must be > 0 .*, got -2"),
    "sigma is nan": (
        {"sigma": spoiled(ones(4), 3, math.nan)},
        r"sigma\[3\] must be > 0 .*, got nan",
    ),
    "sigma is infinite": (
        {"sigma": spoiled(ones(4), 3, math.inf)},
        r"sigma\[3\] must .*got inf",
    ),
    "alpha is nan": (
        {"alpha": spoiled(ones(4), 1, math.nan)},
        r"alpha\[1\] must be finite.*nan",
    ),
    "alpha is infinite": ({"alpha": math.inf}, r"alpha\[0\] must be finite, got inf"),
    "log_weight is nan": (
        {"log_weight": spoiled(torch.zeros(6), 5, math.nan)},
        r"log_weight\[5\] must be finite or -inf, got nan",
    ),
    "log_weight is +inf": (
        {"log_weight": spoiled(torch.zeros(6), 2, math.inf)},
        r"log_weight\[2\] must be finite or -inf, got inf",
    ),
    "log_weight leaves nothing": (
        {"log_weight": torch.full((6,), -math.inf)},
        r"log_weight must leave at least one reference",
    ),
    "log_weight leaves nothing of a class": (
        {
            "labels": torch.tensor([0, -1, 1, 2]),
            "log_weight": torch.tensor([0.0, -math.inf, -math.inf, -math.inf, 0.0, 0.0]),
        },
        r"log_weight must leave a reference of labels\[2\] = 1",
    ),
    "a label has no reference": (
        {"labels": torch.tensor([0, -1, 3, 2])},
        r"labels\[2\] must be a class of ref .*got 3, which has no reference",
    ),
}


@pytest.mark.parametrize("case", BAD_VALUES)
@pytest.mark.parametrize("way", ["validate()", "validate=True"])
def test_validation_names_the_argument_the_row_and_the_value(way, case):
    changes, message = BAD_VALUES[case]
    call = {"x_t": X, "ref": REFS, "sigma": 1.0} | changes
    check = validate if way == "validate()" else partial(stable_target, validate=True)
    with pytest.raises(ValueError, match=message):
        check(**call)


@pytest.mark.parametrize("case", [c for c in BAD_VALUES if not c.startswith("a label")])
def test_what_validation_refuses_is_nan_and_the_rest_is_not(case, backend):
    """Except for sigma = inf, which has a limit for some targets and none for others."""
    call = {"x_t": X, "ref": REFS, "sigma": 1.0} | BAD_VALUES[case][0]
    broken = stable_target(**call, backend=backend).isnan()
    if case != "sigma is infinite":
        assert bool(broken.flatten(1).all(1).any())
    assert torch.equal(broken.flatten(1).any(1), broken.flatten(1).all(1))
