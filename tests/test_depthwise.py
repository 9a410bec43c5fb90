"""Depthwise layers by our own loops (csrc/cpu/depthwise.cpp) against float64 and torch's own error."""

from __future__ import annotations

import pytest
import torch
from conv_bn_case import Case, assert_threads_do_not_change_a_bit
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

import convbn_ext as cb

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LAST = {"memory_format": torch.channels_last}

# One line per reason: what is special about the shape; C, kernel, geometry.
CASES = {
    "3x3": ((3, 32, 14, 26), (3, 3), {"padding": 1}),
    "3x3, short rows": ((3, 40, 7, 7), (3, 3), {"padding": 1}),
    "3x3, two rows and columns": ((3, 16, 2, 2), (3, 3), {"padding": 1}),
    "3x3, stride 2 that ends at a border and before it": ((3, 24, 9, 12), (3, 3), {"padding": 1, "stride": 2}),
    "3x3, one column of results": ((3, 20, 4, 2), (3, 3), {"padding": 1, "stride": (1, 2)}),
    "3x3, no padding": ((3, 24, 11, 8), (3, 3), {"stride": (1, 3)}),
    "3x3, padding of one axis": ((3, 16, 5, 7), (3, 3), {"padding": (0, 1)}),
    "3x3, padding of the other, rows that are left over": ((3, 16, 6, 7), (3, 3), {"padding": (1, 0), "stride": 3}),
    "several bands and blocks": ((2, 40, 48, 50), (3, 3), {"padding": 1}),
    "past the caches": ((33, 64, 40, 40), (3, 3), {"padding": 1}),
    "tail of channels": ((2, 17, 12, 25), (3, 3), {"padding": 1}),
    "fewer channels than lanes": ((3, 3, 7, 9), (5, 3), {"padding": 1}),
    "1x1": ((2, 20, 5, 5), (1, 1), {}),
    "1x1, padding wider than the kernel": ((2, 20, 5, 5), (1, 1), {"padding": 2}),
    "even kernel": ((2, 18, 9, 8), (2, 4), {"padding": (1, 2)}),
    "5x5, stride 2": ((2, 24, 15, 11), (5, 5), {"padding": 2, "stride": 2}),
    "7x7": ((2, 16, 12, 9), (7, 7), {"padding": 3}),
    "stride beyond the kernel": ((2, 16, 17, 16), (2, 2), {"stride": 3}),
    "unequal axes": ((2, 40, 9, 8), (3, 2), {"stride": (2, 3), "dilation": (2, 1), "padding": (2, 1)}),
    "kernel larger than the image": ((4, 16, 3, 2), (5, 5), {"padding": 3}),
    "rows of dx that meet nothing": ((2, 16, 12, 12), (2, 2), {"stride": 5}),
    "circular": ((2, 16, 8, 8), (3, 3), {"padding": 1, "padding_mode": "circular"}),
}


def case_of(shape, kernel, geometry, **more) -> Case:
    return Case(shape, (shape[1], 1, *kernel), groups=shape[1], **geometry, **more)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_as_accurate_as_torch(name, dtype):
    case_of(*CASES[name]).check(dtype, torch.channels_last)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("3x3")])
def test_contiguous_images(name):
    """In rows of few results dw is formed from copies in channels_last."""
    case_of(*CASES[name]).check(torch.float32)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_shape(data):
    """In eval mode: behind batch statistics the gradient of few taps cancels, and rounding alone is left of it."""
    two = lambda low, high, what: tuple(data.draw(st.integers(low, high), what) for _ in range(2))  # noqa: E731
    kernel, dilation, padding, stride = two(1, 7, "kernel"), two(1, 3, "dilation"), two(0, 4, "padding"), two(1, 3, "s")
    size = tuple(
        d * (k - 1) + 2 * s + e for d, k, s, e in zip(dilation, kernel, stride, two(2, 9, "extra"), strict=True)
    )
    shape = (data.draw(st.integers(2, 4), "batch"), data.draw(st.integers(2, 40), "channels"), *size)
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    geometry = {"padding": padding, "dilation": dilation, "stride": stride}
    case_of(shape, kernel, geometry, training=False).check(dtype, torch.channels_last)


