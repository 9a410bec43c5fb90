"""The fused operator against torch's own layers and a float64 reference (spec S1, S2, S6, S9 forward side)."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from conv_bn_case import ACTIVATIONS, CASES, DTYPES, MODES, Case, assert_as_accurate, error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.profiler import ProfilerActivity, profile

import convbn_ext as cb
from convbn_ext import reference

cases = pytest.mark.parametrize("name", CASES)


@cases
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_as_accurate_as_torch(name, dtype, training):
    shape, weight, geometry = CASES[name]
    Case(shape, weight, training=training, bias=True, **geometry).check(dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_activation_residual_layout(activation, residual, layout, dtype, training):
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    case = Case((3, 5, 6, 9), (7, 5, 3, 3), training=training, activation=activation, residual=residual, padding=1)
    case.check(dtype, memory_format)
    assert case.ours(dtype, memory_format)[0].is_contiguous(memory_format=memory_format)


@cases
@pytest.mark.parametrize("activation", ["identity", "gelu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_inference_folds_as_accurately(name, activation, dtype):
    """Without gradients the statistics are folded into the weights: another path to the same numbers."""
    shape, weight, geometry = CASES[name]
    case = Case(shape, weight, training=False, activation=activation, residual=True, bias=True, **geometry)
    with torch.no_grad():
        exact, theirs, ours = case.eager(torch.float64)[0], case.eager(dtype)[0], case.ours(dtype)[0]
    assert_as_accurate(ours, theirs, exact, dtype, "out")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "cl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_inference_activations(activation, residual, memory_format, dtype):
    case = Case((3, 5, 6, 9), (7, 5, 3, 3), training=False, activation=activation, residual=residual, padding=1)
    with torch.no_grad():
        exact = case.eager(torch.float64)[0]
        theirs, ours = case.eager(dtype, memory_format)[0], case.ours(dtype, memory_format)[0]
    assert_as_accurate(ours, theirs, exact, dtype, "out")
    assert ours.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("shape", [(2, 16, 20, 20), (2, 64, 160, 160)], ids=["small", "large"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_inference_of_contiguous_images_with_a_stride(shape, dtype):
    """By way of channels_last."""
    case = Case(shape, (8, shape[1], 3, 3), training=False, activation="relu", residual=False, padding=1, stride=2)
    if dtype == torch.float32:  # of the case's small dyadic numbers all sums are exact, but not those of folded weights
        case.tensors["weight"] = (case.tensors["weight"] / 3).float().double()
    with torch.no_grad():
        exact, theirs, ours = case.eager(torch.float64)[0], case.eager(dtype)[0], case.ours(dtype)[0]
    assert_as_accurate(ours, theirs, exact, dtype, "out")
    assert ours.is_contiguous()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape(data):
    """Random shapes, strides, paddings, dilations, groups and modes: equal to torch in float64."""
    axes = data.draw(st.integers(1, 3), "axes")
    groups = data.draw(st.integers(1, 3), "groups")
    c_in, c_out = groups * data.draw(st.integers(1, 4), "in"), groups * data.draw(st.integers(1, 6), "out")
    each = lambda low, high, what: tuple(data.draw(st.integers(low, high), what) for _ in range(axes))  # noqa: E731
    kernel, dilation, stride = each(1, 3, "kernel"), each(1, 2, "dilation"), each(1, 3, "stride")
    padding = each(0, 2, "padding")
    size = tuple(d * (k - 1) + 3 + extra for d, k, extra in zip(dilation, kernel, each(0, 4, "extra"), strict=True))
    shape = (data.draw(st.integers(2, 4), "batch"), c_in, *size)
    case = Case(
        shape,
        (c_out, c_in // groups, *kernel),
        training=data.draw(st.booleans(), "training"),
        activation=data.draw(st.sampled_from(ACTIVATIONS), "activation"),
        residual=data.draw(st.booleans(), "residual"),
        bias=data.draw(st.booleans(), "bias"),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        padding_mode=data.draw(st.sampled_from(MODES), "mode"),
    )
    case.check_equal_to_torch()


@cases
def test_agrees_with_the_reference(name):
    shape, weight, geometry = CASES[name]
    case = Case(shape, weight, activation="silu", residual=True, **geometry)
    out, t, _, _ = case.ours(torch.float64)
    arguments = {k: v for k, v in t.items() if k != "bias"}
    exact = reference.conv_bn(**arguments, training=True, activation="silu", **geometry)
    torch.testing.assert_close(out, exact, rtol=1e-11, atol=1e-12)


GRADCHECK = list(
    itertools.chain(
        (("identity", False, True, memory) for memory in ("save", "recompute", "invert")),
        (("leaky_relu(0.3)", True, True, memory) for memory in ("save", "recompute", "invert")),
        (("silu", True, True, "save"), ("gelu", False, True, "recompute"), ("relu", True, False, "save")),
        (("silu", True, False, "recompute"), ("identity", False, False, "invert")),
    )
)


@pytest.mark.parametrize(("activation", "residual", "training", "memory"), GRADCHECK)
def test_gradcheck_and_gradgradcheck(activation, residual, training, memory):
    torch.manual_seed(0)
    rand = lambda *s: torch.randn(*s, dtype=torch.float64, requires_grad=True)  # noqa: E731
    x, w, gamma, beta = rand(2, 2, 4, 3), rand(2, 1, 3, 2), rand(2), rand(2)
    bias = None if training else rand(2)  # in training its gradient is exactly zero, finite differences say rounding
    r = rand(2, 2, 2, 4) if residual else None
    mean, var = torch.randn(2, dtype=torch.float64), torch.rand(2, dtype=torch.float64) + 0.5

    def layer(x, w, bias, gamma, beta, r):
        return cb.conv_bn(
            x, w, bias, bn_weight=gamma, bn_bias=beta, running_mean=None if training else mean,
            running_var=None if training else var, training=training, stride=(2, 1), padding=1, groups=2,
            padding_mode="circular", activation=activation, residual=r, memory=memory,
        )  # fmt: skip

    assert torch.autograd.gradcheck(layer, (x, w, bias, gamma, beta, r))
    assert torch.autograd.gradgradcheck(layer, (x, w, bias, gamma, beta, r))


@pytest.mark.parametrize("memory", ["recompute", "invert"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_memory_modes_give_the_same_gradients(memory, dtype, residual):
    case = Case((3, 5, 8, 8), (7, 5, 3, 3), activation="leaky_relu(0.2)", residual=residual, padding=1)
    case.tensors["bn_weight"] = case.tensors["bn_weight"].abs() + 0.5  # y is recovered from out: γ away from 0
    case.check(dtype, memory=memory)


def test_saved_tensors_are_x_w_y_and_vectors():
    saved = []
    x = torch.randn(4, 8, 10, 10, requires_grad=True)
    w = torch.randn(16, 8, 3, 3, requires_grad=True)
    gamma = torch.ones(16, requires_grad=True)
    for memory, large in (("save", 3), ("recompute", 2)):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            cb.conv_bn(x, w, bn_weight=gamma, training=True, padding=1, activation="relu", memory=memory)
        assert sum(t.numel() > 16 for t in saved) == large, memory
        assert all(t.numel() <= 16 or t.shape in (x.shape, w.shape, (4, 16, 10, 10)) for t in saved)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(52, 52), (7, 7), (300, 300)])
def test_results_written_past_the_caches(size, layout):
    """More than 8 MiB, not in place: blocks of several planes, of samples side by side, of a part of a plane."""
    pixels = size[0] * size[1]
    x = torch.randn(2_400_000 // (16 * pixels) + 1, 2, *size).contiguous(memory_format=layout).requires_grad_()
    weight = torch.randn(16, 2, 1, 1)
    y = F.conv2d(x.double(), weight.double())
    expected = F.batch_norm(y, None, None, training=True)
    torch.testing.assert_close(cb.conv_bn(x, weight, training=True).double(), expected, rtol=1e-4, atol=1e-4)


def test_large_mean_keeps_its_variance():
    """Mean ≫ std (1e4 : 1): E[y²] − E[y]² loses every digit of the variance in float32."""
    torch.manual_seed(0)
    y = torch.randn(8, 3, 32, 32) + 1e4
    identity = torch.eye(3).view(3, 3, 1, 1)
    running_mean, running_var = torch.zeros(3), torch.ones(3)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = y.contiguous(memory_format=layout)
        out = cb.conv_bn(
            x, identity, running_mean=running_mean, running_var=running_var, training=True, momentum=1.0, eps=0.0
        )
        exact = y.double()
        mean, var = exact.mean((0, 2, 3), keepdim=True), exact.var((0, 2, 3), correction=0, keepdim=True)
        assert error(out, (exact - mean) / var.sqrt()) < 1e-5
        unbiased = exact.var((0, 2, 3))
        assert error(running_var, unbiased) < 1e-6
        naive = ((y**2).mean((0, 2, 3)) - y.mean((0, 2, 3)) ** 2).double()
        assert error(naive, unbiased) > 1e-2  # what this test is there to catch


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "cl"])
@pytest.mark.parametrize("size", [40, 7])  # planes that are cut, and small ones that lie side by side
def test_threads_do_not_change_a_bit(size, layout):
    case = Case((64, 5, size, size), (7, 5, 3, 3), activation="relu", padding=1)
    case.tensors["input"] = case.tensors["input"].contiguous(memory_format=layout)

    def run():
        y = torch.ops.convbn_ext.conv_bn_forward(
            *(case.tensors[k].float() for k in ("input", "weight")), None, None, None, None, None, None, True, "save",
            [1, 1], [1] * 4, [1, 1], 1, "zeros", 1e-5, "relu", 0.0,
        )  # fmt: skip
        grad = case.grad.float()
        back = torch.ops.convbn_ext.conv_bn_backward(
            grad, case.tensors["input"].float(), case.tensors["weight"].float(), y[1], y[2], y[3],
            case.tensors["bn_weight"].float(), None, None, None, True, "save", [1, 1], [1] * 4, [1, 1], 1, "zeros",
            1e-5, "relu", 0.0, [False, False, True, True, False],
        )  # fmt: skip
        return y[0], y[2], y[3], back[2], back[3]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run()
        torch.set_num_threads(2)
        two = run()
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "weight"), [((3, 8, 9, 9), (8, 8, 3, 3)), ((6, 8), (5, 8))], ids=["2-d", "linear"])
def test_without_vector_code_layers_are_computed_in_float32(dtype, training, shape, weight):
    """As on a CPU without AVX-512; switching oneDNN off has the same effect."""
    case = Case(shape, weight, training=training)
    record = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
    with torch.backends.mkldnn.flags(enabled=False), record:
        ours = case.ours(dtype)
        ours[0].backward(case.grad.to(dtype))
    products = [e for e in record.profiler.kineto_results.events() if e.name() in ("aten::convolution", "aten::mm")]
    assert {e.dtypes()[0] for e in products} == {"float"}
    exact = case.eager(torch.float64)
    exact[0].backward(case.grad)
    assert error(ours[0], exact[0]) < 4 * torch.finfo(dtype).eps
    assert error(ours[1]["weight"].grad, exact[1]["weight"].grad) < 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("dtype", "channels", "geometry", "expected"),
    [
        (torch.float16, 8, {}, "float"),
        (torch.bfloat16, 8, {}, "c10::BFloat16"),
        (torch.bfloat16, 1, {"padding": 1, "groups": 8}, "c10::BFloat16"),
        (torch.bfloat16, 1, {"stride": 2, "groups": 8}, "float"),
        (torch.bfloat16, 1, {"dilation": 2, "groups": 8}, "float"),
    ],
)
def test_adjoints_for_which_the_library_has_no_vector_code(dtype, channels, geometry, expected):
    """They are left to its float32."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        expected = "float"
    x = torch.randn(2, 8, 9, 9, device="cpu").to(dtype).requires_grad_()
    w = torch.randn(8, channels, 3, 3, device="cpu").to(dtype).requires_grad_()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as record:
        cb.conv_bn(x, w, training=True, **geometry).sum().backward()
    events = record.profiler.kineto_results.events()
    assert [e.dtypes()[0] for e in events if e.name() == "aten::convolution_backward"] == [expected]
    assert x.grad.dtype == w.grad.dtype == dtype


