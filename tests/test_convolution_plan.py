"""Convolutions in float32 and bfloat16 on the CPU, on both sides of every rule of csrc/cpu/convolution_plan.cpp."""

from __future__ import annotations

import pytest
import torch
from conv_bn_case import Case, assert_threads_do_not_change_a_bit
from hypothesis import given, settings
from hypothesis import strategies as st

import convbn_ext as cb

# One line per reason: what is special about the shape.
CASES = {
    "1x1, light weights": ((2, 8, 12, 12), (40, 8, 1, 1), {}),
    "1x1, weights outweigh half of a sample": ((3, 72, 2, 3), (40, 72, 1, 1), {}),
    "1x1, just not": ((2, 36, 6, 6), (36, 36, 1, 1), {}),
    "1x1, thin and narrow": ((3, 40, 2, 2), (24, 40, 1, 1), {}),
    "1x1, several pieces of rows and a rest": ((701, 40, 2, 2), (48, 40, 1, 1), {}),
    "1x1, a stride on light weights": ((3, 8, 13, 12), (4, 8, 1, 1), {"stride": 2}),
    "1x1, a stride on heavy weights": ((3, 40, 7, 6), (48, 40, 1, 1), {"stride": (2, 3)}),
    "1x1, a stride, dx past the caches": ((3, 264, 53, 51), (40, 264, 1, 1), {"stride": (2, 3)}),
    "1x1, padding is not a product": ((2, 8, 6, 6), (8, 8, 1, 1), {"padding": 1}),
    "1x1, on a border of its own": ((2, 8, 6, 6), (8, 8, 1, 1), {"padding": (2, 1), "padding_mode": "circular"}),
    "1x1, one output channel": ((2, 3, 6, 6), (1, 3, 1, 1), {}),
    "16 pixels": ((3, 20, 4, 4), (24, 20, 3, 3), {"padding": 1}),
    "20 pixels": ((3, 20, 5, 4), (24, 20, 3, 3), {"padding": 1}),
    "255 pixels": ((2, 6, 15, 17), (5, 6, 3, 3), {"padding": 1}),
    "256 pixels": ((2, 6, 16, 16), (5, 6, 3, 3), {"padding": 1}),
    "channels and pixels between two tiles": ((2, 37, 17, 19), (21, 37, 3, 3), {"stride": 1}),
    "depthwise": ((2, 6, 16, 17), (6, 1, 3, 3), {"groups": 6, "padding": 1}),
    "depthwise, whole blocks": ((2, 16, 16, 17), (16, 1, 3, 3), {"groups": 16, "padding": 1}),
    "groups, few pixels": ((2, 8, 4, 4), (12, 4, 3, 3), {"groups": 2, "padding": 1}),
    "dilation": ((2, 6, 17, 17), (5, 6, 3, 3), {"dilation": 2, "padding": 2}),
    "circular borders": ((2, 6, 17, 17), (5, 6, 3, 3), {"padding": 1, "padding_mode": "circular"}),
}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = [torch.float32, torch.bfloat16]

