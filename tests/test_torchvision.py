"""fuse on torchvision's models: every pair is fused; outputs, gradients, statistics and keys are the plain model's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import convbn_ext as cb

torchvision = pytest.importorskip("torchvision", reason="torchvision fits one torch only; `make cuda` has it")

# name, image size, Conv+BN pairs, pairs with a residual
MODELS = [
    ("resnet18", 32, 20, 8),
    ("resnet50", 32, 53, 16),
    ("vgg16_bn", 32, 13, 0),
    ("densenet121", 32, 59, 0),
    ("mobilenet_v2", 32, 52, 0),
    ("mobilenet_v3_small", 32, 34, 0),
    ("mobilenet_v3_large", 32, 46, 0),
    ("shufflenet_v2_x0_5", 32, 56, 0),
    ("googlenet", 48, 59, 0),
    ("efficientnet_b0", 32, 49, 0),
]


def build(name):
    torch.manual_seed(0)
    options = {"aux_logits": True, "init_weights": False} if name == "googlenet" else {}
    model = getattr(torchvision.models, name)(num_classes=10, **options).double()
    if name == "vgg16_bn":  # 120 million weights in which there is nothing to fuse
        model.classifier = nn.Linear(512 * 7 * 7, 10).double()
    for m in model.modules():  # dropout draws random numbers, and would hide which path is taken
        if isinstance(m, nn.Dropout):
            m.p = 0.0
        if isinstance(m, torchvision.ops.StochasticDepth):
            m.p = 0.0
    return model


def pairs_of(model, x):
    """Batch normalisations that read the very output of a convolution, found by hooks in a training call."""
    outputs, pairs = {}, []

    def look(module, args, out):
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and id(args[0]) in outputs:
            pairs.append(module)
        if isinstance(module, nn.Conv2d):
            outputs[id(out)] = out  # kept alive: ids stay unique

    probe = copy.deepcopy(model)
    for module in probe.modules():
        module.register_forward_hook(look)
    with torch.no_grad():
        probe(x)
    return len(pairs)


@pytest.mark.parametrize(("name", "size", "count", "residuals"), MODELS, ids=[m[0] for m in MODELS])
def test_model(name, size, count, residuals, capsys):
    plain = build(name)
    fused, report = cb.fuse(copy.deepcopy(plain), report=True)
    x = torch.randn(4, 3, size, size, dtype=torch.float64)
    assert pairs_of(plain, x) == count
    with capsys.disabled():
        activations = sum(bool(c.activation or c.functional) for c in report.fused)
        with_residual = sum(c.residual for c in report.fused)
        print(
            f"\n{name}: {len(report.fused)} of {count} Conv+BN pairs fused, {activations} with their activation, ",
            end="",
        )
        print(f"{with_residual} with a residual", end=" ")
    assert len(report.fused) == count
    assert report.share == 1
    assert with_residual == residuals
    assert list(fused.state_dict()) == list(plain.state_dict())
    results = []
    for model in (plain, fused):
        model.train()
        out = model(x)
        loss = sum(o.square().sum() for o in (out if isinstance(out, tuple) else (out,)) if o is not None)
        loss.backward()
        with torch.no_grad():
            results.append((loss.detach(), model.eval()(x)))
    torch.testing.assert_close(results[1], results[0])
    scale = max(p.grad.abs().max() for p in plain.parameters())
    for (key, p), q in zip(plain.named_parameters(), fused.parameters(), strict=True):
        # a bias in front of a batch normalisation has gradient zero, up to rounding in the plain model
        torch.testing.assert_close(q.grad, p.grad, atol=1e-9 * float(scale), rtol=1e-6, msg=key)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[key], value, msg=key)
    kinds = [type(m) for m in cb.unfuse(fused).modules()]
    assert kinds == [type(m) for m in plain.modules()]