@pytest.mark.parametrize(
    ("shape", "weight", "geometry"),
    [
        ((7, 10, 7, 9, 6), (2, 10, 5, 5, 5), {"stride": (1, 1, 3), "padding": (1, 2, 0), "dilation": (1, 2, 1)}),
        ((1, 2, 3, 7, 5), (4, 2, 2, 2, 3), {"stride": (2, 1, 3), "padding": (0, 0, 1), "dilation": (1, 1, 2)}),
        ((3, 10, 13, 5), (4, 10, 2, 5), {"stride": (1, 3)}),
    ],
)
def test_right_where_the_library_is_wrong(shape, weight, geometry):
    """bfloat16 convolutions with an output one column wide come out of the library wrong or not finite."""
    case = Case(shape, weight, **geometry)
    exact = case.eager(torch.float64)
    exact[0].backward(case.grad)
    for _ in range(20):
        ours = case.ours(torch.bfloat16)
        ours[0].backward(case.grad.bfloat16())
        assert error(ours[0], exact[0]) < 0.03
        assert error(ours[1]["weight"].grad, exact[1]["weight"].grad) < 0.05


@pytest.mark.parametrize("shift", [(1, 0), (0, 3), (2, 5)])
def test_circular_translation_equivariance(shift):
    """Spec S6: with circular padding and stride 1, shifting commutes with the layer."""
    torch.manual_seed(0)
    x, w = torch.randn(2, 3, 6, 7, dtype=torch.float64), torch.randn(4, 3, 3, 3, dtype=torch.float64)
    mean, var = torch.randn(4, dtype=torch.float64), torch.rand(4, dtype=torch.float64) + 0.5
    for training in (True, False):

        def layer(x, training=training):
            return cb.conv_bn(
                x, w, running_mean=mean.clone(), running_var=var.clone(), training=training, padding=1,
                padding_mode="circular",
            )  # fmt: skip

        torch.testing.assert_close(layer(x.roll(shift, (2, 3))), layer(x).roll(shift, (2, 3)), rtol=1e-13, atol=1e-13)


