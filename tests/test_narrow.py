"""Float32 convolutions of few channels on the CPU (csrc/cpu/narrow.cpp) against float64 and torch's own error."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conv_bn_case import Case, assert_threads_do_not_change_a_bit, bare_convolution
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

import convbn_ext as cb

# One line per reason: what is special about the shape.
CASES = {
    "3x3": ((4, 3, 9, 12), (32, 3, 3, 3), {"padding": 1}),
    "the last vector overlaps": ((3, 3, 8, 11), (27, 3, 3, 3), {"padding": 1}),
    "vectors in threes": ((3, 4, 7, 9), (48, 4, 3, 3), {"padding": 1}),
    "a whole vector of taps": ((3, 4, 6, 8), (16, 4, 2, 2), {}),
    "no padding": ((3, 3, 9, 8), (20, 3, 3, 3), {}),
    "padding wider than the kernel": ((3, 2, 4, 5), (17, 2, 3, 3), {"padding": (5, 4)}),
    "kernel larger than the image": ((4, 3, 3, 2), (16, 3, 7, 7), {"padding": 3}),
    "one row": ((5, 3, 1, 19), (16, 3, 3, 3), {"padding": 1}),
    "one column": ((5, 3, 19, 1), (16, 3, 3, 3), {"padding": 1}),
    "stride": ((3, 3, 13, 12), (24, 3, 7, 7), {"stride": 2, "padding": 3}),
    "a stride that leaves out pixels": ((3, 4, 14, 13), (16, 4, 2, 3), {"stride": (3, 4), "padding": (0, 1)}),
    "unequal axes": ((3, 3, 10, 9), (16, 3, 2, 5), {"stride": (2, 1), "padding": (1, 2)}),
    "several bands of an image, several pieces of a band": ((2, 3, 67, 65), (33, 3, 3, 3), {"padding": 1}),
}
cases = pytest.mark.parametrize("name", CASES)
CHANNELS_LAST = torch.channels_last


@cases
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_as_accurate_as_torch(name, training, residual):
    shape, weight, geometry = CASES[name]
    case = Case(shape, weight, training=training, residual=residual, activation="silu", **geometry)
    case.check(torch.float32, CHANNELS_LAST)


@pytest.mark.parametrize("name", ["stride", "several bands of an image, several pieces of a band"])
def test_contiguous_gradient_of_the_input(name):
    """For contiguous tensors of 256 pixels or more, dx by itself: the same bits as in channels_last."""
    shape, weight, geometry = CASES[name]
    shape = (*shape[:2], max(shape[2], 40), max(shape[3], 33))
    Case(shape, weight, **geometry).check(torch.float32)
    grad = torch.randn(Case(shape, weight, **geometry).grad.shape)
    x, weight = torch.randn(shape), torch.randn(weight)
    contiguous = bare_convolution(x, weight, grad, **geometry)[1]
    dx = bare_convolution(x.contiguous(memory_format=CHANNELS_LAST), weight, grad, **geometry)[1]
    assert contiguous.is_contiguous()
    assert torch.equal(contiguous, dx)


@pytest.mark.parametrize("memory", ["recompute", "invert"])
def test_other_ways_to_y(memory):
    shape, weight, geometry = CASES["a whole vector of taps"]
    Case(shape, weight, activation="leaky_relu(0.2)", **geometry).check(torch.float32, CHANNELS_LAST, memory)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape(data):
    """In eval mode, where gradients do not cancel."""
    draw = lambda low, high, what: data.draw(st.integers(low, high), what)  # noqa: E731
    kernel = (draw(1, 6, "kernel height"), draw(1, 6, "kernel width"))
    padding = tuple(draw(0, k, "padding") for k in kernel)
    size = tuple(draw(max(1, k - 2 * p), 20, "size") for k, p in zip(kernel, padding, strict=True))
    weight = (draw(15, 70, "out"), draw(2, 4, "in"), *kernel)  # of 5 the library computes dx
    stride = (draw(1, 3, "stride"), draw(1, 3, "stride"))
    case = Case((draw(1, 3, "batch"), weight[1], *size), weight, training=False, stride=stride, padding=padding)
    case.check(torch.float32, CHANNELS_LAST)


def tensors(name):
    shape, weight, geometry = CASES[name]
    x = torch.randn(shape).contiguous(memory_format=CHANNELS_LAST)
    grad = torch.randn(Case(shape, weight, **geometry).grad.shape)
    return x, torch.randn(weight), grad.contiguous(memory_format=CHANNELS_LAST), geometry


@cases
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_reach_what_they_meet(name, value):
    """The pixels of y and dx that see the value, and no other, are those of the float64 definition."""
    x, weight, grad, geometry = tensors(name)
    grad[0, 2, grad.shape[2] // 2, grad.shape[3] // 2] = value
    exact = x.double().requires_grad_()
    (exact_dx,) = torch.autograd.grad(F.conv2d(exact, weight.double(), **geometry), exact, grad.double())
    assert not exact_dx.isfinite().all()
    assert torch.equal(bare_convolution(x, weight, grad, **geometry)[1].isfinite(), exact_dx.isfinite())
    x[1, 1, 0, 0] = value
    exact_y = F.conv2d(x.double(), weight.double(), **geometry)
    assert not exact_y.isfinite().all()
    assert torch.equal(bare_convolution(x, weight, grad, **geometry)[0].isfinite(), exact_y.isfinite())


@cases
def test_threads_do_not_change_a_bit(name):
    x, weight, grad, geometry = tensors(name)
    assert_threads_do_not_change_a_bit(lambda: bare_convolution(x, weight, grad, **geometry))


@pytest.mark.parametrize(
    ("taken", "shape", "weight", "geometry"),
    [
        (True, (2, 3, 8, 8), (16, 3, 3, 3), {"padding": 1}),
        (True, (2, 4, 8, 8), (64, 4, 2, 2), {"stride": 2}),
        (False, (2, 5, 8, 8), (64, 5, 3, 3), {"padding": 1}),
        (False, (2, 3, 8, 8), (15, 3, 3, 3), {"padding": 1}),
        (False, (2, 3, 8, 8), (16, 3, 1, 5), {}),
        (False, (2, 3, 19, 8), (16, 3, 17, 3), {}),
        (False, (2, 4, 8, 8), (16, 2, 3, 3), {"groups": 2}),
    ],
)
def test_which_layers_take_it(taken, shape, weight, geometry):
    """What is taken does not reach torch's convolution."""
    x = torch.randn(shape).contiguous(memory_format=CHANNELS_LAST).requires_grad_()
    w = torch.randn(weight).requires_grad_()
    with profile(activities=[ProfilerActivity.CPU]) as record:
        cb.conv_bn(x, w, training=True, **geometry).sum().backward()
    names = [event.name for event in record.events()]
    assert ("aten::convolution" not in names) == taken
    assert ("aten::convolution_backward" not in names) == taken
