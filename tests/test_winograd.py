"""float32 convolutions by Winograd's algorithm (csrc/cpu/winograd.cpp) against float64 and torch's own error."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conv_bn_case import assert_as_accurate, assert_threads_do_not_change_a_bit, bare_convolution
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

import convbn_ext as cb

pytestmark = pytest.mark.skipif(os.environ.get("CONVBN_EXT_WINOGRAD") == "0", reason="CONVBN_EXT_WINOGRAD=0")

# One line per reason: what is special about the shape.
CASES = {
    "one chunk": ((2, 32, 12, 12), (32, 32, 3, 3), {"padding": 1}),
    "the last tile is half empty": ((9, 32, 7, 7), (32, 32, 3, 3), {"padding": 1}),
    "several chunks, several slices": ((3, 64, 40, 40), (64, 64, 3, 3), {"padding": 1}),
    "blocks of output channels, the last narrower": ((2, 32, 16, 16), (208, 32, 3, 3), {"padding": 1}),
    "a narrow block alone": ((2, 64, 16, 16), (48, 64, 3, 3), {"padding": 1}),
    "many channels, small chunks": ((9, 1040, 8, 8), (32, 1040, 3, 3), {"padding": 1}),
    "a heavy weight, more tiles than go together": ((33, 384, 7, 7), (352, 384, 3, 3), {"padding": 1}),
    "large tiles": ((3, 384, 16, 16), (64, 384, 3, 3), {"padding": 1}),
    "large tiles reach over the border": ((13, 400, 7, 10), (32, 400, 3, 3), {"padding": 1}),
    "large tiles for dx alone": ((2, 32, 17, 18), (384, 32, 3, 3), {"padding": (0, 2)}),
    "no padding": ((3, 32, 14, 12), (32, 32, 3, 3), {}),
    "full padding": ((2, 32, 10, 12), (32, 32, 3, 3), {"padding": 2}),
    "unequal axes": ((2, 32, 10, 24), (48, 32, 3, 3), {"padding": (0, 2)}),
    "circular": ((2, 32, 12, 12), (32, 32, 3, 3), {"padding": 1, "padding_mode": "circular"}),
    "2x2 images": ((40, 32, 2, 2), (32, 32, 3, 3), {"padding": 1}),
}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def torch_gradients(x, weight, grad, *, padding=0, padding_mode="zeros"):
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    rows, columns = (padding, padding) if isinstance(padding, int) else padding
    padded = F.pad(x, (columns, columns, rows, rows), "constant" if padding_mode == "zeros" else padding_mode)
    out = F.conv2d(padded, weight)
    out.backward(grad)
    return out.detach(), x.grad, weight.grad


def tensors(shape, weight, layout, *, padding=0, **_):
    """Numbers that float32 has to round when it adds them."""
    rows, columns = (padding, padding) if isinstance(padding, int) else padding
    out = (shape[0], weight[0], shape[2] + 2 * rows - 2, shape[3] + 2 * columns - 2)
    g = torch.Generator().manual_seed(0)
    x, w, grad = (torch.randn(s, generator=g) for s in (shape, weight, out))
    return x.contiguous(memory_format=LAYOUTS[layout]), w, grad.contiguous(memory_format=LAYOUTS[layout])


def check(shape, weight, layout, **geometry):
    values = tensors(shape, weight, layout, **geometry)
    exact = torch_gradients(*(t.double() for t in values), **geometry)
    theirs, ours = torch_gradients(*values, **geometry), bare_convolution(*values, **geometry)
    for what, our, their, wanted in zip(("out", "dx", "dw"), ours, theirs, exact, strict=True):
        assert_as_accurate(our, their, wanted, torch.float32, what)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_as_accurate_as_torch(name, layout):
    shape, weight, geometry = CASES[name]
    check(shape, weight, layout, **geometry)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_shape(data):
    draw = lambda low, high, what: data.draw(st.integers(low, high), what)  # noqa: E731
    size, padding = (draw(8, 19, "height"), draw(8, 19, "width")), (draw(0, 2, "rows"), draw(0, 2, "columns"))
    c_in, c_out = 16 * draw(2, 7, "in"), 16 * draw(2, 7, "out")
    check((draw(2, 6, "batch"), c_in, *size), (c_out, c_in, 3, 3), "channels_last", padding=padding)


@pytest.mark.parametrize(
    "name",
    [
        "several chunks, several slices",
        "blocks of output channels, the last narrower",
        "a heavy weight, more tiles than go together",
        "large tiles",
    ],
)
def test_threads_do_not_change_a_bit(name):
    shape, weight, geometry = CASES[name]
    values = tensors(shape, weight, "channels_last", **geometry)
    assert_threads_do_not_change_a_bit(lambda: bare_convolution(*values, **geometry))


def test_samples_do_not_depend_on_each_other():
    """A sample alone, or beside one that is not finite, is what it is in the batch."""
    x, weight = torch.randn(9, 32, 15, 15).to(memory_format=torch.channels_last), torch.randn(32, 32, 3, 3)
    layer = lambda x: cb.conv_bn(  # noqa: E731
        x, weight, running_mean=torch.zeros(32), running_var=torch.ones(32), padding=1
    )
    out = layer(x)
    assert torch.equal(out[4:6], layer(x[4:6]))
    x[3] = float("nan")
    assert torch.equal(out[4:], layer(x)[4:])


@pytest.mark.parametrize(
    ("taken", "layout", "shape", "weight", "geometry"),
    [
        (True, "channels_last", (2, 32, 12, 12), (32, 32, 3, 3), {"padding": 1}),
        (True, "channels_last", (16, 32, 7, 7), (32, 32, 3, 3), {"padding": 1}),
        (True, "contiguous", (16, 32, 12, 12), (32, 32, 3, 3), {"padding": 1}),
        (True, "contiguous", (32, 384, 7, 7), (352, 384, 3, 3), {"padding": 1}),  # half empty tiles, but a heavy weight
        (False, "contiguous", (16, 32, 7, 7), (32, 32, 3, 3), {"padding": 1}),  # y and dx are the library's
        (
            False,
            "channels_last",
            (4, 32, 7, 7),
            (32, 32, 3, 3),
            {"padding": 1},
        ),  # the weight's transform outweighs the tiles
        (False, "channels_last", (64, 32, 3, 3), (32, 32, 3, 3), {"padding": 1}),  # tiles are mostly border
        (False, "channels_last", (64, 32, 1, 24), (32, 32, 3, 3), {"padding": 1}),
        (False, "channels_last", (2, 16, 12, 12), (32, 16, 3, 3), {"padding": 1}),
        (False, "channels_last", (2, 40, 12, 12), (32, 40, 3, 3), {"padding": 1}),
        (False, "channels_last", (2, 32, 12, 12), (32, 32, 3, 3), {"padding": 3}),
        (False, "channels_last", (2, 32, 24, 24), (32, 32, 3, 3), {"padding": 1, "stride": 2}),
        (False, "channels_last", (2, 32, 12, 12), (32, 32, 3, 3), {"padding": 2, "dilation": 2}),
        (False, "channels_last", (2, 64, 12, 12), (64, 32, 3, 3), {"padding": 1, "groups": 2}),
        (False, "channels_last", (2, 32, 12, 12), (32, 32, 5, 5), {"padding": 2}),
    ],
)
def test_which_layers_take_it(taken, layout, shape, weight, geometry):
    """What is taken reaches neither torch's convolution nor our products on gathered pixels (they pad weights)."""
    x = torch.randn(shape).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    w = torch.randn(weight).requires_grad_()
    for library in ("aten::convolution", "aten::convolution_backward"):
        with profile(activities=[ProfilerActivity.CPU]) as record:
            if library == "aten::convolution":
                out = cb.conv_bn(x, w, training=True, **geometry)
            else:
                out.sum().backward()
        names = [event.name for event in record.events()]
        assert (library in names or "aten::constant_pad_nd" in names) != taken


def test_it_can_be_turned_off():
    code = """
import torch, convbn_ext as cb
from torch.profiler import ProfilerActivity, profile
x = torch.randn(2, 32, 12, 12).contiguous(memory_format=torch.channels_last)
with profile(activities=[ProfilerActivity.CPU]) as record:
    cb.conv_bn(x, torch.randn(32, 32, 3, 3), training=True, padding=1)
assert "aten::convolution" in [event.name for event in record.events()]
"""
    env = {**os.environ, "CONVBN_EXT_WINOGRAD": "0"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, timeout=120)
