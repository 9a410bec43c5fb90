"""Folding (spec S5): the folded convolution equals bn(conv(x)) in eval mode, transposed and grouped included."""

from __future__ import annotations

import copy

import pytest
import torch
from models import IMAGE, Branching, Wrapped, randomized
from torch import nn

import convbn_ext as cb

CONVOLUTIONS = {
    "linear": (lambda **k: nn.Linear(6, 4, **k), nn.BatchNorm1d, (5, 6)),
    "1d": (lambda **k: nn.Conv1d(6, 4, 3, padding=1, **k), nn.BatchNorm1d, (2, 6, 9)),
    "2d grouped": (lambda **k: nn.Conv2d(6, 4, 3, groups=2, **k), nn.BatchNorm2d, (2, 6, 7, 8)),
    "2d depthwise": (lambda **k: nn.Conv2d(4, 4, 3, groups=4, **k), nn.BatchNorm2d, (2, 4, 7, 8)),
    "3d circular": (
        lambda **k: nn.Conv3d(6, 4, 3, padding=1, padding_mode="circular", **k),
        nn.BatchNorm3d,
        (2, 6, 4, 5, 6),
    ),
    "transposed 1d": (lambda **k: nn.ConvTranspose1d(6, 4, 3, stride=2, **k), nn.BatchNorm1d, (2, 6, 9)),
    "transposed 2d grouped": (
        lambda **k: nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1, groups=2, **k),
        nn.BatchNorm2d,
        (2, 6, 5, 6),
    ),
    "transposed 3d grouped": (lambda **k: nn.ConvTranspose3d(6, 8, 2, groups=2, **k), nn.BatchNorm3d, (2, 6, 3, 4, 5)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_folded_equals_eval(name, bias, affine):
    torch.manual_seed(0)
    make, bn_type, shape = CONVOLUTIONS[name]
    conv = make(bias=bias).double()
    channels = conv.out_features if isinstance(conv, nn.Linear) else conv.out_channels
    bn = bn_type(channels, affine=affine).double().eval()
    with torch.no_grad():
        for p in bn.parameters():
            p.normal_()
        bn.running_mean.normal_()
        bn.running_var.uniform_(0.5, 2)
    before = copy.deepcopy(conv.state_dict())
    folded = cb.fold(conv, bn)
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(folded(x), bn(conv(x)))
    assert type(folded) is type(conv)
    assert all(torch.equal(v, before[k]) for k, v in conv.state_dict().items())


def test_eval_equals_folded():
    """One layer three ways: fused with gradients, fused without (folded on the fly), and folded once."""
    torch.manual_seed(0)
    layer = cb.ConvBN2d(6, 4, 3, padding=1, groups=2).double()
    layer(torch.randn(8, 6, 9, 9, dtype=torch.float64))  # moves the running statistics
    layer.eval()
    x = torch.randn(2, 6, 7, 8, dtype=torch.float64)
    with_gradients = layer(x)
    assert with_gradients.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(layer(x), with_gradients)
        torch.testing.assert_close(cb.fold(layer.conv, layer.bn)(x), with_gradients)


def test_zero_gamma_folds_to_a_constant():
    bn = nn.BatchNorm2d(4).eval()
    nn.init.zeros_(bn.weight)
    nn.init.constant_(bn.bias, 2.0)
    bn.running_var.zero_()
    folded = cb.fold(nn.Conv2d(3, 4, 3), bn)
    assert torch.equal(folded(torch.randn(2, 3, 5, 5)), torch.full((2, 4, 3, 3), 2.0))


def test_bad_input():
    with pytest.raises(ValueError, match="bn has no running statistics"):
        cb.fold(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    with pytest.raises(ValueError, match="bn has 5 features, but conv has 4"):
        cb.fold(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(5))
    with pytest.raises(TypeError, match="conv must be nn.Linear, nn.Conv or nn.ConvTranspose, got ReLU"):
        cb.fold(nn.ReLU(), nn.BatchNorm2d(5))
    with pytest.raises(TypeError, match="bn must be nn.BatchNorm1d"):
        cb.fold(nn.Conv2d(3, 4, 3), nn.ReLU())


def test_fold_model():
    plain = randomized(Wrapped())
    plain(IMAGE)
    folded = cb.fold(plain)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.modules())
    assert plain.training
    torch.testing.assert_close(folded(IMAGE), plain.eval()(IMAGE))
    branching = randomized(Branching())
    branching(IMAGE)
    folded = cb.fold(branching, example=IMAGE)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    torch.testing.assert_close(folded(IMAGE), branching.eval()(IMAGE))
    transposed = nn.Sequential(nn.ConvTranspose2d(3, 4, 2, groups=1), nn.BatchNorm2d(4), nn.ReLU()).double()
    transposed(IMAGE)
    torch.testing.assert_close(cb.fold(transposed)(IMAGE), transposed.eval()(IMAGE))
    layer = cb.ConvBN2d(3, 4, 3, activation="silu").double()
    layer(IMAGE)
    torch.testing.assert_close(cb.fold(layer)(IMAGE), layer.eval()(IMAGE))
