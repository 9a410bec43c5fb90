"""Models that fuse and fold are tested with, and comparisons of a model with its fused copy."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

import convbn_ext as cb


class Residual(nn.Module):
    """ResNet's basic block: two chains, the second with the residual; the ReLU is called twice."""

    def __init__(self, c_in=4, c_out=4, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out)
        self.conv2, self.bn2 = nn.Conv2d(c_out, c_out, 3, padding=1), nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride), nn.BatchNorm2d(c_out))

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Dense(nn.Module):
    """DenseNet's layer: takes a tensor or a list of tensors."""

    def __init__(self):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.norm2, self.conv2 = nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, features):
        x = features if isinstance(features, torch.Tensor) else torch.cat(features, 1)
        return self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x)))), inplace=True))


class Wrapped(nn.Module):
    """A tree with functional activations, a linear pair, and a branch that depends on the mode."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding="same"), nn.BatchNorm2d(4), nn.LeakyReLU(0.2))
        self.blocks = nn.Sequential(Residual(), Residual(4, 6, 2))
        self.aux_conv, self.aux_bn = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
        self.fc, self.bn = nn.Linear(6, 5), nn.BatchNorm1d(5)

    def forward(self, x):
        x = self.blocks(self.stem(x))
        if self.training:
            x = x + F.silu(self.aux_bn(self.aux_conv(x)))
        return F.hardswish(self.bn(self.fc(x.mean((2, 3)))))


def randomized(model):
    torch.manual_seed(0)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.affine:
            nn.init.normal_(m.weight)
            nn.init.normal_(m.bias)
    return model.double()


def assert_alike(plain, fused, *inputs, steps=2):
    """Same outputs, gradients, running statistics and keys in training, then the same outputs in eval."""
    assert list(fused.state_dict()) == list(plain.state_dict())
    for training in (True,) * steps + (False,):
        plain.train(training)
        fused.train(training)
        a = [i.clone().requires_grad_() for i in inputs]
        b = [i.clone().requires_grad_() for i in inputs]
        expected, got = plain(*a), fused(*b)
        torch.testing.assert_close(got, expected)
        expected.square().sum().backward()
        got.square().sum().backward()
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(y.grad, x.grad)
    for (name, p), q in zip(plain.named_parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=name)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[name], value, msg=name)


def fused_copy(model, *args, **options):
    fused, report = cb.fuse(copy.deepcopy(model), *args, report=True, **options)
    return fused, report


IMAGE = torch.randn(3, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
FEATURES = torch.randn(3, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def operators(model, *inputs):
    """Names of the convolution and normalisation operators that a call runs."""
    with torch.profiler.profile() as profile, torch.no_grad():
        model(*inputs)
    names = [event.name for event in profile.events()]
    return names.count("convbn_ext::conv_bn_forward"), names.count("aten::batch_norm")


class Chain(nn.Module):
    """conv → bn with a forward given by the test."""

    def __init__(self, forward):
        super().__init__()
        self.conv, self.bn, self.other = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.relu, self.steps, self.seen = nn.ReLU(inplace=True), 0, []
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


class Branching(nn.Module):
    """Not traceable: a branch on a value. ``path`` picks what the forward does."""

    def __init__(self, path="chain"):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU()
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.path, self.kept = path, None

    def forward(self, x):
        y = self.conv(x)
        if self.path == "keeps":
            self.kept = y
        if self.path == "view" or (self.path == "later" and float(x.detach().mean()) > 5):
            y = y.flatten(2).view_as(y)
        z = self.act(self.bn(y))
        if float(z.detach().abs().mean()) > 1e9:
            return z
        z = self.bn2(self.conv2(z)) + z
        return (z, y) if self.path == "returns" else z