def step(name: str, dtype=torch.float32, memory="save", activation="silu", needs=("input", "weight")):
    shape, kernel, geometry = CASES[name]
    torch.manual_seed(3)
    x = torch.randn(shape).to(dtype).contiguous(**LAST).requires_grad_("input" in needs)
    w = torch.randn(shape[1], 1, *kernel).to(dtype).requires_grad_("weight" in needs)
    bn = [torch.rand(shape[1], dtype=dtype).add_(0.5).requires_grad_() for _ in range(2)]
    y = torch.nn.functional.conv2d(x.detach(), w.detach(), groups=shape[1], **geometry)
    residual = torch.randn(y.shape).to(dtype).contiguous(**LAST).requires_grad_()
    leaves = [t for t in (x, w, *bn, residual) if t.requires_grad]
    out = cb.conv_bn(
        x, w, bn_weight=bn[0], bn_bias=bn[1], residual=residual, training=True, groups=shape[1], activation=activation,
        memory=memory, **geometry,
    )  # fmt: skip
    grad = torch.randn(out.shape).to(dtype).contiguous(**LAST)
    return dict(zip([id(t) for t in leaves], torch.autograd.grad(out, leaves, grad), strict=True)), leaves, out.detach()


def results(*args, **kwargs) -> list[torch.Tensor]:
    grads, leaves, out = step(*args, **kwargs)
    return [out, *(grads[id(t)] for t in leaves)]


@pytest.mark.parametrize("name", ["several bands and blocks", "past the caches", "5x5, stride 2", "unequal axes"])
def test_threads_do_not_change_a_bit(name):
    assert_threads_do_not_change_a_bit(lambda: results(name))


@pytest.mark.parametrize("name", ["several bands and blocks", "5x5, stride 2"])
def test_gradients_do_not_depend_on_the_others(name):
    both = results(name)
    for needs, mine in (("input", 1), ("weight", 2)):
        alone = results(name, needs=(needs,))
        for a, b in zip(alone, [both[0], both[mine], *both[3:]], strict=True):
            assert torch.equal(a, b)


def test_memory_modes_agree():
    save, recompute = results("several bands and blocks"), results("several bands and blocks", memory="recompute")
    for a, b in zip(save, recompute, strict=True):
        assert torch.equal(a, b)
    exact = results("several bands and blocks", torch.float64, activation="leaky_relu")
    inverted = results("several bands and blocks", torch.float64, memory="invert", activation="leaky_relu")
    for a, b in zip(exact, inverted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_in_its_channel(value):
    x, w = torch.randn(2, 20, 9, 30).contiguous(**LAST), torch.randn(20, 1, 3, 3)
    x[0, 3, 2, 2] = value
    frozen = {"running_mean": torch.zeros(20), "running_var": torch.ones(20), "eps": 0.0}
    x.requires_grad_()  # the layer as it is, not folded
    ours = cb.conv_bn(x, w, padding=1, groups=20, **frozen)
    theirs = torch.nn.functional.conv2d(x.double(), w.double(), padding=1, groups=20)
    assert torch.equal(ours.isfinite(), theirs.isfinite())
    assert torch.equal(ours.isnan(), theirs.isnan())


@pytest.mark.parametrize(
    ("own", "dtype", "size", "kernel", "multiplier", "format"),
    [
        (True, torch.float32, 28, 3, 1, torch.channels_last),
        (True, torch.float32, 8, 5, 1, torch.channels_last),
        (True, torch.bfloat16, 8, 5, 1, torch.channels_last),
        (True, torch.float64, 8, 3, 1, torch.channels_last),
        (False, torch.float32, 8, 3, 1, torch.channels_last),  # here the library is as fast
        (False, torch.bfloat16, 28, 3, 1, torch.channels_last),
        (False, torch.float32, 28, 5, 1, torch.contiguous_format),
        (False, torch.float32, 28, 5, 2, torch.channels_last),
    ],
)
def test_which_layers_take_it(own, dtype, size, kernel, multiplier, format):
    """What is taken does not reach torch's convolution."""
    x = torch.randn(2, 16, size, size).to(dtype).contiguous(memory_format=format).requires_grad_()
    w = torch.randn(multiplier * 16, 1, kernel, kernel).to(dtype).requires_grad_()
    with profile(activities=[ProfilerActivity.CPU]) as record:
        cb.conv_bn(x, w, training=True, padding=1, groups=16).sum().backward()
    called = [event.name for event in record.events()]
    assert ("aten::convolution" not in called) == own
    assert ("aten::convolution_backward" not in called) == own
