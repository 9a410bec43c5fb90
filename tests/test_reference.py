"""The reference against itself (loops, naive chain, closed form) and against torch autograd, in float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from convbn_ext import reference

ACTIVATIONS = ["identity", "relu", "leaky_relu", "leaky_relu(0.2)", "silu", "gelu", "hardswish"]
ROUNDING = 1e-13

# (x, w, stride, padding, dilation, groups); each spatial rank, then one reason per row
CONVOLUTIONS = [
    ((2, 3, 7), (4, 3, 3), (1,), (1,), (1,), 1),
    ((2, 4, 9), (6, 2, 3), (2,), (2,), (2,), 2),  # everything at once
    ((2, 3, 5, 6), (4, 3, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    ((1, 4, 7, 6), (4, 1, 3, 2), (2, 1), (0, 1), (1, 2), 4),  # depthwise, uneven in every option
    ((2, 3, 6, 6), (2, 3, 1, 1), (2, 2), (0, 0), (1, 1), 1),  # the stride skips inputs
    ((1, 2, 4, 3, 5), (4, 1, 2, 3, 2), (1, 1, 2), (1, 1, 0), (1, 1, 2), 2),
]


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def close(a, b):
    """Largest difference within rounding, relative to the larger array; NaN fails."""
    a, b = np.asarray(a), np.asarray(b)
    return a.shape == b.shape and bool(np.abs(a - b).max() <= ROUNDING * max(1.0, np.abs(b).max()))


@pytest.mark.parametrize(("x", "w", "stride", "padding", "dilation", "groups"), CONVOLUTIONS)
def test_convolution_loops_against_torch(x, w, stride, padding, dilation, groups):
    tensors = [torch.tensor(random(*s, seed=i), requires_grad=True) for i, s in enumerate((x, w, w[:1]))]
    conv = (F.conv1d, F.conv2d, F.conv3d)[len(x) - 3]
    y = conv(*tensors, stride, padding, dilation, groups)
    dy = torch.tensor(random(*y.shape, seed=3))
    arrays = [t.detach().numpy() for t in tensors]
    assert close(reference.convolution_loops(*arrays, stride, padding, dilation, groups), y.detach())
    ours = reference.convolution_backward_loops(*arrays[:2], dy.numpy(), stride, padding, dilation, groups)
    for mine, theirs in zip(ours, torch.autograd.grad(y, tensors, dy), strict=True):
        assert close(mine, theirs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(8, 3), (4, 3, 5), (2, 3, 4, 5), (2, 3, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
def test_closed_form_against_naive_chain_and_torch(shape, activation, with_residual):
    y, grad_output, residual = (random(*shape, seed=i) for i in range(3))
    y += 3.0  # a mean that has to be subtracted
    gamma, beta = np.array([2.0, -0.5, 0.3]), np.array([0.1, -1.0, 0.0])  # γ < 0 too
    arguments = (gamma, beta, 1e-5, residual if with_residual else None, activation)
    naive = reference.batch_norm_backward_naive(grad_output, y, *arguments)
    closed = reference.batch_norm_backward_closed(grad_output, y, *arguments)
    for a, b in zip(closed, naive, strict=True):
        assert close(a, b)

    tensors = [torch.tensor(t, requires_grad=True) for t in (y, gamma, beta, residual)]
    u = F.batch_norm(tensors[0], None, None, tensors[1], tensors[2], training=True, eps=1e-5)
    out = reference._activate(u + tensors[3] if with_residual else u + 0 * tensors[3], activation)
    assert close(reference.batch_norm(y, *arguments), out.detach())
    theirs = torch.autograd.grad(out, tensors, torch.tensor(grad_output))
    for a, b in zip(closed[: 4 if with_residual else 3], theirs, strict=False):
        assert close(a, b)


def test_gradient_of_y_is_orthogonal_to_ones_and_to_x_hat():
    """What normalisation removes from y, its backward pass removes from dy (exactly so for ε = 0)."""
    y, g = random(4, 3, 5), random(4, 3, 5, seed=1)
    dy, *_ = reference.batch_norm_backward_closed(g, y, np.ones(3), np.zeros(3), eps=0.0)
    x_hat, _, _ = reference.normalize(y, eps=0.0)
    assert close(dy.sum(axis=(0, 2)), np.zeros(3))
    assert close((dy * x_hat).sum(axis=(0, 2)), np.zeros(3))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_layer_from_loops_against_conv_bn(activation):
    """Convolution, BN, residual and activation by loops and closed form = `conv_bn` and autograd through it."""
    x, w, b = random(2, 3, 5, 6), random(4, 3, 3, 3, seed=1), random(4, seed=2)
    gamma, beta, residual = random(4, seed=3), random(4, seed=4), random(2, 4, 3, 6, seed=5)
    geometry = {"stride": (2, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
    grad_output = random(2, 4, 3, 6, seed=6)

    y = reference.convolution_loops(x, w, b, **geometry)
    out = reference.batch_norm(y, gamma, beta, 1e-5, residual, activation)
    dy, d_gamma, d_beta, d_residual = reference.batch_norm_backward_closed(
        grad_output, y, gamma, beta, 1e-5, residual, activation
    )
    dx, dw, db = reference.convolution_backward_loops(x, w, dy, **geometry)

    tensors = [torch.tensor(t, requires_grad=True) for t in (x, w, b, gamma, beta, residual)]
    tx, tw, tb, tg, tbeta, tr = tensors
    theirs = reference.conv_bn(
        tx, tw, tb, bn_weight=tg, bn_bias=tbeta, residual=tr, training=True, activation=activation, **geometry
    )
    assert close(out, theirs.detach())
    gradients = torch.autograd.grad(theirs, tensors, torch.tensor(grad_output))
    for mine, other in zip((dx, dw, db, d_gamma, d_beta, d_residual), gradients, strict=True):
        assert close(mine, other)
    assert close(db, np.zeros(4)), "the convolution's bias cancels in training"


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("padding_mode", ["zeros", "circular", "reflect", "replicate"])
@pytest.mark.parametrize("padding", [0, 1, (2, 1), "same", "valid"], ids=str)
def test_conv_bn_against_torch_modules(padding, padding_mode, training):
    torch.manual_seed(0)
    options = {"padding": padding, "dilation": (1, 2), "groups": 2, "padding_mode": padding_mode}
    conv = torch.nn.Conv2d(4, 6, (3, 2), **options).double()
    bn = torch.nn.BatchNorm2d(6, momentum=0.3).double().train(training)
    torch.nn.init.normal_(bn.weight)
    torch.nn.init.normal_(bn.bias)
    mean, var = bn.running_mean.normal_().clone(), bn.running_var.uniform_(0.5, 2).clone()
    x = torch.randn(3, 4, 6, 7, dtype=torch.float64)
    theirs = torch.relu(bn(conv(x)))
    ours = reference.conv_bn(
        x,
        conv.weight,
        conv.bias,
        bn_weight=bn.weight,
        bn_bias=bn.bias,
        running_mean=mean,
        running_var=var,
        training=training,
        momentum=0.3,
        activation="relu",
        **options,
    )
    assert close(ours.detach(), theirs.detach())
    assert close(mean, bn.running_mean)
    assert close(var, bn.running_var)


@pytest.mark.parametrize("d", [0, 1, 3])
def test_conv_bn_in_other_dimensions(d):
    torch.manual_seed(0)
    conv = (
        torch.nn.Linear(3, 4) if d == 0 else (torch.nn.Conv1d, None, torch.nn.Conv3d)[d - 1](3, 4, 3, padding=1)
    ).double()
    bn = (torch.nn.BatchNorm1d, torch.nn.BatchNorm1d, None, torch.nn.BatchNorm3d)[d](4).double()
    x = torch.randn(5, 3, *(4,) * d, dtype=torch.float64)
    ours = reference.conv_bn(x, conv.weight, conv.bias, training=True, padding=0 if d == 0 else 1)
    assert close(ours.detach(), bn(conv(x)).detach())


def test_conv_bn_is_twice_differentiable():
    torch.manual_seed(0)
    x, w, gamma = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 2, 4, 3), (2, 2, 3, 3), (2,)))

    def f(x, w, gamma):
        return reference.conv_bn(
            x, w, bn_weight=gamma, training=True, padding=1, padding_mode="circular", activation="silu"
        )

    assert torch.autograd.gradcheck(f, (x, w, gamma))
    assert torch.autograd.gradgradcheck(f, (x, w, gamma))


def test_an_unknown_activation_is_named():
    u = np.zeros((2, 2))
    for f in (reference.activation_value, reference.activation_derivative):
        with pytest.raises(ValueError, match="unknown activation 'softmax'"):
            f(u, "softmax")
    with pytest.raises(ValueError, match="unknown activation 'softmax'"):
        reference.conv_bn(torch.zeros(2, 2), torch.ones(2, 2), activation="softmax")