def test_strided_and_expanded_inputs():
    torch.manual_seed(0)
    w = torch.randn(4, 3, 3, 3)
    base = torch.randn(2, 9, 16, 16)
    for x in (base[:, ::3, ::2, 1::2], base[:1, :3, :8, :8].expand(5, -1, -1, -1), base[:, :3].transpose(2, 3)):
        torch.testing.assert_close(
            cb.conv_bn(x, w, training=True), F.batch_norm(F.conv2d(x, w), None, None, training=True)
        )


def test_empty_batch_in_eval():
    out = cb.conv_bn(
        torch.randn(0, 3, 8, 8), torch.randn(4, 3, 3, 3), running_mean=torch.zeros(4), running_var=torch.ones(4)
    )
    assert out.shape == (0, 4, 6, 6)


def test_autocast_casts_as_torch_does():
    x, w = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = cb.conv_bn(x, w, running_mean=torch.zeros(4), running_var=torch.ones(4), training=True)
        assert out.dtype == F.conv2d(x, w).dtype == torch.bfloat16
    out.sum().backward()
    assert w.grad.dtype == torch.float32


OPCHECK = [
    ((2, 3, 6, 6), (4, 3, 3, 3), "relu", False, "save"),
    ((2, 3, 6, 6), (4, 3, 3, 3), "leaky_relu", True, "invert"),
    ((2, 3, 7), (4, 3, 2), "silu", True, "recompute"),
    ((6, 3), (4, 3), "identity", False, "save"),
]


