"""What torch.library needs to know of the fused operators: shapes without data, first and second derivatives."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# ---- torch.library: shapes without data, and gradients ----


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
    return torch.empty_like(y), y if memory == "save" else input.new_empty(0), mean, var


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


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep x, w, y and per-channel vectors; with residual and activation also out (or the residual itself)."""
    input, weight, bias, bn_weight, bn_bias, residual, _, _, training, memory, *rest = inputs
    out, y, mean, var = output
    activation, slope = rest[-2:]
    ctx.mark_non_differentiable(y, mean, var)
    ctx.set_materialize_grads(False)
    sign_in_out = activation == "relu" or (activation == "leaky_relu" and slope > 0)
    needs_sign = residual is not None and activation != "identity"
    invert = memory == "invert"
    ctx.save_for_backward(
        input,
        weight,
        y if memory == "save" else None,
        mean,
        var,
        bn_weight,
        bn_bias,
        residual if invert or (needs_sign and not sign_in_out) else None,
        out if invert or (needs_sign and sign_in_out) else None,
        None if training else bias,
    )
    ctx.training, ctx.memory, ctx.rest, ctx.has_bias = training, memory, rest, bias is not None
    ctx.bias_like = None if bias is None else (bias.shape, bias.dtype)


def _backward(ctx: Any, grad_out: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    count = 18  # arguments of conv_bn_forward
    if grad_out is None:
        return (None,) * count
    needs_input, needs_weight, needs_bias, needs_bn_weight, needs_bn_bias, needs_residual = ctx.needs_input_grad[:6]
    input, weight, y, mean, var, bn_weight, bn_bias, residual, out, bias = ctx.saved_tensors
    *shape, eps, activation, slope = ctx.rest
    if bias is not None:  # μ = running_mean − bias, as a function of bias for the second derivatives
        mean = mean + (bias.detach() - bias)
    through_activation = needs_residual and activation != "identity"
    frozen_bias = needs_bias and not ctx.training
    mask = [needs_input, needs_weight, needs_bn_weight, needs_bn_bias or frozen_bias, through_activation]
    # without create_graph nothing differentiates this call, and the autograd layer would only cost time
    below = contextlib.nullcontext() if torch.is_grad_enabled() else torch._C._AutoDispatchBelowAutograd()
    with below:
        grads = torch.ops.convbn_ext.conv_bn_backward(
            grad_out, input, weight, y, mean, var, bn_weight, bn_bias, residual, out, ctx.training, ctx.memory,
            *shape, eps, activation, slope, mask,
        )  # fmt: skip
    grad_input, grad_weight, grad_bn_weight, grad_bn_bias, grad_residual = (
        g if wanted else None for g, wanted in zip(grads, mask, strict=True)
    )
    grad_bias = None
    if needs_bias:
        bias_shape, bias_dtype = ctx.bias_like
        if ctx.training:  # the mean takes it away again
            grad_bias = weight.new_zeros(bias_shape, dtype=bias_dtype)
        else:
            scale = torch.rsqrt(var + eps) * (1 if bn_weight is None else bn_weight)
            grad_bias = (scale * grads[3]).to(bias_dtype)
    if needs_residual and not through_activation:
        grad_residual = grad_out
    grad_bn_bias = grad_bn_bias if needs_bn_bias else None
    gradients = (grad_input, grad_weight, grad_bias, grad_bn_weight, grad_bn_bias, grad_residual)
    return gradients + (None,) * (count - len(gradients))


torch.library.register_autograd("convbn_ext::conv_bn_forward", _backward, setup_context=_setup_context)


# ---- second derivatives: the gradient of the gradient of the same formula in torch's own operators ----


def _compose(
    tensors: Sequence[Any], mean: Tensor, var: Tensor, out: Tensor | None, training: bool, options: Sequence[Any]
) -> Tensor:
    """act(BN(w ⋆ x) + residual); of a piecewise linear activation the sign may come from ``out``."""
    input, weight, bn_weight, bn_bias, residual = tensors
    stride, padding, dilation, groups, padding_mode, eps, activation, slope = options
    axes = input.dim() - 2
    if axes == 0:
        y = F.linear(input, weight)
    else:
        last_axis_first = [p for i in reversed(range(axes)) for p in padding[2 * i : 2 * i + 2]]
        x = F.pad(input, last_axis_first, "constant" if padding_mode == "zeros" else padding_mode)
        y = torch.ops.aten.convolution(x, weight, None, stride, [0] * axes, dilation, False, [0] * axes, groups)
    per_channel = (1, -1) + (1,) * axes
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
