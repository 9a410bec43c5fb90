"""dw by matrix products within images (csrc/cpu/grad_weight.cpp) against float64 and torch's own error."""

from __future__ import annotations

import pytest
import torch
from conv_bn_case import Case, assert_threads_do_not_change_a_bit, bare_convolution
from hypothesis import given, settings
from hypothesis import strategies as st

# One line per reason: what is special about the shape.
CASES = {
    "stride 2, rows of several images in a chunk": ((5, 16, 9, 8), (32, 16, 3, 3), {"stride": 2, "padding": 1}),
    "rows in several pieces, with a rest": ((2, 5, 3, 301), (18, 5, 3, 3), {"padding": 1}),
    "no padding, rows as they lie": ((3, 20, 9, 11), (32, 20, 3, 3), {"dilation": 2}),
    "several slices, channels beyond the last vector": ((6, 12, 40, 41), (23, 12, 3, 3), {"padding": 1}),
    "several blocks of output channels": ((2, 100, 6, 7), (200, 100, 3, 3), {"padding": 1}),
    "one output channel": ((3, 7, 6, 5), (1, 7, 3, 3), {"padding": 1}),
    "one input channel": ((3, 1, 6, 5), (33, 1, 3, 2), {"padding": 1}),
    "padding wider than the kernel": ((3, 9, 4, 5), (16, 9, 2, 2), {"padding": (5, 3)}),
    "a row of the kernel meets nothing": ((2, 8, 1, 9), (16, 8, 3, 3), {"padding": 1}),
    "a stride that leaves out pixels": ((3, 8, 14, 13), (16, 8, 2, 2), {"stride": (3, 4), "padding": (0, 1)}),
    "one image": ((1, 24, 17, 18), (32, 24, 3, 3), {"stride": 2, "padding": 1}),
    "depthwise, one image": ((1, 32, 19, 17), (32, 1, 3, 3), {"groups": 32, "padding": 1}),
    "1x1, one image": ((1, 40, 19, 20), (24, 40, 1, 1), {}),
    "1x1, few positions": ((7, 40, 4, 4), (24, 40, 1, 1), {}),
    "groups": ((3, 32, 9, 8), (64, 16, 3, 3), {"groups": 2, "padding": 1}),
    "few channels in a group": ((3, 6, 9, 8), (9, 2, 3, 3), {"groups": 3, "padding": 1, "dilation": (1, 2)}),
    "depthwise": ((5, 32, 16, 17), (32, 1, 3, 3), {"groups": 32, "padding": 1}),
    "depthwise with a stride": ((2, 20, 15, 14), (20, 1, 5, 4), {"groups": 20, "padding": 2, "stride": (2, 3)}),
    "many groups of few channels": (
        (18, 36, 7, 9),
        (24, 3, 3, 3),
        {"groups": 12, "padding": (3, 1), "dilation": (1, 2)},
    ),
    "a prime number of groups": ((3, 39, 8, 9), (39, 3, 3, 3), {"groups": 13, "padding": 1}),
    "narrow groups, computed as wide ones": ((3, 48, 8, 9), (60, 4, 3, 3), {"groups": 12, "padding": 1, "stride": 2}),
    "circular borders": ((3, 12, 7, 9), (16, 12, 3, 3), {"padding": 1, "padding_mode": "circular", "stride": 2}),
    "1-d": ((3, 6, 50), (20, 6, 5), {"stride": 2, "padding": 3}),
    "1-d, many groups": ((3, 18, 50), (27, 2, 4), {"groups": 9, "stride": 3, "dilation": 2}),
    "3-d": ((2, 6, 5, 6, 7), (17, 6, 2, 3, 3), {"stride": (1, 2, 1), "padding": (1, 0, 1)}),
}
cases = pytest.mark.parametrize("name", CASES)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def layouts_of(shape):
    return LAYOUTS if len(shape) == 4 else {"contiguous": torch.contiguous_format}


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_as_accurate_as_torch(name, dtype):
    shape, weight, geometry = CASES[name]
    for layout in layouts_of(shape).values():
        Case(shape, weight, training=False, **geometry).check(dtype, layout)


@cases
def test_float64_equals_torch(name):
    shape, weight, geometry = CASES[name]
    Case(shape, weight, activation="silu", **geometry).check_equal_to_torch()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape(data):
    """In float64, where torch's own sums are the definition."""
    draw = lambda low, high, what: data.draw(st.integers(low, high), what)  # noqa: E731
    axes, groups = draw(1, 3, "axes"), draw(1, 11, "groups")
    many = lambda low, high, what: tuple(draw(low, high, what) for _ in range(axes))  # noqa: E731
    kernel, stride = many(1, 4, "kernel"), many(1, 3, "stride")
    dilation, padding = many(1, 2, "dilation"), many(0, 2, "padding")
    size = tuple(
        draw(max(1, (k - 1) * d + 1 - 2 * p), 16 // axes + 8, "size")
        for k, d, p in zip(kernel, dilation, padding, strict=True)
    )
    c_in, c_out = draw(1, 20 if groups < 4 else 4, "in"), draw(1, 70 if axes * groups < 4 else 4, "out")
    x = torch.randn(draw(1, 4, "batch"), groups * c_in, *size, dtype=torch.float64)
    weight = torch.randn(groups * c_out, c_in, *kernel, dtype=torch.float64)
    geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    convolution = (torch.conv1d, torch.conv2d, torch.conv3d)[axes - 1]
    leaf = weight.clone().requires_grad_()
    y = convolution(x, leaf, **geometry)
    grad = torch.randn_like(y)
    y.backward(grad)
    dw = bare_convolution(x, weight, grad, **geometry)[2]
    torch.testing.assert_close(dw, leaf.grad, rtol=1e-10, atol=1e-10)


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_threads_do_not_change_a_bit(name, dtype):
    shape, weight_shape, geometry = CASES[name]
    for layout in layouts_of(shape).values():
        x = torch.randn(shape, dtype=dtype).contiguous(memory_format=layout)
        weight = torch.randn(weight_shape, dtype=dtype)
        grad = torch.randn(Case(shape, weight_shape, **geometry).grad.shape, dtype=dtype)
        assert_threads_do_not_change_a_bit(lambda x=x, w=weight, g=grad: bare_convolution(x, w, g, **geometry)[2:])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_format_is_that_of_torch(layout):
    shape, weight_shape, geometry = CASES["groups"]
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(shape, dtype=dtype).contiguous(memory_format=LAYOUTS[layout])
        weight = torch.randn(weight_shape, dtype=dtype).contiguous(memory_format=LAYOUTS[layout])
        grad = torch.randn(Case(shape, weight_shape, **geometry).grad.shape, dtype=dtype)
        assert bare_convolution(x, weight, grad, **geometry)[2].is_contiguous(memory_format=LAYOUTS[layout])