@pytest.mark.parametrize(("shape", "weight", "activation", "residual", "memory"), OPCHECK)
def test_opcheck(shape, weight, activation, residual, memory):
    axes = len(shape) - 2
    x, w = torch.randn(shape, requires_grad=True), torch.randn(weight, requires_grad=True)
    gamma, beta = torch.rand(4, requires_grad=True), torch.rand(4, requires_grad=True)
    y = F.linear(x, w) if axes == 0 else (F.conv1d, F.conv2d)[axes - 1](x, w)
    r = torch.randn(y.shape, requires_grad=True) if residual else None
    geometry = ([1] * axes, [0] * 2 * axes, [1] * axes, 1, "zeros", 1e-5, activation, 0.1)
    arguments = (x, w, None, gamma, beta, r, None, None, True, memory, *geometry)
    torch.library.opcheck(torch.ops.convbn_ext.conv_bn_forward, arguments)


def test_compiles_without_a_graph_break():
    layer = cb.ConvBN2d(3, 4, 3, padding=1, activation="relu")
    x = torch.randn(2, 3, 6, 6)
    expected = layer.eval()(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    layer.train()
    compiled(x).sum().backward()
    assert layer.conv.weight.grad is not None


def test_nn_activations_are_read():
    for module, name in ((nn.ReLU(), "relu"), (nn.LeakyReLU(0.2), "leaky_relu(0.2)"), (nn.GELU(), "gelu")):
        a, b = (
            cb.conv_bn(
                torch.ones(2, 1) * torch.tensor([[1.0], [-2.0]]), torch.ones(1, 1), training=True, activation=act
            )
            for act in (module, name)
        )
        assert torch.equal(a, b)
