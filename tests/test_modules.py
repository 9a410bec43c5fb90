"""The layers against plain nn.Conv + nn.BatchNorm: same state, same numbers, same running statistics."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import convbn_ext as cb

LAYERS = [
    (cb.ConvBN1d, nn.Conv1d, nn.BatchNorm1d, (4, 3, 12)),
    (cb.ConvBN2d, nn.Conv2d, nn.BatchNorm2d, (4, 3, 7, 6)),
    (cb.ConvBN3d, nn.Conv3d, nn.BatchNorm3d, (4, 3, 5, 4, 6)),
]
layers = pytest.mark.parametrize(("fused", "conv_type", "bn_type", "shape"), LAYERS, ids=["1d", "2d", "3d"])


def randomized(bn):
    with torch.no_grad():
        if bn.affine:
            bn.weight.normal_()
            bn.bias.normal_()
        if bn.track_running_stats:
            bn.running_mean.normal_()
            bn.running_var.uniform_(0.5, 2)
    return bn


@layers
@pytest.mark.parametrize(
    "options",
    [
        {"padding": "same", "dilation": 2},
        {"padding": "same", "bias": False},
        {"padding": 1, "stride": 2},
        {"padding": 1, "padding_mode": "circular"},
        {"padding": 1, "padding_mode": "reflect"},
        {"padding": "same", "padding_mode": "replicate"},
    ],
    ids=str,
)
def test_plain_state_dict_loads_and_trains_alike(fused, conv_type, bn_type, shape, options):
    torch.manual_seed(0)
    kernel = 2 if options["padding"] == "same" else 3  # an even kernel makes 'same' padding lopsided
    layer = fused(3, 6, kernel, activation="relu", **options).double()
    plain = nn.Sequential()
    plain.add_module("conv", conv_type(3, 6, kernel, **options))
    plain.add_module("bn", randomized(bn_type(6)))
    plain = plain.double()
    layer.load_state_dict(plain.state_dict(), strict=True)
    assert list(layer.state_dict()) == list(plain.state_dict())
    for _ in range(3):
        x = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(layer(x), torch.relu(plain(x)))
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[name], value, msg=name)
    torch.testing.assert_close(layer.eval()(x), torch.relu(plain.eval()(x)))


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("track", [True, False])
def test_bn_options(momentum, affine, track):
    torch.manual_seed(0)
    bn = randomized(nn.BatchNorm2d(4, momentum=momentum, affine=affine, track_running_stats=track)).double()
    conv = nn.Conv2d(3, 4, 3).double()
    layer = cb.ConvBN2d.from_modules(copy.deepcopy(conv), copy.deepcopy(bn))
    for training in (True, True, False, True):
        layer.train(training)
        bn.train(training)
        x = torch.randn(5, 3, 6, 6, dtype=torch.float64)
        torch.testing.assert_close(layer(x), bn(conv(x)))
    assert layer.bn.state_dict().keys() == bn.state_dict().keys()
    for name, value in bn.state_dict().items():
        torch.testing.assert_close(layer.bn.state_dict()[name], value, msg=name)


def test_from_modules_shares_state():
    conv, bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4).eval()
    layer = cb.ConvBN2d.from_modules(conv, bn, nn.LeakyReLU(0.3))
    assert layer.conv is conv
    assert layer.bn is bn
    assert not layer.training
    assert len(list(layer.parameters())) == 4


def test_linear_bn():
    torch.manual_seed(0)
    linear, bn = nn.Linear(7, 5).double(), randomized(nn.BatchNorm1d(5)).double()
    layer = cb.LinearBN(7, 5, activation="silu").double()
    layer.conv.load_state_dict(linear.state_dict())
    layer.bn.load_state_dict(bn.state_dict())
    x = torch.randn(10, 7, dtype=torch.float64)
    torch.testing.assert_close(layer(x), nn.functional.silu(bn(linear(x))))
    torch.testing.assert_close(layer.bn.running_var, bn.running_var)


def test_copies_pickles_and_trains():
    torch.manual_seed(0)
    layer = cb.ConvBN2d(3, 4, 3, activation="gelu", memory="recompute")
    x = torch.randn(4, 3, 8, 8)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(layer)
    other.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(other(x), layer(x))
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, weight_decay=0.01)
    before = [p.clone() for p in layer.parameters()]
    layer(x).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))


def test_checkpointing_and_repeated_backward():
    """Running statistics move once per forward call; a retained graph may be walked twice."""
    layer = cb.ConvBN2d(3, 4, 3)
    x = torch.randn(4, 3, 8, 8, requires_grad=True)
    out = layer(x)
    mean = layer.bn.running_mean.clone()
    first = torch.autograd.grad(out.square().sum(), x, retain_graph=True)[0]
    second = torch.autograd.grad(out.square().sum(), x)[0]
    assert torch.equal(first, second)
    assert torch.equal(mean, layer.bn.running_mean)
    assert layer.bn.num_batches_tracked == 1


def test_bad_layers():
    with pytest.raises(TypeError, match="conv must be nn.Conv2d, got Conv1d"):
        cb.ConvBN2d.from_modules(nn.Conv1d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(TypeError, match="bn must be nn.BatchNorm2d, .*, got BatchNorm1d"):
        cb.ConvBN2d.from_modules(nn.Conv2d(3, 4, 3), nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match="bn has 5 features, but conv has 4 output channels"):
        cb.ConvBN2d.from_modules(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(5))
    with pytest.raises(ValueError, match="activation must be one of"):
        cb.ConvBN2d(3, 4, 3, activation="softplus")
    with pytest.raises(ValueError, match="input must have 4 dimensions"):
        cb.ConvBN2d(3, 4, 3)(torch.randn(3, 8, 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_half_precision_weights_with_float32_statistics(dtype, norm):
    torch.manual_seed(0)
    layer = cb.ConvBN2d(3, 6, 3, activation="relu", norm=norm, num_groups=2 if norm == "group" else None)
    exact, x = copy.deepcopy(layer).double(), torch.randn(4, 3, 9, 8)
    layer.conv.to(dtype)
    exact.conv.load_state_dict(layer.conv.double().state_dict())
    layer.conv.to(dtype)
    x = x.to(dtype).contiguous(memory_format=torch.channels_last)
    out, expected = layer(x), exact(x.double())
    assert out.dtype == dtype
    assert norm != "batch" or out.is_contiguous(memory_format=torch.channels_last)
    bound = 8 * torch.finfo(dtype).eps * float(expected.detach().abs().max())
    assert float((out.double() - expected).abs().max()) <= bound
    out.sum().backward()
    assert layer.conv.weight.grad.dtype == dtype
    assert layer.bn.weight.grad.dtype == torch.float32
    if norm == "batch":
        assert layer.bn.running_var.dtype == torch.float32
        torch.testing.assert_close(layer.bn.running_var.double(), exact.bn.running_var, rtol=2e-2, atol=0)


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_autocast(norm):
    torch.manual_seed(0)
    layer = cb.ConvBN2d(3, 4, 3, norm=norm, activation="silu")
    x = torch.randn(4, 3, 8, 8)
    expected = copy.deepcopy(layer)(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)
    out.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())
