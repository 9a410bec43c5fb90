"""Convolutions by products on gathered pixels (csrc/cpu/gathered_convolution.cpp) against torch's, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conv_bn_case import assert_threads_do_not_change_a_bit, bare_convolution
from hypothesis import given, settings
from hypothesis import strategies as st

# One line per reason: what is special about the shape.
CASES = {
    "3x3": ((4, 16, 9, 8), (32, 16, 3, 3), {"padding": 1}),
    "stride, four phases": ((3, 16, 9, 8), (24, 16, 3, 3), {"stride": 2, "padding": 1}),
    "a phase without taps": ((2, 8, 14, 13), (16, 8, 2, 2), {"stride": (3, 4), "padding": (0, 1)}),
    "stride and dilation": ((2, 8, 15, 16), (8, 8, 3, 2), {"stride": (2, 3), "dilation": (3, 2), "padding": (2, 1)}),
    "1x1": ((3, 24, 7, 9), (40, 24, 1, 1), {}),
    "padding wider than the kernel": ((2, 5, 4, 5), (7, 5, 2, 2), {"padding": (5, 3)}),
    "channels beyond the last vector": ((2, 13, 6, 7), (19, 13, 3, 3), {"padding": 1}),
    "few pixels, several blocks of columns": ((1, 300, 2, 3), (270, 300, 3, 3), {"padding": 1}),
    "many chunks": ((4, 12, 40, 33), (10, 12, 3, 3), {"padding": 1}),
    "groups": ((3, 32, 9, 8), (48, 16, 3, 3), {"groups": 2, "padding": 1, "stride": 2}),
    "few channels in a group": ((3, 6, 9, 8), (9, 2, 3, 3), {"groups": 3, "padding": 1}),
}
cases = pytest.mark.parametrize("name", CASES)
CHANNELS_LAST = torch.channels_last


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def assert_equals_torch(x, weight, **geometry):
    exact_x = x.clone().requires_grad_()
    exact = F.conv2d(exact_x, weight, **geometry)
    grad = torch.randn_like(exact)
    exact.backward(grad)
    y, dx, _ = bare_convolution(
        x.contiguous(memory_format=CHANNELS_LAST), weight, grad.contiguous(memory_format=CHANNELS_LAST), **geometry
    )
    torch.testing.assert_close(y, exact.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(dx, exact_x.grad, rtol=1e-10, atol=1e-10)
    return y, dx


@cases
def test_equals_torch(name):
    shape, weight, geometry = CASES[name]
    for result in assert_equals_torch(randn(*shape), randn(*weight), **geometry):
        assert result.is_contiguous(memory_format=CHANNELS_LAST)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape(data):
    draw = lambda low, high, what: data.draw(st.integers(low, high), what)  # noqa: E731
    two = lambda low, high, what: (draw(low, high, what), draw(low, high, what))  # noqa: E731
    kernel, stride, dilation, padding = (
        two(1, 4, "kernel"),
        two(1, 4, "stride"),
        two(1, 3, "dilation"),
        two(0, 3, "pad"),
    )
    size = tuple(
        draw(max(1, (k - 1) * d + 1 - 2 * p), 18, "size") for k, d, p in zip(kernel, dilation, padding, strict=True)
    )
    groups = draw(1, 3, "groups")
    c_in, c_out = draw(1, 40, "in"), draw(1, 40, "out")
    x = randn(draw(1, 4, "batch"), groups * c_in, *size)
    weight = randn(groups * c_out, c_in, *kernel)
    assert_equals_torch(x, weight, stride=stride, dilation=dilation, padding=padding, groups=groups)


@cases
def test_threads_do_not_change_a_bit(name):
    shape, weight_shape, geometry = CASES[name]
    x, weight = randn(*shape).contiguous(memory_format=CHANNELS_LAST), randn(*weight_shape)
    grad = torch.randn_like(F.conv2d(x, weight, **geometry))
    assert_threads_do_not_change_a_bit(lambda: bare_convolution(x, weight, grad, **geometry))


@cases
def test_weight_alone_in_channels_last(name):
    """As torch does, the result follows the weight, too."""
    shape, weight_shape, geometry = CASES[name]
    x, weight = randn(*shape), randn(*weight_shape).contiguous(memory_format=CHANNELS_LAST)
    exact = F.conv2d(x, weight, **geometry)
    y = bare_convolution(x, weight, torch.ones_like(exact), **geometry)[0]
    torch.testing.assert_close(y, exact, rtol=1e-10, atol=1e-10)
    if not weight.is_contiguous():
        assert y.is_contiguous(memory_format=CHANNELS_LAST) == exact.is_contiguous(memory_format=CHANNELS_LAST)


@cases
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_reach_what_they_meet(name, value):
    """The pixels of y and dx that see the value, and no other, are those of torch's contiguous convolution."""
    shape, weight_shape, geometry = CASES[name]
    x, weight = randn(*shape).requires_grad_(), randn(*weight_shape)
    exact = F.conv2d(x, weight, **geometry)
    grad = torch.randn_like(exact)
    grad[0, 2, 0, -1] = value
    (exact_dx,) = torch.autograd.grad(exact, x, grad)
    x = x.detach().contiguous(memory_format=CHANNELS_LAST)
    assert torch.equal(bare_convolution(x, weight, grad, **geometry)[1].isfinite(), exact_dx.isfinite())
    x[0, 1, 0, 0] = value
    exact = F.conv2d(x.contiguous(), weight, **geometry)
    assert torch.equal(bare_convolution(x, weight, grad, **geometry)[0].isfinite(), exact.isfinite())


def test_long_sums_in_float32_are_made_of_short_ones():
    """dx of one small image: less than two thirds of the error of one sum over its 288 terms, on average."""
    errors = torch.zeros(2, dtype=torch.float64)
    for seed in range(20):
        torch.manual_seed(seed)
        x, grad = (torch.randn(1, c, 17, 17).contiguous(memory_format=CHANNELS_LAST) for c in (8, 32))
        weight = torch.randn(32, 8, 3, 3)
        flipped, met = weight.flip(2, 3).transpose(0, 1).flatten(1), F.unfold(grad, 3, padding=1)[0]
        exact, one_sum = flipped.double() @ met.double(), torch.zeros(8, 17 * 17)
        for k in range(flipped.shape[1]):
            one_sum += flipped[:, k, None] * met[k]
        dx = bare_convolution(x, weight, grad, padding=1)[1].flatten(2)[0]
        errors += torch.stack([(sums - exact).square().mean().sqrt() for sums in (dx, one_sum)])
    assert errors[0] < errors[1] * 2 / 3, f"{errors[0] / errors[1]:.2f} of the error of one sum"
