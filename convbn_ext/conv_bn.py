"""Fused convolution + batch normalisation (+ residual + activation): the public function."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import autograd  # registers shapes and gradients of the operators
from .activation import apply_activation, parse_activation
from .geometry import Geometry
from .normalize import Normalisation, find_groups, normalize, operators, update_running

_MEMORY = ("save", "chain", "recompute", "invert")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) or hasattr(value, "__index__")  # NumPy's integers too


def _per_axis(value: int | Sequence[int], name: str, axes: int) -> tuple[int, ...]:
    values: tuple[Any, ...] = tuple(value) if isinstance(value, Sequence) else (value,) * axes
    if len(values) == 1 and axes > 1:
        values = values * axes
    if len(values) != axes or not all(map(_is_int, values)):
        raise ValueError(f"conv_bn: {name} must be an int or {axes} ints, got {value!r}")
    return values


def expand_geometry(
    kernel: Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Geometry:
    """Expand torch's shorthands: ints to one per axis, 'same' and 'valid' to numbers.

    Raises:
        ValueError: a wrong number of values, an unknown word, or 'same' with a stride other than 1.
    """
    axes = len(kernel)
    strides, dilations = _per_axis(stride, "stride", axes), _per_axis(dilation, "dilation", axes)
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ValueError(f"conv_bn: padding must be ints, 'same' or 'valid', got {padding!r}")
        if padding == "same" and any(s != 1 for s in strides):
            raise ValueError(f"conv_bn: padding='same' needs stride 1, got {stride!r}")
        totals = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilations, kernel, strict=True)]
        pads = tuple((total // 2, total - total // 2) for total in totals)
    else:
        pads = tuple((p, p) for p in _per_axis(padding, "padding", axes))
    return Geometry(tuple(kernel), strides, pads, dilations, groups, padding_mode)


@lru_cache(maxsize=4096, typed=True)
def _operator_geometry(
    kernel: tuple[int, ...], stride: Any, padding: Any, dilation: Any, groups: int, padding_mode: str
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int, str]:
    """What :func:`expand_geometry` makes of them, as the operators take it; a layer's is formed once."""
    shape = expand_geometry(kernel, stride, padding, dilation, groups, padding_mode)
    return shape.stride, tuple(p for pair in shape.padding for p in pair), shape.dilation, groups, padding_mode


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


_CHECKED = ("weight", "residual", "bias", "bn_weight", "bn_bias", "running_mean", "running_var")


def _check_tensors(input: Tensor, *others: Tensor | None) -> None:
    """Devices and dtypes must agree; per-channel vectors of a half-precision layer may be float32."""
    if not isinstance(input, Tensor) or not isinstance(others[0], Tensor):
        raise TypeError(
            f"conv_bn: input and weight must be tensors, got {type(input).__name__}, {type(others[0]).__name__}"
        )
    dtype, device = input.dtype, input.device
    for name, tensor in zip(_CHECKED, others, strict=True):
        if tensor is None or (tensor.dtype == dtype and tensor.device == device):
            continue
        if tensor.device != device:
            raise ValueError(f"conv_bn: {name} is on {tensor.device}, but input is on {device}")
        vector = name not in ("weight", "residual") and dtype in (torch.bfloat16, torch.float16)
        if not (vector and tensor.dtype == torch.float32):
            allowed = f"{dtype} or torch.float32" if vector else f"{dtype}"
            raise ValueError(f"conv_bn: {name} must have dtype {allowed} like input, got {tensor.dtype}")


