"""What torch.library needs to know of the fused operators: shapes without data, and second derivatives.

First derivatives are a node of the autograd graph in C++ (csrc/conv_bn_autograd.cpp).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# ---- shapes without data ----


@torch.library.register_fake("convbn_ext::conv_bn_forward")
def _forward_fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    memory: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    padding_mode: str,
    eps: float,
    activation: str,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channels = weight.shape[0]
    if weight.dim() == 2:
        y = input.new_empty((input.shape[0], channels))
    else:
        # torch's own convolution on fake tensors knows sizes and memory format
        x = input.new_empty(_padded_sizes(input, padding)).to(memory_format=_format_of(input))
        y = torch.ops.aten.convolution(
            x, weight, None, stride, [0] * len(stride), dilation, False, [0] * len(stride), groups
        )
    mean, var = (input.new_empty(channels, dtype=torch.float64) for _ in range(2))
    return torch.empty_like(y), y if memory in ("save", "chain") else input.new_empty(0), mean, var


def _padded_sizes(input: Tensor, padding: Sequence[int]) -> list[Any]:
    spatial = [size + padding[2 * i] + padding[2 * i + 1] for i, size in enumerate(input.shape[2:])]
    return [*input.shape[:2], *spatial]


def _format_of(input: Tensor) -> torch.memory_format:
    for dims, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if input.dim() == dims and input.is_contiguous(memory_format=memory_format) and not input.is_contiguous():
            return memory_format
    return torch.contiguous_format


@torch.library.register_fake("convbn_ext::conv_bn_backward")
def _backward_fake(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    y: Tensor | None,
    mean: Tensor,
    var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor | None,
    training: bool,
    memory: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    padding_mode: str,
    eps: float,
    activation: str,
    slope: float,
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    like = (input, weight, bn_weight, bn_bias, grad_output)
    return tuple(
        torch.empty_like(t) if wanted and t is not None else input.new_empty(0)
        for t, wanted in zip(like, output_mask, strict=True)
    )


@torch.library.register_fake("convbn_ext::update_running_statistics")
def _update_fake(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    mean: Tensor,
    var: Tensor,
    bias: Tensor | None,
    count: int,
    momentum: float,
) -> None:
    pass


@torch.library.register_fake("convbn_ext::bn_statistics")
def _statistics_fake(y: Tensor) -> tuple[Tensor, Tensor]:
    mean, var = (y.new_empty(y.shape[1], dtype=torch.float64) for _ in range(2))
    return mean, var


@torch.library.register_fake("convbn_ext::bn_apply")
def _apply_fake(
    y: Tensor, mean: Tensor, scale: Tensor, bias: Tensor, residual: Tensor | None, activation: str, slope: float
) -> Tensor:
    return torch.empty_like(y)


@torch.library.register_fake("convbn_ext::bn_backward_reduce")
def _reduce_fake(grad: Tensor, y: Tensor, mean: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(mean), torch.empty_like(mean)


@torch.library.register_fake("convbn_ext::bn_backward_apply")
def _backward_apply_fake(
    grad: Tensor, y: Tensor, mean: Tensor, scale: Tensor, bias: Tensor, residual: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(y), y.new_empty(0) if residual is None else torch.empty_like(y)


# ---- second derivatives: the gradient of the gradient of the same formula in torch's own operators ----


def convolve(
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    padding_mode: str,
    bias: Tensor | None = None,
) -> Tensor:
    """W ⋆ pad(x) + bias in torch's operators; padding is (lo, hi) per spatial axis, none for a linear layer."""
    axes = input.dim() - 2
    if axes == 0:
        return F.linear(input, weight, bias)
    none = [0] * axes
    low, high = list(padding[::2]), list(padding[1::2])
    if padding_mode == "zeros" and low == high:
        return torch.ops.aten.convolution(input, weight, bias, stride, low, dilation, False, none, groups)
    last_axis_first = [p for i in reversed(range(axes)) for p in padding[2 * i : 2 * i + 2]]
    x = F.pad(input, last_axis_first, "constant" if padding_mode == "zeros" else padding_mode)
    return torch.ops.aten.convolution(x, weight, bias, stride, none, dilation, False, none, groups)


def _compose(
    tensors: Sequence[Any], mean: Tensor, var: Tensor, out: Tensor | None, training: bool, options: Sequence[Any]
) -> Tensor:
    """act(BN(w ⋆ x) + residual); of a piecewise linear activation the sign may come from ``out``."""
    input, weight, bn_weight, bn_bias, residual = tensors
    *geometry, eps, activation, slope = options
    y = convolve(input, weight, *geometry)
    per_channel = (1, -1) + (1,) * (input.dim() - 2)
    if training:
        var, mean = torch.var_mean(y, [0, *range(2, y.dim())], correction=0, keepdim=True)
    else:
        mean, var = (s.to(y.dtype).view(per_channel) for s in (mean, var))
    v = (y - mean) * torch.rsqrt(var + eps)
    v = v if bn_weight is None else v * bn_weight.view(per_channel)
    v = v if bn_bias is None else v + bn_bias.view(per_channel)
    v = v if residual is None else v + residual
    if out is not None and activation in ("relu", "leaky_relu"):  # the sign of v + residual, without the residual
        return v * torch.where(out > 0, 1.0, slope).to(v.dtype)
    functions: dict[str, Any] = {"relu": F.relu, "silu": F.silu, "gelu": F.gelu, "hardswish": F.hardswish}
    if activation == "leaky_relu":
        return F.leaky_relu(v, slope)
    return v if activation == "identity" else functions[activation](v)


def _backward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    grad_output, input, weight, _, mean, var, bn_weight, bn_bias, residual, out, training, _, *rest = inputs
    ctx.save_for_backward(grad_output, input, weight, bn_weight, bn_bias, residual, mean, var, out)
    ctx.training, ctx.rest = training, rest
    ctx.set_materialize_grads(False)


def _double_backward(ctx: Any, *grad_grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Derivatives of (dx, dw, dγ, dβ, dr) with respect to the gradient, x, w, γ, β and the residual."""
    if all(gg is None for gg in grad_grads):
        return (None,) * 21  # arguments of conv_bn_backward
    *options, mask = ctx.rest
    *tensors, mean, var, saved_out = ctx.saved_tensors
    with torch.enable_grad():
        # frozen statistics: μ = running_mean − bias depends on the bias; batch statistics: μ is a function of x and w
        leaves: list[Any] = [None if t is None else t.detach().requires_grad_() for t in (*tensors, mean)]
        grad_output, *arguments, mean = leaves
        if arguments[-1] is None and mask[-1]:  # the residual was not kept: only out's sign matters
            arguments[-1] = torch.zeros_like(grad_output, requires_grad=True)
        out = _compose(arguments, mean, var, saved_out, ctx.training, options)
        wanted = [(t, gg) for t, gg, m in zip(arguments, grad_grads, mask, strict=True) if m and gg is not None]
        firsts = torch.autograd.grad(out, [t for t, _ in wanted], grad_output, create_graph=True)
        used = [t for t in leaves if t is not None]
        seconds = iter(torch.autograd.grad(firsts, used, [gg for _, gg in wanted], allow_unused=True))
    d = [None if t is None else next(seconds) for t in leaves]  # grad_output, x, w, γ, β, residual, μ
    return (*d[:3], None, d[6], None, *d[3:6], *(None,) * 12)


torch.library.register_autograd("convbn_ext::conv_bn_backward", _double_backward, setup_context=_backward_setup_context)