cases = pytest.mark.parametrize("name", CASES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
layouts = pytest.mark.parametrize("layout", LAYOUTS)


@cases
@dtypes
@layouts
def test_as_accurate_as_torch(name, dtype, layout):
    shape, weight, geometry = CASES[name]
    Case(shape, weight, **geometry).check(dtype, LAYOUTS[layout])


def training_step(x, weight, grad, **geometry):
    """Output and gradients of one layer in training, and its output in evaluation."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    out = cb.conv_bn(x, weight, training=True, activation="silu", **geometry)
    out.backward(grad.expand_as(out))
    zeros, ones = weight.new_zeros(len(weight)), weight.new_ones(len(weight))
    with torch.no_grad():
        seen = cb.conv_bn(x, weight, running_mean=zeros, running_var=ones, activation="relu", **geometry)
    return out.detach(), x.grad, weight.grad, seen


@cases
@dtypes
@layouts
def test_memory_formats_are_those_of_torch(name, dtype, layout):
    shape, weight_shape, geometry = CASES[name]
    if name == "1x1, on a border of its own":  # torch.pad forgets the format, and a 1x1 weight has none
        layout = "contiguous"
    x = torch.randn(shape, dtype=dtype).contiguous(memory_format=LAYOUTS[layout])
    weight = torch.randn(weight_shape, dtype=dtype).contiguous(memory_format=LAYOUTS[layout])
    out, grad_input, grad_weight, seen = training_step(x, weight, torch.ones((), dtype=dtype), **geometry)
    assert seen.is_contiguous(memory_format=LAYOUTS[layout])
    assert out.is_contiguous(memory_format=LAYOUTS[layout])
    assert grad_input.is_contiguous(memory_format=LAYOUTS[layout])
    assert grad_weight.is_contiguous(memory_format=LAYOUTS[layout])


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_shape(data):
    """Odd sizes of every kind pass through the transposition. In eval mode, where gradients do not cancel, and with
    several channels, among which a sum of few terms that cancels by chance is not the largest."""
    draw = lambda low, high, what: data.draw(st.integers(low, high), what)  # noqa: E731
    kernel, stride = draw(1, 3, "kernel"), draw(1, 2, "stride")
    shape = (draw(2, 4, "batch"), draw(8, 50, "in"), draw(kernel + 1, 24, "height"), draw(kernel + 1, 24, "width"))
    weight = (draw(6, 50, "out"), shape[1], kernel, kernel)
    case = Case(shape, weight, training=False, stride=stride, padding=kernel // 2)
    case.check(data.draw(st.sampled_from(DTYPES), "dtype"), LAYOUTS[data.draw(st.sampled_from([*LAYOUTS]), "layout")])


def test_a_sum_over_few_rows_rounds_like_torchs():
    """One chain of 270 terms in float32 had an error 3.7 times as large as torch's, the mean over seeds."""
    errors = torch.zeros(2, dtype=torch.float64)
    for seed in range(60):
        torch.manual_seed(seed)
        x = torch.randn(2, 10, 15, 9).contiguous(memory_format=torch.channels_last)
        weight, grad = torch.randn(15, 10, 1, 1, requires_grad=True), torch.randn(2, 15, 15, 9)
        zeros, ones = torch.zeros(15), torch.ones(15)
        out = cb.conv_bn(x, weight, running_mean=zeros, running_var=ones, eps=0.0)
        theirs = torch.nn.functional.conv2d(x, weight)
        exact = torch.einsum("nohw,nihw->oi", grad.double(), x.double())
        for i, y in enumerate((out, theirs)):
            (dw,) = torch.autograd.grad(y, weight, grad)
            errors[i] += (dw.flatten(1).double() - exact).abs().max() / exact.abs().max()
    assert errors[0] <= 2 * errors[1], f"ours {errors[0] / 60:.1e}, torch's {errors[1] / 60:.1e}"


@cases
@layouts
def test_views_and_expanded_gradients(name, layout):
    """Every second channel of a larger tensor, a gradient of stride 0: the same numbers as from dense copies."""
    shape, weight_shape, geometry = CASES[name]
    n, c, h, w = shape
    x = torch.randn(n, 2 * c, h, w).contiguous(memory_format=LAYOUTS[layout])[:, ::2]
    weight = torch.randn(2 * weight_shape[0], *weight_shape[1:])[::2]
    views = training_step(x, weight, torch.ones(()), **geometry)
    x = x.clone(memory_format=LAYOUTS[layout])
    for a, b in zip(views, training_step(x, weight.contiguous(), torch.ones_like(views[0]), **geometry), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


# Whose sums torch shares among threads: one image, one axis, a stride, groups, blocks of channels that are not whole,
# padding (with many threads).
THREADS = CASES | {
    "one image with a stride": ((1, 64, 56, 56), (64, 64, 3, 3), {"stride": 2, "padding": 1}),
    "one small image, one output channel": ((1, 24, 21, 28), (1, 24, 3, 3), {"padding": 1}),
    "dx of a stride": ((3, 16, 19, 28), (1, 16, 3, 3), {"stride": (1, 2), "padding": 1}),
    "blocks that are not whole": ((3, 15, 14, 12), (20, 15, 3, 3), {"padding": 1}),
    "groups in blocks": ((4, 32, 7, 6), (128, 4, 3, 3), {"groups": 8, "stride": 2}),
    "groups of 4 to 4": ((8, 64, 28, 32), (64, 4, 3, 3), {"groups": 16, "stride": (1, 2), "padding": 1}),
    "groups of one tap": ((8, 36, 9, 9), (36, 3, 1, 1), {"groups": 12}),
    "1-d": ((2, 6, 147), (9, 2, 3), {"groups": 3, "padding": 2, "padding_mode": "circular"}),
    "stride and dilation": ((16, 16, 12, 32), (64, 16, 3, 3), {"stride": 2, "dilation": (2, 1)}),
    "a stride, images that three threads cannot share": ((4, 64, 34, 24), (48, 64, 3, 3), {"stride": 2, "padding": 1}),
    "dilation, one image": ((1, 64, 16, 35), (32, 64, 5, 3), {"padding": (0, 1), "dilation": (1, 2)}),
    "pixels beside the image": ((8, 15, 13, 19), (7, 15, 5, 1), {"padding": (2, 1)}),
    "groups of 8 to 16 channels, one image": ((1, 64, 8, 36), (128, 32, 3, 3), {"groups": 2}),
    "strided groups": ((8, 128, 19, 33), (128, 8, 5, 3), {"groups": 16, "stride": (2, 1), "padding": 1}),
    "groups of other channels": ((2, 8, 13, 5), (80, 2, 3, 3), {"groups": 4, "padding": 1}),
    "groups of one channel to four": ((2, 8, 4, 38), (32, 1, 3, 1), {"groups": 8, "padding": (1, 0)}),
    "a kernel of two columns": ((3, 24, 5, 15), (48, 24, 2, 2), {"padding": 1}),
    "two columns of padding": ((2, 32, 5, 5), (28, 8, 5, 5), {"padding": 2, "stride": 2, "groups": 4}),
    "padding and dilation": ((1, 60, 5, 9), (128, 15, 5, 5), {"padding": (0, 2), "dilation": (1, 2), "groups": 4}),
    "dx of no padding": ((3, 24, 7, 19), (80, 24, 3, 3), {}),
    "more padding than half a kernel": ((4, 8, 6, 9), (32, 8, 5, 5), {"padding": (1, 4), "stride": (3, 1)}),
    "groups, images of one pixel": ((8, 96, 1, 1), (48, 6, 1, 1), {"groups": 16}),
    "1x1, one image": ((1, 64, 40, 40), (96, 64, 1, 1), {}),
    "linear": ((300, 200), (70, 200), {}),
    "linear, one feature": ((4096, 3000), (1, 3000), {}),
    "3-d, one small image": ((1, 96, 10, 8, 8), (12, 96, 3, 3, 3), {"stride": 2, "padding": 1}),
    "3-d, groups": ((1, 32, 3, 12, 5), (2, 16, 2, 3, 3), {"groups": 2, "stride": (3, 1, 2), "padding": (0, 0, 1)}),
    "3-d, one tap in a plane": ((2, 24, 13, 16, 18), (8, 24, 5, 1, 1), {"padding": (2, 0, 0)}),
}


@pytest.mark.parametrize("name", THREADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@layouts
def test_threads_do_not_change_a_bit(name, dtype, layout):
    shape, weight_shape, geometry = THREADS[name]
    x = torch.randn(shape, dtype=dtype)
    if x.dim() == 4:
        x = x.contiguous(memory_format=LAYOUTS[layout])
    weight = torch.randn(weight_shape, dtype=dtype)
    grad = torch.randn(Case(shape, weight_shape, **geometry).grad.shape, dtype=dtype)
    assert_threads_do_not_change_a_bit(lambda: training_step(x, weight, grad, **geometry))
