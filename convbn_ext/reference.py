"""The definitions, slow and plain: what every fast path of the package is tested against.

Three layers, each checked against the next (tests/test_reference.py): nested loops and the naive chain rule in NumPy,
the closed form of the backward pass in NumPy, and `conv_bn`, a differentiable composition of torch calls with the
arguments of `convbn_ext.conv_bn`. Call them in float64.

Symbols: y = w ⋆ x + b; per channel over the m = N·∏spatial positions μ = mean(y), σ² = mean((y − μ)²);
x̂ = (y − μ)/√(σ² + ε); out = act(γ x̂ + β + residual); g is the gradient that arrives at γ x̂ + β.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

Array = npt.NDArray[np.float64]


# Convolution, one multiplication at a time


def convolution_loops(
    x: Array,
    w: Array,
    b: Array | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Array:
    """y[n, o, p] = b[o] + Σ_{c,k} w[o, c, k]·x̄[n, c', s·p + d·k], x̄ zero-padded, c' the c-th channel of o's group.

    Args:
        x: (N, C_in, *spatial), one to three spatial axes.
        w: (C_out, C_in/groups, *kernel).
        b: (C_out,) or None.
        stride: per spatial axis, as are padding and dilation.
        padding: zeros on both sides.
        dilation: spacing of the kernel's taps.
        groups: number of channel groups.

    Returns:
        (N, C_out, *out), out = ⌊(spatial + 2·padding − dilation·(kernel − 1) − 1)/stride⌋ + 1.
    """
    y = np.zeros((x.shape[0], w.shape[0], *_output_size(x, w, stride, padding, dilation)))
    for source, tap, target in _products(x, w, y, stride, padding, dilation, groups):
        y[target] += w[tap] * x[source]
    return y if b is None else y + b.reshape(-1, *(1,) * (x.ndim - 2))


def convolution_backward_loops(
    x: Array,
    w: Array,
    dy: Array,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Array, Array, Array]:
    """Gradients of `convolution_loops`: each product w·x of the forward pass sends dy·w to x and dy·x to w.

    For stride 1 that is the full correlation of dy with the kernel turned by 180°, and the correlation of x with dy.

    Returns:
        dx (N, C_in, *spatial), dw (C_out, C_in/groups, *kernel) and db (C_out,) = Σ dy.
    """
    dx, dw = np.zeros_like(x), np.zeros_like(w)
    for source, tap, target in _products(x, w, dy, stride, padding, dilation, groups):
        dx[source] += dy[target] * w[tap]
        dw[tap] += dy[target] * x[source]
    return dx, dw, dy.sum(axis=_positions(dy))


def _output_size(
    x: Array, w: Array, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, ...]:
    axes = zip(x.shape[2:], w.shape[2:], stride, padding, dilation, strict=True)
    return tuple((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in axes)


def _products(
    x: Array, w: Array, y: Array, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Any:
    """Index triples (into x, into w, into y) of every product in the convolution that does not read the padding."""
    outputs_per_group, inputs_per_group = w.shape[0] // groups, w.shape[1]
    for o, p in itertools.product(range(w.shape[0]), np.ndindex(y.shape[2:])):
        first = o // outputs_per_group * inputs_per_group
        for c, k in itertools.product(range(inputs_per_group), np.ndindex(w.shape[2:])):
            position = tuple(s * i + d * j - lo for i, j, s, d, lo in zip(p, k, stride, dilation, padding, strict=True))
            if all(0 <= i < size for i, size in zip(position, x.shape[2:], strict=True)):
                for n in range(x.shape[0]):
                    yield (n, first + c, *position), (o, c, *k), (n, o, *p)


# Batch normalisation + residual + activation, forward and two ways back


def _positions(y: Array) -> tuple[int, ...]:
    """Every axis but the channels."""
    return (0, *range(2, y.ndim))


def _per_channel(v: Array, y: Array) -> Array:
    return v.reshape(1, -1, *(1,) * (y.ndim - 2))


def normalize(y: Array, eps: float) -> tuple[Array, Array, Array]:
    """x̂ = (y − μ)/√(σ² + ε) with the batch's own biased statistics.

    Args:
        y: (N, C, *spatial).
        eps: ε.

    Returns:
        x̂ of y's shape, μ (C,) and σ² (C,).
    """
    mean = y.mean(axis=_positions(y))
    var = ((y - _per_channel(mean, y)) ** 2).mean(axis=_positions(y))
    return (y - _per_channel(mean, y)) / np.sqrt(_per_channel(var, y) + eps), mean, var


def batch_norm(
    y: Array, gamma: Array, beta: Array, eps: float, residual: Array | None = None, activation: str = "identity"
) -> Array:
    """Return act(γ x̂ + β + residual), training mode; y, residual and the result are (N, C, *spatial), γ and β (C,)."""
    x_hat, _, _ = normalize(y, eps)
    u = _per_channel(gamma, y) * x_hat + _per_channel(beta, y)
    return activation_value(u if residual is None else u + residual, activation)


def batch_norm_backward_naive(
    grad_output: Array,
    y: Array,
    gamma: Array,
    beta: Array,
    eps: float,
    residual: Array | None = None,
    activation: str = "identity",
) -> tuple[Array, Array, Array, Array]:
    """The chain rule step by step, dx̂ → dσ² → dμ → dy, as Ioffe and Szegedy (2015) write it.

    Args:
        grad_output: gradient at the output of `batch_norm`, (N, C, *spatial).
        y: the convolution's output; the other arguments are those of `batch_norm`.
        gamma: (C,).
        beta: (C,).
        eps: ε.
        residual: like y, or None.
        activation: name, see `activation_value`.

    Returns:
        dy, dγ, dβ and the gradient of the residual, which is g itself.
    """
    x_hat, mean, var = normalize(y, eps)
    g = _before_activation(grad_output, x_hat, y, gamma, beta, residual, activation)
    axes, m = _positions(y), y.size // y.shape[1]
    centered, std = y - _per_channel(mean, y), np.sqrt(_per_channel(var, y) + eps)

    d_xhat = g * _per_channel(gamma, y)
    d_var = (d_xhat * centered * -0.5 / std**3).sum(axis=axes)
    d_mean = (-d_xhat / std).sum(axis=axes) + d_var * (-2 * centered).mean(axis=axes)
    dy = d_xhat / std + _per_channel(d_var, y) * 2 * centered / m + _per_channel(d_mean, y) / m
    return dy, (g * x_hat).sum(axis=axes), g.sum(axis=axes), g


def batch_norm_backward_closed(
    grad_output: Array,
    y: Array,
    gamma: Array,
    beta: Array,
    eps: float,
    residual: Array | None = None,
    activation: str = "identity",
) -> tuple[Array, Array, Array, Array]:
    """The same in two reductions and one pass: dy = γ/√(σ² + ε)·(g − dβ/m − x̂·dγ/m), dβ = Σ g, dγ = Σ g x̂.

    Arguments and results are those of `batch_norm_backward_naive`.
    """
    x_hat, _, var = normalize(y, eps)
    g = _before_activation(grad_output, x_hat, y, gamma, beta, residual, activation)
    axes, m = _positions(y), y.size // y.shape[1]

    d_beta, d_gamma = g.sum(axis=axes), (g * x_hat).sum(axis=axes)
    dy = _per_channel(gamma / np.sqrt(var + eps), y) * (
        g - _per_channel(d_beta / m, y) - x_hat * _per_channel(d_gamma / m, y)
    )
    return dy, d_gamma, d_beta, g


def _before_activation(
    grad_output: Array, x_hat: Array, y: Array, gamma: Array, beta: Array, residual: Array | None, activation: str
) -> Array:
    u = _per_channel(gamma, y) * x_hat + _per_channel(beta, y)
    return grad_output * activation_derivative(u if residual is None else u + residual, activation)


# Activations

_erf = np.vectorize(math.erf, otypes=[np.float64])


def split_activation(activation: str) -> tuple[str, float]:
    """Name and slope: ``"leaky_relu(0.2)"`` is ``("leaky_relu", 0.2)``, plain ``"leaky_relu"`` has slope 0.01."""
    match = re.fullmatch(r"leaky_relu\((.+)\)", activation)
    return ("leaky_relu", float(match[1])) if match else (activation, 0.01)


def activation_value(u: Array, activation: str) -> Array:
    """act(u) for identity, relu, leaky_relu, silu, gelu (the exact one) or hardswish."""
    name, slope = split_activation(activation)
    if name == "identity":
        return u
    if name == "relu":
        return np.maximum(u, 0)
    if name == "leaky_relu":
        return np.where(u > 0, u, slope * u)
    if name == "silu":
        return u / (1 + np.exp(-u))
    if name == "gelu":
        return u * 0.5 * (1 + _erf(u / math.sqrt(2)))
    if name == "hardswish":
        return u * np.clip(u + 3, 0, 6) / 6
    raise ValueError(f"reference: unknown activation {activation!r}")


def activation_derivative(u: Array, activation: str) -> Array:
    """act′(u); at a kink the value PyTorch takes."""
    name, slope = split_activation(activation)
    if name == "identity":
        return np.ones_like(u)
    if name == "relu":
        return (u > 0).astype(u.dtype)
    if name == "leaky_relu":
        return np.where(u > 0, 1.0, slope)
    if name == "silu":
        s = 1 / (1 + np.exp(-u))
        return s * (1 + u * (1 - s))
    if name == "gelu":
        return 0.5 * (1 + _erf(u / math.sqrt(2))) + u * np.exp(-(u**2) / 2) / math.sqrt(2 * math.pi)
    if name == "hardswish":
        return np.where(np.abs(u) < 3, u / 3 + 0.5, (u >= 3).astype(u.dtype))
    raise ValueError(f"reference: unknown activation {activation!r}")


# The whole layer in torch calls, differentiable as often as they are


def conv_bn(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    activation: str = "identity",
    residual: Tensor | None = None,
    memory: str = "save",
    process_group: Any = None,
) -> Tensor:
    """The reference of `convbn_ext.conv_bn`: same arguments, same meaning, written as a composition of torch calls.

    ``memory`` and ``process_group`` change how the fused operator computes, not what; they are accepted and ignored.

    Args:
        input: (N, C_in) or (N, C_in, *spatial) with one to three spatial axes.
        weight: (C_out, C_in) or (C_out, C_in/groups, *kernel).
        bias: (C_out,).
        bn_weight: γ, (C_out,).
        bn_bias: β, (C_out,).
        running_mean: (C_out,), updated in place in training, used in evaluation.
        running_var: (C_out,), likewise, with the unbiased variance.
        training: take the batch's statistics; so does evaluation without running statistics.
        momentum: running = (1 − momentum)·running + momentum·batch.
        eps: ε.
        stride: of the convolution, as are padding (also 'same', 'valid'), dilation, groups.
        padding: number of positions per side.
        dilation: spacing of the taps.
        groups: number of channel groups.
        padding_mode: zeros, circular, reflect or replicate.
        activation: identity, relu, leaky_relu, leaky_relu(slope), silu, gelu or hardswish.
        residual: added before the activation.
        memory: ignored.
        process_group: ignored.

    Returns:
        (N, C_out) or (N, C_out, *out).
    """
    y = _convolve(input, weight, bias, stride, padding, dilation, groups, padding_mode)
    axes, shape = [0, *range(2, y.ndim)], (1, -1, *(1,) * (y.ndim - 2))
    if training or running_mean is None or running_var is None:
        mean = y.mean(axes)
        var = (y - mean.view(shape)).square().mean(axes)
        if training and running_mean is not None and running_var is not None:
            m = y.numel() // y.shape[1]
            with torch.no_grad():
                running_mean.lerp_(mean.to(running_mean.dtype), momentum)
                running_var.lerp_((var * (m / (m - 1))).to(running_var.dtype), momentum)
    else:
        mean, var = running_mean, running_var
    u = (y - mean.view(shape)) / (var.view(shape) + eps).sqrt()
    if bn_weight is not None:
        u = u * bn_weight.view(shape)
    if bn_bias is not None:
        u = u + bn_bias.view(shape)
    return _activate(u if residual is None else u + residual, activation)


def _convolve(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: str | int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    padding_mode: str,
) -> Tensor:
    d = input.ndim - 2
    if d == 0:
        return F.linear(input, weight, bias)
    stride, dilation = _tuple(stride, d), _tuple(dilation, d)
    if padding == "same":
        total = [spacing * (k - 1) for spacing, k in zip(dilation, weight.shape[2:], strict=True)]
        sides = [(t // 2, t - t // 2) for t in total]
    else:
        sides = [(p, p) for p in _tuple(0 if padding == "valid" else padding, d)]  # type: ignore[arg-type]
    if any(lo or hi for lo, hi in sides):
        last_axis_first = [p for side in reversed(sides) for p in side]
        input = F.pad(input, last_axis_first, mode="constant" if padding_mode == "zeros" else padding_mode)
    convolution = (F.conv1d, F.conv2d, F.conv3d)[d - 1]
    return convolution(input, weight, bias, stride, 0, dilation, groups)


def _tuple(value: int | Sequence[int], d: int) -> tuple[int, ...]:
    return (value,) * d if isinstance(value, int) else tuple(value)


def _activate(u: Tensor, activation: str) -> Tensor:
    name, slope = split_activation(activation)
    if name == "identity":
        return u
    if name == "leaky_relu":
        return F.leaky_relu(u, slope)
    if name not in ("relu", "silu", "gelu", "hardswish"):
        raise ValueError(f"reference: unknown activation {activation!r}")
    return getattr(F, name)(u)
