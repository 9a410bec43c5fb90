"""bfloat16 convolutions by AMX tiles (csrc/cpu/convolution_amx.cpp) against float64 and torch's own error."""

from __future__ import annotations

import pytest
import torch
from conv_bn_case import Case, assert_threads_do_not_change_a_bit
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

import convbn_ext as cb
from convbn_ext import _C

pytestmark = pytest.mark.skipif(not _C.amx_available(), reason="this CPU, or ATEN_CPU_CAPABILITY, has no AMX")

# One line per reason: what is special about the shape.
CASES = {
    "small images": ((5, 64, 7, 7), (96, 64, 3, 3), {"padding": 1}),
    "one position": ((40, 32, 1, 1), (32, 32, 3, 3), {"padding": 1}),
    "one chunk": ((2, 32, 8, 8), (32, 32, 3, 3), {"padding": 1}),
    "several slices of several chunks": ((3, 64, 40, 40), (64, 64, 3, 3), {"padding": 1}),
    "several groups of output channels": ((2, 32, 9, 9), (320, 32, 3, 3), {"padding": 1}),
    "many input channels, small chunks": ((4, 1100, 12, 12), (40, 1100, 1, 1), {}),
    "few channels": ((3, 24, 40, 40), (17, 24, 3, 3), {"padding": 1}),
    "one tile of x, one of dy": ((3, 16, 40, 40), (16, 16, 3, 3), {"padding": 1}),
    "one tile of x, several of dy": ((2, 16, 9, 9), (48, 16, 3, 3), {"padding": 1}),
    "three channels": ((4, 3, 32, 32), (5, 3, 7, 7), {"padding": 3, "stride": 2}),
    "one channel": ((3, 1, 20, 20), (1, 1, 3, 3), {"padding": 1}),
    "tails of channels": ((2, 33, 7, 9), (65, 33, 3, 3), {"padding": 1}),
    "1x1": ((2, 64, 15, 15), (48, 64, 1, 1), {}),
    "no padding": ((3, 32, 10, 9), (32, 32, 3, 3), {}),
    "unequal axes": ((2, 40, 9, 13), (72, 40, 3, 5), {"padding": (1, 2)}),
    "even kernel, output larger than input": ((2, 32, 6, 6), (32, 32, 2, 4), {"padding": (1, 3)}),
    "dilation": ((2, 32, 12, 9), (32, 32, 3, 3), {"padding": 2, "dilation": 2}),
    "padding wider than the kernel, an odd shift alone": ((2, 32, 5, 5), (32, 32, 1, 1), {"padding": (2, 1)}),
    "circular": ((2, 32, 8, 8), (32, 32, 3, 3), {"padding": 1, "padding_mode": "circular"}),
    "stride": ((2, 32, 9, 12), (48, 32, 3, 3), {"padding": 1, "stride": 2}),
    "strides, several slices": ((4, 40, 63, 40), (64, 40, 3, 3), {"padding": 1, "stride": (2, 1)}),
    "stride larger than the kernel": ((3, 32, 17, 15), (32, 32, 2, 1), {"padding": (1, 0), "stride": (5, 3)}),
    "stride and dilation": ((2, 32, 14, 13), (32, 32, 4, 3), {"padding": (3, 2), "stride": (2, 3), "dilation": (3, 2)}),
    "a phase without pixels": ((40, 32, 1, 1), (32, 32, 3, 3), {"padding": 1, "stride": 2}),
    "3-d, strides": ((2, 32, 5, 6, 7), (32, 32, 3, 3, 2), {"padding": (1, 1, 0), "stride": (1, 2, 3)}),
    "3-d": ((2, 32, 4, 5, 6), (32, 32, 2, 3, 3), {"padding": (1, 1, 0)}),
    "large planes, their taps apart": ((2, 17, 5, 26, 25), (19, 17, 3, 3, 3), {"padding": 1, "stride": (2, 1, 1)}),
    "long rows, their taps apart": ((2, 20, 6, 700), (24, 20, 3, 3), {"padding": 1, "stride": (1, 2)}),
    "groups": ((3, 48, 20, 19), (120, 16, 3, 3), {"groups": 3, "padding": 1}),
    "narrow groups, computed as wide ones": ((3, 48, 20, 19), (24, 4, 3, 3), {"groups": 12, "padding": 1}),
    "few channels, the taps of a row as channels": ((2, 5, 70, 71), (12, 5, 3, 5), {"padding": (1, 3), "stride": 2}),
    "1-d": ((3, 20, 90), (40, 20, 5), {"padding": 2, "stride": 2}),
}


