"""Layers and data that the tests of the inverse problem share."""

import torch
from torch import nn

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
BN = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
MODES = ["zeros", "circular", "reflect", "replicate"]


def random_bn(axes, channels, **options):
    """Eval-mode batch normalisation with random parameters and statistics, float64."""
    bn = BN[axes](channels, **options).double().eval()
    with torch.no_grad():
        bn.running_mean.normal_()
        bn.running_var.uniform_(0.5, 2)
        if bn.affine:
            bn.weight.normal_()
            bn.bias.normal_()
    return bn


def random_layer(shape, out, kernel, seed=0, **options):
    """A float64 convolution and batch normalisation for inputs of shape (C, *spatial)."""
    torch.manual_seed(seed)
    axes = len(shape) - 1
    return CONV[axes](shape[0], out, kernel, **options).double(), random_bn(axes, out)


def trained_layer(shape, N, dtype=torch.float64, seed=0, kernel=3, **options):
    """A square default-initialised layer whose running statistics are those of the batch it sees: conv, bn, z, x."""
    torch.manual_seed(seed)
    axes = len(shape) - 1
    options = {"padding": kernel // 2, **options}
    conv = CONV[axes](shape[0], shape[0], kernel, **options).to(dtype)
    bn = BN[axes](shape[0], momentum=None).to(dtype)
    z = torch.rand(N, *shape, dtype=dtype)
    with torch.no_grad():
        bn(conv(z))
        return conv, bn.eval(), z, bn(conv(z))
