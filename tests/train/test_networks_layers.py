"""The layers that the networks share."""

import numpy as np
import pytest
import torch

from stf_train.networks import layers
from stf_train.networks.layers import Attention, Conditions, Down, DownConv, GroupNorm, Up

BOX, FIR = (1, 1), (1, 3, 3, 1)
both = pytest.mark.parametrize("taps", [BOX, FIR])
SIZES = pytest.mark.parametrize("size", [2, 8])


def halving(taps, size):
    """[size/2, size]: each row the taps, sum 1, around the middle of two pixels; zero outside."""
    taps = np.array(taps, dtype=float) / sum(taps)
    matrix = np.zeros((size // 2, size))
    for o in range(size // 2):
        first = 2 * o + 0.5 - (len(taps) - 1) / 2
        for j, tap in enumerate(taps):
            if 0 <= first + j < size:
                matrix[o, int(first + j)] = tap
    return matrix


def separable(matrix, x):
    matrix = torch.from_numpy(matrix)
    return matrix @ x @ matrix.T


@both
@SIZES
def test_down_is_the_direct_sum(taps, size):
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    torch.testing.assert_close(Down(taps)(x), separable(halving(taps, size), x))


@both
@SIZES
def test_up_is_the_transpose_of_down_but_for_the_sum(taps, size):
    x = torch.randn(2, 3, size // 2, size // 2, dtype=torch.float64)
    torch.testing.assert_close(Up(taps)(x), separable(2 * halving(taps, size).T, x))


@both
@SIZES
def test_down_conv_is_one_longer_filter(taps, size):
    layer = DownConv(1, 1, taps).double()
    w = np.array([1.0, -2.0, 5.0])
    layer.conv.weight.data[0, 0] = torch.from_numpy(np.outer(w, w))
    layer.conv.bias.data.fill_(0.75)
    x = torch.randn(2, 1, size, size, dtype=torch.float64)
    # halving() makes the sum 1.
    matrix = sum(w) * halving(np.convolve(w[::-1], taps)[::-1], size)
    torch.testing.assert_close(layer(x), separable(matrix, x) + 0.75)


@both
@pytest.mark.parametrize("resample", [Down, Up])
def test_constants_stay_away_from_the_border(taps, resample):
    y = resample(taps)(torch.full((1, 2, 16, 16), 0.3))
    inside = y if taps == BOX else y[..., 1:-1, 1:-1]
    torch.testing.assert_close(inside, torch.full_like(inside, 0.3))


@both
def test_down_keeps_ramps_in_place(taps):
    """Pixel o of the half resolution lies between pixels 2 o and 2 o + 1."""
    x = torch.arange(16.0).expand(1, 1, 16, 16)
    y = Down(taps)(x)[..., 1:-1, 1:-1]
    torch.testing.assert_close(y, (2 * torch.arange(8.0) + 0.5)[1:-1].expand_as(y))


def test_up_keeps_ramps_in_place():
    """Exactly so for the smoother filter alone."""
    x = torch.arange(8.0).expand(1, 1, 8, 8)
    y = Up(FIR)(x)[..., 1:-1, 1:-1]
    torch.testing.assert_close(y, ((torch.arange(16.0) - 0.5) / 2)[1:-1].expand_as(y))


def test_up_by_the_box_repeats():
    x = torch.randn(1, 2, 4, 4)
    assert torch.equal(Up(BOX)(x), x.repeat_interleave(2, 2).repeat_interleave(2, 3))


@pytest.mark.parametrize("taps", [(), (1,), (1, 2, 1), (1, 2), (-1, -1)])
def test_taps(taps):
    with pytest.raises(ValueError, match="taps must be symmetric, of even number and positive sum"):
        Down(taps)


def test_group_norm_of_bfloat16_is_as_good_as_its_type():
    torch.manual_seed(0)
    norm = GroupNorm(2, 8)
    x = (torch.randn(4, 8, 16, 16) + 3).bfloat16()
    y = norm(x)
    grouped = x.double().reshape(4, 2, -1)
    deviation = grouped.var(2, correction=0, keepdim=True).add(norm.eps).sqrt()
    truth = ((grouped - grouped.mean(2, keepdim=True)) / deviation).reshape(x.shape)
    assert y.dtype == torch.bfloat16
    # One rounding to 8 bits; float32 within.
    assert ((y - truth).abs() <= 2**-8 * truth.abs() + 1e-5).all()


def test_group_norm_is_computed_in_float32_at_least(monkeypatch):
    """Not left to the device: some keep mean and deviation in the type of x."""
    types, compute = [], layers.group_norm

    def record(x, *rest):
        types.append(x.dtype)
        return compute(x, *rest)

    monkeypatch.setattr(layers, "group_norm", record)
    for dtype in torch.bfloat16, torch.float16, torch.float32:
        assert GroupNorm(2, 8)(torch.randn(2, 8, 4, 4, dtype=dtype)).dtype == dtype
    assert GroupNorm(2, 8).double()(torch.randn(2, 8, 4, 4).double()).dtype == torch.float64
    assert types == [torch.float32] * 3 + [torch.float64]


def test_attention_is_softmax_of_inner_products():
    torch.manual_seed(0)
    C, heads, H, W = 8, 2, 3, 2
    layer = Attention(GroupNorm(2, C), heads).double()
    layer.out.weight.data.copy_(torch.randn(C, C))
    layer.out.bias.data.copy_(torch.randn(C))
    x = torch.randn(2, C, H, W, dtype=torch.float64)
    pixels = layer.norm(x).reshape(2, C, H * W)
    q, k, v = (
        (torch.einsum("oc,bcp->bop", w, pixels) + b[:, None]).reshape(2, heads, C // heads, H * W)
        for w, b in zip(layer.qkv.weight.chunk(3), layer.qkv.bias.chunk(3), strict=True)
    )
    weights = (torch.einsum("bhcp,bhcs->bhps", q, k) / (C // heads) ** 0.5).softmax(-1)
    mixed = torch.einsum("bhps,bhcs->bhcp", weights, v).reshape(2, C, H * W)
    want = torch.einsum("oc,bcp->bop", layer.out.weight, mixed) + layer.out.bias[:, None]
    torch.testing.assert_close(layer(x), want.reshape(x.shape))


def test_conditions_add_a_row_of_the_table_and_a_linear_map():
    conditions = Conditions(classes=3, augmentation=2, width=5)
    features, augment = torch.randn(3, 5), torch.randn(3, 2)
    got = conditions(features, torch.tensor([2, -1, 0]), augment)
    table, matrix = conditions.table, conditions.augment.weight
    rows = torch.stack([table[2], torch.zeros(5), table[0]])
    torch.testing.assert_close(got, features + rows + augment @ matrix.T)
    assert [name for name, _ in conditions.named_parameters()] == ["table", "augment.weight"]