LAYOUTS = ["contiguous", "channels_last"]
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def memory_format(shape, layout):
    last = {4: torch.channels_last, 5: torch.channels_last_3d}
    return torch.contiguous_format if layout == "contiguous" else last.get(len(shape), torch.contiguous_format)


@pytest.mark.parametrize("name", CASES)
@layouts
def test_as_accurate_as_torch(name, layout):
    shape, weight, geometry = CASES[name]
    Case(shape, weight, **geometry).check(torch.bfloat16, memory_format(shape, layout))


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_shape(data):
    two = lambda low, high, what: tuple(data.draw(st.integers(low, high), what) for _ in range(2))  # noqa: E731
    kernel, dilation, padding = two(1, 4, "kernel"), two(1, 2, "dilation"), two(0, 3, "padding")
    stride = two(1, 3, "stride")
    size = tuple(d * (k - 1) + 2 + e for d, k, e in zip(dilation, kernel, two(0, 9, "extra"), strict=True))
    c_in, c_out = two(16, 70, "channels")
    shape = (data.draw(st.integers(1, 5), "batch"), c_in, *size)
    case = Case(shape, (c_out, c_in, *kernel), padding=padding, stride=stride, dilation=dilation)
    case.check(torch.bfloat16, torch.channels_last)


@pytest.mark.parametrize("name", CASES)
@layouts
def test_threads_do_not_change_a_bit(name, layout):
    shape, weight, geometry = CASES[name]
    case, memory = Case(shape, weight, **geometry), memory_format(shape, layout)

    def step():
        out, leaves, _, _ = case.ours(torch.bfloat16, memory)
        out.backward(case.grad.bfloat16().contiguous(memory_format=memory))
        return [out.detach(), leaves["input"].grad, leaves["weight"].grad]

    assert_threads_do_not_change_a_bit(step)


@pytest.mark.parametrize(
    ("parts", "shape", "weight", "geometry"),
    [
        ("all", (2, 32, 8, 8), (32, 32, 3, 3), {"padding": 1}),
        ("weight", (2, 32, 12, 12), (32, 32, 3, 3), {"padding": 1}),  # on larger images the library is as fast
        ("weight", (2, 32, 8, 8), (32, 32, 1, 1), {}),  # a matrix product
        ("weight", (2, 32, 8, 8), (32, 32, 3, 3), {"stride": 2}),
        ("weight", (2, 16, 8, 8), (16, 16, 3, 3), {}),
        ("weight", (2, 64, 8, 8), (64, 32, 3, 3), {"groups": 2}),
        ("weight", (2, 3, 16, 16), (16, 3, 3, 3), {}),
        ("weight", (1, 15, 96, 96), (32, 15, 3, 3), {}),
        ("weight", (1, 32, 4, 700), (32, 32, 3, 3), {"padding": 1}),  # a chunk would be mostly its border
    ],
)
def test_which_layers_take_it(parts, shape, weight, geometry):
    """What is taken does not reach torch's convolution."""

    def called(of: str, needs_input: bool) -> bool:
        x = torch.randn(shape).bfloat16().contiguous(memory_format=torch.channels_last).requires_grad_(needs_input)
        w = torch.randn(weight).bfloat16().requires_grad_()
        with profile(activities=[ProfilerActivity.CPU]) as record:
            cb.conv_bn(x, w, training=True, **geometry).sum().backward()
        return of in [event.name for event in record.events()]

    assert not called("aten::convolution_backward", needs_input=False)
    if weight[2:] != (1, 1):
        assert called("aten::convolution", needs_input=False) == (parts != "all")
        assert called("aten::convolution_backward", needs_input=True) == (parts != "all")