def _wants_torchs_operators() -> bool:
    """Whether somebody looks at the operators: an exported graph, dual numbers, vmap or jvp of torch.func."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    if forward_ad._current_level >= 0:
        return True
    transforms = torch._C._functorch.get_interpreter_stack() or ()
    return any(transform.key() != torch._C._functorch.TransformType.Grad for transform in transforms)


def conv_bn(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    activation: str | nn.Module | None = "identity",
    residual: Tensor | None = None,
    memory: str = "save",
    process_group: Any = None,
    norm: str = "batch",
    num_groups: int | None = None,
) -> Tensor:
    """Convolution, batch normalisation, residual sum and activation in one differentiable operator.

    Equals ``act(F.batch_norm(F.convNd(pad(input), weight, bias, ...), running_mean, running_var, bn_weight, bn_bias,
    training, momentum, eps) + residual)``; for 2-d input ``F.linear`` takes the convolution's place.
    In training mode the convolution's bias cancels: it only moves running_mean, and its gradient is zero.
    ``torch.export``, forward-mode differentiation, ``torch.func.jvp`` and ``vmap`` see these operators of torch instead
    of the fused one, whose own are the first and second derivatives by ``backward``, ``torch.func.grad`` and ``vjp``.

    Args:
        input: (N, C_in) or (N, C_in, *spatial) with 1 to 3 spatial axes; float64, float32, bfloat16 or float16.
        weight: (C_out, C_in/groups, *kernel), or (C_out, C_in) for 2-d input.
        bias: (C_out,).
        bn_weight: γ, (C_out,); like all per-channel vectors in input's dtype, or float32 where that is half precision.
        bn_bias: β, (C_out,).
        running_mean: (C_out,), updated in training as ``(1 − momentum)·running + momentum·batch``.
        running_var: (C_out,), updated likewise, with the unbiased variance.
        num_batches_tracked: shape (), grows by one in training.
        training: batch statistics if true; running statistics otherwise.
        momentum: weight of the new batch in the running statistics.
        eps: added to the variance.
        stride: int or one per axis.
        padding: int, one per axis, 'same' or 'valid'.
        dilation: int or one per axis.
        groups: groups of channels.
        padding_mode: zeros, circular, reflect or replicate.
        activation: identity, relu, leaky_relu, leaky_relu(slope), silu, gelu or hardswish, or their torch modules.
        residual: added before the activation, of the output's shape.
        memory: what the backward pass starts from: "save" keeps input and the convolution's output y; "chain" y alone,
            where the input comes from another such layer, whose y gives it once more; "recompute" keeps the input and
            convolves again; "invert" recovers y from the output (identity and leaky_relu, γ ≠ 0).
        process_group: of torch.distributed; in training the statistics are those of all its processes, whose local
            batches may differ in size and be empty. Every process must call this function, and its backward pass.
            Second derivatives are not available across processes and raise NotImplementedError.
        norm: "batch"; or statistics of every sample alone, the same in training and in eval: "layer" over all
            channels and positions, "group" over those of num_groups groups of channels, "instance" over those of
            one channel. bn_weight and bn_bias are per channel in each.
        num_groups: groups of channels of norm="group".

    Returns:
        (N, C_out, *out), in channels_last if the convolution's output is.

    Raises:
        ValueError: an argument of wrong shape, dtype, device or value; the message names it.
    """
    if memory not in _MEMORY:
        raise ValueError(f"conv_bn: memory must be one of {', '.join(_MEMORY)}, got {memory!r}")
    act = parse_activation(activation)
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(input.device.type):
        dtype = torch.get_autocast_dtype(input.device.type)
        input, weight = input.to(dtype), weight.to(dtype)
        residual = None if residual is None else residual.to(dtype)
    _check_tensors(input, weight, residual, bias, bn_weight, bn_bias, running_mean, running_var)
    if num_batches_tracked is not None and num_batches_tracked.dim() != 0:
        raise ValueError(f"conv_bn: num_batches_tracked must have shape (), got {tuple(num_batches_tracked.shape)}")
    # torch.compile looks behind a cache and warns of it
    operator_geometry = _operator_geometry.__wrapped__ if torch.compiler.is_compiling() else _operator_geometry
    geometry = operator_geometry(
        tuple(weight.shape[2:]), _hashable(stride), _hashable(padding), _hashable(dilation), groups, padding_mode
    )
    statistic_groups = find_groups(norm, num_groups, weight.shape[0])
    if process_group is None and _wants_torchs_operators():
        y = autograd.convolve(input, weight, *geometry, bias=None if bias is None else bias.to(input.dtype))
        if statistic_groups is None:
            v = F.batch_norm(y, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps)
            if training and num_batches_tracked is not None:
                num_batches_tracked.add_(1)
        else:
            v = F.group_norm(y, statistic_groups, bn_weight, bn_bias, eps)
        return apply_activation(v if residual is None else v + residual, activation)
    if statistic_groups is not None or (training and process_group is not None):
        if memory != "save":
            raise ValueError(f"conv_bn: memory must be 'save' with norm={norm!r} or a process_group, got {memory!r}")
        of_a_batch = running_mean, running_var, num_batches_tracked, process_group
        if statistic_groups is not None and any(value is not None for value in of_a_batch):
            raise ValueError(
                "conv_bn: running_mean, running_var, num_batches_tracked and process_group must be None with "
                f"norm={norm!r}"
            )
        options = Normalisation(statistic_groups, process_group, eps, *act)
        added, cancelled = (None, bias) if statistic_groups is None else (bias, None)
        added = None if added is None else added.to(input.dtype)
        y = autograd.convolve(input, weight, *geometry, bias=added)
        out, mean, var, values = normalize(y, bn_weight, bn_bias, residual, cancelled, options)
        if statistic_groups is None:
            update_running((running_mean, running_var, num_batches_tracked), mean, var, bias, int(values), momentum)
        return out
    differentiable = (input, weight, bias, bn_weight, bn_bias, residual)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable)
    out, _, mean, var = operators(*differentiable, running_mean, running_var).conv_bn_forward(
        input,
        weight,
        bias,
        bn_weight,
        bn_bias,
        residual,
        running_mean,
        running_var,
        training,
        memory if needs_grad else "none",
        *geometry,
        eps,
        *act,
    )
    if training:
        running = running_mean, running_var, num_batches_tracked
        update_running(running, mean, var, bias, out.numel() // out.shape[1], momentum)
    return out
