"""The library's input gradient, a few images to a thread (csrc/cpu/grad_input_by_images.cpp)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conv_bn_case import assert_as_accurate, assert_threads_do_not_change_a_bit, bare_convolution

# float32 layers with groups of up to 8 channels, what makes torch's sums depend on the threads, and beside the rule.
CASES = {
    "a stride": ((8, 64, 28, 32), (64, 4, 3, 3), {"groups": 16, "stride": (1, 2), "padding": 1}),
    "groups of 8 to 8": ((5, 64, 15, 13), (64, 8, 3, 3), {"groups": 8, "stride": 2, "padding": 1}),
    "groups of 2 to 24": ((3, 8, 14, 11), (96, 2, 3, 3), {"groups": 4, "stride": 2}),
    "more images than units of work": ((37, 24, 6, 7), (24, 6, 3, 3), {"groups": 4, "stride": 2, "padding": 1}),
    "two images": ((2, 12, 9, 9), (24, 3, 5, 3), {"groups": 4, "stride": (2, 1), "padding": (2, 0)}),
    "dilation": ((4, 16, 13, 12), (16, 8, 3, 3), {"groups": 2, "dilation": 2, "padding": 2}),
    "one tap": ((4, 32, 9, 10), (32, 8, 1, 1), {"groups": 4, "stride": 2}),
    "3-d": ((3, 16, 5, 9, 8), (16, 8, 3, 3, 3), {"groups": 2, "stride": 2, "padding": 1}),
}
cases = pytest.mark.parametrize("name", CASES)
layouts = pytest.mark.parametrize("last", [True, False], ids=["channels_last", "contiguous"])


def arguments(name, last):
    shape, weight_shape, geometry = CASES[name]
    layout = (torch.channels_last_3d if len(shape) == 5 else torch.channels_last) if last else torch.contiguous_format
    x, weight = torch.randn(shape), torch.randn(weight_shape)
    x, weight = (t.contiguous(memory_format=layout).requires_grad_() for t in (x, weight))
    y = (F.conv3d if len(shape) == 5 else F.conv2d)(x, weight, **geometry)
    return x, weight, y, geometry, layout


@cases
@layouts
def test_as_accurate_as_torch(name, last):
    x, weight, y, geometry, layout = arguments(name, last)
    grad = torch.randn_like(y)
    convolve = F.conv3d if x.dim() == 5 else F.conv2d
    exact_x = x.detach().double().requires_grad_()
    exact = convolve(exact_x, weight.detach().double(), **geometry)
    exact.backward(grad.double())
    (theirs,) = torch.autograd.grad(y, x, grad)
    ours = bare_convolution(x, weight, grad, **geometry)[1]
    assert_as_accurate(ours, theirs, exact_x.grad, torch.float32, "dx")
    assert ours.is_contiguous(memory_format=layout)


@cases
@layouts
def test_threads_do_not_change_a_bit(name, last):
    x, weight, y, geometry, _ = arguments(name, last)
    grad = torch.randn_like(y)
    assert_threads_do_not_change_a_bit(lambda: bare_convolution(x, weight, grad, **geometry))


def test_the_threads_own_setting_stays():
    """The calling thread plans for one while it computes (csrc/cpu/one_thread.h), and then for as many as before."""
    x, weight, y, geometry, _ = arguments("a stride", True)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        bare_convolution(x, weight, torch.ones_like(y), **geometry)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
