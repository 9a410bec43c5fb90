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


def near_identity(shape, N, dtype=torch.float64, seed=0, **options):
    """A layer that is the identity + 0.1 noise, whose statistics are those of the batch it sees: conv, bn, z, x."""
    conv, bn, z, _ = trained_layer(shape, N, dtype, seed, **options)
    with torch.no_grad():
        nn.init.dirac_(conv.weight, conv.groups)
        conv.weight.add_(0.1 * torch.randn_like(conv.weight))
        bn.reset_running_stats()
        bn.train()(conv(z))
        return conv, bn.eval(), z, bn(conv(z))


def optimised_layer(shape, N, dtype=torch.float64, seed=0, **options):
    """A layer that gradient descent has taught to sharpen blurred noise: conv, bn, z, x."""
    conv, bn, z, _ = trained_layer(shape, N, dtype, seed, **options)
    axes = len(shape) - 1
    pool = {1: nn.functional.avg_pool1d, 2: nn.functional.avg_pool2d, 3: nn.functional.avg_pool3d}[axes]
    sharp = z - z.mean()
    blurred = pool(sharp, 3, stride=1, padding=1)
    optimizer = torch.optim.Adam([*conv.parameters(), *bn.parameters()], lr=0.02)
    for _ in range(40):
        loss = (bn.train()(conv(blurred)) - sharp).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return conv, bn.eval(), z, bn(conv(z))


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
