"""Forward mode and torch.func's transforms: what torch's own layers give; and no work for gradients nobody wants."""

from __future__ import annotations

import copy

import pytest
import torch
from test_fuse import FEATURES, Residual, randomized
from torch import nn

import convbn_ext as cb


@pytest.fixture(params=["training", "eval"])
def pair(request):
    """A plain model and its fused copy, in the mode that the test runs in."""
    plain = randomized(Residual(4, 6, 2))
    plain(FEATURES)
    for m in plain.modules():  # torch's own batch_norm cannot move statistics inside a transform
        if isinstance(m, nn.BatchNorm2d) and request.param == "training":
            m.track_running_stats, m.running_mean, m.running_var = False, None, None
    plain.train(request.param == "training")
    return plain, cb.fuse(copy.deepcopy(plain))


def direction(like):
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(3), dtype=like.dtype)


def test_jvp_and_vjp(pair):
    v = direction(FEATURES)
    expected, got = (torch.func.jvp(model, (FEATURES,), (v,)) for model in pair)
    torch.testing.assert_close(got, expected)
    (expected, pull), (got, our_pull) = (torch.func.vjp(model, FEATURES) for model in pair)
    torch.testing.assert_close(our_pull(direction(got)), pull(direction(expected)))


def test_dual_numbers(pair):
    with torch.autograd.forward_ad.dual_level():
        outs = [model(torch.autograd.forward_ad.make_dual(FEATURES, direction(FEATURES))) for model in pair]
        tangents = [torch.autograd.forward_ad.unpack_dual(out).tangent for out in outs]
    assert tangents[0].abs().max() > 0
    torch.testing.assert_close(tangents[1], tangents[0])


def test_jvp_in_the_parameters(pair):
    outs = []
    for model in pair:
        parameters = {k: v.detach() for k, v in model.named_parameters()}
        tangents = {k: direction(v) for k, v in parameters.items()}
        call = lambda p, m=model: torch.func.functional_call(m, p, (FEATURES,))  # noqa: E731
        outs.append(torch.func.jvp(call, (parameters,), (tangents,)))
    torch.testing.assert_close(outs[1], outs[0])


def test_vmap(pair):
    """Over inputs, over an ensemble's parameters, and over gradients."""
    batches = torch.stack([FEATURES, FEATURES + 1])
    expected, got = (torch.func.vmap(model)(batches) for model in pair)
    torch.testing.assert_close(got, expected)
    found = []
    for model in pair:
        other = copy.deepcopy(model)
        with torch.no_grad():
            for p in other.parameters():
                p.mul_(1.1)
        parameters, buffers = torch.func.stack_module_state([model, other])
        call = lambda p, b, m=model: torch.func.functional_call(m, (p, b), (FEATURES,)).square().sum()  # noqa: E731
        found.append(torch.func.vmap(torch.func.grad(call))(parameters, buffers))
    torch.testing.assert_close(found[1], found[0])


def test_second_derivatives_forward_over_reverse():
    layer = cb.ConvBN2d(1, 2, 2, activation="silu").double()
    plain = cb.unfuse(copy.deepcopy(layer))
    for model in (layer, plain):
        model.bn.track_running_stats, model.bn.running_mean, model.bn.running_var = False, None, None
    x = direction(torch.empty(2, 1, 3, 2, dtype=torch.float64))
    hessians = [torch.func.hessian(lambda x, m=model: m(x).square().sum())(x) for model in (plain, layer)]
    torch.testing.assert_close(hessians[1], hessians[0])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("wanted", ["bn", "conv.weight", "input"])
def test_gradients_that_nobody_wants_cost_nothing(training, wanted):
    layer = cb.ConvBN2d(4, 4, 3, activation="relu").train(training)
    x = FEATURES.float().clone(memory_format=torch.channels_last).requires_grad_(wanted == "input")
    for name, p in layer.named_parameters():
        p.requires_grad_(name.startswith(wanted))
    with torch.profiler.profile(record_shapes=True) as profile:
        layer(x).sum().backward()
    names = [e.name for e in profile.events()]
    assert names.count("aten::convolution_backward") == (wanted == "input")  # the library's
    assert ("aten::movedim" in names) == (wanted == "conv.weight")  # our own ends with it
    for p in layer.parameters():
        assert (p.grad is not None) == p.requires_grad
