"""Group, layer and instance normalisation after the convolution (spec S8), by batch normalisation's kernels."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import convbn_ext as cb

NORMS = {
    "group": (3, 3),
    "layer": (None, 1),
    "instance": (None, 6),
}  # num_groups; nn.GroupNorm's groups of 6 channels


def tensors(shape, kernel=3, dtype=torch.float64):
    torch.manual_seed(0)
    x, weight = torch.randn(shape, dtype=dtype), torch.randn(6, shape[1], *[kernel] * (len(shape) - 2), dtype=dtype)
    return [t.requires_grad_() for t in (x, weight, *torch.randn(3, 6, dtype=dtype).unbind())]


def eager(x, weight, bias, gamma, beta, groups, residual=None, activation=lambda v: v):
    y = (F.linear, F.conv1d, F.conv2d, F.conv3d)[x.dim() - 2](x, weight, bias)
    v = F.group_norm(y, groups, gamma, beta, 1e-5)
    return activation(v if residual is None else v + residual)


def ours(x, weight, bias, gamma, beta, norm, **options):
    options = {"norm": norm, "num_groups": NORMS[norm][0], **options}
    return cb.conv_bn(x, weight, bias, bn_weight=gamma, bn_bias=beta, **options)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(4, 3, 7), (4, 3, 6, 7), (2, 3, 5, 4, 6)], ids=["1d", "2d", "3d"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_forward_and_backward(norm, shape, channels_last):
    arguments = tensors(shape)
    if channels_last and len(shape) == 4:
        arguments[0] = arguments[0].detach().to(memory_format=torch.channels_last).requires_grad_()
    residual = torch.randn_like(eager(*arguments, 1)).requires_grad_()
    expected = eager(*arguments, NORMS[norm][1], residual, F.silu)
    out = ours(*arguments, norm, residual=residual, activation="silu")
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    for got, exact in zip(
        torch.autograd.grad(out, [*arguments, residual], grad),
        torch.autograd.grad(expected, [*arguments, residual], grad),
        strict=True,
    ):
        torch.testing.assert_close(got, exact)


def test_linear_layers_have_groups_too():
    x, weight, *vectors = tensors((5, 4))
    torch.testing.assert_close(ours(x, weight, *vectors, "layer"), eager(x, weight, *vectors, 1))
    torch.testing.assert_close(ours(x, weight, *vectors, "group"), eager(x, weight, *vectors, 3))


@pytest.mark.parametrize("norm", NORMS)
def test_gradcheck(norm):
    arguments = [
        t.detach()[:1].requires_grad_() if t.dim() == 3 and i == 0 else t for i, t in enumerate(tensors((2, 2, 5)))
    ]
    call = lambda *a: ours(*a, norm, activation="gelu")  # noqa: E731
    assert torch.autograd.gradcheck(call, arguments)
    assert torch.autograd.gradgradcheck(call, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_accurate_as_torch(dtype):
    exact = [t.detach() for t in tensors((4, 3, 8, 8), dtype=torch.float64)]
    low = [t.to(dtype) for t in exact]
    rounded = [t.double() for t in low]
    reference = eager(*rounded, 3)
    error = lambda out: float((out.double() - reference).abs().max())  # noqa: E731
    floor = 4 * torch.finfo(dtype).eps * float(reference.abs().max())
    out = ours(*low, "group")
    assert out.dtype == dtype
    assert error(out) <= 2 * error(eager(*low, 3)) + floor


def test_mean_far_larger_than_the_deviation():
    x, weight, *_ = (t.detach() for t in tensors((2, 3, 9, 9), dtype=torch.float32))
    x = x + 1e4 * weight.sum()
    reference = eager(x.double(), weight.double(), None, None, None, 3)
    error = lambda out: float((out.double() - reference).abs().max())  # noqa: E731
    assert error(ours(x, weight, None, None, None, "group")) <= 2 * error(eager(x, weight, None, None, None, 3))


@pytest.mark.parametrize(
    ("options", "plain"),
    [
        ({"norm": "group", "num_groups": 2}, lambda: nn.GroupNorm(2, 6)),
        ({"norm": "layer"}, lambda: nn.GroupNorm(1, 6)),
        ({"norm": "instance"}, lambda: nn.InstanceNorm2d(6, affine=True)),
    ],
    ids=["group", "layer", "instance"],
)
def test_layers(options, plain):
    torch.manual_seed(0)
    layer = cb.ConvBN2d(3, 6, 3, activation="relu", **options).double()
    other = nn.Sequential()
    other.add_module("conv", copy.deepcopy(layer.conv))
    other.add_module("bn", plain().double())
    with torch.no_grad():
        for p in other.bn.parameters():
            p.normal_()
    layer.load_state_dict(other.state_dict(), strict=True)
    x = torch.randn(3, 3, 7, 8, dtype=torch.float64)
    for training in (True, False):
        torch.testing.assert_close(layer.train(training)(x), torch.relu(other.train(training)(x)))
    fused = cb.ConvBN2d.from_modules(other.conv, other.bn, "relu")
    torch.testing.assert_close(fused(x), torch.relu(other(x)))
    torch.testing.assert_close(cb.unfuse(layer)(x), torch.relu(other(x)))


def test_empty_batch():
    x, weight, *vectors = tensors((2, 3, 6, 6))
    out = ours(x[:0], weight, *vectors, "group")
    assert out.shape == (0, 6, 4, 4)
    assert all(not g.any() for g in torch.autograd.grad(out.sum(), [weight, *vectors]))


def test_bad_input():
    x, weight, *vectors = tensors((2, 3, 6, 6))
    with pytest.raises(ValueError, match="norm must be one of batch, group, layer, instance, got 'weight'"):
        cb.conv_bn(x, weight, norm="weight")
    with pytest.raises(ValueError, match="num_groups must divide the 6 output channels, got 4"):
        cb.conv_bn(x, weight, norm="group", num_groups=4)
    with pytest.raises(ValueError, match="num_groups must be given with norm='group' alone, got None with 'group'"):
        cb.conv_bn(x, weight, norm="group")
    refused = "running_mean, running_var, num_batches_tracked and process_group must be None with norm='layer'"
    with pytest.raises(ValueError, match=refused):
        cb.conv_bn(x, weight, norm="layer", running_mean=vectors[0].detach(), running_var=vectors[0].detach())
    with pytest.raises(ValueError, match="memory must be 'save' with norm='layer' or a process_group, got 'invert'"):
        cb.conv_bn(x, weight, norm="layer", memory="invert")
    with pytest.raises(ValueError, match="bn must have track_running_stats=False"):
        cb.ConvBN2d.from_modules(nn.Conv2d(3, 6, 3), nn.InstanceNorm2d(6, track_running_stats=True))


@pytest.mark.parametrize("name", ["bn_statistics", "bn_apply", "bn_backward_reduce", "bn_backward_apply"])
def test_opcheck_of_the_normalisation_alone(name):
    y, grad = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    mean, scale, bias, a, b, c = torch.rand(6, 3, dtype=torch.float64)
    arguments = (y, mean, scale + 0.5, bias, torch.randn_like(y), "relu", 0.0)
    given = {"bn_statistics": (y,), "bn_apply": arguments, "bn_backward_reduce": (grad, *arguments)}
    given["bn_backward_apply"] = (grad, *arguments, a, b, c)
    torch.library.opcheck(getattr(torch.ops.convbn_ext, name).default, given[name])
